"""Images of a dataset are looked at without decoding them: nulls, sizes and digests."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest

import vit_mechinterp as vmi
from tests.engine.world import world_of
from tests.tiny_models import TIMM_PLAIN
from vit_mechinterp import Run
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> PIL.Image.Image:
    draw = np.random.default_rng(seed)
    return PIL.Image.fromarray(draw.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def turned(orientation: int, file_format: str) -> bytes:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    file = BytesIO()
    picture(7).save(file, file_format, exif=exif)
    return file.getvalue()


def dataset(images: list[Any]) -> Any:
    return datasets.Dataset.from_dict(
        {"base": images}, features=datasets.Features({"base": datasets.Image()})
    )


@pytest.fixture
def undecodable(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(datasets.Image, "decode_example", refuse)


@pytest.mark.parametrize("choose", [None, [4, 2, 0, 3]])
def test_a_missing_image_is_named_before_anything_is_decoded(choose: list[int] | None, undecodable: None) -> None:
    data = dataset([picture(0), picture(1), picture(2), None, picture(3)])
    data = data if choose is None else data.select(choose)
    with pytest.raises(DataError, match="Column 'base', example 3 is no image of this model: None"):
        vmi.execute(world_of(TIMM_PLAIN).vit, [Run(name="r")], data, progress=False)


def test_nulls_that_are_not_selected_do_no_harm() -> None:
    data = dataset([picture(0), None, picture(2)]).select([2, 0])
    assert vmi.execute(world_of(TIMM_PLAIN).vit, [Run(name="r")], data, progress=False).logits.shape[1] == 2


def test_the_first_entry_that_is_no_picture_is_blamed() -> None:
    data = Data({"base": [picture(0), picture(1), None]}, world_of(TIMM_PLAIN).vit)
    with pytest.raises(DataError, match="example 2 is no image"):
        data.images("base", [0, 1, 2])


def test_sizes_are_those_of_the_decoded_images(tmp_path: Path) -> None:
    picture(3, (30, 20)).save(tmp_path / "file.png")
    encoded = [turned(o, f) for o in (1, 3, 6, 8) for f in ("JPEG", "PNG")]
    images = [picture(0), *({"bytes": raw, "path": None} for raw in encoded), str(tmp_path / "file.png")]
    data = dataset(images)
    sizes = [entry["base"].size for entry in data]
    assert {(48, 40), (40, 48), (30, 20)} == set(sizes)
    assert Data(data, world_of(TIMM_PLAIN).vit).original_sizes("base") == sizes


def test_sizes_and_digests_decode_nothing(undecodable: None) -> None:
    columns = Data(dataset([picture(0), picture(1)]), world_of(TIMM_PLAIN).vit)
    assert columns.original_sizes("base") == [(48, 40)] * 2
    digest = columns.fingerprint(["base"])
    same, other = (Data(dataset([picture(0), picture(n)]), columns.vit) for n in (1, 2))
    assert same.fingerprint(["base"]) == digest != other.fingerprint(["base"])
    repeated = Data(dataset([picture(0), picture(1), picture(0)]), columns.vit)
    assert repeated.digest("base", [0, 1]) == columns.digest("base") != repeated.digest("base")


def test_splits_and_streams_are_refused() -> None:
    vit, data = world_of(TIMM_PLAIN).vit, dataset([picture(0)])
    with pytest.raises(DataError, match=r"DatasetDict holds several; name a split: train, test \(data\['train'\]\)"):
        Data(datasets.DatasetDict(train=data, test=data), vit)
    with pytest.raises(DataError, match="IterableDataset has no length"):
        Data(data.to_iterable_dataset(), vit)


def test_a_bar_is_there_where_progress_is_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_mechinterp.engine.inputs.columns._PROGRESS_DELAY", 0.0)
    for progress in (False, True):
        Data(dataset([picture(0)]), world_of(TIMM_PLAIN).vit, progress=progress).fingerprint(["base"])
        assert ("digest of base" in capsys.readouterr().err) == progress
