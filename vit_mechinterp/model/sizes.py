"""Images of another size than the model's own: tried once where a model is wrapped for them.

Whether a module takes them is the module's to say: its stem may ask for its own size, for whole patches or
windows, or interpolate its positions to anything. So one blank image goes through, and the tokens that arrive
at the first block must be those of the layout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vit_mechinterp.errors import ExecutionError, SpecError
from vit_mechinterp.model.instrument import Instrument
from vit_mechinterp.spec import Site

if TYPE_CHECKING:
    from vit_mechinterp.model.hooked import HookedViT

__all__ = ["require_images", "require_size"]


def require_size(vit: HookedViT) -> None:
    """Raise unless a module takes images of the size that its wrapper was made for.

    A module in train mode, or without memory, is not run; there its family's word counts.

    Raises:
        SpecError: with the module's own reason, or the number of tokens that it makes.
    """
    if vit.module.training or next(vit.module.parameters()).is_meta:
        reason = "" if vit.layout.family.any_size(vit.module) else "its family is made for one size"
    else:
        reason = _refusal(vit)
    if reason:
        own = vit.layout.family.tokens(vit.module).image_size
        given = vit.layout.tokens.image_size
        raise SpecError(
            f"{type(vit.module).__name__} takes no images of {given[0]} x {given[1]} pixels: {reason}. It is "
            f"made for {own[0]} x {own[1]}; give images of that size, or make the model for the other one"
            + (" (img_size=...)." if vit.layout.family.library == "timm" else ".")
        )


def _refusal(vit: HookedViT) -> str:
    seen: list[int] = []

    def count(value: Tensor) -> None:
        seen.append(value.shape[1])

    instrument = Instrument(vit.module, vit.layout)
    instrument.visit(Site(None, "embed"), count)
    devices = [vit.device] if vit.device.type == "cuda" else []
    try:
        with vit.lock, torch.no_grad(), torch.random.fork_rng(devices), instrument.installed():
            vit(vit.blank(1))
    except Exception as error:  # whatever the module's own check raises
        return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    wanted = vit.layout.tokens.n_tokens
    if seen == [wanted]:
        return ""
    found = seen[0] if seen else "no"
    return f"it makes {found} tokens of one where {wanted} were expected ({vit.layout.tokens})"


def require_images(vit: HookedViT, x: object) -> None:
    """Raise unless ``x`` is a batch of images of the size that the layout describes.

    Raises:
        ExecutionError: with what it is, and what to do.
    """
    tokens, name = vit.layout.tokens, type(vit.module).__name__
    wanted = ", ".join(map(str, ("batch", *tokens.input_shape)))
    if not isinstance(x, Tensor):
        kind = f"a dict of {', '.join(map(repr, x))}" if isinstance(x, dict) else f"a {type(x).__name__}"
        raise ExecutionError(
            f"{name} is given {kind}; a wrapped model takes one tensor of images [{wanted}]. Patches that "
            "are cut already come from images of several sizes, padded, and have no one grid that tokens "
            "could be named by: pass the images, in batches of one size, to a wrapper for that size, "
            "vit_mechinterp.wrap(vit, image_size=(height, width)), or call vit.module."
        )
    if tuple(x.shape[1:]) != tokens.input_shape:
        raise ExecutionError(
            f"{name} is given images {list(x.shape)}, and its layout describes [{wanted}]: {tokens}. Where "
            "sites are read or written every token has its place, so images of another size need a wrapper "
            "of their own: vit_mechinterp.wrap(vit, image_size=(height, width)), if the model takes them."
        )
