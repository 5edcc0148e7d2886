"""Runs that ablate: one part, a set of heads, single neurons, or tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from vit_mechinterp.circuits.kept_readings import KeptReadings, in_batches
from vit_mechinterp.circuits.patching_cells import n_heads_at
from vit_mechinterp.circuits.reading import merged_reasons
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError, UnsupportedSiteError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Ablate, InjectSubspace, Intervention, Run, TensorRef

__all__ = [
    "METHODS",
    "Ablated",
    "Head",
    "Method",
    "NeuronTensors",
    "ablate_heads",
    "ablation",
    "all_heads",
    "check_heads",
    "possible_methods",
]

Method: TypeAlias = Literal["zero", "mean", "resample"]
Head: TypeAlias = tuple[int, int]
"""A layer and a head."""

METHODS: tuple[Method, ...] = ("zero", "mean", "resample")
RESAMPLED = "resampled"
"""The column of other images that resampled neurons are read from."""


@dataclass(frozen=True)
class Ablated:
    """One part that is ablated, and how the table says it."""

    part: str
    site: str
    layer: int
    label: str
    head: int | None = None
    neuron: int | None = None
    tokens: Any = "all"

    def run(self, method: Method, base: str, seed: int) -> Run:
        """The run that ablates this part alone."""
        edit: Intervention
        if self.neuron is None:
            heads = None if self.head is None else (self.head,)
            edit = ablation(self.site, method, seed, tokens=self.tokens, heads=heads)
        else:
            edit = _neuron(self.site, self.neuron, method, base)
        return Run(name=f"{method}, {self.part}, {self.site}, {self.label}", interventions=(edit,), base=base)


def ablation(
    site: str, method: Method, seed: int, *, tokens: Any = "all", heads: Sequence[int] | None = None
) -> Ablate:
    """Return an `Ablate` whose seed is left out where it has no meaning."""
    seeds = {"seed": seed} if method == "resample" else {}
    return Ablate(site=site, method=method, tokens=tokens, heads=heads, **seeds)


def possible_methods(methods: Sequence[str], n: int) -> tuple[list[Method], dict[str, str]]:
    """Return the methods that ``n`` images allow, and reasons for those that they do not.

    Raises:
        SpecError: a method is none; DataError: the images allow none of them.
    """
    for method in methods:
        if method not in METHODS:
            raise SpecError(
                f"method={method!r} is not known.{suggest(str(method), METHODS)} Methods: "
                f"{', '.join(METHODS)}."
            )
    chosen = [method for method in METHODS if method in methods]
    if n > 1:
        return chosen, {}
    reason = "the mean of one image, and another image than the only one, is that image: give more images"
    allowed: list[Method] = [method for method in chosen if method == "zero"]
    if not allowed:
        raise DataError(f"With one image nothing can be ablated by {' or '.join(chosen)}: {reason}.")
    return allowed, {method: reason for method in chosen if method != "zero"}


def all_heads(vit: HookedViT) -> tuple[list[Head], dict[str, str]]:
    """Return every head of the model, and reasons for layers without a site for them.

    Raises:
        UnsupportedSiteError: no layer has one.
    """
    found: list[Head] = []
    left_out: dict[str, str] = {}
    for layer in range(vit.layout.n_layers):
        site = f"blocks.{layer}.attn.z"
        if site in vit.layout.absent:
            left_out[site] = vit.layout.absent[site]
        else:
            found += [(layer, head) for head in range(n_heads_at(vit, "attn.z", layer))]
    left_out = merged_reasons(left_out, vit.layout.n_layers)
    if not found:
        reasons = "; ".join(f"{site}: {reason}" for site, reason in left_out.items())
        raise UnsupportedSiteError(
            f"{type(vit.module).__name__} has no heads that could be ablated one by one: {reasons}."
        )
    return found, left_out


def check_heads(vit: HookedViT, heads: Iterable[Head]) -> list[Head]:
    """Return the heads, each once.

    Raises:
        SpecError: the model has no such head, or there is none; UnsupportedSiteError: that layer's heads
            cannot be told apart.
    """
    chosen = [(int(layer), int(head)) for layer, head in dict.fromkeys(tuple(entry) for entry in heads)]
    known, _ = all_heads(vit)
    for entry in chosen:
        if (reason := vit.layout.absent.get(f"blocks.{entry[0]}.attn.z")) is not None:
            raise UnsupportedSiteError(
                f"The heads of layer {entry[0]} cannot be ablated one by one: {reason}."
            )
        if entry not in known:
            raise SpecError(
                f"There is no head {entry[1]} in layer {entry[0]}; the model has layers 0 to "
                f"{vit.layout.n_layers - 1} with {vit.layout.n_heads} heads each. A head is (layer, head)."
            )
    if not chosen:
        raise SpecError("No head is named; give a list of (layer, head).")
    return chosen


def ablate_heads(name: str, heads: Iterable[Head], method: Method, base: str, seed: int) -> Run:
    """Return the run that ablates a set of heads at ``attn.z``, at all tokens; none for an empty set."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        by_layer.setdefault(layer, []).append(head)
    edits = [ablation(f"blocks.{n}.attn.z", method, seed, heads=own) for n, own in by_layer.items()]
    return Run(name=name, interventions=tuple(edits), base=base)


