"""Sheets of the stimuli of Lepori et al. (2024): what their Figs. 1, 7, 8 and 9 show, as made here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.errors import SpecError

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from vit_mechinterp.figures.sheets import SheetRow

__all__ = ["stimulus_sheets"]

_TASKS = {"discrimination": "Discrimination", "rmts": "Relational match to sample"}
_LABELS = ("different", "same")


def stimulus_sheets(
    *, canvas: int = 224, patch: int = 16, cell: int = 32, n: int = 6, split: str = "test", seed: int = 0
) -> CircuitResult:
    """Draw the stimuli: both tasks, all objects, more examples, and photographs.

    Args:
        canvas, patch, cell: sizes of the synthetic stimuli in pixels (see `Geometry`).
        n: images in a row of the larger sheets, 1 to 12.
        split, seed: of the images that are shown.

    Returns:
        Table, one row per image of a figure: ``figure, task, label, example`` (its place in the dataset of
        the task, split and seed), ``objects``. Figures: ``tasks`` (Fig. 1), ``objects`` (Fig. 7: shapes and
        colours with those that are out of distribution), ``stimuli`` (Fig. 8) and ``realistic`` (Fig. 9, the
        shipped photographs).

    Raises:
        SpecError: a size does not fit, or ``n`` is out of range.
    """
    if not 1 <= n <= 12:
        raise SpecError(f"n={n}: a row shows 1 to 12 images.")
    from vit_mechinterp.stimuli import discrimination, realistic_discrimination, rmts

    # Every kind of different pair, and of relation, is among the first images that a generator makes.
    count = max(12, 4 * n)
    sizes: dict[str, Any] = {"canvas": canvas, "patch": patch, "cell": cell}
    data = {
        "discrimination": discrimination(split, count, seed=seed, progress=False, **sizes),
        "rmts": rmts(split, count, seed=seed, progress=False, **sizes),
        "realistic": realistic_discrimination(),
    }
    shown = _chosen(data, n)
    return CircuitResult(
        name="stimuli",
        title="Stimuli",
        table=_table(data, shown),
        provenance=provenance(seed=seed, split=split, realistic="shipped images", **sizes),
        summary={
            "canvas, patch, cell (px)": f"{canvas}, {patch}, {cell}",
            "objects": "16 shapes x 16 colours; 4 + 4 more out of distribution",
            "realistic objects": 16,
            "realistic images shipped": len(data["realistic"]),
        },
        description=_DESCRIPTION,
        captions=_CAPTIONS,
        draw=partial(_draw, data=data, shown=shown, cell=cell, seed=seed),
    )


_DESCRIPTION = (
    "The stimuli of the two tasks, made by this package after the paper's description. Objects carry "
    "Gaussian noise around their colour, drawn anew for every object, so two objects that are the same are "
    "not the same pixels. Shapes are this project's own; colours, sizes, places and balance are the "
    "paper's.\n\n"
    "The photographs are path-traced from meshes that this project builds: 16 objects in random places, "
    "turns, sizes and poses on a table, with random textures of table and wall, lights and camera. The "
    "paper's own models and renderer are not known."
)

_CAPTIONS = {
    "tasks": (
        "The two tasks (the paper's Fig. 1). Discrimination: are the two objects the same? Relational match "
        "to sample: does the pair elsewhere in the image show the same relation as the display pair in its "
        "upper left corner?"
    ),
    "objects": (
        "All shapes, in one colour, and all colours, on one shape (the paper's Fig. 7). Those marked new "
        "are out of distribution: no training shows them."
    ),
    "stimuli": (
        "More stimuli of both tasks (the paper's Fig. 8), different above, same below. Different objects "
        "differ in both attributes, in shape alone, or in colour alone, in turn."
    ),
    "realistic": (
        "The realistic discrimination task (the paper's Figs. 9 and 10), different above, same below; the "
        "last row shows what is known of the images above it: the mask and box of either object."
    ),
}


def _chosen(data: Mapping[str, Dataset], n: int) -> list[tuple[str, str, int, int]]:
    """Which images are shown: (figure, task, label, place in the dataset)."""
    shown = []
    sheets = (("tasks", tuple(_TASKS), 2), ("stimuli", tuple(_TASKS), n), ("realistic", ("realistic",), n))
    for figure, tasks, count in sheets:
        for task in tasks:
            labels = data[task]["label"]
            for label in (0, 1):
                places = [place for place, own in enumerate(labels) if own == label]
                if figure == "realistic":
                    # Spread over the set, so that neighbours, which share an object, are not all there is.
                    places = places[:: max(1, len(places) // n)]
                shown += [(figure, task, label, place) for place in places[:count]]
    return shown


def _table(data: Mapping[str, Dataset], shown: list[tuple[str, str, int, int]]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for figure, task, label, place in shown:
        words = _objects(task, data[task].remove_columns(_image_columns(data[task]))[place])
        rows.append({
            "figure": figure, "task": task, "label": _LABELS[label], "example": place, "objects": words
        })  # fmt: skip
    return pd.DataFrame(rows)


def _image_columns(data: Dataset) -> list[str]:
    return [name for name in ("base", "mask_1", "mask_2") if name in data.column_names]


def _objects(task: str, row: Mapping[str, Any]) -> str:
    from vit_mechinterp.stimuli import COLOR_NAMES, SHAPE_NAMES

    if task == "realistic":
        return f"{row['object_1_name']}, {row['object_2_name']}"
    starts = ("", "display_") if task == "rmts" else ("",)
    return ", ".join(
        f"{COLOR_NAMES[row[f'{start}color_{k}']]} {SHAPE_NAMES[row[f'{start}shape_{k}']]}"
        for start in starts
        for k in (1, 2)
    )


def _draw(
    result: CircuitResult,
    *,
    data: Mapping[str, Dataset],
    shown: list[tuple[str, str, int, int]],
    cell: int,
    seed: int,
) -> dict[str, Figure]:
    from vit_mechinterp.figures.sheets import SheetRow, image_rows

    def picked(figure: str, task: str, label: int) -> list[Mapping[str, Any]]:
        return [data[task][place] for f, t, own, place in shown if (f, t, own) == (figure, task, label)]

    tasks = []
    for task, title in _TASKS.items():
        rows = [row for label in (0, 1) for row in picked("tasks", task, label)]
        captions = [_LABELS[row["label"]] for row in rows]
        tasks.append(SheetRow("", [row["base"] for row in rows], captions, heading=title))
    stimuli = [
        SheetRow(_LABELS[label], [row["base"] for row in picked("stimuli", task, label)],
                 heading=title if label == 0 else "")
        for task, title in _TASKS.items()
        for label in (0, 1)
    ]  # fmt: skip
    photographs = [
        SheetRow(_LABELS[label], [row["base"] for row in rows], [_pair(row) for row in rows])
        for label in (0, 1)
        if (rows := picked("realistic", "realistic", label))
    ]
    known = picked("realistic", "realistic", 1)
    photographs.append(
        SheetRow(
            "masks, boxes",
            [_masked(row) for row in known],
            boxes=[(row["box_1"], row["box_2"]) for row in known],
        )
    )
    return {
        "tasks": image_rows(tasks, side=1.45),
        "objects": image_rows(_objects_rows(cell, seed), side=0.56),
        "stimuli": image_rows(stimuli),
        "realistic": image_rows(photographs, side=1.3),
    }


def _pair(row: Mapping[str, Any]) -> str:
    names = (row["object_1_name"], row["object_2_name"])
    return names[0] if names[0] == names[1] else ", ".join(names)


def _masked(row: Mapping[str, Any]) -> Image:
    """The photograph in grey, with either object in its own colours."""
    from PIL import Image

    photograph = row["base"].convert("RGB")
    grey = photograph.convert("L").point(lambda value: 110 + value // 2).convert("RGB")
    seen = np.maximum(np.asarray(row["mask_1"]), np.asarray(row["mask_2"]))
    return Image.composite(photograph, grey, Image.fromarray(seen))


def _objects_rows(cell: int, seed: int) -> list[SheetRow]:
    from vit_mechinterp.figures.sheets import SheetRow
    from vit_mechinterp.stimuli import COLOR_NAMES, SHAPE_NAMES, object_gallery
    blue, disc = COLOR_NAMES.index("indigo"), SHAPE_NAMES.index("disc")
    rows = []
    for what, names, shown in (
        ("shapes", SHAPE_NAMES, lambda k: (k, blue)),
        ("colours", COLOR_NAMES, lambda k: (disc, k)),
    ):
        for half in (0, 1):
            # Eight that are trained on, then two of the four that are not.
            ids = [*range(8 * half, 8 * half + 8), 16 + 2 * half, 17 + 2 * half]
            tiles = object_gallery([shown(k) for k in ids], cell, seed=seed)
            label = what if half == 0 else ""
            rows.append(SheetRow(label, tiles, [names[k] for k in ids], gap_before={8: "new"}))
    return rows
