"""The families of ViTs that the package knows, one flat file per layout."""

if __name__ == "adapters":
    raise ImportError("This folder is part of vit_mechinterp; import vit_mechinterp.adapters.")

from vit_mechinterp.adapters.timm_vit import VIT as TIMM_VIT
from vit_mechinterp.adapters.transformers_clip import CLIP
from vit_mechinterp.adapters.transformers_dinov2 import DINOV2
from vit_mechinterp.adapters.transformers_vit import VIT as TRANSFORMERS_VIT

FAMILIES = (TIMM_VIT, TRANSFORMERS_VIT, DINOV2, CLIP)
"""In the order in which they are tried."""

__all__ = ["FAMILIES"]
