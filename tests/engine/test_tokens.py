"""Every way of saying which tokens, heads and keys: against the oracle, which resolves selectors by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch

from tests.engine.world import World, world_of
from tests.tiny_models import HF_CLIP, HF_DINOV2, HF_VIT, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp import HookedViT, Interchange, Run, execute, wrap
from vit_mechinterp.circuits.probe_intervention import probe_intervention
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.geometry import Geometry
from vit_mechinterp.stimuli import counterfactuals, discrimination

Document = dict[str, Any]
HERE, THERE, BOX = {"column": "here"}, {"column": "there"}, {"box": "box"}


def swap(site: str, **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", **fields}


def named(*edits: Document, **fields: Any) -> list[Document]:
    """One run per edit."""
    return [{"name": f"{n}", "interventions": [edit], **fields} for n, edit in enumerate(edits)]


@pytest.mark.parametrize(
    "tiny", [TIMM_PLAIN, TIMM_REGISTERS, HF_DINOV2, TIMM_POOLED], ids=lambda tiny: tiny.name
)
def test_selectors(tiny: Tiny) -> None:
    world, d = world_of(tiny, 5), world_of(tiny, 5).module_width
    site = "blocks.0.resid_post"
    selectors: list[Any] = ["all", "patches", [3], [7, 2, 11], HERE, BOX, *dict.fromkeys(tiny.prefix)]
    if tiny.prefix:
        selectors += [
            ["cls", 5],
            [5, "cls", 0],
            [tiny.prefix[-1], 1, "cls"] if len(tiny.prefix) > 1 else [1, "cls"],
        ]
    runs = named(
        *(swap(site, tokens=tokens) for tokens in selectors),
        *({"op": "add_direction", "site": site, "tokens": t, "vector": f"direction.{d}"} for t in selectors),
        *({"op": "ablate", "site": site, "tokens": t, "method": "mean"} for t in selectors),
        *(
            {"op": "ablate", "site": site, "tokens": t, "method": "mean", "pool_tokens": True}
            for t in selectors
        ),
        *({"op": "ablate", "site": site, "tokens": t, "method": "resample", "seed": 2} for t in selectors),
        swap(site, tokens=HERE, source_tokens=THERE),
        swap(site, tokens=HERE, source_tokens=[4, 1, 9]),
        swap(site, tokens=[4, 1, 9], source_tokens=THERE),
        {"op": "add_direction", "site": site, "tokens": HERE, "vector": f"rows.3.{d}"},
        {
            "op": "add_direction",
            "site": site,
            "tokens": HERE,
            "vector": f"kinds.3.{d}",
            "choose": {"column": "kind"},
        },
    )
    assert len({len(world.oracle.positions(BOX, i)) for i in range(5)}) > 1  # the boxes differ in size
    world.check(runs, world.execute(runs, batch_size=16))


def test_boxes_of_equal_counts_pair_up_patch_by_patch() -> None:
    world = World(TIMM_PLAIN, 3)
    world.columns["box"] = torch.tensor([[0, 0, 9, 8], [8, 8, 16, 24], [1, 1, 7, 7]])
    world.columns["source_box"] = torch.tensor([[16, 24, 32, 32], [0, 0, 1, 16], [31, 31, 32, 32]])
    runs = named(swap("blocks.1.resid_pre", tokens=BOX, source_tokens={"box": "source_box"}))
    world.check(runs, world.execute(runs))


@pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_VIT], ids=lambda tiny: tiny.name)
def test_the_order_of_source_tokens_is_the_pairing(tiny: Tiny) -> None:
    world = world_of(tiny)
    site, n = "blocks.1.attn.z", tiny.n_tokens - len(tiny.prefix)
    backwards = [*range(n - 1, -1, -1), *dict.fromkeys(reversed(tiny.prefix))]
    forwards = [*dict.fromkeys(tiny.prefix), *range(n)]
    runs = named(
        swap(site, tokens=["cls", 2, 7], source_tokens=["cls", 2, 7]),
        swap(site, tokens=["cls", 2, 7], source_tokens=[7, "cls", 2]),
        swap(site, tokens=[2, 7, "cls"], source_tokens=[2, 7, "cls"]),
        swap(site, tokens="all", source_tokens=backwards),
        swap(site, tokens=backwards, source_tokens="all"),
        swap(site, tokens=backwards, source_tokens=forwards),
    )
    results = world.execute(runs)
    world.check(runs, results)
    same, permuted, consistently = results["0"], results["1"], results["2"]
    assert torch.equal(same, consistently)
    assert float((same - permuted).abs().max()) > 1e-2 * world.scale


@pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_CLIP], ids=lambda tiny: tiny.name)
def test_heads_and_keys(tiny: Tiny) -> None:
    world, at = world_of(tiny, 4), "blocks.1.attn."
    q, d, n_keys = world.shape(at + "q")[-1], world.module_width, tiny.n_tokens
    runs = named(
        *(swap(at + site, heads=heads) for site in ("q", "k", "v", "z", "result") for heads in ([0], [2, 1])),
        *(swap(at + site, heads=[2, 0], tokens=["cls", 3], keys=HERE) for site in ("scores", "pattern")),
        *(swap(at + site, keys=["cls", 4], source_tokens="all") for site in ("scores", "pattern")),
        *(swap(at + site, tokens=HERE, keys=BOX, source_tokens=THERE) for site in ("scores", "pattern")),
        *({"op": "ablate", "site": at + site, "keys": BOX, "heads": [1]} for site in ("scores", "pattern")),
        *({"op": "ablate", "site": at + s, "keys": HERE, "method": "mean"} for s in ("scores", "pattern")),
        {"op": "add_direction", "site": at + "pattern", "tokens": BOX, "vector": f"direction.{n_keys}", "heads": [1]},
        {"op": "add_direction", "site": at + "z", "tokens": HERE, "vector": f"rows.3.{q}", "heads": [2, 0]},
        {"op": "add_direction", "site": at + "result", "tokens": BOX, "vector": f"direction.{d}", "heads": [1]},
        {"op": "inject_subspace", "site": at + "v", "tokens": HERE, "basis": f"basis.{q}", "source": "source",
         "source_tokens": THERE, "heads": [0, 2]},
    )  # fmt: skip
    world.check(runs, world.execute(runs, batch_size=20))


def pictures(n: int, seed: int) -> list[PIL.Image.Image]:
    draw = np.random.default_rng(seed)
    sizes = [(53, 41), (38, 90), (64, 64), (45, 47)][:n]  # width, height
    return [PIL.Image.fromarray(draw.integers(0, 255, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def test_boxes_follow_images_through_resize_and_crop() -> None:
    """timm resizes the shortest edge to floor(32 / 0.875) = 36 pixels and crops the central 32."""
    world = World(TIMM_PLAIN, 4)
    base, source = pictures(4, 0), pictures(4, 1)[::-1]
    # Model pixels: of varying size on the base; then one or two patches that differ between base and source.
    seen = {
        "box": [(3, 3, 20, 9), (9, 9, 31, 31), (0, 16, 8, 24), (17, 1, 23, 30)],
        "here": [(1, 1, 7, 15), (25, 25, 31, 31), (9, 1, 23, 7), (1, 25, 7, 31)],
        "there": [(17, 17, 30, 23), (1, 1, 7, 7), (9, 17, 15, 31), (25, 1, 31, 7)],
    }
    images = {"box": base, "here": base, "there": source}
    boxes = {
        name: [_back(image.size, box) for image, box in zip(images[name], seen[name], strict=True)]
        for name in seen
    }
    data = {"base": base, "source": source, **boxes}
    world.columns.clear()
    world.columns.update(base=world.vit.preprocess(base), source=world.vit.preprocess(source), **seen)
    runs = named(
        # A source's box is drawn on the source's image, whose size is another one.
        swap("blocks.1.resid_pre", tokens={"box": "here"}, source_tokens={"box": "there"}),
        {"op": "ablate", "site": "blocks.0.mlp_out", "tokens": BOX, "method": "mean", "pool_tokens": True},
        {"op": "add_direction", "site": "embed", "tokens": BOX, "vector": "direction.24"},
    )
    world.check(runs, world.execute(runs, data=data))
    with pytest.raises(DataError, match=r"example 1: Nothing of the box .* is left"):
        world.execute(runs[1:], data={**data, "box": [boxes["box"][0], (0, 0, 3, 3), *boxes["box"][2:]]})


def test_boxes_that_the_preprocessing_moves_are_said_to_be_moved() -> None:
    """On stimuli of the model's own size and grid, boxes miss the grid where its transform cuts the borders."""
    pairs = counterfactuals("shape", 8, canvas=64, patch=16, cell=16, progress=False)
    swap_boxes = Interchange(
        site="blocks.0.resid_post", tokens={"box": "edited_box"}, source="source", source_tokens={"box": "source_box"}
    )
    run = Run(name="swap", interventions=[swap_boxes])

    def model(crop_pct: float) -> HookedViT:
        torch.manual_seed(0)
        facts = {"crop_pct": crop_pct, "input_size": (3, 64, 64)}
        sizes = {"img_size": 64, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
        made = timm.create_model("vit_tiny_patch16_224", pretrained=False, pretrained_cfg_overlay=facts, **sizes)
        return wrap(made.eval())

    with pytest.raises(SpecError, match=r"Select equally many; .* cuts images of 64 x 64 px, which moves their boxes over the grid"):
        execute(model(0.9), run, pairs, progress=False)
    with pytest.raises(DataError, match=r"share a patch, .* resizes or cuts images of 64 x 64 px"):
        probe_intervention(model(0.9), discrimination("test", 16, canvas=64, patch=16, cell=16, progress=False), progress=False)
    assert execute(model(1.0), run, pairs, progress=False).logits.shape[1] == 8
    assert Geometry().keeps((3, 3))
    assert not Geometry(unknown="a warp").keeps((3, 3))


def _back(size: tuple[int, int], box: tuple[int, ...]) -> tuple[float, ...]:
    """A box of the model's input in the pixels of the image that was resized and cropped."""
    short = min(size)
    resized = [36 if edge == short else int(36 * edge / short) for edge in size]
    return tuple(
        (edge + round((resized[n % 2] - 32) / 2)) * size[n % 2] / resized[n % 2] for n, edge in enumerate(box)
    )
