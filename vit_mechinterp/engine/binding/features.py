"""Features of dictionaries: what they are on an activation, and the operator that edits one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.binding.ops import Inputs, register_operator
from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec.features import EditFeature, Normalization

__all__ = ["check_feature", "encoded", "scaled"]

_EPS = 1e-5


def scaled(
    h: Float[Tensor, "*batch d"], normalize: Normalization
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
    """Return activations as a dictionary reads them, and the mean and the scale that bring them back.

    ``"layer_norm"`` takes the mean and the standard deviation over entries away, ``"constant_norm_rescale"``
    brings the length to the square root of the width; both as in SAELens.
    """
    mean, scale = torch.zeros_like(h[..., :1]), torch.ones_like(h[..., :1])
    if normalize == "layer_norm":
        mean, scale = h.mean(dim=-1, keepdim=True), h.std(dim=-1, keepdim=True)
        return (h - mean) / (scale + _EPS), mean, scale
    if normalize == "constant_norm_rescale":
        scale = h.norm(dim=-1, keepdim=True) / h.shape[-1] ** 0.5
        return h / scale.clamp(min=torch.finfo(h.dtype).tiny), mean, scale
    return h, mean, scale


def encoded(
    x: Float[Tensor, "*batch d"], given: Mapping[str, Tensor], k: int | None = None
) -> Float[Tensor, "*batch feature"]:
    """Return the features of scaled activations; ``given`` holds the tensors by `EditFeature`'s names."""
    raw = (x - given["shift"] if "shift" in given else x) @ given["encoder"]
    pre = raw * given["gain"] if "gain" in given else raw
    if "encoder_bias" in given:
        pre = pre + given["encoder_bias"]
    features = pre.relu()
    if "gate_bias" in given:
        return features * (raw + given["gate_bias"] > 0)
    if "threshold" in given:
        return torch.where(pre > given["threshold"], features, torch.zeros_like(pre))
    if k is None:
        return features
    top = features.topk(k, dim=-1)
    return torch.zeros_like(features).scatter(-1, top.indices, top.values)


@register_operator(EditFeature, by_token=True)
def edit_feature(spec: EditFeature, h: Tensor, inputs: Inputs) -> Tensor:
    """See `EditFeature`."""
    given = {name: tensor.to(h.dtype) for name, tensor in inputs.tensors.items()}
    x, _, scale = scaled(h, spec.normalize)
    change: Tensor | float = spec.value
    if spec.method == "set":
        change = spec.value - encoded(x, given, spec.k)[..., spec.feature, None]
    return h + change * scale * given["decoder"][spec.feature]


def check_feature(spec: EditFeature, tensors: Mapping[str, Tensor], d: int, where: str) -> None:
    """Raise SpecError unless the tensors make a dictionary for activations of width d with that feature."""
    encoder = tensors["encoder"]
    if encoder.ndim != 2 or encoder.shape[0] != d:
        raise SpecError(
            f"{where}: encoder has shape {tuple(encoder.shape)}; the site holds {d} features, so "
            f"[{d}, n] fits."
        )
    n = encoder.shape[1]
    wanted = {"decoder": (n, d), "shift": (d,)}
    for name, tensor in tensors.items():
        fits = wanted.get(name, (d, n) if name == "encoder" else (n,))
        if tuple(tensor.shape) != fits:
            raise SpecError(
                f"{where}: {name} has shape {tuple(tensor.shape)}; the encoder is [{d}, {n}], so "
                f"{list(fits)} fits."
            )
    if spec.feature >= n or (spec.k or 1) > n:
        raise SpecError(
            f"{where}: feature {spec.feature} and k={spec.k} must lie within the dictionary's {n} features."
        )
