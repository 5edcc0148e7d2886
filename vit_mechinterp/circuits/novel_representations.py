"""Novel representations: does the decision take a vector in the subspace that no image ever put there?

Lepori et al. 2024, section 5 and Fig. 4. In the subspaces that `das` trained, both objects of a pair get the
same novel vector where the answer should become "same", and two different ones where it should become
"different". A decision that compares what stands in the subspace, whatever it is, follows; one that knows a
list of values does not.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.backdrop import backdrop_of
from vit_mechinterp.circuits.das_data import labels_of, pairs_by_attribute
from vit_mechinterp.circuits.novel_data import Items, items_of, object_values
from vit_mechinterp.circuits.novel_result import SUBSPACE, WHOLE, assemble
from vit_mechinterp.circuits.novel_vectors import METHODS, Method, novel_vectors
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import bootstrap_ratio
from vit_mechinterp.circuits.subspaces import Subspace, alignment_result, trained_subspaces
from vit_mechinterp.engine import execute
from vit_mechinterp.errors import DataError, SpecError, suggest
from vit_mechinterp.spec import InjectSubspace, Run, TensorRef, TokenBox, Tokens

if TYPE_CHECKING:
    from vit_mechinterp.engine import ActivationStore
    from vit_mechinterp.model import HookedViT

__all__ = ["METHODS", "Draws", "Method", "novel_representations"]

Draws = Literal["example", "batch"]
_EDITED, _OTHER, _SOURCE = (TokenBox(box=f"{name}_box") for name in ("edited", "other", "source"))
_BYTES: Final = 2**30
"""Bytes of vectors that are held at once."""


@dataclass(frozen=True)
class _Cell:
    """One place, method and way of writing: what a row of the table is about."""

    subspace: Subspace
    space: str
    method: Method

    def run_name(self, seed: int) -> str:
        own = self.subspace
        place = f"layer {own.layer}, seed {own.seed}"
        return f"{own.attribute}, {self.space}, {self.method}, {place}, draw {seed}"

    def basis(self) -> Float[Tensor, "*token d r"]:
        own = self.subspace
        return own.basis if self.space == SUBSPACE else torch.eye(own.gate.shape[-1])

    def gate(self) -> Float[Tensor, "token r"] | None:
        return self.subspace.basis_gate if self.space == SUBSPACE else None

    @property
    def rank(self) -> int | float:
        return self.subspace.rank if self.space == SUBSPACE else self.subspace.gate.shape[-1]

    def vectors(self, values: Tensor, n: int, seed: int) -> Tensor:
        """``n`` novel vectors in the coordinates of the basis, from objects' values ``[item, token, d]``."""
        own = self.subspace
        path = (zlib.crc32(own.attribute.encode()), own.seed, own.layer, METHODS.index(self.method))
        random = np.random.default_rng((seed, *path, self.space == WHOLE))
        basis = self.basis()
        values = values.float()
        tied = basis.ndim == 2
        coordinates = values @ basis if tied else torch.einsum("itd,tdr->itr", values, basis)
        return novel_vectors(self.method, coordinates, n, random, tied=tied)


