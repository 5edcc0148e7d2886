"""Activation patching: which activations carry the difference between two images, one at a time.

Two images (or many pairs), clean and corrupted. *Denoising* runs the model on the corrupted image and puts
one activation of the clean image back: what restores the answer is sufficient for it. *Noising* runs on the
clean image and puts one activation of the corrupted image in: what breaks the answer is necessary for it
(Meng et al. 2022; Zhang and Nanda 2024; Heimersheim and Nanda 2024). Effects are shares of the gap between
both images: 0 is no effect, 1 the whole difference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vit_mechinterp.circuits.cells import BatchSize, check_runs, compared, grouped, measure
from vit_mechinterp.circuits.corruptions import Corruption
from vit_mechinterp.circuits.effects import gap_problem, strongest
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
from vit_mechinterp.circuits.patching_figures import captions_of, drawing, shown_column
from vit_mechinterp.circuits.patching_table import patching_table
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.circuits.token_sets import TokenPair
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    import pandas as pd

    from vit_mechinterp.circuits.bound_metric import BoundMetric

__all__ = ["activation_patching"]

Direction = Literal["denoising", "noising"]


def activation_patching(
    vit: HookedViT,
    images: Any,
    *,
    corruption: str | Corruption | None = None,
    direction: Direction | Literal["both"] = "denoising",
    sites: Sequence[str] = ("resid_pre", "attn_out", "mlp_out"),
    heads: Sequence[str] = ("attn.z",),
    layers: Sequence[int] | Literal["all"] = "all",
    window: int | None = None,
    token_sets: Mapping[str, TokenPair] | None = None,
    metric: MetricLike | None = None,
    base: str = "base",
    source: str = "source",
    example: int = 0,
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Patch every layer, token window and head between two images, and measure what moves.

    Args:
        vit: the model.
        images: two images, a list of pairs, data with the columns ``base`` (clean) and ``source``
            (corrupted), or with ``corruption`` single images; see `image_pairs`.
        corruption: makes the corrupted image of the clean one: ``"blur"``, ``"shuffle"``, ``"noise"``,
            ``"grey"``, ``"flat"``, ``"another"``, or a value of `vit_mechinterp.circuits.corruptions`.
        direction: ``"denoising"`` (clean into corrupted), ``"noising"`` (corrupted into clean) or ``"both"``.
        sites: sites patched per layer and token: any with a token axis.
        heads: sites patched per layer and head, at all tokens: ``"z"``, ``"q"``, ``"k"``, ``"v"``,
            ``"pattern"``, ...
        layers: the layers to patch.
        window: patches along the side of the squares that are patched at once; by default the smallest that
            cuts the grid into at most 64 squares. CLS, registers and other named tokens are patched apart.
        token_sets: instead of squares, name to (selector in the base image, selector in the source image).
        metric: what to measure, see `vit_mechinterp.circuits.metrics`; by default the logit difference
            between the classes predicted for both images, or for models without classes the cosine to the
            clean output.
        base, source: the columns of clean and corrupted images.
        example: the pair that the maps show.
        resamples: resamples of the bootstrap and of the permutation test over pairs.
        seed: seeds both.
        folder: keeps finished cells, so that the same call goes on where it was stopped.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per direction and cell: ``direction, kind`` (``tokens``, ``patches``, ``head``, or a
        control), ``site, layer, head, tokens, frame, row, column`` (of the square's first patch), the
        columns of `effect_columns`, and ``pair_change`` and ``pair_normalised``, the effect in the pair that
        the maps show. Controls: patching everything behind the last block gives the other
        image's answer (``whole stream``); patching an image with itself changes nothing (``no effect``).
        Sites that the model lacks are left out; ``provenance["left_out"]`` gives the reasons.

    Raises:
        SpecError: a site, layer or metric does not fit the model; UnsupportedSiteError: it has none of them.
        DataError: the images are none, or a pair differs in size.
    """
    check_resampling(resamples, seed)
    if direction not in ("denoising", "noising", "both"):
        raise SpecError(f"direction={direction!r} is not known. Choose 'denoising', 'noising' or 'both'.")
    directions = ("denoising", "noising") if direction == "both" else (direction,)
    data = image_pairs(images, vit, corruption=corruption, base=base, source=source, progress=progress)
    numbers = chosen_layers(vit, layers)
    by_token, by_head = [block_site(s) for s in sites], [block_site(s) for s in heads]
    places, left_out = lacking(vit, [*by_token, *by_head], numbers)
    cut, side = windows(vit.layout.tokens, window)
    cells = token_cells(vit, [p for p in places if p[0] in by_token], cut, token_sets)
    cells += head_cells(vit, [p for p in places if p[0] in by_head])
    last = vit.layout.n_layers - 1
    end = f"blocks.{last}.resid_post"
    cells += [Cell(end, last, "whole stream", "all tokens"), Cell(end, last, "no effect", "all tokens")]

    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    n = Data(data, vit).n
    if not 0 <= example < n:
        raise SpecError(f"example={example} is out of range; there are {n} pairs.")
    runs = [cell.run(way, base, source) for cell in cells for way in directions]
    check_runs(vit, runs, data)
    bound, origin, clean = compared(vit, data, metric, base=base, source=source, folder=folder, **how)
    groups = grouped(runs, n, clean[0].numel())
    measured = measure(vit, groups, data, bound, folder=folder, **how)

    values = measured.stack([run.name for run in runs])
    table = patching_table(cells, directions, values, bound, example, resamples, seed)
    pictures = {"clean": model_view(vit, data, base, example)}
    pictures["corrupted"] = model_view(vit, data, source, example)
    sentence, summary = _findings(table, bound, n, side, token_sets is None)
    missing = "; ".join(f"{site} ({reason})" for site, reason in left_out.items())
    return CircuitResult(
        name="activation_patching",
        table=table,
        provenance=provenance(
            origin,
            *measured.provenances,
            metric=bound.description,
            window=side if token_sets is None else None,
            left_out=left_out,
            corruption=None if corruption is None else str(corruption),
            resamples=resamples,
            seed=seed,
        ),
        summary=summary,
        description="\n\n".join(
            [_DESCRIPTION, bound.description, sentence, f"Left out: {missing}." if missing else ""]
        ).strip(),
        captions=captions_of(table, n),
        draw=drawing(pictures, vit.layout.tokens.grid, side, bound.label),
    )


