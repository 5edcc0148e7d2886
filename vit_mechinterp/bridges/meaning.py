"""What interventions mean, written for reading: one example at a time, one line per formula.

The engine does the same to many rows of many runs at once. This is the definition that it is held against.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.binding.bound import Edit
from vit_mechinterp.engine.binding.ops import Inputs, operator_of
from vit_mechinterp.engine.binding.values import Read
from vit_mechinterp.spec import Ablate, AddDirection, InjectSubspace, Interchange, Site

__all__ = ["Origin", "edited", "selected"]


@dataclass(frozen=True)
class Origin:
    """What one edit reads in one batch.

    Args:
        source: the source activation of every example of the batch, in its site's axis order, or None.
        mean: the mean that a mean ablation puts in place, ``[token, *features]`` or ``[*features]``, or None.
        tensors: the spec's own tensors by field.
    """

    source: Tensor | None
    mean: Tensor | None
    tensors: Mapping[str, Tensor]


def selected(site: Site, read: Read, value: Tensor, row: int, example: int) -> Tensor:
    """One example's selected tokens and heads, ``[token, (head,) features]``; ``[1, d]`` without tokens."""
    own = by_token(site, value)[row]
    tokens = read.positions.of(example)
    own = own if tokens is None else own[list(tokens)]
    return own if read.heads is None else own[:, list(read.heads)]


def by_token(site: Site, value: Tensor) -> Tensor:
    """An activation as ``[row, token, (head,) features]``: queries first at attention matrices, one token at
    ``pooled`` and ``logits``."""
    if not site.has_tokens:
        return value[:, None]
    return value.transpose(1, 2) if site.is_attention_matrix else value


def edited(
    edit: Edit, value: Float[Tensor, "row ..."], examples: Sequence[int], origin: Origin
) -> Float[Tensor, "row ..."]:
    """The activation after one edit; what was given is left as it is.

    Args:
        edit: the intervention, with its selectors resolved.
        value: the activation in the site's axis order.
        examples: the example of every row.
        origin: what the edit reads.
    """
    result = value.clone()
    view = by_token(edit.site, result)  # writing to it writes to the result
    read = Read(None, edit.site, edit.positions, edit.spec.heads)  # type: ignore[arg-type]
    for row, example in enumerate(examples):
        h = selected(edit.site, read, result, row, example)
        wide = torch.promote_types(h.dtype, torch.float32)
        new = _new_value(edit, h.to(wide), row, example, origin).to(h.dtype).expand_as(h)
        keys = edit.keys.of(example)
        if keys is not None:
            new = h.clone().index_copy(-1, _index(keys, h), new[..., list(keys)])
        tokens = edit.positions.of(example)
        places = range(len(view[row])) if tokens is None else tokens
        for place, own in zip(places, new, strict=True):
            if edit.spec.heads is None:
                view[row, place] = own
            else:
                view[row, place, list(edit.spec.heads)] = own
    return result


def _new_value(edit: Edit, h: Tensor, row: int, example: int, origin: Origin) -> Tensor:
    """What takes the place of ``h``, the selection of one example: ``[token, (head,) features]``."""
    spec, k = edit.spec, len(h)
    tensors = {name: tensor.to(h.device) for name, tensor in origin.tensors.items()}
    source: Tensor | None = None
    if origin.source is not None and edit.source is not None:
        source = selected(edit.source.site, edit.source, origin.source, row, example).to(h.dtype)
    if isinstance(spec, Interchange):
        assert source is not None
        return source
    if isinstance(spec, AddDirection):
        return h + spec.alpha * _rows(edit, tensors["vector"], h, h.shape[-1], example)
    if isinstance(spec, InjectSubspace):
        basis = tensors["basis"].to(h.dtype)
        gate = tensors["gate"].to(h.dtype) if "gate" in tensors else torch.ones_like(basis[..., 0, :])

        def applied(rows: Tensor, matrix: Tensor) -> Tensor:  # one matrix, or one for each token
            return rows @ matrix if matrix.ndim == 2 else (rows[:, None] @ matrix)[:, 0]

        if source is not None:
            wanted = applied(source, basis)
        else:
            wanted = _rows(edit, tensors["vectors"], h, basis.shape[-1], example)
        return h + applied(gate * (wanted - applied(h, basis)), basis.mT)
    if isinstance(spec, Ablate) and spec.method == "zero":
        return torch.zeros_like(h)
    if isinstance(spec, Ablate) and spec.method == "resample":
        assert source is not None
        return source
    if isinstance(spec, Ablate):
        assert origin.mean is not None
        mean, tokens = origin.mean.to(h), edit.positions.of(example)
        per_token = mean.ndim == h.ndim
        return mean[list(tokens)] if per_token and tokens is not None else mean
    choice = None if edit.choice is None else torch.full((k,), edit.choice[example], device=h.device)
    inputs = Inputs(torch.arange(k, device=h.device), source, tensors, choice)
    return operator_of(spec)(spec, h, inputs)


def _rows(edit: Edit, given: Tensor, h: Tensor, d: int, example: int) -> Tensor:
    """``[d]``, ``[k, d]`` or ``[k * d]`` (behind an axis to choose from) as one row per selected token."""
    own = given if edit.choice is None else given[edit.choice[example]]
    own = own.to(h.dtype)
    rows = own.reshape(-1, d).expand(len(h), d)
    return rows[:, None] if h.ndim == 3 else rows


def _index(places: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(places, device=like.device)
