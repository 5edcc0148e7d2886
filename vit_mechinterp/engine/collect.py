"""From what the chunks gave to results: outputs joined, captures in their sites' own axis order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vit_mechinterp.engine.bound import Bound
from vit_mechinterp.engine.chunk import Collected
from vit_mechinterp.engine.results import Captures, Results
from vit_mechinterp.engine.values import Read, by_token

__all__ = ["collected_results", "in_native_order"]


def collected_results(
    bound: Bound,
    collected: Collected,
    labels: Mapping[str, Sequence[int]],
    provenance: Mapping[str, Any],
) -> Results:
    """Results of chunks that are all in memory."""
    captures = {
        run.name: Captures(
            run.name, {c.name: _capture(c.read, collected.captures[run.name, c.name]) for c in run.captures}
        )
        for run in bound.runs
    }
    return Results(
        logits=torch.stack([torch.cat(collected.outputs[run.name]) for run in bound.runs]),
        run_names=tuple(run.name for run in bound.runs),
        captures=captures,
        labels=labels,
        provenance=provenance,
    )


def _capture(read: Read, pieces: list[tuple[Tensor, list[int] | None]]) -> Tensor | list[Tensor]:
    rows = torch.cat([tensor for tensor, _ in pieces])
    if pieces[0][1] is None:
        return in_native_order(read, rows, None)
    return in_native_order(read, rows, [count for _, own in pieces for count in (own or ())])


def in_native_order(
    read: Read, rows: Tensor, counts: Sequence[int] | None, *, equal: bool | None = None
) -> Tensor | list[Tensor]:
    """Captured rows in the site's own axis order; a list where examples differ in their number of tokens.

    Args:
        read: what was captured.
        rows: ``[example, token, *features]``, or with ``counts`` ``[m, *features]``.
        counts: tokens of every example.
        equal: whether all examples of the dataset have as many tokens; found in ``counts`` by default.
    """
    if counts is None:
        return by_token(read.site, rows).contiguous()
    if len(set(counts)) == 1 if equal is None else equal:
        return by_token(read.site, rows.reshape(-1, counts[0], *rows.shape[1:])).contiguous()
    return [
        part.transpose(0, 1).contiguous() if read.site.is_attention_matrix else part.contiguous()
        for part in torch.split(rows, list(counts))
    ]
