"""One growing batch: rows of many runs join a single native forward at the block where they start.

The native forward begins on one blank image. Blocks before the first row hand their input on at no cost; the
first rows to join replace the blank image, later ones are appended, each starting from its example's clean
residual stream. Every row is edited by its own run's interventions, and the model's own tail serves all rows
at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.bound import Bound, BoundRun, Edit, Join
from vit_mechinterp.engine.clean import Clean
from vit_mechinterp.engine.ops import Inputs, apply
from vit_mechinterp.engine.schedule import Segment, join_reads, starts_at_mlp_out, wave_reads
from vit_mechinterp.engine.values import Read, Values, by_token, gather
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, Visitor
from vit_mechinterp.spec import Ablate, Site, TensorRef

__all__ = ["Material", "WaveResult", "run_wave"]


@dataclass
class Material:
    """Everything that waves read: clean values, values of earlier runs, dataset means, and given tensors.

    Args:
        bound: the bound runs.
        examples: the dataset's examples that the clean values hold, in order.
        clean: what the clean forwards gave for them.
        tensors: the given tensors by reference.
        means: dataset means by read.
        run_values: values of edited runs by read.
        source_order: for training, a permutation of every source selection's tokens (paper A.6).
    """

    bound: Bound
    examples: range
    clean: Clean
    tensors: Mapping[TensorRef, Tensor]
    means: Mapping[Read, Tensor] = field(default_factory=dict)
    run_values: dict[Read, Values] = field(default_factory=dict)
    source_order: Sequence[int] | None = None

    def local(self, examples: Sequence[int]) -> list[int]:
        """Places of dataset examples among the held ones."""
        return [i - self.examples.start for i in examples]

    def values(self, read: Read) -> Values:
        """The values of a read, clean or from an earlier run."""
        return self.run_values[read] if read in self.run_values else self.clean.values[read]


@dataclass
class WaveResult:
    """What one wave gave: outputs and captured values by run, one row per example of its segment."""

    outputs: dict[str, Tensor]
    captured: dict[tuple[str, Read], Tensor]


def run_wave(vit: HookedViT, segments: Sequence[Segment], material: Material) -> WaveResult:
    """Carry out one wave, in the ambient grad mode.

    Args:
        vit: the model.
        segments: rows by run, in the order in which they join.
        material: what the rows read.

    Raises:
        ExecutionError: an intervention did not fire.
    """
    wave = _Wave(vit, segments, material)
    with wave.instrument.installed():
        output = vit(vit.beginning(wave.starts[-1]))
        wave.instrument.verify()
    wave.verify()
    outputs = {s.run.name: output[wave.span(n)].float() for n, s in enumerate(segments)}
    return WaveResult(outputs, wave.captured)


class _Wave:
    def __init__(self, vit: HookedViT, segments: Sequence[Segment], material: Material) -> None:
        self.vit = vit
        self.segments = segments
        self.material = material
        self.n_layers = vit.layout.n_layers
        self.captured: dict[tuple[str, Read], Tensor] = {}
        self.applied: set[tuple[int, int]] = set()
        self.starts = np.concatenate([[0], np.cumsum([len(s.examples) for s in segments])]).tolist()
        self.instrument = Instrument(vit.module, vit.layout)
        self._add_joins()
        self._add_edits()
        self._add_captures()

    def span(self, index: int) -> slice:
        """Rows of a segment in the full batch."""
        return slice(self.starts[index], self.starts[index + 1])

    def verify(self) -> None:
        missed = [
            edit.where
            for n, segment in enumerate(self.segments)
            for k, edit in enumerate(segment.run.edits)
            if (n, k) not in self.applied
        ]
        if missed:
            raise ExecutionError(f"Interventions that did not fire: {'; '.join(missed)}.")

    def _add_joins(self) -> None:
        by_join: dict[Join, list[int]] = defaultdict(list)
        for n, segment in enumerate(self.segments):
            by_join[segment.run.join(self.n_layers)].append(n)
        first = min(by_join)
        self.instrument.skip(range(first.first_block))
        for join in sorted(by_join):
            self.instrument.visit(join.site, self._joining(by_join[join], replace=join == first))

    def _joining(self, members: list[int], *, replace: bool) -> Visitor:
        def visitor(value: Tensor) -> Tensor:
            rows = [self._starting_rows(n) for n in members]
            return torch.cat(rows if replace else [value, *rows])

        return visitor

    def _starting_rows(self, n: int) -> Tensor:
        """The residual stream that a segment's rows join with."""
        segment = self.segments[n]
        local = self.material.local(segment.examples)
        reads = join_reads(segment.run, self.n_layers)
        start = self.material.clean.values[reads[0]].whole(local)
        if not starts_at_mlp_out(segment.run):
            return start
        site = reads[1].site
        increment = self.material.clean.values[reads[1]].whole(local)
        for k, edit in enumerate(segment.run.edits):
            if edit.site == site:
                increment = self._edited(increment, slice(0, len(local)), n, k, edit)
        for read in wave_reads(segment.run, self.material.bound):
            if read.site == site:
                rows = slice(0, len(local))
                self.captured[segment.run.name, read] = gather(site, increment, rows, read, segment.examples)
        return start + increment

    def _behind_join(self, run: BoundRun, site: Site) -> bool:
        """Whether a site's tensor holds the run's rows when it is visited."""
        return not (starts_at_mlp_out(run) and site == run.first)

    def _add_edits(self) -> None:
        by_site: dict[Site, list[tuple[int, int, Edit]]] = defaultdict(list)
        for n, segment in enumerate(self.segments):
            for k, edit in enumerate(segment.run.edits):
                if self._behind_join(segment.run, edit.site):
                    by_site[edit.site].append((n, k, edit))
        for site, edits in by_site.items():
            self.instrument.visit(site, self._editing(edits))

    def _editing(self, edits: list[tuple[int, int, Edit]]) -> Visitor:
        def visitor(value: Tensor) -> Tensor:
            value = value.clone()
            for n, k, edit in edits:
                self._edit(value, self.span(n), n, k, edit)
            return value

        return visitor

    def _edited(self, value: Tensor, rows: slice, n: int, k: int, edit: Edit) -> Tensor:
        value = value.clone()
        self._edit(value, rows, n, k, edit)
        return value

    def _edit(self, value: Tensor, rows: slice, n: int, k: int, edit: Edit) -> None:
        """Apply one intervention to one segment's rows of an activation that is ours to write."""
        examples = self.segments[n].examples
        view = by_token(edit.site, value)
        device = value.device
        features = slice(None) if edit.spec.heads is None else torch.as_tensor(edit.spec.heads, device=device)
        if edit.positions.is_all:
            region = view[rows]
            shape = region.shape
            h = region.flatten(0, 1) if edit.site.has_tokens else region
            # The operator's gradient may need its input, which is about to be written over.
            h = h.clone() if torch.is_grad_enabled() else h
            tokens = shape[1] if edit.site.has_tokens else 1
            counts = [tokens] * len(examples)
            ordinal = torch.arange(tokens, device=device).repeat(len(examples))
        else:
            row, position, order = edit.positions.flat(examples)
            where = (
                torch.as_tensor(row + rows.start, device=device),
                torch.as_tensor(position, device=device),
            )
            h = view[where]
            counts = edit.positions.counts(examples, 0)
            ordinal = torch.as_tensor(order, device=device)
        selected = h if edit.spec.heads is None else h[:, features]
        # What the mask leaves alone must survive an operator that writes into its argument.
        given = selected if edit.keys.is_all else selected.clone()
        new = apply(edit.spec, given, self._inputs(n, edit, counts, ordinal))
        if new.shape != selected.shape:
            raise ExecutionError(
                f"{edit.where}: the operator returned {tuple(new.shape)} for {tuple(selected.shape)}."
            )
        if not edit.keys.is_all:
            new = torch.where(_key_mask(edit, examples, counts, view.shape[-1], device), new, selected)
        if edit.spec.heads is not None:
            new = h.index_copy(1, features, new)  # type: ignore[arg-type]
        if edit.positions.is_all:
            view[rows] = new.reshape(shape)
        else:
            view[where] = new
        self.applied.add((n, k))

    def _inputs(self, n: int, edit: Edit, counts: list[int], ordinal: Tensor) -> Inputs:
        examples = self.segments[n].examples
        device = ordinal.device
        tensors = {field: self.material.tensors[ref] for field, ref in edit.refs}
        choice = None
        if edit.choice is not None:
            choice = torch.as_tensor(np.repeat([edit.choice[i] for i in examples], counts), device=device)
        source: Tensor | None = None
        if edit.source is not None:
            values = self.material.values(edit.source)
            source = values.rows(self.material.local(examples), tokens=edit.source.site.has_tokens)
            if self.material.source_order is not None:
                source = source[_reordered(counts, self.material.source_order, device)]
        elif isinstance(edit.spec, Ablate) and edit.spec.method == "mean":
            source = self._mean(edit, counts, examples, ordinal)
        return Inputs(ordinal=ordinal, source=source, tensors=tensors, choice=choice)

    def _mean(self, edit: Edit, counts: list[int], examples: Sequence[int], ordinal: Tensor) -> Tensor:
        """The mean to put in place, paired with the selected tokens: ``[m or 1, *features]``."""
        pooled = bool(getattr(edit.spec, "pool_tokens", False)) or not edit.site.has_tokens
        if edit.mean is None:
            mean = self.material.tensors[edit.refs[0][1]]
            if edit.site.is_attention_matrix and not pooled:
                mean = mean.transpose(0, 1)
            if edit.spec.heads is not None:
                mean = mean[..., list(edit.spec.heads), :]
        else:
            mean = self.material.means[edit.mean]
            if pooled and edit.site.has_tokens and edit.mean.positions.is_all:
                mean = mean.mean(dim=0)
        if pooled:
            return mean[None]
        if edit.positions.is_all:
            return mean.repeat(len(examples), *([1] * (mean.ndim - 1)))
        _, position, _ = edit.positions.flat(examples)
        return mean[torch.as_tensor(position, device=ordinal.device)]

    def _add_captures(self) -> None:
        for n, segment in enumerate(self.segments):
            for read in wave_reads(segment.run, self.material.bound):
                if self._behind_join(segment.run, read.site):
                    self.instrument.visit(read.site, self._capturing(n, read))

    def _capturing(self, n: int, read: Read) -> Visitor:
        segment = self.segments[n]

        def visitor(value: Tensor) -> None:
            self.captured[segment.run.name, read] = gather(
                read.site, value, self.span(n), read, segment.examples
            )

        return visitor


def _reordered(counts: Sequence[int], order: Sequence[int], device: torch.device) -> Tensor:
    """Rows of every example's selection in one order; an example of few tokens leaves out those it lacks."""
    within = {count: np.array([k for k in order if k < count], dtype=np.int64) for count in set(counts)}
    starts = np.cumsum([0, *counts[:-1]])
    rows = [start + within[count] for start, count in zip(starts, counts, strict=True)]
    return torch.as_tensor(np.concatenate(rows), device=device)


def _key_mask(
    edit: Edit, examples: Sequence[int], counts: list[int], n_keys: int, device: torch.device
) -> Tensor:
    """Which keys are meant, ``[m, 1, key]``."""
    mask = torch.zeros(len(examples), n_keys, dtype=torch.bool)
    row, position, _ = edit.keys.flat(examples)
    mask[torch.as_tensor(row), torch.as_tensor(position)] = True
    repeats = torch.as_tensor(counts)
    return mask.repeat_interleave(repeats, dim=0)[:, None, :].to(device)
