"""What stands around the objects: random table tops, walls, and the light of a room as images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.stimuli.realistic.mesh import Floats
from vit_mechinterp.stimuli.realistic.noise import blend, cells, clouds, grid, uniform
from vit_mechinterp.stimuli.realistic.patterns import rgb
from vit_mechinterp.stimuli.streams import Stream

__all__ = ["TABLES", "WALLS", "room_light", "to_bytes"]

_SIZE = 384
Texture = Callable[[Stream], Floats]


def to_bytes(image: Floats) -> NDArray[np.uint8]:
    """Turn colours from 0 to 1 into bytes."""
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _color(stream: Stream, *, low: float = 0.15, high: float = 0.85, vivid: float = 0.6) -> Floats:
    """Draw a colour: any hue, brightness from ``low`` to ``high``, saturation up to ``vivid``."""
    hue, saturation, value = uniform(stream, 3)
    value, saturation = low + (high - low) * value, vivid * saturation
    wheel = np.clip(np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return np.asarray(value * (1 - saturation + saturation * wheel))


def _wood(stream: Stream, boards: int) -> Floats:
    tones = ("#5a3a1e #a8743f", "#3a241a #70462c", "#b98f5e #e2c496", "#7d5a3c #a98a68", "#8a4b23 #c98850")
    dark, light = (rgb(c) for c in tones[int(stream.below(len(tones), 1)[0])].split())
    _, y = grid(_SIZE)
    _, within, row, _ = cells(_SIZE, boards, 1)
    bend = clouds(stream, _SIZE, (boards, 2), octaves=3)
    tone = uniform(stream, boards)[row]
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (9 * y + 4 * bend + 7 * tone)) ** 3
    fibre = clouds(stream, _SIZE, (96, 3), octaves=2)
    share = 0.2 * rings + 0.4 * fibre + 0.4 * (tone if boards > 1 else bend)
    return blend(blend(dark, light, share), dark * 0.3, (within < 0.02).astype(float) * (boards > 1))


def _planks(stream: Stream) -> Floats:
    return _wood(stream, int(stream.below(5, 1)[0]) + 4)


def _marble(stream: Stream) -> Floats:
    x, y = grid(_SIZE)
    field = clouds(stream, _SIZE, (2, 2), octaves=6)
    veins = 1 - np.abs(np.sin(2 * np.pi * (x + y + 1.6 * field)))
    ground, vein = (_color(stream, low=0.7, high=0.95, vivid=0.15), _color(stream, low=0.1, high=0.5))
    if stream.below(3, 1)[0] == 0:
        ground, vein = vein * 0.5, ground
    return blend(ground, vein, 0.85 * veins**6 + 0.15 * field)


def _granite(stream: Stream) -> Floats:
    grains = clouds(stream, _SIZE, (96, 96), octaves=2)
    specks = clouds(stream, _SIZE, (64, 64), octaves=2)
    stone = blend(_color(stream, vivid=0.25), _color(stream, vivid=0.25), grains)
    return blend(stone, _color(stream, vivid=0.2), (specks > 0.68).astype(float))


def _cloth(stream: Stream) -> Floats:
    """A checked table cloth."""
    count = int(stream.below(8, 1)[0]) + 6
    x, y = grid(_SIZE)
    one, other = (x * count) % 1 < 0.5, (y * count) % 1 < 0.5
    weave = 0.94 + 0.06 * np.sin(2 * np.pi * 96 * x) * np.sin(2 * np.pi * 96 * y)
    ground = _color(stream, low=0.75, high=0.95, vivid=0.15)
    share = 0.5 * one.astype(float) + 0.5 * other
    return np.asarray(blend(ground, _color(stream, vivid=0.85), share) * weave[..., None])


def _tiles(stream: Stream) -> Floats:
    count = int(stream.below(6, 1)[0]) + 4
    across, within, row, column = cells(_SIZE, count, count)
    joint = np.minimum(np.minimum(across, 1 - across), np.minimum(within, 1 - within)) < 0.035
    odd = (row + column) % 2 if stream.below(2, 1)[0] else np.zeros_like(row)
    tone = uniform(stream, count, count)[row, column] * 0.18
    glaze = blend(_color(stream), _color(stream), odd.astype(float)) * (0.9 + tone[..., None])
    glaze = glaze * (0.92 + 0.08 * clouds(stream, _SIZE, (6, 6))[..., None])
    return blend(glaze, _color(stream, low=0.4, high=0.8, vivid=0.1), joint.astype(float))


def _plain(stream: Stream) -> Floats:
    """Paint, plaster or concrete: one colour, uneven."""
    color = _color(stream, low=0.3, high=0.9, vivid=0.6)
    uneven = clouds(stream, _SIZE, (3, 3), octaves=7, decay=0.65)
    return np.asarray(color * (0.75 + 0.3 * uneven[..., None]))


def _bricks(stream: Stream) -> Floats:
    rows, columns = 14, 6
    across, within, row, column = cells(_SIZE, rows, columns, shift=0.5)
    joint = (np.minimum(across, 1 - across) < 0.025) | (np.minimum(within, 1 - within) < 0.07)
    tone = uniform(stream, rows, columns)[row, column]
    base = (rgb("#8d4030"), rgb("#a86a4c"), rgb("#b9b2a6"), rgb("#5d3b34"))[int(stream.below(4, 1)[0])]
    brick = base * (0.75 + 0.4 * tone[..., None]) * (0.8 + 0.3 * clouds(stream, _SIZE, (24, 24))[..., None])
    return blend(brick, rgb("#c9c2b4") * 0.8, joint.astype(float))


def _stripes(stream: Stream) -> Floats:
    """Striped wallpaper."""
    count = int(stream.below(12, 1)[0]) + 6
    x, _ = grid(_SIZE)
    place = (x * count) % 1
    ground, stripe, thin = (_color(stream, low=0.4, high=0.92, vivid=0.45) for _ in range(3))
    paper = blend(ground, stripe, (place < 0.5).astype(float))
    return blend(paper, thin, (np.abs(place - 0.75) < 0.04).astype(float))


def _dots(stream: Stream) -> Floats:
    """Wallpaper with a repeated ornament."""
    across, within, _, _ = cells(_SIZE, 12, 10, shift=0.5)
    dx, dy = across - 0.5, within - 0.5
    petals = 2 + int(stream.below(4, 1)[0])
    radius, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    ornament = radius < 0.16 + 0.2 * np.abs(np.cos(petals * angle))
    return blend(_color(stream, low=0.3), _color(stream, low=0.5, high=0.95), ornament.astype(float))


def _books(stream: Stream) -> Floats:
    """Shelves of books."""
    shelves, count = 5, 34
    x, y = grid(_SIZE)
    image = np.empty((_SIZE, _SIZE, 3))
    image[:] = rgb("#1c130d")
    wood = blend(rgb("#5a3a1e"), rgb("#8a5c33"), clouds(stream, _SIZE, (48, 3), octaves=2))
    row = (y * shelves).astype(int)
    up = 1 - (y * shelves) % 1
    for shelf in range(shelves):
        edges = np.concatenate([[0.0], np.cumsum(uniform(stream, count, low=0.5, high=1.5))])
        book = np.clip(np.searchsorted(edges / edges[-1], x, side="right") - 1, 0, count - 1)
        tall = uniform(stream, count, low=0.55, high=0.9)[book]
        colors = np.stack([_color(stream, high=0.65, vivid=0.7) for _ in range(count)])
        place = (x - (edges / edges[-1])[book]) * edges[-1] / np.diff(edges)[book]
        shade = 0.6 + 0.4 * np.sin(np.pi * np.clip(place, 0, 1))
        band = np.where(np.abs(up - 0.8 * tall) < 0.03, 1.3, 1.0)
        here = (row == shelf) & (up > 0.08) & (up < tall)
        image[here] = (colors[book] * (shade * band)[..., None])[here]
    image[up <= 0.08] = wood[up <= 0.08]
    return image


TABLES: dict[str, Texture] = {
    "planks": _planks,
    "wood": lambda stream: _wood(stream, 1),
    "marble": _marble,
    "granite": _granite,
    "cloth": _cloth,
    "tiles": _tiles,
    "plain": _plain,
}
"""Textures of table tops: sRGB from 0 to 1 ``[384, 384, 3]``, drawn from a stream."""

WALLS: dict[str, Texture] = {
    "plain": _plain,
    "bricks": _bricks,
    "stripes": _stripes,
    "ornament": _dots,
    "books": _books,
    "tiles": _tiles,
    "panels": lambda stream: np.ascontiguousarray(_planks(stream).swapaxes(0, 1)),
}
"""Textures of walls, likewise."""


def room_light(stream: Stream) -> NDArray[np.float32]:
    """Draw what a room's light looks like from its middle: radiance ``[64, 128, 3]``, an equirectangular
    image with the ceiling at the top. It is dim, with a few bright windows and lamps.
    """
    height, width = 64, 128
    up = np.linspace(1, -1, height)[:, None, None]
    ceiling = _color(stream, low=0.5, high=0.9, vivid=0.2)
    floor = _color(stream, low=0.1, high=0.35, vivid=0.4)
    image = np.broadcast_to(floor + (ceiling - floor) * (up + 1) / 2, (height, width, 3)) * 0.3
    image = image.copy()
    for _ in range(2 + int(stream.below(3, 1)[0])):
        x, y, wide, high, bright, warm = uniform(stream, 6)
        left, top = int(x * width), int(8 + y * 14)
        columns = (left + np.arange(int(6 + 14 * wide))) % width
        tint = np.array([1.0, 0.95 - 0.1 * warm, 0.95 - 0.35 * warm])
        image[top : top + int(6 + 12 * high), columns] = (1.5 + 2.5 * bright) * tint
    return image.astype(np.float32)
