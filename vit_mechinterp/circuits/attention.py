"""Attention, read: rollout over the image, what every head attends to, how far, how sharply, how alike.

Attention says where a head reads, not what it does with it; `logit_attribution` and the patching circuits
say that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.attention_figures import captions_of, drawing
from vit_mechinterp.circuits.attention_measures import head_measures, relevance, rollout, similarity
from vit_mechinterp.circuits.bound_metric import bind_metric, check_metric
from vit_mechinterp.circuits.gradients import check_gradient, gradients_at, keeping
from vit_mechinterp.circuits.images import image_column, model_view
from vit_mechinterp.circuits.kept_readings import KeptReadings, in_batches
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.reading import (
    interval_columns,
    merged_reasons,
    outputs_shape,
    read_from,
    reading_data,
)
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.binding.positions import resolve_tokens
from vit_mechinterp.errors import SpecError, UnsupportedSiteError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.tokens import TokenBox, TokenColumn, parse_tokens

if TYPE_CHECKING:
    import pandas as pd

    from vit_mechinterp.circuits.bound_metric import BoundMetric
    from vit_mechinterp.engine.inputs.data import Data

__all__ = ["attention"]


def attention(
    vit: HookedViT,
    images: Any,
    *,
    query: Any = None,
    metric: MetricLike | None = None,
    gradient: bool = True,
    base: str = "base",
    example: int = 0,
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Read every attention pattern.

    Args:
        vit: the model.
        images: images, a folder, or data; see `image_column`.
        query: whose attention the maps show: a token name or patch indices (their mean); by default the CLS
            token, or the mean over all patches where there is none.
        metric: what the gradient variant of rollout is taken of; by default the logit of the predicted
            class, or for models that give features their norm.
        gradient: whether to make that variant.
        base: the image column.
        example: the image that the maps show.
        resamples, seed: of the bootstrap over images.
        folder: keeps what has been read, so that the same call goes on where it was stopped.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table in long form, one row per number: ``kind, layer, head, other_layer, other_head, token,
        quantity, value, value_low, value_high``. Kinds: ``head`` (quantities ``distance`` in patches,
        ``entropy`` in nats, ``to cls``, ``to registers``, ...; means over patches as queries),
        ``similarity`` (two heads), ``map`` (one image: the attention of the query to each token, per head),
        ``rollout`` (one image: quantities ``rollout`` and ``gradient``), and ``control``: distance and
        entropy of uniform attention. Layers without a pattern of the stream's own tokens are left out;
        ``provenance["left_out"]`` gives the reasons, and rollout is left out unless all layers have one.

    Raises:
        UnsupportedSiteError: no layer has a pattern; SpecError: the query or the metric does not fit.
    """
    check_resampling(resamples, seed)
    data = image_column(images, vit, column=base)
    columns = reading_data(vit, data, base, example, progress=progress)
    layers, left_out = _patterned(vit)
    queries = _queries(vit, query)
    sites = [f"blocks.{layer}.attn.pattern" for layer in layers]
    whole = len(layers) == vit.layout.n_layers
    if not whole:
        left_out["rollout"] = "not every layer has a pattern"
    checked = None
    if gradient and whole:
        classes = vit.layout.output == "logits" and len(outputs_shape(vit)) == 1
        checked = check_metric(metric or (_top_logit if classes else _norm), vit, data)
    cache = _patterns(vit, columns.images(base, [example]), sites)
    patterns = [cache[site] for site in sites]
    slopes = None if checked is None else _slopes(vit, columns, base, example, checked, sites)
    one_shape = len({vit.sites()[site].shape for site in sites}) == 1

    @torch.no_grad()
    def read(examples: list[int]) -> dict[str, Tensor]:
        cache = _patterns(vit, columns.images(base, examples), sites)
        found = {
            f"{layer} {name}": values
            for layer, site in zip(layers, sites, strict=True)
            for name, values in head_measures(cache[site], vit.layout.tokens).items()
        }
        if one_shape:
            found["alike"] = similarity(torch.cat([cache[site] for site in sites], dim=1)).sum(0)
        return found

    measured: dict[tuple[str, int], list[Tensor]] = {}
    alike: list[Tensor] = []
    with KeptReadings(folder, vit, columns, [base], reading="attention", sites=sites) as kept:
        for _, found in in_batches(
            vit, columns.n, read, kept, sites=sites, progress=progress, what="attention"
        ):
            alike += [found.pop("alike")] if one_shape else []
            for key, values in found.items():
                layer, name = key.split(" ", 1)
                measured.setdefault((name, int(layer)), []).append(values.cpu())
    rows = [_head_rows(measured, resamples, seed), _control_rows(vit)]
    if alike:
        rows.append(_similarity_rows(torch.stack(alike).sum(0).cpu() / columns.n, layers))
    rows.append(_map_rows(patterns, layers, queries))
    if whole:
        rows.append(_rollout_rows("rollout", rollout(patterns), queries))
        if slopes is not None:
            rows.append(_rollout_rows("gradient", relevance(patterns, slopes), queries))
    table = _joined(rows)
    missing = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    picture = model_view(vit, data, base, example)
    said = "cls" if query is None and vit.layout.tokens.positions("cls") else query or "all patches"
    return CircuitResult(
        name="attention",
        table=table,
        provenance=read_from(
            vit,
            columns,
            [base],
            left_out=left_out,
            query=str(said),
            example=example,
            seed=seed,
            resamples=resamples,
        ),
        summary=_summary(table, columns.n),
        description=_DESCRIPTION + (f"\n\nLeft out: {missing}." if missing else ""),
        captions=captions_of(table, columns.n, str(said)),
        draw=drawing(picture, vit.layout.tokens, vit.layout.n_layers, str(said)),
    )


