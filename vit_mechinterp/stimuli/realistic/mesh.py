"""Triangle meshes: moving, joining, measuring, and what a renderer needs of them (normals and texture
coordinates at the corners of every triangle).

Coordinates are right-handed with z upwards; the corners of a triangle run counter-clockwise seen from
outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Floats", "Mesh", "TextureMapping", "join", "rotation"]

Floats = NDArray[np.float64]
TextureMapping = Literal["cylinder", "box"]


@dataclass(frozen=True)
class Mesh:
    """Triangles.

    Attributes:
        vertices: positions ``[vertices, 3]``.
        faces: vertex indices ``[faces, 3]``.
    """

    vertices: Floats
    faces: NDArray[np.int64]

    def moved(
        self,
        by: tuple[float, float, float] = (0.0, 0.0, 0.0),
        *,
        scale: float | tuple[float, float, float] = 1.0,
        turn: Floats | None = None,
    ) -> Mesh:
        """Return the mesh scaled, then turned by a matrix ``[3, 3]``, then shifted."""
        vertices = self.vertices * np.asarray(scale, dtype=float)
        if turn is not None:
            vertices = vertices @ turn.T
        return Mesh(vertices + np.asarray(by, dtype=float), self.faces)

    def corners(self) -> Floats:
        """Return the positions of every triangle's corners ``[faces, 3, 3]``."""
        return self.vertices[self.faces]

    def volume(self) -> float:
        """Return the enclosed volume; it is positive where triangles face outwards."""
        a, b, c = np.moveaxis(self.corners(), 1, 0)
        return float(np.einsum("fi,fi->", a, np.cross(b, c)) / 6)

    def open_edges(self) -> int:
        """Count the edges that do not run once in each direction: none where the surface is closed."""
        edges = np.concatenate([self.faces[:, [i, (i + 1) % 3]] for i in range(3)])
        codes = edges @ np.array([len(self.vertices), 1])
        backwards = edges[:, ::-1] @ np.array([len(self.vertices), 1])
        directed, count = np.unique(codes, return_counts=True)
        return int((count != 1).sum() + (~np.isin(directed, backwards)).sum())

    def corner_normals(self, crease: float = 40.0) -> Floats:
        """Return a normal per corner ``[faces, 3, 3]``: the mean, by area, of the normals of the triangles
        that meet there, of those within ``crease`` degrees of the corner's own triangle.
        """
        a, b, c = np.moveaxis(self.corners(), 1, 0)
        weighted = np.cross(b - a, c - a)
        unit = weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-15)
        owner = self.faces.reshape(-1)
        order = np.argsort(owner, kind="stable")
        start = np.searchsorted(owner[order], np.arange(len(self.vertices) + 1))
        valence = np.diff(start)[owner]
        # Every (corner, triangle at the same vertex) pair, one after the other.
        corner = np.repeat(np.arange(len(owner)), valence)
        nth = np.arange(len(corner)) - np.repeat(np.cumsum(valence) - valence, valence)
        neighbour = order[start[owner[corner]] + nth] // 3
        near = np.einsum("pi,pi->p", unit[corner // 3], unit[neighbour]) > np.cos(np.radians(crease))
        total = np.zeros((len(owner), 3))
        for axis in range(3):
            total[:, axis] = np.bincount(
                corner[near], weights=weighted[neighbour[near], axis], minlength=len(owner)
            )
        length = np.linalg.norm(total, axis=1, keepdims=True)
        normals = np.where(length > 1e-15, total / np.maximum(length, 1e-15), np.repeat(unit, 3, axis=0))
        return normals.reshape(-1, 3, 3)

    def texture_coordinates(self, mapping: TextureMapping) -> Floats:
        """Return u and v per corner ``[faces, 3, 2]``: around the z axis and up (u once around, v from 0 at
        the foot to 1 at the top), or by position on the faces of a box (two axes across the normal).
        """
        corners = self.corners()
        if mapping == "cylinder":
            u = np.arctan2(corners[..., 1], corners[..., 0]) / (2 * np.pi) + 0.5
            # A triangle that crosses the seam goes on beyond 1 there.
            crosses = np.ptp(u, axis=1, keepdims=True) > 0.5
            up = (corners[..., 2] - corners[..., 2].min()) / np.ptp(corners[..., 2])
            return np.stack([u + (crosses & (u < 0.5)), up], axis=-1)
        across = np.abs(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])).argmax(axis=1)
        axes = np.array([[1, 2], [0, 2], [0, 1]])[across]
        return np.take_along_axis(corners, np.broadcast_to(axes[:, None], (len(axes), 3, 2)), axis=2)


def join(meshes: list[Mesh]) -> Mesh:
    """Put meshes into one, each with its own vertices."""
    starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes)])
    return Mesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + start for mesh, start in zip(meshes, starts, strict=False)]),
    )


def rotation(axis: Literal["x", "y", "z"], degrees: float) -> Floats:
    """Return the matrix ``[3, 3]`` that turns by an angle about an axis."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = cosine
    matrix[i, j], matrix[j, i] = -sine, sine
    return matrix
