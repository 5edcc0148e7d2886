"""Weight matrices in TransformerLens's shapes, read off a native module and held against what it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.bridges.agreement import difference, size, tolerance_of
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.ports import Port, is_missing, lookup

__all__ = [
    "AttentionWeights",
    "attention_weights",
    "gaps_of",
    "module_at",
    "output_weights",
    "plain_layers",
    "random_images",
]

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))


@dataclass(frozen=True)
class AttentionWeights:
    """Projections of one block: ``W_Q``, ``W_K``, ``W_V [head, d_model, d_head]``, biases ``[head, d_head]``,
    ``W_O [head, d_head, d_model]``, ``b_O [d_model]``; LayerScale is part of the last two."""

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    W_O: Tensor
    b_O: Tensor


def attention_weights(vit: HookedViT, layer: int) -> AttentionWeights:
    """The weights of one block's attention.

    Raises:
        SpecError: its projections are not linear layers under names that are known, or values are not what
            they make of the block's norm.
    """
    layout = vit.layout
    block = lookup(vit.module, layout.block_path(layer))
    attention = lookup(vit.module, layout.attention_path(layer))
    parts = _projections(attention)
    if parts is None:
        raise SpecError(
            f"{type(attention).__name__} has no linear projections of q, k and v under names that are known, "
            "so W_Q, W_K and W_V cannot be read off it. W_O can, and so can attn.q, attn.k and attn.v."
        )
    d = layout.d_head
    heads = [weight.T.reshape(weight.shape[1], -1, d).permute(1, 0, 2) for weight, _ in parts]
    biases = [
        torch.zeros(weight.shape[0], device=weight.device, dtype=weight.dtype) if bias is None else bias
        for weight, bias in parts
    ]
    W_O, b_O = output_weights(vit, layer)
    b_Q, b_K, b_V = (bias.reshape(-1, d) for bias in biases)
    found = AttentionWeights(heads[0], heads[1], heads[2], b_Q, b_K, b_V, W_O, b_O)
    _check_values(vit, layer, found, type(block).__name__)
    return found


def output_weights(vit: HookedViT, layer: int) -> tuple[Tensor, Tensor]:
    """``W_O [head, d_head, d_model]`` and ``b_O [d_model]``, LayerScale included.

    Raises:
        SpecError: the heads' output does not enter one linear layer as it is.
    """
    layout = vit.layout
    block = lookup(vit.module, layout.block_path(layer))
    projection: Any = lookup(block, layout.family.out_projection)
    if not isinstance(projection, nn.Linear):
        raise SpecError(f"The heads of {type(block).__name__} are not mixed by one linear layer: no W_O.")
    scales = [lookup(block, path) for path in layout.family.attention_scale]
    scale: Any = next((s for s in scales if not is_missing(s)), 1.0)
    width = layout.n_heads * layout.d_head
    W_O = (projection.weight[:, :width].T * scale).reshape(layout.n_heads, layout.d_head, -1)
    b_O = torch.zeros_like(W_O[0, 0]) if projection.bias is None else projection.bias * scale
    _check_increment(vit, layer, W_O, b_O, type(block).__name__)
    return W_O, b_O


@torch.no_grad()
def _check_increment(vit: HookedViT, layer: int, W_O: Tensor, b_O: Tensor, where: str) -> None:
    """A gate or a norm may lie between the heads' output and the projection."""
    names = [f"blocks.{layer}.attn.z", f"blocks.{layer}.attn_out"]
    _, cache = vit.run(random_images(vit), capture=vit.expand(names))
    z, expected = (cache[name] for name in names)
    found = torch.einsum("bthd,hdm->btm", z, W_O) + b_O
    if difference(found, expected) > tolerance_of(vit) * size(expected):
        absent = vit.layout.absent.get(f"blocks.{layer}.attn.result")
        instead = "Read attn.result (hook_result) instead." if absent is None else f"There is none: {absent}."
        raise SpecError(
            f"In {where} the heads' output does not enter the output projection as it is (a gate or a norm "
            f"lies between), so attn.z times W_O is no head's result. {instead}"
        )


