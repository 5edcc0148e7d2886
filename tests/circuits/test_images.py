"""What users pass as images, and what corruptions make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vit_mechinterp as vmi
from tests.tiny_models import HF_VIT, TIMM_PLAIN, TIMM_REGISTERS
from vit_mechinterp.circuits.corruptions import (
    AnotherImage,
    Blur,
    Flat,
    Grey,
    Noise,
    PatchShuffle,
    corruption_of,
)
from vit_mechinterp.circuits.images import image_column, image_pairs, model_view, sample_photographs
from vit_mechinterp.errors import DataError, SpecError


def photograph(size: tuple[int, int] = (60, 44), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_two_images_lists_of_pairs_paths_and_datasets_give_the_same_columns(tmp_path: Path) -> None:
    from datasets import Dataset

    vit = vmi.wrap(TIMM_PLAIN.module())
    a, b = photograph(seed=1), photograph(seed=2)
    a.save(tmp_path / "a.png")
    b.save(tmp_path / "b.png")
    wanted = [vit.preprocess([a]), vit.preprocess([b])]
    paths = (str(tmp_path / "a.png"), tmp_path / "b.png")
    stored = Dataset.from_dict({"base": [a], "source": [b]})
    for given in ((a, b), [a, b], [(a, b)], paths, {"base": [a], "source": [b]}, stored):
        data = image_pairs(given, vit)
        for column, pixels in zip(("base", "source"), wanted, strict=True):
            assert torch.equal(vit.preprocess(list(data[column])), pixels)
    assert len(image_pairs([(a, b), (b, a), (a, a)], vit)["base"]) == 3
    tensors = tuple(TIMM_PLAIN.images(2))
    assert torch.equal(image_pairs(tensors, vit)["source"][0], tensors[1])


def test_single_images_come_from_lists_folders_tensors_and_image_folders(tmp_path: Path) -> None:
    from datasets import Dataset

    vit = vmi.wrap(TIMM_PLAIN.module())
    a, b = photograph(seed=1), photograph(seed=2)
    b.save(tmp_path / "b.png")
    a.save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    for given in ([a, b], tmp_path, {"image": [a, b]}, Dataset.from_dict({"image": [a, b], "label": [0, 1]})):
        assert torch.equal(vit.preprocess(list(image_column(given, vit)["base"])), vit.preprocess([a, b]))
    assert len(image_column(a, vit)["base"]) == 1
    stacked = TIMM_PLAIN.images(3)
    assert image_column(stacked, vit)["base"] is stacked


def test_bad_images_are_named() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    a, b = photograph(), photograph((44, 60))
    with pytest.raises(DataError, match=r"Pair 1: 'base' has 60 x 44 pixels and 'source' 44 x 60.*one size first"):
        image_pairs([(a, a), (a, b)], vit)
    with pytest.raises(DataError, match=r"Entry 1 of the list is no pair.*name a corruption, such as 'blur'"):
        image_pairs([(a, a), a, a], vit)
    with pytest.raises(DataError, match="Image is no pair of images: give two images"):
        image_pairs(a, vit)
    with pytest.raises(DataError, match="no readable image at /nowhere"):
        image_pairs((a, "/nowhere.png"), vit)
    with pytest.raises(DataError, match="not int"):
        image_pairs((a, 3), vit)
    with pytest.raises(DataError, match="no column 'source'"):
        image_pairs({"base": [a]}, vit)
    with pytest.raises(DataError, match="holds no image"):
        image_column(Path(__file__).parent, vit)
    with pytest.raises(SpecError, match=r"There is no corruption 'blurr'. Close matches: blur"):
        image_pairs(a, vit, corruption="blurr")
    with pytest.raises(DataError, match="at least two images"):
        image_pairs(a, vit, corruption="another")
    with pytest.raises(DataError, match="the shape must stay"):
        image_pairs(a, vit, corruption=lambda pixels, layout: pixels[..., :4])


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_REGISTERS, HF_VIT], ids=lambda tiny: tiny.name)
def test_corruptions_do_what_they_say(tiny) -> None:
    layout = vmi.wrap(tiny.module()).layout.tokens
    pixels = tiny.images(3)
    for corruption in (Blur(), PatchShuffle(), Noise(), Grey(), Flat(), AnotherImage()):
        changed = corruption(pixels, layout)
        assert changed.shape == pixels.shape
        assert not torch.allclose(changed, pixels)
        assert torch.equal(corruption(pixels, layout), changed), "equal values give equal images"
    for one, other in ((PatchShuffle(1), PatchShuffle(2)), (Noise(seed=1), Noise(seed=2))):
        assert not torch.equal(one(pixels, layout), other(pixels, layout))

    patch, (rows, columns) = tiny.patch, tiny.grid
    def cells(image: torch.Tensor) -> list[tuple[float, ...]]:
        return [
            tuple(image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten().tolist())
            for r in range(rows) for c in range(columns)
        ]  # fmt: skip
    orders = []
    for before, after in zip(pixels, PatchShuffle()(pixels, layout), strict=True):
        assert sorted(cells(before)) == sorted(cells(after))
        orders.append([cells(before).index(cell) for cell in cells(after)])
    assert orders[0] != orders[1]

    assert (Flat()(pixels, layout).flatten(-2).std(-1) < 1e-6).all()
    grey = Grey()(pixels, layout)
    assert torch.allclose(grey[:, 0], grey[:, 2])
    assert torch.allclose(grey[:, 0], pixels.mean(1))
    assert (Blur()(pixels, layout).flatten(1).std(1) < 0.5 * pixels.flatten(1).std(1)).all()
    noise = Noise(scale=0.5)(pixels, layout) - pixels
    assert float(noise.std() / pixels.std()) == pytest.approx(0.5, rel=0.1)
    other = AnotherImage()(pixels, layout)
    partners = [next(j for j in range(3) if torch.equal(other[i], pixels[j])) for i in range(3)]
    assert sorted(partners) == [0, 1, 2]
    assert all(i != j for i, j in enumerate(partners))


def test_a_corrupted_pair_keeps_the_clean_images_and_other_columns() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    a, b = photograph(seed=1), photograph(seed=2)
    data = image_pairs({"image": [a, b], "label": [3, 4]}, vit, corruption="shuffle")
    assert data["base"] == [a, b]
    assert data["label"] == [3, 4]
    assert torch.equal(data["source"], PatchShuffle()(vit.preprocess([a, b]), vit.layout.tokens))
    assert corruption_of(Noise(seed=5)) == Noise(seed=5)


def test_the_model_s_view_has_the_image_s_own_colours() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    flat = Image.new("RGB", (50, 40), (200, 30, 90))
    seen = np.asarray(model_view(vit, {"base": [flat]}))
    assert seen.shape == (32, 32, 3)
    assert np.abs(seen.astype(int) - [200, 30, 90]).max() <= 1
    tensor = np.asarray(model_view(vit, {"base": TIMM_PLAIN.images(1)}))
    assert tensor.min() == 0
    assert tensor.max() == 255


def test_photographs_ship_with_a_dependency() -> None:
    photographs = sample_photographs()
    assert {name: image.size for name, image in photographs.items()} == {"china": (640, 427), "flower": (640, 427)}
