"""Results survive saving, make tables, and say where they came from: digests that change when, and only when, it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import PIL.Image
import pytest
import torch
import transformers

import vit_mechinterp as vmi
from tests.engine.world import World, world_of
from tests.tiny_models import TIMM_PLAIN, stirred
from vit_mechinterp import Results, Run
from vit_mechinterp.errors import TensorFileError

Document = dict[str, Any]


def swap(site: str = "blocks.1.resid_post", **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", "tokens": ["cls", 2], **fields}


def documents() -> list[Document]:
    capture = [
        "blocks.1.resid_post",
        {"site": "embed", "tokens": {"box": "box"}},
        {"site": "blocks.0.attn.pattern", "tokens": {"box": "box"}, "heads": [1]},
    ]
    push = {"op": "add_direction", "site": "blocks.0.mlp_out", "vector": "v", "tokens": {"column": "here"}}
    return [
        {"name": "swap/1", "interventions": [swap()], "capture": capture},
        {"name": "push", "interventions": [push]},
        {"name": "clean", "capture": capture},
    ]


def executed(world: World, vector: torch.Tensor | None = None, runs: Any = None, **options: Any) -> Results:
    vector = torch.linspace(-1, 1, 24) if vector is None else vector
    runs = [Run.model_validate(document) for document in (runs or documents())]
    return vmi.execute(
        world.vit, runs, options.pop("data", world.columns), {"v": vector}, progress=False, **options
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    results = executed(World(TIMM_PLAIN, 4, dtype=dtype), batch_size=3)
    folder = results.save(tmp_path / "new" / "folder")
    again = Results.load(folder)
    assert torch.equal(again.logits, results.logits)
    assert again.run_names == results.run_names
    assert again.labels == results.labels == {"label": [0, 1, 0, 1]}
    assert again.provenance == results.provenance
    assert {run: list(own) for run, own in again.captures.items()} == {
        run: list(own) for run, own in results.captures.items()
    }
    for run, own in results.captures.items():
        for site, value in own.items():
            other = again.captures[run][site]
            assert type(other) is type(value)
            assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(value, other, strict=True))
    table = results.to_pandas()
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), table)
    assert list(pd.read_csv(folder / "results.csv").columns) == list(table.columns)
    again.save(folder)  # over itself
    assert torch.equal(Results.load(folder).logits, results.logits)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "results.json").unlink(),
        lambda folder: (folder / "results.safetensors").write_bytes(
            (folder / "results.safetensors").read_bytes()[:-9]
        ),
        lambda folder: (folder / "results.json").write_text("{"),
        lambda folder: (folder / "results.json").write_text("{}"),
        lambda folder: (folder / "results.json").write_text("[1]"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    executed(world_of(TIMM_PLAIN, 4)).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(TensorFileError, match="holds no readable results"):
        Results.load(tmp_path)


def test_the_table_has_a_row_per_run_and_example() -> None:
    results = executed(world_of(TIMM_PLAIN, 4))
    table = results.to_pandas()
    assert list(table.columns) == ["run", "example", *(f"logit_{i}" for i in range(5)), "prediction", "label"]
    assert table["run"].tolist() == [name for name in ("swap/1", "push", "clean") for _ in range(4)]
    assert table["example"].tolist() == [0, 1, 2, 3] * 3
    assert table["label"].tolist() == [0, 1, 0, 1] * 3
    row = table[(table["run"] == "push") & (table["example"] == 2)].iloc[0]
    assert [row[f"logit_{i}"] for i in range(5)] == pytest.approx(results["push"][2].tolist())
    assert row["prediction"] == int(results["push"][2].argmax())


def test_outputs_of_more_axes_stay_out_of_the_table() -> None:
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=24,
        image_size=32,
        patch_size=8,
    )
    vit = vmi.wrap(stirred(transformers.ViTModel(config, add_pooling_layer=False)).eval())
    data = {"base": TIMM_PLAIN.images(3, 1), "source": TIMM_PLAIN.images(3, 2)}
    results = vmi.execute(
        vit, Run.model_validate({"name": "a", "interventions": [swap()]}), data, progress=False
    )
    with torch.no_grad():
        assert results.logits.shape == (1, *vit(data["base"]).shape) == (1, 3, 17, 24)
    assert vit.layout.output == "last_hidden_state"
    assert list(results.to_pandas().columns) == ["run", "example"]


DIGESTS = ("spec", "model", "data", "tensors")


def changed(before: Results, after: Results) -> set[str]:
    return {name for name in DIGESTS if before.provenance[name] != after.provenance[name]}


def test_digests_change_when_what_they_stand_for_changes() -> None:
    world = World(TIMM_PLAIN, 4)
    before = executed(world)
    assert changed(before, executed(world)) == set()
    assert changed(before, executed(world, batch_size=2)) == set()
    assert changed(before, executed(World(TIMM_PLAIN, 4))) == set()
    # Columns that nobody reads do not count, nor does their order.
    shuffled = {"extra": list("abcd"), **dict(reversed(world.columns.items())), "there": [0, 0, 0, 0]}
    assert changed(before, executed(world, data=shuffled)) == set()

    vector = torch.linspace(-1, 1, 24)
    vector[7] += 1e-6
    assert changed(before, executed(world, vector)) == {"tensors"}
    for column in ("base", "source", "here", "box", "label"):
        data = dict(world.columns)
        data[column] = data[column].clone()
        data[column].view(-1)[-1] += 1
        assert changed(before, executed(world, data=data)) == {"data"}, column
    assert changed(before, executed(world, data={k: v[:3] for k, v in world.columns.items()})) == {"data"}

    runs = documents()
    runs[0]["interventions"][0]["tokens"] = ["cls", 3]
    assert changed(before, executed(world, runs=runs)) == {"spec"}
    assert changed(before, executed(world, runs=documents()[::-1])) == {"spec"}


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.blocks[1].mlp.fc1.weight.data.view(-1)[5:6].add_(1e-3),
        lambda module: torch.nn.init.zeros_(module.blocks[2].attn.proj.bias),
        lambda module: module.load_state_dict({name: x * 1.01 for name, x in module.state_dict().items()}),
        lambda module: setattr(module.blocks[0].mlp, "act", torch.nn.ReLU()),
        lambda module: setattr(module.blocks[0].norm1, "eps", 1e-3),
        lambda module: module.double(),
    ],
)
def test_the_models_digest_changes_with_the_model(change: Callable[[Any], Any]) -> None:
    world = World(TIMM_PLAIN, 4)
    before = executed(world)
    with torch.no_grad():
        world.module.train()
        world.module.eval()
        change(world.module)
    after = executed(world)
    assert changed(before, after) == {"model"}
    assert not torch.equal(before.logits, after.logits)


def test_digests_of_pictures() -> None:
    world = world_of(TIMM_PLAIN)
    run = Run(name="r")

    def digest(picture: PIL.Image.Image) -> str:
        return str(vmi.execute(world.vit, run, {"base": [picture]}, progress=False).provenance["data"])

    ramp = bytes(i % 256 for i in range(40 * 40))
    picture = PIL.Image.frombytes("L", (40, 40), ramp)
    palettes = [PIL.Image.frombytes("P", (40, 40), ramp) for _ in range(2)]
    palettes[0].putpalette([i for i in range(256) for _ in range(3)])
    palettes[1].putpalette([255 - i for i in range(256) for _ in range(3)])
    brighter = picture.point(lambda value: min(value + 1, 255))
    found = [digest(p) for p in (picture, brighter, palettes[0], palettes[1], picture.resize((41, 40)))]
    assert len(set(found)) == 5
    assert digest(picture.copy()) == found[0]


def test_provenance_is_plain_and_complete() -> None:
    provenance = executed(world_of(TIMM_PLAIN, 4), batch_size=3).provenance
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["columns"] == ["base", "box", "here", "label", "source"]
    assert (provenance["chunk"], provenance["rows_per_forward"], provenance["halvings"]) == (4, 3, 0)
    assert provenance["examples"] == 4
    assert provenance["device"] == "cpu"
    assert provenance["dtype"] == "float32"
    assert provenance["model_source"] == "VisionTransformer"
    assert set(provenance["tensors"]) == {"v"}
    assert {"python", "torch", "timm", "transformers"} <= set(provenance["versions"])


def test_captures_know_other_spellings_and_say_what_there_is() -> None:
    results = executed(world_of(TIMM_PLAIN, 4))
    captures = results.captures["swap/1"]
    assert torch.equal(captures["blocks.1.hook_resid_post"], captures["blocks.1.resid_post"])
    assert repr(captures).startswith("Captures of ")
    lines = [line.split(maxsplit=1) for line in repr(captures).splitlines()]
    assert ["blocks.1.resid_post", "(4, 17, 24) float32"] in lines
    assert ["embed", "4 tensors"] in lines
    with pytest.raises(KeyError, match=r"Run 'swap/1': blocks\.0\.ln1 was not captured\..*Captured: blocks\.1"):
        captures["blocks.0.ln1"]
    with pytest.raises(KeyError, match=r"There is no run 'swap1'\. Close matches: swap/1\..* Runs: swap/1, push, clean"):
        results.captures["swap1"]


def test_the_columns_that_runs_read_are_no_other_words_of_the_document() -> None:
    world = World(TIMM_PLAIN, 4)
    # "clean", "v" and "zero" are words of the document, and columns that nobody reads.
    data = {**world.columns, "clean": [1, 2, 3, 4], "v": [0] * 4, "interchange": [0] * 4}
    before = executed(world, data=data)
    assert before.provenance["columns"] == ["base", "box", "here", "label", "source"]
    assert changed(before, executed(world, data={**data, "v": [5] * 4})) == set()
