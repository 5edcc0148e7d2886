"""The realistic discrimination set: the shipped images, and those that are rendered."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vit_mechinterp.errors import DataError, ExecutionError, SpecError
from vit_mechinterp.stimuli import OBJECT_NAMES, build, realistic_discrimination
from vit_mechinterp.stimuli.realistic import PACKAGED_IMAGES, images

TINY: dict[str, Any] = {"canvas": 32, "samples": 1, "source": "render", "progress": False}


@pytest.fixture(scope="module")
def shipped() -> Any:
    return realistic_discrimination()


def test_the_shipped_images_are_balanced(shipped: Any) -> None:
    assert len(shipped) == PACKAGED_IMAGES
    assert shipped["label"] == [0, 1] * (PACKAGED_IMAGES // 2)
    assert shipped.features["label"].names == ["different", "same"]
    assert shipped.features["object_1"].names == list(OBJECT_NAMES)
    pairs = list(zip(shipped["object_1"], shipped["object_2"], shipped["label"], strict=True))
    assert all((first == second) == bool(label) for first, second, label in pairs)
    per_label = [Counter(one for *pair, label in pairs if label == wanted for one in pair) for wanted in (0, 1)]
    assert per_label[0] == per_label[1] == dict.fromkeys(range(16), PACKAGED_IMAGES // 16)
    for k in (1, 2):
        assert [OBJECT_NAMES[i] for i in shipped[f"object_{k}"]] == shipped[f"object_{k}_name"]
    assert len(set(shipped["table"])) == len(set(shipped["wall"])) == 7


def test_boxes_and_masks_say_what_is_seen(shipped: Any) -> None:
    visible = []
    for row in shipped:
        assert row["base"].size == (160, 160)
        masks = [np.asarray(row[f"mask_{k}"]) for k in (1, 2)]
        assert set(np.unique(masks)) == {0, 255}
        assert not (masks[0] & masks[1]).any()
        middles = []
        for k, mask in enumerate(masks, start=1):
            x0, y0, x1, y1 = row[f"box_{k}"]
            assert Image.fromarray(mask).getbbox() == (x0, y0, x1, y1)
            assert 0 <= x0 < x1 <= 160
            assert 0 <= y0 < y1 <= 160
            assert 0.5 <= row[f"visible_{k}"] <= 1
            visible.append(row[f"visible_{k}"])
            middles.append(np.nonzero(mask)[1].mean())
        # Object 1 is the left one, where nothing hides the middle of either.
        if min(visible[-2:]) == 1 and abs(middles[0] - middles[1]) > 8:
            assert middles[0] < middles[1]
    assert 0.03 < np.mean(np.array(visible) < 0.98) < 0.5


def test_an_object_is_lit_unlike_its_surroundings(shipped: Any) -> None:
    # What is behind a mask differs from what is around it: the masks are where the photographs show objects.
    contrasts = []
    for row in shipped.select(range(64)):
        pixels = np.asarray(row["base"], dtype=float)
        for k in (1, 2):
            mask = np.asarray(row[f"mask_{k}"]) > 0
            near = np.zeros_like(mask)
            for dx, dy in ((3, 0), (-3, 0), (0, 3), (0, -3)):
                near |= np.roll(mask, (dy, dx), axis=(0, 1))
            near &= ~mask & ~(np.asarray(row[f"mask_{3 - k}"]) > 0)
            inside, outside = pixels[mask].mean(axis=0), pixels[near].mean(axis=0)
            contrasts.append(np.abs(inside - outside).max())
    assert np.median(contrasts) > 25


def test_a_box_becomes_the_tokens_that_cover_its_object(shipped: Any) -> None:
    from tests.tiny_models import TIMM_PLAIN
    from vit_mechinterp import wrap
    from vit_mechinterp.circuits import attention_stages

    result = attention_stages(wrap(TIMM_PLAIN.module()), shipped.select(range(4)), example=None, progress=False)
    assert (result.table["images"] == 4).all()
    parts = result.table[["WO_direct", "WP", "BG"]]
    assert (parts.to_numpy() > 0).all()


def test_fewer_images_are_the_first_ones(shipped: Any) -> None:
    some = build("realistic-discrimination", n=3)
    assert [np.asarray(a).tobytes() for a in some["base"]] == [np.asarray(a).tobytes() for a in shipped[:3]["base"]]
    assert some["box_2"] == shipped[:3]["box_2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "packaged", "seed": 1}, r"first 192 images of split 'test' with seed 0.*source='render'"),
        ({"source": "packaged", "n": 193}, r"asked for: n=193"),
        ({"split": "tests"}, r"no split 'tests'.*Close matches: test"),
        ({"canvas": 16}, r"canvas=16.*32 px or more"),
        ({"samples": 0}, r"samples=0"),
        ({"source": "shipped"}, r"source='shipped': choose 'auto', 'packaged' or 'render'"),
        ({"n": 0}, r"n=0: ask for at least one image"),
    ],
)
def test_what_cannot_be_had_is_said(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        realistic_discrimination(**options)


def test_a_missing_renderer_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mitsuba", None)
    with pytest.raises(ExecutionError, match=r"needs Mitsuba 3.*pip install 'vit-mechinterp\[realistic\]'.*source='packaged'"):
        realistic_discrimination(seed=1, n=1, canvas=32, samples=1)


def contents(dataset: Any) -> list[Any]:
    return [dataset[column][:] for column in dataset.column_names if column not in ("base", "mask_1", "mask_2")] + [
        [np.asarray(image).tobytes() for image in dataset[column]] for column in ("base", "mask_1", "mask_2")
    ]


def test_an_image_is_the_same_however_many_are_made() -> None:
    pytest.importorskip("mitsuba")
    first = realistic_discrimination("val", 1, seed=3, **TINY)
    both = realistic_discrimination("val", 2, seed=3, **TINY)
    assert contents(both.select([0])) == contents(first)
    assert contents(both.select([1])) != contents(first)
    assert np.asarray(first[0]["base"]).std() > 10


def test_rendering_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stand_in(settings: images.Settings, index: int) -> images.Example:
        rendered.append(index)
        buffer = io.BytesIO()
        Image.new("L", (32, 32), 20 * index).save(buffer, "PNG")
        facts: dict[str, Any] = {"label": index % 2, "table": "wood", "wall": "plain"}
        for k in (1, 2):
            facts |= {f"object_{k}": index, f"box_{k}": [0, 0, index + 1, 1], f"visible_{k}": 0.5}
        return images.Example(buffer.getvalue(), (buffer.getvalue(), buffer.getvalue()), facts)

    rendered: list[int] = []
    monkeypatch.setattr(images, "render_example", stand_in)
    whole = realistic_discrimination("val", 5, folder=tmp_path, **TINY)
    assert rendered == [0, 1, 2, 3, 4]
    (tmp_path / "000002.json").unlink()
    again = realistic_discrimination("val", 6, folder=tmp_path, **TINY)
    assert rendered == [0, 1, 2, 3, 4, 2, 5]
    assert contents(again.select(range(5))) == contents(whole)
    with pytest.raises(DataError, match=r"images of other settings: .*'seed': 0.*wanted .*'seed': 7"):
        realistic_discrimination("val", 1, seed=7, folder=tmp_path, **TINY)
    (tmp_path / "000001.json").write_text("{")
    with pytest.raises(DataError, match=r"000001 cannot be read"):
        realistic_discrimination("val", 2, folder=tmp_path, **TINY)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(DataError, match=r"settings.json is not valid JSON"):
        realistic_discrimination("val", 1, folder=tmp_path, **TINY)


def test_masks_lie_where_the_geometry_says() -> None:
    pytest.importorskip("mitsuba")
    from tests.stimuli.test_scenes import first_scene
    from vit_mechinterp.stimuli.realistic.renderer import coverage

    size = 48
    for index in (0, 3):
        scene = first_scene(index)
        seen, alone = coverage(scene, size)
        assert seen.shape == (2 * size, 2 * size)
        for number, placed in enumerate(scene.placed):
            points = scene.camera.project(placed.points) * 2 * size
            rows, columns = np.nonzero(alone[number])
            assert abs(columns.min() - points[:, 0].min()) < 2.5
            assert abs(columns.max() + 1 - points[:, 0].max()) < 2.5
            assert abs(rows.min() - points[:, 1].min()) < 2.5
            assert abs(rows.max() + 1 - points[:, 1].max()) < 2.5
            assert not (seen == number + 1)[~alone[number]].any()
        # Where both would be seen, the one that is nearer to the camera hides the other.
        assert ((seen > 0) == alone.any(axis=0)).all()


def test_the_callers_variant_of_the_renderer_is_kept() -> None:
    mi = pytest.importorskip("mitsuba")
    from vit_mechinterp.stimuli.realistic.renderer import mitsuba

    before = mi.variant()
    mi.set_variant("scalar_spectral")
    with mitsuba() as inside:
        assert inside.variant() == "scalar_rgb"
    assert mi.variant() == "scalar_spectral"
    mi.set_variant(before or "scalar_rgb")


@pytest.mark.slow
def test_the_shipped_images_are_those_that_are_rendered(shipped: Any, tmp_path: Path) -> None:
    pytest.importorskip("mitsuba")
    made = realistic_discrimination(n=1, source="render", folder=tmp_path, progress=False)
    facts = json.loads((tmp_path / "000000.json").read_text())
    assert {name: shipped[0][name] for name in facts} == facts
    # Another processor may round otherwise; the picture is the same.
    apart = np.asarray(made[0]["base"], dtype=float) - np.asarray(shipped[0]["base"], dtype=float)
    assert np.abs(apart).mean() < 1
