"""Training subspaces (distributed alignment search): vit_mechinterp against the same algorithm with plain
hooks, against pyvene, and against TransformerLens's ``fit_das``.

With the model frozen and s blocks behind the layer, a step needs s blocks forward and s backward. Run as the
published code does it, a step needs a full source forward, a full base forward and s blocks backward: of L
blocks the arithmetic allows (2L + s) / 2s, and 2.68 for the twelve layers of a base model together. Where the
output reads CLS alone, most of the last block is left out besides, forward and backward, so figures go beyond
that.

    python -m benchmarks.das_training --model vit_small --layers 10
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks import isolated, options
from benchmarks.das_batched import against_one_at_a_time
from benchmarks.das_ways import lockstep, plain_forward, training
from benchmarks.measure import Spread
from benchmarks.models import build, pairs
from benchmarks.report import Report, Row
from vit_mechinterp.circuits.alignment import GatedRotations
from vit_mechinterp.circuits.das import interchange_run
from vit_mechinterp.engine import Prepared, prepare

PRESETS = {
    "full": {"model": "vit_tiny", "examples": 64, "repeats": 3, "batch": 64, "layers": range(11)},
    "cuda": {"model": "vit_base", "examples": 256, "repeats": 12, "batch": 64},
    "small": {"model": "vit_tiny", "examples": 8, "repeats": 4, "batch": 4, "layers": (0, 5, 10)},
    "micro": {"model": "micro", "examples": 4, "repeats": 2, "batch": 2, "layers": (0, 1)},
}
PEERS = {"pyvene": "pyvene", "transformer_lens": "transformer_lens"}


def bound(layers: Sequence[int], n_layers: int) -> float:
    """How many times as fast as source and base forwards in every step the arithmetic allows."""
    behind = [n_layers - 1 - layer for layer in layers]
    return sum(2 * n_layers + s for s in behind) / sum(2 * s for s in behind)


def close(name: str, found: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """Assert that two learning curves are the same; the largest relative difference."""
    share = 1e-3 if dtype == torch.float32 else 0.1
    difference = ((found - wanted).abs() / wanted.abs()).max().item()
    assert difference <= share, f"{name}: learning curves differ by {difference:.2g}"
    return difference


@contextmanager
def ours(
    vit: vmi.HookedViT, layers: Sequence[int], data: dict[str, Tensor], chosen: Any, steps: int
) -> Iterator[Iterator[Tensor]]:
    """A training on prepared runs: clean forwards once, all layers in one growing batch."""
    taken = {"tokens": {"column": "edited"}, "source_tokens": {"column": "source_tokens"}}
    runs = [interchange_run(layer, "resid_post", **taken) for layer in layers]
    d = vit.layout.d_model
    modules = GatedRotations(layers, d).to(vit.device)
    first = {name: tensor.detach() for name, tensor in modules.tensors(modules.gates(1.0)).items()}
    with prepare(vit, runs, data, first, progress=False) as prepared:
        forward: Prepared = prepared
        yield training(forward, layers, d, data, chosen.batch, steps)


def setup(chosen: Any) -> tuple[Any, dict[str, Tensor]]:
    """The frozen model and its pairs."""
    module: Any = build(chosen.model, device=chosen.device, dtype=chosen.torch_dtype)
    module.requires_grad_(False)
    return module, pairs(module, chosen.examples)


def against_plain(
    report: Report, module: Any, data: dict[str, Tensor], layers: Sequence[int], chosen: Any
) -> None:
    """Ours and plain hooks, step by step in turn."""
    vit = vmi.wrap(module)
    other = copy.deepcopy(module)
    steps = chosen.repeats + 1
    images = data["base"][: chosen.batch]
    one = len(layers) == 1
    name = f"layer {layers[0]}" if one else f"all {len(layers)} layers"
    with ours(vit, layers, data, chosen, steps) as mine:
        theirs = training(
            plain_forward(other, layers, data), layers, vit.layout.d_model, data, chosen.batch, steps
        )
        times, losses, units = lockstep(
            {"ours": mine, "plain": theirs}, lambda: other(images), chosen.torch_device, steps
        )
    worst = close(name, losses["ours"], losses["plain"], chosen.torch_dtype)
    first, last = losses["plain"][0], losses["plain"][-1]
    assert ((first - last).abs() / first).max() > 10 * worst, f"{name}: the training changed nothing"
    most = bound(layers, vit.layout.n_layers)
    target = 0.9 * most if one else 2.4 / 2.68 * most
    ratios = [b / a for a, b in zip(times["ours"], times["plain"], strict=True)]
    report.rows.append(
        Row(
            f"{name}, against plain hooks", Spread.of(ratios), "times as fast", bound=most, target=target,
            at_least=True, seconds=Spread.of(times["ours"]).median,
            interventions=len(layers) * chosen.batch / Spread.of(times["ours"]).median,
        )
    )  # fmt: skip
    for way, taken in times.items():
        in_units = [t / u for t, u in zip(taken, units, strict=True)]
        label = "vit_mechinterp" if way == "ours" else "plain hooks"
        report.rows.append(
            Row(f"{name}, a step of {label}", Spread.of(in_units), seconds=Spread.of(taken).median)
        )
    report.curves[name] = {way: curve.tolist() for way, curve in losses.items()}
    report.note(f"{name}: learning curves agree to {worst:.1g}.")


def main(argv: list[str] | None = None) -> Report:
    """Measure single layers, all layers, and the peers."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--batch", type=int, help="examples of one step")
    parser.add_argument("--layers", type=int, nargs="*", help="layers to train one at a time")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("das_training", f"Training of subspaces, {chosen.model}", chosen)
    report.sizes |= {"batch": chosen.batch, "steps": chosen.repeats}
    module, data = setup(chosen)
    n_layers = module.config.num_hidden_layers
    for layer in chosen.layers:
        against_plain(report, module, data, [layer], chosen)
    against_plain(report, module, data, range(n_layers), chosen)
    against_one_at_a_time(report, module, data, chosen, close)
    report.note(
        "'times as fast' is seconds of a step of the other over seconds of ours, step by step in turn, "
        "the first step left out; the clean forwards, made once before the first step, are not in it. The "
        "bound is (2L + s) / 2s, with s blocks of L behind the layer and backward counted as one forward. "
        "Rotations, gates, loss and "
        "optimizer are the same code in both.",
    )
    for name, package in PEERS.items():
        if not isolated.available(package):
            report.note(f"{package} is not installed, and left out.")
            continue
        peer_layers = sorted({min(chosen.layers), sorted(chosen.layers)[len(chosen.layers) // 2]})
        words = [*isolated.arguments(chosen), "--batch", str(chosen.batch), "--way", name, "--layers"]
        report.rows += isolated.part("benchmarks.das_peers", [*words, *map(str, peer_layers)])
    report.note(
        "pyvene: an intervention of our own with the same formula, one IntervenableModel per layer, the "
        "same loop. TransformerLens: fit_das as it is (rank 4, one token, no gate; sources collected "
        "once, a full base forward every step), against the same algorithm with prepared runs; whole "
        "trainings, clean forwards included. Its bound counts blocks: (L + E (L + s)) / (2 (layer + 1) + "
        "2 E s) for E epochs."
    )
    report.finish()
    return report


if __name__ == "__main__":
    main()
