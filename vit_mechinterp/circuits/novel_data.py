"""The data of novel representations: who gets which vector, and the values that vectors are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vit_mechinterp.circuits.token_sets import positions_of
from vit_mechinterp.engine import execute
from vit_mechinterp.engine.binding.positions import moved_note
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError
from vit_mechinterp.spec import Capture, Run, Tokens

if TYPE_CHECKING:
    from vit_mechinterp.model import HookedViT

__all__ = ["Items", "items_of", "object_values"]

_JUDGEMENT: Final = "intermediate_judgement"
_CHOICES: Final = ("edited_vector", "other_vector")


@dataclass(frozen=True)
class Items:
    """Pairs of one attribute.

    Attributes:
        values: the pairs whose source objects give the vectors that novel ones are made of.
        test: the pairs that novel vectors are written into, with the columns ``choices``.
        labels: the wanted classes of ``test``.
        units: for each example, the number of its draw.
        size: examples of one draw.
        n_tokens: tokens of every object.
        choices: columns of the vector that the edited object gets, and of that for its partner.
    """

    values: Any
    test: Any
    labels: Int[Tensor, " example"]
    units: Sequence[int]
    size: int
    n_tokens: int
    choices: tuple[str, str] = _CHOICES

    @property
    def n_draws(self) -> int:
        """Number of draws, of two vectors each."""
        return self.units[-1] + 1


def items_of(
    vit: HookedViT,
    values: Any,
    test: Any,
    labels: Int[Tensor, " example"],
    *,
    tokens: tuple[Tokens, Tokens],
    source_tokens: Tokens,
    base: str,
    source: str,
    judgement: str | None,
    size: int,
) -> Items:
    """Say for every pair which vectors it gets: the draw's two where it should become "different", the
    draw's first for both where it should become "same".

    Raises:
        DataError: a column is missing, an image is none, a relation is neither 0 nor 1, or objects differ in
            their tokens.
    """
    columns, donors = Data(test, vit), Data(values, vit)
    where = "novel_representations"
    for own, image in ((columns, base), (donors, source)):
        own.require(image, where)
        own.check_images(image)
    column = judgement or (_JUDGEMENT if _JUDGEMENT in columns.columns else None)
    if column is None:
        becomes_same = labels == 1
        name = "the wanted classes"
    else:
        columns.require(column, f"{where}, judgement")
        becomes_same = torch.tensor([row[0] for row in columns.integers(column)]) == 0
        name = f"column {column!r}"
    if column is not None and (odd := sorted({row[0] for row in columns.integers(column)} - {0, 1})):
        raise DataError(f"{where}, {name}: {odd[0]} is no relation; 1 is same and 0 different.")
    objects = [(selector, columns, base) for selector in tokens] + [(source_tokens, donors, source)]
    counts = {len(own) for each in objects for own in positions_of(each[0], vit, *each[1:], where)}
    if len(counts) > 1:
        raise DataError(
            f"{where}: objects have {', '.join(map(str, sorted(counts)))} tokens, and a vector for each "
            "token of one object is written into another: give objects of equal size, on the grid of patches "
            f"of {vit.layout.tokens.patch_size} pixels." + moved_note(vit, columns, base)
        )
    units = [example // size for example in range(columns.n)]
    first = [2 * unit for unit in units]
    second = [2 * unit + int(not same) for unit, same in zip(units, becomes_same.tolist(), strict=True)]
    added = dict(zip(_CHOICES, (first, second), strict=True))
    if isinstance(test, Mapping):
        test = {**test, **added}
    else:
        for key, entries in added.items():
            test = test.add_column(key, entries)
    return Items(values, test, labels, units, size, next(iter(counts)))


def object_values(
    vit: HookedViT,
    data: Any,
    sites: Sequence[str],
    source: str,
    source_tokens: Tokens,
    **how: Any,
) -> tuple[dict[str, Float[Tensor, "item token d"]], Mapping[str, Any]]:
    """Activations at the source objects' tokens by site, and where they come from."""
    names = list(dict.fromkeys(sites))
    captures = [Capture(site=site, tokens=source_tokens) for site in names]
    run = Run(name="objects", base=source, capture=captures, output=False)
    results = execute(vit, run, data, **how)
    return {site: torch.as_tensor(results.captures["objects"][site]) for site in names}, results.provenance
