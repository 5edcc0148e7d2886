"""The realistic discrimination task: two of 16 objects on a table in a room, the same or not.

After the photorealistic set of Lepori et al. (2024), Figs. 9 and 10: unique 3-D models, random textures of
table and background, random rotation, distance and lights, and objects that may hide a part of each other.
The paper's models and renderer are not known; these are this project's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.stimuli.columns import RELATIONS, check_count
from vit_mechinterp.stimuli.realistic.objects import OBJECT_NAMES
from vit_mechinterp.stimuli.splits import check_split

if TYPE_CHECKING:
    from datasets import Dataset

    from vit_mechinterp.stimuli.realistic.images import Example, Settings

__all__ = ["PACKAGED_IMAGES", "realistic_discrimination"]

Source = Literal["auto", "packaged", "render"]

PACKAGED_IMAGES = 192
"""How many images are shipped: the first ones of split "test", seed 0, at 160 px and 49 samples."""

_PACKAGED = Path(__file__).with_name("packaged.parquet")


def realistic_discrimination(
    split: str = "test",
    n: int = PACKAGED_IMAGES,
    *,
    seed: int = 0,
    canvas: int = 160,
    samples: int = 49,
    source: Source = "auto",
    folder: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Return photographs of two objects as a `datasets.Dataset`; half of them are "same".

    Image i depends on split, seed, canvas, samples and i alone. In every 32 images, each of the 16 objects is
    in one "same" image (in two different places, turns and sizes) and in two "different" ones, so no object
    tells the label. Both objects are wholly inside the image, and each shows at least half of what it would
    show without the other.

    Columns: ``base`` (image), ``mask_1``, ``mask_2`` (images of 0 and 255: where the object is seen),
    ``label`` (1 same, 0 different), and for each object ``object_k`` (its id, a class named as in
    `OBJECT_NAMES`), ``object_k_name``, ``box_k`` (what is seen of it, as x0, y0, x1, y1, half-open pixels;
    tokens are ``{"box": "box_k"}``), ``visible_k`` (share that the other object leaves to be seen); then
    ``table`` and ``wall`` (names of the textures). Object 1 is the one further left.

    Args:
        split: "train", "val", "test" or "test_iid": all show all objects, in other images.
        n: how many images.
        seed: a non-negative integer.
        canvas: side of the images in pixels, 32 or more.
        samples: light paths a pixel, best a square; more paths leave less noise, at a cost in proportion.
        source: ``"render"`` renders with Mitsuba 3 (``pip install 'vit-mechinterp[realistic]'``);
            ``"packaged"`` reads the images that the package ships (the first 192 of split "test", seed 0, 160
            px, 49 samples) and refuses what they do not hold; ``"auto"`` reads them where they are what is
            asked for, and renders otherwise.
        folder: where rendered images are kept one by one, so that an interrupted call goes on where it was;
            without it they are kept in memory alone.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        SpecError: an option does not fit; the message says which do.
        DataError: the folder holds images of other settings, or the shipped file is damaged.
        ExecutionError: the images have to be rendered, and Mitsuba is not installed.
    """
    from vit_mechinterp.stimuli.realistic.images import Settings

    check_count(n, "image")
    settings = Settings(check_split(split), seed, canvas, samples)
    if canvas < 32 or samples < 1 or seed < 0:
        raise SpecError(
            f"canvas={canvas}, samples={samples}, seed={seed}: a canvas has 32 px or more, a pixel one "
            "sample or more, and a seed is not negative."
        )
    if source not in ("auto", "packaged", "render"):
        raise SpecError(f"source={source!r}: choose 'auto', 'packaged' or 'render'.")
    if source != "render":
        shipped = settings == Settings("test", 0, 160, 49) and n <= PACKAGED_IMAGES
        if shipped:
            return _packaged().select(range(n))
        if source == "packaged":
            raise SpecError(
                f"The package ships the first {PACKAGED_IMAGES} images of split 'test' with seed 0, canvas "
                f"160 and samples 49; asked for: n={n}, {settings}. Ask for these, or render with "
                "source='render'."
            )
    return _rendered(settings, n, None if folder is None else Path(folder), progress)


def _rendered(settings: Settings, n: int, folder: Path | None, progress: bool) -> Dataset:
    from tqdm.auto import tqdm

    from vit_mechinterp.stimuli.realistic.images import examples

    made = examples(settings, n, folder)
    return _to_dataset(
        list(tqdm(made, total=n, desc="rendering", unit="image", delay=2, disable=not progress))
    )


def _to_dataset(made: Sequence[Example]) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Image, List, Value

    features: dict[str, Any] = {"base": Image(), "mask_1": Image(), "mask_2": Image()}
    columns: dict[str, Any] = {"base": [{"bytes": one.base, "path": None} for one in made]}
    for k in (1, 2):
        columns[f"mask_{k}"] = [{"bytes": one.masks[k - 1], "path": None} for one in made]
    kinds: dict[str, Any] = {"label": ClassLabel(names=list(RELATIONS))}
    for k in (1, 2):
        kinds[f"object_{k}"] = ClassLabel(names=list(OBJECT_NAMES))
        kinds[f"object_{k}_name"] = Value("string")
        kinds[f"box_{k}"] = List(Value("int64"), length=4)
        kinds[f"visible_{k}"] = Value("float64")
    kinds |= {"table": Value("string"), "wall": Value("string")}
    for name in kinds:
        if name.endswith("_name"):
            columns[name] = [OBJECT_NAMES[one.facts[name.removesuffix("_name")]] for one in made]
        else:
            columns[name] = [one.facts[name] for one in made]
    return Dataset.from_dict(columns, features=Features(features | kinds))


def _packaged() -> Dataset:
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        return Dataset(InMemoryTable(pyarrow.parquet.read_table(_PACKAGED)))
    except (OSError, ValueError) as error:
        raise DataError(
            f"The images that the package ships cannot be read from {_PACKAGED} ({error}). Install the "
            "package again, or render with source='render'."
        ) from error
