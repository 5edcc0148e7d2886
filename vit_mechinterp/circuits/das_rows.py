"""The rows of a distributed alignment search: what was measured of every trained subspace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vit_mechinterp.circuits.alignment import gate_name
from vit_mechinterp.circuits.reading import interval_columns
from vit_mechinterp.spec import Run

if TYPE_CHECKING:
    from vit_mechinterp.engine import Results

__all__ = ["NO_CONTROL", "rows_of"]

NO_CONTROL: Final = "none"


def rows_of(
    results: Results,
    labels: Int[Tensor, " example"],
    runs: Mapping[int, Run],
    tensors: Mapping[str, Tensor],
    losses: Mapping[int, float],
    prefix: str,
    facts: Mapping[str, object],
    split: str,
    variants: Mapping[str, Bool[Tensor, " example"]],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per layer of one search on one split.

    Args:
        results: held-out outputs of every run, and of a run called "clean".
        labels: the wanted classes.
        runs: by layer.
        tensors: the trained tensors by name.
        losses: the mean training loss by layer.
        prefix: what the names of the search's tensors begin with.
        facts: what is said of every row: what was searched, from which seed.
        split: which held-out data this is.
        variants: which examples belong to each kind of pair that has an accuracy of its own.
        seed: of the bootstrap over examples.
    """
    names = [*(run.name for run in runs.values()), "clean"]
    hits = torch.stack([results[name].argmax(dim=-1) == labels for name in names]).double()
    groups = {"accuracy": torch.ones(len(labels), dtype=torch.bool)}
    groups |= {f"accuracy_{name}": own for name, own in variants.items()}
    accuracies: dict[str, Any] = {}
    for name, own in groups.items():
        accuracies |= interval_columns(hits[:, own].numpy(), name=name, seed=seed)
    return [
        {
            **facts,
            "layer": layer,
            "site": run.interventions[0].site,
            "split": split,
            **{key: float(values[row]) for key, values in accuracies.items()},
            "rank": _rank(tensors[prefix + gate_name(layer)]),
            "loss": float(torch.nn.functional.cross_entropy(results[run.name], labels)),
            "train_loss": losses[layer],
            "no_effect": float(hits[-1].mean()),
            "n": len(labels),
        }
        for row, (layer, run) in enumerate(runs.items())
    ]


def _rank(gate: Tensor) -> int | float:
    """Open dimensions of a gate; the mean over tokens where each has its own."""
    return int(gate.sum()) if gate.ndim == 1 else float(gate.sum(dim=-1).mean())
