"""An experiment on one model and its data: everything resolved, and checked before the first forward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor

from vit_mechinterp.engine.binding.bind import bind, expand_runs
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.checks import check_images
from vit_mechinterp.engine.binding.readout import bind_readout
from vit_mechinterp.engine.binding.tensors import check_tensors, resolve_refs
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Experiment, Readout, Run, Sweep, TensorRef

__all__ = ["BoundExperiment", "bind_experiment"]

Runs = Run | Sweep | Experiment | Iterable[Run | Sweep]


@dataclass(frozen=True)
class BoundExperiment:
    """Bound runs with what they act on.

    Args:
        bound: the runs.
        data: the examples; None where there are none.
        tensors: the given tensors; None where they are not known.
        batch_size: most rows in one forward, or ``"auto"``.
    """

    bound: Bound
    data: Data | None
    tensors: dict[TensorRef, Tensor] | None
    batch_size: int | Literal["auto"]

    @property
    def examples(self) -> Data:
        """The examples of an experiment that is carried out."""
        assert self.data is not None
        return self.data

    @property
    def given(self) -> dict[TensorRef, Tensor]:
        """The tensors of an experiment that is carried out."""
        assert self.tensors is not None
        return self.tensors


def bind_experiment(
    vit: HookedViT,
    runs: Runs,
    data: Any,
    tensors: Mapping[str, Tensor] | None,
    batch_size: int | Literal["auto"],
    readout: Readout | None,
    *,
    planned: bool = False,
    progress: bool = False,
) -> BoundExperiment:
    """Bind runs, and check all that can be checked before the first forward.

    What an `Experiment` says of rows per forward, readout and files of tensors counts where the arguments say
    nothing. If it is only ``planned``, there may be no data, tensors may be unknown, and no image is decoded.

    Raises:
        SpecError, DataError, TensorFileError: something does not fit.
    """
    folder, files = None, {}
    if isinstance(runs, Experiment):
        folder, files = runs.folder, dict(runs.tensors)
        batch_size = runs.batch_size if batch_size == "auto" else batch_size
        readout = readout or runs.readout
    flat = expand_runs(runs, vit.layout.n_layers)
    columns = None if planned and data is None else Data(data, vit, progress=progress)
    bound = replace(bind(vit, flat, columns), readout=bind_readout(vit, readout, columns))
    resolved = None
    if not planned or tensors is not None or _names(bound) <= files.keys():
        resolved = resolve_refs(bound, tensors, vit, folder, files)
    if columns is not None:
        if resolved is not None:
            check_tensors(bound, resolved, vit, columns.n)
        check_images(columns, bound, decode=not planned)
    return BoundExperiment(bound, columns, resolved, batch_size)


def _names(bound: Bound) -> set[str]:
    """The names of all tensors that the runs refer to by name."""
    refs = (ref for run in bound.runs for edit in run.edits for _, ref in edit.refs)
    return {ref.name for ref in refs if ref.name is not None}
