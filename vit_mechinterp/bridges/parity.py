"""The parity matrix: composed runs on the engine and on every backend, and how far they differ."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from vit_mechinterp.bridges.parity_runs import parity_data, parity_runs
from vit_mechinterp.engine.execute import execute
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run

__all__ = ["BACKENDS", "Cell", "Parity", "parity"]

BACKENDS = ("hooks", "nnsight", "pyvene", "transformer_lens")

_TOLERANCE = {"torch.float32": 1e-5, "torch.float64": 1e-10}
_SHARE = 30
"""A difference is at most this part of the run's own effect, or the agreement shows nothing."""


@dataclass(frozen=True)
class Cell:
    """One experiment on one backend: the largest difference of outputs from the engine's, as a share of the
    outputs' scale, or why the backend refused."""

    difference: float | None = None
    refusal: str = ""


@dataclass(frozen=True)
class Parity:
    """What `parity` found.

    Args:
        model: the model's name.
        tolerance: the largest difference that counts as agreement.
        effects: by experiment, the least change of any example's output, as a share of the outputs' scale.
        cells: by experiment and backend.
    """

    model: str
    tolerance: float
    effects: dict[str, float]
    cells: dict[str, dict[str, Cell]]

    @property
    def failures(self) -> list[str]:
        """Experiments that changed nothing, and backends that differ, in words."""
        found = [
            f"{name} changes some output by {effect:.1g} of its scale only, which shows nothing"
            for name, effect in self.effects.items()
            if not effect > self.tolerance
        ]
        for name, row in self.cells.items():
            most = min(self.tolerance, self.effects[name] / _SHARE)
            for backend, cell in row.items():
                if cell.difference is not None and not cell.difference <= most:
                    found.append(f"{name}: {backend} differs by {cell.difference:.1g} of the scale")
        return found

    @property
    def passed(self) -> bool:
        """Whether every backend agrees wherever it does not refuse, and every experiment shows something."""
        return not self.failures

    def rows(self) -> tuple[list[list[str]], list[str]]:
        """A table with its heading, and the reasons that its numbers in brackets stand for."""
        reasons: dict[str, int] = {}

        def shown(cell: Cell) -> str:
            if cell.difference is not None:
                return f"{cell.difference:.0e}" if cell.difference else "0"
            return f"refused ({reasons.setdefault(cell.refusal, len(reasons) + 1)})"

        backends = list(next(iter(self.cells.values()), {}))
        table = [["experiment", "effect", *backends]]
        for name, row in self.cells.items():
            table.append([name, f"{self.effects[name]:.1g}", *(shown(row[backend]) for backend in backends)])
        return table, [f"({number}) {reason}" for reason, number in reasons.items()]

    def __str__(self) -> str:
        table, reasons = self.rows()
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = [f"{self.model}: largest difference from the engine, as a share of the output's scale"]
        lines += ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        verdict = [f"FAILED: {failure}" for failure in self.failures]
        verdict = verdict or [f"All that is not refused agrees within {self.tolerance:g}."]
        return "\n".join([*lines, *reasons, *verdict])

    def to_markdown(self) -> str:
        """The same as a table and a list."""
        table, reasons = self.rows()
        head, *body = ["| " + " | ".join(row) + " |" for row in table]
        rule = "|" + "---|" * len(table[0])
        listed = ["", *(f"* {reason}." for reason in reasons)] if reasons else []
        return "\n".join([head, rule, *body, *listed])


def parity(
    vit: HookedViT,
    backends: Iterable[str] = BACKENDS,
    n_examples: int = 3,
    seed: int = 0,
    progress: bool = True,
) -> Parity:
    """Carry out composed runs on the engine and on other backends.

    Args:
        vit: the model.
        backends: names of backends; one whose package is missing is a refusal.
        n_examples: pairs of random images.
        seed: of images, tokens and tensors.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        SpecError: the model is in half precision, or the engine itself refuses a run on it.
    """
    if str(vit.dtype) not in _TOLERANCE:
        raise SpecError(
            f"The model is in {str(vit.dtype).removeprefix('torch.')}, where written-out attention and the "
            "fused kernel round so differently that small effects drown. Compare in float32."
        )
    data = parity_data(vit, n_examples, seed)
    experiments, tensors = parity_runs(vit, seed)
    chosen: Sequence[str] = list(dict.fromkeys(backends))
    clean = execute(vit, Run(name="clean"), data, progress=False).logits[0]
    scale = float(clean.abs().max())
    effects: dict[str, float] = {}
    cells: dict[str, dict[str, Cell]] = {}
    for name, runs in tqdm(experiments.items(), "parity", delay=2.0, disable=not progress):
        ours = execute(vit, runs, data, tensors, progress=False).logits
        effects[name] = float((ours[-1] - clean).flatten(1).abs().amax(1).min()) / scale
        cells[name] = {}
        for backend in chosen:
            try:
                theirs = execute(vit, runs, data, tensors, progress=False, backend=backend).logits
            except SpecError as error:
                cells[name][backend] = Cell(refusal=_reason(str(error)))
            else:
                cells[name][backend] = Cell(float((theirs - ours).abs().max()) / scale)
    name = vit.source or type(vit.module).__name__
    return Parity(name, _TOLERANCE[str(vit.dtype)], effects, cells)


def _reason(message: str) -> str:
    """A refusal without the name of the run that it is about."""
    return re.sub(r"^backend='\w+' cannot carry out run '[^']*': [^:]*: ", "", message).rstrip(".")
