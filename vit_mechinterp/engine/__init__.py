"""Plan and execute runs on a hooked model."""

from vit_mechinterp.engine.execute import execute
from vit_mechinterp.engine.ops import Inputs, register_operator
from vit_mechinterp.engine.plan import Plan, plan
from vit_mechinterp.engine.prepare import prepare
from vit_mechinterp.engine.prepared import Batch, Prepared, run_together
from vit_mechinterp.engine.results import Results
from vit_mechinterp.engine.store import ActivationStore
from vit_mechinterp.engine.store.view import StoredActivations, StoredSite

__all__ = [
    "ActivationStore",
    "Batch",
    "Inputs",
    "Plan",
    "Prepared",
    "Results",
    "StoredActivations",
    "StoredSite",
    "execute",
    "plan",
    "prepare",
    "register_operator",
    "run_together",
]
