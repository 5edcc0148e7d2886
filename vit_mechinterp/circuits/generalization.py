"""Behaviour on every split: how far models generalise, by condition and over seeds.

The tables 1 to 3, 6 and 7 of Lepori et al. (2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vit_mechinterp.circuits.accuracy_intervals import over_images, over_seeds, verdict
from vit_mechinterp.circuits.behaviour import behaviour
from vit_mechinterp.circuits.reading import outputs_shape
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.engine.inputs.columns import Columns
from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.documents import validate
from vit_mechinterp.training.config import EVALUATION_SPLITS, EvaluationSplit, TrainingConfig
from vit_mechinterp.training.evaluate import answers
from vit_mechinterp.training.images import evaluation_count, evaluation_images
from vit_mechinterp.training.models import normalization_of, require_grid
from vit_mechinterp.training.records import Training

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SPLIT_NAMES", "accuracy_by_split", "generalization"]

SPLIT_NAMES: Mapping[str, str] = {
    "train": "train",
    "val": "val",
    "test_iid": "IID",
    "test": "compositional",
    "ood-shape": "OOD shape",
    "ood-color": "OOD colour",
    "ood-shape-color": "OOD shape & colour",
    "realistic": "realistic",
}
"""What tables and figures call the splits."""

Model = HookedViT | Training
Bounds = tuple[float, float]
Models = Model | Sequence[Model] | Mapping[int, Model]


def generalization(
    models: Mapping[str, Models],
    *,
    task: str = "discrimination",
    combinations: str = "256-256-256",
    cell: int | None = None,
    splits: Sequence[EvaluationSplit] = EVALUATION_SPLITS,
    n: int = 1000,
    realistic: Any = None,
    realistic_task: str = "discrimination",
    pretraining: Mapping[str, str] | None = None,
    recorded: bool = True,
    seed: int = 0,
    device: str | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Measure the accuracy of models on the images that they were trained on, and on ever newer ones.

    Args:
        models: condition to one model, or to several that differ in their seed (a list, or seed to model).
            A model is a `HookedViT`, or a `vit_mechinterp.training.Training`, which knows its task,
            combinations, geometry and seed, and is loaded when its turn comes
            (``by_condition(trainings("runs"))`` makes such a mapping).
        task: "discrimination" or "rmts"; this, ``combinations`` and ``cell`` are for a `HookedViT`, whose
            canvas and patch are the model's own.
        combinations: of the training, "256-256-256" or "32-32-224".
        cell: side of an object's cell in pixels; by default the next multiple of the patch from 28 px on.
        splits: what to measure; "train" is what a training of the same seed saw first.
        n: images of each split.
        realistic: a dataset with ``base`` and ``label`` to be measured as well, preprocessed by each model's
            own transform.
        realistic_task: the task that ``realistic`` is of; models of the other one are not asked about it.
        pretraining: condition to what its weights were trained on; presets know it.
        recorded: take accuracies from a training's own record where they are of at least ``n`` images.
        seed: of the images of a model given alone (in a list, the model's place is added), and of the
            bootstrap.
        device: where a loaded training runs; None leaves it on the CPU.
        progress: show bars if it takes longer than two seconds.

    Returns:
        Table: one row for every condition, split and seed, and one for all seeds (``seed`` is "all"):
        ``condition, model, losses, task, combinations, pretraining, split, seed, accuracy, accuracy_low,
        accuracy_high, interval, chance, n_seeds, n_images``. ``interval`` says what the 95 % interval is
        over: the mean over seeds by Student's t where there are two or more, else a bootstrap over images.
        ``chance`` is "at chance" where it contains 0.5; where it does though every seed alone is off chance
        on its images (few seeds, a wide t), "undecided"; else "above" or "below". Two figures: ``table`` and
        ``accuracy``.

    Raises:
        SpecError: there is no model or no such split, a model's patches do not fit the stimuli, or it does
            not give two logits.
        DataError: ``realistic`` lacks a column. Both are raised before any model is asked.
    """
    import pandas as pd

    _check(models, splits, n, realistic)
    subjects = {
        condition: [
            (own_seed, model, _settings(condition, model, task, combinations, cell, own_seed))
            for own_seed, model in _by_seed(given, seed)
        ]
        for condition, given in models.items()
    }
    named = dict(pretraining or {})
    rows: list[dict[str, Any]] = []
    sources: dict[str, str] = {}
    for condition, given in subjects.items():
        by_seed: dict[str, dict[int, tuple[float, int]]] = {}
        facts: dict[str, Any] = {}
        for own_seed, model, config in given:
            words = model.pretraining if isinstance(model, Training) else None
            facts = {
                "condition": condition,
                "model": model.model if isinstance(model, Training) else config.model,
                "losses": model.losses if isinstance(model, Training) else "unknown",
                "task": config.task,
                "combinations": config.combinations,
                "pretraining": named.get(condition, words or "unknown"),
            }
            photographs = realistic if config.task == realistic_task else None
            found, source = _measured(model, config, splits, n, photographs, recorded, device, progress)
            sources[f"{condition}, seed {own_seed}"] = source
            for split, value in found.items():
                by_seed.setdefault(split, {})[own_seed] = value
        for split, values in by_seed.items():
            rows += [facts | {"split": split} | row for row in _rows(values, seed)]
    table = pd.DataFrame(rows)
    return CircuitResult(
        name="generalization",
        table=table,
        provenance=provenance(models=sources, splits=list(splits), n=n, seed=seed),
        summary=_summary(table),
        title="Generalisation",
        description=_description(table),
        captions={
            "table": "Accuracy by condition and split, with its 95 % interval. Grey: at chance.",
            "accuracy": "Accuracy with 95 % intervals, the same numbers; the dotted line is chance.",
        },
        draw=_draw,
    )


