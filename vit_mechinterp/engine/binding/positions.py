"""From token selectors to positions on a model's token axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from vit_mechinterp.engine.arrays import BoolArray, IntArray, within_each
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError, suggest
from vit_mechinterp.model.geometry import patches_of_box
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TokenBox, TokenColumn, Tokens

__all__ = [
    "ALL",
    "Positions",
    "are_disjoint",
    "in_order_of",
    "moved_note",
    "resolve_tokens",
    "where",
]


@dataclass(frozen=True)
class Positions:
    """Positions on the token axis: the same for every example (``shared``), or one tuple each (``each``).

    ``shared`` is None where there is no token axis (``pooled``, ``logits``) or where every token is meant
    (``is_all``), so that nothing is gathered in vain.
    """

    shared: tuple[int, ...] | None = None
    each: tuple[tuple[int, ...], ...] | None = None

    @property
    def is_all(self) -> bool:
        """Whether the whole activation is meant."""
        return self.shared is None and self.each is None

    def of(self, example: int) -> tuple[int, ...] | None:
        """Positions for one example; None for the whole activation."""
        return self.shared if self.each is None else self.each[example]

    def counts(self, examples: IntArray | Sequence[int] | range, n_tokens: int) -> IntArray:
        """How many tokens are selected in each of some examples."""
        if self.each is not None:
            return np.diff(self._table[0])[np.asarray(examples, dtype=np.int64)]
        return np.full(len(examples), n_tokens if self.shared is None else len(self.shared))

    @cached_property
    def most(self) -> int:
        """How many tokens are selected at most; 0 for the whole activation."""
        return 0 if self.is_all else int(np.diff(self._table[0]).max())

    def may_be_all(self, n_tokens: int) -> bool:
        """Whether every token may be selected: most selections are told to be too small by their length."""
        return self.is_all or self.most >= n_tokens

    @cached_property
    def ascend(self) -> bool:
        """Whether tokens stand in the order of the token axis, in every example."""
        each = ((self.shared or ()),) if self.each is None else self.each
        return all(list(own) == sorted(own) for own in each)

    @cached_property
    def repeated(self) -> int | None:
        """The first example (0 where they share) whose selection names a token twice; None if none does."""
        each = ((self.shared or ()),) if self.each is None else self.each
        return next((n for n, own in enumerate(each) if len(set(own)) != len(own)), None)

    def flat(self, examples: IntArray | Sequence[int]) -> tuple[IntArray, IntArray, IntArray]:
        """``(row, position, ordinal)`` of every selected token, rows counted along ``examples``.

        ``ordinal`` is the token's place within its example's selection. Not for the whole activation.
        """
        starts, positions = self._table
        chosen = (
            np.asarray(examples, dtype=np.int64)
            if self.each is not None
            else np.zeros(len(examples), np.int64)
        )
        counts = starts[chosen + 1] - starts[chosen]
        rows = np.repeat(np.arange(len(chosen)), counts)
        ordinals = within_each(counts)
        return rows, positions[np.repeat(starts[chosen], counts) + ordinals], ordinals

    @cached_property
    def _table(self) -> tuple[IntArray, IntArray]:
        """Where each example's positions begin, and all positions; one entry where they are shared."""
        each = ((self.shared or ()),) if self.each is None else self.each
        starts = np.cumsum([0, *map(len, each)], dtype=np.int64)
        return starts, np.array([p for own in each for p in own], dtype=np.int64)

    # Values are found by their positions many times over, and hashing a large dataset's takes its time.
    @cached_property
    def _hash(self) -> int:
        return hash((self.shared, self.each))

    def __hash__(self) -> int:
        return self._hash


ALL = Positions()
"""Every token, or no token axis."""


def are_disjoint(one: Positions, other: Positions) -> bool:
    """Whether two selections have no token in common, in no example."""
    if one.is_all or other.is_all:
        return False
    return all(not set(own) & set(others) for own, others in zip(*_side_by_side((one, other)), strict=True))


def in_order_of(several: Sequence[Positions], by: Sequence[Positions]) -> Positions:
    """Selections as one, its tokens in the order in which those that they are paired with ascend.

    Args:
        several: the selections, none of them of everything.
        by: as many selections of as many tokens each.
    """
    rows = zip(*_side_by_side((*several, *by)), strict=True)
    each = tuple(_sorted_by(chain(*own[: len(several)]), chain(*own[len(several) :])) for own in rows)
    is_shared = all(own.each is None for own in (*several, *by))
    return Positions(shared=each[0]) if is_shared else Positions(each=each)


def where(mask: BoolArray, of: Positions, positions: Positions) -> Positions:
    """Tokens of a selection, those whose partners are in a mask.

    Args:
        mask: ``[example or 1, token]``.
        of: the partners, no selection of everything.
        positions: as many tokens, or ``of`` itself.
    """
    partners, own = _side_by_side((of, positions), len(mask))
    masks = np.broadcast_to(mask, (len(own), mask.shape[1]))
    each = tuple(
        tuple(token for partner, token in zip(*pair, strict=True) if here[partner])
        for here, *pair in zip(masks, partners, own, strict=True)
    )
    return Positions(shared=each[0]) if len(each) == 1 else Positions(each=each)


