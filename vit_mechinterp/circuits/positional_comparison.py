"""An ordinary ViT against the same ViT with positional attention, both trained here from scratch (after
Jelassi, Sander and Li 2022).

The paper's finding is that attention by positions alone does nearly as well on CIFAR-10, CIFAR-100, SVHN and
ImageNet (a third party reports 68.9 % against 71.9 % on ImageNet). Architecture, training and scale here are
this project's own and far smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from vit_mechinterp.circuits.association import association, neighbourhoods
from vit_mechinterp.circuits.patch_association import encoding_similarity
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import bootstrap_interval
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model import wrap
from vit_mechinterp.training.classifier import ClassifierSettings, answers, small_vit, train_classifier
from vit_mechinterp.training.image_sets import ImageSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["positional_comparison", "trained_vits"]

KINDS = {"ViT": False, "positional attention": True}


def trained_vits(
    images: ImageSet,
    settings: ClassifierSettings | None = None,
    *,
    seeds: Sequence[int] = (0,),
    progress: bool = True,
) -> dict[str, list[nn.Module]]:
    """Train an ordinary ViT and one with positional attention for every seed; both start from equal
    weights."""
    settings = settings or ClassifierSettings()
    models: dict[str, list[nn.Module]] = {kind: [] for kind in KINDS}
    jobs = [(kind, seed) for seed in seeds for kind in KINDS]
    for kind, seed in tqdm(jobs, desc="models", delay=2, disable=not progress):
        module = small_vit(images, settings, positional=KINDS[kind], seed=seed)
        models[kind].append(train_classifier(module, images, settings, seed=seed, progress=progress))
    return models


def positional_comparison(
    models: Mapping[str, Sequence[nn.Module]], images: ImageSet, settings: ClassifierSettings | None = None
) -> CircuitResult:
    """Compare trained models of two or more kinds on held-out images, and what their encodings have learned.

    Args:
        models: kind to models, one per seed, as `trained_vits` gives them.
        images: what they were trained on.
        settings: how, for the record.

    Returns:
        Table, one row per kind and seed: ``test_accuracy``, ``train_accuracy`` and ``association``, how well
        the encodings of patches find their neighbours, corrected for chance; and ``test_low``, ``test_high``,
        ``train_low``, ``train_high``: the 95 % bootstrap interval over images of the *kind's* mean over
        seeds. Figure: ``accuracy``.

    Raises:
        SpecError: there is no model.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    right: dict[str, dict[str, Any]] = {}
    for kind, own in models.items():
        if not own:
            raise SpecError(f"There is no model of the kind {kind!r} to compare.")
        right[kind] = {
            name: np.stack([answers(module, x, y).numpy() for module in own]).astype(float)
            for name, x, y in (
                ("test", images.test, images.test_labels),
                ("train", images.train, images.train_labels),
            )
        }
        ends: dict[str, float] = {}
        for name, values in right[kind].items():
            low, high = bootstrap_interval(values.mean(axis=0)[None])
            ends |= {f"{name}_low": float(low[0]), f"{name}_high": float(high[0])}
        for number, module in enumerate(own):
            vit = wrap(module)
            members = neighbourhoods(vit.layout.tokens.grid)
            found = association(encoding_similarity(vit), members) if not bool(members.all()) else {}
            rows.append(
                {
                    "kind": kind,
                    "seed": number,
                    "test_accuracy": float(right[kind]["test"][number].mean()),
                    "train_accuracy": float(right[kind]["train"][number].mean()),
                    "association": float(found.get("corrected", float("nan"))),
                    **ends,
                }
            )
    if not rows:
        raise SpecError("There is no model to compare.")
    table = pd.DataFrame(rows)
    means = table.groupby("kind", sort=False)["test_accuracy"].mean()
    n_seeds = len(table) // len(means)
    said = ", ".join(f"{kind} {float(value):.1%}" for kind, value in means.items())
    first, *_, second = [*right, next(iter(right))] if len(right) == 1 else list(right)
    paired = right[second]["test"].mean(axis=0) - right[first]["test"].mean(axis=0)
    least, most = (float(end[0]) for end in bootstrap_interval(paired[None]))
    said += (
        f"; {second} less {first} {100 * paired.mean():+.1f} points, 95 % bootstrap interval over the images "
        f"{100 * least:+.1f} to {100 * most:+.1f}"
    )
    return CircuitResult(
        name="positional_comparison",
        table=table,
        provenance=provenance(
            circuit="positional_comparison", images=images.name, settings=settings and asdict(settings)
        ),
        summary={
            **{f"test accuracy, {kind}": float(value) for kind, value in means.items()},
            f"{second} less {first}": float(paired.mean()),
            "its interval": f"{least:+.3f} to {most:+.3f}",
            "held-out images": len(images.test),
            "seeds": n_seeds,
        },
        title=f"Positional attention on real images: {images.name}",
        description=(
            "A small ViT and the same with queries and keys made from positions alone start from equal "
            f"weights and are trained alike on {len(images.train):,} images. On {len(images.test):,} "
            f"held-out images: {said} "
            f"({'mean of ' + str(n_seeds) + ' seeds' if n_seeds > 1 else 'one seed'})."
            "\n\nThis says how far attention can do without content here, not that it would be so at scale. "
            "Size, training and data are this project's own; the paper's numbers are for larger models and "
            "sets."
        ),
        captions={
            "accuracy": "Accuracy on training and held-out images; means over seeds with 95 % bootstrap "
            "intervals over images (other seeds would differ too)."
        },
        draw=_draw,
    )


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures import dots_by_row

    groups = {}
    for name, column in (("held out", "test"), ("training", "train")):
        numbers = [f"{column}_{number}" for number in ("accuracy", "low", "high")]
        own = result.table.groupby("kind", sort=False)[numbers]
        groups[name] = {
            str(kind): (float(row.iloc[0]), float(row.iloc[1]), float(row.iloc[2]))
            for kind, row in own.mean().iterrows()
        }
    return {"accuracy": dots_by_row(groups, label="accuracy", limits=None)}
