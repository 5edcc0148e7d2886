"""Probe and intervention: is the relation of two objects readable from their tokens, and is it used?

Lepori et al. (2024), section 5 and Figs. 5, 37 and 39. At every layer a linear probe reads from the
concatenated tokens of a pair whether its objects are the same. Then the direction of the *other* relation,
the probe's row for it, is added to the same tokens. If the model goes on from the relation as the probe reads
it, its answer is turned round; adding the direction of the pair's own relation is the control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from vit_mechinterp.circuits.backdrop import backdrop_of
from vit_mechinterp.circuits.linear_probes import LinearProbes, ProbeTraining, train_probes
from vit_mechinterp.circuits.object_pairs import (
    ObjectPair,
    PairedData,
    binary_column,
    default_pairs,
    with_pairs,
)
from vit_mechinterp.circuits.probe_sites import PairSites, pair_sites
from vit_mechinterp.circuits.probe_words import captions, description, draw, findings, measured_table
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine import execute
from vit_mechinterp.engine.binding.checks import refuse_train_mode
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from vit_mechinterp.engine import Results

__all__ = ["PUBLISHED", "TINY", "ObjectPair", "draw", "probe_intervention"]

PUBLISHED: Final[Mapping[str, str]] = {"site": "resid_pre", "intervene_at": "resid_post"}
"""The sites of the published code, which probes the input of a block and intervenes at its output:
``probe_intervention(vit, train, test, **PUBLISHED)``."""

TINY: Final[Mapping[str, Any]] = {"alphas": (1.0, 16.0, 64.0)}
"""Strengths for small models and a few hundred images: after so few steps the rows of a probe are short
beside the activations (``relative_length`` in the table)."""

_CIRCUIT = "probe_intervention"


def probe_intervention(
    vit: HookedViT,
    train: Any,
    test: Any = None,
    *,
    site: str = "resid_post",
    intervene_at: str | None = None,
    layers: Sequence[int] | None = None,
    pairs: Mapping[str, ObjectPair] | None = None,
    alphas: Sequence[float] = (1.0,),
    label: str = "label",
    base: str = "base",
    stages: CircuitResult | None = None,
    epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 1e-2,
    weight_decay: float = 1e-2,
    held_out: float = 0.5,
    resamples: int = 2000,
    seed: int = 0,
    rows_at_once: int | Literal["auto"] = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Probe every layer for the relation of a pair, and turn it round along the probe.

    Every pair of every image is an example of the probe: the tokens of its first and of its second object,
    one after the other. The intervention adds ``alpha`` times the probe's row for the opposite relation to
    the same tokens of one pair at a time, with its bias left out. It succeeds if the model then answers
    ``1 - label``, whatever it answered before.

    Args:
        vit: the model; its output has one logit per class, 0 and 1.
        train: images to train the probes on (a ``datasets.Dataset`` or a mapping of columns).
        test: images to measure on; if left out, the last ``held_out`` of ``train`` are, and the others are
            trained on.
        site: the site within each block that is probed, a name without its layer. Heads are taken side by
            side.
        intervene_at: the site within the same block that the direction is added at; the probed one if left
            out. The published code probes ``resid_pre`` and adds at ``resid_post`` (``**PUBLISHED``).
        layers: blocks to analyse; all of them if left out.
        pairs: name to `ObjectPair`; by default the ``sample`` and ``display`` pair of relational match to
            sample (columns ``sample_relation``, ``display_relation``), or else the ``only`` pair of
            discrimination, whose relation is ``label``.
        alphas: strengths, in lengths of the probe's row.
        label: the column of the model's classes.
        base: the image column.
        stages: a result of `attention_stages` on the same model, whose global score colours the layers.
        epochs, batch_size, learning_rate, weight_decay, seed: of the probes, see `ProbeTraining`; the
            defaults are the published ones, ``**TINY`` suits small models.
        held_out: the share of ``train`` that is measured on where there is no ``test``.
        resamples: of the bootstrap over images; intervals hold 95 %.
        rows_at_once: most rows in one forward, or ``"auto"``.
        progress: show bars if it takes longer than two seconds.

    Returns:
        Table, one row per layer, pair (and ``all`` of them, if there are several), quantity and strength:
        ``layer, site, intervention_site, alpha`` (missing for the probe), ``pair, quantity`` (``probe
        accuracy``, ``success``, ``control``), ``value`` with its interval, ``n`` (images), ``no_effect`` (the
        success if nothing were changed), ``relative_length`` (of what is added, as a multiple of the mean
        length of the activation that is probed) and, with ``stages``, ``global_score`` of the layer.
        ``tensors`` holds ``SITE.weight`` ``[2, tokens * features]`` and ``SITE.bias``. Figures: ``alpha_1``
        and so on, one per strength; ``pairs_alpha_1`` where there are several pairs; ``alphas`` where there
        are several strengths.

    Raises:
        SpecError: a site or a strength does not fit, or ``stages`` is the result of another circuit.
        DataError: a column is missing or holds something else, all pairs have one relation, their tokens do
            not pair up, or ``stages`` is of another model. Both are raised before the first forward on an
            image.
    """
    check_resampling(resamples, seed)
    refuse_train_mode(vit)
    training = ProbeTraining(epochs, batch_size, learning_rate, weight_decay, seed)
    _check_alphas(alphas)
    places = pair_sites(vit, site, intervene_at, layers)
    backdrop = backdrop_of(stages, vit)
    if test is None:
        train, test = _parted(train, vit, held_out)
    known = default_pairs(Data(train, vit), _CIRCUIT) if pairs is None else dict(pairs)
    fitted, held = (with_pairs(data, vit, known, base, _CIRCUIT) for data in (train, test))
    _check_pairs(fitted, held)
    labels = binary_column(Data(test, vit), label, _CIRCUIT)
    _check_outputs(vit)
    for paired in (fitted, held):
        Data(paired.data, vit).check_images(base)

    names = list(known)
    read = [Run(name=f"clean, {name}", base=base, capture=places.captures(_tokens(name))) for name in names]
    how: dict[str, Any] = {"batch_size": rows_at_once, "progress": progress}
    shown = [run.model_copy(update={"output": False}) for run in read]
    seen = execute(vit, shown, fitted.data, **how)
    features = [_features(seen, places, layer, names) for layer in places.layers]
    probes = train_probes(
        features, fitted.relations.flatten(), training, device=vit.device, progress=progress
    )
    del features
    edits = {
        (name, layer, float(alpha), quantity): Run(
            name=f"{name}, layer {layer}, alpha {alpha:g}, {quantity}",
            interventions=places.add(layer, _tokens(name), toward(name), float(alpha)),
            base=base,
        )
        for name in names
        for layer in places.layers
        for alpha in alphas
        for quantity, toward in (("success", PairedData.opposite), ("control", PairedData.own))
    }
    given = {
        key: tensor
        for layer, weight in zip(places.layers, probes.weight, strict=True)
        for key, tensor in places.vectors(layer, weight, held.n_tokens).items()
    }
    results = execute(vit, [*read, *edits.values()], held.data, tensors=given, **how)
    right, lengths = _read(results, places, names, probes, held.relations)
    table = measured_table(
        places,
        names,
        right,
        {key: (results[run.name].argmax(dim=-1) == 1 - labels).numpy() for key, run in edits.items()},
        (results[read[0].name].argmax(dim=-1) == 1 - labels).numpy(),
        lengths,
        backdrop,
        resamples=resamples,
        seed=seed,
    )
    summary, found = findings(table)
    return CircuitResult(
        name=_CIRCUIT,
        title="Probe and intervention",
        table=table,
        tensors={
            f"{places.probed[layer]}.{part}": tensor[index]
            for part, tensor in (("weight", probes.weight), ("bias", probes.bias))
            for index, layer in enumerate(places.layers)
        },
        provenance=provenance(
            results.provenance,
            trained_on=seen.provenance,
            training={**vars(training), "optimizer": "adamw"},
            site=site,
            intervene_at=places.intervene_at,
            alphas=list(alphas),
            pairs={name: [str(p.first), str(p.second), p.relation] for name, p in known.items()},
            stages=None if stages is None else stages.provenance,
            resamples=resamples,
            seed=seed,
        ),
        summary=summary,
        description=f"{description(places)}\n\n{found}",
        captions=captions(table, places),
        draw=draw,
    )


