"""The data of a search: its held-out splits, the wanted classes, and the variants of its pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError

if TYPE_CHECKING:
    from vit_mechinterp.model import HookedViT

__all__ = ["ONE_SPLIT", "labels_of", "n_classes", "pairs_by_attribute", "splits_of", "variants_of"]

ONE_SPLIT: Final = "test"
_RELATION, _PAIR = "intermediate_judgement", "edited_pair"
_WORDS = ("different", "same")


def pairs_by_attribute(data: Any, wanted_by: str, what: str) -> dict[str, tuple[Any, Any]]:
    """Two datasets for each attribute, checked to be so.

    Args:
        data: attribute to its two datasets.
        wanted_by: the circuit, for messages.
        what: what the two are, for messages.

    Raises:
        SpecError: there is no attribute, or something else stands for one than two datasets.
    """
    if not isinstance(data, Mapping):
        raise SpecError(
            f'{wanted_by} takes data by attribute, {{"shape": ({what}), ...}}, not {type(data).__name__}.'
        )
    if not data:
        raise SpecError(f"{wanted_by} has nothing to do: give at least one attribute with ({what}).")
    found = {}
    for attribute, both in data.items():
        if not isinstance(both, tuple | list) or len(both) != 2:
            raise SpecError(
                f"{wanted_by}: {attribute!r} needs two datasets, ({what}), not {type(both).__name__}."
            )
        found[attribute] = both[0], both[1]
    return found


def splits_of(test: Any) -> dict[str, Any]:
    """Held-out data by name of the split: a mapping of datasets as it is, one dataset as ``"test"``.

    Raises:
        DataError: a mapping holds datasets beside columns, or a split is called like no split can be.
    """
    if not isinstance(test, Mapping):
        return {ONE_SPLIT: test}
    datasets = {name: _is_data(value) for name, value in test.items()}
    if not any(datasets.values()):
        return {ONE_SPLIT: test}
    if not all(datasets.values()):
        odd = [name for name, found in datasets.items() if not found]
        raise DataError(
            "Held-out data is one dataset, or a mapping from names of splits to datasets; here are both: "
            f"{', '.join(name for name in datasets if name not in odd)} are datasets, {', '.join(odd)} are "
            "not."
        )
    return dict(test)


def _is_data(value: Any) -> bool:
    return isinstance(value, Mapping) or hasattr(value, "column_names")


def n_classes(vit: HookedViT) -> int:
    """Number of scores that the model gives.

    Raises:
        SpecError: it gives something else than one score for each class.
    """
    with torch.no_grad():
        shape = tuple(vit(vit.blank(1)).shape[1:])
    if len(shape) != 1:
        raise SpecError(
            f"{type(vit.module).__name__} gives {vit.layout.output} of shape {shape} per example, not one "
            "score for each class; a search needs a decision to change."
        )
    return int(shape[0])


def labels_of(
    vit: HookedViT, datasets: Sequence[Any], column: str, wanted_by: str = "das, label"
) -> dict[int, Int[Tensor, " example"]]:
    """The wanted class of every example of every dataset, by the identity of the dataset.

    Raises:
        SpecError, DataError: the model makes no decision, or an entry is no class of it.
    """
    n = n_classes(vit)
    found: dict[int, Tensor] = {}
    for data in datasets:
        if id(data) in found:
            continue
        columns = Data(data, vit)
        columns.require(column, wanted_by)
        rows = columns.integers(column)
        wrong = [k for k, row in enumerate(rows) if len(row) != 1 or not 0 <= row[0] < n]
        if wrong:
            raise DataError(
                f"Column {column!r}, example {wrong[0]}: {rows[wrong[0]]} is no class; the model has classes "
                f"0 to {n - 1}."
            )
        found[id(data)] = torch.tensor([row[0] for row in rows])
    return found


def variants_of(vit: HookedViT, data: Any) -> dict[str, Bool[Tensor, " example"]]:
    """Which examples belong to each variant of counterfactuals of relational match to sample.

    The variants are ``same_sample``, ``same_display``, ``different_sample`` and ``different_display``: the
    relation of the edited pair before the edit, and which pair it is (Lepori et al. 2024). Data without the
    columns ``intermediate_judgement`` and ``edited_pair`` has none.
    """
    columns = Data(data, vit)
    if not {_RELATION, _PAIR} <= set(columns.columns):
        return {}
    relations = [_WORDS[row[0]] for row in columns.integers(_RELATION)]
    names = [f"{relation}_{pair}" for relation, pair in zip(relations, columns.values(_PAIR), strict=True)]
    order = sorted(set(names), key=lambda name: (not name.startswith("same"), not name.endswith("sample")))
    return {name: torch.tensor([own == name for own in names]) for name in order}
