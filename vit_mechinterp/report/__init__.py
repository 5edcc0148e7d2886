"""Reports: one self-contained HTML page that collects a composed run and the results of circuits."""

from __future__ import annotations

from vit_mechinterp.report.collected import collect
from vit_mechinterp.report.page import ComposedRun, Example, Page

__all__ = ["ComposedRun", "Example", "Page", "collect"]