def accuracy_by_split(result: CircuitResult) -> pd.DataFrame:
    """Return the paper's form of the table: a row for each condition, a column for each split, as text.

    "0.958 [0.946, 0.970]" is the accuracy with its interval; "at chance" follows where that is so.
    """
    import pandas as pd

    whole = _named(result.table)
    lines: dict[str, dict[str, str]] = {}
    for row in whole.itertuples():
        line = lines.setdefault(str(row.condition), {"pretraining": str(row.pretraining)})
        text = f"{row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]"
        line[str(row.split_name)] = text + (" at chance" if row.chance == "at chance" else "")
    return pd.DataFrame.from_dict(lines, orient="index").rename_axis("condition").reset_index()


def _check(models: Mapping[str, Models], splits: Sequence[str], n: int, realistic: Any) -> None:
    if not models:
        raise SpecError("generalization needs at least one condition with a model.")
    for condition, given in models.items():
        own = list(given.values()) if isinstance(given, Mapping) else given
        own = [own] if isinstance(own, HookedViT | Training) else own
        if isinstance(own, str) or not own or not all(isinstance(one, HookedViT | Training) for one in own):
            raise SpecError(
                f"generalization, {condition!r}: {given!r} is no model. Give a HookedViT (load, wrap) or a "
                "Training (trainings), or several of them."
            )
    if not splits and realistic is None:
        raise SpecError(f"Name at least one split. Splits: {', '.join(EVALUATION_SPLITS)}.")
    if n < 1:
        raise SpecError(f"n={n}: an accuracy takes at least one image of each split.")
    if realistic is not None:
        columns = Columns(realistic)
        for column in ("base", "label"):
            columns.require(column, "generalization, realistic")
    for split in splits:
        if split not in EVALUATION_SPLITS:
            raise SpecError(
                f"There is no split {split!r}.{suggest(split, EVALUATION_SPLITS)} Splits: "
                f"{', '.join(EVALUATION_SPLITS)}; a dataset of your own is given as `realistic`."
            )


def _by_seed(given: Models, seed: int) -> Iterator[tuple[int, Model]]:
    if isinstance(given, Mapping):
        yield from given.items()
    else:
        for place, model in enumerate([given] if isinstance(given, HookedViT | Training) else given):
            yield (model.config.seed if isinstance(model, Training) else seed + place), model


def _settings(
    condition: str, model: Model, task: str, combinations: str, cell: int | None, seed: int
) -> TrainingConfig:
    """What decides the images that a model is asked about: its training's settings, or those of the call."""
    if isinstance(model, Training):
        return model.config
    if (shape := outputs_shape(model)) != (2,):
        raise SpecError(
            f"generalization, {condition!r}: {type(model.module).__name__} gives {model.layout.output} of "
            f"shape {shape}, not one logit each for different and same. Train it with a two-way head first "
            "(vit-mechinterp train)."
        )
    return _config(model, task, combinations, cell, seed)


