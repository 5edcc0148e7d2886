"""How much is computed at every scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from vit_mechinterp.circuits.das import TINY as DAS_TINY

__all__ = ["SCALES", "Sizes"]


@dataclass(frozen=True)
class Sizes:
    """Numbers of images and pairs, and the settings of trainings.

    Attributes:
        accuracy: images of each split.
        attention: images of the attention analysis.
        realistic: images of the realistic set.
        das_train, das_test: pairs that subspaces are trained and measured on.
        das: settings of the search.
        controls: what is searched besides.
        novel: pairs that novel vectors are made from.
        probe_train, probe_test: images that probes are trained and measured on.
        alphas: strengths of the probe's direction.
        point_train, point_test: pairs of the searches of every model, of which each is a point.
        point_layers: in how many blocks these search, from the first one on; None means all.
        point_models: how many models are points; None means all.
    """

    accuracy: int
    attention: int
    realistic: int
    das_train: int
    das_test: int
    novel: int
    probe_train: int
    probe_test: int
    point_train: int
    point_test: int
    point_layers: int | None = None
    point_models: int | None = None
    das: Mapping[str, Any] = field(default_factory=dict)
    controls: tuple[str | None, ...] = (None, "wrong_object", "random_patch", "random_weights")
    alphas: tuple[float, ...] = (0.5, 1.0, 2.0)

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes as plain values."""
        return {**asdict(self), "das": dict(self.das)}


_FULL: Final = Sizes(
    accuracy=6400,
    attention=500,
    realistic=192,
    das_train=2000,
    das_test=2000,
    novel=2000,
    probe_train=4000,
    probe_test=2000,
    point_train=2000,
    point_test=2000,
)

SCALES: Final[Mapping[str, Sizes]] = {
    "tiny": Sizes(
        accuracy=512,
        attention=192,
        realistic=96,
        das_train=192,
        das_test=192,
        novel=192,
        probe_train=1024,
        probe_test=192,
        point_train=192,
        point_test=192,
        point_layers=2,
        point_models=4,
        das={**DAS_TINY, "epochs": 3, "batch_size": 8},
        controls=(None, "wrong_object"),
        alphas=(1.0, 16.0, 64.0),
    ),
    "small": Sizes(
        accuracy=2000,
        attention=500,
        realistic=192,
        das_train=2000,
        das_test=1000,
        novel=1000,
        probe_train=4000,
        probe_test=1000,
        point_train=1000,
        point_test=1000,
        das=dict(DAS_TINY),
        alphas=(1.0, 4.0, 16.0, 64.0),
    ),
    "paper": _FULL,
}
"""``tiny`` takes minutes on two cores; ``small`` searches longer, in all blocks and with every control;
``paper`` has the published numbers of images, pairs and epochs."""
