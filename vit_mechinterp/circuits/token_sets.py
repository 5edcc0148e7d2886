"""Which tokens stand for an object, and which for the background: from pixel boxes or from patch indices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor

from vit_mechinterp.engine.binding.positions import moved_note, resolve_tokens
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import TokenBox, TokenColumn, Tokens
from vit_mechinterp.spec.tokens import parse_tokens

__all__ = [
    "BACKGROUND",
    "TokenPair",
    "check_grid",
    "object_tokens",
    "positions_of",
    "token_mask",
    "with_background",
]

BACKGROUND = "background_tokens"
"""The column of background patches that `with_background` adds."""

TokenPair: TypeAlias = tuple[Any, Any]
"""A selector in the base image and its counterpart in the source image."""


def object_tokens(data: Data, box: str, column: str, wanted_by: str) -> Tokens:
    """Return the selector for an object: its box if the data has that column, else its patch indices.

    Boxes come first because they follow the image through the model's resize and crop, and fit every patch
    size; patch indices hold for one grid.

    Raises:
        DataError: the data has neither column.
    """
    if box in data.columns:
        return TokenBox(box=box)
    if column in data.columns:
        return TokenColumn(column=column)
    raise DataError(
        f"{wanted_by} needs to know where an object is: a column {box!r} of pixel boxes or {column!r} of "
        f"patch indices, or selectors of your own.{suggest(box, data.columns)} Columns: "
        f"{', '.join(data.columns)}."
    )


def positions_of(tokens: Any, vit: HookedViT, data: Data, image: str, where: str) -> list[tuple[int, ...]]:
    """Return the positions on the token axis that a selector means, one tuple per example.

    Args:
        tokens: a selector in any form that a spec takes.
        vit: the model whose token layout counts.
        data: the examples.
        image: the image column that boxes are drawn on.
        where: what to name in messages.

    Raises:
        SpecError, DataError: the selector fits neither the model nor the data.
    """
    selector = parse_tokens(tokens)
    found = resolve_tokens(selector, vit, data, image, where)
    check_grid(selector, vit, data, image, where)
    everything = tuple(range(vit.layout.tokens.n_tokens))
    each = [found.of(example) for example in range(data.n)]
    return [everything if positions is None else positions for positions in each]


_NUMBERED = re.compile(r"(object|display)_(\d+)_tokens")


def check_grid(tokens: Tokens, vit: HookedViT, data: Data, image: str, where: str) -> None:
    """Refuse patch indices that were made for another grid than the model's, as far as data can tell: where
    it has the object's box as well, by the names of the stimuli (``edited_box`` beside ``edited_tokens``,
    ``box_1`` beside ``object_1_tokens``).

    Args:
        tokens, vit, data, image, where: as for `positions_of`; the indices are on the model's grid.

    Raises:
        DataError: an index lies outside the box.
    """
    if not isinstance(tokens, TokenColumn) or (name := _box_beside(tokens.column)) not in data.columns:
        return
    indices, box = (resolve_tokens(own, vit, data, image, where) for own in (tokens, TokenBox(box=name)))
    layout = vit.layout.tokens
    for example in range(data.n):
        if outside := set(indices.of(example) or ()) - set(box.of(example) or ()):
            grid, patch = ("x".join(map(str, sides)) for sides in (layout.grid, layout.patch_size))
            raise DataError(
                f"{where}, column {tokens.column!r}, example {example}: patch "
                f"{min(outside) - len(layout.prefix)} of the model's {grid} patches of {patch} px lies "
                f"outside the object's box ({name!r}), so the indices are those of another grid. Select the "
                f"object by its box, {{'box': {name!r}}}, or make stimuli with the model's canvas and patch."
                + moved_note(vit, data, image)
            )


def _box_beside(column: str) -> str:
    """What the stimuli call the box of an object whose patch indices have this name."""
    if (numbered := _NUMBERED.fullmatch(column)) is not None:
        return f"{'display_' if numbered[1] == 'display' else ''}box_{numbered[2]}"
    return column.removesuffix("tokens") + "box" if column.endswith("_tokens") else ""


def token_mask(positions: Iterable[Sequence[int]], n_tokens: int) -> Bool[Tensor, "example token"]:
    """Return which tokens are among the positions of each example."""
    rows: list[Tensor] = []
    for selected in positions:
        row = torch.zeros(n_tokens, dtype=torch.bool)
        row[list(selected)] = True
        rows.append(row)
    return torch.stack(rows)


def with_background(
    data: Any, vit: HookedViT, objects: Sequence[TokenPair], *, base: str = "base", source: str = "source"
) -> Any:
    """Return the data with a column ``background_tokens``: the patches that no object covers in either image.

    Args:
        data: a ``datasets.Dataset`` or a mapping of columns; one that has the column is returned as it is.
        vit: the model whose patch grid counts.
        objects: (selector in the base image, selector in the source image) of every object.
        base, source: the image columns.

    Raises:
        DataError: the objects of an example cover every patch.
    """
    columns = Data(data, vit)
    if BACKGROUND in columns.columns:
        return data
    layout = vit.layout.tokens
    covered: list[set[int]] = [set() for _ in range(columns.n)]
    for pair in objects:
        for tokens, image in zip(pair, (base, source), strict=True):
            for taken, positions in zip(
                covered, positions_of(tokens, vit, columns, image, "background"), strict=True
            ):
                taken.update(positions)
    first = len(layout.prefix)
    free = [[p for p in range(layout.n_patches) if first + p not in taken] for taken in covered]
    for example, patches in enumerate(free):
        if not patches:
            raise DataError(f"Example {example}: the objects cover every patch, so there is no background.")
    return {**data, BACKGROUND: free} if isinstance(data, Mapping) else data.add_column(BACKGROUND, free)
