"""Causal tracing: every block output at each of 50 positions, restored in corrupted images, over the floor.

    python -m benchmarks.causal_tracing --model vit_small --examples 4
"""

from __future__ import annotations

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
    runs = [
        vmi.Run(
            name=f"layer{layer}.patch{patch}",
            base="corrupted",
            interventions=[
                vmi.Interchange(site=f"blocks.{layer}.resid_post", tokens=[patch], source="clean")
            ],
        )
        for layer in range(vit.layout.n_layers)
        for patch in patches
    ]
    name = f"{vit.layout.n_layers} layers x {chosen.positions} positions"
    over_floor(report, name, vit, runs, data, chosen)
    report.finish()
    return report


if __name__ == "__main__":
    main()
