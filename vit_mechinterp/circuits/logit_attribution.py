"""Direct logit attribution: which layers, heads, tokens and neurons write a logit into the residual stream.

With the scale of the last norms held at its value, the logit is a linear function of the last residual stream
(Elhage et al. 2021; nostalgebraist 2020), so it is a sum over everything that was ever added to the stream:
exactly, for CLS heads, mean pooling, norms before and after the pooling, and linear projections. Only direct
effects are seen: what a part does through later layers counts for those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.attribution_figures import captions_of, drawing
from vit_mechinterp.circuits.images import image_column, model_view
from vit_mechinterp.circuits.kept_readings import KeptReadings, in_batches
from vit_mechinterp.circuits.logit_parts import Parts, logit_parts, part_sites
from vit_mechinterp.circuits.metrics import Classes, LogitDifference, Probability, one_class
from vit_mechinterp.circuits.reading import (
    class_names,
    directed,
    interval_columns,
    read_from,
    reading_data,
)
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import ExecutionError, SpecError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.tail import linear_readout

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["classes_of", "logit_attribution"]

KINDS = ("heads", "sources", "tokens", "neurons")
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def logit_attribution(
    vit: HookedViT,
    images: Any,
    *,
    answer: Classes = None,
    against: Classes = None,
    directions: Float[Tensor, "class d_output"] | None = None,
    names: Sequence[str] | None = None,
    parts: Sequence[str] = KINDS,
    top_neurons: int = 20,
    base: str = "base",
    example: int = 0,
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Cut a logit, or the difference of two, into what every part adds to it directly.

    Args:
        vit: the model; its readout must be linear behind its norms.
        images: images, a folder, or data; see `image_column`.
        answer: the class: a number, a column, or one per image; by default the predicted one.
        against: a class whose logit is subtracted, in the same forms.
        directions: for models that give features: one direction per class (text embeddings); the logit is
            their dot product with the output.
        names: names of the classes.
        parts: cuts beside the layers: any of ``"heads"``, ``"sources"`` (which tokens the heads bring it
            from), ``"tokens"`` (where in the last stream it lies) and ``"neurons"``.
        top_neurons: how many neurons the table keeps, by size of the mean.
        base: the image column.
        example: the image that the maps show.
        resamples, seed: of the bootstrap over images.
        folder: keeps what has been read, so that the same call goes on where it was stopped.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per part: ``kind`` (``component``, ``head``, ``source``, ``token``, ``neuron``),
        ``part, layer, head, neuron, token``, the mean ``contribution`` with its interval, and
        ``example_contribution``. Rows of the kind ``component`` sum to the logit (as do, with the
        constant, those of the kind ``token``); each layer's heads and its attention bias to its
        attention. ``provenance["residual"]`` is the largest difference, as a share of the parts' size.

    Raises:
        SpecError: the readout is not linear, a class is out of range, or a model without classes was given
            no directions; ExecutionError: the parts do not sum to the logit.
    """
    check_resampling(resamples, seed)
    for part in parts:
        if part not in KINDS:
            raise SpecError(f"There is no part {part!r}.{suggest(part, KINDS)} Parts: {', '.join(KINDS)}.")
    data = image_column(images, vit, column=base)
    columns = reading_data(vit, data, base, example, progress=progress)
    along, n_classes = directed(vit, directions, "Logit attribution")
    labels = class_names(names, n_classes)
    sites = part_sites(vit, parts)
    check = LogitDifference(answer, against) if against is not None else Probability(answer)
    check.check(columns, (n_classes,))
    found: list[Parts] = []
    values: list[Tensor] = []
    constants: list[Tensor] = []
    classes: list[int] = []

    def read(examples: list[int]) -> dict[str, Tensor]:
        x = columns.images(base, examples)
        with torch.no_grad():
            outputs = _outputs(vit(x), along)
        own = classes_of(answer, columns, examples, outputs)
        other = None if against is None else classes_of(against, columns, examples, outputs)
        readout = linear_readout(vit, x, _picked(own, other, along))
        cut = logit_parts(vit, x, readout, sites)
        _require_sum(cut, vit)
        named = {"value": readout.value, "constant": readout.constant, "classes": own}
        return named | cut.tensors()

    compared = [columns.integers(c) if isinstance(c, str) else c for c in (answer, against)]
    decided: dict[str, Any] = {"parts": list(parts), "classes": compared, "directions": along}
    with KeptReadings(folder, vit, columns, [base], reading="logit attribution", **decided) as kept:
        for _, tensors in in_batches(
            vit, columns.n, read, kept, at_once=4, progress=progress, what="attribution"
        ):
            values.append(tensors.pop("value"))
            constants.append(tensors.pop("constant"))
            classes += tensors.pop("classes").tolist()
            found.append(Parts.of(tensors))
    value, constant = torch.cat(values), torch.cat(constants)
    table = _table(found, constant, sites.first, top_neurons, parts, example, resamples, seed)
    residual = max(float((cut.residual.abs() / cut.size).max()) for cut in found)
    title = labels[classes[example]]
    label = "logit" if against is None else "logit difference"
    left_out = dict(sites.left_out)
    for layer in set(sites.sources) - _cut_by_source(found):
        left_out[f"blocks.{layer}, sources"] = "z is not the pattern times the values"
    missing = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    return CircuitResult(
        name="logit_attribution",
        table=table,
        provenance=read_from(
            vit,
            columns,
            [base, *(c for c in (answer, against) if isinstance(c, str))],
            left_out=left_out,
            residual=residual,
            classes=classes,
            seed=seed,
            resamples=resamples,
        ),
        summary=_summary(table, value, residual, label),
        description=_DESCRIPTION + (f"\n\nLeft out: {missing}." if missing else ""),
        captions=captions_of(table, columns.n, label, vit.layout.tokens),
        draw=drawing({title: model_view(vit, data, base, example)}, vit.layout.tokens, label),
    )


