"""What attention heads write into the residual stream: their z through their columns of the projection."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from vit_mechinterp.model.layout import Layout, is_missing, lookup

__all__ = ["head_weights", "written_by_heads"]


def head_weights(
    module: nn.Module, layout: Layout, layer: int
) -> tuple[Float[Tensor, "d_model head d_head"], Tensor | None]:
    """The output projection of a block by heads, and the vector that multiplies its output (LayerScale)."""
    block: nn.Module = lookup(module, layout.block_path(layer))
    projection: nn.Linear = lookup(block, layout.family.out_projection)
    scales = (lookup(block, path) for path in layout.family.attention_scale)
    shape = layout.n_heads, layout.d_head
    # The heads come first where the projection serves the MLP as well.
    weights = projection.weight[:, : shape[0] * shape[1]].reshape(-1, *shape)
    return weights, next((scale for scale in scales if not is_missing(scale)), None)


def written_by_heads(
    module: nn.Module,
    layout: Layout,
    layer: int,
    z: Float[Tensor, "token head d_head"],
    heads: Sequence[int] | None,
) -> Float[Tensor, "token d_model"]:
    """What some heads of a block write together, without the projection's bias.

    Args:
        module: the native model.
        layout: its layout.
        layer: the block.
        z: what the heads make of the values.
        heads: which heads these are; None for all.
    """
    weights, scale = head_weights(module, layout, layer)
    weights = weights if heads is None else weights[:, list(heads)]
    written = z.flatten(1) @ weights.flatten(1).to(z.dtype).T
    return written if scale is None else written * scale.to(z.dtype)