def _findings(
    table: pd.DataFrame, metric: BoundMetric, n: int, side: int, squares: bool
) -> tuple[str, dict[str, float | int | str]]:
    assert metric.other is not None
    clean, other = float(metric.clean.mean()), float(metric.other.mean())
    problem = gap_problem(metric.clean, metric.other)
    summary: dict[str, float | int | str] = {
        f"{metric.label}, clean": clean,
        f"{metric.label}, corrupted": other,
        "pairs": n,
    }
    said = [
        f"Over {n} pair{'s' * (n > 1)} the {metric.label} is {clean:.3g} on the clean image and {other:.3g} "
        "on the corrupted one."
    ]
    if problem:
        said.append(f"Effects are not normalised: {problem}.")
    if squares:
        said.append(f"Patches are patched in squares of {side} x {side}.")
    column = shown_column(table)
    cells = table[table["kind"].isin(["tokens", "patches", "head"])]
    for (way, site), rows in cells.groupby(["direction", "site"], sort=False):
        top = strongest(rows, column)
        where = f"head {top['head']}" if top["kind"] == "head" else str(top["tokens"])
        summary[f"{way}, {site}"] = f"{top[column]:.2f} (layer {top['layer']}, {where})"
        said.append(
            f"{str(way).capitalize()}, {site}: most at layer {top['layer']}, {where}, {top[column]:.2f}."
        )
    return " ".join(said), summary


_DESCRIPTION = (
    "One activation at a time passes from one image's forward into the other's. Denoising puts the clean "
    "image's activation into the corrupted image's forward: 1 restores the clean answer. Noising puts the "
    "corrupted image's activation into the clean forward: 1 gives the corrupted answer. 0 is no effect."
)
