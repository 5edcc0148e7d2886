"""Many runs reduced to numbers: each run's outputs become one number per example as soon as they are there.

Outputs of thousands of runs over thousands of classes are large, and a long sweep may be stopped. So runs are
carried out in groups; of each group only the metric's numbers are kept, on disk as well if a folder is given.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.bound_metric import BoundMetric, bind_metric, check_metric
from vit_mechinterp.circuits.finished_cells import FinishedRuns, pieces, runs_at_once
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.engine import execute
from vit_mechinterp.engine.binding.bind import bind
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run
from vit_mechinterp.spec.digest import digest

logger = logging.getLogger(__name__)

__all__ = ["BatchSize", "Measured", "check_runs", "compared", "grouped", "kept_in", "measure"]

_GROUP_BYTES = 128 * 1024**2
"""Bytes of outputs held at once."""

BatchSize = int | Literal["auto"]


@dataclass(frozen=True)
class Measured:
    """The numbers of many runs.

    Attributes:
        values: run to the metric's numbers ``[example]``.
        provenances: one record per execution.
        resumed: how many runs were found finished in the folder.
    """

    values: Mapping[str, Float[Tensor, " example"]]
    provenances: Sequence[Mapping[str, Any]]
    resumed: int = 0

    def stack(self, names: Sequence[str]) -> Float[Tensor, "run example"]:
        """The numbers of some runs, one row each."""
        return torch.stack([self.values[name] for name in names])


def compared(
    vit: HookedViT,
    data: Any,
    metric: MetricLike | None,
    *,
    base: str = "base",
    source: str | None = "source",
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> tuple[BoundMetric, dict[str, Any], Float[Tensor, "example *output"]]:
    """Return the metric bound to the clean forwards of both images, their provenance, and the clean outputs.

    Args:
        vit: the model.
        data: the examples.
        metric: see `check_metric`.
        base: the column of clean images.
        source: the column of images that they are compared with; None without.
        folder: keeps the outputs, so that the same call finds them there, to the bit.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.
    """
    checked = check_metric(metric, vit, data)
    runs = [Run(name="clean", base=base)]
    if source is not None:
        runs.append(Run(name="corrupted", base=source))
    out = kept_in(folder, vit, data, runs)
    results = execute(vit, runs, data, batch_size=batch_size, progress=progress, out=out)
    other = None if source is None else results["corrupted"]
    bound = bind_metric(checked, vit, data, results["clean"], other)
    return bound, dict(results.provenance), results["clean"]


def check_runs(vit: HookedViT, runs: Sequence[Run], data: Any) -> None:
    """Let whatever does not fit be said of any of the runs before the first forward, however they are cut.

    Raises:
        SpecError, DataError: a selector or a column of a run fits neither the model nor the data.
    """
    bind(vit, runs, Data(data, vit))


def measure(
    vit: HookedViT,
    groups: Sequence[Sequence[Run]],
    data: Any,
    metric: BoundMetric,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> Measured:
    """Carry out runs and reduce each that has an output to the metric's numbers.

    Args:
        vit: the model.
        groups: runs that may read each other stand in one group; a group is cut no further, except between
            runs that do not read each other to write to ``folder`` more often.
        data: the examples.
        metric: what to measure.
        tensors: tensors that specs refer to by name.
        folder: where to keep the numbers of finished runs, every half minute or so; the same call finds them
            there again.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.
    """
    n = len(metric.clean)
    values: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    kept = FinishedRuns(folder, vit, data, metric, tensors) if folder is not None else None
    if kept is not None:
        keys = {name: key for group in groups for name, key in kept.keys(group).items()}
        values |= kept.load(keys)
        records += [kept.record(keys[name]) for name in values]
    resumed = len(values)
    waiting = list(groups)
    if kept is not None:
        waiting = [piece for group in groups for piece in pieces(group, runs_at_once(vit, n), values)]
    alone = len(waiting) == 1
    total = sum(map(len, waiting))
    with tqdm(total=total, desc="runs", unit="run", delay=2.0, disable=alone or not progress) as bar:
        for group in waiting:
            results = execute(
                vit, group, data, tensors=tensors, batch_size=batch_size, progress=progress and alone
            )
            with torch.no_grad():
                found = {name: metric(results[name]).cpu() for name in results.run_names}
            assert all(len(numbers) == n for numbers in found.values())
            records.append({**results.provenance})
            if kept is not None:
                kept.save({name: keys[name] for name in found}, found, records[-1])
            values |= found
            bar.update(len(group))
    # However the work was cut and resumed, the record is that of all runs.
    spec = digest([run.model_dump(mode="json") for group in groups for run in group])
    distinct = {digest(own): own for own in ({**record, "spec": spec} for record in records)}
    _warn_of_nan(values)
    return Measured(values, list(distinct.values()), resumed)


def _warn_of_nan(values: Mapping[str, Tensor]) -> None:
    """A metric was tried on the clean outputs alone; say so where it fails on others."""
    odd = [name for name, numbers in values.items() if not bool(numbers.isfinite().all())]
    if odd:
        logger.warning(
            "The metric is not a finite number on %d of %d runs, whose effects are NaN. The first: %s.",
            len(odd),
            len(values),
            odd[0],
        )


def kept_in(folder: str | Path | None, vit: HookedViT, data: Any, runs: Sequence[Run]) -> Path | None:
    """Return where within a folder the outputs of some runs are kept, for ``execute(out=)``."""
    if folder is None:
        return None
    columns = Data(data, vit)
    specs = [run.model_dump(mode="json") for run in runs]
    decided_by = [vit.fingerprint(), vit.precision, columns.fingerprint(columns.columns), specs]
    return Path(folder) / digest(decided_by)[:32]


def grouped(runs: Sequence[Run], n_examples: int, n_outputs: int) -> list[list[Run]]:
    """Cut runs that do not read each other into groups whose outputs fit the budget."""
    most = max(1, _GROUP_BYTES // max(1, 4 * n_examples * n_outputs))
    return [list(runs[i : i + most]) for i in range(0, len(runs), most)]
