"""What things are made of: colour, gloss and pattern, without a word about the renderer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vit_mechinterp.stimuli.realistic.mesh import TextureMapping

__all__ = ["Material", "Surface", "linear"]

Material = Literal["matte", "plastic", "metal"]


@dataclass(frozen=True)
class Surface:
    """The look of a surface.

    Attributes:
        color: sRGB as ``"#rrggbb"``; of a metal, the colour of what it reflects.
        material: "matte", "plastic" (colour below a clear, more or less glossy coat: glaze, lacquer) or
            "metal".
        roughness: of plastic and metal, from 0.03 (polished) to 0.5.
        pattern: name of one of `patterns.PATTERNS`, which replaces the colour.
        mapping: how the pattern lies on the surface.
        repeat: how often the pattern repeats (around and up, or per unit of length).
    """

    color: str
    material: Material = "plastic"
    roughness: float = 0.1
    pattern: str | None = None
    mapping: TextureMapping = "cylinder"
    repeat: tuple[float, float] = (1.0, 1.0)


def linear(color: str) -> tuple[float, float, float]:
    """Turn ``"#rrggbb"`` in sRGB into linear red, green and blue from 0 to 1."""
    values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return red, green, blue
