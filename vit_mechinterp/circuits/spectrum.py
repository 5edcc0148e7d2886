"""The largest singular values of an embedding's Jacobian, and directions that it maps to zero.

Both by products with the Jacobian alone (see `embeddings`), so that an image of any size can be treated. What
is kept are vectors of the embedding, in float64: an orthonormal basis Q and ``J J^T Q``, a block Krylov space
(Musco and Musco 2015). Where Q spans the whole embedding, as it soon does for a class token, both are exact
up to the model's own precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from vit_mechinterp.circuits.embeddings import Embedding, in_batches
from vit_mechinterp.errors import SpecError

__all__ = ["KrylovSpace", "Spectrum", "null_directions", "singular_directions"]

_REFINED = 4
"""How often a projection is repeated on what the last one left, as products are inexact."""


@dataclass(frozen=True)
class KrylovSpace:
    """Vectors of the embedding at one image, and what ``J J^T`` makes of them.

    Attributes:
        basis: orthonormal columns Q ``[feature, m]``.
        product: ``J J^T Q`` ``[feature, m]``.
    """

    basis: Float64[Tensor, "feature m"]
    product: Float64[Tensor, "feature m"]

    def extended(
        self, embedding: Embedding, x: Tensor, block: Float64[Tensor, "feature b"], batch_size: int
    ) -> KrylovSpace:
        """Return the space with further vectors in it; itself where they hold nothing that is new."""
        fresh = functional.normalize(block, dim=0)
        for _ in range(2):
            fresh = fresh - self.basis @ (self.basis.T @ fresh)
            fresh, size, _ = torch.linalg.svd(fresh, full_matrices=False)
            fresh = fresh[:, size > 1e-6]
        fresh = fresh[:, : len(fresh) - self.basis.shape[1]]
        if not fresh.shape[1]:
            return self
        back = _apply(embedding.vjp, x, fresh.T, batch_size)
        product = _rows(_apply(embedding.jvp, x, back, batch_size)).T
        return KrylovSpace(torch.cat([self.basis, fresh], 1), torch.cat([self.product, product], 1))

    def eigen(self) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "m m"]]:
        """Return eigenvalues of ``Q^T J J^T Q``, the largest first, and eigenvectors as columns."""
        inner = self.basis.T @ self.product
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        return values.flip(0).clamp_min(0), vectors.flip(1)

    def solve(
        self, right: Float64[Tensor, "feature b"], ridge: float
    ) -> tuple[Float64[Tensor, "feature b"], Float64[Tensor, "feature b"]]:
        """Return y within the space with ``J J^T y`` near ``right``, and what is left of ``right``.

        Args:
            right: columns.
            ridge: what is added to the eigenvalues, as a share of the largest.
        """
        values, vectors = self.eigen()
        damped = values + ridge * values[:1].clamp_min(1e-300)
        inner = vectors @ ((vectors.T @ (self.basis.T @ right)) / damped[:, None])
        return self.basis @ inner, right - self.product @ inner


@dataclass(frozen=True)
class Spectrum:
    """The leading part of the singular value decomposition of a Jacobian at one image.

    Attributes:
        values: singular values, in falling order ``[k]``.
        directions: right singular vectors, in the image ``[k, *image]``, of length 1.
        responses: left singular vectors, in the embedding ``[k, feature]``, of length 1.
        residuals: ``|J v - s u| / s_1`` of each triple ``[k]``; how far it is from exact.
        iterations: blocks of products with the Jacobian and its transpose.
        space: what was learned of the Jacobian; `null_directions` goes on from it.
    """

    values: Float[Tensor, " k"]
    directions: Float[Tensor, "k *image"]
    responses: Float[Tensor, "k feature"]
    residuals: Float[Tensor, " k"]
    iterations: int
    space: KrylovSpace


def singular_directions(
    embedding: Embedding,
    x: Float[Tensor, "*image"],
    k: int = 8,
    *,
    extra: int = 8,
    tolerance: float = 1e-3,
    max_iterations: int = 30,
    seed: int = 0,
    batch_size: int = 32,
) -> Spectrum:
    """Find the ``k`` largest singular values of ``J(x)`` and their directions, by block Krylov iteration.

    A block of ``k + extra`` random vectors of the embedding is multiplied by ``J J^T`` again and again, and
    the best triples are taken from all that was seen, until each has a residual below ``tolerance``.

    Args:
        embedding: the function whose Jacobian is meant.
        x: one image, as the model takes it.
        k: how many.
        extra: further vectors that make the iteration converge faster.
        tolerance: largest residual, as a share of the largest singular value.
        max_iterations: gives up after that many blocks; the residuals tell.
        seed: seeds the first vectors.
        batch_size: most rows in one forward.

    Raises:
        SpecError: the embedding has fewer than ``k`` dimensions.
    """
    with torch.no_grad():
        n_features = embedding(x[None]).shape[1]
    if not 0 < k <= n_features:
        raise SpecError(f"The Jacobian at {embedding} has {n_features} singular values, not {k}.")
    generator = torch.Generator().manual_seed(seed)
    width = min(k + extra, n_features)
    block = torch.randn(n_features, width, generator=generator, dtype=torch.float64)
    empty = torch.zeros(n_features, 0, dtype=torch.float64)
    space = KrylovSpace(empty, empty).extended(embedding, x, block, batch_size)
    iterations = 1
    while True:
        values, inner = space.eigen()
        values, left = values[:k], space.basis @ inner[:, :k]
        sizes = values.sqrt()
        residuals = (space.product @ inner[:, :k] - left * values).norm(dim=0)
        residuals = residuals / (sizes * sizes[0]).clamp_min(1e-30)
        if residuals.max() <= tolerance or iterations >= max_iterations:
            break
        # Where the space holds all that the last block leads to, nothing more can be found.
        larger = space.extended(embedding, x, space.product[:, -width:], batch_size)
        if larger is space:
            break
        space, iterations = larger, iterations + 1
    right = _apply(embedding.vjp, x, left.T, batch_size).float()
    lengths = right.flatten(1).norm(dim=1)
    return Spectrum(
        values=lengths,
        directions=right / lengths.clamp_min(1e-30).reshape(-1, *[1] * x.ndim),
        responses=left.T.float(),
        residuals=residuals.float(),
        iterations=iterations,
        space=space,
    )


def null_directions(
    embedding: Embedding,
    x: Float[Tensor, "*image"],
    u: Float[Tensor, "k *image"],
    spectrum: Spectrum,
    *,
    tolerance: float = 1e-2,
    max_iterations: int = 60,
    batch_size: int = 32,
) -> tuple[Float[Tensor, "k *image"], Float[Tensor, " k"]]:
    """Project directions onto the null space of ``J(x)``: the nearest ones that leave the embedding alone, to
    first order.

    What is left is ``u - J^T y`` with ``J J^T y = J u``. It is solved in the spectrum's Krylov space, which
    grows by what is unsolved (block conjugate gradients, with every vector kept); the more is known of the
    Jacobian, the fewer iterations it takes.

    Args:
        embedding: the function whose Jacobian is meant.
        x: one image, as the model takes it.
        u: directions to project.
        spectrum: leading singular directions at the same image.
        tolerance: stop when ``|J v| <= tolerance * |J u|`` for every direction.
        max_iterations: gives up after that many.
        batch_size: most rows in one forward.

    Returns:
        The projections v, not normalised, and ``|J v| / |J u|`` of each: what the tolerance, the number of
        iterations and the model's precision left.
    """
    space = spectrum.space
    exact = torch.finfo(x.dtype).eps
    images = _rows(_apply(embedding.jvp, x, u, batch_size)).T
    before = images.norm(dim=0)
    for _ in range(max_iterations):
        _, unsolved = space.solve(images, exact * 1e-2)
        growing = unsolved.norm(dim=0) > 0.5 * tolerance * before
        if not bool(growing.any()):
            break
        larger = space.extended(embedding, x, unsolved[:, growing], batch_size)
        if larger is space:
            break
        space = larger
    projected, left = u.float(), before
    for _ in range(_REFINED):
        part, _ = space.solve(images, exact)
        trial = projected - _apply(embedding.vjp, x, part.T, batch_size).float()
        images = _rows(_apply(embedding.jvp, x, trial, batch_size)).T
        better = images.norm(dim=0) < left
        keep = better.to(u.device).reshape(-1, *[1] * x.ndim)
        projected = torch.where(keep, trial, projected)
        left = torch.where(better, images.norm(dim=0), left)
        if not bool(better.all()) or bool((left <= tolerance * before).all()):
            break
    return projected, (left / before.clamp_min(1e-300)).float()


def _rows(values: Tensor) -> Float64[Tensor, "row feature"]:
    return values.flatten(1).double().cpu()


def _apply(product: object, x: Tensor, rows: Tensor, batch_size: int) -> Tensor:
    """Multiply every row with the Jacobian (or its transpose) at one image."""
    images = x.expand(len(rows), *x.shape)
    moved = rows.to(x.device, torch.float32)
    _, result = in_batches(product, images, moved, batch_size=batch_size)  # type: ignore[arg-type]
    return result
