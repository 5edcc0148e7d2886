"""Features of a dictionary (sparse autoencoder) as an intervention."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vit_mechinterp.spec.base import Index
from vit_mechinterp.spec.interventions import Finite
from vit_mechinterp.spec.ops import Intervention, register_op
from vit_mechinterp.spec.tensors import TensorRef

__all__ = ["EditFeature", "Normalization"]

Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]
"""How a dictionary scales activations before it reads them; what it writes is scaled back."""


@register_op
class EditFeature(Intervention):
    """``h[T] += change * scale * W_dec[feature]``: set a feature of a dictionary, or add to it.

    ``"set"`` brings the feature from its present value to ``value`` (0 ablates it), ``"add"`` adds ``value``.
    Everything else of the activation, also what the dictionary reconstructs badly, stays.

    The feature's value is ``a((x - shift) W_enc + b_enc)``, where x is h, scaled as ``normalize`` says (the
    scale is held while the feature changes), and a is a ReLU: of what exceeds ``threshold``, of the ``k``
    largest, or, with ``gate_bias``, of ``(x - shift) W_enc * gain + b_enc`` where
    ``(x - shift) W_enc + gate_bias`` is positive.
    """

    op: Literal["edit_feature"] = "edit_feature"
    encoder: TensorRef
    decoder: TensorRef
    encoder_bias: TensorRef | None = None
    shift: TensorRef | None = None
    threshold: TensorRef | None = None
    gate_bias: TensorRef | None = None
    gain: TensorRef | None = None
    k: Annotated[int, Field(ge=1)] | None = None
    normalize: Normalization = "none"
    feature: Index
    method: Literal["set", "add"] = "set"
    value: Finite = 0.0
