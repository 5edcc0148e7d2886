"""Interventions as data: what to change, where, at which tokens and heads.

Every intervention is a frozen pydantic model, told apart by ``op``. Composition is a list of them. A third
party adds one by subclassing :class:`Intervention` with its own ``op`` and decorating the class with
:func:`register_op`; documents, digests and the JSON schema know it from then on.

In the formulas ``h`` is the activation at ``site`` and ``T`` the selected tokens (and heads, and keys).
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import AfterValidator, Field, model_validator

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec.base import Index
from vit_mechinterp.spec.ops import Intervention, Source, SourcedIntervention, register_op
from vit_mechinterp.spec.tensors import TensorRef
from vit_mechinterp.spec.tokens import Column

__all__ = ["Ablate", "AddDirection", "InjectSubspace", "Interchange"]

Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False), AfterValidator(lambda value: value + 0.0)]
# Adding 0.0 turns -0.0 into 0.0, so that equal values have equal digests.


@register_op
class Interchange(SourcedIntervention):
    """``h[T] <- h_src[T_src]``: put the activation of another image, or of another run, in place of this one.

    ``source`` is an image column of the data or ``{"run": name}``. Tokens are paired by position, so both
    selections need equal counts. ``source_tokens`` and ``source_site`` are the same as ``tokens`` and
    ``site`` if left out.
    """

    op: Literal["interchange"] = "interchange"
    source: Source


@register_op
class AddDirection(Intervention):
    """``h[T] += alpha * v``: add a direction, such as a probe's.

    ``vector`` is ``[d]`` (added at every token), or ``[k, d]`` / ``[k*d]`` for k tokens at once. With
    ``choose`` a leading axis is indexed per example by that column.
    """

    op: Literal["add_direction"] = "add_direction"
    vector: TensorRef
    alpha: Finite = 1.0
    choose: Column | None = None


@register_op
class InjectSubspace(SourcedIntervention):
    """``h[T] += (g * (v - h[T] R)) R^T``: write coordinates into a subspace and leave its complement alone.

    ``basis`` is ``R [d, r]`` with orthonormal columns, ``gate`` is ``g [r]`` in 0..1 (all ones if left out).
    With ``R [k, d, r]`` and ``g [k, r]`` each of exactly k tokens has its own, in the order of the selection
    (not at sites with heads).
    Exactly one of ``source`` (``v = h_src[T_src] R``: interchange in the subspace, as in distributed
    alignment search) and ``vectors`` (``v`` given in rotated coordinates, per example with ``choose``).
    """

    op: Literal["inject_subspace"] = "inject_subspace"
    basis: TensorRef
    gate: TensorRef | None = None
    vectors: TensorRef | None = None
    choose: Column | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.source is None) == (self.vectors is None):
            given = "both" if self.source is not None else "neither"
            raise SpecError(f"InjectSubspace takes exactly one of source and vectors; got {given}.")
        if self.source is None and (self.source_tokens is not None or self.source_site is not None):
            raise SpecError("source_tokens and source_site belong to source, and vectors was given instead.")
        if self.vectors is None and self.choose is not None:
            raise SpecError("choose picks a row of vectors per example, and source was given instead.")
        return self


@register_op
class Ablate(Intervention):
    """Remove information: ``h[T] <- 0``, its mean, or the value of another example.

    ``"mean"`` is the mean over examples per position (with ``pool_tokens`` over the selected tokens too),
    computed over the data or given as ``mean``. ``"resample"`` takes the value of the example that a
    permutation of the whole dataset, seeded with ``seed``, puts in this one's place.
    """

    op: Literal["ablate"] = "ablate"
    method: Literal["zero", "mean", "resample"] = "zero"
    mean: TensorRef | None = None
    pool_tokens: bool = False
    seed: Index = 0

    @model_validator(mode="after")
    def _options_fit_method(self) -> Self:
        if self.method != "mean" and (self.mean is not None or self.pool_tokens):
            raise SpecError(f'mean and pool_tokens belong to method="mean"; method is {self.method!r}.')
        if self.method != "resample" and self.seed != 0:
            raise SpecError(f'seed belongs to method="resample"; method is {self.method!r}.')
        return self
