"""The table of positional encodings that a ViT adds to its tokens, found by name and size on the module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["encoding_table", "patch_encodings"]

_NAMES = {
    "pos_embed",
    "pos_embedding",
    "pos_emb",
    "position_embedding",
    "position_embeddings",
    "positional_embedding",
    "positional_encoding",
}


def encoding_table(vit: HookedViT) -> Float[Tensor, "token d_model"]:
    """Return the module's own table of encodings: a view, so that gradients reach it.

    Learned and sinusoidal tables are found alike. Rows are tokens: all of the stream's; or the class token
    and the patches, where registers are given none; or the patches alone.

    Raises:
        UnsupportedModelError: the model adds no such table to its tokens (rotary and relative positions act
            inside attention), or several tables fit.
    """
    tokens, width = vit.layout.tokens, vit.layout.d_model
    fitting: dict[int, tuple[str, Tensor]] = {}
    seen: list[str] = []
    for name, table in _candidates(vit.module):
        rows = table.numel() // width if table.ndim and table.shape[-1] == width else 0
        if rows in _row_counts(vit):
            fitting[table.data_ptr()] = (name, table.reshape(rows, width))
        else:
            seen.append(f"{name} {tuple(table.shape)}")
    if len(fitting) == 1:
        return next(iter(fitting.values()))[1]
    what = f"{type(vit.module).__name__} ({vit.layout.family.name})"
    if fitting:
        names = ", ".join(name for name, _ in fitting.values())
        raise UnsupportedModelError(f"{what} has several tables of positional encodings that fit: {names}.")
    found = f" Found, and of another size: {', '.join(seen)}." if seen else ""
    raise UnsupportedModelError(
        f"{what} adds no table of positional encodings [{tokens.n_tokens} tokens or {tokens.n_patches} "
        f"patches, {width}] to its tokens, so there is no P to look at.{found} Rotary and relative positions "
        "act inside attention; look at the patterns of attention on images instead (attention_stages)."
    )


def patch_encodings(vit: HookedViT) -> Float[Tensor, "patch d_model"]:
    """Return the encodings of the patches alone, without prefix and suffix tokens; see `encoding_table`."""
    table = encoding_table(vit)
    tokens = vit.layout.tokens
    if len(table) == tokens.n_patches:
        return table
    if len(table) != tokens.n_tokens:
        return table[-tokens.n_patches :]
    return table[len(tokens.prefix) : len(tokens.prefix) + tokens.n_patches]


def _row_counts(vit: HookedViT) -> set[int]:
    """How many rows a table may have; registers come after the encodings are added in some models."""
    tokens = vit.layout.tokens
    named = sum(name != "registers" for name in tokens.prefix)
    return {tokens.n_tokens, tokens.n_patches, named + tokens.n_patches}


def _candidates(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors and embeddings whose last name says positions; plain attributes are some libraries' buffers."""
    for path, part in module.named_modules():
        if path.rpartition(".")[2] in _NAMES and isinstance(part, nn.Embedding):
            yield path, part.weight
        own: dict[str, Any] = {**vars(part), **dict(part._parameters), **dict(part._buffers)}
        for name, value in own.items():
            if name in _NAMES and isinstance(value, Tensor):
                yield f"{path}.{name}".lstrip("."), value
