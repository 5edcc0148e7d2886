"""Circuits: the standard analyses, one file each, one shape: ``circuit(vit, data, ...) -> CircuitResult``."""

from __future__ import annotations

from vit_mechinterp.circuits.attention_stages import attention_stages
from vit_mechinterp.circuits.das import das, das_by_attribute
from vit_mechinterp.circuits.interchange_sweep import interchange_sweep
from vit_mechinterp.circuits.result import CircuitResult

__all__ = ["CircuitResult", "attention_stages", "das", "das_by_attribute", "interchange_sweep"]
