"""The 16 objects: names, meshes, and the ways in which they rest on a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from vit_mechinterp.stimuli.realistic import built, turned
from vit_mechinterp.stimuli.realistic.mesh import Floats, rotation
from vit_mechinterp.stimuli.realistic.parts import Part

__all__ = ["FLAT", "OBJECT_NAMES", "POSES", "Placed", "object_parts", "posed"]

_BUILDERS: dict[str, Callable[[], list[Part]]] = {
    "mug": turned.mug,
    "vase": turned.vase,
    "teapot": turned.teapot,
    "bottle": turned.bottle,
    "bowl": turned.bowl,
    "lamp": turned.lamp,
    "chess king": turned.chess_king,
    "rocket": turned.rocket,
    "bolt": built.bolt,
    "gear": built.gear,
    "knot": built.knot,
    "star": built.star,
    "chair": built.chair,
    "cactus": built.cactus,
    "duck": built.duck,
    "die": built.die,
}

OBJECT_NAMES: tuple[str, ...] = tuple(_BUILDERS)
"""Names of the objects; the position is the object's id."""

_LYING: dict[str, tuple[Floats, ...]] = {
    "bottle": (rotation("y", 90),),
    "chess king": (rotation("y", 73),),
    "bolt": (rotation("y", 77),),
    "rocket": (rotation("z", 30) @ rotation("y", 83),),
    "gear": (rotation("x", 90),),
    "knot": (rotation("x", 90),),
    "star": (rotation("x", 90),),
    "die": (rotation("x", 90), rotation("y", 90), rotation("x", 180)),
}

POSES: dict[str, tuple[Floats, ...]] = {name: (np.eye(3), *_LYING.get(name, ())) for name in _BUILDERS}
"""The rotations ``[3, 3]`` in which an object rests on a table; the first is upright."""


FLAT = {"star": 55.0, "gear": 60.0}
"""Upright objects that show what they are from the front or from behind: the largest turn away from there, in
degrees.
"""

_SIZES = {"die": 0.75, "bowl": 0.85, "vase": 0.9, "mug": 0.85}


@lru_cache(maxsize=len(_BUILDERS))
def object_parts(name: str) -> tuple[Part, ...]:
    """Return the parts of an object, upright, at a size of one: the larger of its height and the diameter of
    what it covers of the table is 1 (a little less for bulky objects); it stands on z = 0, centred on the z
    axis.
    """
    parts = _BUILDERS[name]()
    points = np.concatenate([part.mesh.vertices for part in parts])
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    across = 2 * np.linalg.norm((points - middle)[:, :2], axis=1).max()
    size = max(float(across), float(np.ptp(points[:, 2]))) / _SIZES.get(name, 1.0)
    shift = (-middle[0] / size, -middle[1] / size, -points[:, 2].min() / size)
    return tuple(Part(part.mesh.moved(shift, scale=1 / size), part.surface, part.crease) for part in parts)


@dataclass(frozen=True)
class Placed:
    """An object in its place.

    Attributes:
        matrix: turn and size ``[3, 3]``, applied to the upright object.
        shift: then added ``[3]``.
        points: the vertices of all parts in their place ``[n, 3]``.
        radius: of the smallest circle around its middle that holds what it covers of the table.
    """

    matrix: Floats
    shift: Floats
    points: Floats
    radius: float


def posed(name: str, pose: int, degrees: float, size: float, at: tuple[float, float]) -> Placed:
    """Put an object on the table: in one of its `POSES`, turned about the z axis, and with its middle over a
    point of the table.
    """
    matrix = size * rotation("z", degrees) @ POSES[name][pose]
    points = np.concatenate([part.mesh.vertices for part in object_parts(name)]) @ matrix.T
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    shift = np.array([at[0] - middle[0], at[1] - middle[1], -points[:, 2].min()])
    radius = float(np.linalg.norm((points - middle)[:, :2], axis=1).max())
    return Placed(matrix, shift, points + shift, radius)
