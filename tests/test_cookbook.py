"""The cookbook runs offline as it stands, and its pictures are those that its code draws."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from tests.cookbook import COOKBOOK, pictures, recipes
from tests.documents import DOCS
from vit_mechinterp.commands.circuit import CIRCUITS

DOCUMENT = COOKBOOK.read_text(encoding="utf-8")


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"), dtype=float)


def test_recipes_are_short_and_everyday_circuits_are_all_there() -> None:
    for code, _ in recipes(DOCUMENT):
        assert len([line for line in code.splitlines() if line.strip()]) < 15
        assert max(map(len, code.splitlines())) <= 120
    shown = {picture.removeprefix("cookbook/").split("-")[0] for _, own in recipes(DOCUMENT) for picture in own}
    assert shown == set(re.findall(r"circuits\.(\w+)\(", DOCUMENT)) - {"sample_photographs"}, "each with its picture"
    # Those of papers on relations, structure and equivalence have documents of their own.
    others = {"attention_stages", "attention_walkthrough", "interchange_sweep", "das", "probe_intervention"}
    others |= {"local_lipschitz", "embedding_matching", "equivalence_walks"}
    assert set(CIRCUITS) - shown == others


def test_pictures_are_small_and_all_used() -> None:
    files = {f"cookbook/{path.name}": path.stat().st_size for path in (DOCS / "cookbook").iterdir()}
    assert set(files) == {path for _, shown in recipes(DOCUMENT) for path in shown}
    assert sum(files.values()) < 1_500_000


@pytest.mark.slow
def test_the_code_runs_and_draws_the_pictures() -> None:
    """Renewed by ``python -m tests.cookbook``; machines may differ in a few pixels of rounding."""
    for path, drawn in pictures(DOCUMENT):
        kept, found = pixels((DOCS / path).read_bytes()), pixels(drawn)
        assert kept.shape == found.shape, path
        assert np.abs(kept - found).mean() < 2.0, path
