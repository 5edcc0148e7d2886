"""Interventions whose difference the residual stream alone carries on, past blocks that are held.

Where attention and MLP of a block are held to the base's own values at every token, all that the block does
to a difference is to add it to what it puts out. So the difference is added behind the last such block, and
no row passes through any of them (path patching, with everything but the stream held).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vit_mechinterp.engine.binding.bound import BoundRun, Edit
from vit_mechinterp.engine.binding.ops import BUILT_IN, operator_of
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.engine.reduction.anatomy import Anatomy
from vit_mechinterp.spec import Site

__all__ = ["carried"]

_ATTENTION, _MLP = ("attn.z", "attn.result", "attn_out"), ("mlp.post", "mlp_out")
"""Where a module is held, if all of its values are put back there."""
_TO_BE_HELD = {
    "resid_pre": (_ATTENTION, _MLP),
    **dict.fromkeys(("attn.z", "attn.result", "attn_out", "resid_mid"), (_MLP,)),
    **dict.fromkeys(("mlp_out", "resid_post"), ()),
}
"""What has to be held of the block of an edit, by its site: what would make something else of its change."""


def carried(
    anatomy: Anatomy, adding_up: Callable[[], frozenset[int]], run: BoundRun, reads: Sequence[Read]
) -> tuple[Edit, ...]:
    """Edits of a run, the first of them behind the last block that only adds its difference up; the same ones
    if there is none.

    Args:
        anatomy: the model's.
        adding_up: blocks that put out the sum of their input and of what attention and MLP add.
        run: the run.
        reads: what is read of its values.
    """
    first = next((edit for edit in run.edits if not _holds(edit, run)), None)
    if first is None or len(run.edits) < 2 or not _is_additive(anatomy, first):
        return run.edits
    others = [edit for edit in run.edits if not _holds(edit, run) and edit is not first]
    held = {edit.site for edit in run.edits if _holds(edit, run) and edit.site >= first.site}
    if any(site.layer == first.site.layer and _is_put_back(first, site) for site in held):
        return run.edits
    own = -1 if first.site.layer is None else first.site.layer
    seen = [edit.site for edit in others] + [read.site for read in reads if read.site >= first.site]
    n_layers = anatomy.layout.n_layers
    end = min((_first_block_behind(site, n_layers) for site in seen), default=n_layers)

    def is_held(layer: int, modules: Sequence[Sequence[str]]) -> bool:
        is_whole = all(any(Site(layer, name) in held for name in module) for module in modules)
        return is_whole and layer not in run.blocks.through and layer in adding_up()

    needs = _TO_BE_HELD[first.site.name] if own >= 0 else ()
    if own >= end or (needs and not is_held(own, needs)):
        return run.edits
    last = own
    while last + 1 < end and is_held(last + 1, (_ATTENTION, _MLP)):
        last += 1
    if last < 0 or (last == own and not needs):
        return run.edits
    behind = Site(last, "resid_post")
    left = (edit for edit in run.edits if edit.site >= behind and edit is not first)
    return (_behind(first, behind, run), *left)


def _first_block_behind(site: Site, n_layers: int) -> int:
    """The first block that runs behind a site."""
    if site.layer is None:
        return 0 if site.name == "embed" else n_layers
    return site.layer + (site.name == "resid_post")


def _holds(edit: Edit, run: BoundRun) -> bool:
    """Whether an edit puts back all that an attention module or an MLP gives for the run's base."""
    source = edit.source
    return (
        edit.site.name in _ATTENTION + _MLP
        and edit.puts_in
        and source is not None
        and (source.origin, source.site, source.heads) == (run.origin, edit.site, None)
        and edit.positions.is_all
        and source.positions.is_all
    )


def _is_put_back(edit: Edit, site: Site) -> bool:
    """Whether nothing is left of an edit where the module that it is in is held."""
    return any({edit.site.name, site.name} <= set(module) for module in (_ATTENTION, _MLP))


def _is_additive(anatomy: Anatomy, edit: Edit) -> bool:
    """Whether the stream is changed by a sum of what an edit changes of its value."""
    if operator_of(edit.spec) not in BUILT_IN or not edit.keys.is_all:
        return False
    if edit.site.name == "attn.z":
        # What heads add to the stream is linear in their z, if it is known by heads at all.
        return f"blocks.{edit.site.layer}.attn.result" not in anatomy.layout.absent
    return edit.site.name == "embed" or edit.site.name in _TO_BE_HELD


def _behind(edit: Edit, site: Site, run: BoundRun) -> Edit:
    """An edit whose difference is added at a site."""
    carries = Read(run.origin, edit.site, edit.positions, edit.spec.heads)
    return replace(edit, site=site, carries=carries)
