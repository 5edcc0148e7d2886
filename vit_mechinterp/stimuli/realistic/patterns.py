"""Painted and natural patterns of the objects themselves: the same for every image."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.stimuli.realistic.mesh import Floats
from vit_mechinterp.stimuli.realistic.noise import blend, clouds, grid, uniform
from vit_mechinterp.stimuli.streams import Stream

__all__ = ["PATTERNS", "pattern", "rgb"]

_SIZE = 256


def rgb(color: str) -> Floats:
    """Turn ``"#rrggbb"`` into numbers from 0 to 1, in sRGB as written ``[3]``."""
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _porcelain(stream: Stream) -> Floats:
    """White with blue flowers between blue bands."""
    x, y = grid(_SIZE)
    height = 1 - y
    flower = np.zeros_like(x)
    for cx, cy, size in ((0.25, 0.42, 0.19), (0.75, 0.3, 0.13), (0.75, 0.56, 0.12)):
        dx, dy = (x - cx + 0.5) % 1.0 - 0.5, (height - cy) * 0.9
        radius, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
        petal = size * (0.55 + 0.45 * np.abs(np.cos(3 * angle)))
        flower = np.maximum(flower, (radius < petal) & (radius > 0.2 * size))
    vine = np.abs(height - 0.43 - 0.1 * np.sin(2 * np.pi * x)) < 0.012
    bands = sum((np.abs(height - at) < w).astype(float) for at, w in
                ((0.07, 0.03), (0.13, 0.008), (0.72, 0.012), (0.8, 0.03), (0.97, 0.03)))  # fmt: skip
    ink = np.clip(flower + vine + bands, 0, 1) * (0.8 + 0.2 * clouds(stream, _SIZE, (8, 8)))
    return blend(rgb("#f5f4ee"), rgb("#17378c"), ink)


def _label(stream: Stream) -> Floats:
    """A cream paper label on one side of dark glass, with a red crest and lines of print."""
    x, y = grid(_SIZE)
    edge = (np.minimum(y % 1, 1 - y % 1) < 0.04) | (np.abs(x - 0.5) > 0.47)
    crest = ((x - 0.5) * 2.4) ** 2 + (y - 0.3) ** 2 < 0.02
    print_ = np.zeros_like(x)
    for line, (at, width) in enumerate(((0.52, 0.18), (0.62, 0.26), (0.75, 0.2), (0.82, 0.22))):
        letters = uniform(stream, 64)[(x * 64).astype(int)] > 0.3
        tall = 0.03 if line < 2 else 0.015
        print_ = np.maximum(print_, (np.abs(y - at) < tall) & (np.abs(x - 0.5) < width) & letters)
    paper = blend(rgb("#f0e4c4"), rgb("#e2d2a6"), clouds(stream, _SIZE, (6, 6)))
    paper = blend(paper, rgb("#8e1b22"), crest.astype(float))
    paper = blend(paper, rgb("#2b2422"), print_)
    return blend(paper, rgb("#a8842c"), edge.astype(float))


def _linen(stream: Stream) -> Floats:
    """Woven cloth."""
    x, y = grid(_SIZE)
    weave = 0.5 + 0.25 * np.sin(2 * np.pi * 32 * x) + 0.25 * np.sin(2 * np.pi * 32 * y)
    return blend(rgb("#c9ab6b"), rgb("#f3e4bd"), 0.6 * weave + 0.4 * clouds(stream, _SIZE, (16, 16)))


def _oak(stream: Stream) -> Floats:
    """Wood with its grain along the first axis."""
    _, y = grid(_SIZE)
    bend = clouds(stream, _SIZE, (3, 2), octaves=3)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (7 * y + 2.5 * bend))
    fibre = clouds(stream, _SIZE, (64, 3), octaves=3)
    return blend(rgb("#6e4220"), rgb("#b98048"), 0.55 * rings + 0.45 * fibre)


def _ribs(stream: Stream) -> Floats:
    """Green ribs with pale thorns."""
    x, y = grid(_SIZE)
    rib = 0.5 + 0.5 * np.cos(2 * np.pi * 2 * x)
    skin = blend(rgb("#1d4a24"), rgb("#5f9e4c"), rib * (0.8 + 0.2 * clouds(stream, _SIZE, (8, 8))))
    thorn = (rib > 0.9) & ((y * 14) % 1 < 0.3)
    return blend(skin, rgb("#e8e3b5"), np.asarray(0.85 * thorn, dtype=np.float64))


PATTERNS: dict[str, Callable[[Stream], Floats]] = {
    "porcelain": _porcelain,
    "label": _label,
    "linen": _linen,
    "oak": _oak,
    "ribs": _ribs,
}
"""Patterns by name; each is drawn from a stream of its own."""


@lru_cache(maxsize=len(PATTERNS))
def pattern(name: str) -> NDArray[np.uint8]:
    """Draw a pattern: sRGB ``[256, 256, 3]``; its upper edge is the top."""
    return (PATTERNS[name](Stream(0, "realistic", "pattern", name)) * 255).round().astype(np.uint8)
