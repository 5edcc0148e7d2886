"""The parity matrix: every backend on several models, the page that shows it, and the command that prints it."""

from __future__ import annotations

import json

import pytest
import torch

import vit_mechinterp as vmi
from tests.bridges.parity_document import DOCUMENT, comparable, matrices, written
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp.bridges import hooks as plain
from vit_mechinterp.bridges.parity import Cell, Parity, parity
from vit_mechinterp.bridges.parity_runs import parity_data, parity_runs
from vit_mechinterp.cli import main
from vit_mechinterp.errors import SpecError


def test_every_backend_agrees_on_every_model_and_the_page_says_so() -> None:
    found = matrices()
    for matrix in found.values():
        assert matrix.failures == []
        assert len(matrix.cells) == 17
        refused = {(name, b): cell.refusal for name, row in matrix.cells.items() for b, cell in row.items() if cell.refusal}
        assert {backend for _, backend in refused} == {"pyvene"}
        assert len(refused) == 3
        assert all("within the attention call" in reason for reason in refused.values())
    assert comparable(DOCUMENT.read_text(encoding="utf-8")) == comparable(written(found))


def test_a_difference_and_a_run_without_effect_fail() -> None:
    cells = {"one": {"hooks": Cell(1e-3)}, "two": {"hooks": Cell(refusal="because")}}
    found = Parity("m", 1e-5, {"one": 0.5, "two": 1e-7}, cells)
    assert not found.passed
    text = str(found)
    assert "FAILED: one: hooks differs by 0.001 of the scale" in text
    assert "FAILED: two changes some output by 1e-07 of its scale only, which shows nothing" in text
    assert "refused (1)" in text
    assert "\n(1) because\n" in text


def test_an_error_in_a_backend_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "_hook", lambda stack, vit, step: None)
    found = parity(vmi.wrap(TIMM_PLAIN.module()), ["hooks"], progress=False)
    reasons = {name: row["hooks"].refusal for name, row in found.cells.items()}
    assert "reached 0 times in a forward" in reasons["interchange of patches at resid_post"]


@pytest.mark.parametrize("backend", ["hooks", "nnsight", "transformer_lens"])
def test_half_precision_runs_on_backends_and_is_no_matter_for_the_matrix(backend: str) -> None:
    vit = vmi.wrap(TIMM_PLAIN.module(torch.bfloat16))
    runs, tensors = parity_runs(vit)
    run, data = runs["interchange of attn.pattern"], parity_data(vit)
    ours = vmi.execute(vit, run, data).logits
    theirs = vmi.execute(vit, run, data, tensors, backend=backend).logits
    assert float((ours - theirs).abs().max()) < 0.05 * float(ours.abs().max())
    with pytest.raises(SpecError, match=r"The model is in bfloat16, .* Compare in float32\."):
        parity(vit)


def made() -> object:
    """A model for the command."""
    return TIMM_PLAIN.module()


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = "tests.bridges.test_parity:made"
    assert main(["parity", model, "--backend", "hooks", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("VisionTransformer: largest difference from the engine")
    assert "All that is not refused agrees within 1e-05." in printed
    assert main(["parity", model, "--backend", "pyven", "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    assert "There is no backend 'pyven'. Close matches: pyvene" in document["cells"]["interchange at mlp.post"]["pyven"]["refusal"]
