"""Sample-efficient transfer: how many examples of a new task does a model need that knows the sets already?

Downstream data have the same sets and another feature, with more noise and more distractions, so that it
matters which patches are read together. Four models learn it from n examples each:

* ``pretrained``: the attention of a model that was trained on the first task; a new value vector is learned;
* ``from scratch``: attention and value vector are learned from the n examples, at the best of several
  learning rates of the attention, chosen on the very examples that accuracy is measured on, which favours
  this arm;
* ``without association``: uniform attention, built by hand; a solution of the first task that generalises and
  knows nothing of the sets; a new value vector is learned;
* ``exact association``: attention on the own set alone, built by hand; the best that pretraining could give.

That a structure makes transfer sample-efficient is Jelassi, Sander and Li's (2022) claim; sizes, noise and
the four arms are this project's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.association import members_of
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import bootstrap_interval
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.stimuli.spatial import SpatialStructure
from vit_mechinterp.training.positional import PositionalModel, fit, test_error

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["structure_transfer"]

ARMS = ("exact association", "pretrained", "without association", "from scratch")
_FAR = 30.0
"""What other sets' logits lie below the own set's in exact association: nothing is left of them."""


def structure_transfer(
    structure: SpatialStructure,
    logits: Float[Tensor, "patch patch"],
    *,
    samples: Sequence[int] = (10, 30, 100, 300, 1000),
    rate: float = 0.3,
    sigma: float = 0.5,
    feature: int = 1,
    repeats: int = 5,
    steps: int = 300,
    learning_rate: float = 0.1,
    attention_rates: Sequence[float] = (1.0, 5.0, 20.0),
    test_examples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> CircuitResult:
    """Learn a task of the same structure from few examples, with and without knowing the structure.

    Args:
        structure: the sets; its own noise is replaced by the downstream task's.
        logits: of attention, pretrained on the structure (``association_phases(...).tensors["logits"]``).
        samples: numbers of downstream examples.
        rate, sigma: distractions and noise of the downstream task.
        feature: seed of its feature; another than in pretraining.
        repeats: draws of the examples for every number.
        steps, learning_rate: of gradient descent.
        attention_rates: learning rates of the attention that are tried from scratch; far larger ones diverge
            here.
        test_examples: held-out examples that every accuracy is measured on.
        seed: seeds the examples and the bootstrap.
        progress: show a bar.

    Returns:
        Table, one row per arm, number of samples and repeat: ``accuracy`` on held-out examples. Figure:
        ``transfer``.

    Raises:
        DataError: the logits do not fit the structure; SpecError: no sample or repeat.
    """
    import pandas as pd

    n = structure.n_patches
    if tuple(logits.shape) != (n, n):
        raise DataError(f"The structure has {n} patches; the attention logits are {tuple(logits.shape)}.")
    if not samples or min(samples) < 1 or repeats < 1:
        raise SpecError(f"samples={tuple(samples)} and repeats={repeats}: give at least one of each.")
    downstream = replace(structure, rate=rate, sigma=sigma)
    test = downstream.sample(test_examples, feature=feature, seed=seed + 2_000_003)
    members = members_of(structure.sets)
    attention = {
        "exact association": torch.where(members, 0.0, -_FAR),
        "pretrained": logits.detach().cpu().float(),
        "without association": torch.zeros(n, n),
    }
    rows = []
    jobs = [(size, repeat, arm) for size in samples for repeat in range(repeats) for arm in ARMS]
    for size, repeat, arm in tqdm(jobs, desc="transfer", delay=2, disable=not progress):
        train = downstream.sample(size, feature=feature, seed=seed + 1000 * repeat + size)
        known = attention.get(arm)
        errors = []
        for attention_rate in attention_rates if known is None else (0.0,):
            if known is None:
                model = PositionalModel(n, structure.dimension, seed=repeat)
            else:
                model = PositionalModel.with_attention(known, structure.dimension, seed=repeat)
            trace = fit(
                model,
                train,
                test,
                downstream.feature(feature),
                steps=steps,
                learning_rate=learning_rate,
                attention_rate=attention_rate,
                record_every=0,
            )
            errors.append(trace.test_error[-1])
        rows.append({"arm": arm, "samples": size, "repeat": repeat, "accuracy": 1 - min(errors)})
    table = pd.DataFrame(rows)
    first = {
        f"first task, {arm}": _on_the_first_task(structure, attention[arm], test_examples, seed)
        for arm in ("pretrained", "without association")
    }
    return CircuitResult(
        name="structure_transfer",
        table=table,
        provenance=provenance(
            circuit="structure_transfer",
            sets=structure.sets,
            dimension=structure.dimension,
            rate=rate,
            sigma=sigma,
            feature=feature,
            steps=steps,
            learning_rate=learning_rate,
            attention_rates=attention_rates,
            repeats=repeats,
            seed=seed,
        ),
        summary={**first, **_summary(table)},
        title="Sample-efficient transfer",
        description=_description(table, first, rate, sigma),
        captions={
            "transfer": (
                f"Accuracy on {test_examples:,} held-out examples against the number of training examples; "
                f"means "
                f"over {repeats} draws with 95 % bootstrap intervals."
            )
        },
        draw=_draw,
    )


def _on_the_first_task(structure: SpatialStructure, logits: Tensor, n: int, seed: int) -> float:
    """Accuracy on the structure's own noise, with the feature itself for a value vector."""
    model = PositionalModel.with_attention(logits, structure.dimension)
    with torch.no_grad():
        model.value.copy_(structure.feature(0))
    return 1 - test_error(model, structure.sample(n, seed=seed + 3_000_017))


