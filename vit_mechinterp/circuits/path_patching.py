"""Path patching and edge patching: what one node does to another along the residual stream alone.

One sender takes its value from the other image while every later head (and, as chosen, every later MLP) is
held at its clean value; what a receiver then reads is put into a clean forward, in which everything behind
it is computed anew (Wang et al. 2023, section 3.1; Goldowsky-Dill et al. 2023). With the output as
receiver the first forward is all there is: the sender's direct effect. Every path is a small graph of runs:
the receiver's run reads its value from the sender's run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vit_mechinterp.circuits.cells import BatchSize, compared, measure
from vit_mechinterp.circuits.corruptions import Corruption
from vit_mechinterp.circuits.effects import effect_columns
from vit_mechinterp.circuits.images import image_pairs
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.nodes import (
    LOGITS,
    Node,
    NodeLike,
    frozen_sites,
    other_writers,
    reaches,
    receivers_of,
    senders_of,
)
from vit_mechinterp.circuits.path_figures import captions_of, draw_paths
from vit_mechinterp.circuits.path_words import description_of, findings_of, summary_of
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Interchange, Run

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

__all__ = ["edge_patching", "path_patching", "path_runs", "path_table", "run_name"]

NOTHING_SENT = "control: everything held, nothing sent"
_RUNS_IN_GROUP = 256


def path_patching(
    vit: HookedViT,
    images: Any,
    *,
    corruption: str | Corruption | None = None,
    direction: Literal["noising", "denoising"] = "noising",
    senders: Iterable[NodeLike] | None = None,
    receivers: Iterable[NodeLike] | None = (LOGITS,),
    mlps: Literal["frozen", "recomputed"] = "frozen",
    totals: bool = True,
    tokens: Any = "all",
    metric: MetricLike | None = None,
    base: str = "base",
    source: str = "source",
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
    name: str = "path_patching",
) -> CircuitResult:
    """Measure the effect of every sender on the output through every receiver.

    Args:
        vit: the model.
        images: two images, a list of pairs, data with both columns, or with ``corruption`` single images; see
            `image_pairs`.
        corruption: makes the corrupted image of the clean one.
        direction: ``"noising"`` sends the corrupted image's value through the clean forward, ``"denoising"``
            the other way round.
        senders: heads ``("blocks.3.attn.z", 1)``, ``"blocks.3.mlp_out"``, ``"embed"``; None means every head
            and every MLP.
        receivers: ``"logits"``, ``("blocks.5.attn.q", 2)`` (and k, v), ``"blocks.5.mlp"``; None means every
            head's q, k and v, every MLP and the output. Pairs that do not follow each other are left out.
        mlps: whether MLPs between both are held at their clean values (direct edges) or recomputed, so that
            paths through MLPs count (as Wang et al. do).
        totals: also patch every sender with nothing held.
        tokens: the tokens at which the sender sends.
        metric: what to measure; see `vit_mechinterp.circuits.metrics`.
        base, source: the columns of clean and corrupted images.
        resamples, seed: of the bootstrap and the permutation test over pairs.
        folder: keeps finished paths, so that the same call goes on where it was stopped.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.
        name: of the result.

    Returns:
        Table, one row per path: ``sender, sender_layer, sender_head, receiver, receiver_layer,
        receiver_head``, the columns of `effect_columns`, and ``total``, the change with nothing held, with
        ``total_normalised``, its share of the gap. A control with everything held and nothing sent has no
        effect. Figures: per receiver a map of senders;
        for many receivers a matrix.

    Raises:
        SpecError: a node is none, or no sender comes before a receiver; UnsupportedSiteError: the model has
            no site to hold a later node at.
        DataError: the images are none, or a pair differs in size.
    """
    check_resampling(resamples, seed)
    if mlps not in ("frozen", "recomputed"):
        raise SpecError(f"mlps={mlps!r} is not known. Choose 'frozen' or 'recomputed'.")
    if direction not in ("noising", "denoising"):
        raise SpecError(f"direction={direction!r} is not known. Choose 'noising' or 'denoising'.")
    data = image_pairs(images, vit, corruption=corruption, base=base, source=source, progress=progress)
    into, origin = (base, source) if direction == "noising" else (source, base)
    writers, left_out = senders_of(vit, senders)
    readers, also = receivers_of(vit, receivers)
    left_out |= also
    paths = [(s, r) for s in writers for r in readers if reaches(vit, s, r)]
    if not paths:
        raise SpecError("None of the senders writes before one of the receivers reads, so there is no path.")
    branches = other_writers(vit, Data(data, vit).images(base, [0]))
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    bound, first, clean = compared(vit, data, metric, base=base, source=source, folder=folder, **how)
    freeze = mlps == "frozen"
    groups = _groups(vit, writers, readers, into, origin, freeze, totals, tokens, clean.numel())
    measured = measure(vit, groups, data, bound, folder=folder, **how)

    ends = (bound.clean, bound.other) if direction == "noising" else (bound.other, bound.clean)
    assert ends[0] is not None
    assert ends[1] is not None
    names = [*(run_name(s, r) for s, r in paths), NOTHING_SENT]
    effects = effect_columns(measured.stack(names), *ends, resamples=resamples, seed=seed)
    table = path_table(paths, effects, control=True)
    if totals:
        total = {s: float((measured.values[f"total, {s}"] - ends[0]).mean()) for s in writers}
        table["total"] = [*(total[s] for s, _ in paths), np.nan]
        table["total_normalised"] = table["total"] / _gap(effects, ends[0], ends[1])
    summary = summary_of(table, bound)
    return CircuitResult(
        name=name,
        table=table,
        provenance=provenance(
            first,
            *measured.provenances,
            metric=bound.description,
            direction=direction,
            mlps=mlps,
            left_out=left_out,
            recomputed_branches=branches or None,
            corruption=None if corruption is None else str(corruption),
            resamples=resamples,
            seed=seed,
        ),
        summary=summary,
        description="\n\n".join(
            filter(
                None,
                [
                    *description_of(bound, direction, freeze, left_out, ends, branches),
                    findings_of(table),
                ],
            )
        ),
        captions=captions_of(table),
        draw=draw_paths(bound.label),
    )


def edge_patching(
    vit: HookedViT, images: Any, *, receivers: Iterable[NodeLike] | None = None, **options: Any
) -> CircuitResult:
    """Measure every edge of the graph: every sender into every receiver, everything between them held.

    The same as `path_patching` with MLPs held, by default with every reader as a receiver and the embedding
    among the senders. The number of runs grows with the square of the number of heads: name senders and
    receivers on larger models, or begin with `edge_attribution`.

    Args:
        vit, images: see `path_patching`.
        receivers: see `path_patching`; None means all.
        options: of `path_patching`.
    """
    options = {"totals": False, "name": "edge_patching", **options, "mlps": "frozen"}
    if options.get("senders") is None:
        options["senders"] = senders_of(vit, None, embed=True)[0]
    return path_patching(vit, images, receivers=receivers, **options)


def path_runs(
    vit: HookedViT,
    sender: Node,
    receivers: Sequence[Node],
    *,
    base: str = "base",
    source: str = "source",
    freeze_mlps: bool = True,
    tokens: Any = "all",
) -> list[Run]:
    """Return the graph of runs of one sender: the run that sends, and per receiver one that reads from it.

    The output of the run that sends is that of the path into the logits, and wanted if these receive. A
    sender that none of the receivers follows has no runs.
    """
    held = [Interchange(site=s, source=base) for s in frozen_sites(vit, sender, mlps=freeze_mlps)]
    into_logits = any(r.site == LOGITS for r in receivers)
    sending = Run(
        name=run_name(sender, Node(LOGITS)),
        interventions=(sender.interchange(source, tokens), *held),
        base=base,
        output=into_logits,
    )
    through = [
        Run(name=run_name(sender, r), interventions=(r.interchange({"run": sending.name}),), base=base)
        for r in receivers
        if r.site != LOGITS and reaches(vit, sender, r)
    ]
    return [sending, *through] if through or into_logits else []


def _gap(effects: Mapping[str, Any], without: Tensor, target: Tensor) -> float:
    """The gap that effects are shares of; NaN where there is a reason not to divide by it."""
    return np.nan if effects["reason"] else float((target - without).mean())


def run_name(sender: Node, receiver: Node) -> str:
    """Return the name of the run whose output shows a path's effect."""
    return f"{sender} into {receiver}"


