"""Stimuli by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from vit_mechinterp import stimuli
from vit_mechinterp.errors import SpecError

SMALL = {"canvas": 64, "patch": 8, "cell": 16}


def test_build_makes_what_the_functions_make() -> None:
    built = stimuli.build("discrimination", split="val", n=4, seed=1, **SMALL)
    made = stimuli.discrimination("val", 4, seed=1, canvas=64, patch=8, cell=16)
    assert [np.asarray(image).tobytes() for image in built["base"]] == [
        np.asarray(image).tobytes() for image in made["base"]
    ]
    pairs = stimuli.build("discrimination_counterfactuals", attribute="color", n=4, **SMALL)
    assert {"base", "source", "edited_tokens", "source_other_box"} <= set(pairs.column_names)
    assert stimuli.names() == [
        "discrimination",
        "discrimination_counterfactuals",
        "discrimination_exchanges",
        "realistic_discrimination",
        "rmts",
        "rmts_counterfactuals",
        "spatially_structured",
    ]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "discriminations",
            {},
            r"no stimuli 'discriminations'. Stimuli: discrimination, .*Close matches: discrim",
        ),
        (
            "discrimination",
            {"canvass": 64},
            r"no option 'canvass'. Options: split, n, seed, .*Close matches: canvas",
        ),
        ("discrimination_counterfactuals", {}, r"missing a required argument: 'attribute'"),
        ("discrimination", {"n": 2, "canvas": 65}, r"canvas=65"),
        ("discrimination", {"n": 2.5}, r"n takes int, not 2\.5"),
        ("discrimination", {"n": True}, r"n takes int, not True"),
        ("rmts", {"n": 2, "split": 5}, r"split takes str, not 5"),
        ("rmts", {"n": 2, "combinations": ["32"]}, r"combinations takes str, not \['32'\]"),
        ("rmts_counterfactuals", {"attribute": "shape", "n": 2, "seed": -1}, r"seed=-1: a seed is a whole number, 0 or more"),
    ],
)
def test_bad_requests_say_what_there_is(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        stimuli.build(name, **options)


def test_third_parties_register_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from vit_mechinterp.stimuli import registry

    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))

    def stripes(n: int) -> object:
        return ["stripe"] * n

    stimuli.register("stripes", stripes)  # type: ignore[arg-type]
    assert stimuli.build("stripes", n=2) == ["stripe", "stripe"]
    with pytest.raises(SpecError, match="'stripes' is taken"):
        stimuli.register("stripes", stimuli.discrimination)


def test_importing_stimuli_loads_no_dataset_library() -> None:
    code = (
        "import sys, vit_mechinterp.stimuli; "
        "sys.stdout.write(','.join(sorted({'datasets', 'mitsuba', 'pandas', 'PIL', 'timm', 'transformers'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
