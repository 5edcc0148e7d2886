"""Damaged images are all named, with column, example and file, before the model sees any image."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features
from datasets import Image as Encoded

import vit_mechinterp as vmi
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Run, circuits
from vit_mechinterp.engine.inputs import decodable
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), dtype=np.uint8))


def encoded(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


CUT, UNKNOWN = r"(image file is truncated|broken PNG|unrecognized data)", "no image in a format that Pillow knows"
DAMAGED = {
    2: ("cut.jpg", encoded(2)[:900], CUT), 3: ("cut.png", encoded(3, "PNG")[:2000], CUT),
    5: ("empty.jpg", b"", "the file is empty"), 6: ("text.png", b"not an image", UNKNOWN),
    7: ("head.jpg", encoded(7)[:6], ""),
}  # fmt: skip
FILES = [DAMAGED[i][:2] if i in DAMAGED else (f"{i}.jpg", encoded(i)) for i in range(9)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name, content in FILES:
        (tmp_path / "images" / name).write_bytes(content)
    return tmp_path / "images"


def of_paths(folder: Path) -> Dataset:
    paths = [str(folder / name) for name, _ in FILES]
    return Dataset.from_dict({"base": paths}, features=Features({"base": Encoded()}))


def of_bytes(folder: Path) -> Dataset:
    entries = [{"bytes": content, "path": name} for name, content in FILES]
    return Dataset.from_dict({"base": entries}, features=Features({"base": Encoded()}))


def saved(folder: Path) -> Dataset:
    from datasets import load_from_disk

    of_bytes(folder).save_to_disk(str(folder.parent / "saved"))
    return load_from_disk(str(folder.parent / "saved"))


def parquet(folder: Path) -> Dataset:
    of_bytes(folder).to_parquet(str(folder.parent / "images.parquet"))
    return Dataset.from_parquet(str(folder.parent / "images.parquet"), cache_dir=str(folder.parent / "cache"))


def in_a_mapping(folder: Path) -> dict[str, Any]:
    return {"base": of_bytes(folder).rename_column("base", "picture")["picture"], "label": list(range(9))}


def backwards(folder: Path) -> Dataset:
    return of_bytes(folder).select(range(8, -1, -1)).select(range(8, -1, -1))


@pytest.mark.parametrize("made", [of_paths, of_bytes, saved, parquet, in_a_mapping, backwards], ids=lambda made: made.__name__)
def test_every_damaged_image_is_named_before_the_model_sees_any(made: Callable[[Path], Any], folder: Path) -> None:
    module, data = TIMM_PLAIN.module(), made(folder)
    vit = vmi.wrap(module)
    vit.sites()

    def refuse(*args: Any) -> None:
        raise AssertionError("the model ran")

    module.register_forward_pre_hook(refuse)
    calls: dict[str, Callable[[], Any]] = {
        "execute": lambda: vmi.execute(vit, [Run(name="clean")], data, progress=False),
        "attention": lambda: circuits.attention(vit, data, progress=False),
        "boxes": lambda: Data(data, vit).original_sizes("base"),
        "a pair": lambda: circuits.image_pairs(data, vit, corruption="blur"),
        "the store": lambda: vmi.ActivationStore(folder.parent / "store").capture(vit, data, ["embed"], progress=False),
    }
    for call in calls.values():
        with pytest.raises(DataError, match="Column 'base': 5 of 9 images cannot be decoded: ") as raised:
            call()
        said = str(raised.value)
        for example, (name, _, reason) in DAMAGED.items():
            assert re.search(rf"example {example} \([^;]*{name}: {reason}", said), said
        assert "example 4" not in said
        assert said.endswith("Repair or replace them, or leave those examples out.")


def test_pictures_whose_files_are_read_late_and_those_without_pixels(folder: Path) -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    lazy = [PIL.Image.open(folder / name) for name in ("0.jpg", "cut.jpg")] + [PIL.Image.new("RGB", (0, 5))]
    with pytest.raises(DataError, match=r"2 of 3 images .* example 1 \(.*cut.jpg: image file is truncated.*; example 2 \(0 x 5 pixels\)"):
        vmi.execute(vit, [Run(name="clean")], {"base": lazy}, progress=False)


def test_folders_and_lists_of_files_are_looked_at_and_read_when_they_are_wanted(folder: Path) -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    for given in (folder, [folder / "0.jpg", str(folder / "cut.jpg")]):
        with pytest.raises(DataError, match=r"images/cut.jpg: image file is truncated"):
            circuits.attention(vit, given, progress=False)
    with pytest.raises(DataError, match=r"example 1 \(/nowhere.png: there is no such file\)"):
        circuits.attention(vit, [folder / "0.jpg", "/nowhere.png"], progress=False)
    with pytest.raises(DataError, match=r"There is no readable image at .*cut.png \(.*\). Repair or replace it, or leave it out"):
        circuits.image_pairs((folder / "0.jpg", folder / "cut.png"), vit)
    for name, _, _ in DAMAGED.values():
        (folder / name).unlink()
    sound = circuits.attention(vit, folder, gradient=False, progress=False).table
    opened = [PIL.Image.open(path) for path in sorted(folder.iterdir())]
    assert sound.equals(circuits.attention(vit, opened, gradient=False, progress=False).table)


def test_image_files_that_nobody_decodes_are_told_how(folder: Path) -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    for entry in (encoded(0), {"bytes": encoded(0), "path": None}, str(folder / "0.jpg")):
        with pytest.raises(DataError, match=r"example 0 is no image .* data.cast_column\('base', datasets.Image\(\)\)"):
            vmi.execute(vit, [Run(name="clean")], Dataset.from_dict({"base": [entry]}), progress=False)


def test_a_dataset_is_looked_through_once_in_a_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, looked = vmi.wrap(TIMM_PLAIN.module()), []
    trouble = decodable._trouble
    monkeypatch.setattr(decodable, "_trouble", lambda entry: looked.append(entry) or trouble(entry))
    data = of_bytes(folder).select([0, 1, 4, 8])
    for _ in range(2):
        circuits.ablation_sweep(vit, data, parts=["heads"], methods=["zero"], progress=False)
    assert len(looked) == 4
    # Another column of the same dataset is another matter, whatever it is called in a mapping.
    both = of_bytes(folder).add_column("other", [None] * 9).select([0, 1, 2])
    sound = both.select([0, 1]).remove_columns("other").add_column("second", [0, 1])
    assert Data({"base": sound["base"]}, vit).check_images("base") is None
    assert len(looked) == 6
    with pytest.raises(DataError, match=r"1 of 3 images cannot be decoded: example 2 .* Repair or replace it, or leave that example out"):
        Data({"base": both["base"]}, vit).check_images("base")
    with pytest.raises(DataError):
        Data({"base": both["base"]}, vit).check_images("base")
    assert len(looked) == 12, "what is damaged may have been repaired"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_look_finds_what_reading_the_whole_image_finds(kind: str) -> None:
    draw, whole = random.Random(0), encoded(1, kind)
    damaged = 0
    for k in range(40):
        content = bytearray(whole)
        for _ in range(draw.choice([0, 1, 10])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        if k % 2:
            content = content[: draw.randrange(len(content))]
        try:
            PIL.Image.open(io.BytesIO(bytes(content))).convert("RGB")
            fails = False
        except Exception:
            fails = True
        assert bool(decodable._trouble({"bytes": bytes(content), "path": None})) == fails
        damaged += fails
    assert damaged > 10


def test_many_damaged_images_are_listed() -> None:
    said = decodable.said_of_damaged(dict.fromkeys(range(13), "it is empty"), "base", 20)
    assert "13 of 20" in said
    assert "example 9 (it is empty); and examples 10, 11, 12. Repair" in said


def test_numbers_that_are_not_finite_are_refused_before_the_first_forward() -> None:
    """Float16 overflows, or a division by a deviation of zero: every number of that row would be none."""
    vit = vmi.wrap(TIMM_PLAIN.module())
    images = TIMM_PLAIN.images(4)
    assert Data({"base": images}, vit).check_images("base") is None
    images[1, 0, 2, 3] = float("nan")
    images[3, :, 0, :2] = float("inf")
    numbers = images[0].numel()
    said = (
        f"Column 'base': 2 of 4 images hold what is no finite number: example 1 (1 of {numbers} numbers); example 3 (6 of {numbers} "
        "numbers). Repair or replace them, or leave those examples out."
    )
    for base in (images, list(images), images.numpy()):
        with pytest.raises(DataError) as raised:
            vmi.execute(vit, [vmi.Run(name="r", capture=["pooled"])], {"base": base}, progress=False)
        assert str(raised.value) == said