def _groups(
    vit: HookedViT,
    writers: Sequence[Node],
    readers: Sequence[Node],
    into: str,
    origin: str,
    freeze: bool,
    totals: bool,
    tokens: Any,
    n_numbers: int,
) -> list[list[Run]]:
    """Senders side by side up to a number of runs; a sender's own runs stay together, for they read it."""
    most = max(1, min(_RUNS_IN_GROUP, 2**25 // n_numbers))
    nothing = [Interchange(site=s, source=into) for s in frozen_sites(vit, Node("embed"), mlps=freeze)]
    groups: list[list[Run]] = [[Run(name=NOTHING_SENT, interventions=tuple(nothing), base=into)]]
    for sender in writers:
        own = path_runs(vit, sender, readers, base=into, source=origin, freeze_mlps=freeze, tokens=tokens)
        if totals:
            whole = (sender.interchange(origin, tokens),)
            own.append(Run(name=f"total, {sender}", interventions=whole, base=into))
        if len(groups[-1]) + len(own) > most:
            groups.append([])
        groups[-1] += own
    return [group for group in groups if group]


def path_table(
    paths: Sequence[tuple[Node, Node]], effects: dict[str, Any], *, control: bool = False
) -> pd.DataFrame:
    """Return one row per path, and with ``control`` a last one for the run that sends nothing."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for index, role in enumerate(("sender", "receiver")):
        nodes = [path[index] for path in paths]
        last: list[Any] = [NOTHING_SENT if role == "sender" else LOGITS] if control else []
        none: list[Any] = [None] if control else []
        columns[role] = [*map(str, nodes), *last]
        columns[f"{role}_kind"] = [*(node.kind for node in nodes), *(["control"] if control else [])]
        columns[f"{role}_layer"] = pd.array([*(node.layer for node in nodes), *none], dtype="Int64")
        columns[f"{role}_head"] = pd.array([*(node.head for node in nodes), *none], dtype="Int64")
    return pd.DataFrame(columns | effects)
