"""Preprocessing gives the library's own numbers, and boxes land on the patches that the pixels land on."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vit_mechinterp.errors import DataError, UnsupportedModelError
from vit_mechinterp.model.geometry import Geometry, ResizeExact, patches_of_box
from vit_mechinterp.model.preprocess import Preprocess

SIZES = [(64, 64), (100, 70), (71, 133), (40, 30)]


def noise_image(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def timm_model(image_size: int | tuple[int, int] = 64, **pretrained_cfg: object) -> torch.nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=image_size,
        depth=1,
        embed_dim=8,
        num_heads=1,
        pretrained_cfg_overlay=pretrained_cfg,
    )


def transformers_model(kind: str, image_size: int = 64) -> torch.nn.Module:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    name, shape = {
        "vit": ("ViT", sizes),
        "deit": ("DeiT", sizes),
        "dinov2": ("Dinov2", sizes),
        "dinov2_with_registers": ("Dinov2WithRegisters", sizes),
        "clip_vision": ("CLIPVision", sizes),
        "siglip_vision": ("SiglipVision", sizes),
        "dinov3": ("DINOv3ViT", sizes),
    }[kind]
    config = getattr(transformers, f"{name}Config")(image_size=image_size, patch_size=16, **shape)
    return getattr(transformers, f"{name}Model")(config)


TIMM = {
    "center": timm_model(crop_pct=0.9, crop_mode="center"),
    "center-rectangle": timm_model((48, 80), crop_pct=0.875, crop_mode="center"),
    "squash": timm_model(crop_pct=0.9, crop_mode="squash", interpolation="bilinear"),
    "border": timm_model(crop_pct=0.8, crop_mode="border", mean=(0.1, 0.2, 0.3)),
    "border-full": timm_model(crop_pct=1.0, crop_mode="border"),
}
TRANSFORMERS = ["vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision", "siglip_vision"]
if find_spec("transformers.models.dinov3_vit"):  # since transformers 4.56
    TRANSFORMERS.append("dinov3")


@pytest.mark.parametrize("name", TIMM)
def test_timm_is_bit_equal_to_its_own_transform(name: str) -> None:
    from timm.data import create_transform, resolve_model_data_config

    module = TIMM[name]
    own_size = (3, *module.patch_embed.img_size)
    config = resolve_model_data_config(module, args={"input_size": own_size})
    transform = create_transform(**config)
    images = [noise_image(size, seed=seed) for seed, size in enumerate(SIZES)]

    result = Preprocess.from_timm(module)(images)

    assert result.shape == (len(SIZES), *own_size)
    assert torch.equal(result, torch.stack([transform(image) for image in images]))
    assert not torch.equal(result[0], result[1])


def processor_class(name: str) -> Any:
    """The class that computes with torchvision; transformers 4 has it under a name of its own, or not at all."""
    import transformers

    usual = getattr(transformers, f"{name}ImageProcessor")
    return usual if transformers.__version__ >= "5" else getattr(transformers, f"{name}ImageProcessorFast", usual)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_transformers_default_is_bit_equal_to_the_processor_class(kind: str) -> None:
    square, crop = {"height": 64, "width": 64}, {"crop_size": {"height": 64, "width": 64}}
    name, options = {
        "vit": ("ViT", {"size": square}),
        "deit": ("DeiT", {"size": {"height": 73, "width": 73}, **crop}),
        "dinov2": ("Bit", {"size": {"shortest_edge": 64}, **crop}),
        "clip_vision": ("CLIP", {"size": {"shortest_edge": 64}, **crop}),
        "siglip_vision": ("Siglip", {"size": square}),
        "dinov3": ("DINOv3ViT", {"size": square}),
    }["dinov2" if kind.startswith("dinov2") else kind]
    expected = processor_class(name)(**options)
    images = [noise_image(size, seed=seed) for seed, size in enumerate(SIZES)]

    result = Preprocess.from_transformers(transformers_model(kind))(images)

    assert torch.equal(result, expected(images=images, return_tensors="pt")["pixel_values"])
    assert result.shape == (len(SIZES), 3, 64, 64)


def test_a_saved_processor_is_used_as_it_is(tmp_path) -> None:

    module = transformers_model("vit")
    module.save_pretrained(tmp_path)
    by_default = Preprocess.from_transformers(module, tmp_path)
    saved = processor_class("CLIP")(
        size={"shortest_edge": 90}, crop_size={"height": 64, "width": 64}, image_mean=[0.1, 0.2, 0.3]
    )
    saved.save_pretrained(tmp_path)
    images = [noise_image((100, 70))]

    result = Preprocess.from_transformers(module, str(tmp_path))

    assert torch.equal(result(images), saved(images=images, return_tensors="pt")["pixel_values"])
    assert not torch.equal(result(images), by_default(images))
    assert result.config["size"] == {"shortest_edge": 90}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_every_mode_is_converted_to_rgb(mode: str) -> None:
    image = noise_image((64, 64), mode)
    rgb = image.convert("RGB")
    for preprocess in (
        Preprocess.from_timm(TIMM["center"]),
        Preprocess.from_transformers(transformers_model("vit")),
    ):
        assert torch.equal(preprocess([image]), preprocess([rgb]))


def preprocesses() -> dict[str, Preprocess]:
    found = {f"timm-{name}": Preprocess.from_timm(module) for name, module in TIMM.items()}
    for kind in TRANSFORMERS:
        found[f"transformers-{kind}"] = Preprocess.from_transformers(transformers_model(kind))
    return found


PREPROCESSES = preprocesses()
# transformers 4 lists only processors that compute with numpy for some types, and their geometry is not followed.
FOLLOWED = [name for name, made in PREPROCESSES.items() if made.geometry.unknown is None]


def test_what_is_not_followed_says_so() -> None:
    import transformers

    unknown = {name for name, made in PREPROCESSES.items() if made.geometry.unknown is not None}
    assert unknown <= {f"transformers-{kind}" for kind in ("dinov2", "dinov2_with_registers", "deit")}
    assert transformers.__version__ < "5" or not unknown
    assert all("rules of its own" in PREPROCESSES[name].geometry.unknown for name in unknown)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_box_lands_where_its_pixels_land(name: str, size: tuple[int, int]) -> None:
    """Oracle: change the pixels of a box, run the real transform, and see which pixels changed.

    Resampling filters blur an edge by about two pixels of the original or of the input, whichever is larger;
    beyond that nothing may change, and everything well inside the mapped box must.
    """
    preprocess = PREPROCESSES[name]
    geometry = preprocess.geometry
    width, height = size
    blank = Image.new("RGB", size, (255, 255, 255))
    before = preprocess([blank])[0]
    assert geometry.input_size(size) == (before.shape[2], before.shape[1])

    generator = np.random.default_rng(width * height)
    seen = 0
    for _ in range(12):
        x0, y0 = int(generator.integers(0, width - 12)), int(generator.integers(0, height - 12))
        box = (x0, y0, int(generator.integers(x0 + 8, width)), int(generator.integers(y0 + 8, height)))
        drawn = blank.copy()
        drawn.paste((255, 0, 0), box)
        changed = (preprocess([drawn])[0] - before).abs().amax(0).numpy() > 0.02
        try:
            left, top, right, bottom = geometry.map_box(box, size)
        except DataError:
            assert changed.sum() <= 2 * sum(changed.shape), "a box that still shows was called cropped away"
            continue
        seen += 1
        scale = max(changed.shape[1] / width, changed.shape[0] / height, 1.0)
        margin = 2.5 * scale
        inside = np.zeros_like(changed)
        inside[
            int(np.ceil(top + margin)) : max(int(bottom - margin), 0),
            int(np.ceil(left + margin)) : max(int(right - margin), 0),
        ] = True
        outside = np.ones_like(changed)
        outside[
            max(int(top - margin), 0) : int(np.ceil(bottom + margin)),
            max(int(left - margin), 0) : int(np.ceil(right + margin)),
        ] = False
        assert changed[inside].all()
        assert not changed[outside].any()
    assert seen > 3


@pytest.mark.parametrize("name", ["timm-center", "transformers-vit", "transformers-clip_vision"])
def test_patches_of_a_box_are_the_patches_that_change(name: str) -> None:
    """At the scale 1 there is no blur, so the patches must match exactly."""
    preprocess = PREPROCESSES[name]
    side = 71 if name == "timm-center" else 64  # timm resizes to 64 / 0.9 and crops
    blank = Image.new("RGB", (side, side), (255, 255, 255))
    before = preprocess([blank])[0]
    generator = np.random.default_rng(0)
    counts = set()
    for _ in range(40):
        x0, y0 = (int(value) for value in generator.integers(0, side - 8, 2))
        x1, y1 = x0 + int(generator.integers(4, 33)), y0 + int(generator.integers(4, 33))
        box = (x0, y0, min(x1, side), min(y1, side))
        drawn = blank.copy()
        drawn.paste((0, 0, 0), box)
        changed = (preprocess([drawn])[0] != before).any(0).reshape(4, 16, 4, 16).any(3).any(1)
        try:
            mapped = preprocess.geometry.map_box(box, (side, side))
        except DataError:
            assert not changed.any()
            continue
        patches = patches_of_box(mapped, 16, (4, 4))
        counts.add(len(patches))
        assert patches == changed.flatten().nonzero().flatten().tolist()
    assert len(counts) > 2


def test_aligned_boxes_select_no_neighbour_after_float_scaling() -> None:
    geometry = Geometry((ResizeExact(224, 224),))
    for cell in range(7):
        box = geometry.map_box((cell * 3, 0, cell * 3 + 3, 3), (21, 21))
        assert patches_of_box(box, 32, (7, 7)) == [cell]


def test_a_box_selects_its_patches_in_every_frame_of_a_video_grid() -> None:
    assert patches_of_box((16, 0, 32, 16), 16, (2, 2, 2)) == [1, 5]
    assert patches_of_box((0, 10, 9, 11), (10, 8), (3, 2)) == [2, 3]


def test_a_box_cropped_away_is_an_error_that_says_so() -> None:
    geometry = Preprocess.from_timm(TIMM["center"]).geometry
    with pytest.raises(
        DataError, match=r"Nothing of the box \(0, 0, 5, 5\) is left .* 200 x 64 .* to 64 x 64"
    ):
        geometry.map_box((0, 0, 5, 5), (200, 64))


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (9, 0, 3, 4), (0, 0, 3), (0, 0, float("nan"), 4)])
def test_a_malformed_box_is_an_error(box: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="is not a box: expected"):
        Geometry().map_box(box, (64, 64))
    with pytest.raises(DataError, match="is not a box: expected"):
        patches_of_box(box, 16, (4, 4))


def test_a_box_beyond_the_grid_is_an_error() -> None:
    with pytest.raises(DataError, match=r"touches no patch: the grid of 4 x 4 patches of 16 x 16 pixels"):
        patches_of_box((64, 0, 70, 5), 16, (4, 4))


def test_an_unknown_geometry_refuses_to_guess() -> None:
    geometry = Geometry(unknown="the processor pads")
    with pytest.raises(DataError, match=r"the processor pads\. Select tokens by patch index"):
        geometry.map_box((0, 0, 1, 1), (4, 4))


def test_a_processor_with_rules_of_its_own_has_unknown_geometry(tmp_path) -> None:
    import transformers

    if transformers.__version__ < "5":
        pytest.skip("in transformers 4 this processor does not pad")
    transformers.ViTImageProcessor(do_pad=True, pad_size={"height": 80, "width": 80}).save_pretrained(
        tmp_path
    )
    geometry = Preprocess.from_transformers(transformers_model("vit"), tmp_path).geometry
    assert geometry.unknown == "ViTImageProcessor pads its images (do_pad=True)"


def test_only_pil_images_are_taken() -> None:
    preprocess = Preprocess.from_timm(TIMM["center"])
    with pytest.raises(DataError, match="the list is empty"):
        preprocess([])
    with pytest.raises(DataError, match="Image 1 is a ndarray"):
        preprocess([noise_image((8, 8)), np.zeros((8, 8, 3))])


def test_a_model_type_without_a_processor_is_an_error() -> None:
    module = transformers_model("vit")
    module.config.model_type = "vitt"
    with pytest.raises(UnsupportedModelError, match=r"model_type 'vitt'.*Close matches: vit"):
        Preprocess.from_transformers(module)


def test_an_unreadable_saved_processor_is_an_error(tmp_path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{broken")
    with pytest.raises(DataError, match="could not be read"):
        Preprocess.from_transformers(transformers_model("vit"), tmp_path)
