"""The phases of learning on spatially structured data: when does the model generalise, and when does its
attention find the sets? (After Jelassi, Sander and Li 2022.)

The one-layer model of positional attention is trained from scratch, and what its attention knows of the sets
is scored along the way (see `vit_mechinterp.circuits.association`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vit_mechinterp.circuits.association import association, members_of
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.stimuli.spatial import SpatialStructure
from vit_mechinterp.training.positional import PositionalModel, fit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["association_phases"]

_GENERALISES = 0.01
"""Test error at and below which the model is said to generalise."""
_FIRST = 20
"""Steps at the start that are recorded one by one: the feature is learned in them."""


def association_phases(
    structure: SpatialStructure | None = None,
    *,
    examples: int = 3000,
    test_examples: int = 1000,
    steps: int = 600,
    learning_rate: float = 0.1,
    attention_rate: float = 100.0,
    record_every: int = 4,
    feature: int = 0,
    seed: int = 0,
    progress: bool = True,
) -> CircuitResult:
    """Train the one-layer model of positional attention, and score its attention along the way.

    Args:
        structure: sets, sizes and noise; by default 64 patches of 64 numbers in random sets of 8.
        examples, test_examples: how many to train and to test on.
        steps: of full-batch gradient descent.
        learning_rate: of the value vector.
        attention_rate: of the attention logits. With the value vector's own rate (0.1) the order of attention
            is found as well, but in these steps it stays too flat to be of use in transfer.
        record_every: steps between rows of the table, after the first twenty, which have a row each.
        feature: seed of the feature vector.
        seed: seeds the examples and the initial weights.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per recorded step: ``train_loss``, ``test_error``, ``cosine`` (of the value vector and
        the feature), ``agreement``, ``exact``, ``corrected`` (see `association`), ``own_set`` (mean attention
        within the own set). Tensors: ``logits`` of the attention and ``value`` at the end, and the attention
        at the start, when the model first generalises, and at the end (``attention_start``, ...). Figures:
        ``phases`` and ``attention``.
    """
    import pandas as pd

    structure = structure or SpatialStructure.random(64, 8, dimension=64)
    train = structure.sample(examples, feature=feature, seed=seed)
    test = structure.sample(test_examples, feature=feature, seed=seed + 1_000_003)
    model = PositionalModel(structure.n_patches, structure.dimension, seed=seed)
    trace = fit(
        model,
        train,
        test,
        structure.feature(feature),
        steps=steps,
        learning_rate=learning_rate,
        attention_rate=attention_rate,
        record_every=record_every,
        record_first=_FIRST,
        progress=progress,
    )
    attention = torch.stack(trace.attention)
    members = members_of(structure.sets)
    table = pd.DataFrame(
        {
            "step": trace.steps,
            "train_loss": trace.train_loss,
            "test_error": trace.test_error,
            "cosine": trace.cosine,
            **{name: score.tolist() for name, score in association(attention, members).items()},
            "own_set": (attention * members).sum(-1).mean(-1).tolist(),
        }
    )
    generalises, associates = _first(table, "test_error", _GENERALISES), _first(table, "exact", 1.0)
    middle = trace.steps.index(generalises) if generalises is not None else len(attention) // 2
    summary = _summary(table, generalises, associates)
    return CircuitResult(
        name="association_phases",
        table=table,
        tensors={
            "logits": model.logits.detach().clone(),
            "value": model.value.detach().clone(),
            "attention_start": attention[0],
            "attention_generalising": attention[middle],
            "attention_end": attention[-1],
        },
        provenance=provenance(
            circuit="association_phases",
            sets=structure.sets,
            dimension=structure.dimension,
            rate=structure.rate,
            sigma=structure.sigma,
            examples=examples,
            test_examples=test_examples,
            steps=steps,
            learning_rate=learning_rate,
            attention_rate=attention_rate,
            feature=feature,
            seed=seed,
        ),
        summary=summary,
        title="Phases of learning",
        description=_description(
            structure, (learning_rate, attention_rate), generalises, associates, table
        ),
        captions={
            "phases": (
                "Test error, cosine of the value vector and the feature, and patch association (agreement "
                "with the sets, corrected for chance) over one training; the axis is linear up to step 10 "
                "and logarithmic from there on."
            ),
            "attention": (
                "Attention between positions, patches ordered by their sets: before training, when the model "
                "first generalises, and at the end. Lines part the sets; logits on the diagonal are held."
            ),
        },
        draw=partial(_draw, sets=structure.sets, moments=(generalises, associates)),
    )


def _first(table: pd.DataFrame, column: str, level: float) -> int | None:
    """The recorded step from which on a column stays at its level: errors below, scores above."""
    reached = (table[column] <= level) if column == "test_error" else (table[column] >= level)
    stays = reached[::-1].cummin()[::-1]
    return int(table["step"][stays].iloc[0]) if stays.any() else None


def _summary(
    table: pd.DataFrame, generalises: int | None, associates: int | None
) -> dict[str, float | int | str]:
    last = table.iloc[-1]
    return {
        "test error at the end": float(last["test_error"]),
        "rows whose top entries are the set": float(last["exact"]),
        "association, corrected": float(last["corrected"]),
        "attention within the own set": float(last["own_set"]),
        "generalises from step": "never" if generalises is None else generalises,
        "associates from step": "never" if associates is None else associates,
    }


def _description(
    structure: SpatialStructure,
    rates: tuple[float, float],
    generalises: int | None,
    associates: int | None,
    table: pd.DataFrame,
) -> str:
    said = (
        f"{structure.n_patches} patches of {structure.dimension} numbers lie in disjoint sets of "
        f"{structure.size}; the patches of one set, another one in every example, carry the label, and all "
        f"others carry a distracting feature with probability {structure.rate:.3f}. The model is one layer "
        "whose attention depends on positions alone, trained by gradient descent on the labels (rate "
        f"{rates[0]:g} for the value vector, {rates[1]:g} for the attention logits, whose gradients are far "
        "smaller); nobody tells it the sets."
    )
    last = table.iloc[-1]
    if generalises is None:
        found = f"It does not generalise here: its test error ends at {last['test_error']:.3f}."
    else:
        found = f"Its test error stays at 1 % or less from step {generalises} on"
        if associates is None:
            found += f", and its attention has found {last['exact']:.0%} of the sets' rows by the end."
        elif associates > generalises:
            found += (
                f"; only later, from step {associates} on, are the largest entries of every row of its "
                "attention exactly the patch's own set. The model generalises before it knows the structure, "
                "and learns the structure all the same."
            )
        else:
            found += f", and from step {associates} on every row's largest entries are exactly the own set."
    own = (
        "The data's and the model's definitions follow third-party accounts of Jelassi et al. (2022); the "
        "scores and the learning rates are this project's own."
    )
    return f"{said}\n\n{found}\n\n{own}"


def _draw(
    result: CircuitResult, sets: tuple[tuple[int, ...], ...], moments: tuple[int | None, int | None]
) -> dict[str, Figure]:
    from vit_mechinterp.figures.spatial import learning_phases, patch_matrices

    table = result.table
    last = float(table["step"].iloc[-1])
    generalises, associates = (last if moment is None else float(moment) for moment in moments)
    phases: list[tuple[str, float]] = [("learns the feature", generalises)]
    if associates > generalises:
        phases.append(("generalises", associates))
    phases.append(("knows the sets", last))
    order = [i for one in sets for i in one]
    size = len(sets[0])
    titles = {
        "attention_start": "before training",
        "attention_generalising": f"step {generalises:.0f}",
        "attention_end": f"step {last:.0f}",
    }
    off = {}
    for name, title in titles.items():
        values = result.tensors[name][order][:, order].clone()
        off[title] = values.numpy()
    lines: dict[str, Any] = {
        "patch association": table["corrected"].tolist(),
        "test error": table["test_error"].tolist(),
        "cosine of v and w": table["cosine"].tolist(),
    }
    return {
        "phases": learning_phases(table["step"].tolist(), lines, phases=phases),
        "attention": patch_matrices(
            off, seams=[size * k for k in range(1, len(sets))], label="attention"
        ),
    }
