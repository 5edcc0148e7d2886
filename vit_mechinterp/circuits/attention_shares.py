"""Shares of attention: r(X -> Y), how much of the attention of one token set goes to another.

With ``A[q, k]`` the attention pattern of a head,

    r(X -> Y) = sum of A[q, k] over q in X, k in Y  /  sum of A[q, k] over q in X and every k

(Lepori et al. 2024, section 4). A pattern is reduced to shares as soon as it is read, and never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.token_sets import positions_of, token_mask
from vit_mechinterp.engine.data import Data
from vit_mechinterp.errors import DataError
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["TokenSets", "attention_shares", "measure_shares", "part_tokens"]

_PATTERN_BYTES = 256 * 1024**2
"""Bytes of attention patterns held at once."""


@dataclass(frozen=True)
class TokenSets:
    """Sets that part the tokens of every example.

    Attributes:
        objects: the tokens of every object.
        sets: the objects again, then the background, then one set per name.
        names: names of tokens outside the patch grid, such as ``"cls"``.
    """

    objects: Bool[Tensor, "example object token"]
    sets: Bool[Tensor, "example set token"]
    names: tuple[str, ...]


def attention_shares(
    pattern: Float[Tensor, "batch head query key"],
    queries: Bool[Tensor, "batch object token"],
    keys: Bool[Tensor, "batch set token"],
) -> Float[Tensor, "batch head object set"]:
    """Return r(X -> Y): the share of the attention of every object's tokens that goes to every set of keys.

    If the sets part the tokens, the shares of an object add up to 1.
    """
    given = torch.einsum("bhqk,boq->bhok", pattern, queries.to(pattern.dtype))
    received = torch.einsum("bhok,bsk->bhos", given, keys.to(pattern.dtype))
    return received / given.sum(dim=-1, keepdim=True)


def part_tokens(vit: HookedViT, data: Data, objects: Sequence[Any], base: str) -> TokenSets:
    """Part the tokens of every example into objects, background (patches of no object), and named tokens.

    Args:
        vit: the model whose token layout counts.
        data: the examples.
        objects: token selectors, one per object.
        base: the image column that boxes are drawn on.

    Raises:
        SpecError: a selector does not fit the model; DataError: a column is missing, or objects share tokens.
    """
    layout = vit.layout.tokens
    masks = []
    for number, tokens in enumerate(objects, start=1):
        where = f"attention of object {number}"
        masks.append(token_mask(positions_of(tokens, vit, data, base, where), layout.n_tokens))
    own = torch.stack(masks, dim=1)
    taken = own.sum(dim=1)
    patches = token_mask([layout.positions("patches") or ()], layout.n_tokens)
    wrong = ((taken > 1) | ((taken > 0) & ~patches)).any(dim=1).nonzero()
    if len(wrong):
        raise DataError(
            f"Example {int(wrong[0])}: a token is in two objects, or outside the patch grid, so shares of "
            "attention would not add up. Give objects that share no patch."
        )
    names = tuple(name for name in layout.names if name not in ("all", "patches"))
    named = [token_mask([layout.positions(name) or ()], layout.n_tokens) for name in names]
    outside = [mask.expand(data.n, -1)[:, None] for mask in named]
    background = (patches & (taken == 0))[:, None]
    return TokenSets(own, torch.cat([own, background, *outside], dim=1), names)


def measure_shares(
    vit: HookedViT, data: Data, base: str, tokens: TokenSets, *, progress: bool = True
) -> Float[Tensor, "layer example head object set"]:
    """Return the shares of every layer and head, batch by batch over the examples.

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
            masks = [mask[start : examples.stop].to(vit.device) for mask in (tokens.objects, tokens.sets)]
            for layer, site in enumerate(sites):
                parts[layer].append(attention_shares(cache[site].float(), *masks).cpu())
            bar.update(len(examples))
    return torch.stack([torch.cat(part) for part in parts])
