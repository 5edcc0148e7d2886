"""What chosen heads attend to in one image, from the tokens of an object or of a pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.attention_parts import TokenSets
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["ExampleAttention", "attend_in_example"]


@dataclass(frozen=True)
class ExampleAttention:
    """One image, and where the tokens of its objects attend.

    Attributes:
        image: the model's input.
        attention: name of a head to the attention of each token of an object ``[query, row, column]`` to
            every patch.
        queries: name of a head to the patches ``[query]`` that these tokens are.
        boxes: the objects' patches as pixel boxes of the input.
    """

    image: Image
    attention: Mapping[str, Float[np.ndarray, "query row column"]]
    queries: Mapping[str, list[int]]
    boxes: Mapping[str, tuple[int, int, int, int]]

    @property
    def maps(self) -> dict[str, Float[np.ndarray, "row column"]]:
        """Name of a head to the mean attention of the tokens to every patch."""
        return {name: attention.mean(axis=0) for name, attention in self.attention.items()}

    def figure(self) -> Figure:
        """Draw the image, and once per head the image dimmed where it does not attend."""
        from vit_mechinterp.figures import attention_overlay

        return attention_overlay(self.image, self.maps, boxes=self.boxes)


def attend_in_example(
    vit: HookedViT,
    data: Data,
    base: str,
    tokens: TokenSets,
    heads: Mapping[str, tuple[int, int, int]],
    example: int = 0,
) -> ExampleAttention | None:
    """Return where heads attend in one image from its objects; None if patches form no plane grid.

    Args:
        vit: the model.
        data: the examples.
        base: the image column.
        tokens: the objects of every example.
        heads: name to (layer, head, query set of ``tokens``), all counted from 0.
        example: which example.
    """
    layout = vit.layout.tokens
    if len(layout.grid) != 2:
        return None
    sites = [f"blocks.{layer}.attn.pattern" for layer, _, _ in heads.values()]
    pixels = data.images(base, [example])
    with torch.no_grad():
        _, cache = vit.run(pixels, capture=sites)
    first = len(layout.prefix)
    patches = slice(first, first + layout.n_patches)
    attention, queries = {}, {}
    for (name, (_, head, number)), site in zip(heads.items(), sites, strict=True):
        own = tokens.queries[example, number]
        rows = cache[site][0, head, own.to(vit.device), patches].float()
        attention[name] = rows.reshape(-1, *layout.grid).cpu().numpy()
        queries[name] = [int(position) - first for position in own.nonzero().flatten()]
    boxes = {
        name: _box(mask[patches].reshape(layout.grid), layout.patch_size)
        for name, mask in zip(tokens.query_names, tokens.objects[example], strict=False)
    }
    picture = _picture(next(iter(data.values(base, [example]))), pixels[0])
    return ExampleAttention(picture, attention, queries, boxes)


def _box(covered: Tensor, patch: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the pixel box around the covered patches of a grid."""
    rows, columns = (covered.any(dim=axis).nonzero().flatten().tolist() for axis in (1, 0))
    height, width = patch
    return columns[0] * width, rows[0] * height, (columns[-1] + 1) * width, (rows[-1] + 1) * height


def _picture(entry: Any, pixels: Float[Tensor, "3 height width"]) -> Image:
    """Return the image itself if the model takes it at its own size, else the model's input, stretched to
    0..255."""
    from PIL import Image

    if hasattr(entry, "convert") and entry.size == (pixels.shape[2], pixels.shape[1]):
        return entry.convert("RGB")  # type: ignore[no-any-return]
    values = pixels.float().cpu()
    low, high = values.min(), values.max()
    shown = ((values - low) / (high - low).clamp(min=1e-12) * 255).byte()
    return Image.fromarray(shown.permute(1, 2, 0).numpy())
