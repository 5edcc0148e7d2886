"""What every benchmark's command line takes, and the sizes it falls back on."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import SIZES

__all__ = ["DTYPES", "add", "parse"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}
"""How far two ways may differ, as a share of the output's scale."""

Presets = Mapping[str, Mapping[str, Any]]


def add(doc: str) -> argparse.ArgumentParser:
    """A parser with the shared options; a benchmark may add its own, with None as their default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, help="sizes of the ViT, which gets random weights")
    parser.add_argument("--examples", type=int, help="number of images or pairs")
    parser.add_argument("--repeats", type=int, help="how often everything is timed")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tolerance", type=float, help="how far ways may differ, in the output's scale")
    parser.add_argument("--threads", type=int, help="threads on a CPU; torch's own choice if left out")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--small", dest="scale", action="store_const", const="small", help="a minute or two")
    size.add_argument("--micro", dest="scale", action="store_const", const="micro", help="seconds, for tests")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--report", type=Path, help="write a dated Markdown report into this folder")
    parser.set_defaults(scale="full")
    return parser


def parse(parser: argparse.ArgumentParser, presets: Presets, argv: list[str] | None = None) -> Any:
    """Parse, fill what was left out from the preset of the chosen scale, and set the number of threads.

    The preset ``cuda`` overlays the full one on a GPU, which needs more images to be busy.
    """
    options = parser.parse_args(argv)
    preset = dict(presets[options.scale])
    if options.scale == "full" and options.device.startswith("cuda"):
        preset |= presets.get("cuda", {})
    for name, value in preset.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    options.torch_device = torch.device(options.device)
    options.torch_dtype = DTYPES[options.dtype]
    if options.tolerance is None:
        options.tolerance = TOLERANCES[options.dtype]
    return options
