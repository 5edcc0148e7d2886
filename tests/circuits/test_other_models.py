"""Everyday circuits on models of other makes, against raw hooks on their native modules.

A distillation token, an attention pool, gated MLPs with rotations, registers with layer scale, a tower that gives
features: what a circuit reads and edits is looked up in the native module here, by its own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.tiny_models import HF_CLIP, HF_DINOV2, stirred
from tests.zoo.shrink import shrunk
from vit_mechinterp import circuits
from vit_mechinterp.circuits.ablation_runs import check_heads
from vit_mechinterp.circuits.representation_similarity import rsa
from vit_mechinterp.errors import SpecError, UnsupportedSiteError

N, SEED = 6, 3
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Native:
    """Where a model keeps its blocks, and in them the projection behind the heads and the MLP; and its tokens."""

    name: str
    build: Callable[[], nn.Module]
    blocks: str
    projection: str
    prefix: tuple[str, ...]
    n_heads: int

    @cached_property
    def module(self) -> nn.Module:
        torch.manual_seed(0)
        return stirred(self.build()).eval()

    @cached_property
    def vit(self) -> Any:
        return vmi.wrap(self.module)

    def images(self, seed: int = 0, n: int = N) -> Tensor:
        return torch.randn(n, *self.vit.layout.tokens.input_shape, generator=torch.Generator().manual_seed(seed))

    def block(self, layer: int) -> nn.Module:
        return self.module.get_submodule(f"{self.blocks}.{layer}")

    @contextmanager
    def edited(self, *, z: Mapping[int, Edit] = {}, mlp: Mapping[int, Edit] = {}, stream: Mapping[int, Edit] = {}) -> Iterator[None]:
        """Edit, by layer, what enters the projection behind the heads, what the MLP returns, what a block is given."""
        with ExitStack() as hooks:
            for layer, edit in z.items():
                def before(_: Any, inputs: tuple[Tensor, ...], edit: Edit = edit) -> tuple[Tensor, ...]:
                    return (edit(inputs[0].unflatten(-1, (self.n_heads, -1))).flatten(-2), *inputs[1:])
                hooks.callback(self.block(layer).get_submodule(self.projection).register_forward_pre_hook(before).remove)
            for layer, edit in mlp.items():
                hooks.callback(self.block(layer).mlp.register_forward_hook(lambda _, i, o, edit=edit: edit(o)).remove)
            for layer, edit in stream.items():
                def given(_: Any, inputs: tuple[Tensor, ...], edit: Edit = edit) -> tuple[Tensor, ...]:
                    return (edit(inputs[0]), *inputs[1:])
                hooks.callback(self.block(layer).register_forward_pre_hook(given).remove)
            yield

    def outputs(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            found = self.module(images)
        for name in ("logits", "image_embeds"):
            found = getattr(found, name, found)
        return found

    def kept(self, images: Tensor, what: str, layer: int) -> Tensor:
        """The clean value at one of the three places."""
        found: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            found.append(value.detach().clone())
            return value

        with self.edited(**{what: {layer: keep}}):
            self.outputs(images)
        return found[0]


def timm(name: str, blocks: str, projection: str, prefix: tuple[str, ...]) -> Native:
    return Native(name, lambda: shrunk(name), blocks, projection, prefix, 4)


NATIVES = (
    timm("deit_tiny_distilled_patch16_224", "blocks", "attn.proj", ("cls", "distillation")),
    timm("vit_base_patch16_siglip_224", "blocks", "attn.proj", ()),
    timm("vit_base_patch16_siglip_gap_224", "blocks", "attn.proj", ()),
    timm("eva02_tiny_patch14_224", "blocks", "attn.proj", ("cls",)),
    Native("dinov2 with registers", HF_DINOV2.build, "dinov2_with_registers.encoder.layer", "attention.o_proj", HF_DINOV2.prefix, 2),
    Native("clip", HF_CLIP.build, "vision_model.encoder.layers", "self_attn.out_proj", HF_CLIP.prefix, 3),
)


def metric(outputs: Tensor) -> Tensor:
    return outputs[:, 0] - 0.2 * outputs[:, 1] ** 2


def replaced(values: Tensor, method: str) -> Tensor:
    if method == "zero":
        return torch.zeros_like(values)
    if method == "mean":
        return values.mean(0, keepdim=True).expand_as(values)
    return values[torch.from_numpy(np.random.default_rng(SEED).permutation(len(values)))]


def writing(index: Any, new: Tensor) -> Edit:
    def edit(value: Tensor) -> Tensor:
        value = value.clone()
        value[index] = new[index]
        return value

    return edit


every_model = pytest.mark.parametrize("native", NATIVES, ids=lambda native: native.name)


@every_model
def test_ablations_of_every_head_mlp_and_named_token(native: Native) -> None:
    images = native.images(1)
    table = circuits.ablation_sweep(
        native.vit, images, parts=("heads", "mlps", "tokens"), metric=metric, seed=SEED, progress=False
    ).table
    everything = slice(None)
    changes = []
    for row in table.to_dict("records"):
        layer, method = row["layer"], row["method"]
        place = {"heads": "z", "mlps": "mlp", "tokens": "stream"}[row["part"]]
        new = replaced(native.kept(images, place, layer), method)
        index: Any = everything
        if row["part"] == "heads":
            index = (everything, everything, row["head"])
        elif row["part"] == "tokens":
            named = [i for i, name in enumerate(native.prefix) if name == row["tokens"]]
            first = len(native.prefix)
            index = (everything, named if row["tokens"] != "patches" else slice(first, None))
        with native.edited(**{place: {layer: writing(index, new)}}):
            wanted = metric(native.outputs(images)).double()
        clean = metric(native.outputs(images)).double()
        assert row["change"] == pytest.approx(float((wanted - clean).mean()), abs=5e-5), (row["part"], layer, method, row["tokens"])
        changes.append(abs(row["change"]))
    assert {*table["tokens"]} == {"all", "patches", *native.prefix}
    assert len(table) == 3 * 3 * (native.n_heads + 1 + 1 + len({*native.prefix}))
    assert np.mean(np.array(changes) > 1e-3) > 0.8


@every_model
def test_heads_that_go_one_after_another(native: Native) -> None:
    images = native.images(2)
    order = [(layer, head) for layer in (2, 0, 1) for head in range(native.n_heads)]
    table = circuits.cumulative_ablation(
        native.vit, images, order=order, random_orders=0, step=2, metric=metric, progress=False
    ).table

    def without(heads: list[tuple[int, int]]) -> float:
        edits = {}
        for layer in {layer for layer, _ in heads}:
            new = replaced(native.kept(images, "z", layer), "mean")
            edits[layer] = writing((slice(None), slice(None), [h for own, h in heads if own == layer]), new)
        with native.edited(z=edits):
            return float(metric(native.outputs(images)).double().mean())

    for name, own in (("most important first", order), ("least important first", order[::-1])):
        curve = table[table["order"] == name].set_index("ablated")["value"]
        for count, value in curve.items():
            assert value == pytest.approx(without(own[:count]), abs=5e-5), (name, count)
    circuit = order[:3]
    sets = circuits.faithfulness(
        native.vit, images, circuit, metric=metric, subsets=0, random_sets=0, progress=False
    ).table.set_index("kind")["value"]
    assert sets["model"] == pytest.approx(without([]), abs=5e-5)
    assert sets["nothing"] == pytest.approx(without(order), abs=5e-5)
    assert sets["circuit"] == pytest.approx(without(order[3:]), abs=5e-5)
    assert sets["complement"] == pytest.approx(without(circuit), abs=5e-5)
    assert abs(sets["circuit"] - sets["nothing"]) > 1e-3


@every_model
def test_attention_as_the_native_call_computes_it(native: Native, monkeypatch: pytest.MonkeyPatch) -> None:
    images, patterns = native.images(3, n=2), []
    fused = nn.functional.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        scale = options.get("scale") or q.shape[-1] ** -0.5
        k_every = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        patterns.append((scale * q @ k_every.transpose(-1, -2)).softmax(-1).double())
        return fused(q, k, v, *args, **options)

    native.vit.sites()
    with monkeypatch.context() as patched:
        patched.setattr(nn.functional, "scaled_dot_product_attention", watched)
        native.outputs(images)
    table = circuits.attention(native.vit, images, example=1, gradient=False, progress=False).table
    first, n = len(native.prefix), patterns[0].shape[-1]
    patches = range(first, n)
    heads = table[table["kind"] == "head"].set_index(["quantity", "layer", "head"])["value"]
    maps = table[table["kind"] == "map"].set_index(["layer", "head", "token"])["value"]
    queries = [0] if native.prefix else list(patches)
    joint = np.eye(n)
    for layer, pattern in enumerate(patterns[:3]):
        rows = pattern[:, :, first:]
        entropy = -(rows * rows.clamp(min=1e-300).log()).sum(-1).mean((0, 2))
        for head in range(native.n_heads):
            assert heads["entropy", layer, head] == pytest.approx(float(entropy[head]), abs=1e-5)
            for name in {*native.prefix}:
                own = [i for i, other in enumerate(native.prefix) if other == name]
                assert heads[f"to {name}", layer, head] == pytest.approx(float(rows[:, head][..., own].sum(-1).mean()), abs=1e-6)
            assert np.allclose(maps[layer, head], pattern[1, head, queries].mean(0), atol=1e-6)
        joint = (0.5 * pattern[1].mean(0).numpy() + 0.5 * np.eye(n)) @ joint
    rolled = table[(table["kind"] == "rollout") & (table["quantity"] == "rollout")]["value"]
    assert np.allclose(rolled, joint[queries].mean(0), atol=1e-6)
    alike = table[table["kind"] == "similarity"].set_index(["layer", "head", "other_layer", "other_head"])["value"]
    for (layer, head, other_layer, other_head), value in alike.items():
        apart = (patterns[layer][:, head] - patterns[other_layer][:, other_head]).abs().sum(-1).mean() / 2
        assert value == pytest.approx(1 - float(apart), abs=1e-5)


@every_model
def test_steering_directions_and_similarity_of_streams(native: Native) -> None:
    images = native.images(4, n=12) + torch.tensor([0.5 * (i % 2) for i in range(12)])[:, None, None, None]
    data = {"base": images, "label": [i % 2 for i in range(12)]}
    # What a block is given is what the one before it left.
    streams = [native.kept(images, "stream", layer).mean(1).double().numpy() for layer in (1, 2)]
    sites = ["blocks.0.resid_post", "blocks.1.resid_post"]
    labels = np.array(data["label"])
    found = circuits.mean_directions(native.vit, data, sites=sites, progress=False)
    for site, x in zip(sites, streams, strict=True):
        wanted = x[labels == 1].mean(0) - x[labels == 0].mean(0)
        assert np.allclose(found.tensors[site], wanted, atol=1e-5)
        assert np.linalg.norm(wanted) > 0.05
    alike = circuits.representation_similarity(native.vit, data, sites=sites, progress=False).table.set_index(["site", "other_site"])
    x, y = (value - value.mean(0) for value in streams)
    cka = np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    assert alike.loc[tuple(sites), "cka"] == pytest.approx(cka, abs=1e-5)
    assert alike.loc[tuple(sites), "rsa"] == pytest.approx(rsa(*streams), abs=1e-3)
    direction = found.tensors[sites[0]]
    steered = circuits.steering(
        native.vit, data, {sites[0]: direction}, alphas=(-3, 2), tokens="patches", metric=metric, controls=0, progress=False
    ).table
    for row in steered.itertuples():
        added = torch.zeros(streams[0].shape[-1])
        added += row.alpha * direction

        def edit(value: Tensor, added: Tensor = added) -> Tensor:
            value = value.clone()
            value[:, len(native.prefix) :] += added
            return value

        with native.edited(stream={1: edit}):
            wanted = float(metric(native.outputs(images)).double().mean())
        assert row.value == pytest.approx(wanted, abs=5e-5)
        assert abs(row.change) > 1e-3


def test_attentions_side_by_side_have_no_heads_to_go_one_by_one() -> None:
    vit = vmi.wrap(stirred(shrunk("vit_base_patch16_18x2_224")).eval())
    images = torch.randn(3, *vit.layout.tokens.input_shape)
    reason = "attn.z: the block runs several attention modules side by side"
    with pytest.raises(UnsupportedSiteError, match=f"no heads that could be ablated one by one: {reason}"):
        circuits.cumulative_ablation(vit, images)
    with pytest.raises(UnsupportedSiteError, match="no heads that could be ablated one by one"):
        circuits.faithfulness(vit, images, [(0, 0)])
    absent = dict(vit.layout.absent)
    object.__setattr__(vit.layout, "absent", {site: why for site, why in absent.items() if site != "blocks.1.attn.z"})
    with pytest.raises(UnsupportedSiteError, match="The heads of layer 0 cannot be ablated one by one: the block runs several"):
        check_heads(vit, [(0, 0)])


def test_a_norm_of_maps_cannot_be_held() -> None:
    vit = vmi.wrap(stirred(shrunk("samvit_base_patch16")).eval())
    with pytest.raises(SpecError, match=r"LayerNorm2d behind the last block takes no single vectors of \d+ features \(.*\), so its"):
        circuits.logit_attribution(vit, torch.randn(2, *vit.layout.tokens.input_shape), progress=False)
