"""What is read off attention patterns, against loops over queries and keys."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import vit_mechinterp as vmi
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp.circuits.attention import attention
from vit_mechinterp.errors import SpecError, UnsupportedSiteError

TINIES = (TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_DINOV2)


def read(tiny: Tiny, module, images: Tensor) -> list[Tensor]:
    patterns: dict[str, Tensor] = {}

    def keep(site: str, value: Tensor) -> Tensor:
        patterns[site] = value
        return value

    by_hand(module, images, keep)
    return [patterns[f"blocks.{layer}.attn.pattern"] for layer in range(N_LAYERS)]


@pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.name)
@torch.no_grad()
def test_heads_maps_and_rollout(tiny: Tiny) -> None:
    module, images = tiny.module(), tiny.images(2, seed=4)
    patterns = read(tiny, module, images)
    result = attention(vmi.wrap(module), images, example=1, gradient=False, progress=False)
    table, first = result.table, len(tiny.prefix)
    columns = tiny.grid[1]
    patches = range(first, tiny.n_tokens)
    heads = table[table["kind"] == "head"].set_index(["quantity", "layer", "head"])["value"]
    for layer in range(N_LAYERS):
        for head in range(tiny.n_heads):
            distances, entropies, special = [], [], {name: [] for name in dict.fromkeys(tiny.prefix)}
            for image in range(2):
                for q in patches:
                    row = patterns[layer][image, head, q].tolist()
                    here = divmod(q - first, columns)
                    far = [row[k] * math.dist(here, divmod(k - first, columns)) for k in patches]
                    distances.append(sum(far) / sum(row[k] for k in patches))
                    entropies.append(-sum(p * math.log(p) for p in row if p > 0))
                    for name, shares in special.items():
                        shares.append(sum(row[k] for k, own in enumerate(tiny.prefix) if own == name))
            assert np.isclose(heads["distance", layer, head], np.mean(distances), atol=1e-5)
            assert np.isclose(heads["entropy", layer, head], np.mean(entropies), atol=1e-5)
            for name, shares in special.items():
                assert np.isclose(heads[f"to {name}", layer, head], np.mean(shares), atol=1e-6)
    assert heads["distance"].std() > 1e-2

    queries = [0] if "cls" in tiny.prefix else list(patches)
    maps = table[table["kind"] == "map"].set_index(["layer", "head", "token"])["value"]
    joint = np.eye(tiny.n_tokens)
    for layer in range(N_LAYERS):
        own = patterns[layer][1].double().numpy()
        for head in range(tiny.n_heads):
            assert np.allclose(maps[layer, head], own[head][queries].mean(0), atol=1e-6)
        mixed = 0.5 * own.mean(0) + 0.5 * np.eye(tiny.n_tokens)
        joint = mixed @ joint
    rolled = table[(table["kind"] == "rollout") & (table["quantity"] == "rollout")]["value"]
    assert np.allclose(rolled, joint[queries].mean(0), atol=1e-6)

    alike = table[table["kind"] == "similarity"].set_index(["layer", "head", "other_layer", "other_head"])["value"]
    one, other = patterns[0][:, 0], patterns[2][:, 1]
    expected = np.mean([1 - 0.5 * float((a - b).abs().sum()) / tiny.n_tokens for a, b in zip(one, other, strict=True)])
    assert np.isclose(alike[0, 0, 2, 1], expected, atol=1e-5)
    assert set(result.figures()) == set(result.captions)


def test_the_gradient_variant_follows_finite_differences() -> None:
    tiny = TIMM_PLAIN
    module, images = tiny.module().double(), tiny.images(1, seed=4).double()
    patterns = [pattern.detach() for pattern in read(tiny, module, images)]
    vit = vmi.wrap(module)
    result = attention(vit, images, metric=lambda outputs: outputs[:, 2], progress=False)

    @torch.no_grad()
    def logit(layer: int, head: int, q: int, k: int, step: float) -> float:
        def touch(site: str, value: Tensor) -> Tensor:
            if site == f"blocks.{layer}.attn.pattern":
                value = value.clone()
                value[0, head, q, k] += step
            return value

        return float(by_hand(module, images, touch)[0, 2])

    n, joint = tiny.n_tokens, np.eye(tiny.n_tokens)
    for layer in range(N_LAYERS):
        slope = np.array(
            [
                [[(logit(layer, h, q, k, 1e-4) - logit(layer, h, q, k, -1e-4)) / 2e-4 for k in range(n)] for q in range(n)]
                for h in range(tiny.n_heads)
            ]
        )
        cam = np.maximum(slope * patterns[layer][0].numpy(), 0).mean(0)
        joint = joint + cam @ joint
    found = result.table[(result.table["kind"] == "rollout") & (result.table["quantity"] == "gradient")]["value"]
    assert np.allclose(found, joint[0], rtol=1e-4, atol=1e-6)
    assert found[1:].max() > 1e-3


def test_colours_are_beside_uniform_attention() -> None:
    result = attention(vmi.wrap(TIMM_PLAIN.module()), TIMM_PLAIN.images(2), progress=False)
    control = result.table[result.table["kind"] == "control"].set_index("quantity")["value"]
    for name, figure in result.figures().items():
        if name in ("distance", "entropy", "to_cls"):
            drawn = next(artist for artist in figure.axes[0].get_children() if hasattr(artist, "get_clim"))
            low, high = drawn.get_clim()
            shown = result.table[(result.table["kind"] == "head") & (result.table["quantity"] == name.replace("_", " "))]["value"]
            assert low <= shown.min()
            assert shown.max() <= high + 0.005
            uniform = control[name.replace("_", " ")]
            middle = {"distance": uniform, "entropy": uniform / 2, "to_cls": high / 2}[name]
            assert math.isclose((low + high) / 2, middle, abs_tol=0.01)


def test_bad_input_is_named_first() -> None:
    vit, images = vmi.wrap(TIMM_PLAIN.module()), TIMM_PLAIN.images(2)
    with pytest.raises(SpecError, match=r"registers"):
        attention(vit, images, query="registers")
    with pytest.raises(SpecError, match=r"query is a token name or patch indices"):
        attention(vit, images, query={"box": "edited_box"})
    with pytest.raises(SpecError, match=r"There is no metric 'logit'"):
        attention(vit, images, metric="logit")
    seen: list[int] = []
    vit.module.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with pytest.raises(SpecError, match=r"has no gradient"):
        attention(vit, TIMM_PLAIN.images(9), metric="rank", progress=False)
    assert seen == [1] * len(seen), "the other images are not looked at"


def test_layers_without_a_pattern_are_left_out_with_the_reason() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    reason = "it is made so"
    absent = dict(vit.layout.absent) | {"blocks.1.attn.pattern": reason}
    object.__setattr__(vit.layout, "absent", absent)
    result = attention(vit, TIMM_PLAIN.images(2), progress=False)
    assert result.provenance["left_out"] == {
        "blocks.1.attn.pattern": reason, "rollout": "not every layer has a pattern",
    }  # fmt: skip
    assert set(result.table[result.table["kind"] == "head"]["layer"]) == {0, 2}
    assert "rollout" not in result.figures()
    object.__setattr__(vit.layout, "absent", absent | {f"blocks.{r}.attn.pattern": reason for r in range(3)})
    with pytest.raises(UnsupportedSiteError, match=f"has no pattern to read: attn.pattern: {reason}"):
        attention(vit, TIMM_PLAIN.images(2), progress=False)
