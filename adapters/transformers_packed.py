"""What the vision towers of transformers' vision-language models share: images packed into one sequence.

Such a tower takes patches instead of images, in the order in which their groups are merged behind the
blocks, with the grid of each image. The blocks see all tokens of all images in one sequence, and some towers
sort them by windows first.
"""

from __future__ import annotations

from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.adapters.transformers_readout import config_of, size_of
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.layout import Packing, TokenLayout

LARGEST = 448
"""Pixels: towers of no image size of their own, or whose own is a limit, are laid out for this one."""


def merge_of(model: Any) -> int:
    """Edge of the groups in which patches come."""
    return int(getattr(model, "spatial_merge_size", 1))


def tokens_of(
    model: Any, merge: int, prefix: tuple[str, ...] = (), patch: tuple[int, int] | None = None
) -> TokenLayout:
    """Patches alone, of an image of the configuration's size, or of 448 pixels where it has none.

    Args:
        model: the tower.
        merge: edge of the groups that the output merges; images hold whole groups.
        prefix: tokens before the patches of every image.
        patch: size of a patch, where the configuration does not give it.
    """
    config = config_of(model)
    patch = size_of(config.patch_size) if patch is None else patch
    edges = size_of(getattr(config, "image_size", None) or LARGEST)
    unit = patch[0] * merge, patch[1] * merge
    height, width = (max(min(edge, LARGEST) // u, 1) * u for edge, u in zip(edges, unit, strict=True))
    return TokenLayout(prefix, (height // patch[0], width // patch[1]), patch, (height, width))


def packing_of(
    model: Any, tokens: TokenLayout, merge: int, merged: int = 1, *, leading: bool = False
) -> Packing:
    """How an image's tokens lie in the sequence: in groups of ``merge`` x ``merge``, those sorted by windows.

    Args:
        model: the tower.
        tokens: the layout of an image.
        merge: edge of the groups in which patches come.
        merged: edge of the groups that the output merges.
        leading: whether the output has a leading axis of one.

    Raises:
        SpecError: the image does not hold whole groups.
    """
    rows, columns = tokens.grid
    edge = max(merge, merged)
    if (rows * tokens.patch_size[0], columns * tokens.patch_size[1]) != tokens.image_size or (
        rows % edge or columns % edge
    ):
        raise SpecError(
            f"{type(model).__name__} takes images of whole groups of {edge} x {edge} patches, in pixels "
            f"multiples of {edge * tokens.patch_size[0]} x {edge * tokens.patch_size[1]}, not "
            f"{tokens.image_size[0]} x {tokens.image_size[1]}."
        )
    groups = torch.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
    sequence = groups.transpose(1, 2).reshape(-1, merge**2)
    if hasattr(model, "window_size"):
        sequence = sequence[_windows(model, tokens)]
    first = len(tokens.prefix)
    places = [*range(first), *(first + sequence.flatten().argsort()).tolist()]
    return Packing(tuple(places), rows * columns // merged**2, leading)


def _windows(model: Any, tokens: TokenLayout) -> Tensor:
    """The order in which the tower's own rule takes the groups of one image."""
    from transformers.vision_utils import get_vision_window_index

    index: Tensor = get_vision_window_index(
        torch.tensor([[1, *tokens.grid]]),
        spatial_merge_size=model.spatial_merge_size,
        window_size=model.window_size,
        patch_size=model.patch_size,
    )[0]
    return index


def patches_of(x: Tensor, patch: tuple[int, int], merge: int) -> tuple[Tensor, Tensor]:
    """Cut images ``[batch, 3, height, width]`` into patches, as the towers' image processors do.

    Returns:
        Patches ``[batch * token, 3, height, width]`` group by group, and the grid of each image
        (frames, rows, columns), ``[batch, 3]``.
    """
    rows, columns = x.shape[2] // patch[0], x.shape[3] // patch[1]
    cut = x.reshape(len(x), 3, rows // merge, merge, patch[0], columns // merge, merge, patch[1])
    patches = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3, *patch)
    return patches, torch.tensor([[1, rows, columns]] * len(x), device=x.device)


def repeated(patches: Tensor, frames: int) -> Tensor:
    """Flatten to ``[token, 3 * frames * height * width]``: a still image is a film of equal frames."""
    return patches[:, :, None].expand(-1, -1, frames, -1, -1).flatten(1)


def frames_of(projection: nn.Module) -> int:
    """How many frames the projection of patches takes at once."""
    return int(projection.kernel_size[0]) if isinstance(projection, nn.Conv3d) else 1


def foreign_parts(model: Any, parts: frozenset[str]) -> str | None:
    """Why a model is refused that takes no patches with a grid, or holds other parts; None if it is not.

    Towers of transformers 4 are refused as well: they lay out batches otherwise.
    """
    if not {"grid_thw", "image_grid_thw"} & {*signature(type(model).forward).parameters}:
        return "it takes no patches with the grid of each image"
    if find_spec("transformers.vision_utils") is None:
        return "its batches are laid out as by transformers 5; with transformers 4 it is not covered"
    held = {name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))}
    foreign = ", ".join(map(repr, sorted(held - parts)))
    return f"it also holds {foreign}, unknown to this family" if foreign else None