def novel_representations(
    vit: HookedViT,
    data: Mapping[str, tuple[Any, Any]],
    subspaces: CircuitResult | str | Path,
    *,
    layers: Sequence[int] | None = None,
    methods: Sequence[Method] = METHODS,
    whole_residual: bool = False,
    draws: Draws = "example",
    draw_batch: int = 64,
    seeds: Sequence[int] = (0,),
    tokens: Tokens = _EDITED,
    other_tokens: Tokens = _OTHER,
    source_tokens: Tokens = _SOURCE,
    base: str = "base",
    source: str = "source",
    label: str = "counterfactual_label",
    judgement: str | None = None,
    stages: CircuitResult | None = None,
    store: ActivationStore | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Write novel vectors into trained subspaces of both objects of a pair, and measure how often the answer
    follows (Lepori et al. 2024, Fig. 4).

    Args:
        vit: the model that the subspaces were trained on.
        data: attribute to (validation pairs, held-out pairs): from the source objects of the first come the
            vectors that novel ones are made of, on the second the answers are measured (the paper's ``val``
            and ``test_iid``).
        subspaces: a result of `das` or `das_by_attribute`, or the folder that it was saved in. Those of every
            seed are used, those of controls are not.
        layers: which layers; all that were searched if left out.
        methods: how vectors are made, see `novel_vectors`.
        whole_residual: also write them over the whole residual stream, as a baseline without a subspace.
        draws: two vectors for every ``"example"``, or for every ``"batch"`` of ``draw_batch`` examples, as in
            the published code, where few draws decide.
        seeds: of the draws; accuracies are means over them.
        tokens, other_tokens: the edited object and its partner in the base image.
        source_tokens: the source object in the source image.
        base, source: image columns.
        label: the column of classes that the intervention should lead to.
        judgement: the column of the pair's relation before the edit (1 same, 0 different); left out,
            ``intermediate_judgement`` if there is such a column (relational match to sample), else the
            opposite of the counterfactual label (discrimination).
        stages: a result of `attention_stages` on this model, whose global scores colour the layers.
        store: where clean values are read from if they are there, and kept if they are not.
        progress: show bars if it takes longer than two seconds.

    Returns:
        A table of one row per attribute, space ("subspace" or "whole residual"), method, seed of the
        subspace, and layer: ``attribute, space, method, seed, layer, site, accuracy, accuracy_low,
        accuracy_high`` (95 % bootstrap interval over draws and examples; over batches with ``"batch"``),
        ``rank`` (the mean over tokens where each has a subspace), ``no_effect`` (accuracy if nothing were
        changed), ``draws`` (pairs of vectors) and ``n``.
        Figure: ``novel_representations``.

    Raises:
        SpecError, DataError: before the first forward, if anything does not fit: subspaces of another model,
            an attribute or layer that was not searched, objects of unequal numbers of tokens.
    """
    data = pairs_by_attribute(data, "novel_representations", "validation pairs, held-out pairs")
    _check(methods, draws, draw_batch, seeds)
    found = alignment_result(subspaces, vit)
    heat = backdrop_of(stages, vit)
    places = {attribute: trained_subspaces(found, attribute, layers) for attribute in data}
    labels = labels_of(vit, [test for _, test in data.values()], label, "novel_representations, label")
    items = {
        attribute: items_of(
            vit, *pair, labels[id(pair[1])], tokens=(tokens, other_tokens), source_tokens=source_tokens,
            base=base, source=source, judgement=judgement, size=draw_batch if draws == "batch" else 1,
        )
        for attribute, pair in data.items()
    }  # fmt: skip
    _check_tokens(vit, places, items)
    rows: list[dict[str, Any]] = []
    origins = []
    for attribute, own in items.items():
        how: dict[str, Any] = {"store": store, "progress": progress}
        sites = [subspace.site for subspace in places[attribute]]
        values, origin = object_values(vit, own.values, sites, source, source_tokens, **how)
        spaces = (SUBSPACE, WHOLE) if whole_residual else (SUBSPACE,)
        cells = [_Cell(*chosen) for chosen in product(places[attribute], spaces, methods)]
        hits, records = _answers(vit, cells, values, own, seeds, (tokens, other_tokens), base, how)
        rows += _rows(cells, hits, own, seeds)
        origins += [origin, *records]
    import pandas as pd

    record = provenance(
        *origins,
        subspaces=found.provenance.get("tensors") or found.provenance.get("spec"),
        draws=draws,
        draw_batch=draw_batch if draws == "batch" else None,
        seeds=list(seeds),
        methods=list(methods),
    )
    return assemble(pd.DataFrame(rows), record, float(found.summary["chance"]), heat)


def _answers(
    vit: HookedViT,
    cells: Sequence[_Cell],
    values: Mapping[str, Tensor],
    items: Items,
    seeds: Sequence[int],
    tokens: tuple[Tokens, Tokens],
    base: str,
    how: Mapping[str, Any],
) -> tuple[dict[str, Tensor], list[Mapping[str, Any]]]:
    """Which examples every run answers as wanted, by the name of the run, and the clean one."""
    hits: dict[str, Tensor] = {}
    records = []
    for runs, tensors in _groups(cells, values, items, seeds, tokens, base):
        results = execute(vit, [*runs, Run(name="clean", base=base)], items.test, tensors=tensors, **how)
        hits |= {run: results[run].argmax(dim=-1) == items.labels for run in results.run_names}
        records.append(results.provenance)
    return hits, records


def _groups(
    cells: Sequence[_Cell],
    values: Mapping[str, Tensor],
    items: Items,
    seeds: Sequence[int],
    tokens: tuple[Tokens, Tokens],
    base: str,
) -> Iterator[tuple[list[Run], dict[str, Tensor]]]:
    """Runs with their tensors, all of them together as long as the vectors fit."""
    runs: list[Run] = []
    tensors: dict[str, Tensor] = {}
    for cell, seed in product(cells, seeds):
        name, site = cell.run_name(seed), cell.subspace.site
        basis, gate = cell.basis(), cell.gate()
        if basis.shape[-1] == 0:
            runs.append(Run(name=name, base=base))  # nothing is open, so nothing is written
            continue
        shared = f"{cell.space}, {cell.subspace.attribute}, {site}, {cell.subspace.seed}"
        tensors[shared] = basis
        if gate is not None:
            tensors[f"{shared}, gate"] = gate
        tensors[name] = cell.vectors(values[site], 2 * items.n_draws, seed)
        edits = tuple(
            InjectSubspace(
                site=site,
                tokens=selector,
                basis=TensorRef(shared),
                gate=None if gate is None else TensorRef(f"{shared}, gate"),
                vectors=TensorRef(name),
                choose={"column": column},
            )
            for selector, column in zip(tokens, items.choices, strict=True)
        )
        runs.append(Run(name=name, interventions=edits, base=base))
        if sum(tensor.nbytes for tensor in tensors.values()) > _BYTES:
            yield runs, tensors
            runs, tensors = [], {}
    if runs:
        yield runs, tensors


def _rows(
    cells: Sequence[_Cell], hits: Mapping[str, Tensor], items: Items, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Accuracies with their intervals: what was drawn together is resampled together."""
    unit = np.asarray(items.units)
    counts = np.bincount(unit).astype(float)
    sums = []
    for cell in cells:
        per_seed = [np.bincount(unit, weights=hits[cell.run_name(seed)].double().numpy()) for seed in seeds]
        # An example's draws share its image; batches of several seeds share nothing but the model.
        sums.append(np.mean(per_seed, axis=0) if items.size == 1 else np.concatenate(per_seed))
    sizes = counts if items.size == 1 else np.tile(counts, len(seeds))
    means = np.array(sums).sum(axis=1) / sizes.sum()
    low, high = bootstrap_ratio(np.array(sums), sizes, seed=min(seeds))
    no_effect = float(hits["clean"].double().mean())
    return [
        {
            "attribute": cell.subspace.attribute,
            "space": cell.space,
            "method": cell.method,
            "seed": cell.subspace.seed,
            "layer": cell.subspace.layer,
            "site": cell.subspace.site,
            "accuracy": float(means[k]),
            "accuracy_low": float(low[k]),
            "accuracy_high": float(high[k]),
            "rank": cell.rank,
            "no_effect": no_effect,
            "draws": items.n_draws * len(seeds),
            "n": len(unit),
        }
        for k, cell in enumerate(cells)
    ]


def _check_tokens(
    vit: HookedViT, places: Mapping[str, Sequence[Subspace]], items: Mapping[str, Items]
) -> None:
    """Raise DataError unless a subspace for each token fits the objects."""
    for attribute, own in items.items():
        for subspace in places[attribute]:
            if subspace.n_tokens not in (None, own.n_tokens):
                raise DataError(
                    f"novel_representations, {attribute}: the search gave each of {subspace.n_tokens} tokens "
                    f"a subspace of its own (tied=False), and objects here have {own.n_tokens}. Give stimuli "
                    "of the search's geometry."
                )


def _check(methods: Sequence[str], draws: str, draw_batch: int, seeds: Sequence[int]) -> None:
    for method in methods:
        if method not in METHODS:
            raise SpecError(
                f"There is no method {method!r}.{suggest(method, METHODS)} Methods: {', '.join(METHODS)}."
            )
    if not methods or len(set(methods)) != len(methods):
        raise SpecError(f"methods={list(methods)}: name at least one, each once.")
    if draws not in ("example", "batch"):
        raise SpecError(f"draws={draws!r} is not known. Choose 'example' or 'batch'.")
    if draw_batch < 1:
        raise SpecError(f"draw_batch={draw_batch}: a batch holds at least 1 example.")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise SpecError(f"seeds={list(seeds)}: name at least one, each once, none negative.")
