"""``demo``, ``plan``, ``run`` and ``schema``: experiments from documents."""

from __future__ import annotations

import argparse
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vit_mechinterp.engine import ActivationStore, Results

__all__ = ["demo", "plan", "run", "schema"]


def demo(arguments: argparse.Namespace) -> int:
    """Run the main analysis on the shipped model."""
    from vit_mechinterp.report.demo import analyse

    print(analyse(arguments.out, progress=not arguments.quiet))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    """Print what an experiment would compute."""
    from vit_mechinterp.engine import plan
    from vit_mechinterp.experiment import load_data, load_model, read_experiment

    experiment = read_experiment(arguments.experiment)
    data = None if arguments.per_example else load_data(experiment)
    with _store(arguments.store) as store:
        print(
            plan(
                load_model(experiment),
                experiment,
                data,
                batch_size=experiment.batch_size,
                memory=arguments.memory,
                store=store,
            )
        )
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Run an experiment and save its results."""
    from vit_mechinterp.experiment import run_experiment

    with _store(arguments.store) as store:
        results = run_experiment(
            arguments.experiment,
            arguments.out,
            progress=not arguments.quiet,
            memory=arguments.memory,
            store=store,
        )
    print(_summary(results))
    print(f"{results!r} in {arguments.out}")
    return 0


def _store(folder: Path | None) -> AbstractContextManager[ActivationStore | None]:
    """A store in a folder, closed behind the ``with`` block; None without a folder."""
    if folder is None:
        return nullcontext()
    from vit_mechinterp.engine import ActivationStore

    return ActivationStore(folder)


def _summary(results: Results) -> str:
    """How often each run predicts what the data's label columns say, or, without any, its mean outputs (or
    the mean of what was kept of them)."""
    if not results.run_names:
        return "No run has an output; what they captured is in the results."
    table = results.to_pandas()
    n = results.logits.shape[1]
    readout = results.readout
    if readout is None and "prediction" not in table:
        return f"Outputs of shape {tuple(results.logits.shape[2:])} for {n} examples a run."
    labels = [name for name in ("label", "counterfactual_label") if name in table]
    if readout is not None:
        title = f"Mean over the {n} examples:"
        shown = table.groupby("run", sort=False)[list(readout.names)].mean()
    elif labels:
        title = f"Share of the {n} examples whose prediction equals the column:"
        right = table[labels].eq(table["prediction"], axis=0)
        shown = right.groupby(table["run"], sort=False).mean()
    else:
        title = f"Mean output over the {n} examples:"
        shown = table.filter(like="logit_").groupby(table["run"], sort=False).mean()
    return f"{title}\n{shown.rename_axis(None).to_string(float_format='{:.3f}'.format, max_cols=8)}"


def schema(_: argparse.Namespace) -> int:
    """Print the JSON schema of experiments."""
    from vit_mechinterp.spec import Experiment

    print(json.dumps(Experiment.json_schema(), indent=2))
    return 0
