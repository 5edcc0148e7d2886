"""How many rows a forward should hold: measured once per model, device and threads, and remembered.

On a CPU, rows of very wide batches take longer each, because their activations no longer stay in the cache;
on a GPU, narrow batches leave it idle. What was measured is kept in ``throughput.json`` in the user's cache
folder (``$XDG_CACHE_HOME/vit_mechinterp``).
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, StopForward
from vit_mechinterp.model.out_of_memory import memory_may_run_out
from vit_mechinterp.spec import Site

__all__ = ["likely_width", "measured_width", "remembered_width"]

logger = logging.getLogger(__name__)

_FACTORS = (1, 2, 4, 8, 16)
"""Quarters of the likely width that are tried."""
REPEATS = 3
WORTHWHILE = 100
"""Measuring takes at most one part in so many of the work that it is for."""


def likely_width(vit: HookedViT) -> int:
    """Rows per forward without measuring: on a CPU what keeps one activation within its cache; on a GPU what
    fills it."""
    if vit.device.type != "cpu":
        return 256
    return max(4, 2**20 // (vit.layout.tokens.n_tokens * vit.layout.d_model))


def remembered_width(vit: HookedViT, most: int) -> int | None:
    """The width that was measured for such a model before, on such a device, of those that the same memory
    allows, or else of all; None if none was."""
    found = _remembered()
    widths = (found.get(key) for key in (_key(vit, most), _key(vit)))
    return next((width for width in widths if isinstance(width, int) and width > 0), None)


def measured_width(vit: HookedViT, most: int, block_evaluations: int) -> int | None:
    """The width at which rows take least time each, measured on one block and remembered.

    Args:
        vit: the model; the caller holds its lock, and gradients are off.
        most: the widest that memory allows.
        block_evaluations: (row, block) pairs of the work ahead.

    Returns:
        The width; None if the work is too small to be worth measuring for.
    """
    likely = min(likely_width(vit), most)
    # Away from a first guess in both directions; equal ones and those beyond the memory fall out.
    widths = sorted({max(1, min(most, likely * factor // 4)) for factor in _FACTORS})
    if block_evaluations < WORTHWHILE * (REPEATS + 1) * sum(widths):
        return None
    times: dict[int, float] = {}
    with memory_may_run_out():
        times = {width: _seconds_per_row(vit, width) for width in widths}
    if not times:
        return None
    best = min(times.values())
    # Wider batches mean fewer launches, so the widest of those that are as good as the best is taken.
    width = max(width for width, seconds in times.items() if seconds <= 1.01 * best)
    logger.info("%s: %d rows per forward", type(vit.module).__name__, width)
    _remember(_key(vit, most), width)
    return width


def _seconds_per_row(vit: HookedViT, width: int) -> float:
    """Least time of the middle block for a batch of noise, per row."""
    layer = vit.layout.n_layers // 2
    tokens, d_model = vit.layout.tokens.n_tokens, vit.layout.d_model
    times: list[float] = []
    begun: list[float] = []

    def begin(value: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(width, tokens, d_model, generator=draw).to(value.device, value.dtype)
        rows = rows.reshape(width, *value.shape[1:])
        _wait(vit)
        begun.append(time.perf_counter())
        return rows

    def end(value: Tensor) -> None:
        _wait(vit)
        times.append(time.perf_counter() - begun[-1])

    instrument = Instrument(vit.module, vit.layout)
    instrument.skip(range(layer))
    instrument.visit(Site(None, "embed") if layer == 0 else Site(layer, "resid_pre"), begin)
    instrument.visit(Site(layer, "resid_post"), end)
    instrument.stop(layer)
    with instrument.installed():
        for _ in range(REPEATS + 1):
            with suppress(StopForward):
                vit(vit.beginning(width))
    return min(times[1:]) / width


def _wait(vit: HookedViT) -> None:
    if vit.device.type == "cuda":
        torch.cuda.synchronize(vit.device)


def _key(vit: HookedViT, most: int | None = None) -> str:
    """What the best width depends on: also on the widest that memory allows, where that leaves candidates
    out, because a width that is best of few is not for work that has more memory."""
    layout = vit.layout
    cut = most is not None and most < likely_width(vit) * max(_FACTORS) // 4
    device = torch.cuda.get_device_name(vit.device) if vit.device.type == "cuda" else platform.machine()
    tokens = layout.tokens.n_tokens
    facts: Sequence[object] = (
        layout.family.name, f"{tokens} tokens", f"{layout.n_heads} heads", f"width {layout.d_model}",
        vit.dtype,
        vit.device.type, device, platform.node(), f"{torch.get_num_threads()} threads", torch.__version__,
        *([f"at most {most} rows"] if cut else []),
    )  # fmt: skip
    return ", ".join(map(str, facts))


def _file() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "vit_mechinterp" / "throughput.json"


def _remembered() -> dict[str, object]:
    try:
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # a user without a home folder is a RuntimeError
        return {}
    return found if isinstance(found, dict) else {}


def _remember(key: str, width: int) -> None:
    """Write it down; never an error."""
    with suppress(OSError, RuntimeError):
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**_remembered(), key: width}, indent=2)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            file.write(text)
        Path(file.name).replace(path)
