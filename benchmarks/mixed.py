"""A thousand random composed runs on few examples, over the plan's floor.

Each run has one to three interventions of different kinds at random sites, layers and tokens.

    python -m benchmarks.mixed --model vit_small --runs 1000
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks import options
from benchmarks.floor import over_floor
from benchmarks.models import build, pairs
from benchmarks.report import Report

PRESETS = {
    "full": {"model": "vit_small", "examples": 2, "repeats": 5, "unit_images": 8, "runs": 1000},
    "cuda": {"model": "vit_base", "examples": 8, "unit_images": 256},
    "small": {"model": "vit_tiny", "examples": 1, "repeats": 3, "unit_images": 8, "runs": 150},
    "micro": {"model": "micro", "examples": 2, "repeats": 1, "unit_images": 2, "runs": 12},
}
SITES = ("resid_pre", "attn.z", "mlp.post", "mlp_out", "resid_post")
OPS = ("interchange", "add_direction", "inject_subspace", "ablate")


def given_tensors(vit: vmi.HookedViT, rank: int = 4) -> dict[str, Tensor]:
    """A direction and an orthonormal basis for every width that the sites have, and one gate."""
    draw = torch.Generator().manual_seed(3)
    tensors = {"gate": torch.rand(rank, generator=draw)}
    for site in SITES:
        d = vit.sites()[f"blocks.0.{site}"].shape[-1]
        tensors[f"direction{d}"] = torch.randn(d, generator=draw)
        tensors[f"basis{d}"] = torch.linalg.qr(torch.randn(d, rank, generator=draw)).Q
    return tensors


def random_runs(vit: vmi.HookedViT, n: int) -> list[vmi.Run]:
    """Random runs, the same ones at every call."""
    draw = np.random.default_rng(4)
    return [
        vmi.Run(name=f"run{k}", interventions=[_intervention(vit, draw) for _ in range(draw.integers(1, 4))])
        for k in range(n)
    ]


def _intervention(vit: vmi.HookedViT, draw: np.random.Generator) -> Any:
    site = str(draw.choice(SITES))
    full = f"blocks.{draw.integers(vit.layout.n_layers)}.{site}"
    d = vit.sites()[full].shape[-1]
    patches = draw.permutation(vit.layout.tokens.n_patches)[: draw.integers(1, 6)].tolist()
    choices: list[Any] = ["all", "cls", ["cls", *patches], {"column": "edited"}]
    where: dict[str, Any] = {"site": full, "tokens": choices[draw.integers(len(choices))]}
    if site == "attn.z":
        where["heads"] = [int(draw.integers(vit.layout.n_heads))]
    match draw.choice(OPS):
        case "interchange":
            return vmi.Interchange(**where, source="source")
        case "add_direction":
            return vmi.AddDirection(
                **where, vector=vmi.TensorRef(f"direction{d}"), alpha=float(draw.uniform(0.5, 2))
            )
        case "inject_subspace":
            return vmi.InjectSubspace(
                **where, source="source", basis=vmi.TensorRef(f"basis{d}"), gate=vmi.TensorRef("gate")
            )
    return vmi.Ablate(**where)


def main(argv: list[str] | None = None) -> Report:
    """Measure the runs."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--runs", type=int, help="number of runs")
    parser.add_argument("--unit-images", type=int, help="images of one plain forward")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("mixed", f"Random composed runs, {chosen.model}", chosen)
    module: Any = build(chosen.model, device=chosen.device, dtype=chosen.torch_dtype)
    vit = vmi.wrap(module)
    data = pairs(module, chosen.examples)
    runs = random_runs(vit, chosen.runs)
    over_floor(report, f"{chosen.runs} runs", vit, runs, data, chosen, tensors=given_tensors(vit), checked=24)
    report.finish()
    return report


if __name__ == "__main__":
    main()