def _patterned(vit: HookedViT) -> tuple[list[int], dict[str, str]]:
    """The layers whose pattern is over the stream's tokens, and why others have none."""
    sites, n_tokens = vit.sites(), vit.layout.tokens.n_tokens
    found, left_out = [], {}
    for layer in range(vit.layout.n_layers):
        name = f"blocks.{layer}.attn.pattern"
        if name in vit.layout.absent:
            left_out[name] = vit.layout.absent[name]
        elif sites[name].shape[1:] != (n_tokens, n_tokens):
            left_out[name] = "it is not over the tokens of the residual stream (windows, or fewer tokens)"
        else:
            found.append(layer)
    merged = merged_reasons(left_out, vit.layout.n_layers)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in merged.items())
        raise UnsupportedSiteError(f"{type(vit.module).__name__} has no pattern to read: {reasons}.")
    return found, merged


@torch.no_grad()
def _patterns(vit: HookedViT, x: Float[Tensor, "batch *image"], sites: Sequence[str]) -> Mapping[str, Tensor]:
    _, cache = vit.run(x, capture=sites)
    return cache


def _queries(vit: HookedViT, query: Any) -> list[int]:
    layout = vit.layout.tokens
    if query is None:
        return layout.positions("cls") or layout.positions("patches") or []
    chosen = parse_tokens(query)
    if isinstance(chosen, (TokenColumn, TokenBox)):
        raise SpecError(f"query is a token name or patch indices, not {chosen}.")
    return list(resolve_tokens(chosen, vit, None, "base", "query").shared or range(layout.n_tokens))


def _top_logit(outputs: Tensor) -> Tensor:
    """The largest logit."""
    top: Tensor = outputs.max(dim=1).values
    return top


def _norm(outputs: Tensor) -> Tensor:
    """The Euclidean norm of the output."""
    size: Tensor = outputs.flatten(1).norm(dim=1)
    return size


def _slopes(
    vit: HookedViT, columns: Data, base: str, example: int, checked: Any, sites: Sequence[str]
) -> list[Tensor]:
    """The metric's gradient at every pattern of one image."""
    x = columns.images(base, [example])
    kept: dict[str, Tensor] = {}
    with torch.enable_grad(), vit.hooks({site: keeping(kept, site) for site in sites}):
        outputs = vit(x.detach().clone().requires_grad_())
        bound: BoundMetric = bind_metric(checked, vit, {base: x.detach()}, outputs.detach())
        check_gradient(bound, outputs)
        slopes = gradients_at(kept, bound(outputs).sum())
    return [slopes[site].detach() for site in sites]


