"""The logit lens against each model's own norm and head, written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vit_mechinterp as vmi
from tests.circuits.test_logit_attribution import DIRECTIONS, siglip
from tests.oracles import by_hand
from tests.tiny_models import (
    HF_CLIP,
    HF_DINOV2,
    HF_VIT,
    N_LAYERS,
    TIMM_PLAIN,
    TIMM_POOLED,
    TIMM_REGISTERS,
    Tiny,
)
from vit_mechinterp.circuits.logit_lens import logit_lens
from vit_mechinterp.errors import SpecError

CLASS = 2
TINIES = (TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2, HF_CLIP)


def streams(module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    values: dict[str, Tensor] = {}

    def keep(site: str, value: Tensor) -> Tensor:
        values[site] = value
        return value

    return by_hand(module, images, keep), values


def read(module, images: Tensor, stream: Tensor) -> Tensor:
    """The output with another last stream, by the forward written out."""
    last = f"blocks.{N_LAYERS - 1}.resid_post"
    output = by_hand(module, images, lambda site, value: stream if site == last else value)
    if type(module).__name__.startswith("CLIP"):
        return 100 * F.normalize(output, dim=1) @ F.normalize(DIRECTIONS, dim=1).T
    return output


@pytest.mark.parametrize("tiny", TINIES, ids=lambda tiny: tiny.name)
@torch.no_grad()
def test_every_layer_and_patch(tiny: Tiny) -> None:
    module, images = tiny.module(), tiny.images(3, seed=2)
    own, values = streams(module, images)
    directions = DIRECTIONS if tiny is HF_CLIP else None
    result = logit_lens(vmi.wrap(module), images, answer=CLASS, directions=directions, example=1, progress=False)
    table = result.table
    image = table[table["kind"] == "image"].pivot_table(index="layer", columns="quantity", values="value")
    own = read(module, images, values[f"blocks.{N_LAYERS - 1}.resid_post"])
    tokens = table[(table["kind"] == "token") & (table["quantity"] == "logit")]
    named = {name for name in tiny.prefix if tiny.prefix.count(name) == 1}
    assert len(tokens) == N_LAYERS * (tiny.grid[0] * tiny.grid[1] + len(named))
    for layer in range(N_LAYERS):
        stream = values[f"blocks.{layer}.resid_post"]
        logits = read(module, images, stream)
        log, target = logits.log_softmax(1), own.log_softmax(1)
        row = image.loc[layer]
        scale = float(logits.abs().max())
        assert np.isclose(row["logit"], float(logits[:, CLASS].mean()), atol=1e-5 * max(1, scale))
        assert np.isclose(row["probability"], float(log.exp()[:, CLASS].mean()), atol=1e-4)
        assert np.isclose(row["agreement"], float((logits.argmax(1) == own.argmax(1)).float().mean()))
        assert np.isclose(row["rank"], float((logits > logits[:, CLASS, None]).sum(1).float().mean()))
        assert np.isclose(row["KL"], float((target.exp() * (target - log)).sum(1).mean()), rtol=1e-2, atol=1e-4)
        for _, one in tokens[tokens["layer"] == layer].iterrows():
            alone = stream[1:2, one["token"]][:, None].expand(-1, tiny.n_tokens, -1)
            lone = read(module, images[1:2], alone)
            assert np.isclose(one["value"], float(lone[0, CLASS]), atol=1e-5 * max(1.0, float(lone.abs().max())) + 1e-5)
            assert one["top"] == f"class {int(lone.argmax())}"
    assert image["logit"].std() > 1e-2
    assert image.loc[N_LAYERS - 1, "agreement"] == 1
    assert set(result.figures()) == set(result.captions)


def test_attention_pooling_has_a_lens_too() -> None:
    result = logit_lens(vmi.wrap(siglip()), TIMM_PLAIN.images(2), progress=False)
    last = result.table[(result.table["kind"] == "image") & (result.table["layer"] == 1)].set_index("quantity")["value"]
    assert last["agreement"] == 1
    assert abs(last["KL"]) < 1e-6


def test_bad_input_is_named_first() -> None:
    vit, images = vmi.wrap(TIMM_PLAIN.module()), TIMM_PLAIN.images(2)
    with pytest.raises(SpecError, match=r"Layer 3 is out of range"):
        logit_lens(vit, images, layers=[3])
    with pytest.raises(SpecError, match=r"class 5 of example 0 is out of range"):
        logit_lens(vit, images, answer=5)
    with pytest.raises(SpecError, match=r"this model gives 6 features"):
        logit_lens(vmi.wrap(HF_CLIP.module()), images)


def test_what_has_been_read_is_kept(tmp_path: Path) -> None:
    vit, data = vmi.wrap(TIMM_PLAIN.module()), {"base": TIMM_PLAIN.images(2)}
    options = {"folder": tmp_path, "progress": False}
    first = logit_lens(vit, data, **options)
    forwards = []
    handle = vit.module.blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    again = logit_lens(vit, data, **options)
    few = len(forwards)
    handle.remove()
    assert first.table.equals(again.table)
    handle = vit.module.blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    other = logit_lens(vit, {"base": TIMM_PLAIN.images(2, seed=5)}, **options)
    handle.remove()
    assert len(forwards) - few > few, "other images are read anew"
    assert not other.table.equals(first.table)
