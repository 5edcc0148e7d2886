"""What a subspace is trained on, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from vit_mechinterp.circuits.alignment import Training
from vit_mechinterp.engine import Batch, Prepared
from vit_mechinterp.spec import Run

__all__ = ["Search", "Trainee"]


@dataclass(frozen=True)
class Search:
    """Subspaces to be trained on one dataset from one seed, one at each of several layers.

    Attributes:
        runs: by layer, a run whose one intervention names the layer's tensors (``prefix`` and then
            `rotation_name`, `gate_name`). Names of runs differ between searches on one dataset.
        data: the training examples; searches on the same object share its clean forwards.
        labels: the class that each example should get under the intervention.
        seed: of the first rotations, the batches and the orders.
        prefix: what the tensors' names begin with.
    """

    runs: Mapping[int, Run]
    data: Any
    labels: Int[Tensor, " example"]
    seed: int = 0
    prefix: str = ""


class Trainee:
    """One search while it is trained: its random numbers are those of the search alone."""

    def __init__(self, search: Search, prepared: Prepared) -> None:
        self.labels = search.labels
        self.prepared = prepared
        self.runs = tuple(run.name for run in search.runs.values())
        self.random = np.random.default_rng((search.seed, 0))
        self._tokens = prepared.source_tokens(self.runs)

    def batches(self, training: Training) -> Iterator[list[Batch]]:
        """The steps of one epoch; the examples of a step that pair their tokens in one order are a batch."""
        order, size = self.random.permutation(self.prepared.n_examples), training.batch_size
        by_example = training.permute_sources and training.permutation == "example"
        for start in range(0, len(order), size):
            examples = order[start : start + size].tolist()
            groups: dict[tuple[int, ...], list[int]] = {}
            for part in [[example] for example in examples] if by_example else [examples]:
                pairing = tuple(self.random.permutation(self._tokens).tolist())
                groups.setdefault(pairing, []).extend(part)
            yield [
                Batch(self.prepared, own, self.runs, pairing if training.permute_sources else None)
                for pairing, own in groups.items()
            ]
