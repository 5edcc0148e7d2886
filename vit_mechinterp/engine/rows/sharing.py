"""What need not be computed twice: equal rows, and rows that no edit changes.

A row is one example of one run. Rows with the same base image and equal edits (the same operation, site,
tokens, heads and sources, by the contents of their images) are of one class, whatever their runs are called.
An edit that puts a value back where it comes from is left out of its row. A row that no edit changes is
answered by the clean forward of its image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from vit_mechinterp.engine.arrays import NONE, BoolArray, IntArray
from vit_mechinterp.engine.binding.bound import Bound, BoundRun, Edit
from vit_mechinterp.engine.binding.values import ColumnOrigin, permutation
from vit_mechinterp.engine.rows.numbering import Numbering, Part
from vit_mechinterp.engine.rows.row_keys import RowKeys

__all__ = ["Sharing", "acting"]

Found = TypeVar("Found")


@dataclass(frozen=True)
class Sharing:
    """Classes of rows of one experiment.

    Args:
        bound: the bound runs.
        images: numbers of the images of every image column, ``[example]``; equal numbers, equal images.
        rows: whether equal rows are found; otherwise every row that is declared stands for itself.
        imagined: whether there is no data, so that one example stands for all: what is resampled is another
            image then, and columns that select tokens are told apart by their names.
        handed_on: blocks that are given the output of the one before, or of the embedding, as it is.
    """

    bound: Bound
    images: Mapping[str, IntArray]
    rows: bool = True
    imagined: bool = False
    handed_on: frozenset[int] = frozenset()

    @cached_property
    def n_examples(self) -> int:
        """Number of examples."""
        return len(next(iter(self.images.values())))

    def once(self, key: tuple[object, ...], find: Callable[[], Found]) -> Found:
        """What ``find`` gives, found once per key, for all schedules of these rows: a key names what it
        depends on of what these differ in, chunk, width and what is held."""
        if key not in self._found:
            self._found[key] = find()
        found: Found = self._found[key]
        return found

    @cached_property
    def _found(self) -> dict[tuple[object, ...], Any]:
        return {}

    def images_of(self, origin: ColumnOrigin) -> IntArray:
        """Number of the image that each example's clean value is made from."""
        if origin not in self._images_of:
            own = self.images[origin.column]
            if origin.permutation is not None and self.imagined:
                own = own + len(self.images) * (1 + origin.permutation)
            elif origin.permutation is not None:
                own = own[self.places_of(origin)]
            self._images_of[origin] = own
        return self._images_of[origin]

    def places_of(self, origin: ColumnOrigin) -> IntArray:
        """The example in whose place of the column each example's image stands."""
        if origin.permutation not in self._places_of:
            n, seed = self.n_examples, origin.permutation
            self._places_of[seed] = np.arange(n) if seed is None else permutation(seed, n)
        return self._places_of[origin.permutation]

    @cached_property
    def _images_of(self) -> dict[ColumnOrigin, IntArray]:
        return {}

    @cached_property
    def _places_of(self) -> dict[int | None, IntArray]:
        return {}

    @cached_property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """Rows of every run that edits change, by run; what is left is clean."""
        return self._sorted_out[0]

    @cached_property
    def parts_of_stages(self) -> tuple[tuple[Part, ...], ...]:
        """The same, stage by stage."""
        return tuple(
            tuple(part for run in stage for part in self.parts[run.name]) for stage in self.bound.stages
        )

    @cached_property
    def classes(self) -> dict[str, IntArray]:
        """Class of every row by run, ``[example]``; a negative class is that of a clean forward's image."""
        return self._sorted_out[1]

    @cached_property
    def repeats(self) -> bool:
        """Whether any two rows that edits change are of one class."""
        return self.n_classes < self.n_edited_rows

    @cached_property
    def joins_examples(self) -> bool:
        """Whether rows of different examples may begin alike, or be equal where more than outputs is kept of
        them: of what they have in common, only rows of one chunk make use."""
        parts = [part for own in self.parts.values() for part in own]
        bound = self.bound
        more = bound.readout is not None or any(bound.reads_of.values())
        if not (self.repeats and more) and all(len(part.states) < 2 for part in parts):
            return False
        origins = {part.run.origin for part in parts}
        first = [part.run.edits[0].source for part in parts if part.run.blank]
        if None in first:  # what these rows start from is of no image
            return True
        origins |= {source.origin for source in first if source and isinstance(source.origin, ColumnOrigin)}
        images = np.concatenate([self.images_of(origin) for origin in origins])
        return len(np.unique(images)) < len(images)

    @property
    def n_classes(self) -> int:
        """How many rows that edits change differ."""
        return self._sorted_out[2]

    @cached_property
    def n_edited_rows(self) -> int:
        """How many rows edits change."""
        return sum(len(part.examples) for parts in self.parts.values() for part in parts)

    def clean_rows(self, run: str) -> IntArray:
        """Examples of a run that a clean forward answers."""
        parts = self.parts.get(run, ())
        if len(parts) == 1 and len(parts[0].examples) == self.n_examples:
            return NONE
        return np.flatnonzero(self.classes[run] < 0)

    def first_alike(self, column: str) -> str:
        """The first column that holds the same images."""

        def find() -> str:
            own = self.images[column]
            return next(name for name, other in self.images.items() if np.array_equal(own, other))

        return self.once(("alike", column), find)

    @cached_property
    def _sorted_out(self) -> tuple[dict[str, tuple[Part, ...]], dict[str, IntArray], int]:
        parts: dict[str, tuple[Part, ...]] = {}
        clean = {origin: -1 - self.images_of(origin) for origin in {run.origin for run in self.bound.runs}}
        classes = {run.name: clean[run.origin] for run in self.bound.runs}  # until edits say otherwise
        everyone = np.arange(self.n_examples)
        if not self.rows:
            edited = [(number, run) for stage in self.bound.stages for number, run in enumerate(stage)]
            for n, (number, run) in enumerate(edited):
                parts[run.name] = (Part(run, everyone, number=number),)
                classes[run.name] = n * self.n_examples + everyone
            return parts, classes, len(edited) * self.n_examples
        keys = RowKeys(self, parts)
        numbering = Numbering(keys)
        count = 0
        for stage in self.bound.stages:
            variants = [(run, *own) for run in stage for own in self._variants(run, keys, everyone)]
            numbered = numbering.parts([(acting(run, edits), examples) for run, examples, edits in variants])
            parts.update((run.name, ()) for run in stage)
            for part in numbered:
                parts[part.run.name] += (part,)
                _put(classes, part, self.n_examples)
            count += len(np.unique(np.concatenate([part.states[-1] for part in numbered] or [NONE])))
        return parts, classes, count

    def _variants(
        self, run: BoundRun, keys: RowKeys, everyone: IntArray
    ) -> list[tuple[IntArray, tuple[Edit, ...]]]:
        """Examples by the edits that act on them, without those that none acts on."""
        acting: list[bool | BoolArray] = []
        changed: bool | BoolArray = False
        for edit in run.edits:
            same = keys.puts_back(run, edit) if changed is not True else None
            acts: bool | BoolArray = True if same is None else ~same | changed
            if edit.idle:
                acts = acts & ~np.isin(everyone, edit.idle)
            acting.append(acts)
            changed = True if acts is True else changed | acts
        if all(acts is True for acts in acting):
            return [(everyone, run.edits)]
        table = np.stack([np.broadcast_to(np.asarray(acts), everyone.shape) for acts in acting])
        patterns, which = np.unique(table, axis=1, return_inverse=True)
        return [
            (
                np.flatnonzero(which.reshape(-1) == n),
                tuple(e for e, on in zip(run.edits, pattern, strict=True) if on),
            )
            for n, pattern in enumerate(patterns.T)
            if pattern.any()
        ]


def _put(classes: dict[str, IntArray], part: Part, n_examples: int) -> None:
    """Give a part's rows their classes; arrays may be shared by runs, and are not written into."""
    numbers = part.states[-1]
    if len(numbers) < n_examples:
        own = classes[part.run.name].copy()
        own[part.examples] = numbers
        numbers = own
    classes[part.run.name] = numbers


def acting(run: BoundRun, edits: tuple[Edit, ...]) -> BoundRun:
    """A run with those edits that act in some examples; blank rows whose base is put back start from it."""
    if len(edits) == len(run.edits):
        return run
    lacking = {edit.site.layer for edit in run.edits if all(edit is not own for own in edits)}
    blank = run.blank and edits[0] is run.edits[0]
    return replace(run, edits=edits, blank=blank, bypasses=run.bypasses - lacking)
