"""timm's `NaFlexVit`, given images: its tokens are made by a module of their own, for images of any size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vit_mechinterp.adapters.timm_vit import VIT, norms_follow, wrong_channels
from vit_mechinterp.model.layout import TokenLayout


def tokens(model: Any) -> TokenLayout:
    """CLS, registers, patches; images of the pretrained configuration's size if no other is set."""
    embeds = model.embeds
    height, width = embeds.default_img_size or tuple(model.pretrained_cfg["input_size"][-2:])
    cls = ("cls",) if embeds.cls_token is not None else ()
    return TokenLayout(
        prefix=cls + ("registers",) * (model.num_prefix_tokens - len(cls)),
        grid=tuple(embeds.dynamic_feat_size((height, width))),
        patch_size=tuple(embeds.patch_size),
        image_size=(height, width),
    )


def refuses(model: Any) -> str | None:
    """Whether norms follow the branches, or images have other than three channels."""
    if norms_follow(model):
        return "its norms come after attention and MLP, not before"
    return wrong_channels(model)


NAFLEX = replace(VIT, name="timm.naflex", tokens=tokens, refuses=refuses, any_size=lambda model: True)
