"""Ablation sweeps: what the model loses without a head, an MLP, a neuron, or a token.

Each part in turn is set to zero, to its mean over the images (per position), or to its value on another image
(resampling). Zero leaves the range of what the rest of the model knows; the mean removes what tells the
images apart; resampling keeps every value natural. What all three agree on is safest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vit_mechinterp.circuits.ablation_runs import METHODS, Ablated, Method, NeuronTensors, possible_methods
from vit_mechinterp.circuits.cells import BatchSize, check_runs, compared, grouped, measure
from vit_mechinterp.circuits.effects import effect_columns, strongest
from vit_mechinterp.circuits.images import image_column
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.patching_cells import chosen_layers, n_heads_at
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError, UnsupportedSiteError, suggest
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from vit_mechinterp.circuits.bound_metric import BoundMetric

__all__ = ["ablation_sweep"]

PARTS = ("heads", "attention", "mlps", "tokens")
_SITES = {"heads": "attn.z", "attention": "attn_out", "mlps": "mlp_out", "tokens": "resid_pre"}


def ablation_sweep(
    vit: HookedViT,
    images: Any,
    *,
    parts: Sequence[str] = PARTS,
    methods: Sequence[Method] = METHODS,
    layers: Sequence[int] | Literal["all"] = "all",
    neurons: Mapping[int, Sequence[int]] | None = None,
    token_sets: Mapping[str, Any] | None = None,
    metric: MetricLike | None = None,
    base: str = "base",
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Ablate every part on its own and measure what changes.

    Args:
        vit: the model.
        images: images, a folder, or data; see `image_column`.
        parts: any of ``"heads"`` (at ``attn.z``), ``"attention"`` (``attn_out``), ``"mlps"`` (``mlp_out``)
            and ``"tokens"``: CLS, registers, other named tokens and all patches, at every layer's
            ``resid_pre``.
        methods: any of ``"zero"``, ``"mean"``, ``"resample"``; the last two need two images.
        layers: the layers to ablate in.
        neurons: layer to neurons of its MLP (at ``mlp.post``) to ablate one by one.
        token_sets: name to selector (a column, a box, patches) to ablate like the named tokens.
        metric: what to measure; ``LogitDifference(answer="label")`` or ``Accuracy("label")`` for labelled
            images. By default the lead of the predicted class.
        base: the image column.
        resamples: resamples of the bootstrap and the permutation test over images.
        seed: seeds both, and the images that resampling takes.
        folder: keeps finished parts, so that the same call goes on where it was stopped.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per method and part: ``method, part, site, layer, head, neuron, tokens`` and the
        columns of `effect_columns`, with ``relative``, the change as a share of the clean mean's size. Parts
        and methods that are not possible are left out; ``provenance["left_out"]`` gives the reasons.

    Raises:
        SpecError: a part, method, layer, neuron or selector is none; DataError: there is no image.
    """
    check_resampling(resamples, seed)
    for part in parts:
        if part not in PARTS:
            raise SpecError(f"There is no part {part!r}.{suggest(part, PARTS)} Parts: {', '.join(PARTS)}.")
    data = image_column(images, vit, column=base)
    n = Data(data, vit).n
    chosen, left_out = possible_methods(methods, n)
    numbers = chosen_layers(vit, layers)
    own_neurons = NeuronTensors(vit, dict(neurons or {}), base, seed)
    own_neurons.check()
    found, absent = _parts(vit, parts, numbers, neurons or {}, token_sets or {})
    left_out |= absent
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no part is named"
        raise UnsupportedSiteError(f"There is nothing to ablate: {reasons}.")
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    columns = own_neurons.with_other_images(data) if neurons and "resample" in chosen else data
    runs = [part.run(method, base, seed) for method in chosen for part in found]
    check_runs(vit, runs, columns)
    bound, origin, clean = compared(vit, data, metric, base=base, source=None, folder=folder, **how)
    measured = measure(
        vit, grouped(runs, n, clean[0].numel()), columns, bound,
        tensors=own_neurons.tensors(data, chosen, folder), folder=folder, **how,
    )  # fmt: skip
    effects = effect_columns(
        measured.stack([run.name for run in runs]), bound.clean, resamples=resamples, seed=seed
    )
    table = _table(found, chosen, effects, bound)
    missing = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    sentence, summary = _findings(table, bound, n)
    return CircuitResult(
        name="ablation_sweep",
        table=table,
        provenance=provenance(
            origin,
            *measured.provenances,
            metric=bound.description,
            left_out=left_out,
            resamples=resamples,
            seed=seed,
        ),
        summary=summary,
        description="\n\n".join(
            filter(
                None, [_DESCRIPTION, bound.description, sentence, f"Left out: {missing}." if missing else ""]
            )
        ),
        captions=_captions(table, bound.label),
        draw=lambda result: _draw(result, bound.label),
    )


