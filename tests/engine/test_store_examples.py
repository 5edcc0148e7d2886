"""Which examples a store is asked for: numbers, masks, none at all, and what is neither."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.stores import N, captured
from tests.engine.world import World
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import ActivationStore
from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec.tokens import TokenBox

SITES = ("blocks.0.resid_post", "blocks.1.attn.pattern", "pooled")


@pytest.fixture(scope="module")
def view() -> Any:
    return captured(ActivationStore(), World(TIMM_PLAIN, N), SITES)


MASK = np.arange(N) % 3 == 1


@pytest.mark.parametrize(
    "examples",
    [MASK, torch.from_numpy(MASK), MASK.tolist(), list(MASK), list(torch.from_numpy(MASK)), np.flatnonzero(MASK) - N],
    ids=["array", "tensor", "list", "list of numpy's", "list of tensors", "from the end"],
)
def test_masks_and_numbers_from_the_end_select(view: Any, examples: Any) -> None:
    found = view.take(examples)
    for name, site in view.items():
        expected = site[:][torch.from_numpy(MASK)]
        assert 0 < len(expected) < N
        assert torch.equal(found[name], expected)
        assert torch.equal(site.take(examples), expected)
        assert torch.equal(site[examples], expected)


def test_numbers_come_in_any_form(view: Any) -> None:
    expected = view["pooled"][[2, 0]]
    for examples in ((2, 0), iter([2, 0]), range(2, -1, -2), np.array([2, 0], dtype=np.uint8), torch.tensor([2, 0])):
        assert torch.equal(view["pooled"].take(examples), expected)


def test_no_examples_are_an_empty_tensor(view: Any) -> None:
    for site in view.values():
        none = torch.zeros(N, dtype=torch.bool)
        for found in (site[:0], site[[]], site[none], site.take([]), site.take(none), site.take(np.zeros(0))):
            assert isinstance(found, torch.Tensor)
            assert found.shape == (0, *site.shape[1:])
            assert found.dtype == site.dtype
    assert {name: len(rows) for name, rows in view.take([]).items()} == dict.fromkeys(SITES, 0)


def test_no_examples_are_an_empty_list_where_they_differ_in_their_tokens() -> None:
    view = captured(ActivationStore(), World(TIMM_PLAIN, N), SITES[0], tokens=TokenBox(box="box"))
    assert isinstance(view[SITES[0]][[0, 1]], list)
    assert view[SITES[0]][:0] == []


LIST = "is no list of numbers of examples, 0 to 24"
REFUSED: dict[str, tuple[Any, str]] = {
    "too high": ([3, 25], r"There is no example 25: the 25 are numbered 0 to 24, or -25 to -1\."),
    "too low": (np.array([-26]), r"There is no example -26: the 25 are numbered 0 to 24, or -25 to -1\."),
    "huge": ([2**70], rf"There is no example {2**70}: the 25 are numbered"),
    "short mask": ([True, False], r"This mask of 2 entries .* one truth value for each of the 25\. Give such a mask, or numb"),
    "long mask": (torch.ones(26, dtype=torch.bool), r"This mask of 26 entries selects no examples"),
    "half a mask": ([True, 3, *[False] * (N - 2)], r"This mask of 25 entries selects no examples"),
    "fractions": ([0.5], r"examples=\[0\.5\] are no numbers of examples, 0 to 24"),
    "floats": (torch.tensor([1.0]), r"examples=tensor\(\[1\.\]\) are no numbers of examples, 0 to 24"),
    "names": (["a"], r"examples=\['a'\] are no numbers of examples"),
    "nested": ([[0, 1], [2]], r"examples=\[\[0, 1\], \[2\]\] are no numbers of examples"),
    "a table": (np.zeros((2, 3), dtype=int), r"examples are one list of numbers, and these have shape \(2, 3\)"),
    "text": ("12", f"examples='12' {LIST}"),
    "one": (3, f"examples=3 {LIST}"),
    "none": (None, f"examples=None {LIST}"),
    "set": ({1}, rf"examples=\{{1\}} {LIST}"),
    "meta": (torch.ones(2, device="meta"), "examples stand on the meta device"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_names_no_examples_is_refused(view: Any, what: str) -> None:
    examples, message = REFUSED[what]
    with pytest.raises(SpecError, match=message):
        view.take(examples)
    with pytest.raises(SpecError, match=message):
        view["pooled"].take(examples)


@pytest.mark.parametrize("index", ["a", 0.5, [0.5], 25, [25], MASK[:3], [[0, 1], [2]]], ids=repr)
def test_what_is_no_index_is_an_index_error(view: Any, index: Any) -> None:
    with pytest.raises(IndexError, match=r"StoredSite\(pooled, 25 .* is indexed by numbers of examples, not"):
        view["pooled"][index]


def test_a_table_of_numbers_is_no_index(view: Any) -> None:
    with pytest.raises(SpecError, match=r"examples are one list of numbers, and these have shape \(1, 2\)"):
        view["pooled"][[[0, 1]]]
