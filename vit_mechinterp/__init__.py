"""Causal analyses of vision transformers: interventions as data, planned as a whole, run on native models.

The public names are loaded when they are first used, so importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_mechinterp.engine import ActivationStore, Plan, Results, execute, plan
    from vit_mechinterp.experiment import run_experiment
    from vit_mechinterp.model import HookedViT, load, register, register_adapter, wrap
    from vit_mechinterp.spec import (
        Ablate,
        AddDirection,
        Capture,
        CrossEntropy,
        Experiment,
        InjectSubspace,
        Interchange,
        Intervention,
        Run,
        RunSource,
        SelectedLogits,
        Sweep,
        TensorRef,
        register_op,
    )

__version__ = "0.1.0"

__all__ = [
    "Ablate",
    "ActivationStore",
    "AddDirection",
    "Capture",
    "CrossEntropy",
    "Experiment",
    "HookedViT",
    "InjectSubspace",
    "Interchange",
    "Intervention",
    "Plan",
    "Results",
    "Run",
    "RunSource",
    "SelectedLogits",
    "Sweep",
    "TensorRef",
    "__version__",
    "execute",
    "load",
    "plan",
    "register",
    "register_adapter",
    "register_op",
    "run_experiment",
    "wrap",
]

_HOMES = {
    "vit_mechinterp.engine": ("ActivationStore", "Plan", "Results", "execute", "plan"),
    "vit_mechinterp.experiment": ("run_experiment",),
    "vit_mechinterp.model": ("HookedViT", "load", "register", "register_adapter", "wrap"),
    "vit_mechinterp.spec": (
        "Ablate",
        "AddDirection",
        "Capture",
        "CrossEntropy",
        "Experiment",
        "InjectSubspace",
        "Interchange",
        "Intervention",
        "Run",
        "RunSource",
        "SelectedLogits",
        "Sweep",
        "TensorRef",
        "register_op",
    ),
}
_PARTS = (
    "bridges",
    "circuits",
    "engine",
    "errors",
    "figures",
    "model",
    "report",
    "spec",
    "stimuli",
    "training",
)
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PARTS})
