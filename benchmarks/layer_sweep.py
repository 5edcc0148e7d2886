"""A sweep of one intervention over all layers: one run at a time with plain hooks, and as one plan.

Interchange of four per-example tokens at every block output. All ways give the same numbers, which is
asserted before anything is timed. Times are ratios to one plain forward of the same images, measured in the
same process, so they carry over between machines better than seconds do.

    python benchmarks/layer_sweep.py --model timm/vit_small_patch16_224 --examples 8
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import vit_mechinterp as vmi


def naive(module: nn.Module, blocks: nn.ModuleList, data: dict[str, Tensor], *, cache_source: bool) -> Tensor:
    """Plain PyTorch hooks, one run at a time; the source forward once per layer or once in all."""
    first = next(iter(data["edited"]))
    rows = torch.arange(len(data["base"]))[:, None].expand(-1, len(first))
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, args, output: kept.__setitem__(layer, output)

    def swap(layer: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            output = output.clone()
            output[rows, 1 + data["edited"]] = kept[layer][rows, 1 + data["source_tokens"]]
            return output

        return hook

    outputs = []
    for layer, block in enumerate(blocks):
        if not cache_source or layer == 0:
            watched = range(len(blocks)) if cache_source else [layer]
            handles = [blocks[i].register_forward_hook(keep(i)) for i in watched]
            module(data["source"])
            for handle in handles:
                handle.remove()
        handle = block.register_forward_hook(swap(layer))
        outputs.append(module(data["base"]))
        handle.remove()
    return torch.stack(outputs)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median time of some repetitions after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    """Measure, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="timm/vit_small_patch16_224")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    vit = vmi.load(arguments.model, pretrained=False)
    vit.module.to(arguments.device)
    layout = vit.layout
    size = (arguments.examples, 3, *layout.tokens.image_size)
    patches = torch.stack(
        [torch.randperm(layout.tokens.n_patches)[:4] for _ in range(2 * arguments.examples)]
    )
    data = {
        "base": torch.randn(size, device=arguments.device),
        "source": torch.randn(size, device=arguments.device),
        "edited": patches[: arguments.examples],
        "source_tokens": patches[arguments.examples :],
    }
    swap = vmi.Interchange(
        site="blocks.0.resid_post",
        tokens={"column": "edited"},
        source="source",
        source_tokens={"column": "source_tokens"},
    )
    runs = [vmi.Run(name=f"layer{n}", interventions=[swap.at(layer=n)]) for n in range(layout.n_layers)]
    blocks = vit.module.get_submodule(layout.blocks_path)
    assert isinstance(blocks, (nn.ModuleList, nn.Sequential))
    plan = vmi.plan(vit, runs, data)

    ways: dict[str, Callable[[], Tensor]] = {
        "plain hooks, source forward per layer": lambda: naive(vit.module, blocks, data, cache_source=False),
        "plain hooks, source cached": lambda: naive(vit.module, blocks, data, cache_source=True),
        "vit_mechinterp": lambda: vmi.execute(vit, runs, data, progress=False).logits,
    }
    reference = ways["plain hooks, source cached"]().cpu()
    scale = reference.abs().max().item()
    for name, way in ways.items():
        difference = (way().cpu() - reference).abs().max().item()
        assert difference <= 1e-5 * scale, f"{name} differs by {difference:.2g}"
    clean = vit(data["base"]).cpu()
    assert ((reference[:-1] - clean).abs().amax(dim=-1) > 0).all(), "an intervention had no effect"

    unit = seconds(lambda: vit(data["base"]), arguments.repeats)
    floor = plan.forwards / arguments.examples
    table = {name: seconds(way, arguments.repeats) / unit for name, way in ways.items()}
    print(
        f"{arguments.model}, {arguments.examples} examples, {layout.n_layers} layers, {arguments.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    )
    print(f"one plain forward of the {arguments.examples} images: {unit * 1000:.1f} ms")
    for name, ratio in table.items():
        print(f"  {name:40} {ratio:6.2f} forwards")
    print(f"  {'block evaluations of the plan':40} {floor:6.2f} forwards")
    if arguments.out is not None:
        record = {
            "model": arguments.model,
            "examples": arguments.examples,
            "device": arguments.device,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "unit_ms": unit * 1000,
            "forwards": table,
            "floor": floor,
        }
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
