"""One growing batch: rows of many runs join a single native forward at the block where they start.

The native forward begins on one blank image. Blocks before the first row hand their input on at no cost; the
first rows to join replace the blank image, later ones are appended, each starting from a clean residual
stream, from what another row has been through, or blank, if its first edit replaces it all. Every row is
edited by its own run's interventions, and the model's own tail serves all rows at once. Parts of a joining
block that end before a row's first edit run once for all rows of one image. Rows that bypass a block step
aside before it and are back behind it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import Edit
from vit_mechinterp.engine.binding.joins import Join
from vit_mechinterp.engine.binding.values import Read, contiguous, gather
from vit_mechinterp.engine.forwards.editing import Material, edit_rows
from vit_mechinterp.engine.forwards.readers import Reader, readers_of
from vit_mechinterp.engine.forwards.stacking import Placed, edit_stack, stacked
from vit_mechinterp.engine.rows.distinct import distinct_rows
from vit_mechinterp.engine.rows.order import Segment
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.as_made import is_untouched
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, StopForward, Visitor
from vit_mechinterp.model.layout import TAP_SITES
from vit_mechinterp.model.narrowing import Narrowing
from vit_mechinterp.model.sparing import Sparing
from vit_mechinterp.spec import Site

__all__ = ["run_wave"]


@dataclass
class WaveResult:
    """What one wave gave: outputs (float32, or float64 of a model that is), segment by segment, if it went to
    the end; and by run and read the pieces that it captured, each with the examples that it holds."""

    output: Float[Tensor, "row *output"] | None
    captured: dict[tuple[str, Read], list[tuple[IntArray, Tensor]]]


def run_wave(
    vit: HookedViT,
    segments: Sequence[Segment],
    material: Material | Sequence[Material],
    *,
    spares: bool = False,
    tokens: Sequence[int] | None = None,
) -> WaveResult:
    """Carry out one wave, in the ambient grad mode.

    Args:
        vit: the model.
        segments: rows by run, in the order in which they join.
        material: what the rows read; where segments differ in it, one for each.
        spares: run parts of joining blocks once for rows that are equal there.
        tokens: positions that are read behind the last attention call; None for all.

    Raises:
        ExecutionError: an intervention did not fire.
    """
    each = [material] * len(segments) if isinstance(material, Material) else list(material)
    wave = _Wave(vit, segments, each)
    if spares:
        wave.spare()
    narrowed: AbstractContextManager[None] = nullcontext()
    if tokens is not None and is_untouched(vit.module):
        narrowed = Narrowing(vit.module, vit.layout, tokens).installed()
    output: Tensor | None = None
    with wave.instrument.installed():
        with wave.sparing.installed(), narrowed, suppress(StopForward):
            output = vit(vit.beginning(wave.starts[-1]))
            output = output.to(torch.promote_types(output.dtype, torch.float32))
        wave.instrument.verify()
    wave.verify()
    # Its visitors hold the wave, and with it what the whole chunk reads: a reference cycle, which would stay
    # until the garbage collector finds it.
    del wave.instrument
    return WaveResult(output, wave.captured)


class _Wave:
    """Visitors for the sites of one native forward, at which rows join, are edited, are read, and are handed
    on; and what they have given by its end."""

    def __init__(self, vit: HookedViT, segments: Sequence[Segment], materials: Sequence[Material]) -> None:
        self.vit = vit
        self.segments = segments
        self.materials = materials
        self.captured: dict[tuple[str, Read], list[tuple[IntArray, Tensor]]] = defaultdict(list)
        self.applied: set[tuple[int, int]] = set()
        self.visited: set[Site] = set()
        self.starts = np.cumsum([0, *(len(s.examples) for s in segments)]).tolist()
        self.bypassing = _bypassing(segments)
        self.aside: dict[int, Tensor] = {}
        self.instrument = Instrument(vit.module, vit.layout)
        self.sparing = Sparing(vit.module, vit.layout)
        self._add_returns()
        self._add_gifts(before_edits=True)
        self._add_joins()
        self._add_edits()
        self._add_gifts(before_edits=False)
        self._add_captures()
        self._add_departures()
        self._stop()

    def span(self, n: int, site: Site) -> slice:
        """Rows of a segment in the batch at a site."""
        before = (other for other in self._beside(site) if other < n)
        absent = sum(len(self.segments[other].examples) for other in before)
        return slice(self.starts[n] - absent, self.starts[n + 1] - absent)

    def _beside(self, site: Site) -> Sequence[int]:
        """The segments whose rows bypass the block that a site is inside of."""
        if site.layer is None or site.name in ("resid_pre", "resid_post"):
            return ()
        return self.bypassing.get(site.layer, ())

    def spare(self) -> None:
        """Let parts of joining blocks run on distinct rows alone."""
        images_of = [material.images_of for material in self.materials]
        found = distinct_rows(self.segments, images_of)
        opened = {site.layer for site in self.visited if site.name in (*TAP_SITES, "attn.result")}
        for layer, parts in found.items():
            self.sparing.spare(layer, parts, opened=layer in opened)

    def verify(self) -> None:
        missed = [
            edit.where
            for n, segment in enumerate(self.segments)
            for k, edit in segment.run.to_make
            if (n, k) not in self.applied
        ]
        if missed:
            raise ExecutionError(f"Interventions that did not fire: {'; '.join(missed)}.")

    def _visit(self, site: Site, visitor: Visitor) -> None:
        self.visited.add(site)
        self.instrument.visit(site, visitor)

    def _stop(self) -> None:
        """Stop behind the last place at which something is read, if no row's output is."""
        ends = [segment.run.ends for segment in self.segments]
        last = max((end for end in ends if end is not None), default=None)
        place = None if last is None or None in ends else last.at(self.vit.layout.n_layers)
        if place is not None:
            self.instrument.stop(place[0], before=place[1])

    def _add_joins(self) -> None:
        by_join: dict[Join, list[int]] = defaultdict(list)
        for n, segment in enumerate(self.segments):
            by_join[segment.run.join].append(n)
        first = min(by_join)
        self.instrument.skip(range(first.first_block))
        for join in sorted(by_join):
            self._visit(join.site, self._joining(by_join[join], replace=join == first))

    def _joining(self, members: list[int], *, replace: bool) -> Visitor:
        def visitor(value: Tensor) -> Tensor:
            rows = [self._starting_rows(n, value) for n in members]
            return torch.cat(rows if replace else [value, *rows])

        return visitor

    def _starting_rows(self, n: int, like: Tensor) -> Tensor:
        """The residual stream that a segment's rows join with, shaped ``like`` that of the others."""
        segment = self.segments[n]
        run, examples = segment.run, segment.examples
        known_at = run.known_at
        if (run.blank and run.beginning is None) or (known_at is not None and known_at.name == "resid_mid"):
            return like.new_zeros(len(examples), *like.shape[1:])
        if not run.starts_at_mlp_out:
            return self._known(n, run.join.site)
        middle, increment = (Site(run.join.layer, name) for name in ("resid_mid", "mlp_out"))
        return self._known(n, middle) + self._visited_apart(n, increment, self._known(n, increment).clone())

    def _visited_apart(self, n: int, site: Site, value: Tensor) -> Tensor:
        """A segment's rows of an activation that is ours to write, edited, and read where somebody wants it,
        while the forward has them not at the site."""
        rows = slice(0, len(value))
        for k, edit in self.segments[n].run.to_make:
            if edit.site == site:
                self._edit(value, rows, n, k, edit)
        for own in readers_of(self.segments[n], self.materials[n]):
            if own.read.site == site:
                piece = gather(site, value, own.rows, own.read, own.examples)
                self.captured[own.run, own.read].append((own.examples, piece))
        return value

    def _add_departures(self) -> None:
        """Let rows step aside before the blocks that they bypass; a block that all bypass is left out."""
        for layer, beside in self.bypassing.items():
            if beside == self._present(layer):
                self.instrument.skip([layer])
            self._visit(Site(layer, "resid_pre"), self._departing(layer, beside))

    def _departing(self, layer: int, beside: Sequence[int]) -> Visitor:
        def visitor(value: Tensor) -> Tensor | None:
            rows = {n: value[self.starts[n] : self.starts[n + 1]] for n in self._present(layer)}
            self.aside.update((n, rows.pop(n)) for n in beside)
            return torch.cat(list(rows.values())) if rows else None

        return visitor

    def _add_returns(self) -> None:
        """Let rows be back behind the blocks that they bypass."""
        for layer, beside in self.bypassing.items():
            self._visit(Site(layer, "resid_post"), self._returning(layer, beside))

    def _returning(self, layer: int, beside: Sequence[int]) -> Visitor:
        passed = Site(layer, "mlp_out")

        def visitor(value: Tensor) -> Tensor:
            return torch.cat(
                [
                    self._bypassed(n, layer) if n in beside else value[self.span(n, passed)]
                    for n in self._present(layer)
                ]
            )

        return visitor

    def _bypassed(self, n: int, layer: int) -> Tensor:
        """The residual stream of a segment's rows behind a block that they bypass."""
        stream = self.aside.pop(n)
        for increment, total in (("attn_out", "resid_mid"), ("mlp_out", None)):
            stream = stream + self._visited_apart(n, Site(layer, increment), torch.zeros_like(stream))
            if total is not None:
                stream = self._visited_apart(n, Site(layer, total), stream)
        return stream

    def _present(self, layer: int) -> Sequence[int]:
        """The segments whose rows have joined before a block runs."""
        return [n for n, segment in enumerate(self.segments) if segment.run.join.first_block <= layer]

    def _known(self, n: int, site: Site) -> Tensor:
        """What a segment's rows start from at a site: clean values, or those of the rows that they go on
        from."""
        segment, material = self.segments[n], self.materials[n]
        if segment.run.beginning is None:
            return material.clean.values[Read(segment.run.origin, site)].whole(segment.examples)
        return torch.stack([material.handover.begun[site, state] for state in segment.begins])

    def _add_gifts(self, *, before_edits: bool) -> None:
        """Hand states on: increments and outputs of blocks before rows join there and edits are made, middles
        behind that."""
        for n, segment in enumerate(self.segments):
            handover, own = self.materials[n].handover, segment.run.name
            by_site: dict[Site, list[tuple[int, int]]] = defaultdict(list)
            for row, example in enumerate(segment.examples if handover.gifts else ()):
                for site, state in handover.gifts.get((own, example), ()):
                    if before_edits == (site.name != "resid_mid"):
                        by_site[site].append((self.span(n, site).start + row, state))
            for site, states in by_site.items():
                self._visit(site, self._giving(handover.begun, site, states))

    def _giving(
        self, begun: dict[tuple[Site, int], Tensor], site: Site, states: Sequence[tuple[int, int]]
    ) -> Visitor:
        rows = torch.tensor([row for row, _ in states], device=self.vit.device)

        def visitor(value: Tensor) -> None:
            given = value.index_select(0, rows)
            begun.update(((site, state), own) for (_, state), own in zip(states, given, strict=True))

        return visitor

    def _is_there(self, n: int, site: Site) -> bool:
        """Whether a site's tensor holds a segment's rows when it is visited."""
        run = self.segments[n].run
        return n not in self._beside(site) and not (run.starts_at_mlp_out and site == run.own_from)

    def _add_edits(self) -> None:
        by_site: dict[Site, list[tuple[int, int, Edit]]] = defaultdict(list)
        known: dict[Site, list[int]] = defaultdict(list)
        for n, segment in enumerate(self.segments):
            if segment.run.known_at is not None:
                known[segment.run.known_at].append(n)
            for k, edit in segment.run.to_make:
                if self._is_there(n, edit.site):
                    by_site[edit.site].append((n, k, edit))
        for site in dict.fromkeys((*known, *by_site)):
            self._visit(site, self._editing(site, known[site], by_site[site]))

    def _editing(self, site: Site, known: Sequence[int], edits: Sequence[tuple[int, int, Edit]]) -> Visitor:
        """Put clean values in for the rows of some segments, and carry out what is to be edited at a site."""

        def visitor(value: Tensor) -> Tensor:
            value = value.clone()
            for n in known:
                value[self.span(n, site)] = self._known(n, site)
            for group in stacked([self._placed(n, k, edit) for n, k, edit in edits], value):
                if len(group) > 1:
                    edit_stack(value, group)
                    self.applied.update((own.segment, own.place) for own in group)
                    continue
                own = group[0]
                self._edit(value, own.rows, own.segment, own.place, own.edit)
            return value

        return visitor

    def _placed(self, n: int, k: int, edit: Edit) -> Placed:
        return Placed(n, k, edit, self.span(n, edit.site), self.segments[n].examples, self.materials[n])

    def _edit(self, value: Tensor, rows: slice, n: int, k: int, edit: Edit) -> None:
        edit_rows(value, rows, edit, self.segments[n].examples, self.materials[n])
        self.applied.add((n, k))

    def _add_captures(self) -> None:
        for n, segment in enumerate(self.segments):
            for reader in readers_of(segment, self.materials[n]):
                if self._is_there(n, reader.read.site):
                    self._visit(reader.read.site, self._capturing(n, reader))

    def _capturing(self, n: int, reader: Reader) -> Visitor:
        read, examples = reader.read, reader.examples
        span = self.span(n, read.site)
        of = span if isinstance(reader.rows, slice) else reader.rows + span.start

        def visitor(value: Tensor) -> None:
            own = of if isinstance(of, slice) else (contiguous(of) or of)
            piece = gather(read.site, value, own, read, examples)
            if piece.untyped_storage().nbytes() > piece.nbytes and not piece.requires_grad:
                piece = piece.clone()  # or the rows of all others would stay alive with it
            self.captured[reader.run, read].append((examples, piece))

        return visitor


def _bypassing(segments: Sequence[Segment]) -> Mapping[int, Sequence[int]]:
    """By block, the segments whose rows bypass it."""
    found: dict[int, list[int]] = defaultdict(list)
    for n, segment in enumerate(segments):
        for layer in segment.run.bypasses:
            if segment.run.join.first_block <= layer < segment.run.end:
                found[layer].append(n)
    return dict(found)
