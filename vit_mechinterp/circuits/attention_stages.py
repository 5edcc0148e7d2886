"""Attention stages: how much of an object's attention stays in it, goes to the other one, to the other pair,
or to the background, in every layer and head.

Lepori et al. (2024), section 4 and Figs. 2, 10 and 15. `attention_kinds` says what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from vit_mechinterp.circuits.attention_example import attend_in_example
from vit_mechinterp.circuits.attention_kinds import (
    KIND_NAMES,
    WithinObject,
    kinds_of,
    kinds_table,
    layer_heat,
    peak_heads,
)
from vit_mechinterp.circuits.attention_parts import TokenSets, default_objects, part_tokens
from vit_mechinterp.circuits.attention_shares import measure_shares
from vit_mechinterp.circuits.attention_words import captions, description, drawing, findings
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.binding.checks import refuse_train_mode
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.digest import digest
from vit_mechinterp.spec.tokens import parse_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float
    from torch import Tensor

__all__ = ["attention_stages", "layer_heat", "origin", "peak_heads"]


def attention_stages(
    vit: HookedViT,
    data: Any,
    objects: Sequence[Any] | None = None,
    *,
    display: Sequence[Any] | None = None,
    base: str = "base",
    wo_mode: WithinObject = "direct",
    first_peak_layer: int = 0,
    example: int | None = 0,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> CircuitResult:
    """Measure where the attention of object tokens goes, for every layer and head; nothing is changed.

    Args:
        vit: the model, in eval mode (or without dropout).
        data: images with the places of their objects.
        objects: token selectors of the objects that are compared (the pair); by default the columns ``box_1``
            and ``box_2``, or else ``object_1_tokens`` and ``object_2_tokens``.
        display: token selectors of the objects of another pair, the display pair of relational match to
            sample; by default ``display_box_1`` and ``display_box_2`` (or ``display_1_tokens``, ...) if the
            data has them. With an empty list its patches count as background.
        base: the image column.
        wo_mode: which within-object share the figures show: ``"direct"`` as measured, or ``"complement"``,
            1 - WP - BG, as published. The table has both.
        first_peak_layer: peaks are looked for from this layer on (the paper leaves out layer 0 of DINOv2,
            where every kind of attention is large: 1).
        example: the example that a figure shows with the attention of the peak heads (or the next one in
            which every object has a patch of its own); None draws none.
        resamples: of the bootstrap over images; intervals hold 95 %.
        seed: of the bootstrap.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table: ``layer, head``, then each with the ends of its interval (``WP, WP_low, WP_high``)
        ``WO_direct, WO_complement, WP, BG``, with a display pair ``BP`` and ``within_pair``, a column per
        kind of token outside the grid (``CLS``, ``registers``, ...), ``overlap`` where objects share patches,
        ``heat``, and this project's own scores ``perceptual`` (WO - WP - BG) and ``relational`` (WP; with a
        display pair BP); and ``images``. Figures: ``stages`` (heat map over line chart), ``within_object``
        (both definitions), ``perceptual_score``, ``relational_score``, and ``example`` (what the peak heads
        attend to in one image).

    Raises:
        SpecError: the model has no attention patterns, there is no such layer or example, ``wo_mode`` is
            neither, or an interval cannot be drawn.
        DataError: a column is missing, or objects have no patches of their own.
    """
    check_resampling(resamples, seed)
    if wo_mode not in ("direct", "complement"):
        raise SpecError(f"wo_mode={wo_mode!r} is not known. Choose 'direct' or 'complement'.")
    if not 0 <= first_peak_layer < vit.layout.n_layers:
        raise SpecError(
            f"first_peak_layer={first_peak_layer} is out of range; layers are 0 to {vit.layout.n_layers - 1}."
        )
    refuse_train_mode(vit)
    columns = Data(data, vit)
    compared, others = default_objects(columns, objects, display, "attention_stages")
    tokens = part_tokens(vit, columns, compared, base, others)
    shown = None if example is None else tokens.shown(example)
    shares = measure_shares(vit, columns, base, tokens, progress=progress)
    table = kinds_table(shares, tokens, resamples=resamples, seed=seed)
    peaks = peak_heads(table, wo_mode=wo_mode, first_layer=first_peak_layer)
    summary, found = findings(table, peaks)
    left_out = columns.n - int(tokens.counted.sum())
    picture = None
    if shown is not None:
        heads = _queried(shares[:, shown], tokens, peaks)
        picture = attend_in_example(vit, columns, base, tokens, heads, shown)
    return CircuitResult(
        name="attention_stages",
        table=table,
        provenance=provenance(
            origin("attention_stages", vit, columns, [*compared, *others], base),
            wo_mode=wo_mode,
            first_peak_layer=first_peak_layer,
            resamples=resamples,
            seed=seed,
            images_left_out=left_out,
        ),
        summary=summary | ({"images left out": left_out} if left_out else {}),
        description=description(tokens.has_display, left_out) + "\n\n" + found,
        captions=captions(table, wo_mode, shown if picture is not None else None),
        draw=drawing(wo_mode, first_peak_layer, picture),
    )


def origin(circuit: str, vit: HookedViT, data: Data, objects: Sequence[Any], base: str) -> dict[str, Any]:
    """Return the provenance of shares of attention: the model, the objects, and the columns read."""
    selectors = [parse_tokens(tokens) for tokens in objects]
    document = [s if isinstance(s, (str, tuple)) else s.model_dump() for s in selectors]
    used = sorted({base} | {v for s in document if isinstance(s, dict) for v in s.values()})
    return provenance(
        spec=digest({"circuit": circuit, "objects": document, "base": base}),
        model=vit.fingerprint(),
        model_source=vit.source or type(vit.module).__name__,
        data=data.fingerprint(used),
        columns=used,
        examples=data.n,
        objects=document,
        device=str(vit.device),
        dtype=str(vit.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
    )


def _queried(
    shares: Float[Tensor, "layer head query set"],
    tokens: TokenSets,
    peaks: Mapping[str, tuple[int, int, float]],
) -> dict[str, tuple[int, int, int]]:
    """Name the peak heads, each with the object (or pair) of one image that has the larger share."""
    kinds = kinds_of(shares, tokens)
    heads = {}
    for kind, (layer, head, _) in peaks.items():
        number = int(kinds[kind][layer, head].argmax()) + (tokens.n_objects if kind == "BP" else 0)
        name = tokens.query_names[number]
        heads[f"{KIND_NAMES[kind]}\nlayer {layer}, head {head}, {name}"] = layer, head, number
    return heads
