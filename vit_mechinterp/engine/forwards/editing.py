"""One intervention on rows of an activation: what is selected, what it reads, and where it is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.arrays import NONE, IntArray
from vit_mechinterp.engine.binding.bound import Bound, Edit
from vit_mechinterp.engine.binding.ops import Inputs, apply
from vit_mechinterp.engine.binding.values import ImagesOf, Read, Values, by_token
from vit_mechinterp.engine.forwards.clean import Clean
from vit_mechinterp.engine.forwards.handover import Handover
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.spec import Ablate, TensorRef

__all__ = ["Material", "edit_rows", "inputs_of"]


@dataclass
class Material:
    """Everything that waves read: clean values, values of earlier runs, dataset means, and given tensors.

    Args:
        bound: the bound runs.
        clean: what the clean forwards gave.
        tensors: the given tensors by reference.
        means: dataset means by read.
        run_values: values of edited runs by read.
        source_order: for training, a permutation of every source selection's tokens (paper A.6).
        images_of: numbers of the images that rows start from; rows of one image start from the same values.
        handover: what rows hand to each other.
        write: what heads of a block add to the stream for their z (see `written_by_heads`).
    """

    bound: Bound
    clean: Clean
    tensors: Mapping[TensorRef, Tensor]
    means: Mapping[Read, Tensor] = field(default_factory=dict)
    run_values: dict[Read, Values] = field(default_factory=dict)
    source_order: Sequence[int] | None = None
    images_of: ImagesOf = lambda origin: NONE
    handover: Handover = field(default_factory=Handover)
    write: Callable[[int, Tensor, Sequence[int] | None], Tensor] | None = None

    def values(self, read: Read) -> Values:
        """The values of a read, clean or from an earlier run."""
        return self.run_values[read] if read in self.run_values else self.clean.values[read]


def edit_rows(value: Tensor, rows: slice, edit: Edit, examples: Sequence[int], material: Material) -> None:
    """Apply one intervention to some rows of an activation that is ours to write.

    Raises:
        ExecutionError: the operator returned something of another shape.
    """
    if edit.carries is not None:
        _add_carried(value, rows, examples, edit, material)
        return
    view = by_token(edit.site, value)
    chosen = _chosen(edit, rows, examples, view)
    region = view[chosen.index]
    is_row_by_row = edit.positions.is_all and edit.site.has_tokens
    h = region.flatten(0, 1) if is_row_by_row else region
    if edit.positions.is_all and torch.is_grad_enabled():
        h = h.clone()  # the operator's gradient may need its input, which is about to be written over
    heads = None if edit.spec.heads is None else torch.as_tensor(edit.spec.heads, device=value.device)
    selected = h if heads is None else h[:, heads]
    # What the mask leaves alone must survive an operator that writes into its argument.
    given = selected if edit.keys.is_all else selected.clone()
    new = apply(edit.spec, given, inputs_of(edit, examples, chosen.counts, chosen.ordinal, material))
    if new.shape != selected.shape:
        raise ExecutionError(
            f"{edit.where}: the operator returned {tuple(new.shape)} for {tuple(selected.shape)}."
        )
    if not edit.keys.is_all:
        mask = _key_mask(edit, examples, chosen.counts, view.shape[-1], value.device)
        new = torch.where(mask, new, selected)
    if heads is not None:
        new = h.index_copy(1, heads, new)
    view[chosen.index] = new.reshape(region.shape)


def _add_carried(value: Tensor, rows: slice, examples: Sequence[int], edit: Edit, material: Material) -> None:
    """Add what an edit changes of a value of its base's clean forward, over all heads, at another site."""
    assert edit.carries is not None
    given = material.values(edit.carries).rows(examples)
    chosen = _chosen(edit, rows, examples, value)
    change = (
        apply(edit.spec, given, inputs_of(edit, examples, chosen.counts, chosen.ordinal, material)) - given
    )
    if edit.carries.site.name == "attn.z":
        assert material.write is not None
        assert edit.carries.site.layer is not None
        change = material.write(edit.carries.site.layer, change, edit.carries.heads)
    elif change.ndim == 3:
        change = change.sum(dim=1)
    value[chosen.index] += change.to(value.dtype).reshape(value[chosen.index].shape)


