"""A process under a budget: run by `test_budget`, as ``python -m tests.engine.budgeted FOLDER WHAT``.

It works through activations of ten times the budget, and prints how far its anonymous memory rose above the level
before, in units of the budget, and how much passed through.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

import vit_mechinterp as vmi
from vit_mechinterp.engine import prepare
from vit_mechinterp.model.heap import give_back

BUDGET = 64 * 1024**2
SIDE = 128
N = 10 * BUDGET // (3 * SIDE * SIDE * 4)
SITES = ["blocks.*.attn.pattern", "blocks.*.resid_post", "blocks.*.mlp.post"]


class Lazy:
    """A column of images that are made when they are asked for."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        if not 0 <= i < self.n:
            raise IndexError(i)
        return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(self.seed * 10**6 + i))


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def peak_of(work: Callable[[], Any]) -> int:
    """How far anonymous memory rises above the level before."""
    gc.collect()
    before, highest, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return highest - before


def wide(folder: Path) -> dict[str, Any]:
    """A capture of a model of ordinary size, in batches that would take several times the budget."""
    budget, n = 24 * 1024**2, 400
    module = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=192, depth=4, num_heads=3, num_classes=5)
    vit = vmi.wrap(module.eval())

    def work(n: int, own: Path) -> None:
        with vmi.ActivationStore(own, host=budget) as store:
            store.capture(vit, {"base": Lazy(n, 1)}, "blocks.*.resid_post", batch_size=32, progress=False)

    work(24, folder / "warm")
    risen = peak_of(lambda: work(n, folder / "whole"))
    kept = sum(path.stat().st_size for path in (folder / "whole").rglob("*.safetensors"))
    return {"risen": risen / budget, "pixels": n * 3 * SIDE * SIDE * 4 / budget, "activations": kept / budget}


def small() -> dict[str, Any]:
    """Many runs under a budget of few megabytes, in a process that has worked without one before, and so has much free
    memory between its tensors."""
    budget, n = 16 * 1024**2, 400
    module = VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=96, depth=3, num_heads=3, num_classes=5)
    vit = vmi.wrap(module.eval())
    tokens: list[Any] = [[0, 5], [0], [7, 8, 9], "all"]
    swaps = [vmi.Interchange(site=f"blocks.{k}.resid_post", tokens=own, source="source") for k in range(3) for own in tokens]
    runs = [vmi.Run(name=f"run{k}", interventions=[swap]) for k, swap in enumerate(swaps)]

    def work(n: int, memory: int | None) -> None:
        vmi.execute(vit, runs, {"base": Lazy(n, 1), "source": Lazy(n, 2)}, memory=memory, progress=False)

    work(40, None)
    give_back()
    risen = peak_of(lambda: work(n, budget))
    pixels, tokens_of_all = 2 * n * 3 * SIDE * SIDE * 4, n * 257 * 96 * 4 * len(runs) * 3
    return {"risen": risen / budget, "pixels": pixels / budget, "activations": tokens_of_all / budget}


def main(folder: Path, what: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if what == "wide":
        return wide(folder)
    if what == "small":
        return small()
    module = VisionTransformer(img_size=SIDE, patch_size=16, embed_dim=24, depth=3, num_heads=3, num_classes=5)
    vit = vmi.wrap(module.eval())
    held = sum(int(torch.Size(vit.sites()[name].shape).numel()) for name in vit.expand(SITES)) * 4

    def captured(n: int, own: Path) -> None:
        with vmi.ActivationStore(own, host=BUDGET) as store:
            view = store.capture(vit, {"base": Lazy(n, 1)}, SITES, batch_size=4, progress=False)
            order = torch.randperm(n)[:64].tolist()
            for i in range(0, len(order), 8):
                view.take(order[i : i + 8])

    def executed(n: int, own: Path) -> None:
        swap = vmi.Interchange(site="blocks.1.resid_post", source="source", tokens=[0, 1])
        runs = [vmi.Run(name="clean", capture=SITES), vmi.Run(name="swap", interventions=[swap], capture=SITES)]
        data = {"base": Lazy(n, 1), "source": Lazy(n, 2)}
        results = vmi.execute(vit, runs, data, memory=BUDGET, out=own, progress=False)
        assert results.captures["swap"]["blocks.2.mlp.post"].shape[0] == n

    def swept(n: int, own: Path) -> None:
        swap = vmi.Interchange(site="blocks.0.resid_post", source="source", tokens=[0, 1])
        runs = [vmi.Run(name=f"layer{layer}", interventions=[swap.at(layer=layer)]) for layer in range(3)]
        vmi.execute(vit, runs, {"base": Lazy(n, 1), "source": Lazy(n, 2)}, memory=BUDGET, progress=False)

    def averaged(n: int, own: Path) -> None:
        means = [vmi.Ablate(site=f"blocks.{layer}.attn.pattern", method="mean") for layer in range(3)]
        runs = [vmi.Run(name="means", interventions=means)]
        vmi.execute(vit, runs, {"base": Lazy(n, 1)}, memory=BUDGET, batch_size=4, progress=False)

    def prepared(n: int, own: Path) -> None:
        swap = vmi.Interchange(site="blocks.0.attn.pattern", source="source")
        runs = [vmi.Run(name=f"layer{layer}", interventions=[swap.at(layer=layer)]) for layer in range(3)]
        data = {"base": Lazy(n, 1), "source": Lazy(n, 2)}
        with prepare(vit, runs, data, {}, memory=BUDGET, progress=False) as ready, torch.no_grad():
            assert ready.nbytes == 0 or n < N
            ready([0, n // 2], {})

    every = {"capture": captured, "execute": executed, "sweep": swept, "means": averaged, "prepare": prepared}
    work = every[what]
    work(24, folder / "warm")
    risen = peak_of(lambda: work(N, folder / "whole"))
    return {"risen": risen / BUDGET, "pixels": N * 3 * SIDE * SIDE * 4 / BUDGET, "activations": N * held / BUDGET}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
