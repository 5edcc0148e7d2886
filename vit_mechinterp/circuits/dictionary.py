"""Dictionaries of features (sparse autoencoders): read from safetensors, encode and decode, and as an
intervention.

A dictionary turns an activation h into features ``f = a((h - shift) W_enc + b_enc)`` and back into
``f W_dec + b_dec`` (Bricken et al. 2023); a is a ReLU, a jump at a threshold, or the k largest (Gao et al.
2024). An edit moves h along the feature's row of ``W_dec`` and leaves what the dictionary cannot express
alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.ops import Inputs, register_operator
from vit_mechinterp.errors import DataError, SpecError, TensorFileError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Intervention, TensorRef
from vit_mechinterp.spec.ops import register_op

__all__ = ["Dictionary", "EditFeature", "load_dictionary"]


@register_op
class EditFeature(Intervention):
    """``h[T] += change * W_dec[feature]``: set a feature of a dictionary, or add to it.

    ``"set"`` brings the feature from its present value to ``value`` (0 ablates it), ``"add"`` adds ``value``.
    Everything else of the activation, also what the dictionary reconstructs badly, stays.
    """

    op: Literal["edit_feature"] = "edit_feature"
    encoder: TensorRef
    decoder: TensorRef
    encoder_bias: TensorRef | None = None
    shift: TensorRef | None = None
    threshold: TensorRef | None = None
    k: int | None = None
    feature: int
    method: Literal["set", "add"] = "set"
    value: float = 0.0


@register_operator(EditFeature)
def edit_feature(spec: EditFeature, h: Tensor, inputs: Inputs) -> Tensor:
    """See `EditFeature`."""
    given = {name: tensor.to(h.dtype) for name, tensor in inputs.tensors.items()}
    change: Tensor | float = spec.value
    if spec.method == "set":
        own = _encoded(h, given, spec.k)[..., spec.feature, None]
        change = spec.value - own
    return h + change * given["decoder"][spec.feature]


def _encoded(h: Tensor, given: Mapping[str, Tensor], k: int | None) -> Tensor:
    x = h - given["shift"] if "shift" in given else h
    pre = x @ given["encoder"]
    if "encoder_bias" in given:
        pre = pre + given["encoder_bias"]
    if "threshold" in given:
        return torch.where(pre > given["threshold"], pre, torch.zeros_like(pre)).relu()
    features = pre.relu()
    if k is None:
        return features
    top = features.topk(k, dim=-1)
    return torch.zeros_like(features).scatter(-1, top.indices, top.values)


@dataclass(frozen=True)
class Dictionary:
    """A dictionary of features.

    Attributes:
        encoder: ``[d, feature]``; decoder: ``[feature, d]``.
        encoder_bias: ``[feature]``; decoder_bias: ``[d]``; zeros where a file has none.
        shift: ``[d]``, taken from the activation before it is encoded; None for nothing.
        threshold: ``[feature]``, of a jump ReLU; k: how many features are kept; None for a plain ReLU.
        source: where it comes from.
    """

    encoder: Float[Tensor, "d feature"] = field(repr=False)
    decoder: Float[Tensor, "feature d"] = field(repr=False)
    encoder_bias: Float[Tensor, " feature"] = field(repr=False)
    decoder_bias: Float[Tensor, " d"] = field(repr=False)
    shift: Float[Tensor, " d"] | None = field(default=None, repr=False)
    threshold: Float[Tensor, " feature"] | None = field(default=None, repr=False)
    k: int | None = None
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
        return _encoded(h.float(), given, self.k)

    def decode(self, features: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch d"]:
        """Return the activations that features stand for."""
        return features @ self.decoder.to(features) + self.decoder_bias.to(features)

    def tensors(self) -> dict[str, Tensor]:
        """What `EditFeature` refers to, by name, for ``execute(..., tensors=)``."""
        found = {"encoder": self.encoder, "decoder": self.decoder, "encoder_bias": self.encoder_bias}
        if self.shift is not None:
            found["shift"] = self.shift
        if self.threshold is not None:
            found["threshold"] = self.threshold
        return found

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


_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".pickle")
_NAMES = {
    "encoder": ("W_enc", "encoder.weight", "enc.weight", "encoder"),
    "decoder": ("W_dec", "decoder.weight", "dec.weight", "decoder"),
    "encoder_bias": ("b_enc", "encoder.bias", "enc.bias", "encoder_bias"),
    "decoder_bias": ("b_dec", "decoder.bias", "dec.bias", "decoder_bias", "pre_bias", "bias"),
    "threshold": ("threshold", "log_threshold"),
}


def load_dictionary(
    path: str | Path,
    *,
    k: int | None = None,
    subtract_decoder_bias: bool | None = None,
    prefix: str = "",
) -> Dictionary:
    """Read a dictionary from a safetensors file, or from a folder with one.

    Args:
        path: the file, or a folder with one such file and perhaps a ``cfg.json`` or ``config.json``.
        k: keep the k largest features; by default what the folder's configuration says.
        subtract_decoder_bias: whether activations are encoded after ``b_dec`` was taken from them; by default
            what the configuration says (``apply_b_dec_to_input``), and yes where it says nothing.
        prefix: of the keys, where a file holds several dictionaries.

    Keys are those of SAELens and of the public ViT dictionaries: ``W_enc, b_enc, W_dec, b_dec``,
    ``encoder.weight``, ..., ``threshold`` or ``log_threshold`` for a jump ReLU. Matrices may lie either way
    round; the biases tell.

    Raises:
        TensorFileError: there is no such file, it is a pickle, or it is not readable.
        DataError: it lacks a matrix, or the shapes do not fit each other.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    file = path
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            raise TensorFileError(f"{path} holds {len(found)} safetensors files; give the path of one.")
        file = found[0]
    if file.suffix in _PICKLES:
        raise TensorFileError(
            f"{file} is a pickle, which can run code when it is read. Convert it once, where you trust it: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'dictionary.safetensors')."
        )
    try:
        held = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TensorFileError(f"{file} is no readable safetensors file: {error}.") from None
    config = _config(file.parent)
    parts: dict[str, Tensor] = {}
    for part, names in _NAMES.items():
        key = next((prefix + name for name in names if prefix + name in held), None)
        if key is not None:
            parts[part] = held[key].float().exp() if key.endswith("log_threshold") else held[key].float()
    if lacking := [part for part in ("encoder", "decoder") if part not in parts]:
        raise DataError(
            f"{file} has no {' and no '.join(lacking)} ({', '.join(_NAMES[lacking[0]])}). It holds: "
            f"{', '.join(held)}."
        )
    encoder, decoder = _oriented(parts, str(file))
    d, n = encoder.shape
    bias = parts.get("decoder_bias", torch.zeros(d))
    if subtract_decoder_bias is None:
        subtract_decoder_bias = bool(config.get("apply_b_dec_to_input", True))
    if str(config.get("normalize_activations") or "none") != "none":
        raise DataError(
            f"{file}: the dictionary was made for activations scaled by "
            f"{config['normalize_activations']!r}, which "
            "is not read here. Fold the scale into its weights first."
        )
    k = k if k is not None else config.get("k") or config.get("top_k")
    if k is not None and not 1 <= int(k) <= n:
        raise DataError(f"{file}: k={k} must lie between 1 and the number of features, {n}.")
    return Dictionary(
        encoder,
        decoder,
        parts.get("encoder_bias", torch.zeros(n)),
        bias,
        shift=bias if subtract_decoder_bias and "decoder_bias" in parts else None,
        threshold=parts.get("threshold"),
        k=None if k is None else int(k),
        source=file.name,
    )


