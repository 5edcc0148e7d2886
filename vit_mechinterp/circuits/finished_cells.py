"""Numbers of finished runs, kept in a folder so that a sweep that was stopped goes on where it was.

Every run is found again by what decides its numbers: the model, the data, the metric, the tensors, and the
run with all that it reads. So the same call finds them however the work is cut, and another call finds none.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vit_mechinterp.circuits.bound_metric import BoundMetric
from vit_mechinterp.circuits.kept_tensors import KeptTensors
from vit_mechinterp.engine.binding.tensors import digest_of
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run, RunSource, TensorRef
from vit_mechinterp.spec.digest import digest

__all__ = ["FinishedRuns", "pieces", "runs_at_once"]

_FLOPS = {"cpu": 1e12}
"""Arithmetic between two writes to disk: half a minute of one core; elsewhere `_FLOPS_OF_DEVICES`."""
_FLOPS_OF_DEVICES = 1e14
_FEWEST = 8
"""Runs in a piece: its clean forwards, one or two, are a small share of it."""


def runs_at_once(vit: HookedViT, n_examples: int) -> int:
    """Return how many runs to carry out between two writes to disk; the same on every start."""
    weights = sum(parameter.numel() for parameter in vit.module.parameters())
    forward = 2.0 * max(weights, 1) * vit.layout.tokens.n_tokens
    rows = _FLOPS.get(vit.device.type, _FLOPS_OF_DEVICES) / forward
    return max(_FEWEST, int(rows / n_examples))


def pieces(runs: Sequence[Run], most: int, finished: Collection[str] = ()) -> list[list[Run]]:
    """Cut runs into pieces of about ``most``, without those that are finished.

    Runs that read each other stay together, finished or not; those without output have no numbers to be
    finished.
    """
    cut: list[list[Run]] = []
    for group in _together(runs):
        if all(run.name in finished for run in group if run.output):
            continue
        if not cut or len(cut[-1]) + len(group) > most:
            cut.append([])
        cut[-1] += group
    return cut


def _together(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that read each other, in order of the first of them."""
    home = {run.name: run.name for run in runs}

    def root(name: str) -> str:
        while home[name] != name:
            name = home[name]
        return name

    for run in runs:
        for name in _read_by(run):
            home[root(name)] = root(run.name)
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(root(run.name), []).append(run)
    return list(groups.values())


def _read_by(run: Run) -> list[str]:
    sources = (getattr(edit, "source", None) for edit in run.interventions)
    return [source.run for source in sources if isinstance(source, RunSource)]


class FinishedRuns:
    """Numbers of finished runs in a folder, one file per piece.

    Args:
        folder: where; made if need be.
        vit, data, metric, tensors: what decides the numbers, beside the runs.

    Raises:
        ExecutionError: nothing can be written there.
    """

    def __init__(
        self,
        folder: str | Path,
        vit: HookedViT,
        data: Any,
        metric: BoundMetric,
        tensors: Mapping[str, Tensor] | None,
    ) -> None:
        self._kept = KeptTensors(folder)
        columns = Data(data, vit)
        self._key = digest(
            {
                "model": [vit.fingerprint(), vit.precision],
                "data": columns.fingerprint(columns.columns),
                # A function has no digest; its numbers on the clean outputs tell metrics apart.
                "metric": [metric.name, metric.description, metric.clean.tolist()],
                "compared": None if metric.other is None else metric.other.tolist(),
                "tensors": digest_of({TensorRef(name=name): own for name, own in (tensors or {}).items()}),
            }
        )

    def keys(self, runs: Sequence[Run]) -> dict[str, str]:
        """Run to what its numbers are found by."""
        found: dict[str, str] = {}
        for group in _together(runs):
            own = digest([self._key, [run.model_dump(mode="json") for run in group]])
            found |= {run.name: digest([own, run.name]) for run in group}
        return found

    def load(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """Numbers of those runs that are finished."""
        return {name: self._kept.load(key)["values"] for name, key in keys.items() if key in self._kept}

    def record(self, key: str) -> dict[str, Any]:
        """The provenance of a finished run."""
        return self._kept.record(key)

    def save(self, keys: Mapping[str, str], values: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Keep the numbers of finished runs.

        Raises:
            ExecutionError: nothing can be written.
        """
        self._kept.save({key: {"values": values[name]} for name, key in keys.items()}, record)
