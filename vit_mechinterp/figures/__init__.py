"""Figures for circuits and reports: plain arrays in, matplotlib figures out."""

from __future__ import annotations

from vit_mechinterp.figures.curves import Curve, curves
from vit_mechinterp.figures.dots import dots_by_row, examples_by_run
from vit_mechinterp.figures.heatmaps import condition_map, head_layer_map
from vit_mechinterp.figures.images import attention_overlay, contact_sheet
from vit_mechinterp.figures.layer_panels import panels_by_layer
from vit_mechinterp.figures.lines import das_by_layer, lines_by_layer, stages_over_layers
from vit_mechinterp.figures.maps import position_maps, round_up
from vit_mechinterp.figures.matrices import node_matrix
from vit_mechinterp.figures.scatter import predicted_against_exact
from vit_mechinterp.figures.style import PALETTE, png_bytes, save_figure

__all__ = [
    "PALETTE",
    "Curve",
    "attention_overlay",
    "condition_map",
    "contact_sheet",
    "curves",
    "das_by_layer",
    "dots_by_row",
    "examples_by_run",
    "head_layer_map",
    "lines_by_layer",
    "node_matrix",
    "panels_by_layer",
    "png_bytes",
    "position_maps",
    "predicted_against_exact",
    "round_up",
    "save_figure",
    "stages_over_layers",
]
