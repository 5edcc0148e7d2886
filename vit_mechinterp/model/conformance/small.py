"""The size of the images that a model is checked on.

Explicit attention over ``n`` tokens holds ``n * n`` numbers per head and row, and the checks use a row for
every site of a block. A model that takes images of several sizes does the same at all of them, so one of many
patches is checked on a small image.
"""

from __future__ import annotations

import math

from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.resolve import resolve
from vit_mechinterp.model.sizes import require_size

__all__ = ["MANY", "at_size", "moderate"]

MANY = 256
"""Patches above which a smaller image is tried."""
GRIDS = ((12, 16), (8, 12), (6, 8), (16, 16))
"""Grids of patches to try, in this order: more than one window, even for models that group patches, and not
square."""


def at_size(vit: HookedViT, image_size: tuple[int, int]) -> HookedViT:
    """The same module, row and source behind a wrapper for images of another size.

    Raises:
        SpecError: the model does not take them.
    """
    if image_size == vit.layout.tokens.image_size:
        return vit
    layout = resolve(vit.layout.family, vit.module, image_size)
    other = HookedViT(vit.module, layout, vit.source, vit.origin)
    other.compiled = vit.compiled
    require_size(other)
    return other


def moderate(vit: HookedViT) -> HookedViT:
    """The model for images of at most 256 patches, if it takes any of a few such sizes; else as it is."""
    tokens = vit.layout.tokens
    frames = math.prod(tokens.grid[:-2])
    if tokens.n_patches <= MANY or vit.module.training or not vit.layout.family.any_size(vit.module):
        return vit
    for rows, columns in GRIDS:
        if frames * rows * columns > tokens.n_patches:
            break
        try:
            return at_size(vit, (rows * tokens.patch_size[0], columns * tokens.patch_size[1]))
        except SpecError:
            continue
    return vit