def _head_rows(measured: Mapping[tuple[str, int], list[Tensor]], resamples: int, seed: int) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for (name, layer), values in measured.items():
        stacked = torch.cat(values).T.numpy()
        intervals = interval_columns(stacked, resamples=resamples, seed=seed)
        place = {"kind": "head", "quantity": name, "layer": layer, "head": range(len(stacked))}
        frames.append(pd.DataFrame({**place, **intervals}))
    return pd.concat(frames, ignore_index=True)


def _control_rows(vit: HookedViT) -> pd.DataFrame:
    import pandas as pd

    n = vit.layout.tokens.n_tokens
    uniform = head_measures(torch.full((1, 1, n, n), 1 / n, dtype=torch.float64), vit.layout.tokens)
    rows = [{"kind": "control", "quantity": name, "value": float(value)} for name, value in uniform.items()]
    return pd.DataFrame(rows)


def _similarity_rows(alike: Float[Tensor, "head head"], layers: Sequence[int]) -> pd.DataFrame:
    import pandas as pd

    per = len(alike) // len(layers)
    one, other = np.triu_indices(len(alike), 1)
    numbers = np.asarray(layers)
    return pd.DataFrame(
        {
            "kind": "similarity", "quantity": "similarity", "value": alike.numpy()[one, other],
            "layer": numbers[one // per], "head": one % per,
            "other_layer": numbers[other // per], "other_head": other % per,
        }
    )  # fmt: skip


def _map_rows(patterns: Sequence[Tensor], layers: Sequence[int], queries: list[int]) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for layer, pattern in zip(layers, patterns, strict=True):
        values = pattern[0, :, queries].double().mean(1).cpu().numpy()
        heads, tokens = np.indices(values.shape)
        place = {"kind": "map", "quantity": "attention", "layer": layer}
        where = {"head": heads.ravel(), "token": tokens.ravel()}
        frames.append(pd.DataFrame({**place, **where, "value": values.ravel()}))
    return pd.concat(frames, ignore_index=True)


def _rollout_rows(name: str, joint: Float[Tensor, "batch token token"], queries: list[int]) -> pd.DataFrame:
    import pandas as pd

    values = joint[0, queries].mean(0).cpu().numpy()
    return pd.DataFrame({"kind": "rollout", "quantity": name, "token": range(len(values)), "value": values})


def _joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    places = ["layer", "head", "other_layer", "other_head", "token"]
    order = ["kind", *places, "quantity", "value", "value_low", "value_high"]
    table = pd.concat(frames, ignore_index=True).reindex(columns=order)
    return table.astype(dict.fromkeys(places, "Int64"))


def _summary(table: pd.DataFrame, n: int) -> dict[str, float | int | str]:
    summary: dict[str, float | int | str] = {"images": n}
    heads = table[table["kind"] == "head"]
    for name, word in (("distance", "farthest"), ("entropy", "least sharp")):
        rows = heads[heads["quantity"] == name]
        top = rows.iloc[int(rows["value"].argmax())]
        summary[f"{word} head"] = f"layer {top['layer']}, head {top['head']} ({top['value']:.2f})"
    for name in dict.fromkeys(heads["quantity"]):
        if name.startswith("to "):
            summary[f"attention {name}, mean"] = float(heads[heads["quantity"] == name]["value"].mean())
    return summary


_DESCRIPTION = (
    "Every attention pattern is read, nothing is changed. Distance is how many patches away a head attends, "
    "on average over patches; entropy how sharply, in nats; both stand beside what attention to all tokens "
    "alike would give. Rollout follows attention through the layers, with the skip connection counted as "
    "half; its gradient variant keeps what raises the model's answer. Attention says where a head reads, "
    "not what it does with it."
)
