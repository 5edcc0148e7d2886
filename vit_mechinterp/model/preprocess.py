"""From PIL images to the model's input, exactly as the model's own library does it.

A `Preprocess` wraps the transform that a model's library builds from a checkpoint's own configuration, and
knows its `Geometry`, so that pixel boxes of the original image become patches of the model's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.errors import DataError, UnsupportedModelError
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
from vit_mechinterp.model.processors import (
    default_processor,
    geometry_of,
    saved_processor,
    to_exact_size,
    tower_processor,
)

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor, nn

    from vit_mechinterp.model.layout import Layout

__all__ = ["Geometry", "Preprocess", "patches_of_box"]


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

    @classmethod
    def of(cls, module: nn.Module, layout: Layout, origin: str | None) -> Preprocess:
        """The transform of a model of any library; ``origin`` is the string that it was loaded by, if any.

        Raises:
            UnsupportedModelError: nothing is known of the library, or of the images of the model's type.
        """
        name = origin.partition("/")[2] if origin else None
        if layout.packing is not None:
            return cls.for_tower(module, layout.tokens.image_size, name)
        match layout.family.library:
            case "timm":
                return cls.from_timm(module)
            case "transformers":
                return cls.from_transformers(module, name)
            case "torchvision":
                return cls.from_torchvision(module, name)
            case "open_clip":
                return cls.from_open_clip(module)
        raise UnsupportedModelError(
            f"No preprocessing is known for models of {layout.family.name}: give float tensors of shape "
            f"{layout.tokens.input_shape} instead of images."
        )

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
        return cls(_one_by_one(single), _composed_geometry(single, "timm"), {"library": "timm", **config})

    @classmethod
    def from_torchvision(cls, module: nn.Module, name: str | None = None) -> Preprocess:
        """Build the evaluation transform of torchvision's weights.

        Args:
            module: the model; its ``image_size`` is used where ``name`` names no weights.
            name: of weights, as ``vit_b_16.IMAGENET1K_V1``. Without it the default transform of ViT-B/16 is
                scaled to the model's image size.
        """
        import torchvision.models

        from vit_mechinterp.model.from_torchvision import weights_of

        size: Any = getattr(module, "image_size", None)
        weights = weights_of(name) if name is not None else None
        preset: Any = None if weights is None else weights.transforms()
        if preset is None or preset.crop_size != [size]:
            default = torchvision.models.ViT_B_16_Weights.DEFAULT.transforms
            preset = default(crop_size=size, resize_size=round(size * 256 / 224))
        steps = (ResizeShortest(preset.resize_size[0]), CenterCrop(size, size, rounding="nearest"))
        names = ("crop_size", "resize_size", "mean", "std", "antialias")
        config = {name: getattr(preset, name) for name in names}
        config |= {"library": "torchvision", "interpolation": preset.interpolation.value}
        return cls(_one_by_one(preset), Geometry(steps), config)

    @classmethod
    def from_open_clip(cls, module: nn.Module) -> Preprocess:
        """Build the evaluation transform that open_clip keeps with a vision tower, or its default one."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        config: dict[str, Any] = dict(getattr(module, "preprocess_cfg", {}))
        config["size"] = getattr(module, "image_size", config.get("size", 224))
        single = image_transform_v2(PreprocessCfg(**config), is_train=False)
        geometry = _composed_geometry(single, "open_clip")
        return cls(_one_by_one(single), geometry, {"library": "open_clip", **config})

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
        processor = saved_processor(folder_or_name) if folder_or_name is not None else None
        if processor is None:
            processor = default_processor(module)

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
        return cls(transform, geometry_of(processor), config)

    @classmethod
    def for_tower(
        cls, module: nn.Module, image_size: tuple[int, int], folder_or_name: str | Path | None = None
    ) -> Preprocess:
        """The same for a vision tower that takes patches: images of one size, which the tower's row cuts.

        The tower's own processor chooses a size for every image, near the image's own; images that it would
        leave at ``image_size`` become the same patches here.

        Args:
            module: the tower.
            image_size: ``(height, width)`` that every image is resized to.
            folder_or_name: as in `from_transformers`.

        Raises:
            UnsupportedModelError: no processor is known for the tower's type.
        """
        processor = saved_processor(folder_or_name) if folder_or_name is not None else None
        processor = tower_processor(module) if processor is None else processor
        config = {"library": "transformers", **processor.to_dict(), "resized_to": list(image_size)}
        return cls(to_exact_size(processor, *image_size), Geometry((ResizeExact(*image_size),)), config)


def _one_by_one(single: Callable[[Image], Tensor]) -> Callable[[list[Image]], Tensor]:
    """A transform of one image, for lists of images of any mode."""

    def transform(images: list[Image]) -> Tensor:
        import torch

        return torch.stack([single(image.convert("RGB")) for image in images])

    return transform


def _composed_geometry(transform: Any, library: str) -> Geometry:
    """Read the resizes and crops off a composed transform; normalisation does not move pixels."""
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
            case "MaybeConvertMode" | "MaybeToTensor" | "MaybePILToTensor" | "ToTensor" | "PILToTensor":
                continue
            case "Normalize":
                continue
            case "function" if part.__name__ == "_convert_to_rgb":  # of older versions of open_clip
                continue
            case name:
                return Geometry(unknown=f"{library}'s transform has a step {name} with positions of its own")
    return Geometry(tuple(steps))
