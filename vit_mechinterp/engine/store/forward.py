"""One clean forward of a batch of images, no further than anybody reads, keeping what somebody reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.stop import Stop
from vit_mechinterp.engine.binding.values import Read, gather
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, StopForward
from vit_mechinterp.spec import Site

__all__ = ["Rows", "Wanted", "clean_forward", "stop_behind"]

Wanted = Read | None
"""A value of a clean forward; None is its output."""


@dataclass(frozen=True)
class Rows:
    """Whose values are kept: rows of the batch, and the example that chooses the tokens of each."""

    of: IntArray | slice
    examples: IntArray


def stop_behind(wanted: Iterable[Wanted], n_layers: int) -> Stop:
    """Where a forward that gives some values may stop."""
    return max(Stop(2 * n_layers) if r is None else Stop.for_site(r.site, n_layers) for r in wanted)


def clean_forward(
    vit: HookedViT,
    images: Callable[[], Float[Tensor, "row channel height width"]],
    wanted: Mapping[Wanted, Rows],
    explicit: Iterable[int],
    dtype: torch.dtype,
) -> tuple[dict[Wanted, Tensor], int]:
    """Values of one batch under ``no_grad``, and the number of blocks that it passed through.

    Args:
        vit: the model.
        images: makes the batch.
        wanted: every value, and the rows that it is kept of; the output is kept whole, in float32.
        explicit: blocks that compute their attention explicitly.
        dtype: dtype of what is kept.

    Raises:
        OutOfMemoryError: the forward does not fit.
    """
    values: dict[Wanted, Tensor] = {}
    instrument = Instrument(vit.module, vit.layout)

    def keep(read: Read, rows: Rows) -> Callable[[Tensor], None]:
        def visitor(value: Tensor) -> None:
            values[read] = gather(read.site, value, rows.of, read, rows.examples).to(dtype)

        return visitor

    opened = set()
    for read, rows in wanted.items():
        if read is not None:
            instrument.visit(read.site, keep(read, rows))
            if read.site.is_attention_matrix:
                opened.add(read.site.layer)
    for layer in set(explicit) - opened:
        instrument.visit(Site(layer, "attn.scores"), lambda value: None)
    stop = stop_behind(wanted, vit.layout.n_layers)
    place = stop.at(vit.layout.n_layers)
    if place is not None:
        instrument.stop(place[0], before=place[1])
    with vit.lock, torch.no_grad(), instrument.installed():
        with suppress(StopForward):
            output = vit(images())
            if None in wanted:
                values[None] = output.float()
        instrument.verify()
    return values, stop.blocks
