"""Files of dictionaries: the keys and configurations under which public sparse autoencoders are saved.

Read are the layouts of SAELens and ViT-Prisma (``W_enc``, ..., with gated, jump-ReLU and top-k variants and
scaled activations), of dictionary_learning (``encoder.weight``, ...) and of overcomplete
(``encoder.final_block.0.weight``, ``dictionary._weights``). What would change the numbers without being
understood is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from vit_mechinterp.circuits.dictionary import Dictionary
from vit_mechinterp.errors import DataError, TensorFileError, listed
from vit_mechinterp.spec.features import Normalization

__all__ = ["load_dictionary"]

_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt", ".pickle", ".gz")
_NAMES = {
    "encoder": ("W_enc", "encoder.weight", "enc.weight", "encoder.final_block.0.weight", "encoder"),
    "decoder": (
        "W_dec", "decoder.weight", "dec.weight", "dictionary._weights", "dictionary.dictionary", "decoder",
    ),
    "encoder_bias": (
        "b_enc", "b_mag", "encoder.bias", "enc.bias", "encoder.final_block.0.bias", "encoder_bias",
    ),
    "decoder_bias": ("b_dec", "decoder.bias", "dec.bias", "decoder_bias", "pre_bias", "bias"),
    "threshold": ("threshold", "log_threshold"),
    "gate_bias": ("b_gate",),
    "gain": ("r_mag",),
}  # fmt: skip
_EXPONENTIALS = ("log_threshold", "r_mag")
_TRANSPOSED = ("encoder.weight", "enc.weight", "decoder.weight", "dec.weight", "encoder.final_block.0.weight")
"""Weights of linear layers, which hold outputs first."""
_UNREAD = {
    "b_dec_out": "it is a transcoder, which writes elsewhere than it reads",
    "W_skip": "it is a transcoder, which writes elsewhere than it reads",
    "mlp_blocks": "its encoder has several layers",
    "resnet_blocks": "its encoder has several layers",
    "attention_blocks": "its encoder has several layers",
    "multiplier": "its dictionary is scaled by a factor of its own",
    "thresholds": "its thresholds have a form that is not known here",
}
_ACTIVATIONS = ("relu", "topk", "topk-relu", "jumprelu", "batchtopk", "none")


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
        k: keep the k largest features; by default what the file or the folder's configuration says.
        subtract_decoder_bias: whether activations are encoded after ``b_dec`` was taken from them; by default
            what the configuration says (``apply_b_dec_to_input``), and yes where it says nothing.
        prefix: of the keys, where a file holds several dictionaries.

    Keys are those of SAELens, ViT-Prisma, dictionary_learning and overcomplete: ``W_enc, b_enc, W_dec,
    b_dec``; ``threshold`` or ``log_threshold`` of a jump ReLU; ``b_gate, r_mag, b_mag`` of a gated one;
    ``encoder.weight``, ...; ``encoder.final_block.0.weight``, ... Of the configuration count
    ``normalize_activations`` (``layer_norm``, ``constant_norm_rescale``), ``apply_b_dec_to_input``, ``k`` and
    ``activation_fn_kwargs``. Matrices may lie either way round; the biases tell.

    Raises:
        TensorFileError: there is no such file, it is a pickle, or it is not readable.
        DataError: it holds no dictionary, or one of a kind that is not read, with the reason.
    """
    held, file = _read(Path(path))
    config = _config(file.parent)
    held = {key.removeprefix(prefix): value for key, value in held.items() if key.startswith(prefix)}
    normalize = _understood(held, config, str(file))
    parts: dict[str, Tensor] = {}
    for part, names in _NAMES.items():
        key = next((name for name in names if name in held), None)
        if key is not None:
            value = held[key].float()
            value = value.T if key in _TRANSPOSED and value.ndim == 2 else value
            parts[part] = value.exp() if key in _EXPONENTIALS else value
    if lacking := [part for part in ("encoder", "decoder") if part not in parts]:
        raise DataError(
            f"{file} has no {' and no '.join(lacking)} ({', '.join(_NAMES[lacking[0]])}). It holds: "
            f"{listed(held)}."
        )
    k = _count(k, held, config)
    if "threshold" in parts and parts["threshold"].ndim == 0:
        # One threshold for all features: what a batch's top k leaves for single images.
        own = parts.pop("threshold")
        if k is None or "batchtopk" in json.dumps(config).lower():
            parts["threshold"], k = own.expand(_n_features(parts)).clone(), None
    encoder, decoder = _oriented(parts, str(file))
    encoder, parts["encoder_bias"] = _normed(encoder, parts.get("encoder_bias"), held, str(file))
    d, n = encoder.shape
    bias = parts.get("decoder_bias", torch.zeros(d))
    if subtract_decoder_bias is None:
        subtract_decoder_bias = bool(config.get("apply_b_dec_to_input", True))
    if k is not None and not 1 <= k <= n:
        raise DataError(f"{file}: k={k} must lie between 1 and the number of features, {n}.")
    return Dictionary(
        encoder.contiguous(),
        decoder.contiguous(),
        parts["encoder_bias"],
        bias,
        shift=bias if subtract_decoder_bias and "decoder_bias" in parts else None,
        threshold=parts.get("threshold"),
        k=k,
        gate_bias=parts.get("gate_bias"),
        gain=parts.get("gain"),
        normalize=normalize,
        source=file.name,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], Path]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        # SAELens keeps how often features act beside the weights.
        files = [file for file in files if file.stem != "sparsity"] or files
        if len(files) != 1:
            pickled = [file.name for file in sorted(path.iterdir()) if file.suffix in _PICKLES]
            raise TensorFileError(
                f"{path} holds {len(files)} safetensors files; name the one with the dictionary."
                + (f" {_convert(path / pickled[0])}" if pickled and not files else "")
            )
        path = files[0]
    if path.suffix in _PICKLES:
        raise TensorFileError(_convert(path))
    try:
        return load_file(path), path
    except (OSError, SafetensorError) as error:
        raise TensorFileError(f"{path} is no readable safetensors file: {error}.") from None


