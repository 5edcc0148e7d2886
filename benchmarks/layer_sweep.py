"""One intervention at every layer: vit_mechinterp, plain hooks, TransformerLens, nnsight and pyvene.

Interchange of four per-example tokens at every block output of a HuggingFace ViT. A figure is a time in plain
native forwards of the same images, measured around each repeat in the same process. Every way is first
checked to give the numbers of plain hooks. Each way runs in a process and on a model of its own.

    python -m benchmarks.layer_sweep --model vit_small --examples 8
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks import isolated, options
from benchmarks.measure import interleaved
from benchmarks.models import build, pairs
from benchmarks.plain import Plain, agree, tell_apart
from benchmarks.report import Report, Row

WAYS = {
    "vit_mechinterp": None,
    "hooks": None,
    "transformer_lens": "transformer_lens",
    "nnsight": "nnsight",
    "pyvene": "pyvene",
}
"""Ways, and the package that each needs."""

PRESETS = {
    "full": {"model": "vit_small", "examples": 8, "repeats": 7},
    "cuda": {"model": "vit_base", "examples": 64, "repeats": 15},
    "small": {"model": "vit_tiny", "examples": 2, "repeats": 3},
    "micro": {"model": "micro", "examples": 2, "repeats": 1},
}


def runs(n_layers: int) -> list[vmi.Run]:
    """The sweep."""
    swap = vmi.Interchange(
        site="blocks.0.resid_post",
        tokens={"column": "edited"},
        source="source",
        source_tokens={"column": "source_tokens"},
    )
    return [vmi.Run(name=f"layer{n}", interventions=[swap.at(layer=n)]) for n in range(n_layers)]


def ways(name: str, module: Any, data: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """The functions to time: ours, or those of a peer on a copy of the model."""
    if name != "vit_mechinterp":
        peer = importlib.import_module(f"benchmarks.peers.{name}")
        found: dict[str, Callable[[], Tensor]] = peer.ways(copy.deepcopy(module), data)
        return found
    vit = vmi.wrap(module)
    sweep = runs(vit.layout.n_layers)
    return {"vit_mechinterp": lambda: vmi.execute(vit, sweep, data, progress=False).logits}


@torch.no_grad()
def measure(name: str, chosen: Any, report: Report) -> None:
    """Check one way against plain hooks, then time it."""
    module: Any = build(chosen.model, device=chosen.device, dtype=chosen.torch_dtype)
    data = pairs(module, chosen.examples)
    vit = vmi.wrap(module)
    sweep = runs(vit.layout.n_layers)
    plan = vmi.plan(vit, sweep, data)
    plain = Plain(module, data)
    wanted = torch.stack([plain.run(run.model_dump(mode="json")) for run in sweep])
    clean = plain.clean("base")
    effects = (wanted[:-1] - clean).abs().amax(dim=(1, 2)) / clean.abs().max()
    assert effects.min() > 1e-3, f"an intervention had no effect to speak of: {effects.tolist()}"
    assert not (wanted[-1] - clean).any(), "patches behind the last block reached the class token"
    found = ways(name, module, data)
    for title, way in found.items():
        logits = way()
        agree(title, logits, wanted, chosen.tolerance)
        tell_apart(title, logits, wanted, clean)
    timed = interleaved(found, lambda: module(data["base"]).logits, chosen.repeats, chosen.torch_device)
    floor = plan.forwards / chosen.examples
    for title, times in timed.items():
        extra = {"bound": floor} if name == "vit_mechinterp" else {}
        if name == "vit_mechinterp" and vit.layout.n_layers == 12:
            extra["target"] = 7.9
        rows = len(sweep) * chosen.examples
        report.rows.append(Row.timed(title, times, rows=rows, unit_images=chosen.examples, **extra))


def main(argv: list[str] | None = None) -> Report:
    """Measure all ways, each in its own process."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--way", choices=WAYS, help="only this one, in this process")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("layer_sweep", f"Layer sweep, {chosen.model}", chosen)
    if chosen.way is not None:
        measure(chosen.way, chosen, report)
        report.finish()
        return report
    report.note(
        "A figure is a time in plain native forwards of the same images (fused attention), measured "
        "around each repeat in the same process. Each way has a process and a model of its own.",
        "The bound counts the plan's (row, block) pairs. All ways agree with plain hooks to "
        f"{chosen.tolerance:g} of the output's scale, and every effect is above 1e-3 of it, but at the "
        "last block, behind which patches reach nothing.",
    )
    for name, package in WAYS.items():
        if package is not None and not isolated.available(package):
            report.note(f"{package} is not installed, and left out.")
            continue
        words = [*isolated.arguments(chosen), "--way", name]
        report.add(isolated.part("benchmarks.layer_sweep", words))
    report.finish()
    return report


if __name__ == "__main__":
    main()
