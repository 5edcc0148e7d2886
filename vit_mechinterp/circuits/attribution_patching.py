"""Attribution patching: every cell of an activation patching predicted from one gradient.

To first order, patching a cell changes the metric by (activation patched from - activation patched into)
times the metric's gradient there (Nanda 2023; Syed et al. 2023). Two forwards and one backward predict all
cells, where exact patching takes a run for each. The prediction fails where the model bends between both
images: it is held against exact patching on a sample of cells, and the error is part of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.circuits.bound_metric import check_metric
from vit_mechinterp.circuits.cells import BatchSize, compared, grouped, measure
from vit_mechinterp.circuits.corruptions import Corruption
from vit_mechinterp.circuits.effects import gap_problem
from vit_mechinterp.circuits.gradients import Method, Pulled, check_slopes, linearised
from vit_mechinterp.circuits.images import image_pairs, model_view
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.patching_cells import (
    Cell,
    block_site,
    chosen_layers,
    head_cells,
    lacking,
    token_cells,
    windows,
)
from vit_mechinterp.circuits.patching_figures import captions_of, drawing
from vit_mechinterp.circuits.patching_table import patching_table
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["agreement", "agreement_said", "attribution_patching", "check_sample", "chosen_sample"]


def attribution_patching(
    vit: HookedViT,
    images: Any,
    *,
    corruption: str | Corruption | None = None,
    direction: Literal["denoising", "noising"] = "denoising",
    method: Method = "gradient",
    steps: int = 8,
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    heads: Sequence[str] = ("attn.z",),
    layers: Sequence[int] | Literal["all"] = "all",
    window: int | None = 1,
    metric: MetricLike | None = None,
    sample: int | Literal["all"] = 64,
    base: str = "base",
    source: str = "source",
    example: int = 0,
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Predict the effect of patching every layer, token and head from gradients.

    Args:
        vit, images, corruption, direction, sites, heads, layers, window, metric, base, source, example: as in
            `activation_patching`; the metric needs a gradient (``"rank"`` has none).
        method: ``"gradient"`` takes the gradient at the image patched into, ``"integrated"`` averages it
            between the embeddings of both images, which costs ``steps`` times as much.
        steps: points of the average.
        sample: cells that are also patched exactly: half those of the largest predictions, half at random;
            ``"all"`` for every cell, 0 for none.
        resamples: resamples of the bootstrap and of the permutation test over pairs.
        seed: seeds both, and the sample.
        folder: keeps finished predictions and cells of the exact sample, so that the same call goes on where
            it was stopped.
        batch_size: most rows in one forward of the exact sample, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table as that of `activation_patching`, with predicted effects, and ``exact``, the exact change where
        it was measured, and ``error``, predicted minus exact. The summary says how well both agree.

    Raises:
        SpecError: something does not fit the model, or the metric or a site has no gradient.
        DataError: the images are none, or a pair differs in size.
    """
    check_resampling(resamples, seed)
    if direction not in ("denoising", "noising"):
        raise SpecError(f"direction={direction!r} is not known. Choose 'denoising' or 'noising'.")
    check_sample(sample)
    data = image_pairs(images, vit, corruption=corruption, base=base, source=source, progress=progress)
    n = Data(data, vit).n
    if not 0 <= example < n:
        raise SpecError(f"example={example} is out of range; there are {n} pairs.")
    numbers = chosen_layers(vit, layers)
    by_token, by_head = [block_site(s) for s in sites], [block_site(s) for s in heads]
    places, left_out = lacking(vit, [*by_token, *by_head], numbers)
    cut, side = windows(vit.layout.tokens, window)
    cells = token_cells(vit, [p for p in places if p[0] in by_token], cut, None)
    cells += head_cells(vit, [p for p in places if p[0] in by_head])
    own = list(dict.fromkeys(cell.site for cell in cells))
    check_slopes(check_metric(metric, vit, data), vit, data, own)
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    bound, origin, clean = compared(vit, data, metric, base=base, source=source, folder=folder, **how)
    assert bound.other is not None
    ends = (bound.clean, bound.other) if direction == "noising" else (bound.other, bound.clean)
    into, there = (base, source) if direction == "noising" else (source, base)

    def products(part: Pulled) -> Tensor:
        each = {site: part.change[site].double() * part.gradients[site].double() for site in own}
        return torch.stack([_summed(vit, cell, each[cell.site]) for cell in cells])

    predicted = linearised(
        vit, data, bound, clean, products, read=own, kept=own, into=into, origin=there, method=method,
        steps=steps, cells=cells, folder=folder, progress=progress,
    )  # fmt: skip
    table = patching_table(cells, [direction], ends[0] + predicted, bound, example, resamples, seed)
    checked = chosen_sample(predicted.mean(dim=1).numpy(), sample, seed)
    table["exact"] = np.nan
    provenances = []
    if checked:
        runs = [cells[index].run(direction, base, source) for index in checked]
        measured = measure(vit, grouped(runs, n, clean[0].numel()), data, bound, folder=folder, **how)
        provenances = list(measured.provenances)
        changes = (measured.stack([run.name for run in runs]) - ends[0]).mean(dim=1)
        table.loc[checked, "exact"] = changes.numpy()
    table["error"] = table["change"] - table["exact"]
    agree = agreement(table["change"].to_numpy(dtype=float), table["exact"].to_numpy(dtype=float))
    pictures = {"clean": model_view(vit, data, base, example)}
    pictures["corrupted"] = model_view(vit, data, source, example)
    problem = gap_problem(*ends)
    missing = "; ".join(f"{site} ({reason})" for site, reason in left_out.items())
    return CircuitResult(
        name="attribution_patching",
        table=table,
        provenance=provenance(
            origin,
            *provenances,
            metric=bound.description,
            method=method,
            steps=steps if method == "integrated" else None,
            window=side,
            left_out=left_out,
            corruption=None if corruption is None else str(corruption),
            resamples=resamples,
            seed=seed,
        ),
        summary={"cells predicted": len(cells), **agree},
        description="\n\n".join(
            filter(
                None,
                [
                    _DESCRIPTION,
                    bound.description,
                    agreement_said(agree, "cells"),
                    f"Effects are not normalised: {problem}." if problem else "",
                    f"Left out: {missing}." if missing else "",
                ],
            )
        ),
        captions=_captions(table, n, bool(checked)),
        draw=_drawing(drawing(pictures, vit.layout.tokens.grid, side, bound.label), bound.label),
    )