def _projections(attention: Any) -> list[tuple[Tensor, Tensor | None]] | None:
    """Weight ``[out, in]`` and bias of q, k and v."""
    packed = getattr(attention, "qkv", None)
    if isinstance(packed, nn.Linear) and packed.out_features % 3 == 0:
        bias = packed.bias
        if bias is None and isinstance(getattr(attention, "q_bias", None), Tensor):
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        thirds = (None,) * 3 if bias is None else bias.chunk(3)
        return list(zip(packed.weight.chunk(3), thirds, strict=True))
    if isinstance(attention, nn.MultiheadAttention) and attention.in_proj_weight is not None:
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        return list(zip(attention.in_proj_weight.chunk(3), biases, strict=True))
    for names in _SEPARATE:
        found = [
            getattr(holder, name, None)
            for holder in (attention, getattr(attention, "attention", None))
            for name in names
        ]
        for linears in (found[:3], found[3:]):
            if all(isinstance(linear, nn.Linear) for linear in linears):
                return [(linear.weight, linear.bias) for linear in linears]  # type: ignore[union-attr]
    return None


@torch.no_grad()
def _check_values(vit: HookedViT, layer: int, weights: AttentionWeights, where: str) -> None:
    """Values come from the norm's output alone, on every family; queries and keys may be rotated."""
    _, cache = vit.run(random_images(vit), capture=[f"blocks.{layer}.ln1", f"blocks.{layer}.attn.v"])
    found = torch.einsum("btm,hmd->bthd", cache[f"blocks.{layer}.ln1"], weights.W_V) + weights.b_V
    expected = cache[f"blocks.{layer}.attn.v"]
    fits = found.shape == expected.shape
    if not fits or difference(found, expected) > tolerance_of(vit) * size(expected):
        raise SpecError(
            f"The linear layers found in {where} do not make the block's values from its norm's output, so "
            "they are no W_Q, W_K and W_V."
        )


@torch.no_grad()
def plain_layers(vit: HookedViT) -> list[int]:
    """Layers whose queries and keys enter the dot product as they are projected: not rotated, not normed."""
    layout = vit.layout
    sites = ("ln1", "attn.q", "attn.k")
    layers = range(layout.n_layers)
    names = [f"blocks.{layer}.{site}" for layer in layers for site in sites]
    streams: dict[str, Tensor] = {}
    agree: dict[int, list[bool]] = {}

    def look(name: str) -> Any:
        layer = int(name.split(".")[1])

        def at(value: Tensor) -> None:
            if name.endswith("ln1"):
                streams["ln1"] = value
            elif (parts := projections[layer]) is not None and "ln1" in streams:
                weight, bias = parts[name.endswith("k")]
                value = value.flatten(2)
                fits = weight.shape == (value.shape[-1], streams["ln1"].shape[-1])
                found = nn.functional.linear(streams["ln1"], weight, bias) if fits else torch.inf * value
                near = difference(found, value) <= tolerance_of(vit) * size(value)
                agree.setdefault(layer, []).append(near)

        return at

    projections = {n: _projections(lookup(vit.module, layout.attention_path(n))) for n in layers}
    with vit.hooks({name: look(name) for name in names if name not in layout.absent}):
        vit(random_images(vit))
    return [layer for layer, found in agree.items() if found == [True, True]]


@torch.no_grad()
def gaps_of(vit: HookedViT) -> list[int]:
    """Blocks that are not given what the block before them returned."""
    found: list[int] = []
    left: list[Tensor] = []

    def compare(layer: int, value: Tensor) -> None:
        if left and not torch.equal(left.pop(), value):
            found.append(layer)

    hooks: dict[str, Any] = {}
    for layer in range(vit.layout.n_layers):
        hooks[f"blocks.{layer}.resid_pre"] = lambda value, layer=layer: compare(layer, value)
        hooks[f"blocks.{layer}.resid_post"] = lambda value: left.append(value.clone())
    with vit.hooks({name: hook for name, hook in hooks.items() if name not in vit.layout.absent}):
        vit(random_images(vit))
    return found


def module_at(vit: HookedViT, site: str) -> nn.Module | None:
    port = vit.layout.ports.get(site)
    if not isinstance(port, Port) or port.side != "output":
        return None
    module = lookup(vit.module, port.path)
    return module if isinstance(module, nn.Module) else None


def random_images(vit: HookedViT) -> Tensor:
    """Random images to try a model on."""
    draw = torch.Generator().manual_seed(0)
    rows = 1 if vit.layout.family.one_image is not None else 2
    return torch.randn(rows, *vit.layout.tokens.input_shape, generator=draw).to(vit.device, vit.dtype)
