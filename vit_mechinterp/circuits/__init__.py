"""Circuits: the standard analyses, one file each, one shape: ``circuit(vit, data, ...) -> CircuitResult``."""

from __future__ import annotations

from vit_mechinterp.circuits.activation_patching import activation_patching
from vit_mechinterp.circuits.attention_stages import attention_stages
from vit_mechinterp.circuits.das import das, das_by_attribute
from vit_mechinterp.circuits.images import image_pairs, sample_photographs
from vit_mechinterp.circuits.interchange_sweep import interchange_sweep
from vit_mechinterp.circuits.metrics import KLDivergence, LogitDifference, Probability, Rank, Similarity
from vit_mechinterp.circuits.path_patching import edge_patching, path_patching
from vit_mechinterp.circuits.result import CircuitResult

__all__ = [
    "CircuitResult",
    "KLDivergence",
    "LogitDifference",
    "Probability",
    "Rank",
    "Similarity",
    "activation_patching",
    "attention_stages",
    "das",
    "das_by_attribute",
    "edge_patching",
    "image_pairs",
    "interchange_sweep",
    "path_patching",
    "sample_photographs",
]
