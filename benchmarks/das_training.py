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

from collections.abc import Sequence
from typing import Any

from benchmarks import isolated, options
from benchmarks.das_batched import against_one_at_a_time
from benchmarks.das_steps import Subject, check, step_by_step
from benchmarks.das_ways import plain_forward
from benchmarks.measure import Spread
from benchmarks.report import Report, Row

PRESETS = {
    "full": {"model": "vit_tiny", "examples": 64, "repeats": 3, "batch": 64, "layers": range(11)},
    "cuda": {"model": "vit_base", "examples": 256, "repeats": 12, "batch": 64},
    "small": {"model": "vit_tiny", "examples": 8, "repeats": 3, "batch": 4, "layers": (5,)},
    "micro": {"model": "micro", "examples": 4, "repeats": 2, "batch": 2, "layers": (0, 1)},
}
PEERS = {"pyvene": "pyvene", "transformer_lens": "transformer_lens"}


def bound(layers: Sequence[int], n_layers: int) -> float:
    """How many times as fast as source and base forwards in every step the arithmetic allows."""
    behind = [n_layers - 1 - layer for layer in layers]
    return sum(2 * n_layers + s for s in behind) / sum(2 * s for s in behind)


def against_plain(report: Report, subject: Subject, layers: Sequence[int], chosen: Any) -> None:
    """Ours and plain hooks, step by step in turn."""
    one = len(layers) == 1
    name = f"layer {layers[0]}" if one else f"all {len(layers)} layers"
    check(report, name, subject, layers, plain_forward, chosen)
    steps = step_by_step(subject, layers, plain_forward, chosen)
    most = bound(layers, subject.vit.layout.n_layers)
    target = 0.9 * most if one else 2.4 / 2.68 * most
    taken = Spread.of(steps.ours).median
    report.rows.append(
        Row(
            f"{name}, against plain hooks", Spread.of(steps.times_as_fast), "times as fast", bound=most,
            target=target, at_least=True, seconds=taken, interventions=len(layers) * chosen.batch / taken,
        )
    )  # fmt: skip
    for way, seconds in (("vit_mechinterp", steps.ours), ("plain hooks", steps.other)):
        in_units = [t / u for t, u in zip(seconds, steps.units, strict=True)]
        report.rows.append(
            Row(f"{name}, a step of {way}", Spread.of(in_units), seconds=Spread.of(seconds).median)
        )


def main(argv: list[str] | None = None) -> Report:
    """Measure single layers, all layers, and the peers."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--batch", type=int, help="examples of one step")
    parser.add_argument("--layers", type=int, nargs="*", help="layers to train one at a time")
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("das_training", f"Training of subspaces, {chosen.model}", chosen)
    report.sizes |= {"batch": chosen.batch, "steps": chosen.repeats}
    subject = Subject.of(chosen)
    for layer in chosen.layers:
        against_plain(report, subject, [layer], chosen)
    against_plain(report, subject, range(subject.vit.layout.n_layers), chosen)
    against_one_at_a_time(report, subject, chosen)
    report.note(
        "'times as fast' is seconds of a step of the other over seconds of ours, step by step in turn, "
        "the first step left out; the clean forwards, made once before the first step, are not in it. The "
        "bound is (2L + s) / 2s, with s blocks of L behind the layer and backward counted as one forward. "
        "Rotations, gates, loss and optimizer are the same code in both.",
    )
    for name, package in PEERS.items():
        if not isolated.available(package):
            report.note(f"{package} is not installed, and left out.")
            continue
        peer_layers = sorted({min(chosen.layers), sorted(chosen.layers)[len(chosen.layers) // 2]})
        words = [*isolated.arguments(chosen), "--batch", str(chosen.batch), "--way", name, "--layers"]
        report.add(isolated.part("benchmarks.das_peers", [*words, *map(str, peer_layers)]))
    report.note(
        "pyvene: an intervention of our own with the same formula, one IntervenableModel per layer, a source "
        "forward for each, the same loop. TransformerLens: fit_das as it is (rank 4, one token, no gate; "
        "sources collected once, a full base forward every step), against the same algorithm with prepared "
        "runs; whole trainings, clean forwards included. Its bound counts blocks: (L + E (L + s)) / "
        "(2 (layer + 1) + 2 E s) for E epochs."
    )
    report.finish()
    return report


if __name__ == "__main__":
    main()
