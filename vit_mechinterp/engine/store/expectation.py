"""What an experiment will ask of a store, so that one forward of an image gives all of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.values import Needs, origin_of
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.engine.store.forward import Wanted
from vit_mechinterp.engine.store.homes import Homes

__all__ = ["expectations", "requests_for"]

Demand = dict[str, dict[Wanted, IntArray]]
"""What is asked for at once: by image column and value, places of the column."""


@dataclass
class Expectation:
    """What will be asked of one image column.

    Args:
        wanted: of every value, the examples that it is asked for.
        in_order: whether every image is, each for the first time behind those before it, so that what is kept
            fills up without gaps.
    """

    wanted: dict[Wanted, IntArray] = field(default_factory=dict)
    in_order: bool = True


def requests_for(
    schedule: Schedule, homes: Homes, chunks: Iterable[range], *, means: bool
) -> Iterator[Demand]:
    """What some chunks will ask for, one after another, and before them, if so asked, what dataset means over
    every chunk will."""
    if means:
        for chunk in schedule.chunks:
            yield _demand(homes, schedule.needs.of(chunk, schedule.reads.means))
    for chunk in chunks:
        yield _demand(homes, schedule.needs.of(chunk))


def _demand(homes: Homes, needs: Needs) -> Demand:
    found: Demand = defaultdict(dict)
    for need, examples in needs.items():
        own, form = found[homes.of(origin_of(need).column)], homes.form(need)
        places = homes.places(need, examples)
        own[form] = np.concatenate([own[form], places]) if form in own else places
    return found


def expectations(demands: Iterable[Demand], images: Mapping[str, IntArray]) -> dict[str, Expectation]:
    """What demands come to, by image column.

    Args:
        demands: the demands, in order.
        images: numbers of each column's images, ``[example]``, counted as they first appear.
    """
    asked: dict[str, dict[Wanted, list[IntArray]]] = defaultdict(lambda: defaultdict(list))
    found: dict[str, Expectation] = defaultdict(Expectation)
    last = dict.fromkeys(images, -1)
    seen = {column: np.zeros(len(own), dtype=np.bool_) for column, own in images.items()}
    for demand in demands:
        for column, wanted in demand.items():
            for form, examples in wanted.items():
                asked[column][form].append(examples)
            numbers = np.unique(images[column][np.concatenate(list(wanted.values()))])
            new = numbers[~seen[column][numbers]]
            if len(new):
                found[column].in_order &= int(new[0]) > last[column]
                seen[column][new], last[column] = True, int(new[-1])
    for column, values in asked.items():
        own = found[column]
        own.wanted = {form: np.unique(np.concatenate(parts)) for form, parts in values.items()}
        whole = (_of_every_image(form, examples, images[column]) for form, examples in own.wanted.items())
        own.in_order &= all(whole)
    return dict(found)


def _of_every_image(form: Wanted, examples: IntArray, images: IntArray) -> bool:
    if form is not None and form.positions.each is not None:
        return len(examples) == len(images)
    return len(np.unique(images[examples])) == int(images.max()) + 1
