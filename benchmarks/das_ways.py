"""One training loop for distributed alignment search, and the ways to get its logits.

The loop is the published algorithm at one or more block outputs: a rotation and a gate per layer, Adam, the
tokens of source and base paired anew in every step. Only where the logits come from differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import seconds
from vit_mechinterp.circuits.alignment import GatedRotations, gate_name, rotation_name, temperature

__all__ = ["EPOCHS", "Forward", "lockstep", "plain_forward", "training"]

EPOCHS = 20
"""Of the whole training, whose first steps are measured; the gates' temperature falls over so many."""

SPARSITY = 1e-3

Forward = Callable[[Sequence[int], Mapping[str, Tensor], Sequence[int]], Tensor]
"""Examples, tensors by name, order of the sources' tokens -> logits ``[layer, example, class]``."""


def training(
    forward: Forward, layers: Sequence[int], d: int, data: Mapping[str, Tensor], batch: int, steps: int
) -> Iterator[Tensor]:
    """Train, and yield every layer's loss after each step; the same batches and first rotations at every
    call."""
    labels = data["label"].to(data["base"].device)
    modules = GatedRotations(layers, d).to(labels.device)
    parameters = dict(modules.named_parameters())
    mask = parameters.pop("mask")
    optimizer = torch.optim.Adam(
        [{"params": list(parameters.values()), "lr": 1e-3}, {"params": [mask], "lr": 1e-2}]
    )
    draw = np.random.default_rng(0)
    n, k = len(labels), data["edited"].shape[1]
    per_epoch = max(1, n // batch)
    for step in range(steps):
        chosen = draw.permutation(n)[:batch].tolist()
        pairing = draw.permutation(k).tolist()
        with torch.enable_grad():
            gates = modules.gates(temperature(step // per_epoch, EPOCHS))
            logits = forward(chosen, modules.tensors(gates), pairing).float()
            wanted = labels[chosen].repeat(len(layers))
            each = functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="none")
            loss = each.view(len(layers), -1).mean(dim=1) + SPARSITY * gates.sum(dim=1)
            optimizer.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield loss.detach().cpu()


def plain_forward(module: Any, layers: Sequence[int], data: Mapping[str, Tensor]) -> Forward:
    """As the published code does it: for every layer and step a full source and a full base forward, with
    hooks."""
    device = data["base"].device

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
                h = output[rows, edited].float()
                new = h + ((kept[0].float() - h) @ R * g) @ R.T
                output[rows, edited] = new.to(output.dtype)
                return output

            handle = block.register_forward_hook(inject)
            outputs.append(module(data["base"][examples]).logits)
            handle.remove()
        return torch.stack(outputs)

    return forward


def lockstep(
    trainings: Mapping[str, Iterator[Tensor]], unit: Callable[[], object], device: torch.device, steps: int
) -> tuple[dict[str, list[float]], dict[str, Tensor], list[float]]:
    """Step several trainings in turn; the first step only warms up.

    Returns:
        Seconds of each training's steps, its losses ``[step, layer]``, and seconds of the units between them.
    """
    times: dict[str, list[float]] = {name: [] for name in trainings}
    losses: dict[str, list[Tensor]] = {name: [] for name in trainings}
    units: list[float] = []
    names = list(trainings)
    for step in range(steps):
        around = []
        for name in names if step % 2 else names[::-1]:
            with torch.no_grad():
                around.append(seconds(unit, device))
            taken = seconds(lambda name=name: losses[name].append(next(trainings[name])), device)
            times[name].append(taken)
        units.append(float(np.mean(around)))
    return (
        {name: taken[1:] for name, taken in times.items()},
        {name: torch.stack(curve) for name, curve in losses.items()},
        units[1:],
    )
