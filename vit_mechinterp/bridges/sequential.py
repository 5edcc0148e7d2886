"""One run at a time: a whole experiment as a loop, for whoever can do a forward with functions at sites.

No clean value is kept, no forward shared: a run that reads an image, or another run, carries that out first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.bridges.agreement import Forward, Touch, check_agreement
from vit_mechinterp.bridges.meaning import Origin, edited, selected
from vit_mechinterp.engine.binding.bound import Bound, BoundRun, Edit
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read, RunOrigin, permutation
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.results.provenance import provenance_of
from vit_mechinterp.engine.results.results import Captures, Results
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site, TensorRef

__all__ = ["Forward", "Opened", "Refusal", "Touch", "execute_sequentially", "sites_of"]

Opened = Callable[[HookedViT, Iterable[Site]], AbstractContextManager[Forward]]
"""Makes a model ready for forwards with functions at some sites, and restores it."""

Refusal = Callable[[HookedViT, Site], str | None]
"""Why a backend cannot reach a site of a model, or None."""


def sites_of(run: BoundRun) -> Iterator[tuple[str, Site]]:
    """Every site that a run touches, with what for."""
    for edit in run.edits:
        yield f"{edit.spec.op} at {edit.site}", edit.site
        for read in (edit.source, edit.mean):
            if read is not None:
                yield f"{edit.spec.op} at {edit.site}, which reads {read.site}", read.site
    for capture in run.captures:
        yield f"capture of {capture.name}", capture.read.site


def execute_sequentially(
    name: str,
    packages: Sequence[str],
    opened: Opened,
    refusal: Refusal,
    vit: HookedViT,
    bound: Bound,
    data: Data,
    tensors: Mapping[TensorRef, Tensor],
    *,
    batch_size: int,
    progress: bool,
) -> Results:
    """Carry out bound runs one at a time.

    Args:
        name: the backend's name.
        packages: whose versions are recorded.
        opened: makes the model ready.
        refusal: says which sites cannot be reached.
        vit: the model.
        bound: the runs.
        data: the examples.
        tensors: the given tensors.
        batch_size: most images in one forward.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        SpecError: the backend cannot express something in the runs; no run has begun then, save forwards of
            random images that show what the backend sees and writes.
    """
    _refuse(name, refusal, vit, bound)
    if vit.layout.family.one_image is not None:
        batch_size = 1
    sites = {site for run in bound.runs for _, site in sites_of(run)}
    edited_sites = {edit.site for run in bound.runs for edit in run.edits}
    with vit.lock, torch.no_grad(), opened(vit, sites) as forward:
        check_agreement(name, vit, forward, sites, edited_sites)
        experiment = _Experiment(vit, bound, data, tensors, forward, batch_size)
        wanted = [run for run in bound.runs if run.has_output or run.captures]
        bar = tqdm(total=len(wanted) * data.n, desc=name, unit="row", delay=2.0, disable=not progress)
        with bar:
            collected = {run.name: experiment.collect(run, bar.update) for run in wanted}
    sharing = Sharing(bound, {}, rows=False)
    schedule = Schedule(sharing, n_layers=vit.layout.n_layers, chunk=data.n, width=batch_size)
    versions = {package: metadata.version(package) for package in packages}
    names = tuple(run.name for run in bound.with_output)
    outputs = [collected[name][0] for name in names]
    some, _ = next(iter(collected.values()))
    return Results(
        logits=torch.stack(outputs) if outputs else some.new_empty(0, *some.shape),
        run_names=names,
        captures={
            run.name: Captures(run.name, collected[run.name][1] if run in wanted else {})
            for run in bound.runs
        },
        labels=data.labels(),
        provenance={
            **provenance_of(vit, data, schedule, tensors, halvings=0),
            "backend": {"name": name, **versions},
        },
    )


def _refuse(name: str, refusal: Refusal, vit: HookedViT, bound: Bound) -> None:
    for run in bound.runs:
        for what, site in sites_of(run):
            reason = refusal(vit, site)
            if reason is not None:
                raise SpecError(f"backend={name!r} cannot carry out run {run.name!r}: {what}: {reason}.")


class _Experiment:
    def __init__(
        self,
        vit: HookedViT,
        bound: Bound,
        data: Data,
        tensors: Mapping[TensorRef, Tensor],
        forward: Forward,
        batch_size: int,
    ) -> None:
        self.vit, self.data, self.tensors, self.forward = vit, data, tensors, forward
        self.batches = [range(i, min(i + batch_size, data.n)) for i in range(0, data.n, batch_size)]
        self.runs, self.readout = {run.name: run for run in bound.runs}, bound.readout
        self._means: dict[tuple[Read, bool], Tensor] = {}

    def collect(
        self, run: BoundRun, done: Callable[[int], Any]
    ) -> tuple[Tensor, dict[str, Tensor | list[Tensor]]]:
        """Outputs of a run on all examples, or what is kept of them, and its captures."""
        outputs = []
        captures: dict[str, list[Tensor]] = {capture.name: [] for capture in run.captures}
        for examples in self.batches:
            output, values = self.carry_out(run, examples, [capture.read.site for capture in run.captures])
            output = output.float().cpu()
            outputs.append(output if self.readout is None else self.readout(output, np.array(examples)))
            for capture in run.captures:
                site = capture.read.site
                for row, example in enumerate(examples):
                    own = selected(site, capture.read, values[site], row, example).cpu()
                    own = own if site.has_tokens else own[0]
                    own = own.transpose(0, 1) if site.is_attention_matrix else own
                    captures[capture.name].append(own.contiguous())
            done(len(examples))
        joined: dict[str, Tensor | list[Tensor]] = {
            name: torch.stack(own) if len({part.shape for part in own}) == 1 else own
            for name, own in captures.items()
        }
        return torch.cat(outputs), joined

    def carry_out(
        self, run: BoundRun, examples: Sequence[int], keep: Iterable[Site]
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """One run on some examples: its output, and values after its edits."""
        origins = [self._origin(edit, run, examples) for edit in run.edits]
        images = self.data.images(run.run.base, examples)
        kept: dict[Site, Tensor] = {}
        wanted = set(keep)

        def at(site: Site) -> Touch:
            def touch(value: Tensor) -> Tensor:
                for edit, origin in zip(run.edits, origins, strict=True):  # in forward, then in list order
                    if edit.site == site:
                        value = edited(edit, value, examples, origin)
                if site in wanted:
                    kept[site] = value.clone()
                return value

            return touch

        sites = wanted | {edit.site for edit in run.edits}
        return self.forward(images, {site: at(site) for site in sites}), kept

    def clean(self, column: str, examples: Sequence[int], site: Site) -> Tensor:
        """The value of the clean forward of some examples' images."""
        kept: list[Tensor] = []

        def touch(value: Tensor) -> Tensor:
            kept.append(value.clone())
            return value

        self.forward(self.data.images(column, examples), {site: touch})
        return kept[0]

    def _origin(self, edit: Edit, run: BoundRun, examples: Sequence[int]) -> Origin:
        given = {field: self.tensors[ref] for field, ref in edit.refs}
        mean = None
        if "mean" in given:
            mean = given["mean"]
            if edit.site.is_attention_matrix and mean.ndim == 3:
                mean = mean.transpose(0, 1)
            if edit.spec.heads is not None:
                mean = mean[..., list(edit.spec.heads), :]
        elif edit.mean is not None:
            mean = self._mean(edit.mean, run, pooled=bool(getattr(edit.spec, "pool_tokens", False)))
        source = None if edit.source is None else self._source(edit.source, examples)
        return Origin(source, mean, given)

    def _source(self, read: Read, examples: Sequence[int]) -> Tensor:
        if isinstance(read.origin, RunOrigin):
            other = self.runs[read.origin.run]
            return self.carry_out(other, examples, [read.site])[1][read.site]
        if read.origin.permutation is not None:
            shuffled = permutation(read.origin.permutation, self.data.n)
            examples = [int(shuffled[example]) for example in examples]
        return self.clean(read.origin.column, examples, read.site)

    def _mean(self, read: Read, run: BoundRun, *, pooled: bool) -> Tensor:
        """Mean over the dataset, per token or over all selected tokens of all examples."""
        if (read, pooled) not in self._means:
            assert isinstance(read.origin, ColumnOrigin)
            rows = []
            for examples in self.batches:
                value = self.clean(read.origin.column, examples, read.site).float()
                rows += [selected(read.site, read, value, row, i) for row, i in enumerate(examples)]
            flat = pooled and read.site.has_tokens
            self._means[read, pooled] = torch.cat(rows).mean(0) if flat else torch.stack(rows).mean(0)
        return self._means[read, pooled]