def _parts(
    vit: HookedViT,
    parts: Sequence[str],
    layers: Sequence[int],
    neurons: Mapping[int, Sequence[int]],
    token_sets: Mapping[str, Any],
) -> tuple[list[Ablated], dict[str, str]]:
    names = vit.layout.tokens.names
    sets = {name: name for name in (*names[1:], "patches") if name != "all"} | dict(token_sets)
    found: list[Ablated] = []
    left_out: dict[str, str] = {}
    for part in parts:
        for layer in layers:
            site = f"blocks.{layer}.{_SITES[part]}"
            if site in vit.layout.absent:
                left_out[site] = vit.layout.absent[site]
            elif part == "heads":
                heads = range(n_heads_at(vit, _SITES[part], layer))
                found += [Ablated(part, site, layer, f"head {head}", head=head) for head in heads]
            elif part == "tokens":
                found += [Ablated(part, site, layer, name, tokens=own) for name, own in sets.items()]
            else:
                found.append(Ablated(part, site, layer, "all"))
    for layer, chosen in neurons.items():
        site = f"blocks.{layer}.mlp.post"
        found += [Ablated("neurons", site, layer, f"neuron {own}", neuron=own) for own in chosen]
    return found, left_out


def _table(
    parts: Sequence[Ablated], methods: Sequence[Method], effects: dict[str, Any], metric: BoundMetric
) -> pd.DataFrame:
    import pandas as pd

    rows = [(method, part) for method in methods for part in parts]
    columns: dict[str, Any] = {
        "method": [method for method, _ in rows],
        "part": [part.part for _, part in rows],
        "site": [part.site.split(".", 2)[2] for _, part in rows],
        "layer": [part.layer for _, part in rows],
        "head": pd.array([part.head for _, part in rows], dtype="Int64"),
        "neuron": pd.array([part.neuron for _, part in rows], dtype="Int64"),
        "tokens": [part.label if part.part == "tokens" else "all" for _, part in rows],
    }
    size = abs(float(metric.clean.mean()))
    table = pd.DataFrame(columns | effects)
    table["relative"] = table["change"] / size if size > 1e-12 else np.nan
    return table


def _findings(table: pd.DataFrame, metric: BoundMetric, n: int) -> tuple[str, dict[str, float | int | str]]:
    clean = float(metric.clean.mean())
    summary: dict[str, float | int | str] = {f"{metric.label}, clean": clean, "images": n}
    said = [f"Over {n} image{'s' * (n > 1)} the {metric.label} is {clean:.3g} with nothing ablated."]
    for (method, part), rows in table.groupby(["method", "part"], sort=False):
        top = strongest(rows, "change")
        where = f"layer {top['layer']}"
        if part == "heads":
            where += f", head {top['head']}"
        elif part == "neurons":
            where += f", neuron {top['neuron']}"
        elif part == "tokens":
            where += f", {top['tokens']}"
        summary[f"{part}, {method}"] = f"{top['change']:+.3g} ({where})"
        said.append(f"{str(part).capitalize()}, {method}: most at {where}, {top['change']:+.3g}.")
    return " ".join(said), summary


_DESCRIPTION = (
    "One part at a time is replaced: by zero, by its mean over the images at each position, or by its value "
    "on another image. Everything behind it is computed anew."
)


def _captions(table: pd.DataFrame, label: str) -> dict[str, str]:
    captions = {}
    for method in dict.fromkeys(table["method"]):
        own = table[table["method"] == method]
        if own["part"].isin(["heads", "attention", "mlps"]).any():
            captions[f"{method}_parts"] = (
                f"Change of {label} when a head, an attention or an MLP is ablated ({method})."
            )
        if (own["part"] == "tokens").any():
            captions[f"{method}_tokens"] = (
                f"Change of {label} when tokens are ablated in the residual stream ({method})."
            )
    if (table["part"] == "neurons").any():
        captions["neurons"] = f"Change of {label} when single neurons are ablated."
    return captions


def _draw(result: CircuitResult, label: str) -> dict[str, Figure]:
    from vit_mechinterp.figures import condition_map, dots_by_row, round_up

    table, figures = result.table, {}
    parts = table["part"].isin(["heads", "attention", "mlps"])
    for kind, chosen in (("parts", parts), ("tokens", table["part"] == "tokens")):
        for method in dict.fromkeys(table["method"]):
            rows = table[chosen & (table["method"] == method)]
            if len(rows) == 0:
                continue
            names = rows["tokens"].where(rows["part"] == "tokens", rows["part"])
            names = names.where(rows["part"] != "heads", "head " + rows["head"].astype(str))
            wide = rows.assign(line=names).pivot_table(
                index="layer", columns="line", values="change", dropna=False
            )
            lines = list(dict.fromkeys(names))
            wide = wide.reindex(range(int(table["layer"].max()) + 1))[lines]
            bound = round_up(float(rows["change"].abs().max()))
            figures[f"{method}_{kind}"] = condition_map(
                wide.to_numpy(dtype=float),
                lines,
                title=f"{method} ablation",
                label=f"change of {label}",
                limits=(-bound, bound),
            )
    neurons = table[table["part"] == "neurons"]
    if len(neurons):
        groups = {}
        for method in dict.fromkeys(neurons["method"]):
            own = neurons[neurons["method"] == method]
            ends = own[["change", "change_low", "change_high"]].to_numpy(dtype=float)
            ends = np.where(np.isfinite(ends), ends, ends[:, :1])
            keys = [f"layer {r}, neuron {k}" for r, k in zip(own["layer"], own["neuron"], strict=True)]
            groups[method] = {
                k: (float(a), float(b), float(c)) for k, (a, b, c) in zip(keys, ends, strict=True)
            }
        reach = round_up(max(abs(v) for rows in groups.values() for ends in rows.values() for v in ends))
        figures["neurons"] = dots_by_row(groups, label=f"change of {label}", limits=(-reach, reach))
    return figures