def _outputs(outputs: Tensor, along: Tensor | None) -> Tensor:
    return outputs.float() if along is None else outputs.float() @ along.T


def classes_of(
    value: Classes,
    columns: Data,
    examples: Sequence[int],
    outputs: Float[Tensor, "batch class"],
) -> Tensor:
    """Return the class of each of some examples; the predicted one where it was left open."""
    if value is None:
        return outputs.argmax(dim=1)
    if isinstance(value, str):
        rows = columns.integers(value)
        return torch.tensor([rows[example][0] for example in examples], device=outputs.device)
    if (number := one_class(value)) is not None:
        return torch.full((len(examples),), number, device=outputs.device)
    each = cast("Sequence[int]", value)
    return torch.tensor([int(each[example]) for example in examples], device=outputs.device)


def _picked(own: Tensor, other: Tensor | None, along: Tensor | None) -> Callable[[Tensor], Tensor]:
    def pick(outputs: Tensor) -> Tensor:
        logits = _outputs(outputs, along)
        picked = logits.gather(1, own[:, None])[:, 0]
        return picked if other is None else picked - logits.gather(1, other[:, None])[:, 0]

    return pick


def _cut_by_source(found: Sequence[Parts]) -> set[int]:
    """The layers whose heads were cut by token in every batch."""
    layers = set(found[0].sources)
    return layers.intersection(*(cut.sources for cut in found))


def _require_sum(parts: Parts, vit: HookedViT) -> None:
    off = float((parts.residual.abs() / parts.size).max())
    if off > _TOLERANCE.get(vit.dtype, 3e-2):
        raise ExecutionError(
            f"The parts of the logit differ from it by {off:.2g} of their size, so they are not its parts on "
            f"{type(vit.module).__name__}."
        )


def _table(
    found: Sequence[Parts],
    constant: Tensor,
    first: int,
    top: int,
    kinds: Sequence[str],
    example: int,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    values: list[Tensor] = []

    def add(numbers: Tensor, kind: str, part: str, **where: int) -> None:
        rows.append({"kind": kind, "part": part, **where})
        values.append(numbers.cpu())

    size = float(torch.cat([cut.size for cut in found]).mean())
    for (part, layer), _ in found[0].components.items():
        numbers = torch.cat([cut.components[part, layer] for cut in found])
        # Blocks whose increments are all there leave nothing but rounding.
        if part in ("rest of block", "between blocks") and float(numbers.abs().max()) < 1e-4 * size:
            continue
        where = {} if part == "embed" and first == 0 else {"layer": layer}
        add(numbers, "component", part if part != "embed" or first == 0 else "stream before", **where)
    add(constant, "component", "constant")
    if "heads" in kinds:
        for layer in found[0].heads:
            stacked = torch.cat([cut.heads[layer] for cut in found])
            for head in range(stacked.shape[1]):
                add(stacked[:, head], "head", "head", layer=layer, head=head)
            bias = torch.cat([cut.components["attn_out", layer] for cut in found]) - stacked.sum(1)
            add(bias, "head", "bias", layer=layer)
    for layer in sorted(_cut_by_source(found)):
        stacked = torch.cat([cut.sources[layer] for cut in found])
        for token in range(stacked.shape[1]):
            add(stacked[:, token], "source", "source", layer=layer, token=token)
    if "tokens" in kinds:
        stacked = torch.cat([cut.tokens for cut in found])
        for token in range(stacked.shape[1]):
            add(stacked[:, token], "token", "token", token=token)
    if found[0].neurons:
        every = {layer: torch.cat([cut.neurons[layer] for cut in found]) for layer in found[0].neurons}
        ranked = [(layer, k, abs(m)) for layer, v in every.items() for k, m in enumerate(v.mean(0).tolist())]
        for layer, neuron, _ in sorted(ranked, key=lambda entry: -entry[2])[:top]:
            add(every[layer][:, neuron], "neuron", "neuron", layer=layer, neuron=neuron)
    stack = torch.stack(values).numpy()
    table = pd.DataFrame(rows, columns=["kind", "part", "layer", "head", "neuron", "token"])
    for name in ("layer", "head", "neuron", "token"):
        table[name] = table[name].astype("Int64")
    intervals = interval_columns(stack, name="contribution", resamples=resamples, seed=seed)
    return table.assign(**intervals, example_contribution=np.ascontiguousarray(stack[:, example]))


def _summary(table: pd.DataFrame, value: Tensor, residual: float, label: str) -> dict[str, float | int | str]:
    summary: dict[str, float | int | str] = {f"{label}, mean": float(value.mean()), "images": len(value)}
    whole = table[(table["kind"] == "component") & (table["part"] != "constant")]
    heads, neurons = table[table["part"] == "head"], table[table["kind"] == "neuron"]
    for kind, rows in (("layer", whole), ("head", heads), ("neuron", neurons)):
        if len(rows):
            top = rows.iloc[int(rows["contribution"].abs().argmax())]
            where = str(top["part"]) if kind == "layer" else f"{kind} {top[kind]}"
            place = "" if str(top["layer"]) == "<NA>" else f", layer {top['layer']}"
            summary[f"most by a {kind}"] = f"{top['contribution']:+.3g} ({where}{place})"
    summary["sum of parts is off by (share)"] = residual
    return summary


_DESCRIPTION = (
    "The logit is written as a sum over everything that was added to the residual stream, the scales of the "
    "last norms held at their values for each image. The constant is what biases behind the last block add. "
    "Heads are cut by the token that they bring their part from; these maps say where in the image it was "
    "read. A part's effect through later layers is counted for those layers, not for the part."
)
