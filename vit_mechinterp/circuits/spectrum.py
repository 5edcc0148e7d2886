"""The largest singular values of an embedding's Jacobian, and directions that it maps to zero.

Both by products with the Jacobian alone (see `embeddings`), so that an image of any size can be treated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.embeddings import Embedding, in_batches
from vit_mechinterp.errors import SpecError

__all__ = ["Spectrum", "null_directions", "singular_directions"]


@dataclass(frozen=True)
class Spectrum:
    """The leading part of the singular value decomposition of a Jacobian at one image.

    Attributes:
        values: singular values, in falling order ``[k]``.
        directions: right singular vectors, in the image ``[k, *image]``, of length 1.
        responses: left singular vectors, in the embedding ``[k, feature]``, of length 1.
        residuals: ``|J^T u - s v| / s_1`` of each triple ``[k]``; how far it is from exact.
        iterations: products with the Jacobian and its transpose, per direction.
    """

    values: Float[Tensor, " k"]
    directions: Float[Tensor, "k *image"]
    responses: Float[Tensor, "k feature"]
    residuals: Float[Tensor, " k"]
    iterations: int


def singular_directions(
    embedding: Embedding,
    x: Float[Tensor, "*image"],
    k: int = 8,
    *,
    extra: int = 8,
    tolerance: float = 1e-3,
    max_iterations: int = 60,
    seed: int = 0,
    batch_size: int = 32,
) -> Spectrum:
    """Find the ``k`` largest singular values of ``J(x)`` and their directions, by subspace iteration.

    A block of ``k + extra`` random directions is multiplied by J and J^T in turn and made orthonormal each
    time, until every one of the first ``k`` triples has a residual below ``tolerance`` (Halko, Martinsson and
    Tropp 2011).

    Args:
        embedding: the function whose Jacobian is meant.
        x: one image, as the model takes it.
        k: how many.
        extra: further directions that make the iteration converge faster.
        tolerance: largest residual, as a share of the largest singular value.
        max_iterations: gives up after that many; the residuals tell.
        seed: seeds the first directions.
        batch_size: most rows in one forward.

    Raises:
        SpecError: the embedding has fewer than ``k`` dimensions.
    """
    with torch.no_grad():
        n_features = embedding(x[None]).shape[1]
    if not 0 < k <= n_features:
        raise SpecError(f"The Jacobian at {embedding} has {n_features} singular values, not {k}.")
    width = min(k + extra, n_features, x.numel())
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(x.numel(), width, generator=generator).to(x.device)
    directions = torch.linalg.qr(start).Q
    iterations = 0
    while True:
        iterations += 1
        forward = _apply(embedding.jvp, x, directions.T.reshape(width, *x.shape), batch_size)
        left, values, right = torch.linalg.svd(forward.T, full_matrices=False)
        directions = directions @ right.T
        back = _apply(embedding.vjp, x, left.T.contiguous(), batch_size).flatten(1).T
        residuals = (back - directions * values).norm(dim=0) / values[0].clamp_min(1e-30)
        if residuals[:k].max() <= tolerance or iterations >= max_iterations:
            return Spectrum(
                values=values[:k],
                directions=directions.T[:k].reshape(k, *x.shape),
                responses=left.T[:k],
                residuals=residuals[:k],
                iterations=iterations,
            )
        directions = torch.linalg.qr(back).Q


def null_directions(
    embedding: Embedding,
    x: Float[Tensor, "*image"],
    u: Float[Tensor, "k *image"],
    spectrum: Spectrum,
    *,
    tolerance: float = 1e-2,
    max_iterations: int = 30,
    batch_size: int = 32,
) -> tuple[Float[Tensor, "k *image"], Float[Tensor, " k"]]:
    """Project directions onto the null space of ``J(x)``: the nearest ones that leave the embedding alone, to
    first order.

    The leading singular directions, on which the Jacobian acts most, are taken out first; what is left is
    ``u - J^T y`` with ``J J^T y = J u``, solved by conjugate gradients. The more singular directions are
    known, the fewer iterations it takes.

    Args:
        embedding: the function whose Jacobian is meant.
        x: one image, as the model takes it.
        u: directions to project.
        spectrum: leading singular directions at the same image.
        tolerance: stop when ``|J v| <= tolerance * |J u|`` for every direction.
        max_iterations: gives up after that many.
        batch_size: most rows in one forward.

    Returns:
        The projections v, not normalised, and ``|J v| / |J u|`` of each.
    """

    def normal(y: Tensor) -> Tensor:
        return _apply(embedding.jvp, x, _apply(embedding.vjp, x, y, batch_size), batch_size)

    before = _apply(embedding.jvp, x, u, batch_size).norm(dim=1)
    basis = torch.linalg.qr(spectrum.directions.flatten(1).T).Q
    flat = u.flatten(1)
    u = (flat - (flat @ basis) @ basis.T).reshape(u.shape)
    residual = _apply(embedding.jvp, x, u, batch_size)
    solution = torch.zeros_like(residual)
    step = residual.clone()
    squared = (residual**2).sum(1)
    limit = (tolerance * before) ** 2
    for _ in range(max_iterations):
        if bool((squared <= limit).all()):
            break
        product = normal(step)
        curvature = (step * product).sum(1)
        # A direction that is done stays as it is.
        length = torch.where(squared > limit, squared / curvature.clamp_min(1e-30), 0.0)
        solution = solution + length[:, None] * step
        residual = residual - length[:, None] * product
        new = (residual**2).sum(1)
        step = residual + (new / squared.clamp_min(1e-30))[:, None] * step
        squared = new
    projected = u - _apply(embedding.vjp, x, solution, batch_size)
    left = _apply(embedding.jvp, x, projected, batch_size).norm(dim=1)
    return projected, left / before.clamp_min(1e-30)


def _apply(product: object, x: Tensor, rows: Tensor, batch_size: int) -> Tensor:
    """Multiply every row with the Jacobian (or its transpose) at one image."""
    images = x.expand(len(rows), *x.shape)
    _, result = in_batches(product, images, rows, batch_size=batch_size)  # type: ignore[arg-type]
    return result