def _means(table: pd.DataFrame) -> pd.DataFrame:
    return table.groupby(["samples", "arm"])["accuracy"].mean().unstack("arm")


def _summary(table: pd.DataFrame) -> dict[str, float | int | str]:
    means = _means(table)
    fewest = int(means.index[0])
    summary: dict[str, float | int | str] = {
        f"{arm}, {fewest} examples": float(means[arm].to_dict()[fewest]) for arm in ARMS
    }
    most = int(means.index[-1])
    best = float(means["from scratch"].to_dict()[most])
    enough = means.index[means["pretrained"] >= best]
    summary[f"pretrained reaches what {most} examples give from scratch with"] = (
        f"{int(enough[0])} examples" if len(enough) else "more"
    )
    return summary


def _description(
    table: pd.DataFrame, first_task: Mapping[str, float], rate: float, sigma: float
) -> str:
    means = _means(table)
    lead = means["pretrained"] - means["without association"]
    few, many = int(means.index[0]), int(means.index[-1])
    first, last = means.iloc[0], means.iloc[-1]
    said = (
        "The sets stay, the feature is another one, and noise and distractions are stronger (standard "
        "deviation "
        f"{sigma:g}, probability {rate:g}). On the first task, with the feature itself for a value vector, "
        f"uniform "
        f"attention answers {first_task['first task, without association']:.1%} right and the trained "
        f"attention "
        f"{first_task['first task, pretrained']:.1%}: several solutions generalise there, and one of them "
        f"knows the "
        "structure. What is that worth on a new task?"
    )
    found = (
        f"With {few} examples the pretrained attention gives {first['pretrained']:.1%} of right answers, "
        f"learning "
        f"from scratch {first['from scratch']:.1%}, uniform attention {first['without association']:.1%}, "
        f"and "
        f"attention to exactly the own set {first['exact association']:.1%}. With {many} examples these are "
        f"{last['pretrained']:.1%}, {last['from scratch']:.1%}, {last['without association']:.1%} and "
        f"{last['exact association']:.1%}. "
    )
    found += (
        "The pretrained attention is ahead of the uniform one at every number of examples."
        if bool((lead > 0).all())
        else f"The pretrained attention is not ahead of the uniform one everywhere (smallest lead "
        f"{lead.min():.1%})."
    )
    if float(first["exact association"] - first["pretrained"]) > 0.02:
        found += (
            " It stays behind exact association, because its order is right and its contrast is not: it "
            "still gives "
            "much of its attention to other sets."
        )
    return f"{said}\n\n{found}"


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures.curves import Curve
    from vit_mechinterp.figures.spatial import transfer_curves

    lines = {}
    for arm in ARMS:
        own = result.table[result.table["arm"] == arm].pivot(
            index="samples", columns="repeat", values="accuracy"
        )
        values = own.to_numpy()
        low, high = bootstrap_interval(values)
        lines[arm] = Curve(
            own.index.tolist(), values.mean(axis=1).tolist(), low.tolist(), high.tolist()
        )
    return {"transfer": transfer_curves(lines)}
