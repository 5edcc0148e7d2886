"""From PIL images to the model's input, exactly as the model's own library does it.

A `Preprocess` wraps the transform that timm or transformers builds from a checkpoint's own configuration, and
knows its `Geometry`, so that pixel boxes of the original image become patches of the model's input.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.errors import DataError, UnsupportedModelError, suggest
from vit_mechinterp.model.geometry import (
    CenterCrop,
    Geometry,
    ResizeExact,
    ResizeInside,
    ResizeShortest,
    Step,
    TrimBorder,
    patches_of_box,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor, nn

__all__ = ["Geometry", "Preprocess", "patches_of_box"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preprocess:
    """A checkpoint's own transform for evaluation, and what it does to positions.

    Attributes:
        transform: makes a float tensor ``[batch, 3, height, width]`` of a list of PIL images.
        geometry: the resizes and crops of ``transform``.
        config: plain values that determine ``transform``, for the provenance of results.
    """

    transform: Callable[[list[Image]], Tensor] = field(repr=False)
    geometry: Geometry
    config: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, images: Sequence[Image]) -> Float[Tensor, "batch 3 height width"]:
        """Return the model input for PIL images of any size and mode, on the CPU, in float32.

        Raises:
            DataError: ``images`` is empty, holds something else than PIL images, or images that cannot share
                a batch.
        """
        import PIL.Image

        pictures: list[Image] = [images] if isinstance(images, PIL.Image.Image) else list(images)
        if not pictures:
            raise DataError("There is no image to preprocess: the list is empty.")
        for index, picture in enumerate(pictures):
            if not isinstance(picture, PIL.Image.Image):
                raise DataError(
                    f"Image {index} is a {type(picture).__name__}; preprocessing takes PIL images. "
                    "Tensors of the model's input size go to the model as they are."
                )
        return self.transform(pictures)

    @classmethod
    def from_timm(cls, module: nn.Module) -> Preprocess:
        """Build the evaluation transform that timm resolves for ``module``.

        Where the module's own input size differs from its checkpoint's (``create_model(..., img_size=128)``),
        the module's is used.

        Raises:
            UnsupportedModelError: the model does not take three channels.
        """
        import timm.data
        import torch

        library: Any = timm.data
        config = library.resolve_model_data_config(module)
        channels = config["input_size"][0]
        if channels != 3:
            raise UnsupportedModelError(
                f"{type(module).__name__} takes {channels} channels; images have 3. "
                "Give it tensors of its own input shape instead of images."
            )
        own_size = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if own_size is not None:
            config = library.resolve_model_data_config(module, args={"input_size": (channels, *own_size)})
        single = library.create_transform(**config, is_training=False)

        def transform(images: list[Image]) -> Tensor:
            return torch.stack([single(image.convert("RGB")) for image in images])

        return cls(transform, _timm_geometry(single), {"library": "timm", **config})

    @classmethod
    def from_transformers(cls, module: nn.Module, folder_or_name: str | Path | None = None) -> Preprocess:
        """Build the image processor of a transformers model.

        Args:
            module: the model; its ``config`` gives type and image size.
            folder_or_name: a ``save_pretrained`` folder or a hub name. Its ``preprocessor_config.json`` is
                used where there is one. Otherwise, and with ``None``, the processor class of the model type
                is built for the model's image size with the class's own mean and standard deviation. Only a
                hub name reaches the network.

        Raises:
            UnsupportedModelError: there is no configuration, and no processor is known for the model type.
            DataError: a processor's configuration cannot be reached or read.
        """
        processor = _saved_processor(folder_or_name) if folder_or_name is not None else None
        if processor is None:
            processor = _default_processor(module)

        def transform(images: list[Image]) -> Tensor:
            if not getattr(processor, "do_convert_rgb", False):
                images = [image.convert("RGB") for image in images]
            try:
                pixels: Tensor = processor(images=images, return_tensors="pt")["pixel_values"]
            except ValueError as error:
                raise DataError(
                    f"{type(processor).__name__} cannot make one batch of images of width x height "
                    f"{sorted({image.size for image in images})}: {error}"
                ) from error
            return pixels

        config = {"library": "transformers", **processor.to_dict()}
        return cls(transform, _transformers_geometry(processor), config)


def _timm_geometry(transform: Any) -> Geometry:
    """Read the resizes and crops off timm's composed transform; normalisation does not move pixels."""
    steps: list[Step] = []
    for part in getattr(transform, "transforms", [transform]):
        match type(part).__name__:
            case "Resize" if isinstance(part.size, int):
                steps.append(ResizeShortest(part.size))
            case "Resize" if len(part.size) == 1:
                steps.append(ResizeShortest(part.size[0]))
            case "Resize":
                height, width = part.size
                steps.append(ResizeExact(height, width))
            case "ResizeKeepRatio" if part.longest in (0.0, 1.0):
                height, width = part.size
                steps.append(ResizeInside(height, width, inside=part.longest == 1.0))
            case "CenterCrop" | "CenterCropOrPad":
                height, width = (part.size, part.size) if isinstance(part.size, int) else part.size
                steps.append(CenterCrop(height, width, rounding="nearest"))
            case "TrimBorder":
                steps.append(TrimBorder(part.border_size))
            case "MaybeToTensor" | "ToTensor" | "MaybePILToTensor" | "PILToTensor" | "Normalize":
                continue
            case name:
                return Geometry(unknown=f"timm's transform has a step {name} with positions of its own")
    return Geometry(tuple(steps))


