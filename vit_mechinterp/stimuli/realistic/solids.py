"""Closed solids as meshes: turned on a lathe, extruded from an outline, swept along a path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vit_mechinterp.stimuli.realistic.mesh import Floats, Mesh

__all__ = ["ball", "block", "circle", "closed_lathe", "curve", "extrude", "lathe", "star_outline", "tube"]


def curve(points: Sequence[tuple[float, ...]], steps: int = 8) -> Floats:
    """Return a smooth curve (Catmull-Rom) through points, ``steps`` to each span: ``[n, dimensions]``."""
    given = np.asarray(points, dtype=float)
    padded = np.concatenate([2 * given[:1] - given[1:2], given, 2 * given[-1:] - given[-2:-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    spans = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        spans.append(
            0.5
            * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * (b - c) + d - a) * t**3)
        )
    return np.concatenate([*spans, given[-1:]])


def circle(n: int, radius: float = 1.0) -> Floats:
    """Return n points of a circle, counter-clockwise ``[n, 2]``."""
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    points: Floats = radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return points


def star_outline(points: int, outer: float, inner: float) -> Floats:
    """Return the outline of a star, a point on the positive y axis, counter-clockwise ``[2 points, 2]``."""
    angle = np.pi / 2 + np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2 == 0, outer, inner)
    outline: Floats = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return outline


def _rings(rings: Floats, *, around: bool = False) -> Mesh:
    """Join rings of points ``[rings, n, 3]`` by quads; the ends are closed by a fan unless the last ring is
    followed by the first.
    """
    count, n = rings.shape[:2]
    index = np.arange(count * n).reshape(count, n)
    here = index if around else index[:-1]
    there = np.roll(index, -1, axis=0) if around else index[1:]
    a, b, c, d = here, np.roll(here, -1, axis=1), np.roll(there, -1, axis=1), there
    faces = [np.stack([a, b, c], axis=-1).reshape(-1, 3), np.stack([a, c, d], axis=-1).reshape(-1, 3)]
    vertices = [rings.reshape(-1, 3)]
    if not around:
        first, last = count * n, count * n + 1
        vertices += [rings[0].mean(axis=0)[None], rings[-1].mean(axis=0)[None]]
        faces.append(np.stack([np.roll(index[0], -1), index[0], np.full(n, first)], axis=-1))
        faces.append(np.stack([index[-1], np.roll(index[-1], -1), np.full(n, last)], axis=-1))
    return Mesh(np.concatenate(vertices), np.concatenate(faces))


def lathe(profile: Sequence[tuple[float, float]] | Floats, n: int = 72) -> Mesh:
    """Turn a profile of (radius, height) around the z axis.

    The profile runs outside upwards; its first and last point are joined to the axis at their own height, so
    a thick wall is a profile that goes up outside and down inside.
    """
    return _rings(_turned(profile, n))


def closed_lathe(profile: Sequence[tuple[float, float]] | Floats, n: int = 72) -> Mesh:
    """Turn a closed profile that stays off the z axis: counter-clockwise, its last point followed by its
    first.
    """
    return _rings(_turned(profile, n), around=True)


def _turned(profile: Sequence[tuple[float, float]] | Floats, n: int) -> Floats:
    ring = circle(n)
    points = np.asarray(profile, dtype=float)
    return np.stack([_level(max(r, 1e-4) * ring, z) for r, z in points])


def ball(radius: float = 1.0, n: int = 32) -> Mesh:
    """Return a sphere around the origin."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, n // 2 + 1)
    return lathe(radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1), n)


def tube(path: Floats, radius: float | Floats, n: int = 20, *, closed: bool = False) -> Mesh:
    """Sweep a circle along a path ``[points, 3]``; ``radius`` is one number or one for each point.

    A closed path's last point is followed by its first. The circle is turned as little as possible from
    point to point.
    """
    radii = np.broadcast_to(np.asarray(radius, dtype=float), len(path))
    around = np.roll(path, -1, axis=0) - np.roll(path, 1, axis=0)
    ahead: Floats = around if closed else np.gradient(path, axis=0)
    ahead = ahead / np.linalg.norm(ahead, axis=1, keepdims=True)
    side = np.cross(ahead[0], np.eye(3)[np.abs(ahead[0]).argmin()])
    sides = []
    for direction in ahead:
        side = side - direction * (side @ direction)
        side = side / np.linalg.norm(side)
        sides.append(side)
    first = np.array(sides)
    second = np.cross(ahead, first)
    if closed:
        # What transport around the loop has turned is taken back evenly.
        end = first[-1] - ahead[0] * (first[-1] @ ahead[0])
        excess = np.arctan2(end @ second[0], end @ first[0])
        angle = -excess * np.arange(len(path)) / len(path)
        cosine, sine = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = cosine * first + sine * second, cosine * second - sine * first
    ring = circle(n)
    rings = path[:, None] + radii[:, None, None] * (
        ring[None, :, :1] * first[:, None] + ring[None, :, 1:] * second[:, None]
    )
    return _rings(rings, around=closed)


def extrude(outline: Floats, height: float, *, bevel: float = 0.0, hole: Floats | None = None) -> Mesh:
    """Raise an outline (counter-clockwise, ``[n, 2]``) from z = 0 to ``height``, with rounded edges.

    Without a hole, every point of the outline is to be seen from its middle; a hole has as many points as
    the outline, in the same order.
    """
    angle = np.linspace(0, np.pi / 2, 5) if bevel else np.zeros(1)
    inset = bevel * (1 - np.sin(angle))
    rise = bevel * (1 - np.cos(angle))
    steps = [*zip(inset, rise, strict=True), *zip(inset[::-1], height - rise[::-1], strict=True)]
    rings = [_level(_inset(outline, float(d)), float(z)) for d, z in steps]
    if hole is None:
        return _rings(np.stack(rings))
    rings += [_level(_inset(hole, -float(d)), float(z)) for d, z in reversed(steps)]
    return _rings(np.stack(rings), around=True)


def block(width: float, depth: float, height: float, *, bevel: float = 0.02) -> Mesh:
    """Return a box with rounded edges that stands on z = 0, centred on the z axis."""
    corner = min(bevel, width / 2.01, depth / 2.01)
    quarter = np.linspace(0, np.pi / 2, 5)
    arc = corner * np.stack([np.cos(quarter), np.sin(quarter)], axis=-1)
    points = []
    for turn, (x, y) in enumerate([(1, 1), (-1, 1), (-1, -1), (1, -1)]):
        cosine, sine = np.cos(turn * np.pi / 2), np.sin(turn * np.pi / 2)
        matrix = np.array([[cosine, -sine], [sine, cosine]])
        points.append(np.array([x * (width / 2 - corner), y * (depth / 2 - corner)]) + arc @ matrix.T)
    return extrude(np.concatenate(points), height, bevel=min(bevel * 0.7, height / 2.01))


def _level(points: Floats, z: float) -> Floats:
    return np.concatenate([points, np.full((len(points), 1), z)], axis=1)


def _inset(outline: Floats, distance: float) -> Floats:
    """Move every edge of an outline inwards (outwards where negative) by a distance."""
    if distance == 0:
        return outline
    edge = np.roll(outline, -1, axis=0) - outline
    normal = np.stack([-edge[:, 1], edge[:, 0]], axis=-1)
    normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    before = np.roll(normal, 1, axis=0)
    both = 1 + np.einsum("ni,ni->n", before, normal)
    moved: Floats = outline + distance * (before + normal) / np.maximum(both, 0.25)[:, None]
    return moved
