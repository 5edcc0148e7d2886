"""A native ViT behind one interface."""

from vit_mechinterp.model.conformance import Report, check
from vit_mechinterp.model.hooked import ActivationCache, HookedViT, SiteInfo
from vit_mechinterp.model.layout import Family, Layout, Port, Readout, TokenLayout
from vit_mechinterp.model.loading import checkpoints, load
from vit_mechinterp.model.positional import positional_attention
from vit_mechinterp.model.registry import families, register, register_adapter, wrap

__all__ = [
    "ActivationCache",
    "Family",
    "HookedViT",
    "Layout",
    "Port",
    "Readout",
    "Report",
    "SiteInfo",
    "TokenLayout",
    "check",
    "checkpoints",
    "families",
    "load",
    "positional_attention",
    "register",
    "register_adapter",
    "wrap",
]
