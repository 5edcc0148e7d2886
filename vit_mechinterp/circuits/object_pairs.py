"""Pairs of objects in an image and their relation, as columns that runs can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vit_mechinterp.circuits.token_sets import object_tokens, positions_of
from vit_mechinterp.engine.binding.positions import moved_note
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["ObjectPair", "PairedData", "binary_column", "default_pairs", "with_pairs"]


@dataclass(frozen=True)
class ObjectPair:
    """Two objects of an image, and whether they are the same.

    Attributes:
        first, second: token selectors of the objects, in the order in which their tokens are concatenated.
        relation: the column of the pair's relation: 1 same, 0 different.
    """

    first: Any
    second: Any
    relation: str


@dataclass(frozen=True)
class PairedData:
    """Data with columns for every pair: its tokens, its relation, and the opposite relation.

    Attributes:
        data: the dataset or the columns, with those of the pairs.
        relations: the relation of every pair ``[pair, example]``.
        n_tokens: tokens of a pair.
    """

    data: Any
    relations: Int[Tensor, "pair example"]
    n_tokens: int

    @staticmethod
    def tokens_of(pair: str) -> str:
        """The column of the pair's patch indices, those of the first object before those of the second."""
        return f"tokens of the {pair} pair"

    @staticmethod
    def own(pair: str) -> str:
        """The column of the pair's relation."""
        return f"relation of the {pair} pair"

    @staticmethod
    def opposite(pair: str) -> str:
        """The column of the relation that the pair does not have."""
        return f"opposite relation of the {pair} pair"


def default_pairs(data: Data, wanted_by: str) -> dict[str, ObjectPair]:
    """Return the sample and the display pair of relational match to sample, or else the one pair of
    discrimination, whose relation is the ``label``.

    Raises:
        DataError: the places of the objects are not in the data.
    """

    def pair(box: str, tokens: str, relation: str) -> ObjectPair:
        places = [object_tokens(data, f"{box}_{k}", f"{tokens}_{k}_tokens", wanted_by) for k in (1, 2)]
        return ObjectPair(places[0], places[1], relation)

    relations = {"sample": "sample_relation", "display": "display_relation"}
    if not any(column in data.columns for column in relations.values()):
        return {"only": pair("box", "object", "label")}
    return {
        "sample": pair("box", "object", relations["sample"]),
        "display": pair("display_box", "display", relations["display"]),
    }


def binary_column(data: Data, column: str, wanted_by: str) -> Int[Tensor, " example"]:
    """Read a column of zeros and ones.

    Raises:
        DataError: there is no such column, or an entry is something else.
    """
    data.require(column, wanted_by)
    rows = data.integers(column, wanted_by)
    for example, row in enumerate(rows):
        if len(row) != 1 or row[0] not in (0, 1):
            raise DataError(
                f"{wanted_by}: column {column!r}, example {example}: {row} is neither 0 (different) nor 1 "
                "(same)."
            )
    return torch.tensor([row[0] for row in rows])


def with_pairs(
    data: Any, vit: HookedViT, pairs: Mapping[str, ObjectPair], base: str, wanted_by: str
) -> PairedData:
    """Return the data with the columns of every pair.

    Raises:
        SpecError: there is no pair, or a selector does not fit the model.
        DataError: a column is missing or no relation, objects share a patch, or pairs differ in their number
            of tokens.
    """
    if not pairs:
        raise SpecError(f"{wanted_by}: there is no pair of objects; give at least one.")
    columns = Data(data, vit)
    first = len(vit.layout.tokens.prefix)
    added: dict[str, list[Any]] = {}
    relations = []
    sizes: dict[int, tuple[str, int]] = {}
    for name, pair in pairs.items():
        where = f"{wanted_by}, {name} pair"
        relations.append(binary_column(columns, pair.relation, where))
        places = [positions_of(tokens, vit, columns, base, where) for tokens in (pair.first, pair.second)]
        both = [[*one, *other] for one, other in zip(*places, strict=True)]
        _check(both, first, where, lambda: moved_note(vit, columns, base))
        for example, own in enumerate(both):
            sizes.setdefault(len(own), (name, example))
        added[PairedData.tokens_of(name)] = [[token - first for token in own] for own in both]
        added[PairedData.own(name)] = relations[-1].tolist()
        added[PairedData.opposite(name)] = (1 - relations[-1]).tolist()
    if len(sizes) > 1:
        said = [f"{n} tokens ({name} pair, example {example})" for n, (name, example) in sizes.items()]
        tokens = vit.layout.tokens
        grid, patch = ("x".join(map(str, sides)) for sides in (tokens.grid, tokens.patch_size))
        raise DataError(
            f"{wanted_by} concatenates the tokens of a pair, so every pair needs equally many; here they "
            f"cover {' and '.join(said[:2])} of the model's {grid} patches of {patch} pixels. Use stimuli "
            "whose cells lie on this grid." + moved_note(vit, columns, base)
        )
    return PairedData(_with_columns(data, added), torch.stack(relations), next(iter(sizes)))


def _check(positions: Sequence[Sequence[int]], first: int, where: str, moved: Callable[[], str]) -> None:
    for example, tokens in enumerate(positions):
        if min(tokens) < first:
            raise DataError(f"{where}, example {example}: an object has a token outside the patch grid.")
        if len(set(tokens)) < len(tokens):
            raise DataError(
                f"{where}, example {example}: the objects share a patch, so a direction for both has no one "
                "meaning there. Give objects that share no patch." + moved()
            )


def _with_columns(data: Any, added: Mapping[str, list[Any]]) -> Any:
    if isinstance(data, Mapping):
        return {**data, **added}
    data = data.remove_columns([name for name in added if name in data.column_names])
    for name, values in added.items():
        data = data.add_column(name, values)
    return data
