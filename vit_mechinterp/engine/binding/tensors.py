"""Tensors that specs refer to: loaded from safetensors, and checked against the place where they act."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.engine.binding.bound import Bound, Edit
from vit_mechinterp.engine.binding.features import check_feature
from vit_mechinterp.engine.inputs.entries import described
from vit_mechinterp.errors import SpecError, TensorFileError, listed, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.meta import refuse_meta
from vit_mechinterp.spec import EditFeature, TensorRef

__all__ = ["check_tensors", "digest_of", "resolve_refs"]

ORTHONORMAL_TOLERANCE = 1e-3
"""How far an entry of R^T R may be from the identity's."""


def _load(ref: TensorRef, folder: Path | None = None) -> Tensor:
    """Read a tensor that a file reference names.

    Raises:
        TensorFileError: the file is missing, unreadable, truncated, without that key, or of another hash.
    """
    from safetensors import SafetensorError, safe_open

    assert ref.file is not None
    assert ref.key is not None
    path = Path(ref.file) if folder is None else folder / ref.file
    if not path.is_file():
        raise TensorFileError(f"There is no tensor file {path} (for key {ref.key!r}).")
    try:
        if ref.sha256 is not None and (found := hashlib.sha256(path.read_bytes()).hexdigest()) != ref.sha256:
            raise TensorFileError(
                f"{path} is not the file that was meant: sha256 {found}, expected {ref.sha256}."
            )
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if ref.key not in keys:
                raise TensorFileError(
                    f"{path} has no tensor {ref.key!r}.{suggest(ref.key, keys)} It holds: {listed(keys)}."
                )
            tensor: Tensor = file.get_tensor(ref.key)
    except TensorFileError:
        raise
    except (OSError, SafetensorError) as error:
        raise TensorFileError(
            f"{path} is no readable safetensors file (truncated or damaged?): {error}."
        ) from None
    return tensor


def resolve_refs(
    bound: Bound,
    tensors: Mapping[str, Tensor] | None,
    vit: HookedViT,
    folder: Path | None = None,
    files: Mapping[str, TensorRef] | None = None,
) -> dict[TensorRef, Tensor]:
    """The tensor of every reference in the experiment, on the model's device.

    ``files`` gives files to names; what ``tensors`` holds comes first.

    Raises:
        SpecError: a name is not among ``tensors``, or what it names holds no numbers.
        TensorFileError: a file cannot be read.
        ExecutionError: the model has no weights, and something refers to a tensor.
    """
    if tensors is not None and not isinstance(tensors, Mapping):
        raise SpecError(f"tensors is a mapping from names to tensors, not {type(tensors).__name__}.")
    own = {name: _load(ref, folder) for name, ref in (files or {}).items() if ref.file is not None}
    given = {**own, **(tensors or {})}
    resolved: dict[TensorRef, Tensor] = {}
    for run in bound.runs:
        for edit in run.edits:
            for field, ref in edit.refs:
                if ref in resolved:
                    continue
                if ref.name is None:
                    tensor = _load(ref, folder)
                elif ref.name in given:
                    tensor = _as_tensor(
                        given[ref.name], f"{edit.where}: {field} names the tensor {ref.name!r}"
                    )
                else:
                    raise SpecError(
                        f"{edit.where}: {field} names the tensor {ref.name!r}, which was not given."
                        f"{suggest(ref.name, given)} Given: {', '.join(given) or 'none'}."
                    )
                refuse_meta(vit.module)  # a plan may be made on one, but no tensor be looked at there
                resolved[ref] = tensor.to(vit.device)
    return resolved


def _as_tensor(value: object, where: str) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise SpecError(f"{where}, and what was given is no tensor: {described(value)}.") from None
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise SpecError(f"{where}, and what was given is laid out as {layout}. Give its to_dense().")
    if tensor.is_meta:
        raise SpecError(
            f"{where}, and what was given stands on the meta device, where it holds no numbers. Give one on "
            "the CPU or on the model's device."
        )
    return tensor


def digest_of(tensors: Mapping[TensorRef, Tensor]) -> dict[str, str]:
    """SHA-256 of the contents of every tensor, by the reference's text."""
    digests = {}
    for ref, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(data.shape)}{data.dtype}".encode())
        digest.update(np.ascontiguousarray(data.reshape(-1).view(torch.uint8).numpy()).data)
        digests[str(ref)] = digest.hexdigest()
    return digests


