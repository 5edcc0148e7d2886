"""The catalogue that ships says what the live models say, and the documents say what the catalogue says."""

from __future__ import annotations

import re

import pytest

from tests.zoo.catalogue import Subject, facts, rows, subjects, versions
from tests.zoo.supported import DOCUMENT, counted, rendered
from vit_mechinterp.catalogue import catalogue, without_measurements

KNOWN = {(entry.library, entry.name): entry for entry in catalogue().entries}
RENEW = "renew it: python -m tests.zoo.catalogue"

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(
        dict(catalogue().versions) != versions(), reason="other versions of the libraries than the catalogue's"
    ),
]


def agree(chosen: list[Subject]) -> None:
    assert chosen
    for subject in chosen:
        assert facts(subject) == without_measurements(KNOWN[subject.library, subject.name]), RENEW


def of(library: str) -> list[Subject]:
    return [subject for subject in subjects() if subject.library == library]


def test_every_covered_model_is_listed_once() -> None:
    found = [(subject.library, subject.name) for subject in subjects()]
    assert found == [(entry.library, entry.name) for entry in catalogue().entries], RENEW
    assert len(set(found)) == len(found)
    assert tuple(rows(list(catalogue().entries))) == catalogue().rows, RENEW


@pytest.mark.parametrize("library", ["timm", "hf", "torchvision", "open_clip"])
def test_facts_are_those_of_the_live_models(library: str) -> None:
    """One name of timm's and open_clip's in nine, each in its full size."""
    chosen = of(library)
    agree(chosen[::9] if len(chosen) > 100 and library != "hf" else chosen)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_all_facts_are_those_of_the_live_models(library: str) -> None:
    agree(of(library))


def test_what_was_measured_is_within_what_is_allowed() -> None:
    small = {(subject.library, subject.name) for subject in subjects() if subject.small is not None}
    for key, entry in KNOWN.items():
        if key in small:
            assert entry.measured["native"] == 0, key
            assert entry.measured.get("explicit", 0) <= 1e-5, key
            assert entry.measured["growth"] <= 1e-5, key
        else:
            assert not entry.measured, key


def test_the_document_is_the_catalogue_s() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == rendered(catalogue()), RENEW
    assert "no tokens" not in rendered(catalogue())


def test_the_readme_s_numbers_are_the_catalogue_s() -> None:
    readme = (DOCUMENT.parent.parent / "README.md").read_text(encoding="utf-8")
    numbers = counted(catalogue())
    modules = {entry.module for entry in catalogue().select("timm")}
    words = {14: "fourteen", 15: "fifteen", 16: "sixteen"}
    assert f"| timm | all {numbers['timm'][0]} names of {words[len(modules)]} modules |" in readme
    names, _, blocks, _ = numbers["hf"]
    version = ".".join(catalogue().versions["hf"].split(".")[:2])
    assert f"| transformers {version} | {names} architectures with {blocks} classes of blocks |" in readme
    assert f"| torchvision | all {numbers['torchvision'][0]} ViTs |" in readme
    assert re.search(rf"\| open_clip \| the vision towers of {numbers['open_clip'][0]} of its \d+ names \|", readme)