def _oriented(parts: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """Bring both matrices into the form ``[d, feature]`` and ``[feature, d]``."""
    encoder, decoder = parts["encoder"], parts["decoder"]
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
    if encoder.ndim != 2 or decoder.ndim != 2:
        raise DataError(f"{where}: the matrices of a dictionary have two axes; it has {shapes}.")
    # A dictionary of fewer features than entries is rare enough to need its biases to be seen.
    n = len(parts["encoder_bias"]) if "encoder_bias" in parts else max(encoder.shape)
    if encoder.shape[1] != n or ("decoder_bias" in parts and encoder.shape[0] != len(parts["decoder_bias"])):
        encoder = encoder.T.contiguous()
    if decoder.shape[0] != n or (encoder.shape[0] != decoder.shape[1]):
        decoder = decoder.T.contiguous()
    lengths = {"encoder_bias": n, "threshold": n, "decoder_bias": encoder.shape[0]}
    fits = encoder.shape[1] == n and decoder.shape == encoder.T.shape
    if not fits or any(
        tuple(parts[name].shape) != (size,) for name, size in lengths.items() if name in parts
    ):
        raise DataError(f"{where}: these shapes make no dictionary: {shapes}.")
    return encoder, decoder


def _config(folder: Path) -> dict[str, Any]:
    for name in ("cfg.json", "config.json"):
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{folder / name} is not valid JSON ({error}).") from None
            return content if isinstance(content, dict) else {}
    return {}