def _neuron(site: str, neuron: int, method: Method, base: str) -> InjectSubspace:
    """Write one coordinate of the MLP's hidden activations: a subspace of one axis."""
    basis = TensorRef(name=_basis(site, neuron))
    if method == "resample":
        return InjectSubspace(site=site, basis=basis, source=f"{base}_{RESAMPLED}")
    return InjectSubspace(
        site=site, basis=basis, vectors=TensorRef(name=f"{method} of {_basis(site, neuron)}")
    )


def _basis(site: str, neuron: int) -> str:
    return f"{site}, neuron {neuron}"


@dataclass
class NeuronTensors:
    """What ablating single neurons needs besides the specs: axes, means, and other images.

    Args:
        vit: the model.
        neurons: layer to neurons.
        base: the image column.
        seed: of the permutation that resampling takes images from, as `Ablate` draws it.
    """

    vit: HookedViT
    neurons: Mapping[int, Sequence[int]]
    base: str = "base"
    seed: int = 0

    def check(self) -> None:
        """Raise SpecError unless the model has these neurons; UnsupportedSiteError: it has no such site."""
        for layer, chosen in self.neurons.items():
            site = f"blocks.{layer}.mlp.post"
            self.vit.expand([site])
            width = self.vit.sites()[site].shape[-1]
            for neuron in chosen:
                if not 0 <= neuron < width:
                    raise SpecError(f"{site} has neurons 0 to {width - 1}; there is no neuron {neuron}.")

    def tensors(
        self, data: Any, methods: Sequence[Method], folder: str | Path | None = None
    ) -> dict[str, Tensor]:
        """Return axes, zeros and, per token, means over the images, by the names that the runs use."""
        found: dict[str, Tensor] = {}
        means = self._means(data, folder) if "mean" in methods and self.neurons else {}
        for layer, chosen in self.neurons.items():
            site = f"blocks.{layer}.mlp.post"
            width = self.vit.sites()[site].shape[-1]
            for neuron in chosen:
                name = _basis(site, neuron)
                found[name] = torch.eye(width)[:, [neuron]]
                if "zero" in methods:
                    found[f"zero of {name}"] = torch.zeros(1)
                if "mean" in methods:
                    found[f"mean of {name}"] = means[site][:, [neuron]]
        return found

    def with_other_images(self, data: Any) -> Any:
        """Return the data with a column of each image's stand-in under the seeded permutation."""
        name = f"{self.base}_{RESAMPLED}"
        order = np.random.default_rng(self.seed).permutation(Data(data, self.vit).n).tolist()
        if not isinstance(data, Mapping):
            return {own: data[own] for own in data.column_names} | {name: data.select(order)[self.base]}
        images = data[self.base]
        return {**data, name: images[order] if isinstance(images, Tensor) else [images[i] for i in order]}

    def _means(self, data: Any, folder: str | Path | None) -> dict[str, Tensor]:
        columns, sites = Data(data, self.vit), [f"blocks.{layer}.mlp.post" for layer in self.neurons]

        @torch.no_grad()
        def read(examples: list[int]) -> dict[str, Tensor]:
            _, cache = self.vit.run(columns.images(self.base, examples), capture=sites)
            return {site: cache[site].float().sum(dim=0) for site in sites}

        with KeptReadings(folder, self.vit, columns, [self.base], reading="sums", sites=sites) as kept:
            parts = [found for _, found in in_batches(self.vit, columns.n, read, kept, progress=False)]
        return {site: torch.stack([part[site].cpu() for part in parts]).sum(0) / columns.n for site in sites}
