"""Subspaces of several runs at one site, injected as one: their bases stacked, one batched product each.

Trainings of several subspaces at one site (seeds, attributes, controls) differ in their tensors alone. Taken
one by one, each would copy the activation's gradient and launch its own small products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.bound import Edit
from vit_mechinterp.engine.editing import Material, inputs_of
from vit_mechinterp.engine.ops import Inputs, apply
from vit_mechinterp.spec import InjectSubspace

__all__ = ["Placed", "edit_stack", "stacked"]


@dataclass(frozen=True)
class Placed:
    """One intervention on the rows of one segment.

    Args:
        segment: number of the segment.
        edit: its place among the run's interventions.
        spec: the intervention.
        rows: the segment's rows in the batch.
        examples: the example of every row.
        material: what the rows read.
    """

    segment: int
    edit: int
    spec: Edit
    rows: slice
    examples: Sequence[int]
    material: Material


def stacked(edits: Sequence[Placed], value: Tensor) -> list[list[Placed]]:
    """Interventions at one site in groups that can be carried out as one; the order within a segment stays.

    Args:
        edits: segment by segment, each segment's in the order in which they act.
        value: the activation that they edit.
    """
    groups: dict[tuple[object, ...], list[Placed]] = defaultdict(list)
    before: dict[int, int] = defaultdict(int)
    for own in edits:
        rank = before[own.segment]
        before[own.segment] += 1
        kind = _kind(own) if value.ndim == 3 else ()
        groups[(rank, *kind) if kind else (rank, own.segment, own.edit, "alone")].append(own)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]  # type: ignore[arg-type,return-value]


def _kind(own: Placed) -> tuple[object, ...]:
    """What interventions must have in common; empty for one that stands alone."""
    edit = own.spec
    if type(edit.spec) is not InjectSubspace or edit.source is None or edit.positions.is_all:
        return ()
    if edit.spec.heads is not None or not edit.keys.is_all:
        return ()
    tokens = int(edit.positions.counts(own.examples, 0).sum())
    tensors = tuple(
        (field, tuple(tensor.shape), tensor.dtype)
        for field, ref in edit.refs
        for tensor in (own.material.tensors[ref],)
    )
    return tokens, tensors


def edit_stack(value: Tensor, group: Sequence[Placed]) -> None:
    """Inject the subspaces of a group that `stacked` made into an activation that is ours to write."""
    device = value.device
    flat = [own.spec.positions.flat(own.examples) for own in group]
    row = np.concatenate([rows + own.rows.start for own, (rows, _, _) in zip(group, flat, strict=True)])
    position = np.concatenate([positions for _, positions, _ in flat])
    where = torch.as_tensor(row, device=device), torch.as_tensor(position, device=device)
    h = value[where]
    h = h.view(len(group), -1, h.shape[-1])
    inputs = [
        inputs_of(
            own.spec, own.examples, own.spec.positions.counts(own.examples, 0),
            torch.as_tensor(order, device=device), own.material,
        )
        for own, (_, _, order) in zip(group, flat, strict=True)
    ]  # fmt: skip
    sources = torch.stack([one.source for one in inputs if one.source is not None])
    tensors = {field: torch.stack([one.tensors[field] for one in inputs]) for field in inputs[0].tensors}
    if "gate" in tensors and tensors["gate"].ndim == 2:  # one gate for all tokens
        tensors["gate"] = tensors["gate"][:, None]
    new = apply(group[0].spec.spec, h, Inputs(ordinal=inputs[0].ordinal, source=sources, tensors=tensors))
    value[where] = new.flatten(0, 1)
