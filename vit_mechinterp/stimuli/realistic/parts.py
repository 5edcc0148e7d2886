"""A part of an object: a closed mesh and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass

from vit_mechinterp.stimuli.realistic.mesh import Mesh
from vit_mechinterp.stimuli.realistic.surfaces import Surface

__all__ = ["Part"]


@dataclass(frozen=True)
class Part:
    """A mesh with a surface.

    Attributes:
        mesh: one or more closed solids.
        surface: its look.
        crease: edges sharper than this angle in degrees stay sharp.
    """

    mesh: Mesh
    surface: Surface
    crease: float = 40.0
