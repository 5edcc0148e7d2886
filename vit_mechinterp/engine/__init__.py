"""Plan and execute runs on a hooked model.

An experiment passes through the folders in this order, and imports point back along it: `inputs` (examples),
`binding` (specs resolved on a model), `reduction` (what makes no difference, left out), `rows` (equal ones,
and those that begin alike), `scheduling` (chunks and waves), `forwards` (what runs), `results`, `store` (kept
between experiments), `planning` (the plan that users read) and `training` (with gradients). `execute` carries
all of it out, chunk by chunk (`work`), or has another package do it (`backends`).
"""

from vit_mechinterp.engine.binding.ops import Inputs, register_operator
from vit_mechinterp.engine.execute import execute
from vit_mechinterp.engine.planning.describe import plan
from vit_mechinterp.engine.planning.plan import Plan
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.engine.store import ActivationStore
from vit_mechinterp.engine.store.view import StoredActivations, StoredSite
from vit_mechinterp.engine.training.batch import Batch
from vit_mechinterp.engine.training.prepare import prepare
from vit_mechinterp.engine.training.prepared import Prepared, run_together

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
