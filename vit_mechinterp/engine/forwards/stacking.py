"""Interventions of several runs at one site, carried out as one: one gather, one operation, one write.

Rows of many runs share a growing batch, and most of their interventions differ only in what they read:
another source, another strength, another subspace. Taken one by one, each would build its own indices and
launch its own small kernels (and in a training copy the activation's gradient), which with few examples per
run costs as much as a block of a small model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import Edit
from vit_mechinterp.engine.binding.ops import (
    Inputs,
    ablate,
    add_direction,
    apply,
    inject_subspace,
    interchange,
    operator_of,
)
from vit_mechinterp.engine.binding.positions import Positions
from vit_mechinterp.engine.binding.values import by_token
from vit_mechinterp.engine.forwards.editing import Material, inputs_of
from vit_mechinterp.spec import Ablate, AddDirection

__all__ = ["Placed", "edit_stack", "stacked"]


@dataclass(frozen=True, slots=True)
class Placed:
    """One intervention on the rows of one segment.

    Args:
        segment: number of the segment.
        place: the intervention's place among those of its run.
        edit: the intervention.
        rows: the segment's rows in the batch.
        examples: the example of every row.
        material: what the rows read.
    """

    segment: int
    place: int
    edit: Edit
    rows: slice
    examples: tuple[int, ...]
    material: Material


def stacked(edits: Sequence[Placed], value: Tensor) -> list[list[Placed]]:
    """Interventions at one site in groups that can be carried out as one; the order within a segment stays.

    Args:
        edits: segment by segment, each segment's in the order in which they act.
        value: the activation that they edit.
    """
    groups: dict[tuple[int, tuple[object, ...]], list[Placed]] = defaultdict(list)
    before: dict[int, int] = defaultdict(int)
    for own in edits:
        rank = before[own.segment]
        before[own.segment] += 1
        groups[rank, _kind(own, value) or ("alone", own.segment, own.place)].append(own)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def _kind(own: Placed, value: Tensor) -> tuple[object, ...]:
    """What interventions must have in common; empty for one that stands alone."""
    edit, spec = own.edit, own.edit.spec
    if edit.positions.is_all or not edit.keys.is_all or edit.carries is not None:
        return ()
    operator = operator_of(spec)
    if operator is interchange:
        return operator, spec.heads
    if operator is ablate and isinstance(spec, Ablate):
        return operator, spec.heads, spec.method == "zero"
    if spec.heads is not None or value.ndim != 3:
        return ()
    if not (operator is add_direction and isinstance(spec, AddDirection)) and not (
        operator is inject_subspace and edit.source is not None
    ):
        return ()
    given = ((field, own.material.tensors[ref]) for field, ref in edit.refs)
    tensors = tuple((field, tuple(tensor.shape), tensor.dtype) for field, tensor in given)
    return operator, _n_tokens(edit.positions, own.examples), tensors


def _n_tokens(positions: Positions, examples: Sequence[int]) -> int:
    if positions.each is None:
        return len(positions.shared or ()) * len(examples)
    return int(positions.counts(examples, 0).sum())


def edit_stack(value: Tensor, group: Sequence[Placed]) -> None:
    """Carry out a group that `stacked` made on an activation that is ours to write."""
    first = group[0].edit
    view = by_token(first.site, value)
    where, ordinals = _selected(group, value.device)
    h = view[where]
    inputs = [
        inputs_of(own.edit, own.examples, own.edit.positions.counts(own.examples, 0), ordinal, own.material)
        for own, ordinal in zip(group, ordinals, strict=True)
    ]
    operator = operator_of(first.spec)
    if operator in (interchange, ablate):
        new = _replaced(h, group, inputs)
    else:
        by_run = h.view(len(group), -1, h.shape[-1])
        moved = _directions_added if operator is add_direction else _subspaces_injected
        new = moved(by_run, group, inputs).flatten(0, 1)
    view[where] = new


def _selected(
    group: Sequence[Placed], device: torch.device
) -> tuple[tuple[Tensor, Tensor], Sequence[Tensor]]:
    """Rows and positions of all selected tokens, and each intervention's ordinals."""
    known: dict[tuple[int, tuple[int, ...]], tuple[IntArray, IntArray, Tensor]] = {}
    rows: list[IntArray] = []
    positions: list[IntArray] = []
    ordinals: list[Tensor] = []
    for own in group:
        # Runs of a sweep select the same tokens of the same examples.
        key = id(own.edit.positions), own.examples
        if key not in known:
            row, position, ordinal = own.edit.positions.flat(own.examples)
            known[key] = row, position, torch.as_tensor(ordinal, device=device)
        row, position, order = known[key]
        rows.append(row + own.rows.start)
        positions.append(position)
        ordinals.append(order)
    row, position = np.concatenate(rows), np.concatenate(positions)
    return (torch.as_tensor(row, device=device), torch.as_tensor(position, device=device)), ordinals


def _replaced(
    h: Float[Tensor, "m *features"], group: Sequence[Placed], inputs: Sequence[Inputs]
) -> Float[Tensor, "m *features"]:
    """Values of elsewhere, or zeros, put in place."""
    spec = group[0].edit.spec
    selected = h if spec.heads is None else h[:, list(spec.heads)]
    sources = [
        one.source.expand(len(one.ordinal), *selected.shape[1:]) for one in inputs if one.source is not None
    ]
    joined = Inputs(
        ordinal=torch.cat([one.ordinal for one in inputs]), source=torch.cat(sources) if sources else None
    )
    new = apply(spec, selected, joined)
    if spec.heads is None:
        return new
    return h.index_copy(1, torch.as_tensor(spec.heads, device=h.device), new)


def _directions_added(
    h: Float[Tensor, "run m d"], group: Sequence[Placed], inputs: Sequence[Inputs]
) -> Float[Tensor, "run m d"]:
    """Each run's direction, in its strength."""
    wide = torch.promote_types(h.dtype, torch.float32)
    directions = [one.rows_of(one.tensors["vector"].to(wide), h.shape[-1]) for one in inputs]
    specs = [own.edit.spec for own in group]
    alphas = [spec.alpha for spec in specs if isinstance(spec, AddDirection)]
    strength = torch.tensor(alphas, dtype=wide, device=h.device)[:, None, None]
    return (h.to(wide) + strength * torch.stack(directions)).to(h.dtype)


def _subspaces_injected(
    h: Float[Tensor, "run m d"], group: Sequence[Placed], inputs: Sequence[Inputs]
) -> Float[Tensor, "run m d"]:
    """Each run's subspace: their bases stacked, one batched product each."""
    sources = torch.stack([one.source for one in inputs if one.source is not None])
    tensors = {field: torch.stack([one.tensors[field] for one in inputs]) for field in inputs[0].tensors}
    if "gate" in tensors and tensors["gate"].ndim == 2:  # one gate for all tokens
        tensors["gate"] = tensors["gate"][:, None]
    # Ordinals pair given vectors with tokens, and these have sources.
    return apply(group[0].edit.spec, h, Inputs(ordinal=inputs[0].ordinal, source=sources, tensors=tensors))
