"""The searches behind `das`: what is trained and measured together, and what of it is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from vit_mechinterp.circuits.alignment import Training, gate_name, rotation_name
from vit_mechinterp.circuits.das_result import NO_CONTROL, rows_of
from vit_mechinterp.circuits.result import provenance
from vit_mechinterp.circuits.subspace_training import Search, Trained, train_subspaces
from vit_mechinterp.engine import Results, execute
from vit_mechinterp.engine.data import Data
from vit_mechinterp.errors import DataError, SpecError, suggest
from vit_mechinterp.spec import InjectSubspace, Run, Site, TensorRef, Tokens

if TYPE_CHECKING:
    import pandas as pd

    from vit_mechinterp.engine import ActivationStore
    from vit_mechinterp.model import HookedViT

__all__ = ["CONTROLS", "Answer", "Control", "Question", "answer", "interchange_run"]

Control = Literal["wrong_object"]
CONTROLS: Final[tuple[Control, ...]] = ("wrong_object",)


@dataclass(frozen=True)
class Question:
    """One attribute or one control of it: what to search for, and the data to train and to measure on.

    ``prefix`` is what the names of its tensors begin with.
    """

    attribute: str
    control: Control | None
    train: Any
    test: Any
    prefix: str = ""


@dataclass(frozen=True)
class Answer:
    """The rows and tensors of all questions, one record per question, and the accuracy of guessing."""

    table: pd.DataFrame
    tensors: Mapping[str, Tensor]
    records: Sequence[Mapping[str, Any]]
    chance: float


@dataclass(frozen=True)
class _Case:
    """One question with one seed: its runs by layer."""

    question: Question
    seed: int
    prefix: str
    runs: Mapping[int, Run]


def answer(
    vit: HookedViT,
    questions: Sequence[Question],
    *,
    layers: Sequence[int] | None,
    site: str,
    tokens: Tokens,
    source_tokens: Tokens,
    control_tokens: Tokens,
    base: str,
    source: str,
    label: str,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    mask_learning_rate: float,
    sparsity: float,
    permute_sources: bool,
    seed: int,
    seeds: Sequence[int] | None,
    layers_at_once: int | None,
    rows_at_once: int | None,
    store: ActivationStore | None,
    progress: bool,
) -> Answer:
    """Train and measure all questions, layers and seeds together; the arguments are those of `das`.

    Raises:
        SpecError, DataError: before the first forward, if anything does not fit.
    """
    layers = list(range(vit.layout.n_layers)) if layers is None else list(layers)
    numbers = [seed] if seeds is None else list(seeds)
    for question in questions:
        _check_control(question.control)
    _check(layers, numbers, layers_at_once, rows_at_once)
    training = Training(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        mask_learning_rate=mask_learning_rate,
        sparsity=sparsity,
        permute_sources=permute_sources,
        seed=min(numbers),
    )
    cases = []
    for question in questions:
        taken = source_tokens if question.control is None else control_tokens
        for number in numbers:
            prefix = question.prefix if seeds is None else f"{question.prefix}seed_{number}."
            runs = {
                n: interchange_run(n, site, tokens, taken, base=base, source=source, prefix=prefix)
                for n in layers
            }
            cases.append(_Case(question, number, prefix, {n: _named(run, prefix) for n, run in runs.items()}))
    for run in cases[0].runs.values():
        vit.check_site(Site.parse(run.interventions[0].site))
    d = vit.sites()[cases[0].runs[layers[0]].interventions[0].site].shape[-1]
    labels = _labels_of(vit, questions, label)
    size = layers_at_once or len(layers)
    parts = [
        train_subspaces(
            vit,
            [
                Search(
                    {n: case.runs[n] for n in layers[start : start + size]},
                    case.question.train,
                    labels[id(case.question.train)],
                    case.seed,
                    case.prefix,
                )
                for case in cases
            ],
            d,
            training,
            rows_at_once=rows_at_once,
            store=store,
            name=", ".join(dict.fromkeys(question.attribute for question in questions)),
            progress=progress,
        )
        for start in range(0, len(layers), size)
    ]
    trained = [[part[n] for part in parts] for n in range(len(cases))]
    tensors = {name: x for own in trained for part in own for name, x in part.tensors.items()}
    results = _measure(vit, cases, tensors, base, store, progress)
    table: list[dict[str, Any]] = []
    for case, own in zip(cases, trained, strict=True):
        question = case.question
        losses = {layer: loss for part in own for layer, loss in part.losses.items()}
        table += rows_of(
            results[id(question.test)], labels[id(question.test)], case.runs, tensors, losses, case.prefix,
            {"attribute": question.attribute, "control": question.control or NO_CONTROL, "seed": case.seed},
        )  # fmt: skip
    records = [
        _record(
            question,
            results[id(question.test)],
            training,
            numbers if seeds is not None else seed,
            next(own for case, own in zip(cases, trained, strict=True) if case.question is question),
        )
        for question in questions
    ]
    import pandas as pd

    chance = 1 / next(iter(results.values())).logits.shape[-1]
    return Answer(pd.DataFrame(table), tensors, records, chance)


def interchange_run(
    layer: int,
    site: str,
    tokens: Tokens,
    source_tokens: Tokens,
    *,
    base: str = "base",
    source: str = "source",
    prefix: str = "",
) -> Run:
    """The run that exchanges a trained subspace, for `execute` with ``tensors=result.tensors``.

    Args:
        layer: the block.
        site: the site within it, without its layer.
        tokens, source_tokens: which tokens of base and source are paired.
        base, source: image columns.
        prefix: of the tensors' names, such as ``"shape."`` for a result of `das_by_attribute`.
    """
    swap = InjectSubspace(
        site=f"blocks.{layer}.{site}",
        tokens=tokens,
        source=source,
        source_tokens=source_tokens,
        basis=TensorRef(prefix + rotation_name(layer)),
        gate=TensorRef(prefix + gate_name(layer)),
    )
    return Run(name=f"layer_{layer}", interventions=(swap,), base=base)


def _named(run: Run, prefix: str) -> Run:
    return run.model_copy(update={"name": prefix + run.name})


def _check_control(control: str | None) -> None:
    if control is not None and control not in CONTROLS:
        raise SpecError(
            f"Unknown control {control!r}.{suggest(control, CONTROLS)} Known: {', '.join(CONTROLS)}, or None."
        )


def _check(
    layers: Sequence[int], seeds: Sequence[int], layers_at_once: int | None, rows_at_once: int | None
) -> None:
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise SpecError(f"layers={list(layers)}: name at least one block, each once, counted from 0.")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise SpecError(f"seeds={list(seeds)}: name at least one, each once, none negative.")
    if layers_at_once is not None and layers_at_once < 1:
        raise SpecError(f"layers_at_once={layers_at_once}: a group holds at least 1 layer.")
    if rows_at_once is not None and rows_at_once < 1:
        raise SpecError(f"rows_at_once={rows_at_once}: a forward holds at least 1 row.")


def _labels_of(
    vit: HookedViT, questions: Sequence[Question], column: str
) -> dict[int, Int[Tensor, " example"]]:
    """The wanted class of every example of every dataset."""
    with torch.no_grad():
        shape = tuple(vit(vit.blank(1)).shape[1:])
    if len(shape) != 1:
        raise SpecError(
            f"{type(vit.module).__name__} gives {vit.layout.output} of shape {shape} per example, not one "
            "score for each class; a search needs a decision to change."
        )
    found: dict[int, Tensor] = {}
    for data in (data for question in questions for data in (question.train, question.test)):
        if id(data) in found:
            continue
        columns = Data(data, vit)
        columns.require(column, "das, label")
        rows = columns.integers(column)
        wrong = [n for n, row in enumerate(rows) if len(row) != 1 or not 0 <= row[0] < shape[0]]
        if wrong:
            raise DataError(
                f"Column {column!r}, example {wrong[0]}: {rows[wrong[0]]} is no class; the model has classes "
                f"0 to {shape[0] - 1}."
            )
        found[id(data)] = torch.tensor([row[0] for row in rows])
    return found


def _measure(
    vit: HookedViT,
    cases: Sequence[_Case],
    tensors: Mapping[str, Tensor],
    base: str,
    store: ActivationStore | None,
    progress: bool,
) -> dict[int, Results]:
    """Held-out outputs of every run and of the clean images, by dataset."""
    found: dict[int, Results] = {}
    for test in (case.question.test for case in cases):
        if id(test) not in found:
            runs = [run for case in cases if case.question.test is test for run in case.runs.values()]
            runs.append(Run(name="clean", base=base))
            found[id(test)] = execute(vit, runs, test, tensors=tensors, progress=progress, store=store)
    return found


def _record(
    question: Question, results: Results, training: Training, seed: int | list[int], parts: Sequence[Trained]
) -> dict[str, Any]:
    work = {
        "steps": parts[0].steps,
        "optimizer": "adam, linear warm-up over a tenth of the steps, linear decay",
        "clean_evaluations": sum(part.clean_evaluations for part in parts),
    }
    return provenance(
        results.provenance,
        training={**asdict(training), "seed": seed, **work, **parts[0].provenance},
        attribute=question.attribute,
        control=question.control or NO_CONTROL,
        seed=seed,
    )
