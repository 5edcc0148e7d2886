"""From specs to bound runs: selectors resolved on one model and one dataset, everything checked beforehand.

Nothing here runs a model (apart from one forward of a blank image, once per wrapper, that reads off shapes).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter

from vit_mechinterp.engine.binding.bound import Bound, BoundCapture, BoundRun, Edit
from vit_mechinterp.engine.binding.checks import check_heads
from vit_mechinterp.engine.binding.joins import Blocks
from vit_mechinterp.engine.binding.ops import operator_of
from vit_mechinterp.engine.binding.positions import Positions, moved_note, resolve_tokens
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read, RunOrigin
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError, listed, suggest
from vit_mechinterp.model.heap import uncollected
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import (
    Ablate,
    Column,
    Experiment,
    Intervention,
    Run,
    RunSource,
    Site,
    SourcedIntervention,
    Sweep,
    TensorRef,
)
from vit_mechinterp.spec.named import fields_of, source_of

__all__ = ["bind", "expand_runs", "sources_first"]


def expand_runs(runs: Run | Sweep | Experiment | Iterable[Run | Sweep], n_layers: int) -> list[Run]:
    """A flat list of runs from whatever describes them.

    Raises:
        SpecError: no runs, something that is no run, or two runs of one name.
    """
    if isinstance(runs, Experiment):
        return runs.expand(n_layers)
    one = isinstance(runs, (Run, Sweep, Intervention, str, Mapping)) or not isinstance(runs, Iterable)
    items = [runs] if one else list(runs)
    for item in items:
        if not isinstance(item, (Run, Sweep)):
            raise SpecError(
                "Runs are a Run, a Sweep, an Experiment or several of the first two, not "
                f"{type(item).__name__}.{_instead_of(item)}"
            )
    if not items:
        raise SpecError("There is no run to execute.")
    return Experiment(runs=tuple(items)).expand(n_layers)


def _instead_of(item: object) -> str:
    """What to do with something that is no run."""
    if isinstance(item, Intervention):
        return " Give the intervention a run: Run(name=..., interventions=[...])."
    if isinstance(item, Mapping):
        return " Read a document with Run.model_validate or Sweep.model_validate."
    return ""


@uncollected()
def bind(vit: HookedViT, runs: Sequence[Run], data: Data | None) -> Bound:
    """Resolve and check every selector of every run.

    Raises:
        SpecError: a site, head, layer, token name or run does not exist, or selections do not pair up.
        DataError: a column is missing or holds something else.
    """
    _refuse_unwanted(runs)
    bound: dict[str, BoundRun] = {}
    blocks = Blocks(vit.layout.n_layers, _through(vit), _closed(vit))
    for run in sources_first(runs):
        bound[run.name] = _bind_run(vit, run, data, bound, blocks)
    return Bound.of([bound[run.name] for run in runs], list(bound.values()))


def sources_first(runs: Sequence[Run]) -> list[Run]:
    """Runs in an order in which every run comes behind those that it reads.

    Raises:
        SpecError: a run reads one that is not among them, or runs read each other in a cycle.
    """
    by_name = {run.name: run for run in runs}
    sources_of = {run.name: _run_sources(run) for run in runs}
    if not any(sources_of.values()):
        return list(runs)
    for run in runs:
        for source in sources_of[run.name]:
            if source not in by_name:
                raise SpecError(
                    f"Run {run.name!r} reads run {source!r}, which is not part of the experiment."
                    f"{suggest(source, by_name)} Runs: {listed(by_name, most=8)}."
                )
    try:
        order = TopologicalSorter(sources_of).static_order()
        return [by_name[name] for name in order]
    except CycleError as error:
        # Each stands before the one that reads it; the message goes the other way, from the first listed.
        cycle: list[str] = error.args[1][:0:-1]
        start = min(range(len(cycle)), key=lambda n: list(by_name).index(cycle[n]))
        names = " -> ".join([*cycle[start:], *cycle[: start + 1]])
        raise SpecError(
            f"Runs read each other in a cycle: {names}. Break it by reading a clean image instead."
        ) from None


def _refuse_unwanted(runs: Sequence[Run]) -> None:
    """Raise SpecError for a run of which nobody wants anything."""
    unseen = [run for run in runs if not run.output and not run.capture]
    read = {name for run in runs for name in _run_sources(run)} if unseen else set()
    for run in unseen:
        if run.name not in read:
            raise SpecError(
                f"Nobody wants anything of run {run.name!r}: it has output=False, no capture, and no run "
                "reads it. Give it a capture, let a run read it, or leave output out."
            )


def _run_sources(run: Run) -> list[str]:
    sources = map(source_of, run.interventions)
    return [s.run for s in sources if isinstance(s, RunSource)]


def _through(vit: HookedViT) -> frozenset[int]:
    """Layers whose blocks return something that is not their middle plus the MLP's increment: it has no such
    middle, or somebody else acts on it."""
    return frozenset(
        layer
        for layer in range(vit.layout.n_layers)
        if vit.has_own_return(layer) or f"blocks.{layer}.resid_mid" in vit.layout.absent
    )


def _closed(vit: HookedViT) -> frozenset[int]:
    """Layers whose blocks put out what is no site, so that no row can join there."""
    layers = range(vit.layout.n_layers)
    return frozenset(layer for layer in layers if f"blocks.{layer}.resid_post" in vit.layout.absent)


def _bind_run(
    vit: HookedViT,
    run: Run,
    data: Data | None,
    bound: dict[str, BoundRun],
    blocks: Blocks,
) -> BoundRun:
    if data is not None:
        data.require(run.base, f"run {run.name!r}, base")
    edits = [_bind_edit(vit, run, spec, data, bound) for spec in run.interventions]
    captures = []
    for capture in run.capture:
        for name in vit.expand([capture.site]):
            site = Site.parse(name)
            where = f"run {run.name!r}, capture of {name}"
            check_heads(vit, site, capture.heads, where)
            tokens = capture.tokens if site.has_tokens else "all"
            positions = resolve_tokens(tokens, vit, data, run.base, f"{where}, tokens")
            origin = ColumnOrigin(run.base)
            captures.append(BoundCapture(name, Read(origin, site, positions, capture.heads)))
    names = [c.name for c in captures]
    if len(set(names)) < len(names):
        twice = sorted(name for name, times in Counter(names).items() if times > 1)
        raise SpecError(
            f"run {run.name!r} captures {', '.join(twice)} more than once; one capture per site and run."
        )
    if len(edits) > 1:
        # Sorting is stable: list order counts at one and the same site only.
        edits.sort(key=lambda edit: edit.site)
    return BoundRun(run, tuple(edits), tuple(captures), ColumnOrigin(run.base), blocks)


def _bind_edit(
    vit: HookedViT, run: Run, spec: Intervention, data: Data | None, bound: dict[str, BoundRun]
) -> Edit:
    where = f"run {run.name!r}, {spec.op} at {spec.site}"
    operator_of(spec)
    site = _parsed(spec.site)
    vit.check_site(site)
    check_heads(vit, site, spec.heads, where)
    positions = resolve_tokens(spec.tokens, vit, data, run.base, f"{where}, tokens")
    _check_distinct(positions, where)
    keys = resolve_tokens(spec.keys, vit, data, run.base, f"{where}, keys")
    source = mean = None
    if isinstance(spec, SourcedIntervention) and spec.source is not None:
        source = _bind_source(vit, run, spec, data, bound, where)
        _check_pairing(vit, site, positions, source, data, run.base, where)
    elif isinstance(spec, Ablate) and spec.method == "resample":
        source = Read(ColumnOrigin(run.base, spec.seed), site, positions, spec.heads)
    elif isinstance(spec, Ablate) and spec.method == "mean" and spec.mean is None:
        # Per position the mean is over whole activations; pooled, over the selected tokens alone.
        mean = Read(ColumnOrigin(run.base), site, positions if spec.pool_tokens else Positions(), spec.heads)
    fields = fields_of(type(spec))
    refs = tuple((name, ref) for name in fields if isinstance(ref := getattr(spec, name), TensorRef))
    choose = getattr(spec, "choose") if "choose" in fields else None  # noqa: B009
    choice: tuple[int, ...] | None = None
    if isinstance(choose, Column) and data is not None:
        data.require(choose.column, f"{where}, choose")
        column = choose.column
        choice = data.once(("choice", column), lambda: _choices(data, column, where))
    elif isinstance(choose, Column):
        choice = (0,)
    return Edit(spec, site, positions, keys, source, mean, refs, choice, where)


_parsed = lru_cache(maxsize=4096)(Site.parse)


def _choices(data: Data, column: str, where: str) -> tuple[int, ...]:
    """One non-negative integer per example."""
    rows = data.integers(column, f"{where}, choose")
    choice = tuple(row[0] if len(row) == 1 else -1 for row in rows)
    if min(choice) < 0:
        raise SpecError(f"{where}: column {column!r} must hold one non-negative integer per example.")
    return choice


def _bind_source(
    vit: HookedViT,
    run: Run,
    spec: SourcedIntervention,
    data: Data | None,
    bound: dict[str, BoundRun],
    where: str,
) -> Read:
    site = _parsed(spec.site_read)
    vit.check_site(site)
    check_heads(vit, site, spec.heads, f"{where}, source")
    origin: ColumnOrigin | RunOrigin
    if isinstance(spec.source, RunSource):
        other = bound[spec.source.run]
        column = other.run.base
        origin = other.origin if other.is_clean_at(site) else RunOrigin(spec.source.run)
    else:
        assert isinstance(spec.source, str)
        column = spec.source
        origin = ColumnOrigin(column)
        if data is not None:
            data.require(column, f"{where}, source")
    positions = resolve_tokens(spec.tokens_read, vit, data, column, f"{where}, source_tokens")
    sites = vit.sites()
    here, there = sites[spec.site].shape, sites[str(site)].shape
    fits = here[1:] == there[1:] if _parsed(spec.site).has_tokens else here == there
    if spec.heads is not None:
        fits = here[-1] == there[-1]
    if not fits:
        raise SpecError(f"{where}: {site} holds {there} per example, which cannot take the place of {here}.")
    return Read(origin, site, positions, spec.heads)


def _check_pairing(
    vit: HookedViT,
    site: Site,
    positions: Positions,
    source: Read,
    data: Data | None,
    base: str,
    where: str,
) -> None:
    if not site.has_tokens or data is None:
        return
    if positions == source.positions:
        return
    n = vit.layout.tokens.n_tokens
    targets, sources = (p.counts(range(data.n), n) for p in (positions, source.positions))
    if (targets != sources).any():
        example = int((targets != sources).argmax())
        raise SpecError(
            f"{where}: base and source tokens are paired by position, but example {example} selects "
            f"{targets[example]} base tokens and {sources[example]} source tokens. Select equally many; a "
            "box selects every patch that it touches, so boxes of one size do so if their corners lie on the "
            f"model's grid of {' x '.join(map(str, vit.layout.tokens.patch_size))} px."
            + moved_note(vit, data, base)
        )


def _check_distinct(positions: Positions, where: str) -> None:
    """Refuse a token that is selected twice: its new value would be ambiguous."""
    example = positions.repeated
    if example is not None:
        place = f"example {example} selects" if positions.each else "the selection names"
        raise SpecError(f"{where}: {place} a base token twice, so its new value is ambiguous.")
