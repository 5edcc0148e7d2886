"""Batches of prepared runs: which runs on which examples, checked before they run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vit_mechinterp.engine.binding.bound import BoundRun
from vit_mechinterp.engine.binding.checks import check_listed, is_integer, is_truth
from vit_mechinterp.errors import SpecError

if TYPE_CHECKING:
    from vit_mechinterp.engine.training.prepared import Prepared

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """Rows of one preparation: every run on every example.

    Args:
        prepared: the preparation.
        examples: which examples, in any order.
        runs: names of the runs; all of them if left out.
        source_order: the order in which every source selection's tokens are paired with the base's, as in
            `Prepared.__call__`.

    Raises:
        SpecError: one of these is of another kind. Whether examples and runs are among those prepared is
            looked at when the batch is run or cut.
    """

    prepared: Prepared
    examples: Sequence[int]
    runs: Sequence[str] | None = None
    source_order: Sequence[int] | None = None

    def __post_init__(self) -> None:
        from vit_mechinterp.engine.training.prepared import Prepared  # which makes batches itself

        if not isinstance(self.prepared, Prepared):
            kind = type(self.prepared).__name__
            raise SpecError(
                f"A batch is one of a preparation ('with prepare(...) as prepared:'), not of {kind}."
            )
        check_listed(self.examples, self.prepared.n_examples)
        _check_names(self.runs)

    @property
    def rows(self) -> int:
        """(run, example) pairs."""
        return len(self.examples) * len(self.prepared.run_names if self.runs is None else self.runs)

    def checked(self) -> tuple[BoundRun, ...]:
        """The runs, once it is clear that everything fits.

        Raises:
            SpecError: see `Prepared.__call__`.
        """
        if not self.prepared.is_open:
            raise SpecError(
                "This preparation is over: its values went with the 'with prepare(...)' block. Run its "
                "batches inside the block."
            )
        _check_examples(self.examples, self.prepared.n_examples)
        runs = self.prepared.find(self.runs)
        most = self.prepared.source_tokens([run.name for run in runs])
        if self.source_order is not None and not _is_order(self.source_order, most):
            how = f"give each of 0 to {most - 1} once" if most else "they have none, so leave it out"
            raise SpecError(f"source_order={self.source_order!r} is no order of the sources' tokens: {how}.")
        return runs

    def cut(self, rows: int) -> Iterator[Batch]:
        """The same in parts of one run and at most so many rows each.

        Args:
            rows: most rows of a part.

        Yields:
            Every part, run by run; together they are the batch.

        Raises:
            SpecError: see `Prepared.__call__`; or ``rows`` is no positive integer.
        """
        if not hasattr(rows, "__index__") or isinstance(rows, bool) or int(rows) < 1:
            raise SpecError(f"A batch is cut into parts of a positive number of rows, not of {rows!r}.")
        for run in self.checked():
            most = self.prepared.source_tokens([run.name])
            order = None if self.source_order is None else [k for k in self.source_order if k < most]
            for start in range(0, len(self.examples), rows):
                part = self.examples[start : start + rows]
                yield Batch(self.prepared, part, (run.name,), order)


def _check_names(runs: Any) -> None:
    """Raise SpecError unless these are names of runs, or None for all of them."""
    if isinstance(runs, str):
        raise SpecError(f"runs={runs!r} is one name; a batch names its runs in a list: [{runs!r}].")
    if runs is None or (isinstance(runs, Collection) and all(isinstance(name, str) for name in runs)):
        return
    raise SpecError(f"runs={runs!r} is no list of names of runs; leave runs out for all of them.")


def _check_examples(examples: Sequence[int], n: int) -> None:
    """Raise SpecError unless these are numbers of examples."""
    if any(map(is_truth, examples)):
        raise SpecError(f"examples are a mask; name them by their numbers, 0 to {n - 1}.")
    if not all(map(is_integer, examples)):
        raise SpecError(f"examples={examples!r} are no numbers of examples, 0 to {n - 1}.")
    if len(examples) == 0 or min(examples) < 0 or max(examples) >= n:
        raise SpecError(
            f"examples={list(examples)} must name at least one of the {n} examples, 0 to {n - 1}."
        )


def _is_order(order: object, n: int) -> bool:
    if not isinstance(order, Iterable):
        return False
    own = list(order)
    return all(map(is_integer, own)) and sorted(own) == list(range(n))