@dataclass(frozen=True)
class _Chosen:
    """The tokens that an edit selects in some rows of an activation ``[row, token, *features]``.

    Args:
        index: where they stand: whole rows, or the row and the position of every token.
        counts: their number in every row.
        ordinal: of every token its place within its row's selection.
    """

    index: slice | tuple[Tensor, Tensor]
    counts: IntArray
    ordinal: Tensor


def _chosen(edit: Edit, rows: slice, examples: Sequence[int], view: Tensor) -> _Chosen:
    device = view.device
    if edit.positions.is_all:
        tokens = view.shape[1] if edit.site.has_tokens else 1
        ordinal = torch.arange(tokens, device=device).repeat(len(examples))
        return _Chosen(rows, np.full(len(examples), tokens), ordinal)
    own = edit.positions.flat(examples)
    row, position, ordinal = (torch.as_tensor(numbers, device=device) for numbers in own)
    return _Chosen((row + rows.start, position), edit.positions.counts(examples, 0), ordinal)


def inputs_of(
    edit: Edit, examples: Sequence[int], counts: IntArray, ordinal: Tensor, material: Material
) -> Inputs:
    """What an intervention reads besides the activation, for the selected tokens of some examples."""
    device = ordinal.device
    tensors = {field: material.tensors[ref] for field, ref in edit.refs}
    choice = None
    if edit.choice is not None:
        numbers = edit.choices[np.asarray(examples)]
        choice = torch.as_tensor(np.repeat(numbers, counts), device=device)
    source: Tensor | None = None
    if edit.source is not None:
        values = material.values(edit.source)
        source = values.rows(examples, tokens=edit.source.site.has_tokens)
        if material.source_order is not None:
            source = source[_reordered(counts, material.source_order, device)]
    elif isinstance(edit.spec, Ablate) and edit.spec.method == "mean":
        source = _mean(edit, edit.spec, examples, device, material)
    return Inputs(ordinal=ordinal, source=source, tensors=tensors, choice=choice)


def _mean(
    edit: Edit, spec: Ablate, examples: Sequence[int], device: torch.device, material: Material
) -> Tensor:
    """The mean to put in place, paired with the selected tokens: ``[m or 1, *features]``."""
    pooled = spec.pool_tokens or not edit.site.has_tokens
    given = edit.mean is None
    mean = (
        _given_mean(edit, material, pooled=pooled) if given else _dataset_mean(edit, material, pooled=pooled)
    )
    if pooled:
        return mean[None]
    if edit.positions.is_all:
        return mean.repeat(len(examples), *([1] * (mean.ndim - 1)))
    _, position, _ = edit.positions.flat(examples)
    return mean[torch.as_tensor(position, device=device)]


def _given_mean(edit: Edit, material: Material, *, pooled: bool) -> Tensor:
    """The mean that an ablation names, the only tensor it has: ``[token, *features]``, or of all tokens."""
    ((_, ref),) = edit.refs
    mean = material.tensors[ref]
    if edit.site.is_attention_matrix and not pooled:
        mean = mean.transpose(0, 1)
    return mean if edit.spec.heads is None else mean[..., list(edit.spec.heads), :]


def _dataset_mean(edit: Edit, material: Material, *, pooled: bool) -> Tensor:
    """The mean over the dataset: ``[token, *features]``, or of all tokens."""
    assert edit.mean is not None
    mean = material.means[edit.mean]
    over_tokens = pooled and edit.site.has_tokens and edit.mean.positions.is_all
    return mean.mean(dim=0) if over_tokens else mean


def _reordered(counts: IntArray, order: Sequence[int], device: torch.device) -> Tensor:
    """Rows of every example's selection in one order; an example of few tokens leaves out those it lacks."""
    sizes = counts.tolist()
    within = {size: np.array([k for k in order if k < size], dtype=np.int64) for size in set(sizes)}
    starts = np.cumsum([0, *sizes[:-1]])
    rows = [start + within[size] for start, size in zip(starts, sizes, strict=True)]
    return torch.as_tensor(np.concatenate(rows), device=device)


def _key_mask(
    edit: Edit, examples: Sequence[int], counts: IntArray, n_keys: int, device: torch.device
) -> Tensor:
    """Which keys are meant, ``[m, 1, key]``."""
    mask = torch.zeros(len(examples), n_keys, dtype=torch.bool)
    row, position, _ = edit.keys.flat(examples)
    mask[torch.as_tensor(row), torch.as_tensor(position)] = True
    return mask.repeat_interleave(torch.as_tensor(counts), dim=0)[:, None, :].to(device)
