"""One experiment with a little of everything, cut into small chunks: what tests of stores and of resuming run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vit_mechinterp import Results

N = 8
"""Examples to run it on."""

DOCUMENTS: list[dict[str, Any]] = [
    {
        "name": "clean",
        "capture": [
            "blocks.1.resid_post",
            {"site": "blocks.0.attn.pattern", "tokens": {"box": "box"}, "heads": [1]},
        ],
    },
    {
        "name": "swap",
        "interventions": [
            {
                "op": "interchange",
                "site": "blocks.1.resid_post",
                "source": "source",
                "tokens": {"column": "here"},
                "source_tokens": {"column": "there"},
            }
        ],
        "capture": [
            "pooled",
            {"site": "embed", "tokens": {"box": "box"}},
            {"site": "blocks.2.attn.pattern", "tokens": ["cls", 3]},
        ],
    },
    {"name": "mean", "interventions": [{"op": "ablate", "site": "blocks.0.mlp_out", "method": "mean"}]},
    {
        "name": "resample",
        "interventions": [
            {"op": "ablate", "site": "blocks.1.attn_out", "method": "resample", "tokens": {"column": "here"}}
        ],
    },
    {"name": "push", "interventions": [{"op": "add_direction", "site": "blocks.2.resid_pre", "vector": "direction.24"}]},
]


def cut_small(monkeypatch: pytest.MonkeyPatch | None = None) -> None:
    """Chunks of few examples, whatever memory allows and their rows have in common."""
    from vit_mechinterp.engine.rows.sharing import Sharing
    from vit_mechinterp.engine.scheduling import cutting

    few = [(cutting, "FEWEST_ROWS", 8), (cutting, "MOST_ROWS", 8), (Sharing, "joins_examples", False)]
    for owner, name, value in few:
        (setattr if monkeypatch is None else monkeypatch.setattr)(owner, name, value)


def hold_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of as many examples as memory has room for, with nothing held for several of them."""
    from vit_mechinterp.engine.scheduling import cutting

    monkeypatch.setattr(cutting, "_holding", lambda *_: None)


def assert_same_bits(one: Results, other: Results) -> None:
    """Outputs, captures and labels are equal to the last bit, and runs differ from each other."""
    assert one.run_names == other.run_names
    assert one.labels == other.labels
    assert torch.equal(one.logits, other.logits)
    for run, captures in one.captures.items():
        assert list(captures) == list(other.captures[run])
        for site, value in captures.items():
            again = other.captures[run][site]
            assert type(value) is type(again)
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(value, again, strict=True))
    assert all(float((one.logits[0] - row).abs().max()) > 1e-3 for row in one.logits[1:])
