"""The 16 objects: closed, of one size, on the table, and unlike one another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from vit_mechinterp.stimuli import OBJECT_NAMES
from vit_mechinterp.stimuli.realistic.mesh import Mesh, join, rotation
from vit_mechinterp.stimuli.realistic.objects import POSES, object_parts, posed
from vit_mechinterp.stimuli.realistic.patterns import PATTERNS, pattern
from vit_mechinterp.stimuli.realistic.solids import ball, block, circle, extrude, lathe, tube

CUBE = Mesh(
    np.array(list(itertools.product((0.0, 1.0), repeat=3))),
    np.array(
        [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]
    ),
)


def test_a_cube_is_closed_and_its_edges_stay_sharp() -> None:
    assert CUBE.open_edges() == 0
    assert CUBE.volume() == pytest.approx(1)
    assert Mesh(CUBE.vertices, CUBE.faces[1:]).open_edges() == 3
    assert Mesh(CUBE.vertices, CUBE.faces[:, ::-1]).volume() == pytest.approx(-1)
    normals = CUBE.corner_normals(40)
    assert np.allclose(np.sort(np.abs(normals), axis=-1), [0, 0, 1])
    round_off = CUBE.corner_normals(100)
    assert np.allclose(np.abs(round_off).min(), np.abs(round_off[np.abs(round_off) > 1e-9]).min())
    assert (np.abs(round_off) > 0.2).all()


def test_solids_have_the_volumes_of_their_formulas() -> None:
    n = 256
    polygon = n / 2 * np.sin(2 * np.pi / n)
    assert lathe([(2.0, 0.0), (2.0, 3.0)], n).volume() == pytest.approx(polygon * 4 * 3, rel=1e-6)
    assert ball(1.0, 128).volume() == pytest.approx(4 / 3 * np.pi, rel=2e-3)
    assert extrude(circle(n), 0.5).volume() == pytest.approx(polygon * 0.5)
    ring = extrude(circle(n), 0.5, hole=0.5 * circle(n))
    assert ring.volume() == pytest.approx(polygon * 0.5 * 0.75)
    assert block(1, 2, 3, bevel=1e-6).volume() == pytest.approx(6, rel=1e-4)
    path = np.concatenate([2 * circle(n), np.zeros((n, 1))], axis=1)
    torus = tube(path, 0.5, n, closed=True)
    assert torus.volume() == pytest.approx(2 * np.pi**2 * 2 * 0.25, rel=1e-3)
    for mesh in (ring, torus, join([torus, ring.moved((5, 0, 0))])):
        assert mesh.open_edges() == 0
    moved = torus.moved((1, 2, 3), scale=2, turn=rotation("x", 30))
    assert moved.volume() == pytest.approx(8 * torus.volume())
    assert np.allclose(rotation("z", 90) @ [1, 0, 0], [0, 1, 0])
    assert np.allclose(rotation("x", 90) @ [0, 1, 0], [0, 0, 1])
    assert np.allclose(rotation("y", 90) @ [0, 0, 1], [1, 0, 0])


def test_smooth_normals_point_outwards_along_the_radius() -> None:
    sphere = ball(1.0, 48)
    assert np.einsum("fci,fci->fc", sphere.corner_normals(), sphere.corners()).min() > 0.99


def test_there_are_sixteen_objects_with_looks_of_their_own() -> None:
    assert len(OBJECT_NAMES) == len(set(OBJECT_NAMES)) == 16
    looks = [tuple(part.surface for part in object_parts(name)) for name in OBJECT_NAMES]
    assert len(set(looks)) == 16
    assert {surface.pattern for look in looks for surface in look} == {None, *PATTERNS}
    for name in PATTERNS:
        assert pattern(name).shape == (256, 256, 3)
        assert pattern(name).std() > 5


@pytest.mark.parametrize("name", OBJECT_NAMES)
def test_an_object_is_closed_stands_on_the_table_and_has_size_one(name: str) -> None:
    parts = object_parts(name)
    for part in parts:
        assert part.mesh.open_edges() == 0
        assert part.mesh.volume() > 0
        normals = part.mesh.corner_normals(part.crease)
        assert np.allclose(np.linalg.norm(normals, axis=-1), 1)
        coordinates = part.mesh.texture_coordinates(part.surface.mapping)
        assert np.isfinite(coordinates).all()
    points = np.concatenate([part.mesh.vertices for part in parts])
    low, high = points.min(axis=0), points.max(axis=0)
    assert np.allclose(low + high, [0, 0, high[2]], atol=1e-9)
    across = 2 * np.linalg.norm(points[:, :2], axis=1).max()
    assert 0.7 <= max(high[2], across) <= 1 + 1e-9
    for pose in range(len(POSES[name])):
        placed = posed(name, pose, 77, 0.9, (0.3, -0.2))
        low, high = placed.points.min(axis=0), placed.points.max(axis=0)
        assert np.allclose(((low + high) / 2)[:2], [0.3, -0.2])
        assert low[2] == pytest.approx(0, abs=1e-9)
        assert np.allclose(placed.matrix @ placed.matrix.T, 0.81 * np.eye(3))
        assert np.linalg.norm(placed.points[:, :2] - [0.3, -0.2], axis=1).max() == pytest.approx(placed.radius)
        assert np.allclose(points @ placed.matrix.T + placed.shift, placed.points)


def test_no_two_objects_have_the_same_outline() -> None:
    # Radius by height, in bins: what a silhouette is made of.
    outlines = []
    for name in OBJECT_NAMES:
        points = np.concatenate([part.mesh.vertices for part in object_parts(name)])
        radius = np.linalg.norm(points[:, :2], axis=1)
        rows = np.minimum((points[:, 2] * 12).astype(int), 11)
        outlines.append([radius[rows == row].max(initial=0) for row in range(12)])
    apart = np.abs(np.array(outlines)[:, None] - np.array(outlines)[None]).max(axis=-1)
    assert apart[~np.eye(16, dtype=bool)].min() > 0.1


def test_texture_coordinates_wrap_around_and_lie_on_faces() -> None:
    cylinder = lathe([(1.0, 0.0), (1.0, 2.0)], 36)
    around = cylinder.texture_coordinates("cylinder")[: 2 * 36]
    assert np.ptp(around[..., 0], axis=1).max() < 0.05
    assert set(np.round(np.unique(around[..., 1]), 6)) == {0.0, 1.0}
    flat = CUBE.texture_coordinates("box")
    assert np.allclose(np.ptp(flat, axis=1), 1)
