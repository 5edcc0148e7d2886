"""How the tokens of an image are parted for an analysis of attention: objects, background, and the rest.

One pair of objects is compared; relational match to sample has another, the display pair. Boxes of objects
that stand close, or one behind the other, can touch the same patch. Such a patch shows parts of both, so it
is counted with neither: attention to it has a share of its own, ``overlap``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from vit_mechinterp.circuits.token_sets import object_tokens, positions_of, token_mask
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["OVERLAP", "TokenSets", "default_objects", "part_tokens"]

OVERLAP = "overlap"
"""The set of patches that several objects share."""


@dataclass(frozen=True)
class TokenSets:
    """Sets that part the tokens of every example.

    Attributes:
        objects: the tokens of every object that no other object shares; the compared pair first.
        n_compared: how many objects belong to the compared pair; the others are those of the display pair.
        sets: the objects again, then the background, then one set per name.
        names: what else there is: ``"overlap"``, where objects share patches in any example, and tokens
            outside the patch grid, such as ``"cls"``.
    """

    objects: Bool[Tensor, "example object token"]
    n_compared: int
    sets: Bool[Tensor, "example set token"]
    names: tuple[str, ...]

    @property
    def n_objects(self) -> int:
        """How many objects there are, in both pairs."""
        return self.objects.shape[1]

    @property
    def has_display(self) -> bool:
        """Whether there is a display pair."""
        return self.n_objects > self.n_compared

    @cached_property
    def queries(self) -> Bool[Tensor, "example query token"]:
        """The sets whose attention is measured: every object and, if there is a display pair, each pair."""
        if not self.has_display:
            return self.objects
        pairs = [self.objects[:, : self.n_compared], self.objects[:, self.n_compared :]]
        return torch.cat([self.objects, *(pair.any(dim=1, keepdim=True) for pair in pairs)], dim=1)

    @property
    def query_names(self) -> list[str]:
        """What a reader calls the query sets."""
        names = [f"object {k + 1}" for k in range(self.n_compared)]
        if self.has_display:
            names += [f"display {k + 1}" for k in range(self.n_objects - self.n_compared)]
            names += ["sample pair", "display pair"]
        return names

    @property
    def counted(self) -> Bool[Tensor, " example"]:
        """The examples in which every object has a patch of its own; shares of the others are undefined."""
        return self.objects.any(dim=-1).all(dim=-1)

    def shown(self, example: int) -> int:
        """Return the first counted example from this one on, or else the first of all.

        Raises:
            SpecError: there is no such example.
        """
        if not 0 <= example < len(self.objects):
            raise SpecError(f"example={example} is out of range; there are {len(self.objects)} images.")
        counted = [int(index) for index in self.counted.nonzero().flatten()]
        return next((index for index in counted if index >= example), counted[0])


def default_objects(
    data: Data, objects: Sequence[Any] | None, display: Sequence[Any] | None, wanted_by: str
) -> tuple[list[Any], list[Any]]:
    """Return selectors of the compared objects and of the display pair, by default from the columns.

    Raises:
        DataError: the columns of the compared objects are missing; SpecError: fewer than two are given.
    """
    if objects is None:
        objects = [object_tokens(data, f"box_{k}", f"object_{k}_tokens", wanted_by) for k in (1, 2)]
    if len(objects) < 2:
        raise SpecError(f"{wanted_by} compares objects; give selectors of two or more, not {len(objects)}.")
    if display is None:
        named = [(f"display_box_{k}", f"display_{k}_tokens") for k in (1, 2)]
        there = any(name in data.columns for pair in named for name in pair)
        display = [object_tokens(data, *pair, wanted_by) for pair in named] if there else []
    return list(objects), list(display)


def part_tokens(
    vit: HookedViT, data: Data, objects: Sequence[Any], base: str, display: Sequence[Any] = ()
) -> TokenSets:
    """Part the tokens of every example into objects, background (patches of no object), and the rest.

    Args:
        vit: the model whose token layout counts.
        data: the examples.
        objects: token selectors, one per object that is compared.
        base: the image column that boxes are drawn on.
        display: token selectors of the objects of another pair.

    Raises:
        SpecError: a selector does not fit the model; DataError: a column is missing, an object has tokens
            outside the patch grid, or in no example has every object a patch of its own.
    """
    layout = vit.layout.tokens
    masks = []
    for number, tokens in enumerate([*objects, *display], start=1):
        where = f"attention of object {number}"
        masks.append(token_mask(positions_of(tokens, vit, data, base, where), layout.n_tokens))
    covered = torch.stack(masks, dim=1)
    taken = covered.sum(dim=1)
    patches = token_mask([layout.positions("patches") or ()], layout.n_tokens)
    wrong = ((taken > 0) & ~patches).any(dim=1).nonzero()
    if len(wrong):
        raise DataError(
            f"Example {int(wrong[0])}: an object has a token outside the patch grid, so shares of attention "
            "would not add up. Select objects by boxes or patch indices."
        )
    own = covered & (taken == 1)[:, None]
    shared = taken > 1
    names = tuple(name for name in layout.names if name not in ("all", "patches"))
    outside = [token_mask([layout.positions(name) or ()], layout.n_tokens) for name in names]
    rest = [mask.expand(data.n, -1)[:, None] for mask in outside]
    if bool(shared.any()):
        names, rest = (OVERLAP, *names), [shared[:, None], *rest]
    background = (patches & (taken == 0))[:, None]
    sets = TokenSets(own, len(objects), torch.cat([own, background, *rest], dim=1), names)
    if not bool(sets.counted.any()):
        raise DataError(
            "In every example an object shares all its patches with another object, so its attention cannot "
            "be told from the other's. Give objects with patches of their own, or a model of smaller patches."
        )
    return sets
