"""Composed runs that fit every supported model: what the parity matrix carries out on every backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run

__all__ = ["parity_data", "parity_runs"]


def parity_data(vit: HookedViT, n: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random images ``base`` and ``source``, patch indices ``here`` and ``there``, and ``kind``."""
    draw = torch.Generator().manual_seed(seed)
    patches = vit.layout.tokens.n_patches
    k = min(3, patches)
    shape = vit.layout.tokens.input_shape
    return {
        "base": torch.randn(n, *shape, generator=draw),
        "source": torch.randn(n, *shape, generator=draw),
        "here": torch.stack([torch.randperm(patches, generator=draw)[:k] for _ in range(n)]),
        "there": torch.stack([torch.randperm(patches, generator=draw)[:k] for _ in range(n)]),
        "kind": torch.arange(n) % 2,
    }


def parity_runs(vit: HookedViT, seed: int = 0) -> tuple[dict[str, list[Run]], dict[str, Tensor]]:
    """Runs by what they show, and the tensors that they name.

    Every list is one experiment: its last run is the one to compare, those before it are read by it. Runs at
    sites that the model lacks are left out.

    Args:
        vit: the model; its depth and the width of its sites decide layers and tensors.
        seed: of the tensors.
    """
    n_layers, d = vit.layout.n_layers, vit.layout.d_model
    early, late = 0, n_layers - 1
    head = vit.layout.n_heads - 1
    here, there = {"column": "here"}, {"column": "there"}
    moved = {"tokens": here, "source": "source", "source_tokens": there}
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        "direction": torch.randn(d, generator=draw),
        "directions": torch.randn(2, d, generator=draw),
        "basis": torch.linalg.qr(torch.randn(d, 3, generator=draw)).Q,
        "gate": torch.tensor([1.0, 0.5, 0.8]),
        "points": torch.randn(2, 3, generator=draw),
    }
    all_keys: dict[str, Any] = {"op": "interchange", "source": "source"}

    def one(*interventions: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"name": "run", "interventions": list(interventions)}]

    early_swap = {"op": "interchange", "site": f"blocks.{early}.resid_post", **moved}
    documents = {
        "interchange of patches at resid_post": one(early_swap),
        "interchange at resid_mid": one(
            {**all_keys, "site": f"blocks.{early}.resid_mid", "tokens": "patches"}
        ),
        "interchange of one head's attn.z": one(
            {**all_keys, "site": f"blocks.{early}.attn.z", "heads": [head], "tokens": "patches"}
        ),
        "interchange of one head's attn.q": one(
            {**all_keys, "site": f"blocks.{early}.attn.q", "heads": [head]}
        ),
        "interchange of attn.pattern": one(
            {**all_keys, "site": f"blocks.{early}.attn.pattern", "heads": [head]}
        ),
        "ablate columns of attn.scores (zero)": one(
            {"op": "ablate", "site": f"blocks.{early}.attn.scores", "keys": "patches"}
        ),
        "interchange of one head's attn.result": one(
            {**all_keys, "site": f"blocks.{early}.attn.result", "heads": [head]}
        ),
        "interchange at mlp.post": one({**all_keys, "site": f"blocks.{early}.mlp.post", "tokens": here}),
        "add_direction at embed": one(
            {"op": "add_direction", "site": "embed", "vector": "direction", "alpha": 2.0, "tokens": here}
        ),
        "add_direction at resid_pre, chosen per example": one(
            {"op": "add_direction", "site": f"blocks.{late}.resid_pre", "vector": "directions",
             "choose": {"column": "kind"}}
        ),
        "inject_subspace at resid_post, gated, from another image": one(
            {"op": "inject_subspace", "site": f"blocks.{early}.resid_post", "basis": "basis", "gate": "gate",
             **moved}
        ),
        "inject_subspace at resid_pre, given points": one(
            {"op": "inject_subspace", "site": f"blocks.{late}.resid_pre", "basis": "basis",
             "vectors": "points", "choose": {"column": "kind"}}
        ),
        "ablate attn_out (zero)": one({"op": "ablate", "site": f"blocks.{early}.attn_out"}),
        "ablate mlp_out (mean)": one({"op": "ablate", "site": f"blocks.{early}.mlp_out", "method": "mean"}),
        "ablate ln1 (resample)": one(
            {"op": "ablate", "site": f"blocks.{early}.ln1", "method": "resample", "tokens": here}
        ),
        "path patching: a run reads another run": [
            {"name": "edited", "interventions": [early_swap]},
            {"name": "run", "interventions": [
                {"op": "interchange", "site": f"blocks.{late}.resid_pre", "source": {"run": "edited"},
                 "tokens": "patches"},
                {"op": "interchange", "site": f"blocks.{late}.attn_out", "source": {"run": "edited"}},
            ]},
        ],
        "four interventions in one run": one(
            {"op": "add_direction", "site": "embed", "vector": "direction"},
            early_swap,
            {"op": "ablate", "site": f"blocks.{early}.mlp_out", "tokens": here},
            {"op": "inject_subspace", "site": f"blocks.{late}.resid_pre", "basis": "basis", **moved},
        ),
    }  # fmt: skip
    kept: dict[str, list[Run]] = {}
    for name, own in documents.items():
        runs = [Run.model_validate(document) for document in own]
        sites = {spec.site for run in runs for spec in run.interventions}
        if not sites & set(vit.layout.absent):
            kept[name] = runs
    return kept, tensors