def _transformers_geometry(processor: Any) -> Geometry:
    """Read the resize and crop rules off an image processor of transformers."""
    from transformers.image_processing_backends import TorchvisionBackend

    name = type(processor).__name__
    rules = ("resize", "center_crop")
    own = [
        rule
        for rule in rules
        if getattr(type(processor), rule, None) is not getattr(TorchvisionBackend, rule)
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
        steps.append(CenterCrop(crop["height"], crop["width"], rounding="down"))
    return Geometry(tuple(steps))


def _saved_processor(folder_or_name: str | Path) -> Any | None:
    """Load the processor saved with a checkpoint, or return None where the checkpoint has none."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from transformers import AutoImageProcessor

    local = Path(folder_or_name).is_dir()
    if local and not (Path(folder_or_name) / "preprocessor_config.json").is_file():
        return None
    auto: Any = AutoImageProcessor
    try:
        return auto.from_pretrained(str(folder_or_name), local_files_only=local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        cause = error.__cause__
        if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
            logger.warning("%s has no preprocessor_config.json; using its type's default", folder_or_name)
            return None
        raise DataError(
            f"The image processor of {str(folder_or_name)!r} could not be read: {error} "
            "Give tensors instead of images, or repair preprocessor_config.json."
        ) from error


def _default_processor(module: nn.Module) -> Any:
    """Build the processor class of the model's type, its sizes scaled to the model's image size."""
    import transformers
    import transformers.models.auto.image_processing_auto as auto

    known: Mapping[str, Mapping[str, str]] = vars(auto)["IMAGE_PROCESSOR_MAPPING_NAMES"]
    config: Any = getattr(module, "config", None)
    model_type = str(getattr(config, "model_type", ""))
    image_size = getattr(getattr(config, "vision_config", config), "image_size", None)
    # A vision tower and a variant share their family's processor: "clip_vision_model" is listed as "clip".
    words = model_type.split("_")
    names = ["_".join(words[:end]) for end in range(len(words), 0, -1)]
    listed = next((known[name] for name in names if name in known), None)
    if not listed or "torchvision" not in listed or image_size is None:
        raise UnsupportedModelError(
            f"No image processor is known for {type(module).__name__} (config.model_type {model_type!r}, "
            f"image_size {image_size}).{suggest(model_type, known)} Save one beside the model "
            "(preprocessor_config.json), or give tensors instead of images."
        )
    processor_class: Any = getattr(transformers, listed["torchvision"])
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    edges = {"height": height, "width": width, "shortest_edge": max(height, width)}
    size: dict[str, int] = dict(processor_class.size)
    if not set(size) <= set(edges):
        raise UnsupportedModelError(
            f"{processor_class.__name__} resizes by the rule {size}, which does not follow from the model's "
            f"image size {image_size}. Save the processor beside the model (preprocessor_config.json)."
        )
    crop = processor_class.crop_size if getattr(processor_class, "do_center_crop", False) else None
    # DeiT resizes to 256 and crops 224: at another image size the same share is cropped away.
    default = max(dict(crop or size).values())
    options = {"size": {edge: round(value * edges[edge] / default) for edge, value in size.items()}}
    if crop:
        options["crop_size"] = {"height": height, "width": width}
    return processor_class(**options)
