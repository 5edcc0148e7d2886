"""One training loop for distributed alignment search, and the ways to get its logits.

The loop is the published algorithm at one or more block outputs: a rotation and a gate per layer, Adam, the
tokens of source and base paired anew in every step. Only where the logits come from differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

import vit_mechinterp as vmi
from vit_mechinterp.circuits.alignment import GatedRotations, gate_name, rotation_name, temperature
from vit_mechinterp.circuits.das import interchange_run
from vit_mechinterp.engine import prepare

__all__ = ["EPOCHS", "Forward", "Trainer", "plain_forward", "prepared_forward", "widened"]

EPOCHS = 20
"""Of the whole training, whose first steps are measured; the gates' temperature falls over so many."""

SPARSITY = 1e-3

Forward = Callable[[Sequence[int], Mapping[str, Tensor], Sequence[int]], Tensor]
"""Examples, tensors by name, order of the sources' tokens -> logits ``[layer, example, class]``."""


def widened(dtype: torch.dtype) -> torch.dtype:
    """The dtype that subspaces have: float32, or the model's if that is wider."""
    return torch.promote_types(dtype, torch.float32)


class Trainer:
    """A training that goes on by a step at a time; the same batches and first rotations in every one.

    Args:
        forward: where logits come from.
        layers: block outputs to train at, each with a rotation and a gate.
        d: width of the model.
        data: the pairs.
        batch: examples of a step.
    """

    def __init__(
        self, forward: Forward, layers: Sequence[int], d: int, data: Mapping[str, Tensor], batch: int
    ) -> None:
        self.forward, self.layers, self.data, self.batch = forward, layers, data, batch
        self.labels = data["label"].to(data["base"].device)
        self.modules = GatedRotations(layers, d).to(self.labels.device, widened(data["base"].dtype))
        parameters = dict(self.modules.named_parameters())
        mask = parameters.pop("mask")
        self.optimizer = torch.optim.Adam(
            [{"params": list(parameters.values()), "lr": 1e-3}, {"params": [mask], "lr": 1e-2}]
        )
        self.draw = np.random.default_rng(0)
        self.steps = 0

    def step(self) -> Tensor:
        """Train one step; every layer's loss before it."""
        n, k = len(self.labels), self.data["edited"].shape[1]
        chosen = self.draw.permutation(n)[: self.batch].tolist()
        pairing = self.draw.permutation(k).tolist()
        with torch.enable_grad():
            gates = self.modules.gates(temperature(self.steps // max(1, n // self.batch), EPOCHS))
            logits = self.forward(chosen, self.modules.tensors(gates), pairing)
            wanted = self.labels[chosen].repeat(len(self.layers))
            outputs = logits.flatten(0, 1).to(gates.dtype)
            each = functional.cross_entropy(outputs, wanted, reduction="none")
            loss = each.view(len(self.layers), -1).mean(dim=1) + SPARSITY * gates.sum(dim=1)
            self.optimizer.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        self.steps += 1
        return loss.detach().cpu()

    @torch.no_grad()
    def subspaces(self) -> Tensor:
        """``R diag(g) R^T`` of every layer: what the interchange does, whatever basis describes it."""
        rotation, gates = self.modules.rotation, self.modules.gates(1.0)
        return ((rotation * gates[:, None, :]) @ rotation.mT).cpu()


@contextmanager
def prepared_forward(
    vit: vmi.HookedViT, layers: Sequence[int], data: Mapping[str, Tensor]
) -> Iterator[Forward]:
    """Prepared runs: clean forwards once, all layers in one growing batch."""
    runs = [
        interchange_run(layer, "resid_post", {"column": "edited"}, {"column": "source_tokens"})
        for layer in layers
    ]
    modules = GatedRotations(layers, vit.layout.d_model).to(vit.device, widened(data["base"].dtype))
    first = {name: tensor.detach() for name, tensor in modules.tensors(modules.gates(1.0)).items()}
    with prepare(vit, runs, data, first, progress=False) as prepared:
        yield prepared


def plain_forward(module: Any, layers: Sequence[int], data: Mapping[str, Tensor]) -> Forward:
    """As the published code does it: for every layer and step a full source and a full base forward, with
    hooks."""
    device = data["base"].device
    wide = widened(data["base"].dtype)

    def forward(examples: Sequence[int], tensors: Mapping[str, Tensor], pairing: Sequence[int]) -> Tensor:
        rows = torch.arange(len(examples), device=device)[:, None]
        edited = (1 + data["edited"][examples]).to(device)
        taken = (1 + data["source_tokens"][examples][:, pairing]).to(device)
        outputs = []
        for layer in layers:
            kept: list[Tensor] = []
            block = module.vit.layers[layer]

            def keep(m: object, a: object, output: Tensor, kept: list[Tensor] = kept) -> None:
                kept.append(output[rows, taken])

            handle = block.register_forward_hook(keep)
            with torch.no_grad():
                module(data["source"][examples])
            handle.remove()
            basis, gate = tensors[rotation_name(layer)], tensors[gate_name(layer)]

            def inject(
                m: object,
                a: object,
                output: Tensor,
                kept: list[Tensor] = kept,
                R: Tensor = basis,
                g: Tensor = gate,
            ) -> Tensor:
                output = output.clone()
                h = output[rows, edited].to(wide)
                new = h + ((kept[0].to(wide) - h) @ R * g) @ R.T
                output[rows, edited] = new.to(output.dtype)
                return output

            handle = block.register_forward_hook(inject)
            outputs.append(module(data["base"][examples]).logits)
            handle.remove()
        return torch.stack(outputs)

    return forward
