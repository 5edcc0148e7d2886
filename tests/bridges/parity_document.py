"""docs/parity.md, made from the parity matrices of tiny models: ``python -m tests.bridges.parity_document``."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import vit_mechinterp as vmi
from tests.tiny_models import HF_CLIP, HF_DINOV2, HF_VIT, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp.bridges.parity import Parity, parity

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "parity.md"
MODELS: dict[str, Tiny] = {
    "timm VisionTransformer": TIMM_PLAIN,
    "timm VisionTransformer with registers, LayerScale, q/k norm and SwiGLU": TIMM_REGISTERS,
    "timm VisionTransformer with average pooling": TIMM_POOLED,
    "transformers ViTForImageClassification": HF_VIT,
    "transformers Dinov2WithRegistersForImageClassification": HF_DINOV2,
    "transformers CLIPVisionModelWithProjection": HF_CLIP,
}
_OPENING = """# Parity

The same runs on this package's engine and on four other ways to carry them out: plain PyTorch hooks, nnsight
{nnsight}, pyvene {pyvene} and TransformerLens {transformer_lens}. A cell is the largest difference of any output
from the engine's, as a share of the outputs' scale, or a refusal with its reason below. *Effect* is the least
change that the run makes to any example's output: a run that changes nothing would agree with everything.

What an intervention makes of a value is written once for these ways (`bridges/meaning.py`), apart from the engine; how
values are reached is each package's own. TransformerLens gets its hook points from this package; its own bridge of
ViTs is compared in the tests, hook point by hook point and by interchanges.

The models are tiny, with random weights. `vit-mechinterp parity MODEL` prints the table for any model, and
exits with 1 if something differs. `python -m tests.bridges.parity_document` writes this page, and a test holds
it against what is computed.
"""


def matrices() -> dict[str, Parity]:
    """The matrix of every model."""
    return {name: parity(vmi.wrap(tiny.module()), progress=False) for name, tiny in MODELS.items()}


def written(found: dict[str, Parity]) -> str:
    """The page."""
    names = {"nnsight": "nnsight", "pyvene": "pyvene", "transformer_lens": "transformer-lens"}
    parts = [_OPENING.format(**{name: metadata.version(package) for name, package in names.items()})]
    parts += [f"## {name}\n\n{matrix.to_markdown()}\n" for name, matrix in found.items()]
    return "\n".join(parts)


def comparable(page: str) -> str:
    """The page without sizes of differences and versions, which depend on the machine."""
    page = re.sub(r"\| (0|\de-\d\d|\d(\.\d+)?)(?= \|)", "| (number)", page)
    return re.sub(r"\d+\.\d+\.\d+", "(version)", page)


if __name__ == "__main__":
    DOCUMENT.write_text(written(matrices()), encoding="utf-8")
