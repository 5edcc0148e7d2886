"""What looking costs: a wrapped model, captures and attention patterns against the native model.

    python -m benchmarks.overheads --model vit_base --examples 8

Patterns are compared with the same model with eager attention, which is what gives patterns otherwise: one
block's should cost at most that model's extra divided by the number of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import vit_mechinterp as vmi
from benchmarks import options
from benchmarks.measure import interleaved
from benchmarks.models import build, images
from benchmarks.plain import agree
from benchmarks.report import Report, Row

PRESETS = {
    "full": {"model": "vit_base", "examples": 8, "repeats": 20},
    "cuda": {"examples": 64, "repeats": 60},
    "small": {"model": "vit_tiny", "examples": 4, "repeats": 9},
    "micro": {"model": "micro", "examples": 2, "repeats": 2},
}
POSTS, PATTERNS = "blocks.*.resid_post", "blocks.*.attn.pattern"
RESIDUALS = ["embed", "blocks.*.resid_mid", POSTS]
BATCHES = "the whole residual stream captured, in a loop"


@torch.no_grad()
def main(argv: list[str] | None = None) -> Report:
    """Check that all see the same values, then time."""
    chosen = options.parse(options.add(__doc__ or ""), PRESETS, argv)
    report = Report("overheads", f"Overheads, {chosen.model}", chosen)
    placed = {"device": chosen.device, "dtype": chosen.torch_dtype}
    module: Any = build(chosen.model, **placed)
    eager: Any = build(chosen.model, **placed, attention="eager")
    vit = vmi.wrap(module)
    x = images(module, chosen.examples, 0)
    middle = vit.layout.n_layers // 2
    check(vit, module, eager, x, middle, chosen.tolerance)

    ways = {
        "native, again": lambda: module(x).logits,
        "wrapped, idle": lambda: vit(x),
        "native, output_hidden_states": lambda: module(x, output_hidden_states=True),
        "all block outputs captured": lambda: vit.run(x, capture=[POSTS]),
        "the whole residual stream captured": lambda: vit.run(x, capture=RESIDUALS),
        "patterns of one block": lambda: vit.run(x, capture=[f"blocks.{middle}.attn.pattern"]),
        "patterns of all blocks": lambda: vit.run(x, capture=[PATTERNS]),
        "eager model, output_attentions": lambda: eager(x, output_attentions=True),
    }
    timed = interleaved(ways, lambda: module(x).logits, chosen.repeats, chosen.torch_device)
    timed |= interleaved(in_a_loop(vit, x), lambda: module(x).logits, chosen.repeats, chosen.torch_device)
    cost = timed["eager model, output_attentions"].spread.median
    targets = {
        "wrapped, idle": 1.01,
        "all block outputs captured": 1.05,
        "the whole residual stream captured": 1.05,
        BATCHES: 1.05,
        "patterns of one block": 1 + (cost - 1) / vit.layout.n_layers + 0.02,
        "patterns of all blocks": cost,
    }
    for name, times in timed.items():
        contains = 1.0 if name == "wrapped, idle" else None
        report.rows.append(Row.timed(name, times, target=targets.get(name), or_contains=contains))
    report.note(
        "A figure is a time in plain native forwards of the same images (fused attention), measured "
        "around each repeat. 'native, again' is the native model itself: how far the method of measuring is "
        "from one; 'output_hidden_states' is the library's own way of keeping all block outputs.",
        "In a loop over batches, the last cache is there while the next forward runs. From the first cache "
        "on the process keeps as much freed memory as a forward and its cache take, up to 256 MiB, and more "
        "while there is a cache.",
        "Wrapped and idle also meets its target where its interval contains one: no difference is seen then.",
        "Targets for patterns come from the eager model in the same run: one block at most its extra cost "
        "divided by the number of blocks, plus 2 %; all blocks at most its median.",
    )
    report.finish()
    return report


def in_a_loop(vit: vmi.HookedViT, x: Tensor) -> dict[str, Callable[[], None]]:
    """Capture as a loop over batches does, in which one batch's cache is there until the next one's is."""
    caches: list[object] = []

    def capture() -> None:
        _, cache = vit.run(x, capture=RESIDUALS)
        caches[:] = [cache]

    return {BATCHES: capture}


def check(vit: vmi.HookedViT, module: Any, eager: Any, x: Tensor, layer: int, share: float) -> None:
    """Assert that what is timed sees what the native model itself returns."""
    native = module(x, output_hidden_states=True)
    assert torch.equal(vit(x), native.logits)
    logits, cache = vit.run(x, capture=RESIDUALS)
    assert torch.equal(logits, native.logits)
    names = ["embed", *(f"blocks.{n}.resid_post" for n in range(vit.layout.n_layers))]
    assert len(native.hidden_states) == len(names)
    # The last hidden state is behind the final norm in some versions of transformers, so it is left out.
    for name, state in list(zip(names, native.hidden_states, strict=True))[:-1]:
        assert torch.equal(cache[name], state), name
    wanted = eager(x, output_attentions=True)
    logits, cache = vit.run(x, capture=[PATTERNS])
    agree("patterns of all blocks: logits", logits, wanted.logits.float().cpu(), share)
    for n, pattern in enumerate(wanted.attentions):
        agree(f"pattern of block {n}", cache[f"blocks.{n}.attn.pattern"], pattern.float().cpu(), share)
    _, cache = vit.run(x, capture=[f"blocks.{layer}.attn.pattern"])
    agree("one pattern", cache[f"blocks.{layer}.attn.pattern"], wanted.attentions[layer].float().cpu(), share)


if __name__ == "__main__":
    main()
