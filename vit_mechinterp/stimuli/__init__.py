"""Images whose structure is known: what each shows, where, and which patches cover it.

`discrimination`, `rmts`, `counterfactuals`, `rmts_counterfactuals` and `object_exchanges` make datasets, and
`realistic_discrimination` one of photographs; the generators make the same images as tensors, at training
speed; `build` makes datasets by name.
`spatially_structured` makes no images but patches, disjoint sets of which carry a label.
Everything is the same in every process for the same options and seed.
"""

from __future__ import annotations

from vit_mechinterp.stimuli.batches import TaskBatch, TaskGenerator
from vit_mechinterp.stimuli.colors import COLOR_MEANS, COLOR_NAMES
from vit_mechinterp.stimuli.counterfactuals import (
    CounterfactualBatch,
    CounterfactualGenerator,
    counterfactuals,
)
from vit_mechinterp.stimuli.discrimination import DiscriminationBatch, DiscriminationGenerator, discrimination
from vit_mechinterp.stimuli.exchanges import object_exchanges
from vit_mechinterp.stimuli.geometry import Geometry
from vit_mechinterp.stimuli.realistic import OBJECT_NAMES, realistic_discrimination
from vit_mechinterp.stimuli.registry import build, names, register
from vit_mechinterp.stimuli.render import Normalization, object_gallery, shape_gallery
from vit_mechinterp.stimuli.rmts import RMTSBatch, RMTSGenerator, rmts
from vit_mechinterp.stimuli.rmts_counterfactuals import (
    RMTSCounterfactualBatch,
    RMTSCounterfactualGenerator,
    rmts_counterfactuals,
)
from vit_mechinterp.stimuli.shapes import SHAPE_NAMES, shape_masks
from vit_mechinterp.stimuli.spatial import SpatialBatch, SpatialStructure, spatially_structured
from vit_mechinterp.stimuli.splits import SPLITS, allowed_combinations

__all__ = [
    "COLOR_MEANS",
    "COLOR_NAMES",
    "OBJECT_NAMES",
    "SHAPE_NAMES",
    "SPLITS",
    "CounterfactualBatch",
    "CounterfactualGenerator",
    "DiscriminationBatch",
    "DiscriminationGenerator",
    "Geometry",
    "Normalization",
    "RMTSBatch",
    "RMTSCounterfactualBatch",
    "RMTSCounterfactualGenerator",
    "RMTSGenerator",
    "SpatialBatch",
    "SpatialStructure",
    "TaskBatch",
    "TaskGenerator",
    "allowed_combinations",
    "build",
    "counterfactuals",
    "discrimination",
    "names",
    "object_exchanges",
    "object_gallery",
    "realistic_discrimination",
    "register",
    "rmts",
    "rmts_counterfactuals",
    "shape_gallery",
    "shape_masks",
    "spatially_structured",
]
