"""Dictionaries of features (sparse autoencoders): encode and decode, and as an intervention.

A dictionary turns an activation h into features ``f = a((h - shift) W_enc + b_enc)`` and back into
``f W_dec + b_dec`` (Bricken et al. 2023); a is a ReLU, a jump at a threshold, the k largest (Gao et al.
2024), or gated (Rajamanoharan et al. 2024). Some scale h first, and what they rebuild back. An edit moves h
along the feature's row of ``W_dec`` and leaves what the dictionary cannot express alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.binding.features import encoded, scaled
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import EditFeature, TensorRef
from vit_mechinterp.spec.features import Normalization

__all__ = ["Dictionary", "EditFeature"]


@dataclass(frozen=True)
class Dictionary:
    """A dictionary of features.

    Attributes:
        encoder: ``[d, feature]``; decoder: ``[feature, d]``.
        encoder_bias: ``[feature]``; decoder_bias: ``[d]``; zeros where a file has none.
        shift: ``[d]``, taken from the activation before it is encoded; None for nothing.
        threshold: ``[feature]``, of a jump ReLU; k: how many features are kept; None for a plain ReLU.
        gate_bias, gain: ``[feature]``, of a gated dictionary: see `EditFeature`.
        normalize: how activations are scaled before they are read.
        source: where it comes from.
    """

    encoder: Float[Tensor, "d feature"] = field(repr=False)
    decoder: Float[Tensor, "feature d"] = field(repr=False)
    encoder_bias: Float[Tensor, " feature"] = field(repr=False)
    decoder_bias: Float[Tensor, " d"] = field(repr=False)
    shift: Float[Tensor, " d"] | None = field(default=None, repr=False)
    threshold: Float[Tensor, " feature"] | None = field(default=None, repr=False)
    k: int | None = None
    gate_bias: Float[Tensor, " feature"] | None = field(default=None, repr=False)
    gain: Float[Tensor, " feature"] | None = field(default=None, repr=False)
    normalize: Normalization = "none"
    source: str = ""

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.encoder.shape[1]

    @property
    def width(self) -> int:
        """Number of entries of an activation."""
        return self.encoder.shape[0]

    def encode(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch feature"]:
        """Return the features of activations."""
        given = {name: tensor.to(h.device) for name, tensor in self.tensors().items()}
        return encoded(scaled(h.float(), self.normalize)[0], given, self.k)

    def decode(self, features: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch d"]:
        """Return the activations that features stand for, still scaled as `normalize` says."""
        return features @ self.decoder.to(features) + self.decoder_bias.to(features)

    def rebuild(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return what the dictionary makes of activations: encoded, decoded, scaled back."""
        _, mean, scale = scaled(h.float(), self.normalize)
        return self.decode(self.encode(h)) * scale + mean

    def tensors(self) -> dict[str, Tensor]:
        """What `EditFeature` refers to, by name, for ``execute(..., tensors=)``."""
        names = ("encoder", "decoder", "encoder_bias", "shift", "threshold", "gate_bias", "gain")
        held = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    def edit(
        self,
        site: str,
        feature: int,
        *,
        value: float = 0.0,
        method: Literal["set", "add"] = "set",
        tokens: Any = "all",
    ) -> EditFeature:
        """Return the intervention that sets a feature (0 ablates it) or adds to it.

        Raises:
            SpecError: there is no such feature.
        """
        self.check_features([feature])
        refs = {name: TensorRef(name=name) for name in self.tensors()}
        given: dict[str, Any] = {**refs, "site": site, "tokens": tokens, "k": self.k}
        given["normalize"] = self.normalize
        return EditFeature(feature=feature, value=value, method=method, **given)

    def check_features(self, features: Sequence[int]) -> None:
        """Raise SpecError if there is no such feature."""
        for feature in features:
            if not 0 <= feature < self.n_features:
                raise SpecError(
                    f"Feature {feature} is out of range; the dictionary has features 0 to "
                    f"{self.n_features - 1}."
                )

    def check_site(self, vit: HookedViT, site: str) -> str:
        """Return the canonical name of a site that the dictionary fits.

        Raises:
            SpecError: there is no such site, or it has another width.
        """
        (name,) = vit.expand([site])
        shape = vit.sites()[name].shape
        if shape[-1] != self.width or len(shape) != 2:
            raise SpecError(
                f"The dictionary is made for activations of {self.width} entries per token; {name} holds "
                f"{shape} per image."
            )
        return name
