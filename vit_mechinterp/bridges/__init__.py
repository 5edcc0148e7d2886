"""The same experiment on other packages: plain PyTorch hooks, nnsight, pyvene and TransformerLens.

``vmi.execute(vit, runs, data, backend="hooks" | "nnsight" | "pyvene")`` carries out the same runs there, and
`vit_mechinterp.bridges.transformer_lens.hooked` makes a model for TransformerLens's own tools. A package is
imported when its module here is, and never otherwise: ``pip install 'vit-mechinterp[bridges]'`` installs all.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = [
    "agreement",
    "hooks",
    "nnsight",
    "nnsight_remote",
    "nnsight_sited",
    "parity",
    "pyvene",
    "pyvene_configs",
    "pyvene_rotations",
    "restoring",
    "transformer_lens",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
