"""Many subspaces trained at once: layers, attributes, controls and seeds in the same forwards.

Every training has examples, an order of them and a first rotation of its own, so none knows of the others.
They share the clean forwards of one dataset, the growing batches, the orthogonal map and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from vit_mechinterp.circuits.alignment import (
    GatedRotations,
    Training,
    gate_name,
    learning_rate_factor,
    rotation_name,
    temperature,
)
from vit_mechinterp.circuits.subspace_batches import Search, Trainee
from vit_mechinterp.engine import Batch, Prepared, prepare, run_together
from vit_mechinterp.engine.forwards.exhaustion import make_room
from vit_mechinterp.engine.training.gradient_width import gradient_width
from vit_mechinterp.model.out_of_memory import memory_may_run_out

if TYPE_CHECKING:
    from vit_mechinterp.engine import ActivationStore
    from vit_mechinterp.model import HookedViT

__all__ = ["Search", "Trained", "train_subspaces"]


@dataclass(frozen=True)
class Trained:
    """What one search gave.

    Attributes:
        tensors: ``rotation_<layer>`` ``[d, d]`` and ``gate_<layer>`` ``[d]`` behind the search's prefix, the
            gates binary; with a leading axis of tokens where each has its own.
        losses: mean loss of each layer over the last epoch, penalty included.
        steps: number of optimizer steps.
        clean_evaluations: (row, block) pairs of the clean forwards of the search's data, which all searches
            on it share; they do not depend on the number of steps.
        provenance: what `Prepared.provenance` says.
    """

    tensors: Mapping[str, Tensor]
    losses: Mapping[int, float]
    steps: int
    clean_evaluations: int
    provenance: Mapping[str, Any]


def train_subspaces(
    vit: HookedViT,
    searches: Sequence[Search],
    d: int,
    training: Training,
    *,
    n_tokens: int | None = None,
    rows_at_once: int | None = None,
    store: ActivationStore | None = None,
    name: str = "subspaces",
    progress: bool = True,
) -> list[Trained]:
    """Train the subspaces of all searches, those on equally many examples in the same growing batches.

    A layer's loss in a search is ``CE(logits, label) + sparsity * sum(g)``, the mean over tokens of that sum
    where every token has a gate of its own. No two share a parameter, so each is trained as if it were alone.

    Args:
        vit: the model; it is frozen.
        searches: what to train.
        d: size of the activation at the site.
        training: the settings; each search brings its own seed.
        n_tokens: how many tokens an object has, where each gets its own subspace (``tied=False``).
        rows_at_once: most (training, example) pairs in one forward; a step of more takes several. Chosen by
            device and memory if left out.
        store: where clean values are read from if they are there, and kept if they are not.
        name: what the progress bar says.
        progress: show bars if it takes longer than two seconds.

    Returns:
        One result per search, in order.

    Raises:
        SpecError, DataError: before the first forward, if anything does not fit.
    """
    found: dict[int, Trained] = {}
    order = sorted(range(len(searches)), key=lambda k: len(searches[k].labels))
    for _, members in groupby(order, key=lambda k: len(searches[k].labels)):
        numbers = list(members)
        own = [searches[k] for k in numbers]
        entries = [(search, layer) for search in own for layer in search.runs]
        modules = GatedRotations(
            [layer for _, layer in entries],
            d,
            [search.seed for search, _ in entries],
            [search.prefix for search, _ in entries],
            n_tokens,
        ).to(vit.device, torch.promote_types(vit.dtype, torch.float32))
        first = {key: tensor.detach() for key, tensor in modules.tensors(modules.gates(1.0)).items()}
        with ExitStack() as stack:
            prepared: dict[int, Prepared] = {}
            for search in own:
                if id(search.data) not in prepared:
                    runs = [run for s in own if s.data is search.data for run in s.runs.values()]
                    context = prepare(vit, runs, search.data, first, progress=progress, store=store)
                    prepared[id(search.data)] = stack.enter_context(context)
            trainees = [Trainee(search, prepared[id(search.data)]) for search in own]
            rows = gradient_width(list(prepared.values())) if rows_at_once is None else rows_at_once
            losses, steps = _descend(trainees, modules, training, rows, name, progress)
            with torch.no_grad():
                tensors = modules.tensors(modules.binary_gates())
            facts = {key: held.provenance() for key, held in prepared.items()}
            left = iter(losses.tolist())
            for k, search in zip(numbers, own, strict=True):
                found[k] = Trained(
                    tensors={key: tensors[key].cpu().clone() for key in _names(search)},
                    losses={layer: next(left) for layer in search.runs},
                    steps=steps,
                    clean_evaluations=prepared[id(search.data)].clean_evaluations,
                    provenance=facts[id(search.data)],
                )
    return [found[k] for k in range(len(searches))]


@dataclass(frozen=True)
class _Part:
    """Rows of one entry: the entry's number, its layer's place in the search, the rows, and their labels."""

    entry: int
    place: int
    batch: Batch
    labels: Tensor
    weight: float


def _descend(
    trainees: Sequence[Trainee],
    modules: GatedRotations,
    training: Training,
    rows: int,
    name: str,
    progress: bool,
) -> tuple[Float[Tensor, " entry"], int]:
    """Train in place; the mean loss of every entry over the last epoch, and the number of steps."""
    n = trainees[0].prepared.n_examples
    steps = training.epochs * -(-n // training.batch_size)
    parameters = dict(modules.named_parameters())
    mask = parameters.pop("mask")
    optimizer = torch.optim.Adam(
        [
            {"params": list(parameters.values()), "lr": training.learning_rate},
            {"params": [mask], "lr": training.mask_learning_rate},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, training.schedule)
    )
    losses = torch.zeros(len(modules.layers), device=mask.device, dtype=mask.dtype)
    with (
        torch.enable_grad(),
        tqdm(total=steps, desc=name, unit="step", delay=2.0, disable=not progress) as bar,
    ):
        for epoch in range(training.epochs):
            losses.zero_()
            heat = temperature(epoch, training.epochs, training.schedule)
            streams = [own.batches(training) for own in trainees]
            for batches in zip(*streams, strict=True):
                optimizer.zero_grad()
                loss, rows = _backward(batches, trainees, modules, heat, training.sparsity, rows)
                optimizer.step()
                schedule.step()
                losses += loss * (sum(len(batch.examples) for batch in batches[0]) / n)
                bar.update()
    return losses.cpu(), steps


def _backward(
    batches: Sequence[Sequence[Batch]],
    trainees: Sequence[Trainee],
    modules: GatedRotations,
    heat: float,
    sparsity: float,
    rows: int,
) -> tuple[Float[Tensor, " entry"], int]:
    """Leave the gradients of one step in the parameters; every entry's loss, and the rows that fit.

    The forwards of a step share the tensors, not their graph: each returns its gradients at once and lets go
    of its activations, and the orthogonal map is differentiated once at the end.
    """
    gates = modules.gates(heat)
    named = modules.tensors(gates)
    while True:
        leaves = {key: tensor.detach().requires_grad_() for key, tensor in named.items()}
        loss: Tensor | None = None
        with memory_may_run_out():
            loss = _gradients(batches, trainees, leaves, rows)
        if loss is not None:
            break
        rows = make_room(min(rows, sum(batch.rows for own in batches for batch in own)))
    reached = [key for key, leaf in leaves.items() if leaf.grad is not None]
    by_token = gates.shape[1] if gates.ndim == 3 else 1
    torch.autograd.backward(
        [gates, *(named[key] for key in reached)],
        [torch.full_like(gates, sparsity / by_token), *(leaves[key].grad for key in reached)],
    )
    return loss + sparsity / by_token * gates.detach().flatten(1).sum(dim=1), rows


def _gradients(
    batches: Sequence[Sequence[Batch]], trainees: Sequence[Trainee], leaves: Mapping[str, Tensor], rows: int
) -> Float[Tensor, " entry"]:
    """Leave the gradients of all cross-entropies in the leaves; the cross-entropy of every entry."""
    leaf = next(iter(leaves.values()))
    device = leaf.device
    loss = torch.zeros(sum(len(own.runs) for own in trainees), device=device, dtype=leaf.dtype)
    for parts in _forwards(batches, trainees, rows):
        outputs = run_together([part.batch for part in parts], leaves)
        logits = torch.cat([output.flatten(0, 1) for output in outputs])
        labels = torch.cat([part.labels for part in parts]).to(device)
        sizes = torch.tensor([len(part.labels) for part in parts])
        entry = torch.tensor([part.entry for part in parts]).repeat_interleave(sizes).to(device)
        weight = torch.tensor([part.weight for part in parts]).repeat_interleave(sizes).to(device)
        each = functional.cross_entropy(logits, labels, reduction="none") * weight
        torch.autograd.backward(each.sum())
        loss.index_add_(0, entry, each.detach())
    return loss


def _forwards(
    batches: Sequence[Sequence[Batch]], trainees: Sequence[Trainee], rows: int
) -> Iterator[list[_Part]]:
    """The rows of one step by forward: whole runs as far as they fit, those of one layer side by side."""
    parts: list[_Part] = []
    first = 0
    for together, own in zip(batches, trainees, strict=True):
        n = sum(len(batch.examples) for batch in together)
        for piece in (piece for batch in together for piece in batch.cut(rows)):
            assert piece.runs is not None
            place = own.runs.index(piece.runs[0])
            labels = own.labels[list(piece.examples)]
            parts.append(_Part(first + place, place, piece, labels, 1 / n))
        first += len(own.runs)
    taken: list[_Part] = []
    free = rows
    for part in sorted(parts, key=lambda part: part.place):
        if part.batch.rows > free:
            yield taken
            taken, free = [], rows
        taken.append(part)
        free -= part.batch.rows
    yield taken


def _names(search: Search) -> list[str]:
    """Names of a search's tensors."""
    return [search.prefix + of(layer) for of in (rotation_name, gate_name) for layer in search.runs]
