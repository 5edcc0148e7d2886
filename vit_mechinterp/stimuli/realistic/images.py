"""Images of scenes with all that is measured in them, kept in a folder so that rendering resumes."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vit_mechinterp.errors import DataError, ExecutionError
from vit_mechinterp.stimuli.realistic.renderer import coverage, photograph
from vit_mechinterp.stimuli.realistic.scenes import Scene, sample_scene

__all__ = ["LEAST_VISIBLE", "Example", "Settings", "examples", "render_example"]

LEAST_VISIBLE = 0.5
"""Every object shows at least this share of what it would show without the other one."""

_SMALLEST = 0.004
_ATTEMPTS = 1000
_QUALITY = 90
_VERSION = 1


@dataclass(frozen=True)
class Settings:
    """What an image depends on besides its index: see `realistic_discrimination`."""

    split: str
    seed: int
    canvas: int
    samples: int


@dataclass(frozen=True)
class Example:
    """One image.

    Attributes:
        base: the photograph, a JPEG file.
        masks: where either object is seen, PNG files of 0 and 255.
        facts: ids of the objects, boxes, visible shares, names of the textures.
    """

    base: bytes
    masks: tuple[bytes, bytes]
    facts: dict[str, Any]


def examples(settings: Settings, n: int, folder: Path | None) -> Iterator[Example]:
    """Yield images 0 to n - 1; those that ``folder`` holds are read, others are rendered and written there.

    Raises:
        DataError: the folder holds images of other settings.
        ExecutionError: the renderer is not installed.
    """
    if folder is not None:
        _claim(folder, settings)
    for index in range(n):
        stem = None if folder is None else folder / f"{index:06d}"
        found = None if stem is None else _read(stem)
        if found is None:
            found = render_example(settings, index)
            if stem is not None:
                _write(stem, found)
        yield found


def render_example(settings: Settings, index: int) -> Example:
    """Render one image: the first of its scenes in which both objects can be seen well enough."""
    for attempt in range(_ATTEMPTS):
        scene = sample_scene(settings.seed, settings.split, index, attempt)
        if scene is None:
            continue
        seen, alone = coverage(scene, settings.canvas)
        points = [(seen == number) for number in (1, 2)]
        visible = [float(p.sum() / max(int(a.sum()), 1)) for p, a in zip(points, alone, strict=True)]
        masks = _pixels(seen)
        if min(visible) >= LEAST_VISIBLE and min(mask.mean() for mask in masks) >= _SMALLEST:
            image = photograph(scene, settings.canvas, settings.samples)
            return Example(
                _encoded(image, "JPEG", quality=_QUALITY),
                (_encoded(masks[0] * np.uint8(255), "PNG"), _encoded(masks[1] * np.uint8(255), "PNG")),
                _facts(scene, masks, visible),
            )
    raise ExecutionError(
        f"Image {index} (seed {settings.seed}, split {settings.split!r}): in {_ATTEMPTS} scenes the two "
        f"objects were never both visible at {settings.canvas} px. Use another seed or a larger canvas."
    )


def _pixels(seen: NDArray[np.int64]) -> list[NDArray[np.bool_]]:
    """Turn four points a pixel into masks: a pixel is an object's if at least two of its points are, and of
    one object only (the first, where each has two).
    """
    size = len(seen) // 2
    count = [(seen == k).reshape(size, 2, size, 2).sum(axis=(1, 3)) for k in (1, 2)]
    first = count[0] >= 2
    return [first, (count[1] >= 2) & ~first]


def _facts(scene: Scene, masks: list[NDArray[np.bool_]], visible: list[float]) -> dict[str, Any]:
    facts: dict[str, Any] = {"label": int(scene.objects[0] == scene.objects[1])}
    for number, (mask, share) in enumerate(zip(masks, visible, strict=True), start=1):
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        facts[f"object_{number}"] = scene.objects[number - 1]
        facts[f"box_{number}"] = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
        facts[f"visible_{number}"] = round(share, 4)
    return facts | {"table": scene.table, "wall": scene.wall}


def _encoded(pixels: NDArray[Any], kind: str, **options: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def _claim(folder: Path, settings: Settings) -> None:
    """Say in the folder what its images are, or compare with what it says."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {"version": _VERSION, **vars(settings)}
    path = folder / "settings.json"
    if not path.exists():
        _replace(path, json.dumps(wanted).encode())
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); use another folder.") from error
    if found != wanted:
        raise DataError(
            f"The folder {folder} holds images of other settings: {found}, wanted {wanted}. Use another "
            "folder."
        )


def _read(stem: Path) -> Example | None:
    facts, base, *masks = _files(stem)
    # The facts are written last, so an image that was interrupted has none.
    if not facts.is_file():
        return None
    try:
        return Example(
            base.read_bytes(),
            (masks[0].read_bytes(), masks[1].read_bytes()),
            json.loads(facts.read_text(encoding="utf-8")),
        )
    except (OSError, ValueError) as error:
        raise DataError(f"The image {stem} cannot be read ({error}); delete its files and go on.") from error


def _write(stem: Path, example: Example) -> None:
    facts, base, *masks = _files(stem)
    for path, content in zip((base, *masks), (example.base, *example.masks), strict=True):
        _replace(path, content)
    _replace(facts, json.dumps(example.facts).encode())


def _files(stem: Path) -> list[Path]:
    return [stem.with_name(stem.name + end) for end in (".json", ".jpg", "_mask_1.png", "_mask_2.png")]


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
