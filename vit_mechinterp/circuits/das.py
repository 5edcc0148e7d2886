"""Distributed alignment search: at which layers does a subspace of an object's tokens carry an attribute?

Lepori et al. 2024, "Beyond the Doors of Perception", section 4 and appendix: at every layer a rotation and a
gate are trained on counterfactual pairs (`vit_mechinterp.stimuli.counterfactuals`), then the part of the
edited object's tokens that lies in the gated subspace is exchanged for the source object's, and the answer is
compared with the answer that the exchanged attribute demands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, Literal, TypedDict

import torch
from jaxtyping import Int
from torch import Tensor

from vit_mechinterp.circuits.alignment import Trained, Training, gate_name, rotation_name, train_subspaces
from vit_mechinterp.circuits.das_result import assemble, table_of
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.engine import execute
from vit_mechinterp.engine.data import Data
from vit_mechinterp.errors import DataError, SpecError, suggest
from vit_mechinterp.spec import InjectSubspace, Run, Site, TensorRef, TokenBox, Tokens

if TYPE_CHECKING:
    from vit_mechinterp.model import HookedViT

__all__ = ["CONTROLS", "TINY", "Control", "Settings", "das", "das_by_attribute", "interchange_run"]

Control = Literal["wrong_object"]
CONTROLS: Final[tuple[Control, ...]] = ("wrong_object",)


class Settings(TypedDict, total=False):
    """The keyword arguments of `das` that set the training."""

    epochs: int
    batch_size: int
    learning_rate: float
    mask_learning_rate: float
    sparsity: float


TINY: Final[Settings] = {
    "epochs": 5,
    "batch_size": 32,
    "learning_rate": 5e-3,
    "mask_learning_rate": 1e-1,
}
"""Settings for small models (a width of about 128) and a few hundred pairs: a hundred steps at higher rates
in place of the published 640 steps. ``das(vit, train, test, **TINY)``."""

_EDITED, _SOURCE, _OTHER = (TokenBox(box=f"{name}_box") for name in ("edited", "source", "source_other"))


def das(
    vit: HookedViT,
    train: Any,
    test: Any,
    *,
    attribute: str = "attribute",
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    tokens: Tokens = _EDITED,
    source_tokens: Tokens = _SOURCE,
    control: Control | None = None,
    control_tokens: Tokens = _OTHER,
    base: str = "base",
    source: str = "source",
    label: str = "counterfactual_label",
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    mask_learning_rate: float = 1e-2,
    sparsity: float = 1e-3,
    permute_sources: bool = True,
    seed: int = 0,
    layers_at_once: int | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Find, layer by layer, the subspace that carries one attribute of an object, and measure by held-out
    interchange accuracy how far it does (distributed alignment search, Lepori et al. 2024).

    Per layer a full orthogonal rotation R and a gate g = sigmoid(m / T) are trained with Adam to minimise
    ``CE(logits, counterfactual label) + sparsity * sum(g)`` under the intervention

        h[T] += (g * (h_src[T_src] R - h[T] R)) R^T

    at all tokens of the object at once. T falls from 1 to 1/200, and the gates are binary when measured. The
    model is frozen: clean forwards are made once, and all layers are trained in the same growing batches,
    each as if alone.

    The defaults are the published settings. Two details differ from the published code without moving any
    optimum: the rotation is parametrised by the Cayley map instead of the matrix exponential, and the
    temperatures are not rounded to bfloat16. (Its penalty, summed over the object's tied tokens and divided
    by their number, is the sum of the one gate.)

    Args:
        vit: the model; nothing of it changes.
        train: counterfactual pairs to train on (a ``datasets.Dataset`` or a mapping of columns), such as
            `vit_mechinterp.stimuli.counterfactuals` makes.
        test: held-out pairs to measure on.
        attribute: what the pairs exchange ("shape", "color"); a name for the table and the figure.
        layers: blocks to analyse; all of them if left out. Each is trained as if alone (up to rounding).
        site: the site within each block, a name without its layer.
        tokens: the edited object's tokens in the base image, a selector such as ``{"box": "edited_box"}`` or
            ``{"column": "edited_tokens"}``.
        source_tokens: the source object's tokens in the source image.
        control: ``"wrong_object"`` takes ``control_tokens`` in place of ``source_tokens``, in training as in
            measuring: what can be reached with an object that lacks the wanted attribute.
        control_tokens: the other object's tokens in the source image.
        base, source: image columns.
        label: the column of classes that the intervention should lead to.
        epochs, batch_size, learning_rate, mask_learning_rate, sparsity, permute_sources, seed: see
            `Training`; ``**TINY`` suits small models.
        layers_at_once: train the layers in groups of this many, which bounds memory at the cost of one clean
            pass for each group; all at once if left out.
        progress: show bars if it takes longer than two seconds.

    Returns:
        A table of one row per layer: ``attribute``, ``control`` ("none" or its name), ``layer``, ``site``,
        ``accuracy`` (fraction of held-out items whose predicted class is the counterfactual label), ``rank``
        (open dimensions of the gate), ``loss`` (held-out cross-entropy), ``train_loss`` (last epoch, penalty
        included), ``no_effect`` (accuracy if nothing were changed) and ``n`` (held-out items). ``tensors``
        holds ``rotation_<layer>`` ``[d, d]`` and ``gate_<layer>`` ``[d]`` (zeros and ones), ready as
        ``basis`` and ``gate`` of an `InjectSubspace`.

    Raises:
        SpecError, DataError: before the first forward, if anything does not fit.
    """
    layers = list(range(vit.layout.n_layers)) if layers is None else list(layers)
    _check(control, layers, layers_at_once)
    training = Training(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        mask_learning_rate=mask_learning_rate,
        sparsity=sparsity,
        permute_sources=permute_sources,
        seed=seed,
    )
    taken = source_tokens if control is None else control_tokens
    runs = {n: interchange_run(n, site, tokens, taken, base=base, source=source) for n in layers}
    for run in runs.values():
        vit.check_site(Site.parse(run.interventions[0].site))
    d = vit.sites()[runs[layers[0]].interventions[0].site].shape[-1]
    name = f"{attribute}, {control}" if control else attribute
    targets, held_out = _labels(vit, train, label), _labels(vit, test, label)
    size = layers_at_once or len(layers)
    parts = [
        train_subspaces(
            vit, {n: runs[n] for n in group}, train, targets, d, training, name=name, progress=progress
        )
        for group in (layers[i : i + size] for i in range(0, len(layers), size))
    ]
    tensors = {key: tensor for part in parts for key, tensor in part.tensors.items()}
    losses = {layer: loss for part in parts for layer, loss in part.losses.items()}
    results = execute(
        vit, [*runs.values(), Run(name="clean", base=base)], test, tensors=tensors, progress=progress
    )
    table = table_of(results, held_out, runs, tensors, losses, attribute, control or "none")
    return assemble(
        table,
        tensors,
        provenance(
            results.provenance,
            training={**asdict(training), **_work(parts), **parts[0].provenance},
            attribute=attribute,
            control=control or "none",
            seed=seed,
        ),
        chance=1 / results.logits.shape[-1],
    )