def _tokens(pair: str) -> dict[str, str]:
    return {"column": PairedData.tokens_of(pair)}


def _features(
    results: Results, places: PairSites, layer: int, names: Sequence[str]
) -> Float[Tensor, "example feature"]:
    """Return the concatenated tokens of every pair of every image, pair by pair."""
    read = [results.captures[f"clean, {name}"][places.probed[layer]] for name in names]
    return torch.cat([value.flatten(1).float() for value in read])


def _read(
    results: Results,
    places: PairSites,
    names: Sequence[str],
    probes: LinearProbes,
    relations: Int[Tensor, "pair example"],
) -> tuple[dict[tuple[str, int], Any], dict[int, float]]:
    """Return which images the probe of each layer is right on, by pair; and how long its rows are beside the
    activations, by layer."""
    found, lengths = {}, {}
    for index, layer in enumerate(places.layers):
        own = LinearProbes(probes.weight[index : index + 1], probes.bias[index : index + 1])
        features = _features(results, places, layer, names)
        lengths[layer] = float(own.weight.norm(dim=-1).mean() / features.norm(dim=-1).mean())
        right = own.right([features], relations.flatten())
        for name, values in zip(names, right[0].reshape(len(names), -1).numpy(), strict=True):
            found[name, layer] = values
    return found, lengths


