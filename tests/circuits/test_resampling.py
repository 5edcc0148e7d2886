"""Every circuit that draws intervals asks whether it can before it looks at anything else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

import vit_mechinterp.circuits as circuits
from vit_mechinterp.errors import SpecError

DRAWING = [
    function
    for name in circuits.__all__
    if inspect.isfunction(function := getattr(circuits, name))
    and {"vit", "resamples", "seed"} <= set(inspect.signature(function).parameters)
]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"resamples": 0}, r"resamples=0: an interval takes at least 1, and 2000 are usual\."),
        ({"seed": -1}, r"seed=-1: a seed is a whole number, 0 or more\."),
    ],
)
@pytest.mark.parametrize("circuit", DRAWING, ids=lambda function: function.__name__)
def test_what_cannot_be_drawn_is_refused_first(
    circuit: Callable[..., Any], options: dict[str, int], text: str
) -> None:
    required = [p.name for p in inspect.signature(circuit).parameters.values() if p.default is p.empty]
    with pytest.raises(SpecError, match=text):
        circuit(**dict.fromkeys(required), **options)


def test_there_are_such_circuits() -> None:
    assert {"attention_stages", "steering", "probing"} <= {function.__name__ for function in DRAWING}
