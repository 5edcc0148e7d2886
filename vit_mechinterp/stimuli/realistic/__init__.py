"""Photographs of 16 objects on a table, rendered from meshes that are built here.

From shapes to images, one file a step: `mesh` and `solids` (geometry), `turned` and `built` (the objects'
parts), `objects` (all sixteen, and how they rest), `noise`, `patterns` and `rooms` (textures), `scenes` (what
an image shows, drawn at random), `renderer` (Mitsuba), `images` (what is measured, kept in a folder) and
`discrimination` (the dataset). Nothing but `renderer` needs Mitsuba.

The shipped images, ``packaged.parquet``, are what this command writes (``--set folder=DIR`` keeps each image
as it comes, so that an interrupted call goes on)::

    vit-mechinterp stimuli realistic-discrimination --n 192 --set source=render --out packaged.parquet
"""

from __future__ import annotations

from vit_mechinterp.stimuli.realistic.discrimination import PACKAGED_IMAGES, realistic_discrimination
from vit_mechinterp.stimuli.realistic.objects import OBJECT_NAMES

__all__ = ["OBJECT_NAMES", "PACKAGED_IMAGES", "realistic_discrimination"]
