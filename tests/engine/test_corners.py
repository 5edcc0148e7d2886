"""Corners: nothing to do, one of everything, odd models, operations of third parties, other containers of data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import vit_mechinterp as vmi
from tests.engine.world import World, world_of
from tests.tiny_models import HF_VIT, TIMM_PLAIN, TIMM_POOLED, Tiny, stirred
from vit_mechinterp import Run, Sweep
from vit_mechinterp.engine import Inputs, register_operator
from vit_mechinterp.engine.forwards import wave
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.spec import OPS, Intervention, SourcedIntervention, TensorRef, register_op

Document = dict[str, Any]


def swap(site: str = "blocks.1.resid_post", **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", **fields}


def run(name: str, *edits: Document, **fields: Any) -> Document:
    return {"name": name, "interventions": list(edits), **fields}


def test_clean_runs_are_the_native_output_bit_for_bit() -> None:
    world = world_of(HF_VIT, 4)
    for column in ("base", "source"):  # apart, so that forwards hold the images that native ones hold
        results = world.execute([run("a", base=column), run("b", base=column, capture=["blocks.1.mlp.post"])])
        with torch.no_grad():
            native = world.vit(world.columns[column])
        assert torch.equal(results["a"], native)
        assert torch.equal(results["b"], native)


def test_nothing_added_changes_nothing() -> None:
    world = world_of(TIMM_PLAIN)
    edits = [
        {"op": "add_direction", "site": "blocks.1.resid_post", "vector": "direction.24", "alpha": 0.0},
        {"op": "add_direction", "site": "blocks.1.attn.pattern", "vector": "zeros"},
        {"op": "inject_subspace", "site": "embed", "basis": "basis.24", "gate": "closed", "source": "source"},
    ]
    world.tensors.update(zeros=torch.zeros(17), closed=torch.zeros(3))
    results = world.execute([*(run(f"{n}", edit) for n, edit in enumerate(edits)), run("clean")])
    for name in "012":
        assert float((results[name] - results["clean"]).abs().max()) <= 1e-6 * world.scale


def test_one_example() -> None:
    world = World(TIMM_PLAIN, 1)
    mean = {"op": "ablate", "site": "blocks.1.attn.z", "method": "mean"}
    runs = [
        run("swap", swap(tokens={"box": "box"}), capture=["blocks.0.attn.k", "logits"]),
        run("mean", mean),
    ]
    results = world.execute([*runs, run("clean")])
    world.check([*runs[:1], run("clean")], results)
    assert results.logits.shape == (3, 1, 5)
    # The mean over one example is that example.
    assert torch.allclose(results["mean"], results["clean"], atol=1e-6)


def test_one_block_and_one_head() -> None:
    tiny = replace(
        TIMM_PLAIN,
        build=lambda: VisionTransformer(
            img_size=32,
            patch_size=8,
            embed_dim=8,
            depth=1,
            num_heads=1,
            num_classes=0,
            global_pool="avg",
            class_token=False,
        ),
    )
    module = tiny.module()
    vit = vmi.wrap(module)
    data = {"base": tiny.images(3, 1), "source": tiny.images(3, 2)}
    sites = [name for name in vit.site_names() if not name.endswith(("logits", "pooled"))]
    runs = [Run.model_validate(run(site, swap(site))) for site in sites]
    results = vmi.execute(vit, runs, data, progress=False)
    with torch.no_grad():
        base, source = module(data["base"]), module(data["source"])
    assert torch.allclose(results["embed"], source, atol=1e-5)
    assert torch.allclose(results["blocks.0.resid_post"], source, atol=1e-5)
    assert float((results["blocks.0.attn.q"] - base).abs().amax(1).min()) > 1e-3


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_POOLED, HF_VIT], ids=lambda tiny: tiny.name)
def test_replacing_the_whole_stream_gives_the_sources_output(tiny: Tiny) -> None:
    world = world_of(tiny)
    streams = [
        "embed",
        *(f"blocks.{n}.{name}" for n in range(3) for name in ("resid_pre", "resid_mid", "resid_post")),
        "pooled",
    ]
    results = world.execute([run(site, swap(site)) for site in streams])
    source = world.oracle.clean("source")[0]
    assert float((source - world.oracle.clean("base")[0]).abs().amax(1).min()) > 1e-2
    for site in streams:
        assert torch.allclose(results[site], source, atol=1e-5 * world.scale), site


def test_pixels_that_a_model_knows_as_distillation_tokens() -> None:
    module = stirred(
        VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=5
        )
    ).eval()
    vit = vmi.wrap(module)
    assert vit.layout.tokens.prefix == ("cls", "distillation")
    data = {"base": TIMM_PLAIN.images(3, 1), "source": TIMM_PLAIN.images(3, 2)}
    edits = {"distillation": 1, "cls": 0}
    runs = [Run.model_validate(run(name, swap(tokens=name))) for name in edits]
    runs.append(Run.model_validate(run("patch", swap(tokens=[0]))))
    results = vmi.execute(vit, runs, data, progress=False)
    for name, position in {**edits, "patch": 2}.items():
        kept: list[Tensor] = []

        def hook(block: Any, args: Any, output: Tensor, kept: Any = kept, position: int = position) -> Tensor:
            kept.append(output)
            return (
                output
                if len(kept) == 1
                else output.index_copy(1, torch.tensor([position]), kept[0][:, [position]])
            )

        handle = module.blocks[1].register_forward_hook(hook)
        with torch.no_grad():
            module(data["source"])
            expected = module(data["base"])
        handle.remove()
        assert torch.allclose(results[name], expected, atol=1e-5)
        with torch.no_grad():
            assert float((expected - module(data["base"])).abs().amax(1).min()) > 1e-3


def test_a_sweep_is_its_runs() -> None:
    world = world_of(TIMM_PLAIN)
    sweep = Sweep(
        name="{layer}-{tokens}",
        interventions=[vmi.Interchange(site="blocks.0.attn.z", source="source")],
        over={"layer": "all", "tokens": {"cls": ["cls"], "box": {"box": "box"}}},
        capture=["blocks.2.resid_post"],
    )
    results = vmi.execute(world.vit, sweep, world.columns, progress=False)
    single = [vmi.execute(world.vit, one, world.columns, progress=False) for one in sweep.runs(3)]
    assert results.run_names == tuple(one.run_names[0] for one in single)
    for one in single:
        assert torch.allclose(results[one.run_names[0]], one.logits[0], atol=1e-5 * world.scale)


def test_a_dataset_is_its_columns() -> None:
    draw = np.random.default_rng(0)
    pictures = [
        [PIL.Image.fromarray(draw.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(4)]
        for _ in range(2)
    ]
    columns: dict[str, Any] = {
        "base": pictures[0],
        "source": pictures[1],
        "patches": [[1, 2], [3, 4], [0, 9], [5, 6]],
        "box": [[4, 4, 20, 12], [20, 20, 30, 39], [30, 8, 40, 12], [10, 30, 12, 31]],
        "label": [0, 1, 1, 0],
    }
    features = datasets.Features(
        {
            "base": datasets.Image(),
            "source": datasets.Image(),
            "patches": datasets.List(datasets.Value("int64")),
            "box": datasets.List(datasets.Value("int64")),
            "label": datasets.ClassLabel(names=["different", "same"]),
        }
    )
    dataset = datasets.Dataset.from_dict(columns, features=features)
    world = world_of(TIMM_PLAIN)
    runs = [run("column", swap(tokens={"column": "patches"})), run("all", swap())]
    runs.append(run("ablate", {"op": "ablate", "site": "blocks.0.ln2", "tokens": {"box": "box"}}))
    expected = world.execute(runs, data=columns, batch_size=3)
    found = world.execute(runs, data=dataset, batch_size=3)
    assert torch.equal(expected.logits, found.logits)
    assert found.labels == {"label": [0, 1, 1, 0]}
    shuffled = world.execute(runs, data=dataset.select([2, 0, 3, 1]), batch_size=3)
    assert torch.allclose(shuffled.logits, expected.logits[:, [2, 0, 3, 1]], atol=1e-5 * world.scale)
    tensors = world.execute(
        runs[:1], data={**columns, **{c: world.vit.preprocess(columns[c]) for c in ("base", "source")}}
    )
    assert torch.allclose(tensors.logits[0], expected.logits[0], atol=1e-5 * world.scale)


def test_images_of_a_file_that_is_mapped_to_be_read(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    world = world_of(TIMM_PLAIN, 3)
    data: dict[str, Any] = {}
    for column in ("base", "source"):
        images = world.columns[column].numpy()
        images.tofile(tmp_path / column)
        data[column] = np.memmap(tmp_path / column, images.dtype, mode="r", shape=images.shape)
    torch.set_warn_always(True)  # and not once for all tests
    try:
        world.check([run("a", swap())], world.execute([run("a", swap())], data=data))
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list


def test_an_operation_of_a_third_party() -> None:
    @register_op
    class Mix(SourcedIntervention):
        """``h <- (1 - s) h + s h_src M``."""

        op: Literal["mix"] = "mix"
        share: float = 0.5
        matrix: TensorRef

    @register_operator(Mix)
    def mix(spec: Mix, h: Tensor, inputs: Inputs) -> Tensor:
        assert inputs.source is not None
        return (1 - spec.share) * h + spec.share * inputs.source @ inputs.tensors["matrix"]

    try:
        world = world_of(TIMM_PLAIN)
        edit = {"op": "mix", "site": "blocks.1.resid_post", "source": "source", "tokens": ["cls", 3], "source_tokens": [3, 5],
                "share": 0.25, "matrix": "M"}  # fmt: skip
        matrix = torch.randn(24, 24) / 5
        results = vmi.execute(
            world.vit,
            Run.model_validate(run("r", edit)),
            world.columns,
            tensors={"M": matrix},
            progress=False,
        )
        h, source = (world.oracle.clean(c)[1]["blocks.1.resid_post"] for c in ("base", "source"))
        new = h.clone()
        new[:, [0, 4]] = 0.75 * h[:, [0, 4]] + 0.25 * source[:, [4, 6]] @ matrix
        with torch.no_grad():
            expected = world.module.head(world.module.norm(world.module.blocks[2](new))[:, 0])
        assert torch.allclose(results["r"], expected, atol=1e-5 * world.scale)
        assert float((expected - world.oracle.clean("base")[0]).abs().amax(1).min()) > 1e-2
    finally:
        OPS.pop("mix")


def test_an_operation_that_writes_into_its_argument_leaves_other_keys_alone() -> None:
    @register_op
    class Fade(Intervention):
        """``h <- h / 2``, in place."""

        op: Literal["fade"] = "fade"

    @register_operator(Fade)
    def fade(spec: Fade, h: Tensor, inputs: Inputs) -> Tensor:
        return h.mul_(0.5)

    try:
        world = world_of(TIMM_PLAIN)
        site = "blocks.1.attn.pattern"
        for fields in ({}, {"tokens": ["cls", 3]}, {"heads": [1]}):
            edit = {"op": "fade", "site": site, "keys": [0, 4], **fields}
            run_ = Run.model_validate(run("r", edit, capture=[site]))
            results = vmi.execute(world.vit, run_, world.columns, progress=False)
            expected = world.oracle.clean("base")[1][site].clone()
            heads = fields.get("heads", [0, 1, 2])
            queries = [0, 4] if "tokens" in fields else list(range(17))
            for head in heads:
                for query in queries:
                    expected[:, head, query, [1, 5]] *= 0.5
            found = results.captures["r"][site]
            assert torch.allclose(found, expected, atol=1e-6)
            assert float((found - world.oracle.clean("base")[1][site]).abs().max()) > 1e-3
    finally:
        OPS.pop("fade")


def test_executing_in_inference_mode_or_under_autocast_works() -> None:
    world = world_of(TIMM_PLAIN)
    runs = [
        run("r", swap("blocks.1.mlp_out"), capture=["blocks.1.attn.pattern"]),
        run("mean", {"op": "ablate", "site": "embed"}),
    ]
    expected = world.execute(runs).logits
    with torch.inference_mode():
        assert torch.equal(world.execute(runs).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(world.execute(runs).logits, expected, atol=0.1 * world.scale)


def test_a_thousand_runs_are_as_good_as_one() -> None:
    world = world_of(TIMM_PLAIN)
    edits = [swap(f"blocks.{n % 3}.attn.z", tokens=[n % 16], heads=[n % 3]) for n in range(300)]
    results = world.execute([run(f"{n}", edit) for n, edit in enumerate(edits)], batch_size=256)
    some = [run(f"{n}", edits[n]) for n in (0, 99, 199, 298)]
    world.check(some, results, effect=None)


def test_options_are_told_apart_by_their_types() -> None:
    """A number and the text that looks like it are two options of an operation."""

    @register_op
    class Marked(Intervention):
        """``h`` plus one for a text, plus two for a number, plus three for a truth value."""

        op: Literal["marked"] = "marked"
        mark: bool | float | str

    @register_operator(Marked)
    def marked(spec: Marked, h: Tensor, inputs: Inputs) -> Tensor:
        return h + {str: 1.0, float: 2.0, bool: 3.0}[type(spec.mark)]

    try:
        world = world_of(TIMM_PLAIN)
        marks = ["1.0", 1.0, "True", True]
        edits = [{"op": "marked", "site": "logits", "mark": mark} for mark in marks]
        runs = [Run.model_validate(run(f"r{n}", edit)) for n, edit in enumerate(edits)]
        results = vmi.execute(world.vit, runs, world.columns, progress=False)
        clean = world.oracle.clean("base")[0]
        for n, change in enumerate((1.0, 2.0, 1.0, 3.0)):
            assert torch.allclose(results[f"r{n}"], clean + change, atol=1e-5)
    finally:
        OPS.pop("marked")


def test_a_model_that_would_normalise_by_the_batch_is_refused() -> None:
    world = World(TIMM_PLAIN, 2)
    module: Any = world.module
    module.fc_norm = torch.nn.BatchNorm1d(24)
    run_ = Run.model_validate(run("clean"))
    with pytest.raises(ExecutionError, match=r"would normalise by the images .* \(at fc_norm\)\. Call module\.eval\(\) first"):
        vmi.execute(world.vit, run_, world.columns, progress=False)
    assert int(module.fc_norm.num_batches_tracked) == 0
    module.fc_norm.eval()
    assert vmi.execute(world.vit, run_, world.columns, progress=False).logits.shape[:2] == (1, 2)


def test_an_intervention_that_is_not_made_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(TIMM_PLAIN)
    monkeypatch.setattr(wave, "stacked", lambda edits, value: [])
    with pytest.raises(ExecutionError, match=r"did not fire: run 'r', interchange at blocks.1.attn.q"):
        world.execute([run("r", swap("blocks.1.attn.q"))])