def _convert(file: Path) -> str:
    return (
        f"{file} is a pickle, which can run code when it is read. Convert it once, where you trust it: "
        "safetensors.torch.save_file(torch.load(path, weights_only=True), 'dictionary.safetensors'); "
        "a file of ViT-Prisma has its tensors under 'state_dict', beside objects that only "
        "weights_only=False reads. Leave its config.json in the folder."
    )


def _understood(held: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Normalization:
    """Return how activations are scaled; DataError if anything would be read as what it is not."""
    for word, reason in _UNREAD.items():
        if any(word in key.split(".") for key in held):
            raise DataError(f"{where}: the dictionary is not read, for {reason} ({word!r}).")
    kind = str(config.get("architecture") or "")
    if "transcoder" in kind or config.get("is_transcoder"):
        raise DataError(f"{where}: the dictionary is not read, for {_UNREAD['b_dec_out']}.")
    activation = str(config.get("activation_fn_str") or config.get("activation_fn") or "none").lower()
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise DataError(f"{where}: the activation {activation!r} is not known. Known: {known}.")
    if config.get("rescale_acts_by_decoder_norm") and "W_dec" in held:
        lengths = held["W_dec"].float().norm(dim=1)
        if float((lengths - 1).abs().max()) > 1e-3:
            raise DataError(f"{where}: features are scaled by their directions' lengths; fold them in first.")
    factor = held.get("scaling_factor")
    if factor is not None and not bool((factor == 1).all()):
        raise DataError(f"{where}: features have a scaling factor of their own; fold it into W_dec first.")
    normalize = str(config.get("normalize_activations") or "none")
    if normalize not in get_args(Normalization):
        raise DataError(
            f"{where}: the dictionary was made for activations scaled by {normalize!r}, which is not read "
            f"here ({', '.join(get_args(Normalization))} are). Fold the scale into its weights first."
        )
    return cast(Normalization, normalize)


def _count(k: int | None, held: Mapping[str, Tensor], config: Mapping[str, Any]) -> int | None:
    """How many features are kept: what was given, or what the file or its configuration says."""
    if k is not None:
        return int(k)
    options = config.get("activation_fn_kwargs") or {}
    found = config.get("k") or config.get("top_k") or options.get("k")
    if found is None and "k" in held and held["k"].numel() == 1:
        found = held["k"].item()
    # A jump ReLU or a gate that was trained with a top k keeps what its thresholds say.
    own = {"log_threshold", "b_gate"} & set(held) or ("threshold" in held and held["threshold"].ndim == 1)
    return None if found is None or own else int(found)


def _n_features(parts: Mapping[str, Tensor]) -> int:
    biases = (parts[name] for name in ("encoder_bias", "gate_bias", "threshold") if name in parts)
    # A dictionary of fewer features than entries is rare enough to need its biases to be seen.
    return next((len(own) for own in biases if own.ndim == 1), max(parts["encoder"].shape))


def _oriented(parts: Mapping[str, Tensor], where: str) -> tuple[Tensor, Tensor]:
    """Bring both matrices into the form ``[d, feature]`` and ``[feature, d]``."""
    encoder, decoder = parts["encoder"], parts["decoder"]
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in parts.items())
    if encoder.ndim != 2 or decoder.ndim != 2:
        raise DataError(f"{where}: the matrices of a dictionary have two axes; it has {shapes}.")
    n = _n_features(parts)
    if encoder.shape[1] != n or ("decoder_bias" in parts and encoder.shape[0] != len(parts["decoder_bias"])):
        encoder = encoder.T
    if decoder.shape[0] != n or (encoder.shape[0] != decoder.shape[1]):
        decoder = decoder.T
    lengths = dict.fromkeys(("encoder_bias", "threshold", "gate_bias", "gain"), n)
    lengths["decoder_bias"] = encoder.shape[0]
    fits = encoder.shape[1] == n and decoder.shape == encoder.T.shape
    if not fits or any(
        tuple(parts[name].shape) != (size,) for name, size in lengths.items() if name in parts
    ):
        raise DataError(f"{where}: these shapes make no dictionary: {shapes}.")
    return encoder, decoder


def _normed(
    encoder: Tensor, bias: Tensor | None, held: Mapping[str, Tensor], where: str
) -> tuple[Tensor, Tensor]:
    """Fold the batch norm behind an encoder of overcomplete into it; it is linear once it is trained."""
    bias = torch.zeros(encoder.shape[1]) if bias is None else bias
    norm = "encoder.final_block.1."
    own = {key.removeprefix(norm): held[key].float() for key in held if key.startswith(norm)}
    if not own:
        return encoder, bias
    if "running_mean" not in own:
        raise DataError(
            f"{where}: the dictionary is not read, for a layer norm lies behind its encoder, so that each "
            "feature depends on all."
        )
    slope = own.get("weight", torch.ones(1)) / (own["running_var"] + 1e-5).sqrt()
    return encoder * slope, (bias - own["running_mean"]) * slope + own.get("bias", torch.zeros(1))


def _config(folder: Path) -> dict[str, Any]:
    for name in ("cfg.json", "config.json"):
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{folder / name} is not valid JSON ({error}).") from None
            return content if isinstance(content, dict) else {}
    return {}
