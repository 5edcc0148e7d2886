"""What a plan says beside its numbers: why something is computed that could have been shared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.values import origin_of
from vit_mechinterp.engine.planning.counting import Counts
from vit_mechinterp.engine.rows.order import starts_late
from vit_mechinterp.engine.scheduling.footprint import common_size
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.scheduling.sizes import in_words
from vit_mechinterp.engine.store.arrangement import Forecast
from vit_mechinterp.errors import listed
from vit_mechinterp.model.as_made import is_as_made
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.sparing import why_nothing_is_spared
from vit_mechinterp.spec import Site

__all__ = ["notes_on"]


def notes_on(
    vit: HookedViT, schedule: Schedule, counts: Counts, forecast: Forecast | None, *, tensors_known: bool
) -> Iterator[str]:
    """Notes on one schedule, whose clean forwards go through a store if there is a forecast."""
    if schedule.one_image is not None:
        yield f"clean forwards take one image each: {schedule.one_image}"
    if forecast is not None:
        yield from _through_a_store(schedule, counts, forecast)
    else:
        yield from _over_chunks(vit, schedule, counts)
    yield from _again(schedule, counts)
    yield from _otherwise(schedule.bound, counts)
    yield from _less(schedule.bound)
    yield from _stages(schedule, counts)
    if not tensors_known and any(edit.refs for run in schedule.bound.runs for edit in run.edits):
        yield "tensors are not known here, so equal ones, and directions and gates of zeros, are not found"
    yield from _falling_back(vit, schedule, counts)
    yield from _late(vit, schedule)


def _again(schedule: Schedule, counts: Counts) -> Iterator[str]:
    """What several chunks compute."""
    if len(schedule.chunks) > 1 and counts.rows_again:
        whole = schedule.bound.readout is None
        why = "activations are kept or read" if whole else "outputs are not kept as a whole"
        yield (
            f"{counts.rows_again} rows are equal to rows of other chunks, and are computed again, because "
            f"their {why}"
        )
    if counts.begun_again:
        often = "once" if counts.begun_again == 1 else f"{counts.begun_again} times"
        yield (
            "what rows of different chunks go through before they differ is computed in each of these "
            f"({often} more in all), because a chunk holds what its own rows go on from "
            "alone"
        )


def _otherwise(bound: Bound, counts: Counts) -> Iterator[str]:
    """What is computed in another way than it is written."""
    if bound.left_out:
        yield f"interventions that change nothing that is read are left out: {_places(bound.left_out)}"
    if bound.postponed:
        yield f"interventions are made later, where that is the same: {_places(bound.postponed)}"
    if bound.not_postponed:
        yield (
            "interventions are made where they are declared, though later would be the same, because a store "
            f"is likelier to have what they read there: {_places(bound.not_postponed)}"
        )
    if counts.bypassed:
        yield (
            "rows bypass blocks of which all that attention and MLP add is replaced: "
            f"{counts.bypassed} block evaluations"
        )
    if bound.without_base:
        yield (
            "all that is read of the residual stream is replaced, so that no base is run for it: "
            f"{_places(bound.without_base)}"
        )


def _less(bound: Bound) -> Iterator[str]:
    """What of outputs is not kept."""
    if len(bound.with_output) < len(bound.runs):
        without = [run.name for run in bound.runs if not run.has_output]
        yield f"no output is wanted of {listed(without)}: rows end at the last place where they are read"
    if bound.readout is not None:
        yield f"of every output this is kept: {listed(bound.readout.spec.names)}"


def _stages(schedule: Schedule, counts: Counts) -> Iterator[str]:
    """Rows that wait for others, or go on from them."""
    if len(schedule.bound.stages) > 1:
        yield "runs that read other edited runs wait for them, in stages of one growing batch each"
    if counts.branched:
        yield (
            "rows that begin with the same interventions on the same images as others go on from these: "
            f"{counts.branched} in all, which spares {counts.not_again} block evaluations"
        )


def _falling_back(vit: HookedViT, schedule: Schedule, counts: Counts) -> Iterator[str]:
    """Where blocks run as they are written, or with all of their tokens."""
    if vit.compiled is not None:
        last = "" if counts.unread == 0 else ", and so does the last one, most of whose tokens are left out"
        yield f"blocks that are read or edited inside run as they are written{last}; the others compiled"
    stages = range(len(schedule.bound.stages))
    if schedule.by_output is not None and any(schedule.tokens_wanted(stage) is None for stage in stages):
        yield (
            "all tokens of the last block are computed, because most are captured there, read by other runs, "
            "or given to operators that may look at several at once"
        )
    elif schedule.by_output is None and not is_as_made(vit.module):
        yield (
            "all tokens of the last block are computed, because hooks, forwards or modules that are not its "
            "library's are on the model"
        )


def _places(places: Sequence[str]) -> str:
    return listed(places, most=3, between="; ")


def _over_chunks(vit: HookedViT, schedule: Schedule, counts: Counts) -> Iterator[str]:
    if len(schedule.chunks) == 1 or not schedule.needs.common.needs:
        return
    size = in_words(common_size(vit, schedule))
    if schedule.holds:
        means = ", and dataset means are made of," if schedule.reads.means else ""
        yield f"what several chunks need of clean forwards{means} is computed once, and held: {size}"
        return
    if schedule.needs.means_come_first:
        yield "dataset means need a pass of their own, because the dataset spans several chunks"
    resampled = sorted({o.column for o in map(origin_of, counts.needs) if o.permutation is not None})
    for column in resampled:
        yield f"resampled images of {column!r} lie in other chunks, so some pass through the model again"
    if counts.again and not resampled:
        yield f"images that occur in several chunks pass through the model {counts.again} times more"
    yield f"to hold what these forwards give, so that each image passes once, takes {size} of memory"


def _through_a_store(schedule: Schedule, counts: Counts, forecast: Forecast) -> Iterator[str]:
    if not forecast.forwards:
        yield "everything that clean forwards give is stored"
    if counts.apart:
        yield (
            f"{counts.apart} images pass through the model once for each column that they stand in, because "
            "a store computes a column in batches of its own, unless another one holds all of its images, "
            "and all that is read of them"
        )
    if not forecast.holds and (len(schedule.chunks) > 1 or schedule.needs.means_come_first):
        yield (
            "the store cannot hold what all chunks need until they read it, so images pass through the model "
            "again for what is asked for later, and for what it loses, which is not counted"
        )


def _late(vit: HookedViT, schedule: Schedule) -> Iterator[str]:
    every = [p.run for own in schedule.sharing.parts.values() for p in own]
    late = [run for run in every if starts_late(run)]
    known = {run.first for run in late if run.known_at is not None}
    others = {run.first for run in late if run.known_at is None}
    if known:
        yield (
            f"rows that are first edited inside a block ({_sites(known)}) are given clean values there, and "
            "the part of it before that is not computed for them in waves where this is quicker"
        )
    if not others:
        return
    reason = why_nothing_is_spared(vit.layout)
    if reason is None:
        how = (
            "rows of one image that join a block together share the part of it before their edits; that part "
            "runs again for the others"
        )
    else:
        how = f"the part of the block before them runs again: {reason}"
    yield f"edits inside a block ({_sites(others)}) join at its input; {how}"


def _sites(sites: Collection[Site | None]) -> str:
    return listed(map(str, sorted(site for site in sites if site is not None)), most=4)
