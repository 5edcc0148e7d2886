"""The searches behind `das`: what is trained and measured together, and what of it is shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from vit_mechinterp.circuits.alignment import Training
from vit_mechinterp.circuits.das_controls import check_control
from vit_mechinterp.circuits.das_data import labels_of, variants_of
from vit_mechinterp.circuits.das_questions import (
    Case,
    Options,
    Question,
    case_of,
    check,
    data_of,
    tokens_of,
    with_patches,
)
from vit_mechinterp.circuits.das_rows import NO_CONTROL, rows_of
from vit_mechinterp.circuits.result import provenance
from vit_mechinterp.circuits.subspace_training import Search, Trained, train_subspaces
from vit_mechinterp.circuits.token_sets import check_grid
from vit_mechinterp.engine import Results, execute
from vit_mechinterp.engine.binding.bind import bind, expand_runs
from vit_mechinterp.engine.binding.checks import check_images
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.spec import InjectSubspace, Run, Site

if TYPE_CHECKING:
    import pandas as pd

    from vit_mechinterp.model import HookedViT

__all__ = ["Answer", "answer"]


@dataclass(frozen=True)
class Answer:
    """The rows and tensors of all questions, one record per question, and the accuracy of guessing."""

    table: pd.DataFrame
    tensors: Mapping[str, Tensor]
    records: Sequence[Mapping[str, Any]]
    chance: float


@dataclass(frozen=True)
class _Found:
    """What one case gave: rows, tensors, and where they come from."""

    rows: Sequence[Mapping[str, Any]]
    tensors: Mapping[str, Tensor]
    record: Mapping[str, Any]
    chance: float


def answer(vit: HookedViT, questions: Sequence[Question], options: Options) -> Answer:
    """Train and measure all questions, layers and seeds together.

    Raises:
        SpecError, DataError, UnsupportedModelError: before the first forward, if anything does not fit.
    """
    layers = list(range(vit.layout.n_layers)) if options.layers is None else list(options.layers)
    for question in questions:
        check_control(question.control)
    check(layers, options)
    training = options.training()
    for layer in layers:
        vit.check_site(Site.parse(f"blocks.{layer}.{options.site}"))
    labels = labels_of(vit, [data for own in questions for data in data_of(own)], options.label)
    fresh = None
    if any(question.control == "random_weights" for question in questions):
        from vit_mechinterp.circuits.fresh_weights import with_fresh_weights

        fresh = with_fresh_weights(vit, min(options.numbers))
    questions, labels = with_patches(vit, questions, labels, options)
    n_tokens = None if options.tied else tokens_of(vit, questions, options)
    cases = [case_of(own, seed, layers, options) for own in questions for seed in options.numbers]
    _check_data(vit, cases)
    found: dict[int, _Found] = {}
    for control, model in (("", vit), ("random_weights", fresh)):
        chosen = [
            n for n, case in enumerate(cases) if (case.question.control == "random_weights") == bool(control)
        ]
        if chosen and model is not None:
            own = _search(model, [cases[n] for n in chosen], layers, labels, training, options, n_tokens)
            found |= dict(zip(chosen, own, strict=True))
    ordered = [found[n] for n in range(len(cases))]
    import pandas as pd

    return Answer(
        pd.DataFrame([row for own in ordered for row in own.rows]),
        {name: tensor for own in ordered for name, tensor in own.tensors.items()},
        [own.record for own in ordered[:: len(options.numbers)]],
        ordered[0].chance,
    )


def _search(
    vit: HookedViT,
    cases: Sequence[Case],
    layers: Sequence[int],
    labels: Mapping[int, Int[Tensor, " example"]],
    training: Training,
    options: Options,
    n_tokens: int | None,
) -> list[_Found]:
    """Train all cases on one model, and measure them."""
    d = vit.sites()[cases[0].runs[layers[0]].interventions[0].site].shape[-1]
    size = options.layers_at_once or len(layers)
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
            n_tokens=n_tokens,
            rows_at_once=options.rows_at_once,
            store=options.store,
            name=", ".join(dict.fromkeys(case.question.attribute for case in cases)),
            progress=options.progress,
        )
        for start in range(0, len(layers), size)
    ]
    trained = [[part[n] for part in parts] for n in range(len(cases))]
    tensors = {name: x for own in trained for part in own for name, x in part.tensors.items()}
    results = _measure(vit, cases, tensors, options)
    variants = {key: variants_of(vit, data) for case in cases for key, data in _by_id(case.question.tests)}
    found = []
    for case, own in zip(cases, trained, strict=True):
        question = case.question
        losses = {layer: loss for part in own for layer, loss in part.losses.items()}
        facts = {
            "attribute": question.attribute,
            "control": question.control or NO_CONTROL,
            "seed": case.seed,
        }
        rows = [
            row
            for split, data in question.tests.items()
            for row in rows_of(
                results[id(data)], labels[id(data)], case.runs, tensors, losses, case.prefix, facts, split,
                variants[id(data)], training.seed,
            )
        ]  # fmt: skip
        measured = [results[id(data)] for data in question.tests.values()]
        found.append(
            _Found(
                rows,
                {name: x for part in own for name, x in part.tensors.items()},
                _record(question, measured, training, options, own),
                1 / measured[0].logits.shape[-1],
            )
        )
    return found


def _check_data(vit: HookedViT, cases: Sequence[Case]) -> None:
    """Let whatever does not fit the held-out data be said before the training."""
    datasets = {id(data): data for case in cases for data in data_of(case.question)}
    for data in datasets.values():
        own = [case for case in cases if any(one is data for one in data_of(case.question))]
        columns = Data(data, vit)
        runs = [next(iter(case.runs.values())) for case in own]
        check_images(columns, bind(vit, expand_runs(runs, vit.layout.n_layers), columns))
        for case, run in zip(own, runs, strict=True):
            swap = run.interventions[0]
            assert isinstance(swap, InjectSubspace)
            assert swap.source_tokens is not None
            where = f"das, {case.question.attribute}"
            check_grid(swap.tokens, vit, columns, run.base, where)
            check_grid(swap.source_tokens, vit, columns, str(swap.source), where)


def _by_id(tests: Mapping[str, Any]) -> Iterable[tuple[int, Any]]:
    return ((id(data), data) for data in tests.values())


def _measure(
    vit: HookedViT, cases: Sequence[Case], tensors: Mapping[str, Tensor], options: Options
) -> dict[int, Results]:
    """Held-out outputs of every run and of the clean images, by dataset."""
    datasets = dict(pair for case in cases for pair in _by_id(case.question.tests))
    found: dict[int, Results] = {}
    for key, data in datasets.items():
        runs = [
            run
            for case in cases
            if any(own is data for own in case.question.tests.values())
            for run in case.runs.values()
        ]
        runs.append(Run(name="clean", base=options.base))
        found[key] = execute(vit, runs, data, tensors=tensors, progress=options.progress, store=options.store)
    return found


def _record(
    question: Question,
    results: Sequence[Results],
    training: Training,
    options: Options,
    parts: Sequence[Trained],
) -> dict[str, Any]:
    work = {
        "steps": parts[0].steps,
        "optimizer": "adam, linear warm-up over a tenth of the steps, linear decay",
        "clean_evaluations": sum(part.clean_evaluations for part in parts),
    }
    seed = options.seed if options.seeds is None else list(options.seeds)
    return provenance(
        *(own.provenance for own in results),
        training={**asdict(training), "seed": seed, **work, **parts[0].provenance},
        attribute=question.attribute,
        control=question.control or NO_CONTROL,
        splits=list(question.tests),
        seed=seed,
    )
