"""Scenes of the realistic set: what is drawn at random, before anything is rendered."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vit_mechinterp.stimuli.realistic import rooms
from vit_mechinterp.stimuli.realistic.noise import clouds, uniform
from vit_mechinterp.stimuli.realistic.scenes import Camera, Scene, objects_of, sample_scene
from vit_mechinterp.stimuli.streams import Stream


def first_scene(index: int, seed: int = 0) -> Scene:
    return next(scene for attempt in range(1000) if (scene := sample_scene(seed, "test", index, attempt)))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [first_scene(index) for index in range(32)]


@pytest.mark.parametrize(("seed", "split"), [(0, "test"), (5, "train")])
def test_no_object_tells_the_label(seed: int, split: str) -> None:
    for start in (0, 32, 320):
        pairs = [objects_of(seed, split, index) for index in range(start, start + 32)]
        assert all((first == second) == (index % 2 == 1) for index, (first, second) in enumerate(pairs))
        same = Counter(first for first, second in pairs if first == second)
        different = Counter(one for pair in pairs if pair[0] != pair[1] for one in pair)
        assert same == dict.fromkeys(range(16), 1)
        assert different == dict.fromkeys(range(16), 2)
    cycles = {tuple(objects_of(seed, split, index) for index in range(s, s + 32)) for s in (0, 32, 320)}
    assert len(cycles) == 3


def test_a_scene_depends_on_seed_split_index_and_attempt() -> None:
    def camera(*address: object) -> Camera | None:
        scene = sample_scene(*address)  # type: ignore[arg-type]
        return scene and scene.camera

    drawn = [camera(0, "test", 3, attempt) for attempt in range(20)]
    assert drawn == [camera(0, "test", 3, attempt) for attempt in range(20)]
    found = [one for one in drawn if one is not None]
    for other in ((1, "test", 3), (0, "val", 3), (0, "test", 4)):
        assert all(camera(*other, attempt) not in found for attempt in range(20))
    assert len(set(found)) == len(found) > 1


def test_objects_stand_apart_on_the_table_inside_the_image(scenes: list[Scene]) -> None:
    for scene in scenes:
        one, other = scene.placed
        assert one.points[:, 2].min() == pytest.approx(0)
        gaps = np.linalg.norm(one.points[:, None, :2][::40] - other.points[None, ::40, :2], axis=-1)
        assert gaps.min() > 0
        for placed in scene.placed:
            assert (np.abs(placed.points[:, :2]) <= scene.table_size).all()
            seen = scene.camera.project(placed.points)
            assert seen.min() > 0
            assert seen.max() < 1
        left, right = (scene.camera.project(p.points)[:, 0].mean() for p in scene.placed)
        assert left <= right
        assert sorted(scene.objects) == sorted(objects_of(0, "test", scene.index))


def test_scenes_vary(scenes: list[Scene]) -> None:
    assert len({scene.table for scene in scenes}) >= 5
    assert len({scene.wall for scene in scenes}) >= 5
    heights = [scene.camera.origin[2] for scene in scenes]
    assert max(heights) / min(heights) > 1.5
    sizes = [np.ptp(scene.camera.project(p.points), axis=0).max() for scene in scenes for p in scene.placed]
    assert max(sizes) / min(sizes) > 1.5
    for scene in scenes:
        if scene.objects[0] == scene.objects[1]:
            assert not np.allclose(scene.placed[0].matrix, scene.placed[1].matrix)


def test_the_camera_projects_as_its_angles_say() -> None:
    camera = Camera((0.0, -4.0, 0.0), (0.0, 0.0, 0.0), 60.0, 0.01)
    edge = 4 * np.tan(np.radians(30))
    points = np.array([[0, 0, 0], [edge, 0, 0], [-edge, 0, 0], [0, 0, edge], [edge / 2, 0, -edge]])
    assert np.allclose(camera.project(points), [[0.5, 0.5], [1, 0.5], [0, 0.5], [0.5, 0], [0.75, 1]])
    further = camera.project(np.array([[edge, 4.0, 0]]))
    assert np.allclose(further, [[0.75, 0.5]])


@pytest.mark.parametrize(("kind", "name"), [("TABLES", name) for name in rooms.TABLES] + [("WALLS", name) for name in rooms.WALLS])
def test_textures_are_colours_and_differ_by_seed(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "_SIZE", 64)
    draw = getattr(rooms, kind)[name]
    one, again, other = (rooms.to_bytes(draw(Stream(seed, "texture"))) for seed in (0, 0, 1))
    assert one.shape == (64, 64, 3)
    assert one.std() > 1
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_clouds_repeat_without_a_seam_and_uniform_numbers_keep_their_limits() -> None:
    field = clouds(Stream(0, "clouds"), 64, (4, 4), octaves=3)
    assert (field.min(), field.max()) == (0, 1)
    steps = np.abs(np.diff(field, axis=0)).max()
    assert 0 < np.abs(field[0] - field[-1]).max() < 1.5 * steps
    numbers = uniform(Stream(0, "numbers"), 5000, low=2, high=3)
    assert 2 < numbers.min() < 2.01 < 2.99 < numbers.max() < 3
    assert abs(numbers.mean() - 2.5) < 0.02


def test_a_room_is_dim_with_bright_windows() -> None:
    light = rooms.room_light(Stream(0, "room"))
    assert light.shape == (64, 128, 3)
    assert light.max() > 4 * np.median(light) > 0