def check_tensors(bound: Bound, tensors: Mapping[TensorRef, Tensor], vit: HookedViT, n_examples: int) -> None:
    """Check every tensor against the site and the tokens that it acts on.

    Raises:
        SpecError: a direction of the wrong shape, a basis that is not orthonormal, a gate outside 0..1, a
            choice beyond the leading axis, or what is no dictionary of features.
    """
    checks = {"vector": _check_vector, "basis": _check_basis, "gate": _check_gate, "mean": _check_mean}

    # Many runs use one tensor, and its numbers are looked at once.
    @cache
    def lack(ref: TensorRef) -> str | None:
        tensor = tensors[ref]
        if not tensor.is_floating_point():
            return f"it has {tensor.dtype}; give it as floating-point numbers"
        wrong = int((~torch.isfinite(tensor)).sum())
        return f"{wrong} of its {tensor.numel()} numbers are infinite or not a number" if wrong else None

    @cache
    def skew(ref: TensorRef) -> float:
        basis = tensors[ref].detach().double()
        gram = basis.mT @ basis
        return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max())

    for run in bound.runs:
        for edit in run.edits:
            own = {field: tensors[ref].detach() for field, ref in edit.refs}
            for field, ref in edit.refs:
                if why := lack(ref):
                    raise SpecError(f"{edit.where}: {field} must hold finite floating-point numbers: {why}.")
                if field in checks:
                    checks[field](vit, edit, own[field], own, n_examples)
                if field == "basis" and skew(ref) > ORTHONORMAL_TOLERANCE:
                    raise SpecError(
                        f"{edit.where}: the columns of basis are not orthonormal (R^T R differs from the "
                        f"identity by {skew(ref):.2g}). Take its QR decomposition first: "
                        "torch.linalg.qr(basis).Q."
                    )
            if isinstance(edit.spec, EditFeature):
                check_feature(edit.spec, own, _features(vit, edit), edit.where)
            if "vectors" in own:
                rank = own["basis"].shape[-1]
                _check_rows(vit, edit, "vectors", own["vectors"], rank, n_examples)


def _features(vit: HookedViT, edit: Edit) -> int:
    return vit.sites()[str(edit.site)].shape[-1]


def _check_vector(
    vit: HookedViT, edit: Edit, tensor: Tensor, own: Mapping[str, Tensor], n_examples: int
) -> None:
    _check_rows(vit, edit, "vector", tensor, _features(vit, edit), n_examples)


def _check_rows(vit: HookedViT, edit: Edit, field: str, tensor: Tensor, d: int, n_examples: int) -> None:
    shape = tuple(tensor.shape)
    if edit.choice is not None:
        if tensor.ndim < 2 or max(edit.choice) >= shape[0]:
            raise SpecError(
                f"{edit.where}: {field} {shape} needs a leading axis of at least {max(edit.choice) + 1} for "
                "the column that chooses from it."
            )
        shape = shape[1:]
    if shape == (d,):
        return
    counts = _token_counts(vit, edit, n_examples)
    if len(counts) == 1 and shape in ((k := counts.copy().pop(), d), (k * d,)):
        return
    holder = f"the basis has {d} columns" if field == "vectors" else f"{edit.site} holds {d} features"
    choosing = "" if edit.choice is None else ", behind the leading axis to choose from"
    known = f"{counts.pop()} tokens" if len(counts) == 1 else "tokens that differ in number between examples"
    raise SpecError(
        f"{edit.where}: {field} has shape {tuple(tensor.shape)}; {holder} and {known} are selected, so "
        f"[{d}], or [k, {d}] or [k * {d}] for exactly k tokens, fits{choosing}."
    )


def _token_counts(vit: HookedViT, edit: Edit, n_examples: int) -> set[int]:
    """How many tokens an example selects: one number where all select equally many."""
    if not edit.site.has_tokens:
        return {1}
    counts = edit.positions.counts(range(n_examples), vit.layout.tokens.n_tokens)
    return {int(count) for count in np.unique(counts)}


def _check_basis(
    vit: HookedViT, edit: Edit, tensor: Tensor, own: Mapping[str, Tensor], n_examples: int
) -> None:
    d = _features(vit, edit)
    counts = _token_counts(vit, edit, n_examples)
    by_token = tensor.ndim == 3 and counts == {tensor.shape[0]} and not edit.site.has_heads
    if (tensor.ndim != 2 and not by_token) or tensor.shape[-2] != d or not 1 <= tensor.shape[-1] <= d:
        also = ""
        if edit.site.has_tokens and not edit.site.has_heads:
            also = "; a basis for each token takes equally many tokens in every example"
            if len(counts) == 1:
                also = f", or [{next(iter(counts))}, {d}, r] for a basis of each token"
        raise SpecError(
            f"{edit.where}: basis has shape {tuple(tensor.shape)}; {edit.site} holds {d} features, so "
            f"[{d}, r] with r from 1 to {d} fits{also}."
        )


def _check_gate(
    vit: HookedViT, edit: Edit, tensor: Tensor, own: Mapping[str, Tensor], n_examples: int
) -> None:
    basis = tuple(own["basis"].shape)
    wanted = (*basis[:-2], basis[-1])
    if tuple(tensor.shape) != wanted:
        tokens = "" if len(basis) == 2 else f" for each of {basis[0]} tokens, so {list(wanted)} fits"
        raise SpecError(
            f"{edit.where}: gate has shape {tuple(tensor.shape)}; the basis has {basis[-1]} columns{tokens}."
        )
    if float(tensor.min()) < 0 or float(tensor.max()) > 1:
        raise SpecError(
            f"{edit.where}: gate must lie in 0..1, got {float(tensor.min()):g} to {float(tensor.max()):g}."
        )


def _check_mean(
    vit: HookedViT, edit: Edit, tensor: Tensor, own: Mapping[str, Tensor], n_examples: int
) -> None:
    shape = vit.sites()[str(edit.site)].shape
    token_axis = 1 if edit.site.is_attention_matrix else 0
    pooled = bool(getattr(edit.spec, "pool_tokens", False)) and edit.site.has_tokens
    wanted = shape[:token_axis] + shape[token_axis + 1 :] if pooled else shape
    if tuple(tensor.shape) != wanted:
        raise SpecError(
            f"{edit.where}: mean has shape {tuple(tensor.shape)}; {wanted} fits here (the site's shape "
            "for one example"
            f"{', without its token axis' if pooled else ''})."
        )