def _check_alphas(alphas: Sequence[float]) -> None:
    numbers = torch.tensor([float(alpha) for alpha in alphas])
    if len(numbers) == 0 or len(set(numbers.tolist())) < len(numbers) or not bool(numbers.isfinite().all()):
        raise SpecError(f"alphas={list(alphas)}: give at least one strength, finite, each once.")


def _check_pairs(train: PairedData, test: PairedData) -> None:
    kinds = sorted(set(train.relations.flatten().tolist()))
    if len(kinds) < 2:
        raise DataError(
            f"All pairs to train on are {('different', 'same')[kinds[0]]}; a probe for their relation needs "
            "both kinds."
        )
    if train.n_tokens != test.n_tokens:
        raise DataError(
            f"A pair has {train.n_tokens} tokens in the images to train on and {test.n_tokens} in those to "
            "measure on. Use stimuli of one geometry."
        )


def _check_outputs(vit: HookedViT) -> None:
    with torch.no_grad():
        shape = tuple(vit(vit.blank(1)).shape[1:])
    if len(shape) != 1 or shape[0] < 2:
        raise SpecError(
            f"{_CIRCUIT} needs an answer to turn round: one logit for each of the classes 0 and 1. "
            f"{type(vit.module).__name__} gives {vit.layout.output} of shape {shape} per example."
        )


def _parted(data: Any, vit: HookedViT, held_out: float) -> tuple[Any, Any]:
    """Cut the data in two, the last part to measure on; neighbours, which can share places, stay together."""
    n = Data(data, vit).n
    cut = n - round(n * held_out) if 0 < held_out < 1 else 0
    if not 0 < cut < n:
        raise SpecError(f"held_out={held_out} leaves no images to train or to measure on; there are {n}.")
    if isinstance(data, Mapping):
        parts = [{k: column[part] for k, column in data.items()} for part in (slice(cut), slice(cut, n))]
        return parts[0], parts[1]
    return data.select(range(cut)), data.select(range(cut, n))
