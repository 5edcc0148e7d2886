"""Edits at the last place where they make the same difference, so that less of a block runs for them.

What comes out of attention or MLP at a token is an image's own if what went in was. So tokens that are taken
from an image inside are taken from it where they come out instead, unless that parts rows that are one until
then.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace

from vit_mechinterp.engine.binding.alike import Kind, doing
from vit_mechinterp.engine.binding.bound import Bound, BoundRun, Edit
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.reduction.anatomy import Anatomy
from vit_mechinterp.engine.reduction.ancestry import Ancestry, brings, may_hold
from vit_mechinterp.engine.reduction.masks import Masks
from vit_mechinterp.spec import Site

__all__ = ["postponed", "where_none_stay"]

_IN_MLP = ("mlp.pre", "mlp.pre_linear", "mlp.post")
_OUT: Mapping[str, tuple[str, Sequence[str]]] = {
    "attn.z": ("attn_out", ("attn.result",)),
    "attn.result": ("attn_out", ()),
    "attn_out": ("resid_post", ("resid_mid", "ln2", *_IN_MLP, "mlp_out")),
    "resid_mid": ("resid_post", ("ln2", *_IN_MLP, "mlp_out")),
    "ln2": ("mlp_out", _IN_MLP),
    "mlp.pre": ("mlp_out", ("mlp.post",)),
    "mlp.post": ("mlp_out", ()),
}
"""Where a token's value comes out that is made of its value at a site, and the sites on the way."""


def postponed(anatomy: Anatomy, masks: Masks, run: BoundRun, reads: Sequence[Read]) -> tuple[Edit, ...]:
    """Edits of a run, each at the last place where it does the same.

    Args:
        anatomy: the model's.
        masks: of the run's edits.
        run: the run.
        reads: what is read of its values.
    """
    found: list[Edit] = []
    for edit in reversed(run.edits):
        found.insert(0, _postponed(anatomy, masks, run, edit, found, reads))
    return tuple(found)


def where_none_stay(bound: Bound, later: Mapping[str, Sequence[Edit]]) -> dict[str, BoundRun]:
    """The runs of an experiment with edits that are made ``later``, by run; but not where another run begins
    with the same ones and has to make them where they stand."""
    stages = {run.name: number for number, stage in enumerate(bound.stages) for run in stage}
    pairs = {run.name: list(zip(run.edits, later[run.name], strict=True)) for run in bound.runs}
    moving = {old.site for own in pairs.values() for old, new in own if new is not old}

    def begun(run: BoundRun) -> Iterator[tuple[Edit, Edit, Hashable]]:
        """A run's edits as they stand and as they are made later, and what it begins with up to each."""
        for (old, new), begins in zip(pairs[run.name], _beginnings(run, stages[run.name]), strict=True):
            yield old, new, begins

    staying: set[Hashable] = set()
    for run in bound.runs:
        if any(new is old and old.site in moving for old, new in pairs[run.name]):
            staying.update(begins for old, new, begins in begun(run) if new is old and old.site in moving)
    found = {}
    for run in bound.runs:
        edits = [new for _, new in pairs[run.name]]
        if staying and any(new is not old for old, new in pairs[run.name]):
            edits = [old if begins in staying else new for old, new, begins in begun(run)]
        found[run.name] = run.with_edits(sorted(edits, key=lambda edit: edit.site))
    return found


def _beginnings(run: BoundRun, stage: int) -> Iterator[Hashable]:
    """What a run begins with up to each of its edits: equal for rows that pass through the block together."""
    made: list[Kind] = []
    for edit in run.edits:
        made.append(doing(edit, run.origin))
        # In the last block, rows of one stage alone do.
        is_last = edit.site.layer == run.blocks.n - 1
        yield run.origin, run.blank, stage if is_last else None, tuple(made)


def _postponed(
    anatomy: Anatomy, masks: Masks, run: BoundRun, edit: Edit, later: Sequence[Edit], reads: Sequence[Read]
) -> Edit:
    """One edit at the last place where it does the same; ``later`` are those behind it."""
    if edit.site.name not in _OUT or not _takes_tokens_from_an_image(edit, masks):
        return edit
    name, on_the_way = _OUT[edit.site.name]
    there = Site(edit.site.layer, name)
    passed = {edit.site, *(Site(edit.site.layer, own) for own in on_the_way)}
    before = run.edits[: len(run.edits) - 1 - len(later)]
    if (
        not _is_seen(masks, edit, passed, later, reads)
        and _is_made_of(anatomy, run, edit.site, there)
        and (edit.site.name != "attn_out" or _is_added_to_its_own(anatomy, masks, run, edit, before))
    ):
        assert edit.source is not None
        moved = replace(edit, site=there, source=replace(edit.source, site=there))
        return _postponed(anatomy, masks, run, moved, later, reads)
    return edit


def _takes_tokens_from_an_image(edit: Edit, masks: Masks) -> bool:
    """Whether it puts whole tokens of an image, all heads of them, in their places."""
    if edit.source is None or not isinstance(edit.source.origin, ColumnOrigin) or edit.spec.heads is not None:
        return False
    return edit.puts_in and brings(edit, imagined=masks.imagined)


def _is_made_of(anatomy: Anatomy, run: BoundRun, site: Site, there: Site) -> bool:
    """Whether a token's value at one site of a block is made of its own value at another alone."""
    absent, layer = anatomy.layout.absent, there.layer
    is_gated = site.name == "mlp.pre" and str(Site(layer, "mlp.pre_linear")) not in absent
    if is_gated or str(there) in absent or layer in run.blocks.through:
        return False
    return layer in anatomy.by_token()


def _is_seen(
    masks: Masks, edit: Edit, passed: Collection[Site], later: Sequence[Edit], reads: Sequence[Read]
) -> bool:
    """Whether somebody reads or edits what it puts in on the way."""
    if any(read.site in passed for read in reads):
        return True
    chosen = masks.of_edit(edit)
    return any(other.site in passed and (chosen & masks.of_edit(other)).any() for other in later)


def _is_added_to_its_own(
    anatomy: Anatomy, masks: Masks, run: BoundRun, edit: Edit, before: Sequence[Edit]
) -> bool:
    """Whether what attention adds is added to the same image's tokens, by an edit ``before`` it."""
    if not any(may_hold(own, edit.site) for own in before):
        return False
    middle = Site(edit.site.layer, "resid_mid")
    return Ancestry(anatomy, masks, run, [middle]).holds(middle, edit)
