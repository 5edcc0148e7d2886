"""What one image shows, as data: two objects on a table, the room, the lights and the camera.

A scene depends on its seed, split and index alone, and needs no renderer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vit_mechinterp.stimuli.realistic.mesh import Floats
from vit_mechinterp.stimuli.realistic.noise import uniform
from vit_mechinterp.stimuli.realistic.objects import FLAT, OBJECT_NAMES, POSES, Placed, posed
from vit_mechinterp.stimuli.realistic.rooms import TABLES, WALLS
from vit_mechinterp.stimuli.streams import Stream

__all__ = ["Camera", "Light", "Scene", "objects_of", "sample_scene"]

Point = tuple[float, float, float]

_CYCLE = 2 * len(OBJECT_NAMES)
_GAP = 0.04
_MARGIN = 0.02


@dataclass(frozen=True)
class Camera:
    """A camera with a thin lens.

    Attributes:
        origin, target: where it stands and what its middle shows, in units of the objects' size.
        field_of_view: in degrees, across and along the square image.
        aperture: radius of the lens; things off the target's distance are blurred.
    """

    origin: Point
    target: Point
    field_of_view: float
    aperture: float

    def project(self, points: Floats) -> Floats:
        """Return where points ``[n, 3]`` fall in the image ``[n, 2]``: x to the right and y downwards, from 0
        to 1 inside it.
        """
        ahead = np.subtract(self.target, self.origin)
        ahead = ahead / np.linalg.norm(ahead)
        right = np.cross(ahead, [0.0, 0.0, 1.0])
        right = right / np.linalg.norm(right)
        seen = points - np.asarray(self.origin)
        scale = 0.5 / np.tan(np.radians(self.field_of_view) / 2) / (seen @ ahead)
        return np.stack([0.5 + seen @ right * scale, 0.5 - seen @ np.cross(right, ahead) * scale], axis=-1)


@dataclass(frozen=True)
class Light:
    """A square lamp that shines at the middle of the table: where it is, its side, and its radiance."""

    origin: Point
    side: float
    radiance: Point


@dataclass(frozen=True)
class Scene:
    """All that one image shows.

    Attributes:
        seed, split, index, attempt: what the scene was drawn from; textures are drawn from it too.
        objects: ids of the two objects; object 1 is the one further left.
        placed: the objects in their places.
        table, wall: names of the textures.
        table_size: half its width and depth.
        table_degrees: how far the texture of the table top is turned.
        table_scale, wall_scale: length of a texture's side.
        wall_distance: how far behind the middle of the table the wall stands.
        gloss: roughness of the table top.
        lights: the lamps.
        camera: the camera.
    """

    seed: int
    split: str
    index: int
    attempt: int
    objects: tuple[int, int]
    placed: tuple[Placed, Placed]
    table: str
    wall: str
    table_size: tuple[float, float]
    table_degrees: float
    table_scale: float
    wall_scale: float
    wall_distance: float
    gloss: float
    lights: tuple[Light, ...]
    camera: Camera

    def stream(self, what: str) -> Stream:
        """Return the random stream for one part of the scene."""
        return Stream(self.seed, "realistic", self.split, self.index, self.attempt, what)


def objects_of(seed: int, split: str, index: int) -> tuple[int, int]:
    """Return the objects of an image: the same one twice where the index is odd.

    In every 32 images that start at a multiple of 32, each object is in one "same" image and in two
    "different" ones, so no object tells the label.
    """
    cycle, place = divmod(index, _CYCLE)
    stream = Stream(seed, "realistic", split, "objects", cycle)
    n = len(OBJECT_NAMES)
    order = uniform(stream, n).argsort(kind="stable")
    step = 1 + int(stream.below(n - 1, 1)[0])
    pair, same = divmod(place, 2)
    first = int(order[pair])
    return (first, first) if same else (first, int(order[(pair + step) % n]))


def sample_scene(seed: int, split: str, index: int, attempt: int = 0) -> Scene | None:
    """Draw a scene; None where the objects would touch or an object would leave the image."""
    stream = Stream(seed, "realistic", split, index, attempt, "scene")

    def draw(low: float, high: float) -> float:
        return float(uniform(stream, 1, low=low, high=high)[0])

    ids = objects_of(seed, split, index)
    distance, elevation = draw(2.6, 3.7), np.radians(draw(16, 40))
    target = (draw(-0.12, 0.12), draw(-0.1, 0.1), draw(0.25, 0.5))
    camera = Camera(
        origin=(
            target[0],
            target[1] - distance * float(np.cos(elevation)),
            target[2] + distance * float(np.sin(elevation)),
        ),
        target=target,
        field_of_view=draw(34, 42),
        aperture=draw(0.012, 0.04),
    )
    placed = []
    for name in (OBJECT_NAMES[i] for i in ids):
        pose = int(stream.below(len(POSES[name]), 1)[0]) if draw(0, 1) < 0.4 else 0
        at = (draw(-0.95, 0.95), draw(-0.7, 0.75))
        most = FLAT.get(name, 180.0) if pose == 0 else 180.0
        degrees = draw(-most, most) + (180 if draw(0, 1) < 0.5 else 0)
        placed.append(posed(name, pose, degrees, draw(0.8, 1.05), at))
    if not _fits(placed, camera):
        return None
    middles = [float(camera.project(one.points)[:, 0].mean()) for one in placed]
    if middles[0] > middles[1]:
        placed, ids = placed[::-1], ids[::-1]
    return Scene(
        seed=seed,
        split=split,
        index=index,
        attempt=attempt,
        objects=ids,
        placed=(placed[0], placed[1]),
        table=list(TABLES)[int(stream.below(len(TABLES), 1)[0])],
        wall=list(WALLS)[int(stream.below(len(WALLS), 1)[0])],
        table_size=(draw(1.7, 3.2), draw(1.25, 1.9)),
        table_degrees=draw(-180, 180),
        table_scale=draw(1.5, 3.5),
        wall_scale=draw(3.0, 6.0),
        wall_distance=draw(2.2, 5.0),
        gloss=draw(0.08, 0.4),
        lights=_lights(stream),
        camera=camera,
    )


def _lights(stream: Stream) -> tuple[Light, ...]:
    """Draw a key light and a weaker fill light from the other side, each of its own colour."""
    side = 1 if stream.below(2, 1)[0] else -1
    lights = []
    for sign, low, high in ((side, 34.0, 56.0), (-side, 2.0, 10.0)):
        around, up, far, wide, bright, warm = uniform(stream, 6)
        angle = np.radians(20 + 60 * around)
        height = np.radians(35 + 35 * up)
        distance = 3.6 + 1.6 * far
        origin = (
            float(sign * distance * np.cos(height) * np.sin(angle)),
            float(-distance * np.cos(height) * np.cos(angle)),
            float(distance * np.sin(height)),
        )
        width = 0.5 + 0.7 * wide
        power = (low + (high - low) * bright) / width**2
        tint = (1.0, 0.93 - 0.13 * warm, 0.95 - 0.4 * warm)
        lights.append(Light(origin, width, (power * tint[0], power * tint[1], power * tint[2])))
    return tuple(lights)


def _fits(placed: list[Placed], camera: Camera) -> bool:
    """Say whether two objects stand apart and are wholly inside the image."""
    apart = np.linalg.norm(_middle(placed[0]) - _middle(placed[1]))
    if apart < placed[0].radius + placed[1].radius + _GAP:
        return False
    for one in placed:
        seen = camera.project(one.points)
        if seen.min() < _MARGIN or seen.max() > 1 - _MARGIN:
            return False
    return True


def _middle(one: Placed) -> Floats:
    return np.asarray((one.points.min(axis=0) + one.points.max(axis=0))[:2] / 2)
