"""What rows of a chunk hand to others while they pass through the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vit_mechinterp.engine.rows.branching import Handed, Row
from vit_mechinterp.spec import Site

__all__ = ["Handover"]


@dataclass
class Handover:
    """What rows (run, example) hand on, to rows that go on from them and to readers of others.

    Args:
        gifts: the states that a row hands on, each with the site that it is seen at.
        handed: what of a row is read as another's, until that one is by itself.
        copies: the rows whose values are those of a row, in the stage that is computed.
        begun: the states handed on so far.
    """

    gifts: Mapping[Row, Iterable[tuple[Site, int]]] = field(default_factory=dict)
    handed: Mapping[Row, Sequence[Handed]] = field(default_factory=dict)
    copies: Mapping[Row, Sequence[Row]] = field(default_factory=dict)
    begun: dict[tuple[Site, int], Tensor] = field(default_factory=dict)
