"""Edits at the last place where they make the same difference, so that less of a block runs for them.

What comes out of attention or MLP at a token is an image's own if what went in was. So tokens that are taken
from an image inside are taken from it where they come out instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from vit_mechinterp.engine.binding.bound import BoundRun, Edit
from vit_mechinterp.engine.binding.values import ColumnOrigin, Read
from vit_mechinterp.engine.reduction.anatomy import Anatomy
from vit_mechinterp.engine.reduction.ancestry import Ancestry, brings, may_hold
from vit_mechinterp.engine.reduction.masks import Masks
from vit_mechinterp.spec import Site

__all__ = ["postponed"]

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
    """Edits of a run at the last place where they do the same, in forward order.

    Args:
        anatomy: the model's.
        masks: of the run's edits.
        run: the run.
        reads: what is read of its values.
    """
    found: list[Edit] = []
    for edit in reversed(run.edits):
        found.insert(0, _postponed(anatomy, masks, run, edit, found, reads))
        found.sort(key=lambda own: own.site)
    same = all(new is old for new, old in zip(found, run.edits, strict=True))
    return run.edits if same else tuple(found)


def _postponed(
    anatomy: Anatomy, masks: Masks, run: BoundRun, edit: Edit, later: Sequence[Edit], reads: Sequence[Read]
) -> Edit:
    site, source = edit.site, edit.source
    if site.layer is None or source is None or site.name not in _OUT or edit.spec.heads is not None:
        return edit
    if not edit.puts_in or not brings(edit, imagined=masks.imagined):
        return edit
    if not isinstance(source.origin, ColumnOrigin):
        return edit
    before = [own for own in run.edits if own.site < site]
    if site.name == "attn_out" and not (before and all(may_hold(own, site) for own in before)):
        return edit
    name, on_the_way = _OUT[site.name]
    there, passed = Site(site.layer, name), {site, *(Site(site.layer, own) for own in on_the_way)}
    absent = anatomy.layout.absent
    is_gated = site.name == "mlp.pre" and str(Site(site.layer, "mlp.pre_linear")) not in absent
    if is_gated or str(there) in absent or site.layer in run.blocks.through:
        return edit
    if any(read.site in passed for read in reads):
        return edit
    chosen = masks.of_edit(edit)
    if any(other.site in passed and (chosen & masks.of_edit(other)).any() for other in later):
        return edit
    if site.layer not in anatomy.by_token():
        return edit
    if site.name == "attn_out":
        # What is added to it has to be the image's as well.
        middle = Site(site.layer, "resid_mid")
        if not Ancestry(anatomy, masks, run, [middle]).holds(middle, edit):
            return edit
    return replace(edit, site=there, source=replace(source, site=there))
