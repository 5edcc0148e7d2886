"""Edge attribution patching: every edge of the graph predicted from one gradient.

To first order, an edge changes the metric by the change of what its sender writes into the residual stream
times the gradient of the metric along the stream that its receiver reads (Syed et al. 2023, equation 4; with
gradients averaged between both images, Hanna et al. 2024). The gradient of one receiver is pulled back
through its own reading (norm and projection) alone, so that senders and receivers need not be next to each
other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.circuits.attribution_patching import (
    agreement,
    agreement_said,
    check_sample,
    chosen_sample,
)
from vit_mechinterp.circuits.bound_metric import check_metric
from vit_mechinterp.circuits.cells import BatchSize, compared, measure
from vit_mechinterp.circuits.corruptions import Corruption
from vit_mechinterp.circuits.effects import effect_columns, gap_problem
from vit_mechinterp.circuits.gradients import Method, Pull, Pulled, check_slopes, gradients_at, linearised
from vit_mechinterp.circuits.images import image_pairs
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.nodes import (
    LOGITS,
    Node,
    NodeLike,
    other_writers,
    reaches,
    receivers_of,
    senders_of,
)
from vit_mechinterp.circuits.path_figures import captions_of, draw_paths
from vit_mechinterp.circuits.path_patching import path_runs, path_table, run_name
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError, UnsupportedSiteError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["edge_attribution"]


def edge_attribution(
    vit: HookedViT,
    images: Any,
    *,
    corruption: str | Corruption | None = None,
    direction: Literal["noising", "denoising"] = "noising",
    method: Method = "gradient",
    steps: int = 8,
    senders: Iterable[NodeLike] | None = None,
    receivers: Iterable[NodeLike] | None = None,
    metric: MetricLike | None = None,
    sample: int | Literal["all"] = 64,
    base: str = "base",
    source: str = "source",
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Predict the effect of every edge from gradients.

    Args:
        vit, images, corruption, direction, senders, receivers, metric, base, source: as in `edge_patching`;
            None means every sender (the embedding too) and every receiver. The metric needs a gradient.
        method, steps: as in `attribution_patching`.
        sample: edges that are also patched exactly, see `attribution_patching`.
        resamples: resamples of the bootstrap and of the permutation test over pairs.
        seed: seeds both, and the sample.
        folder: keeps finished predictions and edges of the exact sample, so that the same call goes on where
            it was stopped.
        batch_size: most rows in one forward of the exact sample, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table as that of `edge_patching`, with predicted effects, and ``exact`` and ``error`` where an edge
        was patched. Heads as senders need ``attn.result``; those that the model lacks are left out with the
        reason.

    Raises:
        UnsupportedSiteError: something besides attention and MLP writes into the stream.
        SpecError: a node is none, no sender comes before a receiver, or the metric has no gradient.
        DataError: the images are none, or a pair differs in size.
    """
    check_resampling(resamples, seed)
    if direction not in ("noising", "denoising"):
        raise SpecError(f"direction={direction!r} is not known. Choose 'noising' or 'denoising'.")
    check_sample(sample)
    data = image_pairs(images, vit, corruption=corruption, base=base, source=source, progress=progress)
    into, origin = (base, source) if direction == "noising" else (source, base)
    writers, left_out = senders_of(vit, senders, embed=True)
    readers, also = receivers_of(vit, receivers)
    left_out |= also
    writes = {}
    for sender in writers:
        site = sender.site.replace("attn.z", "attn.result")
        if site in vit.layout.absent:
            left_out[str(sender)] = f"{site}: {vit.layout.absent[site]}"
        else:
            writes[sender] = site
    edges = [(s, r) for s in writes for r in readers if reaches(vit, s, r)]
    if not edges:
        raise SpecError("None of the senders writes before one of the receivers reads, so there is no edge.")
    if branches := other_writers(vit, Data(data, vit).images(base, [0])):
        raise UnsupportedSiteError(
            f"{type(vit.module).__name__}: besides attention and MLP, something else writes into the "
            f"residual stream of layers {', '.join(map(str, branches))}, so what a sender writes does not "
            "arrive unchanged and no edge can be predicted. Use edge_patching, in which that branch is "
            "recomputed."
        )
    streams = {receiver: _stream(vit, receiver) for receiver in readers}
    kept = list(dict.fromkeys([*streams.values(), *(r.site for r in readers if r.site != LOGITS)]))
    check_slopes(check_metric(metric, vit, data), vit, data, kept)
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    bound, first, clean = compared(vit, data, metric, base=base, source=source, folder=folder, **how)

    def products(part: Pulled) -> Tensor:
        sent = {s: _written(s, part.change[site]).flatten(1).double() for s, site in writes.items()}
        received = {r: slope.flatten(1).double() for r, slope in part.gradients.items()}
        return torch.stack([(sent[s] * received[r]).sum(dim=1) for s, r in edges])

    predicted = linearised(
        vit, data, bound, clean, products, read=list(dict.fromkeys(writes.values())), kept=kept,
        pull=_pull(readers, streams), into=into, origin=origin, method=method, steps=steps,
        cells=[[s.site, s.head, r.site, r.head] for s, r in edges], folder=folder, progress=progress,
    )  # fmt: skip

    ends = (bound.clean, bound.other) if direction == "noising" else (bound.other, bound.clean)
    assert ends[0] is not None
    assert ends[1] is not None
    table = path_table(edges, effect_columns(ends[0] + predicted, *ends, resamples=resamples, seed=seed))
    checked = chosen_sample(predicted.mean(dim=1).numpy(), sample, seed)
    groups = _exact_runs(vit, [edges[index] for index in checked], into, origin)
    measured = measure(vit, groups, data, bound, folder=folder, **how)
    table["exact"] = np.nan
    if checked:
        values = measured.stack([run_name(*edges[index]) for index in checked])
        table.loc[checked, "exact"] = (values - ends[0]).mean(dim=1).numpy()
    table["error"] = table["change"] - table["exact"]
    agree = agreement(table["change"].to_numpy(dtype=float), table["exact"].to_numpy(dtype=float))
    problem = gap_problem(*ends)
    missing = "; ".join(f"{site} ({reason})" for site, reason in left_out.items())
    said = [
        "Every edge's effect, predicted to first order: the change of what the sender writes into the "
        "residual stream times the gradient along what the receiver reads.",
        bound.description,
        agreement_said(agree, "edges"),
        f"Effects are not normalised: {problem}." if problem else "",
        f"Left out: {missing}." if missing else "",
    ]
    captions = {name: f"Predicted. {text}" for name, text in captions_of(table).items()}
    if checked:
        captions["error"] = "Predicted and exact change of the metric, one dot per edge that was patched."
    return CircuitResult(
        name="edge_attribution",
        table=table,
        provenance=provenance(
            first,
            *measured.provenances,
            metric=bound.description,
            direction=direction,
            method=method,
            steps=steps if method == "integrated" else None,
            left_out=left_out,
            corruption=None if corruption is None else str(corruption),
            resamples=resamples,
            seed=seed,
        ),
        summary={"edges predicted": len(edges), **agree},
        description="\n\n".join(filter(None, said)),
        captions=captions,
        draw=_drawing(draw_paths(bound.label), bound.label),
    )


