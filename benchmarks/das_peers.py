"""pyvene and TransformerLens training a subspace, each beside ours in one process: part of `das_training`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import vit_mechinterp as vmi
from benchmarks import options
from benchmarks.das_steps import SHARE, Subject, apart, check, step_by_step
from benchmarks.das_training import PRESETS, bound
from benchmarks.das_ways import Forward, widened
from benchmarks.measure import Spread, interleaved
from benchmarks.report import Report, Row
from vit_mechinterp.circuits.alignment import gate_name, rotation_name
from vit_mechinterp.engine import prepare

RANK, RATE, FIT_EPOCHS = 4, 1e-2, 4


def pyvene_forward(module: Any, layers: Sequence[int], data: Mapping[str, Tensor]) -> Forward:
    """One `IntervenableModel` a layer with a trainable intervention of the same formula; a source forward for
    each in every step."""
    import pyvene as pv

    wide = widened(data["base"].dtype)

    class Gated(pv.TrainableIntervention, pv.DistributedRepresentationIntervention):  # type: ignore[misc]
        """The gated subspace; rotation and gate are set before every step."""

        def forward(self, base: Tensor, source: Tensor, subspaces: Any = None, **_: Any) -> Tensor:
            h = base.to(wide)
            new: Tensor = h + ((source.to(wide) - h) @ self.R * self.g) @ self.R.T
            return new.to(base.dtype)

    gated = {layer: Gated(keep_last_dim=True) for layer in layers}
    models = {
        layer: pv.IntervenableModel(
            pv.IntervenableConfig(
                [{"component": f"vit.layers[{layer}].output", "unit": "pos", "intervention": own}]
            ),
            model=module,
        )
        for layer, own in gated.items()
    }

    def forward(examples: Sequence[int], tensors: Mapping[str, Tensor], pairing: Sequence[int]) -> Tensor:
        edited = (1 + data["edited"][examples]).tolist()
        taken = (1 + data["source_tokens"][examples][:, pairing]).tolist()
        outputs = []
        for layer, model in models.items():
            gated[layer].R, gated[layer].g = tensors[rotation_name(layer)], tensors[gate_name(layer)]
            _, output = model(
                {"pixel_values": data["base"][examples]},
                [{"pixel_values": data["source"][examples]}],
                {"sources->base": ([taken], [edited])},
            )
            outputs.append(output.logits)
        return torch.stack(outputs)

    return forward


def against_pyvene(report: Report, chosen: Any) -> None:
    """Step by step in turn: single layers, and, but for the small version, all of them."""
    subject = Subject.of(chosen)
    n_layers = subject.vit.layout.n_layers
    for layers in ([layer] for layer in chosen.layers):
        _beside_pyvene(report, f"layer {layers[0]}, against pyvene", subject, layers, chosen)
    if chosen.scale == "small":
        report.note("pyvene: all layers together take longest, and are left out of the small version.")
    else:
        _beside_pyvene(report, f"all {n_layers} layers, against pyvene", subject, range(n_layers), chosen)


def _beside_pyvene(report: Report, name: str, subject: Subject, layers: Sequence[int], chosen: Any) -> None:
    check(report, name, subject, layers, pyvene_forward, chosen)
    steps = step_by_step(subject, layers, pyvene_forward, chosen)
    report.rows.append(
        Row(
            name, Spread.of(steps.times_as_fast), "times as fast",
            bound=bound(layers, subject.vit.layout.n_layers), seconds=Spread.of(steps.ours).median,
        )
    )  # fmt: skip


class Fitting:
    """`fit_das`, and the same algorithm on prepared runs, on a subject's pairs with one token each."""

    def __init__(self, subject: Subject) -> None:
        from benchmarks.peers.transformer_lens import bridge

        self.subject, self.vit, self.batch = subject, subject.vit, subject.batch
        self.model = bridge(subject.other)
        self.data = subject.data | {name: subject.data[name][:, :1] for name in ("edited", "source_tokens")}
        self.labels = self.data["label"].to(self.data["base"].device)

    def theirs(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean losses of the epochs, and the projection on what was learned."""
        from transformer_lens.tools.analysis.interchange import fit_das

        data = self.data
        with self._default_dtype():
            found = fit_das(
                self.model, f"blocks.{layer}.hook_out", data["base"], data["source"], data["label"],
                lambda x: self.model(x), rank=RANK, base_positions=1 + data["edited"][:, 0],
                source_positions=1 + data["source_tokens"][:, 0], epochs=FIT_EPOCHS, batch_size=self.batch,
                lr=RATE,
            )  # fmt: skip
        basis = found.subspace.basis.detach()
        return torch.tensor(found.losses, dtype=torch.float64), basis @ basis.T

    def ours(self, layer: int) -> tuple[Tensor, Tensor]:
        """The same with prepared runs."""
        from transformer_lens.tools.analysis.interchange import LearnedSubspace

        with self._default_dtype(), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            subspace = LearnedSubspace(self.vit.layout.d_model, RANK)
        subspace = subspace.to(self.vit.device)
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
        losses = []
        first = {"basis": subspace.basis.detach()}
        with prepare(self.vit, run, self.data, first, progress=False) as prepared:
            for _ in range(FIT_EPOCHS):
                order, total = draw.permutation(len(self.labels)), 0.0
                for start in range(0, len(order), self.batch):
                    batch = order[start : start + self.batch].tolist()
                    logits = prepared(batch, {"basis": subspace.basis})[0]
                    loss = functional.cross_entropy(logits, self.labels[batch])
                    optimizer.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    total += loss.item() * len(batch)
                losses.append(total / len(order))
        basis = subspace.basis.detach()
        return torch.tensor(losses, dtype=torch.float64), basis @ basis.T

    @contextmanager
    def _default_dtype(self) -> Iterator[None]:
        """`LearnedSubspace` takes its dtype from torch's default."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(widened(self.data["base"].dtype))
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@torch.enable_grad()
def against_fit_das(report: Report, chosen: Any) -> None:
    """Whole trainings in turn; `fit_das`'s own algorithm on both sides."""
    exact, timed_ = Fitting(Subject.of(chosen, exact=True)), Fitting(Subject.of(chosen))
    n_layers = timed_.vit.layout.n_layers
    for layer in chosen.layers:
        name = f"layer {layer}, against TransformerLens fit_das"
        (losses, learned), (others, wanted) = exact.ours(layer), exact.theirs(layer)
        worst = apart(f"{name}, float64", losses, others, SHARE)
        between = (learned - wanted).abs().max().item()
        assert between <= SHARE, f"{name}, float64: the projections differ by {between:.2g}"
        early = apart(
            f"{name}, the first epoch",
            timed_.ours(layer)[0][:1],
            timed_.theirs(layer)[0][:1],
            chosen.tolerance,
        )
        report.note(
            f"{name}: in float64, losses of all {FIT_EPOCHS} epochs agree to {worst:.1g} and the projections "
            f"on what was learned to {between:.1g}; in {chosen.dtype}, the loss of the first epoch to "
            f"{early:.1g}."
        )
        timed = interleaved(
            {
                "ours": lambda layer=layer: timed_.ours(layer),
                "fit_das": lambda layer=layer: timed_.theirs(layer),
            },
            lambda: timed_.vit.module(timed_.data["base"]),
            max(2, chosen.repeats // 2) if chosen.scale != "micro" else 1,
            chosen.torch_device,
            units_around=1,
        )
        s = n_layers - 1 - layer
        most = (n_layers + FIT_EPOCHS * (n_layers + s)) / (2 * (layer + 1) + 2 * FIT_EPOCHS * s)
        ratios = [b / a for a, b in zip(timed["ours"].units, timed["fit_das"].units, strict=True)]
        report.rows.append(
            Row(
                name, Spread.of(ratios), "times as fast",
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
