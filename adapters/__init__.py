"""The families of ViTs that the package knows, one flat file per layout; `transformers_packed` and
`transformers_readout` hold what several of them share.
"""

if __name__ == "adapters":
    raise ImportError("This folder is part of vit_mechinterp; import vit_mechinterp.adapters.")

from vit_mechinterp.adapters.open_clip import CUSTOM as OPEN_CLIP_CUSTOM
from vit_mechinterp.adapters.open_clip import VIT as OPEN_CLIP
from vit_mechinterp.adapters.open_clip import around as around_in_open_clip
from vit_mechinterp.adapters.timm_cait import CAIT
from vit_mechinterp.adapters.timm_differential import DIFFERENTIAL
from vit_mechinterp.adapters.timm_encoder import ENCODER
from vit_mechinterp.adapters.timm_gemma4 import GEMMA4
from vit_mechinterp.adapters.timm_naflex import NAFLEX
from vit_mechinterp.adapters.timm_parallel import PARALLEL, PARALLEL_DIFFERENTIAL, PARALLEL_THINGS
from vit_mechinterp.adapters.timm_post_norm import POST_NORM
from vit_mechinterp.adapters.timm_sam import SAM as TIMM_SAM
from vit_mechinterp.adapters.timm_vit import VIT as TIMM_VIT
from vit_mechinterp.adapters.timm_xcit import XCIT
from vit_mechinterp.adapters.torchvision_vit import VIT as TORCHVISION
from vit_mechinterp.adapters.transformers_beit import BEIT, DATA2VEC
from vit_mechinterp.adapters.transformers_bert import BERT
from vit_mechinterp.adapters.transformers_blip import BLIP
from vit_mechinterp.adapters.transformers_clip import CLIP, JANUS, MLCD, PHI4, SIGLIP
from vit_mechinterp.adapters.transformers_clip_towers import GRANITE_DOCLING, MOLMO2
from vit_mechinterp.adapters.transformers_dinov2 import DINOV2, DINOV2_BERT, EOMT_STYLE
from vit_mechinterp.adapters.transformers_gated import AIMV2, PIXTRAL
from vit_mechinterp.adapters.transformers_gemma4 import GEMMA4 as TRANSFORMERS_GEMMA4
from vit_mechinterp.adapters.transformers_internvl import INTERNVL, STEP3
from vit_mechinterp.adapters.transformers_llama4 import LLAMA4
from vit_mechinterp.adapters.transformers_mgp_str import MGP_STR
from vit_mechinterp.adapters.transformers_packed_clip import (
    COSMOS_EDGE,
    HUNYUAN,
    INKLING2,
    MINIMAX,
    PADDLE_OCR,
    VIDEO_LLAMA,
)
from vit_mechinterp.adapters.transformers_pix2struct import KOSMOS2_5, PIX2STRUCT
from vit_mechinterp.adapters.transformers_qwen_vl import QWEN_VL
from vit_mechinterp.adapters.transformers_sam import SAM as TRANSFORMERS_SAM
from vit_mechinterp.adapters.transformers_sam import SAM3
from vit_mechinterp.adapters.transformers_timm_wrapper import around
from vit_mechinterp.adapters.transformers_vit import VIT as TRANSFORMERS_VIT
from vit_mechinterp.adapters.transformers_vjepa2 import VJEPA2

TIMM = (
    TIMM_SAM,
    TIMM_VIT,
    POST_NORM,
    NAFLEX,
    DIFFERENTIAL,
    PARALLEL,
    PARALLEL_DIFFERENTIAL,
    PARALLEL_THINGS,
    ENCODER,
    GEMMA4,
    CAIT,
    XCIT,
)
TRANSFORMERS = (
    QWEN_VL,
    PADDLE_OCR,
    VIDEO_LLAMA,
    COSMOS_EDGE,
    MINIMAX,
    HUNYUAN,
    INKLING2,
    MOLMO2,
    GRANITE_DOCLING,
    KOSMOS2_5,
    PIX2STRUCT,
    TRANSFORMERS_GEMMA4,
    TRANSFORMERS_VIT,
    BEIT,
    DATA2VEC,
    BERT,
    INTERNVL,
    DINOV2,
    DINOV2_BERT,
    EOMT_STYLE,
    CLIP,
    MLCD,
    SIGLIP,
    JANUS,
    PHI4,
    BLIP,
    AIMV2,
    PIXTRAL,
    TRANSFORMERS_SAM,
    SAM3,
    STEP3,
    LLAMA4,
    MGP_STR,
    VJEPA2,
)
OTHERS = (TORCHVISION, OPEN_CLIP, OPEN_CLIP_CUSTOM)
FAMILIES = (*TIMM, *TRANSFORMERS, *OTHERS, *map(around, TIMM), *map(around_in_open_clip, TIMM))
"""In the order in which they are tried."""

__all__ = ["FAMILIES"]