def _summed(vit: HookedViT, cell: Cell, product: Tensor) -> Tensor:
    """Sum a site's products over the cell's tokens, head and features: one number per example."""
    if cell.head is not None:
        axis = 1 + Site.parse(cell.site).axes[1:].index("head")
        return product.select(axis, cell.head).flatten(1).sum(dim=1)
    tokens = cell.tokens[0]
    layout = vit.layout.tokens
    named = layout.positions(tokens) if isinstance(tokens, str) else [len(layout.prefix) + p for p in tokens]
    axis = 2 if Site.parse(cell.site).is_attention_matrix else 1
    chosen = product.index_select(axis, torch.tensor(named, device=product.device))
    return chosen.flatten(1).sum(dim=1)


def check_sample(sample: int | Literal["all"]) -> None:
    """Raise SpecError unless ``sample`` is ``"all"`` or a number of cells."""
    if sample != "all" and (not isinstance(sample, int) or sample < 0):
        raise SpecError(f"sample={sample!r} is 'all' or a number of cells.")


def chosen_sample(predicted: Any, sample: int | Literal["all"], seed: int) -> list[int]:
    """Return the cells to measure exactly: half of the largest predictions, the rest at random."""
    n = len(predicted)
    if sample == "all":
        return list(range(n))
    assert isinstance(sample, int)
    order = np.argsort(-np.abs(predicted), kind="stable")
    largest = order[: min(sample, n) // 2]
    rest = np.random.default_rng(seed).permutation(order[len(largest) :])
    return sorted(int(i) for i in [*largest, *rest[: min(sample, n) - len(largest)]])


def agreement(predicted: Any, exact: Any) -> dict[str, float | int | str]:
    """Say how well predictions agree with what was measured (NaN: not measured).

    Returns:
        ``cells measured``, ``correlation`` (Pearson), ``rank correlation`` (Spearman), ``mean absolute
        error`` and ``error relative to effect``, the mean absolute error over the mean absolute exact effect.
    """
    import pandas as pd

    known = np.isfinite(exact)
    a, b = np.asarray(predicted)[known], np.asarray(exact)[known]
    if len(a) == 0:
        return {"cells measured": 0}
    error, size = float(np.abs(a - b).mean()), float(np.abs(b).mean())
    found: dict[str, float | int | str] = {"cells measured": len(a)}
    if len(a) > 2 and a.std() > 0 and b.std() > 0:
        ranks = [pd.Series(values).rank().to_numpy() for values in (a, b)]  # ties share their mean rank
        found["correlation"] = float(np.corrcoef(a, b)[0, 1])
        found["rank correlation"] = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    found["mean absolute error"] = error
    if size > 0:
        found["error relative to effect"] = error / size
    return found


def agreement_said(agree: dict[str, float | int | str], what: str) -> str:
    """Say in a sentence what `agreement` found; ``what`` are cells or edges."""
    if "correlation" not in agree:
        return f"Too few {what} were patched exactly, so the error of the prediction is unknown."
    return (
        f"{agree['cells measured']} {what} were also patched exactly: the correlation of predicted "
        f"and exact change is {agree['correlation']:.2f}, and the mean absolute error is "
        f"{agree.get('error relative to effect', float('nan')):.0%} of the mean absolute effect."
    )


def _captions(table: pd.DataFrame, n: int, checked: bool) -> dict[str, str]:
    captions = {name: f"Predicted: {text}" for name, text in captions_of(table, n).items()}
    if checked:
        captions["error"] = "Predicted and exact change of the metric, one dot per cell that was measured."
    return captions


def _drawing(
    maps: Callable[[CircuitResult], dict[str, Figure]], label: str
) -> Callable[[CircuitResult], dict[str, Figure]]:
    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import predicted_against_exact

        figures = maps(result)
        known = result.table[result.table["exact"].notna()]
        if len(known):
            groups = {}
            for site in dict.fromkeys(known["site"]):
                own = known[known["site"] == site]
                groups[site] = (own["change"].to_numpy(dtype=float), own["exact"].to_numpy(dtype=float))
            r = result.summary.get("correlation")
            figures["error"] = predicted_against_exact(
                groups, label=f"change of {label}", note=f"r = {r:.2f}" if isinstance(r, float) else ""
            )
        return figures

    return draw


_DESCRIPTION = (
    "The effect of patching each cell, predicted to first order: the difference of its activation between "
    "both images times the metric's gradient. Exact where the model is linear between the images; elsewhere "
    "an approximation whose error is measured on a sample of cells."
)
