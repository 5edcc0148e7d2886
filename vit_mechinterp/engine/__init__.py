"""Plan and execute runs on a hooked model."""

from vit_mechinterp.engine.execute import execute
from vit_mechinterp.engine.ops import Inputs, register_operator
from vit_mechinterp.engine.plan import Plan, plan
from vit_mechinterp.engine.prepare import Prepared, prepare
from vit_mechinterp.engine.results import Results

__all__ = ["Inputs", "Plan", "Prepared", "Results", "execute", "plan", "prepare", "register_operator"]