def _side_by_side(several: Sequence[Positions], n: int = 1) -> list[tuple[tuple[int, ...], ...]]:
    """The tokens of every selection, for ``n`` examples where all are shared."""
    n = max(n, *(len(own.each or ()) for own in several))
    return [own.each or ((own.shared or (),) * n) for own in several]


def _sorted_by(tokens: Iterable[int], by: Iterable[int]) -> tuple[int, ...]:
    return tuple(token for _, token in sorted(zip(by, tokens, strict=True)))


def resolve_tokens(
    tokens: Tokens, vit: HookedViT, data: Data | None, image_column: str, where: str
) -> Positions:
    """Positions that a selector means on one model.

    Args:
        tokens: the selector.
        vit: the model whose token layout counts.
        data: the examples; without it, selectors that read a column stay undecided and count as one token.
        image_column: the image that boxes are drawn on.
        where: what to name in messages, such as
            ``"run 'layer5', interchange at blocks.5.resid_post, tokens"``.

    Raises:
        SpecError: the model has no such token name or patch.
        DataError: the column is missing or holds something else, or a box leaves no patch.
    """
    if isinstance(tokens, str) and tokens == "all":
        return ALL
    if isinstance(tokens, TokenColumn):
        if data is None:
            return _some_patch(vit)
        data.require(tokens.column, where)
        return data.once(("column", tokens.column), lambda: _from_column(tokens.column, data, vit, where))
    if isinstance(tokens, TokenBox):
        if data is None:
            return _some_patch(vit)
        data.require(tokens.box, where)
        return data.once(
            ("box", tokens.box, image_column), lambda: _from_boxes(tokens.box, data, vit, image_column, where)
        )
    if data is not None:
        # One selection is one object for all runs, so that what it takes to use it is found once.
        key = "tokens", tokens if isinstance(tokens, str) else tuple(tokens)
        return data.once(key, lambda: _from_list(tokens, vit, where))
    return _from_list(tokens, vit, where)


def moved_note(vit: HookedViT, data: Data, image_column: str) -> str:
    """Return a sentence for messages about boxes where the model's preprocessing moves them, or ""."""
    sizes = dict.fromkeys(data.original_sizes(image_column) or ())
    moved = next((size for size in sizes if not vit.preprocess.geometry.keeps(size)), None)
    if moved is None:
        return ""
    width, height = moved
    return (
        f" The model's preprocessing resizes or cuts images of {width} x {height} px, which moves their "
        "boxes over the grid: give images as tensors of the model's input size, or a model that takes them "
        "as they are."
    )


def _some_patch(vit: HookedViT) -> Positions:
    """What stands for a selection of patches that no data tells."""
    return Positions(shared=(len(vit.layout.tokens.prefix),))


def _from_list(tokens: str | tuple[str | int, ...], vit: HookedViT, where: str) -> Positions:
    layout = vit.layout.tokens
    positions: list[int] = []
    for item in (tokens,) if isinstance(tokens, str) else tokens:
        if isinstance(item, str):
            named = layout.positions(item)
            if named is None:
                raise SpecError(
                    f"{where}: {type(vit.module).__name__} has no tokens called {item!r}."
                    f"{suggest(item, layout.names)} Its tokens: {', '.join(layout.names)}."
                )
            positions += named
        else:
            _check_patch(item, vit, where)
            positions.append(len(layout.prefix) + item)
    return Positions(shared=tuple(positions))


def _check_patch(patch: int, vit: HookedViT, where: str) -> None:
    layout = vit.layout.tokens
    if not 0 <= patch < layout.n_patches:
        grid = "x".join(map(str, layout.grid))
        raise SpecError(
            f"{where}: patch {patch} is not on the {grid} grid (patches 0 to {layout.n_patches - 1})."
        )


def _from_column(column: str, data: Data, vit: HookedViT, where: str) -> Positions:
    first, n_patches = len(vit.layout.tokens.prefix), vit.layout.tokens.n_patches
    rows = []
    for example, patches in enumerate(data.integers(column, where)):
        if not patches:
            raise DataError(f"{where}, column {column!r}, example {example}: no patch is selected.")
        if min(patches) < 0 or max(patches) >= n_patches:
            for patch in patches:
                _check_patch(patch, vit, f"{where}, column {column!r}, example {example}")
        rows.append(tuple(first + patch for patch in patches))
    return Positions(each=tuple(rows))


def _from_boxes(column: str, data: Data, vit: HookedViT, image_column: str, where: str) -> Positions:
    layout = vit.layout.tokens
    data.require(image_column, f"{where}, image of {column!r}")
    sizes = data.original_sizes(image_column)
    rows = []
    for example, box in enumerate(data.boxes(column, where)):
        try:
            # A tensor is in the model's own pixels already; an image passes through resize and crop.
            inside = box if sizes is None else vit.preprocess.geometry.map_box(box, sizes[example])
            patches = patches_of_box(inside, layout.patch_size, (layout.grid[-2], layout.grid[-1]))
        except DataError as error:
            raise DataError(f"{where}: column {column!r}, example {example}: {error}") from None
        rows.append(tuple(len(layout.prefix) + patch for patch in patches))
    return Positions(each=tuple(rows))
