"""Spatially structured data: patches in disjoint sets, one of which carries the label (after Jelassi, Sander
and Li 2022).

An example is ``D`` patches of ``d`` numbers each and a label y of -1 or 1. One set of patches, drawn for
every example, carries the signal: its patches are ``y w + noise``, w being a feature vector of length 1. All
other patches are ``e w + noise`` with e of -1 or 1 with probability ``rate / 2`` each, and 0 otherwise. Only
who knows the sets can tell signal from distraction well. The noise is normal, of standard deviation ``sigma``
in every coordinate.

The paper's definition is known from third parties alone; sizes, rates and the localised arrangement here are
this project's own where those are silent. `SpatialStructure.random` draws the sets at random;
`SpatialStructure.localised` makes them the squares of an image's patch grid; equal sets with other features
make a pair for transfer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from vit_mechinterp.errors import SpecError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["SpatialBatch", "SpatialStructure", "spatially_structured"]


@dataclass(frozen=True)
class SpatialBatch:
    """Examples and what is known of them.

    Attributes:
        patches: ``[n, D, d]``.
        label: -1 or 1 ``[n]``.
        carrier: the set that carries the label ``[n]``.
    """

    patches: Float[Tensor, "example patch feature"]
    label: Float[Tensor, " example"]
    carrier: Int64[Tensor, " example"]


@dataclass(frozen=True)
class SpatialStructure:
    """A partition of patches into sets of one size.

    Attributes:
        sets: patch indices ``[sets, size]``, every patch once.
        dimension: numbers per patch, d.
        rate: probability that a patch outside the carrier holds the feature, with either sign.
        sigma: standard deviation of the noise in every coordinate.
    """

    sets: tuple[tuple[int, ...], ...]
    dimension: int
    rate: float
    sigma: float

    def __post_init__(self) -> None:
        flat = sorted(index for one in self.sets for index in one)
        if flat != list(range(len(flat))) or len({len(one) for one in self.sets}) != 1:
            raise SpecError(
                "The sets of a spatial structure hold every patch from 0 on once, and equally many each; got "
                f"{[list(one) for one in self.sets]}."
            )
        if not 0 <= self.rate <= 1 or self.sigma < 0 or self.dimension < 1:
            raise SpecError(
                f"rate={self.rate} is a probability, sigma={self.sigma} is not negative, and "
                f"dimension={self.dimension} is positive."
            )

    @classmethod
    def random(
        cls,
        n_patches: int = 64,
        size: int = 8,
        *,
        dimension: int = 100,
        rate: float | None = None,
        sigma: float | None = None,
        seed: int = 0,
    ) -> SpatialStructure:
        """Draw a partition at random.

        Args:
            n_patches: D, a multiple of ``size``.
            size: patches in a set.
            dimension: numbers per patch, d.
            rate: of distracting features; by default ``log(d) / D``.
            sigma: of the noise; by default ``1 / sqrt(d)``.
            seed: seeds the partition.

        Raises:
            SpecError: the sets do not cover the patches.
        """
        if size < 1 or n_patches % size:
            raise SpecError(f"{n_patches} patches cannot be parted into sets of {size}: choose a divisor.")
        order = np.random.default_rng(seed).permutation(n_patches).reshape(-1, size)
        return cls._with_defaults(order, dimension, rate, sigma)

    @classmethod
    def localised(
        cls,
        grid: int = 8,
        side: int = 2,
        *,
        dimension: int = 100,
        rate: float | None = None,
        sigma: float | None = None,
    ) -> SpatialStructure:
        """Make the sets the squares of ``side x side`` patches that tile a ``grid x grid`` of them.

        Raises:
            SpecError: the squares do not tile the grid.
        """
        if side < 1 or grid % side:
            raise SpecError(f"Squares of {side} patches do not tile a grid of {grid}: choose a divisor.")
        index = np.arange(grid * grid).reshape(grid // side, side, grid // side, side)
        return cls._with_defaults(index.transpose(0, 2, 1, 3).reshape(-1, side**2), dimension, rate, sigma)

    @classmethod
    def _with_defaults(
        cls, sets: NDArray[np.int64], dimension: int, rate: float | None, sigma: float | None
    ) -> SpatialStructure:
        return cls(
            sets=tuple(tuple(int(i) for i in sorted(one)) for one in sets),
            dimension=dimension,
            rate=min(1.0, math.log(dimension) / sets.size) if rate is None else rate,
            sigma=1 / math.sqrt(dimension) if sigma is None else sigma,
        )

    @property
    def n_patches(self) -> int:
        """The number of patches, D."""
        return sum(len(one) for one in self.sets)

    @property
    def size(self) -> int:
        """Patches in a set, C."""
        return len(self.sets[0])

    @property
    def set_of(self) -> Int64[Tensor, " patch"]:
        """Which set every patch belongs to."""
        owner = torch.empty(self.n_patches, dtype=torch.int64)
        for number, one in enumerate(self.sets):
            owner[list(one)] = number
        return owner

    def feature(self, seed: int = 0) -> Float[Tensor, " feature"]:
        """Draw a feature vector of length 1; another seed gives other features for the same sets."""
        vector = torch.randn(self.dimension, generator=torch.Generator().manual_seed(seed))
        unit: Tensor = vector / vector.norm()
        return unit

    def sample(self, n: int, *, feature: int = 0, seed: int = 0) -> SpatialBatch:
        """Draw ``n`` examples.

        Args:
            n: how many.
            feature: seed of the feature vector, see `feature`.
            seed: seeds labels, carriers, distractions and noise.
        """
        generator = torch.Generator().manual_seed(seed)
        label = torch.randint(0, 2, (n,), generator=generator).float() * 2 - 1
        carrier = torch.randint(0, len(self.sets), (n,), generator=generator)
        uniform = torch.rand(n, self.n_patches, generator=generator)
        strength = (uniform < self.rate / 2).float() - (uniform > 1 - self.rate / 2).float()
        carries = self.set_of[None] == carrier[:, None]
        strength = torch.where(carries, label[:, None], strength)
        noise = torch.randn(n, self.n_patches, self.dimension, generator=generator) * self.sigma
        return SpatialBatch(strength[..., None] * self.feature(feature) + noise, label, carrier)


def spatially_structured(
    n: int = 1000,
    *,
    n_patches: int = 64,
    size: int = 8,
    localised: bool = False,
    dimension: int = 100,
    rate: float | None = None,
    sigma: float | None = None,
    structure: int = 0,
    feature: int = 0,
    seed: int = 0,
) -> Dataset:
    """Make spatially structured data as a `datasets.Dataset`.

    Columns: ``patches`` ``[D, d]``, ``label`` (1 for y = 1, 0 for y = -1), ``carrier`` (number of the set)
    and ``carrier_tokens`` (its patches).

    Args:
        n: how many examples.
        n_patches, size: of the structure; with ``localised`` both are squares of whole numbers.
        localised: squares of a grid in place of random sets.
        dimension, rate, sigma: see `SpatialStructure`.
        structure: seed of random sets; equal seeds with another ``feature`` make a pair for transfer.
        feature: seed of the feature vector.
        seed: seed of the examples.

    Raises:
        SpecError: the sizes do not fit one another.
    """
    from datasets import Array2D, ClassLabel, Dataset, Features, List, Value

    options = {"dimension": dimension, "rate": rate, "sigma": sigma}
    if localised:
        grid, side = math.isqrt(n_patches), math.isqrt(size)
        if grid**2 != n_patches or side**2 != size:
            raise SpecError(f"Localised sets need square numbers, not {n_patches} patches in sets of {size}.")
        sets = SpatialStructure.localised(grid, side, **options)  # type: ignore[arg-type]
    else:
        sets = SpatialStructure.random(n_patches, size, seed=structure, **options)  # type: ignore[arg-type]
    batch = sets.sample(n, feature=feature, seed=seed)
    features = Features(
        {
            "patches": Array2D((sets.n_patches, dimension), "float32"),
            "label": ClassLabel(names=["negative", "positive"]),
            "carrier": Value("int64"),
            "carrier_tokens": List(Value("int64"), length=sets.size),
        }
    )
    columns = {
        "patches": batch.patches.numpy(),
        "label": (batch.label > 0).long().tolist(),
        "carrier": batch.carrier.tolist(),
        "carrier_tokens": [list(sets.sets[number]) for number in batch.carrier.tolist()],
    }
    return Dataset.from_dict(columns, features=features)
