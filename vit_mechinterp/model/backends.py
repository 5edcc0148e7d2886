"""Where transformers 4 and 5 keep the image processors that compute with torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal

__all__ = ["crop_rounding", "fast_options", "listed_name", "torchvision_backend"]


def torchvision_backend() -> Any:
    """The class of image processors that compute with torchvision."""
    if _before_5():
        from transformers.image_processing_utils_fast import BaseImageProcessorFast

        return BaseImageProcessorFast
    from transformers.image_processing_backends import TorchvisionBackend

    return TorchvisionBackend


def fast_options() -> dict[str, Any]:
    """What makes `AutoImageProcessor` choose that kind of processor where there is one."""
    return {"use_fast": True} if _before_5() else {}


def listed_name(entry: Mapping[str, str] | Sequence[str | None] | str | None) -> str | None:
    """The processor class that transformers lists for a model type; None if it lists none to be used."""
    if not entry:
        return None
    if isinstance(entry, str):
        return entry
    if isinstance(entry, Mapping):
        return entry.get("torchvision")
    # transformers 4 lists the one that computes with numpy, then, if there is one, that with torchvision.
    return next((name for name in reversed(entry) if name), None)


def crop_rounding(processor: Any) -> Literal["nearest", "down"]:
    """What the processor's central crop makes of half a pixel, found by trying: versions differ."""
    import torch

    ramp = torch.arange(5.0).expand(1, 5, 5)
    left = int(processor.center_crop(ramp, _Size(height=2, width=2))[0, 0, 0])
    return "down" if left == 1 else "nearest"


class _Size(dict[str, int]):
    """A size as both versions read it: by keys and by attributes."""

    def __getattr__(self, name: str) -> int | None:
        return self.get(name)


def _before_5() -> bool:
    return find_spec("transformers.image_processing_backends") is None
