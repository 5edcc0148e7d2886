"""Every head's z interchanged at all tokens, one head a run, over the plan's floor.

    python -m benchmarks.head_sweep --model vit_base --examples 4
"""

from __future__ import annotations

from typing import Any

import vit_mechinterp as vmi
from benchmarks import options
from benchmarks.floor import over_floor
from benchmarks.models import build, pairs
from benchmarks.report import Report

PRESETS = {
    "full": {"model": "vit_base", "examples": 4, "repeats": 5, "unit_images": 8},
    "cuda": {"examples": 64, "unit_images": 256},
    "small": {"model": "vit_tiny", "examples": 2, "repeats": 3, "unit_images": 8},
    "micro": {"model": "micro", "examples": 2, "repeats": 1, "unit_images": 2},
}


def main(argv: list[str] | None = None) -> Report:
    """Measure the sweep."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--unit-images", type=int, help="images of one plain forward")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("head_sweep", f"Head sweep, {chosen.model}", chosen)
    module: Any = build(chosen.model, device=chosen.device, dtype=chosen.torch_dtype)
    vit = vmi.wrap(module)
    runs = [
        vmi.Run(
            name=f"layer{layer}.head{head}",
            interventions=[vmi.Interchange(site=f"blocks.{layer}.attn.z", heads=[head], source="source")],
        )
        for layer in range(vit.layout.n_layers)
        for head in range(vit.layout.n_heads)
    ]
    name = f"{vit.layout.n_layers} x {vit.layout.n_heads} heads"
    over_floor(report, name, vit, runs, pairs(module, chosen.examples), chosen)
    report.finish()
    return report


if __name__ == "__main__":
    main()
