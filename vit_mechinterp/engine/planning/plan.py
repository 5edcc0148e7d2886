"""The plan: what an experiment will compute, as an immutable, printable, tensor-free value."""

from __future__ import annotations

from dataclasses import dataclass

from vit_mechinterp.engine.scheduling.sizes import in_words
from vit_mechinterp.errors import listed

__all__ = ["CleanForwards", "Plan", "PlannedRows"]


@dataclass(frozen=True)
class CleanForwards:
    """Clean forwards of one image column: how many images pass through how many blocks, and what is kept.

    An image that stands in several columns counts in one of them; with a store, in each.
    """

    column: str
    images: int
    blocks: int
    kept: tuple[str, ...]


@dataclass(frozen=True)
class PlannedRows:
    """Rows of one run: where they join, what is edited, how many blocks each passes through, and for how many
    examples (None for all of them). Rows that are equal to others join where these do."""

    run: str
    stage: int
    joins: str
    edits: tuple[str, ...]
    blocks: int
    examples: int | None = None


@dataclass(frozen=True)
class Plan:
    """What will be computed.

    Attributes:
        model: class of the native module.
        n_layers: number of its blocks.
        n_examples: number of examples; None for a plan made without data, whose counts are per example.
        chunk: most examples in one chunk.
        width: most rows that one forward may hold.
        widest: most rows that one forward does hold.
        clean_runs: runs that no edit changes, so that clean forwards answer them.
        clean: the clean forwards, by image column and number of blocks.
        rows: the rows of all other runs.
        block_evaluations: (row, block) pairs, clean ones included.
        naive_block_evaluations: the same for one run at a time, in whole forwards, with every source and base
            forward run anew.
        launches: forwards of the native module, beside the few small ones that find out what the output
            reads.
        peak_bytes: bound on what the engine holds beside the model while it computes.
        notes: why something is computed that could have been shared, and what is computed otherwise than it
            is written.
        spared: the part of the block evaluations, in blocks' worth of work, that rows share inside the blocks
            where they join.
        unread: the part of them, in blocks' worth of work, that nobody reads: tokens behind the last
            attention call.
        result_bytes: bytes of what the engine hands over.
        shared_rows: rows that are equal to rows that are computed.
        clean_rows: rows of other runs than ``clean_runs`` that clean forwards answer.
    """

    model: str
    n_layers: int
    n_examples: int | None
    chunk: int
    width: int
    widest: int
    clean_runs: tuple[str, ...]
    clean: tuple[CleanForwards, ...]
    rows: tuple[PlannedRows, ...]
    block_evaluations: int
    naive_block_evaluations: int
    launches: int
    peak_bytes: int
    notes: tuple[str, ...]
    spared: float = 0.0
    unread: float = 0.0
    result_bytes: int = 0
    shared_rows: int = 0
    clean_rows: int = 0

    @property
    def forwards(self) -> float:
        """Block evaluations as a number of whole forwards."""
        return self.block_evaluations / self.n_layers

    @property
    def naive_forwards(self) -> float:
        """Forwards that one run at a time would need."""
        return self.naive_block_evaluations / self.n_layers

    def __str__(self) -> str:
        per = "per example" if self.n_examples is None else f"for {_counted(self.n_examples, 'example')}"
        lines = [
            f"Plan {per} on {self.model} ({_counted(self.n_layers, 'block')})",
            f"  {self.forwards:.4g} forwards' worth of blocks "
            f"({_counted(self.block_evaluations, 'block evaluation')}) instead of "
            f"{self.naive_forwards:.4g} ({self.naive_block_evaluations})",
            f"  {_counted(self.launches, 'launch', 'launches')}, {self._chunks()}, at most "
            f"{_counted(self.widest, 'row')} each, at most {in_words(self.peak_bytes)} beside the model and "
            f"results of {in_words(self.result_bytes)}",
            "  clean forwards",
        ]
        for forward in self.clean:
            lines.append(
                f"    {forward.column}: {forward.images} x {_counted(forward.blocks, 'block')}, keeps "
                f"{listed(forward.kept, most=6)}"
            )
        if not self.clean:
            lines.append("    none")
        if self.clean_runs:
            lines.append(f"  runs that clean forwards answer: {listed(self.clean_runs, most=6)}")
        if self.clean_rows:
            lines.append(
                f"  {_counted(self.clean_rows, 'row')} of other runs that no edit changes, answered by clean "
                "forwards"
            )
        if self.shared_rows:
            lines.append(f"  {_counted(self.shared_rows, 'row')} equal to others, computed once")
        if self.spared > 0:
            lines.append(
                f"  of the block evaluations, {self.spared:.4g} blocks' worth is spared inside blocks where "
                "rows of one image join"
            )
        if self.unread > 0:
            lines.append(
                f"  of the block evaluations, {self.unread:.4g} blocks' worth is left out of the last block, "
                "behind whose attention most tokens are not read"
            )
        for stage in sorted({rows.stage for rows in self.rows}):
            lines.append(f"  rows that join one growing batch{f' (stage {stage + 1})' if stage else ''}")
            # Runs of a sweep that differ in tokens, heads or examples alone are one line.
            alike: dict[str, list[str]] = {}
            for rows in (r for r in self.rows if r.stage == stage):
                some = "" if rows.examples is None else f" for {_counted(rows.examples, 'example')}"
                how = f"at {rows.joins}, {_counted(rows.blocks, 'block')}; {', '.join(rows.edits)}{some}"
                alike.setdefault(how, []).append(rows.run)
            for how, names in alike.items():
                verb = "joins" if len(names) == 1 else "join"
                lines.append(f"    {listed(names, most=6)}: {verb} {how}")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _chunks(self) -> str:
        if self.n_examples is None:
            return "one chunk"
        chunks = -(-self.n_examples // self.chunk)
        return f"{_counted(chunks, 'chunk')} of up to {_counted(self.chunk, 'example')}"


def _counted(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"
