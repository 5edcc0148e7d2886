"""Which objects (combinations of a shape and a colour) each split of the data may show.

``"256-256-256"`` shows every one of the 16 x 16 combinations everywhere. ``"32-32-224"`` (Lepori et al. 2024)
trains and validates on 32 combinations, two shapes for each colour, and tests on the 224 others; ``test_iid``
shows the 32 again in new images. ``"ood-shape"``, ``"ood-color"`` and ``"ood-shape-color"`` show, in every
split, the objects that have one of the four shapes, colours, or both, that no training shows: 64, 64 and 16
of them. Colours and shapes are enumerated by id, so a split is the same in every process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.stimuli.colors import COLOR_NAMES, N_COLORS
from vit_mechinterp.stimuli.shapes import N_SHAPES, SHAPE_NAMES

__all__ = [
    "DIFFERENT_KINDS",
    "SPLITS",
    "DifferentKind",
    "Split",
    "allowed_combinations",
    "check_split",
    "object_pairs",
]

Split = Literal["train", "val", "test", "test_iid"]
SPLITS: tuple[Split, ...] = ("train", "val", "test", "test_iid")

DifferentKind = Literal["both", "shape", "color"]
DIFFERENT_KINDS: tuple[DifferentKind, ...] = ("both", "shape", "color")
"""In which attributes two different objects differ; "different" images cycle through these in this order."""


def check_split(split: str) -> Split:
    """Return ``split`` if there is such a split.

    Raises:
        SpecError: there is none; the message lists those that exist.
    """
    for known in SPLITS:
        if split == known:
            return known
    raise SpecError(f"There is no split {split!r}. Splits: {', '.join(SPLITS)}.{suggest(split, SPLITS)}")


_KNOWN = (slice(0, N_SHAPES), slice(0, N_COLORS))
_NEW_SHAPES, _NEW_COLORS = slice(N_SHAPES, None), slice(N_COLORS, None)
_OUT_OF_DISTRIBUTION: dict[str, tuple[slice, slice]] = {
    "ood-shape": (_NEW_SHAPES, _KNOWN[1]),
    "ood-color": (_KNOWN[0], _NEW_COLORS),
    "ood-shape-color": (_NEW_SHAPES, _NEW_COLORS),
}


def _seen(combinations: str) -> int:
    parts = combinations.split("-")
    total = N_SHAPES * N_COLORS
    if len(parts) == 3 and all(part.isdecimal() for part in parts):
        train, val, test = (int(part) for part in parts)
        whole = train == val == test == total
        divided = (
            train == val
            and train + test == total
            and train % N_COLORS == 0
            and 2 * N_COLORS <= train <= total - 2 * N_COLORS
        )
        if whole or divided:
            return train
    raise SpecError(
        f"combinations={combinations!r} names no split of the {total} objects. Write the counts of train, "
        f"val and test: '256-256-256' (all everywhere), or 'k-k-m' with k + m = {total}, k a multiple of "
        f"{N_COLORS} and both at least {2 * N_COLORS}, for example '32-32-224'; or, for objects that no "
        f"training shows, {', '.join(map(repr, _OUT_OF_DISTRIBUTION))}."
    )


@lru_cache(maxsize=32)
def allowed_combinations(split: Split, combinations: str = "256-256-256") -> NDArray[np.bool_]:
    """Return which objects a split may show, as a read-only boolean array ``[shape, color]``, 20 x 20.

    With ``"k-k-m"`` the shapes ``j + i mod 16`` for j = 0 .. 16 - k/16 - 1 are held out of training for
    colour i, so every colour and every shape is seen, each in k/16 combinations.

    Raises:
        SpecError: ``combinations`` is not a split string, or there is no such split.
    """
    check_split(split)
    allowed = np.zeros((len(SHAPE_NAMES), len(COLOR_NAMES)), dtype=bool)
    if combinations in _OUT_OF_DISTRIBUTION:
        allowed[_OUT_OF_DISTRIBUTION[combinations]] = True
    else:
        allowed[_KNOWN] = _known_objects(split, _seen(combinations))
    allowed.setflags(write=False)
    return allowed


def _known_objects(split: Split, seen: int) -> NDArray[np.bool_]:
    """The 16 x 16 objects of which ``seen`` are trained on."""
    allowed = np.ones((N_SHAPES, N_COLORS), dtype=bool)
    if seen == allowed.size:
        return allowed
    for color in range(N_COLORS):
        held_out = (np.arange(N_SHAPES - seen // N_COLORS) + color) % N_SHAPES
        allowed[held_out, color] = False
    return ~allowed if split == "test" else allowed


@lru_cache(maxsize=32)
def object_pairs(kind: DifferentKind, split: Split, combinations: str = "256-256-256") -> NDArray[np.int64]:
    """Return every ordered pair of objects of a split that differ in exactly the named attributes.

    Returns:
        ``[pairs, 2, 2]``: pair, object, (shape id, colour id).
    """
    objects = np.argwhere(allowed_combinations(split, combinations))
    differs = objects[:, None, :] != objects[None, :, :]
    wanted = np.array([kind in ("both", "shape"), kind in ("both", "color")])
    first, second = np.nonzero((differs == wanted).all(axis=-1))
    pairs = np.stack([objects[first], objects[second]], axis=1)
    pairs.setflags(write=False)
    return pairs