def das_by_attribute(
    vit: HookedViT,
    data: Mapping[str, tuple[Any, Any]],
    *,
    controls: Sequence[Control | None] = (None, "wrong_object"),
    **settings: Any,
) -> CircuitResult:
    """Run `das` for several attributes, each with its controls, and put the tables into one.

    Args:
        vit: the model.
        data: attribute to its training and held-out pairs: ``{"shape": (train, test), "color": ...}``.
        controls: what to run for each attribute; None is the search itself.
        settings: further arguments of `das`, the same for all.

    Returns:
        The rows of every search; ``tensors`` holds ``<attribute>.rotation_<layer>``, and for a control
        ``<attribute>.<control>.rotation_<layer>``; gates likewise.

    Raises:
        SpecError, DataError: there is no attribute or no search, or an argument of `das` does not fit.
    """
    import pandas as pd

    if not data or not controls:
        raise SpecError("There is nothing to search: give at least one attribute and one entry of controls.")
    found = {
        (attribute, control): das(vit, train, test, attribute=attribute, control=control, **settings)
        for attribute, (train, test) in data.items()
        for control in controls
    }
    tensors = {
        ".".join(filter(None, (attribute, control, key))): tensor
        for (attribute, control), result in found.items()
        for key, tensor in result.tensors.items()
    }
    results = list(found.values())
    record = provenance(
        *(result.provenance for result in results),
        searches={f"{a}, {c or 'none'}": r.provenance["training"] for (a, c), r in found.items()},
    )
    del record["training"]
    table = pd.concat([result.table for result in results], ignore_index=True)
    return assemble(table, tensors, record, chance=float(results[0].summary["chance"]))


def interchange_run(
    layer: int,
    site: str,
    tokens: Tokens,
    source_tokens: Tokens,
    *,
    base: str = "base",
    source: str = "source",
    prefix: str = "",
) -> Run:
    """The run that exchanges a trained subspace, for `execute` with ``tensors=result.tensors``.

    Args:
        layer: the block.
        site: the site within it, without its layer.
        tokens, source_tokens: which tokens of base and source are paired.
        base, source: image columns.
        prefix: of the tensors' names, such as ``"shape."`` for a result of `das_by_attribute`.
    """
    swap = InjectSubspace(
        site=f"blocks.{layer}.{site}",
        tokens=tokens,
        source=source,
        source_tokens=source_tokens,
        basis=TensorRef(prefix + rotation_name(layer)),
        gate=TensorRef(prefix + gate_name(layer)),
    )
    return Run(name=f"layer_{layer}", interventions=(swap,), base=base)


def _check(control: str | None, layers: Sequence[int], layers_at_once: int | None) -> None:
    if control is not None and control not in CONTROLS:
        raise SpecError(
            f"Unknown control {control!r}.{suggest(control, CONTROLS)} Known: {', '.join(CONTROLS)}, or None."
        )
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise SpecError(f"layers={list(layers)}: name at least one block, each once, counted from 0.")
    if layers_at_once is not None and layers_at_once < 1:
        raise SpecError(f"layers_at_once={layers_at_once}: a group holds at least 1 layer.")


def _labels(vit: HookedViT, data: Any, column: str) -> Int[Tensor, " example"]:
    columns = Data(data, vit)
    columns.require(column, "das, label")
    rows = columns.integers(column)
    shape = vit.sites()["logits"].shape if vit.layout.output == "logits" else ()
    if len(shape) != 1:
        raise SpecError(
            f"{type(vit.module).__name__} gives {vit.layout.output}, not one score for each class; "
            "a search needs a decision to change."
        )
    wrong = [n for n, row in enumerate(rows) if len(row) != 1 or not 0 <= row[0] < shape[0]]
    if wrong:
        raise DataError(
            f"Column {column!r}, example {wrong[0]}: {rows[wrong[0]]} is no class; the model has classes "
            f"0 to {shape[0] - 1}."
        )
    return torch.tensor([row[0] for row in rows])


def _work(parts: Sequence[Trained]) -> dict[str, Any]:
    return {
        "steps": parts[0].steps,
        "optimizer": "adam, linear warm-up over a tenth of the steps, linear decay",
        "clean_evaluations": sum(part.clean_evaluations for part in parts),
    }