def _stream(vit: HookedViT, receiver: Node) -> str:
    """The site of the residual stream that a receiver reads."""
    if receiver.layer is None:
        return f"blocks.{vit.layout.n_layers - 1}.resid_post"
    middle = f"blocks.{receiver.layer}.resid_mid"
    if receiver.kind == "mlp" and middle not in vit.layout.absent:
        return middle
    return f"blocks.{receiver.layer}.resid_pre"


def _pull(readers: Sequence[Node], streams: Mapping[Node, str]) -> Pull:
    """Pull the gradient along the stream, for each receiver through its own reading alone."""

    def pull(kept: Mapping[str, Tensor], total: Tensor) -> dict[Node, Tensor]:
        ends = {r.site: kept[r.site] for r in readers if r.site != LOGITS}
        if any(r.site == LOGITS for r in readers):
            last = next(streams[r] for r in readers if r.site == LOGITS)
            ends[last] = kept[last]
        slopes = gradients_at(ends, total) if ends else {}
        found: dict[Node, Tensor] = {}
        for receiver in readers:
            stream = streams[receiver]
            if receiver.site == LOGITS:
                found[receiver] = slopes[stream]
                continue
            slope = slopes[receiver.site]
            if receiver.head is not None:
                only = torch.zeros_like(slope)
                only[:, :, receiver.head] = slope[:, :, receiver.head]
                slope = only
            (found[receiver],) = torch.autograd.grad(
                kept[receiver.site], kept[stream], grad_outputs=slope, retain_graph=True
            )
        return found

    return pull


def _written(sender: Node, change: Tensor) -> Tensor:
    """What a sender writes into the stream, ``[example, token, d_model]``."""
    if not sender.site.endswith("attn.z"):
        return change
    return change.sum(dim=2) if sender.head is None else change[:, :, sender.head]


def _exact_runs(
    vit: HookedViT, edges: Sequence[tuple[Node, Node]], into: str, origin: str
) -> list[list[Run]]:
    receivers: dict[Node, list[Node]] = {}
    for sender, receiver in edges:
        receivers.setdefault(sender, []).append(receiver)
    return [path_runs(vit, sender, own, base=into, source=origin) for sender, own in receivers.items()]


def _drawing(
    paths: Callable[[CircuitResult], dict[str, Figure]], label: str
) -> Callable[[CircuitResult], dict[str, Figure]]:
    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import predicted_against_exact

        figures = paths(result)
        known = result.table[result.table["exact"].notna()]
        if len(known):
            groups = {}
            for kind in dict.fromkeys(known["receiver_kind"]):
                own = known[known["receiver_kind"] == kind]
                pair = (own["change"].to_numpy(dtype=float), own["exact"].to_numpy(dtype=float))
                groups[f"into {kind}"] = pair
            r = result.summary.get("correlation")
            figures["error"] = predicted_against_exact(
                groups, label=f"change of {label}", note=f"r = {r:.2f}" if isinstance(r, float) else ""
            )
        return figures

    return draw
