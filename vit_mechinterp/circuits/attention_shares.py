"""Shares of attention: r(X -> Y), how much of the attention of one token set goes to another.

With ``A[q, k]`` the attention pattern of a head,

    r(X -> Y) = sum of A[q, k] over q in X, k in Y  /  sum of A[q, k] over q in X and every k

(Lepori et al. 2024, section 4). A pattern is reduced to shares as soon as it is read, and never kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    from vit_mechinterp.circuits.attention_parts import TokenSets

__all__ = ["attention_shares", "measure_shares", "reduce_patterns"]

_PATTERN_BYTES = 256 * 1024**2
"""Bytes of attention patterns held at once."""


def attention_shares(
    pattern: Float[Tensor, "batch head query key"],
    queries: Bool[Tensor, "batch object token"],
    keys: Bool[Tensor, "batch set token"],
) -> Float[Tensor, "batch head object set"]:
    """Return r(X -> Y): the share of the attention of every object's tokens that goes to every set of keys.

    If the sets part the tokens, the shares of an object add up to 1. An object without tokens gives NaN.
    """
    given = torch.einsum("bhqk,boq->bhok", pattern, queries.to(pattern.dtype))
    received = torch.einsum("bhok,bsk->bhos", given, keys.to(pattern.dtype))
    return received / given.sum(dim=-1, keepdim=True)


def measure_shares(
    vit: HookedViT, data: Data, base: str, tokens: TokenSets, *, progress: bool = True
) -> Float[Tensor, "layer example head query set"]:
    """Return the shares of every layer and head, from every query set to every set that parts the tokens.

    Raises:
        SpecError: the model has no attention patterns.
    """

    def shares(pattern: Tensor, examples: range) -> Tensor:
        some = slice(examples.start, examples.stop)
        queries, keys = (mask[some].to(vit.device) for mask in (tokens.queries, tokens.sets))
        return attention_shares(pattern, queries, keys)

    return reduce_patterns(vit, data, base, shares, progress=progress)


def reduce_patterns(
    vit: HookedViT,
    data: Data,
    base: str,
    reduce: Callable[[Float[Tensor, "batch head query key"], range], Float[Tensor, "batch *measure"]],
    *,
    progress: bool = True,
) -> Float[Tensor, "layer example *measure"]:
    """Return what a function makes of the attention patterns of every layer, a batch of examples at a time.

    Args:
        vit: the model.
        data: the examples.
        base: the image column.
        reduce: the pattern of one layer on some examples (float32), and which examples, to its measures.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        SpecError: the model has no attention patterns.
    """
    layout = vit.layout
    sites = vit.expand(f"blocks.{layer}.attn.pattern" for layer in range(layout.n_layers))
    one = layout.n_layers * layout.n_heads * layout.tokens.n_tokens**2 * torch.finfo(vit.dtype).bits // 8
    size = max(1, min(64, _PATTERN_BYTES // one))
    parts: list[list[Tensor]] = [[] for _ in sites]
    bar = tqdm(total=data.n, desc="attention", unit="image", delay=2.0, disable=not progress)
    with torch.no_grad(), bar:
        for start in range(0, data.n, size):
            examples = range(start, min(start + size, data.n))
            _, cache = vit.run(data.images(base, examples), capture=sites)
            for layer, site in enumerate(sites):
                parts[layer].append(reduce(cache[site].float(), examples).cpu())
            bar.update(len(examples))
    return torch.stack([torch.cat(part) for part in parts])