def _config(vit: HookedViT, task: str, combinations: str, cell: int | None, seed: int) -> TrainingConfig:
    """The settings whose images a model that comes without a record is asked about."""
    patch = vit.layout.tokens.patch_size[0]
    given = {
        "task": task,
        "model": vit.source or type(vit.module).__name__,
        "canvas": vit.layout.tokens.image_size[0],
        "patch": patch,
        "cell": patch * -(-28 // patch) if cell is None else cell,
        "combinations": combinations,
        "seed": seed,
    }
    config = validate(TrainingConfig, given, "generalization")
    require_grid(vit, config)
    evaluation_images(config, "test")  # combinations that there are not
    return config


def _measured(
    model: Model,
    config: TrainingConfig,
    splits: Sequence[EvaluationSplit],
    n: int,
    realistic: Any,
    recorded: bool,
    device: str | None,
    progress: bool,
) -> tuple[dict[str, tuple[float, int]], str]:
    """Accuracy and number of images of every split; and where the numbers come from."""
    found: dict[str, tuple[float, int]] = {}
    if isinstance(model, Training) and recorded and config.test_images >= n:
        found = {
            split: (model.test[split]["accuracy"], evaluation_count(config, split))
            for split in splits
            if split in model.test
        }
    open_splits = [split for split in splits if split not in found]
    if not open_splits and realistic is None:
        return found, "recorded by the training"
    vit = model.load() if isinstance(model, Training) else model
    if isinstance(model, Training) and device is not None:
        vit.module.to(device)
    for split in open_splits:
        images = evaluation_images(config, split, normalization_of(vit))
        most = evaluation_count(config, split, n)
        right = answers(vit, images, most, progress=progress).right
        found[split] = (float(right.mean()), most)
    if realistic is not None:
        own = behaviour({"model": vit}, realistic, progress=progress).table.iloc[0]
        found["realistic"] = (float(own["accuracy"]), int(own["n"]))
    return {name: found[name] for name in (*splits, "realistic") if name in found}, vit.fingerprint()


def _rows(values: Mapping[int, tuple[float, int]], seed: int) -> Iterator[dict[str, Any]]:
    """A row for each seed, and one for all of them."""
    alone = {own: over_images(accuracy, n, seed=seed) for own, (accuracy, n) in values.items()}
    accuracies = np.array([accuracy for accuracy, _ in values.values()])
    n_images = [n for _, n in values.values()]
    several = len(values) > 1
    for own, (accuracy, n) in values.items():
        low, high = alone[own]
        yield _row(str(own), accuracy, (low, high), f"bootstrap over {n} images", 1, n, [(low, high)])
    bounds = over_seeds(accuracies) if several else next(iter(alone.values()))
    over = f"t over {len(values)} seeds" if several else f"bootstrap over {n_images[0]} images"
    mean = float(accuracies.mean())
    yield _row("all", mean, bounds, over, len(values), sum(n_images), list(alone.values()))


def _row(
    seed: str, accuracy: float, bounds: Bounds, over: str, n_seeds: int, n_images: int, alone: list[Bounds]
) -> dict[str, Any]:
    return {
        "seed": seed,
        "accuracy": accuracy,
        "accuracy_low": bounds[0],
        "accuracy_high": bounds[1],
        "interval": over,
        "chance": verdict(bounds, alone),
        "n_seeds": n_seeds,
        "n_images": n_images,
    }


def _named(table: pd.DataFrame) -> pd.DataFrame:
    """The rows over all seeds, with what the splits are called: nothing is compositional where no training
    held an object out.
    """
    whole = table[table["seed"] == "all"]
    names = dict(SPLIT_NAMES)
    if set(whole["combinations"]) == {"256-256-256"}:
        names["test"] = "test"
    return whole.assign(split_name=[names[split] for split in whole["split"]])


def _summary(table: pd.DataFrame) -> dict[str, float | int | str]:
    shown = _named(table)
    shown = shown[shown["split"].isin(["test_iid", "test", "realistic"])]
    names = [f"{row.split_name}, {row.condition}" for row in shown.itertuples()]
    return dict(zip(names, shown["accuracy"].tolist(), strict=True))


def _description(table: pd.DataFrame) -> str:
    whole = _named(table)
    text = (
        "How often models answer rightly on images that they were trained on, on new images of the objects "
        "that they were trained on (val, IID), of objects held out of their training (compositional; where "
        "256-256-256 holds none out, new images again), and of shapes, colours or both that no training "
        f"shows (OOD).\n\nIntervals are {', '.join(sorted(set(whole['interval'])))}."
    )
    lost = [
        f"{condition} ({', '.join(own['split_name'])})"
        for condition, own in whole[whole["chance"] == "at chance"].groupby("condition", sort=False)
    ]
    return text + (f"\n\nAt chance: {'; '.join(lost)}." if lost else "\n\nNo condition is at chance.")


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures.accuracies import accuracy_dots, accuracy_table

    whole = _named(result.table)
    cells = {
        (str(row.condition), str(row.split_name)): (
            float(row.accuracy),  # type: ignore[arg-type]
            float(row.accuracy_low),  # type: ignore[arg-type]
            float(row.accuracy_high),  # type: ignore[arg-type]
            bool(row.chance == "at chance"),
        )
        for row in whole.itertuples()
    }
    notes = dict(zip(whole["condition"], whole["pretraining"], strict=True))
    return {
        "table": accuracy_table(cells, notes=notes, notes_title="pretraining"),
        "accuracy": accuracy_dots(cells),
    }
