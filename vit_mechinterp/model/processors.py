"""Image processors of transformers: the one saved with a checkpoint, or its type's own, and its geometry."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.errors import DataError, UnsupportedModelError, suggest
from vit_mechinterp.model.backends import crop_rounding, fast_options, listed_name, torchvision_backend
from vit_mechinterp.model.geometry import CenterCrop, Geometry, ResizeExact, ResizeShortest, Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from torch import Tensor, nn

__all__ = ["default_processor", "geometry_of", "saved_processor", "to_exact_size", "tower_processor"]

logger = logging.getLogger(__name__)


def geometry_of(processor: Any) -> Geometry:
    """Read the resize and crop rules off an image processor of transformers."""
    backend = torchvision_backend()
    name = type(processor).__name__
    rules = ("resize", "center_crop")
    own = [
        rule
        for rule in rules
        if getattr(type(processor), rule, None) is not getattr(backend, rule)
    ]
    if own:
        return Geometry(unknown=f"{name} has rules of its own for {' and '.join(own)}")
    if getattr(processor, "do_pad", None):
        return Geometry(unknown=f"{name} pads its images (do_pad=True)")
    steps: list[Step] = []
    if processor.do_resize:
        size = {key: value for key, value in dict(processor.size).items() if value is not None}
        match sorted(size):
            case ["height", "width"]:
                steps.append(ResizeExact(size["height"], size["width"]))
            case ["shortest_edge"]:
                steps.append(ResizeShortest(size["shortest_edge"]))
            case ["longest_edge", "shortest_edge"]:
                steps.append(ResizeShortest(size["shortest_edge"], longest=size["longest_edge"]))
            case _:
                return Geometry(unknown=f"{name} resizes by the rule {size}")
    if getattr(processor, "do_center_crop", None):
        crop = processor.crop_size
        steps.append(CenterCrop(crop["height"], crop["width"], rounding=crop_rounding(processor)))
    return Geometry(tuple(steps))


def saved_processor(folder_or_name: str | Path) -> Any | None:
    """Load the processor saved with a checkpoint, or return None where the checkpoint has none."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from transformers import AutoImageProcessor

    local = Path(folder_or_name).is_dir()
    if local and not (Path(folder_or_name) / "preprocessor_config.json").is_file():
        return None
    auto: Any = AutoImageProcessor
    options = {"local_files_only": local, "trust_remote_code": False, **fast_options()}
    try:
        return auto.from_pretrained(str(folder_or_name), **options)
    except (OSError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            logger.warning("%s has no preprocessor_config.json; using its type's default", folder_or_name)
            return None
        raise DataError(
            f"The image processor of {str(folder_or_name)!r} could not be read: {error} "
            "Give tensors instead of images, or repair preprocessor_config.json."
        ) from error


def tower_processor(module: nn.Module) -> Any:
    """Build the processor class of a vision tower's type, as it is."""
    return _class_for(module)()


def to_exact_size(processor: Any, height: int, width: int) -> Callable[[list[Image]], Tensor]:
    """A transform that resizes, rescales and normalises as a processor does, and cuts no patches.

    Processors that make patches choose a size for every image; here all images are given one.

    Raises:
        UnsupportedModelError: the processor is not of torchvision's kind.
    """
    from transformers.image_utils import SizeDict

    backend = torchvision_backend()
    if not isinstance(processor, backend):
        raise UnsupportedModelError(
            f"{type(processor).__name__} makes patches of images, and is not of torchvision's kind; give "
            "float tensors instead of images."
        )
    size = SizeDict(height=height, width=width)

    def transform(images: list[Image]) -> Tensor:
        import torch

        pixels = [processor.process_image(image.convert("RGB"), do_convert_rgb=True) for image in images]
        resample = getattr(processor, "resample", None)
        resized = [backend.resize(processor, one, size, resample=resample) for one in pixels]
        made: Tensor = processor.rescale_and_normalize(
            torch.stack(resized),
            processor.do_rescale,
            processor.rescale_factor,
            processor.do_normalize,
            processor.image_mean,
            processor.image_std,
        )
        return made

    return transform


def _class_for(module: nn.Module) -> Any:
    """The processor class of the model's type."""
    import transformers
    import transformers.models.auto.image_processing_auto as auto

    known: Mapping[str, Any] = vars(auto)["IMAGE_PROCESSOR_MAPPING_NAMES"]
    model_type = str(getattr(getattr(module, "config", None), "model_type", ""))
    # A vision tower and a variant share their family's processor: "clip_vision_model" is listed as "clip".
    words = model_type.split("_")
    names = ["_".join(words[:end]) for end in range(len(words), 0, -1)]
    listed = listed_name(next((known[name] for name in names if name in known), None))
    if listed is None:
        raise UnsupportedModelError(
            f"No image processor is known for {type(module).__name__} (config.model_type {model_type!r})."
            f"{suggest(model_type, known)} {_INSTEAD}"
        )
    return getattr(transformers, listed)


_INSTEAD = "Save one beside the model (preprocessor_config.json), or give tensors instead of images."


def default_processor(module: nn.Module) -> Any:
    """Build the processor class of the model's type, its sizes scaled to the model's image size."""
    processor_class = _class_for(module)
    config: Any = getattr(module, "config", None)
    image_size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if image_size is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no image_size for its {processor_class.__name__}. {_INSTEAD}"
        )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    edges = {"height": height, "width": width, "shortest_edge": max(height, width)}
    made = processor_class()
    size = {edge: value for edge, value in dict(made.size).items() if value is not None}
    if not set(size) <= set(edges):
        raise UnsupportedModelError(
            f"{processor_class.__name__} resizes by the rule {size}, which does not follow from the model's "
            f"image size {image_size}. Save the processor beside the model (preprocessor_config.json)."
        )
    crop = made.crop_size if getattr(made, "do_center_crop", False) else None
    # DeiT resizes to 256 and crops 224: at another image size the same share is cropped away.
    default = max(dict(crop or size).values())
    options = {"size": {edge: round(value * edges[edge] / default) for edge, value in size.items()}}
    if crop:
        options["crop_size"] = {"height": height, "width": width}
    return processor_class(**options)
