"""pyvene and TransformerLens training a subspace, each beside ours in one process: part of `das_training`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import vit_mechinterp as vmi
from benchmarks import options
from benchmarks.das_training import PRESETS, close, ours, setup
from benchmarks.das_ways import Forward, lockstep, training
from benchmarks.measure import Spread, interleaved
from benchmarks.report import Report, Row
from vit_mechinterp.circuits.alignment import gate_name, rotation_name
from vit_mechinterp.engine import prepare

RANK, RATE, FIT_EPOCHS = 4, 1e-2, 4


def pyvene_forward(module: Any, layer: int, data: Mapping[str, Tensor]) -> Forward:
    """One `IntervenableModel` with a trainable intervention of the same formula; a source forward every
    step."""
    import pyvene as pv

    class Gated(pv.TrainableIntervention, pv.DistributedRepresentationIntervention):  # type: ignore[misc]
        """The gated subspace; rotation and gate are set before every step."""

        def forward(self, base: Tensor, source: Tensor, subspaces: Any = None, **_: Any) -> Tensor:
            h = base.float()
            new: Tensor = h + ((source.float() - h) @ self.R * self.g) @ self.R.T
            return new.to(base.dtype)

    gated = Gated(keep_last_dim=True)
    site = {"component": f"vit.layers[{layer}].output", "unit": "pos", "intervention": gated}
    model = pv.IntervenableModel(pv.IntervenableConfig([site]), model=module)

    def forward(examples: Sequence[int], tensors: Mapping[str, Tensor], pairing: Sequence[int]) -> Tensor:
        gated.R, gated.g = tensors[rotation_name(layer)], tensors[gate_name(layer)]
        edited = (1 + data["edited"][examples]).tolist()
        taken = (1 + data["source_tokens"][examples][:, pairing]).tolist()
        _, output = model(
            {"pixel_values": data["base"][examples]},
            [{"pixel_values": data["source"][examples]}],
            {"sources->base": ([taken], [edited])},
        )
        return output.logits[None]

    return forward


def against_pyvene(report: Report, chosen: Any) -> None:
    """Step by step in turn."""
    module, data = setup(chosen)
    vit = vmi.wrap(module)
    steps = chosen.repeats + 1
    images = data["base"][: chosen.batch]
    for layer in chosen.layers:
        theirs = pyvene_forward(copy.deepcopy(module), layer, data)
        with ours(vit, [layer], data, chosen, steps) as mine:
            peer = training(theirs, [layer], vit.layout.d_model, data, chosen.batch, steps)
            times, losses, _ = lockstep(
                {"ours": mine, "pyvene": peer}, lambda: module(images), chosen.torch_device, steps
            )
        close(f"pyvene, layer {layer}", losses["pyvene"], losses["ours"], chosen.torch_dtype)
        s = vit.layout.n_layers - 1 - layer
        ratios = [b / a for a, b in zip(times["ours"], times["pyvene"], strict=True)]
        report.rows.append(
            Row(
                f"layer {layer}, against pyvene", Spread.of(ratios), "times as fast",
                bound=(2 * vit.layout.n_layers + s) / (2 * s), seconds=Spread.of(times["ours"]).median,
            )
        )  # fmt: skip


def against_fit_das(report: Report, chosen: Any) -> None:
    """Whole trainings in turn; `fit_das`'s own algorithm on both sides."""
    from transformer_lens.tools.analysis.interchange import LearnedSubspace, fit_das

    from benchmarks.peers.transformer_lens import bridge

    module, data = setup(chosen)
    vit = vmi.wrap(module)
    model = bridge(copy.deepcopy(module))
    data |= {name: data[name][:, :1] for name in ("edited", "source_tokens")}
    labels = data["label"].to(data["base"].device)
    curves: dict[str, list[float]] = {}

    def theirs(layer: int) -> None:
        found = fit_das(
            model, f"blocks.{layer}.hook_out", data["base"], data["source"], data["label"],
            lambda x: model(x), rank=RANK, base_positions=1 + data["edited"][:, 0],
            source_positions=1 + data["source_tokens"][:, 0], epochs=FIT_EPOCHS, batch_size=chosen.batch,
            lr=RATE,
        )  # fmt: skip
        curves["fit_das"] = list(found.losses)

    def mine(layer: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            subspace = LearnedSubspace(vit.layout.d_model, RANK)
        subspace = subspace.to(vit.device)
        optimizer = torch.optim.Adam(subspace.parameters(), lr=RATE)
        draw = np.random.default_rng(0)
        run = vmi.Run(
            name="fit",
            interventions=[
                vmi.InjectSubspace(
                    site=f"blocks.{layer}.resid_post", tokens={"column": "edited"}, source="source",
                    source_tokens={"column": "source_tokens"}, basis=vmi.TensorRef("basis"),
                )
            ],
        )  # fmt: skip
        curves["ours"] = []
        first = {"basis": subspace.basis.detach()}
        with prepare(vit, run, data, first, progress=False) as prepared:
            for _ in range(FIT_EPOCHS):
                order, total = draw.permutation(len(labels)), 0.0
                for start in range(0, len(order), chosen.batch):
                    batch = order[start : start + chosen.batch].tolist()
                    logits = prepared(batch, {"basis": subspace.basis})[0]
                    loss = functional.cross_entropy(logits, labels[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    total += loss.item() * len(batch)
                curves["ours"].append(total / len(order))

    for layer in chosen.layers:
        with torch.enable_grad():
            theirs(layer)
            mine(layer)
            close(
                f"fit_das, layer {layer}", torch.tensor(curves["fit_das"]), torch.tensor(curves["ours"]),
                chosen.torch_dtype,
            )  # fmt: skip
            timed = interleaved(
                {"ours": lambda layer=layer: mine(layer), "fit_das": lambda layer=layer: theirs(layer)},
                lambda: module(data["base"]),
                max(2, chosen.repeats // 2) if chosen.scale != "micro" else 1,
                chosen.torch_device,
                units_around=1,
            )
        n_layers = vit.layout.n_layers
        s = n_layers - 1 - layer
        most = (n_layers + FIT_EPOCHS * (n_layers + s)) / (2 * (layer + 1) + 2 * FIT_EPOCHS * s)
        ratios = [b / a for a, b in zip(timed["ours"].units, timed["fit_das"].units, strict=True)]
        report.rows.append(
            Row(
                f"layer {layer}, against TransformerLens fit_das", Spread.of(ratios), "times as fast",
                bound=most, seconds=Spread.of(timed["ours"].seconds).median,
            )
        )  # fmt: skip


def main(argv: list[str] | None = None) -> Report:
    """One peer."""
    parser = options.add(__doc__ or "")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--way", choices=("pyvene", "transformer_lens"), required=True)
    chosen = options.parse(parser, PRESETS, argv)
    report = Report("das_peers", f"Training of subspaces beside {chosen.way}, {chosen.model}", chosen)
    (against_pyvene if chosen.way == "pyvene" else against_fit_das)(report, chosen)
    report.finish()
    return report


if __name__ == "__main__":
    main()
