"""What to do, as data: sites, tokens, interventions, runs and whole experiments. Imports no torch."""

from __future__ import annotations

from vit_mechinterp.spec.experiments import DataSource, Experiment
from vit_mechinterp.spec.features import EditFeature
from vit_mechinterp.spec.interventions import Ablate, AddDirection, InjectSubspace, Interchange
from vit_mechinterp.spec.ops import (
    OPS,
    AnyIntervention,
    Intervention,
    RunSource,
    SourcedIntervention,
    register_op,
)
from vit_mechinterp.spec.readouts import CrossEntropy, Readout, SelectedLogits
from vit_mechinterp.spec.runs import Capture, Run
from vit_mechinterp.spec.sites import BLOCK_SITES, GLOBAL_SITES, Site, expand, is_glob, site_names
from vit_mechinterp.spec.sweeps import Sweep
from vit_mechinterp.spec.tensors import TensorRef
from vit_mechinterp.spec.tokens import Column, TokenBox, TokenColumn, Tokens, parse_tokens

__all__ = [
    "BLOCK_SITES",
    "GLOBAL_SITES",
    "OPS",
    "Ablate",
    "AddDirection",
    "AnyIntervention",
    "Capture",
    "Column",
    "CrossEntropy",
    "DataSource",
    "EditFeature",
    "Experiment",
    "InjectSubspace",
    "Interchange",
    "Intervention",
    "Readout",
    "Run",
    "RunSource",
    "SelectedLogits",
    "Site",
    "SourcedIntervention",
    "Sweep",
    "TensorRef",
    "TokenBox",
    "TokenColumn",
    "Tokens",
    "expand",
    "is_glob",
    "parse_tokens",
    "register_op",
    "site_names",
]
