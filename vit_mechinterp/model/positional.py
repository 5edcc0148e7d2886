"""A real ViT whose attention depends on positions alone, made by converting an ordinary one (after Jelassi,
Sander and Li 2022).

In every block queries and keys are the block's own projections of the positional encodings; values are those
of the tokens, as ever:

    softmax(W_q P (W_k P)^T / sqrt(d_head)) W_v X

The encodings are the model's own, one table for all blocks, and are still added to the tokens. They are
standardised before they are projected (a layer norm without weights), since tables are far smaller than the
normalised tokens that the projections are made for. These two choices are this project's own; the paper's
are not known.

Only the projections of queries and keys are replaced, so the attention modules, their names and their fused
kernel stay, and the families' own adapters recognise the result.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model.encodings import encoding_table
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.registry import wrap

__all__ = ["PositionalProjection", "positional_attention"]

Module = TypeVar("Module", bound=nn.Module)

_PAIRS = (("q_proj", "k_proj"), ("query", "key"))


class PositionalProjection(nn.Module):
    """A linear layer the first features of which are computed from positions, the others from its input.

    Args:
        linear: the layer whose weights are used.
        table: encodings, ``[*1, token, d_model]``; a parameter stays tied to the model's own.
        features: how many of the layer's output features read positions.
    """

    def __init__(self, linear: nn.Linear, table: Tensor, features: int) -> None:
        super().__init__()
        self.linear = linear
        self.features = features
        if isinstance(table, nn.Parameter):
            self.table: Tensor = table
        else:
            self.register_buffer("table", table, persistent=False)

    def forward(self, x: Float[Tensor, "batch token d_model"]) -> Float[Tensor, "batch token feature"]:
        """Project positions, equal for all examples, and (where features are left) the tokens."""
        weight, bias = self.linear.weight, self.linear.bias
        width = self.table.shape[-1]
        positions = functional.layer_norm(self.table, (width,)).reshape(1, -1, width)
        n = self.features
        head = functional.linear(positions, weight[:n], None if bias is None else bias[:n])
        head = head.expand(len(x), -1, -1)
        if n == len(weight):
            return head
        tail = functional.linear(x, weight[n:], None if bias is None else bias[n:])
        return torch.cat([head, tail.to(head.dtype)], dim=-1)


def positional_attention(module: Module) -> Module:
    """Return a copy of a ViT whose attention depends on positional encodings alone.

    Args:
        module: a timm or transformers ViT with a table of encodings for all of its tokens, and with separate
            or packed linear projections. It is left as it is.

    Raises:
        UnsupportedModelError: the model is not supported, adds no table of encodings to all of its tokens, or
            projects queries and keys in another way.
    """
    converted = copy.deepcopy(module)
    vit = wrap(converted)
    rows = encoding_table(vit)
    if len(rows) != vit.layout.tokens.n_tokens:
        prefix = ", ".join(dict.fromkeys(vit.layout.tokens.prefix))
        raise UnsupportedModelError(
            f"{type(module).__name__} has {len(rows)} positional encodings for {vit.layout.tokens.n_tokens} "
            f"tokens, and none for some of its prefix tokens ({prefix}), whose queries and keys would have "
            "nothing to read. Create it with encodings for all tokens (timm: no_embed_class=False) or "
            "without class token and registers."
        )
    table = _own(converted, rows)
    for number in range(vit.layout.n_layers):
        block = converted.get_submodule(f"{vit.layout.blocks_path}.{number}")
        _convert(block.get_submodule(vit.layout.family.attention), table, vit)
    return converted


def _own(module: nn.Module, rows: Tensor) -> Tensor:
    """The parameter that the rows are a view of, or the rows themselves where they are no parameter."""
    own = (p for p in module.parameters() if p.data_ptr() == rows.data_ptr() and p.numel() == rows.numel())
    return next(own, rows.detach())


def _convert(attention: nn.Module, table: Tensor, vit: HookedViT) -> None:
    width = vit.layout.n_heads * vit.layout.d_head
    for part in attention.modules():
        packed = getattr(part, "qkv", None)
        biases = any(getattr(part, name, None) is not None for name in ("q_bias", "v_bias"))
        if isinstance(packed, nn.Linear) and packed.out_features == 3 * width and not biases:
            part.qkv = PositionalProjection(packed, table, 2 * width)
            return
        for names in _PAIRS:
            pair = [getattr(part, name, None) for name in names]
            if all(isinstance(one, nn.Linear) for one in pair):
                for name, one in zip(names, pair, strict=True):
                    assert isinstance(one, nn.Linear)
                    setattr(part, name, PositionalProjection(one, table, one.out_features))
                return
    held = ", ".join(name for name, _ in attention.named_children())
    raise UnsupportedModelError(
        f"{type(attention).__name__} holds {held}: neither a packed projection qkv of three equal parts "
        "without biases of its own, nor q_proj and k_proj (or query and key), so its attention cannot be "
        "made positional."
    )
