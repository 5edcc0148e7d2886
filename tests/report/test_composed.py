"""The composed example: its tensors belong to the shipped model, and its numbers are those of plain hooks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import vit_mechinterp as vmi
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.experiment import load_data
from vit_mechinterp.report.composed import composed_run

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
DOCUMENT = EXAMPLES / "composed.yaml"


@pytest.fixture(scope="module")
def vit() -> vmi.HookedViT:
    return vmi.load("vmi/discrimination-disentangled")


def test_the_tensors_were_derived_from_the_shipped_model(vit: vmi.HookedViT) -> None:
    with safe_open(EXAMPLES / "composed.safetensors", framework="pt") as file:
        assert file.metadata()["model"] == vit.fingerprint(), "run examples/make_composed_tensors.py"
    tensors = load_file(EXAMPLES / "composed.safetensors")
    basis, direction = tensors["object_basis"], tensors["answer_direction"]
    assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-5)
    assert torch.equal(direction[0], -direction[1])
    assert direction.norm() > 1


def by_hand(vit: vmi.HookedViT, row: dict, parts: tuple[str, ...]) -> torch.Tensor:
    """Logits of one example with plain hooks on the native module."""
    module, blocks, tensors = vit.module, vit.module.blocks, load_file(EXAMPLES / "composed.safetensors")
    base, source = vit.preprocess([row["base"]]), vit.preprocess([row["source"]])
    here, there = (
        [1 + y * 8 + x for y in range(b[1] // 16, b[3] // 16) for x in range(b[0] // 16, b[2] // 16)]
        for b in (row["edited_box"], row["source_box"])
    )
    kept: dict[str, torch.Tensor] = {}
    readers = [
        blocks[1].register_forward_hook(lambda _, __, out: kept.update(block=out)),
        blocks[3].attn.proj.register_forward_pre_hook(lambda _, args: kept.update(z=args[0])),
    ]
    with torch.no_grad():
        module(source)
    for reader in readers:
        reader.remove()

    def subspace(_, __, out):  # type: ignore[no-untyped-def]
        basis, out = tensors["object_basis"], out.clone()
        out[0, here] += (kept["block"][0, there] - out[0, here]) @ basis @ basis.T
        return out

    def head(_, args):  # type: ignore[no-untyped-def]
        z = args[0].clone()
        z[0, 0, :32] = kept["z"][0, 0, :32]
        return (z,)

    def direction(_, __, out):  # type: ignore[no-untyped-def]
        out = out.clone()
        out[0, 0] += 0.25 * tensors["answer_direction"][row["counterfactual_label"]]
        return out

    hooks = []
    if "subspace" in parts:
        hooks.append(blocks[1].register_forward_hook(subspace))
    if "head" in parts:
        hooks.append(blocks[3].attn.proj.register_forward_pre_hook(head))
    if "direction" in parts:
        hooks.append(blocks[4].register_forward_hook(direction))
    with torch.no_grad():
        logits = module(base)[0]
    for hook in hooks:
        hook.remove()
    return logits


def test_every_run_equals_plain_hooks(vit: vmi.HookedViT) -> None:
    experiment = vmi.Experiment.from_yaml(DOCUMENT)
    data = load_data(experiment)
    results = vmi.execute(vit, experiment, data, progress=False)
    assert results.run_names == ("clean", "subspace", "head", "direction", "composed")
    runs = {"clean": (), "composed": ("subspace", "head", "direction")}
    runs |= {name: (name,) for name in runs["composed"]}
    for name, parts in runs.items():
        expected = torch.stack([by_hand(vit, row, parts) for row in data])
        assert torch.allclose(results[name], expected, atol=1e-4), name
        if parts:
            assert (results[name] - results["clean"]).abs().max() > 0.1, f"{name} changes nothing"


def test_the_section_shows_document_plan_and_effect(vit: vmi.HookedViT, tmp_path: Path) -> None:
    section = composed_run(DOCUMENT, vit=vit, out=tmp_path, progress=False)
    assert section.yaml == DOCUMENT.read_text()
    assert (
        "composed: joins at the output of block 2, from rows that have its first edit, 3 blocks; inject_subspace at "
        in section.plan
    )
    results = vmi.Results.load(tmp_path)
    labels = {name: torch.tensor(results.labels[name]) for name in ("label", "counterfactual_label")}
    n = torch.arange(len(labels["label"]))
    for row in section.table.to_dict("records"):
        logits = results[row["run"]].double()
        difference = logits[n, labels["counterfactual_label"]] - logits[n, labels["label"]]
        assert row["mean logit difference"] == pytest.approx(difference.mean().item())
        reached = int((logits.argmax(1) == labels["counterfactual_label"]).sum())
        assert row["counterfactual answers"] == f"{reached} of {len(n)}"
    assert len(section.examples) == len(n)
    saved = vmi.Experiment.from_yaml(tmp_path / "experiment.yaml")
    original = vmi.Experiment.from_yaml(DOCUMENT)
    assert (saved.model, saved.data) == (original.model, original.data)
    assert [run.name for run in saved.runs] == [run.name for run in original.runs]
    first = section.examples[0]
    x0, _, x1, _ = first.boxes["source object"]
    assert first.boxes["edited object"][0] + 128 < x0 < x1 <= first.image.width


def test_data_without_pairs_are_refused(vit: vmi.HookedViT, tmp_path: Path) -> None:
    text = DOCUMENT.read_text().replace("discrimination_exchanges", "discrimination")
    (tmp_path / "plain.yaml").write_text(text)
    with pytest.raises(DataError, match="the data lack 'source'"):
        composed_run(tmp_path / "plain.yaml", vit=vit)


def test_a_readout_is_refused(vit: vmi.HookedViT, tmp_path: Path) -> None:
    readout = "readout: {op: cross_entropy, answer: label}\n"
    (tmp_path / "loss.yaml").write_text(DOCUMENT.read_text() + readout)
    with pytest.raises(SpecError, match=r"the experiment's readout keeps cross_entropy alone\. Leave readout out"):
        composed_run(tmp_path / "loss.yaml", vit=vit)
