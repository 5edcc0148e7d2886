"""Causal tracing: every block output at each of 50 positions, restored in corrupted images, over the floor.

Once with images that are corrupted beforehand, and once with noise that every run adds at the embedding.

    python -m benchmarks.causal_tracing --model vit_small --examples 4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import vit_mechinterp as vmi
from benchmarks import options
from benchmarks.floor import over_floor
from benchmarks.models import build, images
from benchmarks.report import Report

PRESETS = {
    "full": {"model": "vit_small", "examples": 4, "repeats": 5, "unit_images": 8, "positions": 50},
    "cuda": {"model": "vit_base", "examples": 16, "unit_images": 256},
    "small": {"model": "vit_tiny", "examples": 1, "repeats": 3, "unit_images": 8, "positions": 12},
    "micro": {"model": "micro", "examples": 2, "repeats": 1, "unit_images": 2, "positions": 4},
}


def main(argv: list[str] | None = None) -> Report:
    """Measure the grid."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--positions", type=int, help="patches of the grid, spread evenly")
    parser.add_argument("--unit-images", type=int, help="images of one plain forward")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("causal_tracing", f"Causal-tracing grid, {chosen.model}", chosen)
    module: Any = build(chosen.model, device=chosen.device, dtype=chosen.torch_dtype)
    vit = vmi.wrap(module)
    clean = images(module, chosen.examples, 0)
    data = {"clean": clean, "corrupted": clean + images(module, chosen.examples, 1)}
    patches = torch.linspace(0, vit.layout.tokens.n_patches - 1, chosen.positions).round().long().tolist()
    places = [(layer, patch) for layer in range(vit.layout.n_layers) for patch in patches]
    noise = vmi.AddDirection(site="embed", vector=vmi.TensorRef(name="noise"), alpha=4.0)
    tensors = {"noise": torch.randn(vit.layout.d_model, generator=torch.Generator().manual_seed(2))}
    name = f"{vit.layout.n_layers} layers x {chosen.positions} positions"
    over_floor(report, name, vit, _restored(places, "corrupted", []), data, chosen)
    name = f"{name}, corrupted by each run"
    over_floor(report, name, vit, _restored(places, "clean", [noise]), data, chosen, tensors=tensors)
    report.finish()
    return report


def _restored(
    places: Sequence[tuple[int, int]], base: str, before: Sequence[vmi.Intervention]
) -> list[vmi.Run]:
    """Runs that put one patch back at one block output, behind what they all begin with."""
    return [
        vmi.Run(
            name=f"layer{layer}.patch{patch}",
            base=base,
            interventions=[
                *before,
                vmi.Interchange(site=f"blocks.{layer}.resid_post", tokens=[patch], source="clean"),
            ],
        )
        for layer, patch in places
    ]


if __name__ == "__main__":
    main()
