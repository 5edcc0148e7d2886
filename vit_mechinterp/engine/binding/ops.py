"""What each intervention does, as one pure tensor function.

A function is given the activation at the selected tokens, ``h [m, *features]`` with one row per selected
token (of any example), and `Inputs` paired with it row by row; it returns the new rows. Functions are found
by the type of the spec; a third party adds one with `register_operator`. The functions of this module may be
given tokens of several runs at once, and `inject_subspace` also subspaces of several runs, stacked in front.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec import Ablate, AddDirection, InjectSubspace, Interchange, Intervention

__all__ = [
    "Inputs",
    "Operator",
    "ablate",
    "acts_by_token",
    "add_direction",
    "apply",
    "inject_subspace",
    "interchange",
    "operator_of",
    "register_operator",
]


@dataclass(frozen=True)
class Inputs:
    """What an intervention reads besides the activation, paired with it row by row.

    Args:
        source: the source activation at the paired tokens, ``[m, *features]``, or None.
        tensors: the spec's tensors by field name, on the activation's device.
        ordinal: each row's place within its example's selection, ``[m]``.
        choice: each row's value of the ``choose`` column, ``[m]``, or None.
    """

    ordinal: Int[Tensor, " m"]
    source: Float[Tensor, "m *features"] | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    choice: Int[Tensor, " m"] | None = None

    def rows_of(self, tensor: Tensor, n_features: int) -> Tensor:
        """Pair a given tensor with the rows: ``[d]``, ``[k, d]`` or ``[k * d]``, behind a leading axis if
        chosen.

        ``n_features`` is d. Returns ``[m, d]`` or ``[1, d]``.
        """
        chosen = tensor if self.choice is None else tensor[self.choice]
        leading = 0 if self.choice is None else 1
        if chosen.ndim == leading + 1 and chosen.shape[-1] != n_features:
            chosen = chosen.reshape(*chosen.shape[:-1], -1, n_features)
        if chosen.ndim == leading + 1:
            return chosen if leading else chosen[None]
        if self.choice is None:
            return chosen[self.ordinal]
        return chosen[torch.arange(len(self.ordinal), device=chosen.device), self.ordinal]


Operator = Callable[[Any, Tensor, Inputs], Tensor]

_OPERATORS: dict[type[Intervention], Operator] = {}
_BY_TOKEN: set[type[Intervention]] = set()


def register_operator(
    spec_type: type[Intervention], *, by_token: bool = False
) -> Callable[[Operator], Operator]:
    """Decorator: let the engine carry out interventions of ``spec_type`` with the function.

    The function is ``(spec, h [m, *features], inputs) -> [m, *features]`` and is pure. A field ``source``
    (with ``source_tokens`` and ``source_site``), fields that hold a `TensorRef`, and ``choose`` are resolved
    into `Inputs`. Interventions of equal fields at one site that select the same, in whatever words, and read
    the same are one to the engine, so the function looks at no selector itself.

    Args:
        spec_type: the spec.
        by_token: whether each row that the function returns depends on that row of ``h`` and of the inputs
            alone. Then tokens that nobody reads behind the last attention call need not be computed for it.
            (An intervention that changes nothing that is read is left out in either case.)
    """

    def decorate(operator: Operator) -> Operator:
        _OPERATORS[spec_type] = operator
        (_BY_TOKEN.add if by_token else _BY_TOKEN.discard)(spec_type)
        return operator

    return decorate


def acts_by_token(spec: Intervention) -> bool:
    """Whether what an intervention makes of a token depends on no other token's activation."""
    return type(spec) in _BY_TOKEN


def apply(
    spec: Intervention, h: Float[Tensor, "m *features"], inputs: Inputs
) -> Float[Tensor, "m *features"]:
    """Carry out one intervention in float32 (or the activation's dtype, if wider) and cast back.

    Raises:
        SpecError: no operator is registered for the type of ``spec``.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    return operator_of(spec)(spec, h.to(wide), inputs).to(h.dtype)


def operator_of(spec: Intervention) -> Operator:
    """The function registered for the type of ``spec``.

    Raises:
        SpecError: there is none; the known types are named.
    """
    operator = _OPERATORS.get(type(spec))
    if operator is None:
        known = ", ".join(sorted(t.__name__ for t in _OPERATORS))
        raise SpecError(
            f"The engine has no operator for {type(spec).__name__} (op {spec.op!r}). Known: {known}. "
            "Add one with vit_mechinterp.engine.register_operator."
        )
    return operator


def _per_feature(rows: Tensor, h: Tensor) -> Tensor:
    """Give ``[m, d]`` a head axis where ``h`` has one."""
    return rows[:, None, :] if h.ndim == 3 else rows


@register_operator(Interchange, by_token=True)
def interchange(spec: Interchange, h: Tensor, inputs: Inputs) -> Tensor:
    """``h[T] <- h_src[T_src]``."""
    assert inputs.source is not None
    return inputs.source.to(h.dtype)


@register_operator(AddDirection, by_token=True)
def add_direction(spec: AddDirection, h: Tensor, inputs: Inputs) -> Tensor:
    """``h[T] += alpha * v``."""
    direction = inputs.rows_of(inputs.tensors["vector"].to(h.dtype), h.shape[-1])
    return h + spec.alpha * _per_feature(direction, h)


@register_operator(InjectSubspace, by_token=True)
def inject_subspace(spec: InjectSubspace, h: Tensor, inputs: Inputs) -> Tensor:
    """``h[T] += (g * (v - h[T] R)) R^T``."""
    basis = inputs.tensors["basis"].to(h.dtype)
    if basis.ndim > h.ndim:
        return _inject_by_token(h, basis, inputs)
    if inputs.source is not None:
        coordinates = inputs.source.to(h.dtype) @ basis
    else:
        coordinates = _per_feature(inputs.rows_of(inputs.tensors["vectors"].to(h.dtype), basis.shape[-1]), h)
    change = coordinates - h @ basis
    if "gate" in inputs.tensors:
        change = inputs.tensors["gate"].to(h.dtype) * change
    return h + change @ basis.transpose(-2, -1)


def _inject_by_token(
    h: Float[Tensor, "*stack m d"], basis: Float[Tensor, "*stack k d r"], inputs: Inputs
) -> Float[Tensor, "*stack m d"]:
    """`inject_subspace` with a basis for each token; rows come example by example, k tokens of each."""
    k = basis.shape[-3]

    def by_token(rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:-2], -1, k, rows.shape[-1]).transpose(-3, -2)

    if inputs.source is not None:
        coordinates = by_token(inputs.source.to(h.dtype)) @ basis
    else:
        given = inputs.rows_of(inputs.tensors["vectors"].to(h.dtype), basis.shape[-1])
        coordinates = by_token(given.expand(len(h), -1))
    change = coordinates - by_token(h) @ basis
    if "gate" in inputs.tensors:
        change = inputs.tensors["gate"].to(h.dtype)[..., None, :] * change
    return h + (change @ basis.transpose(-2, -1)).transpose(-3, -2).flatten(-3, -2)


@register_operator(Ablate, by_token=True)
def ablate(spec: Ablate, h: Tensor, inputs: Inputs) -> Tensor:
    """``h[T] <- 0``, its mean, or another example's value."""
    if spec.method == "zero":
        return torch.zeros_like(h)
    assert inputs.source is not None
    return inputs.source.to(h.dtype).expand_as(h)


BUILT_IN = (interchange, ablate, add_direction, inject_subspace)
"""Operators that make nothing of a token or head for another one, in whatever order heads are selected."""
