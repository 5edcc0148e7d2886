"""The 16 colours of the objects, and 4 more that no model is trained on (Lepori et al. 2024): names, and mean
RGB values that a Gaussian texture surrounds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLOR_MEANS", "COLOR_NAMES", "N_COLORS"]

_MEANS: dict[str, tuple[int, int, int]] = {
    "pink": (233, 30, 99),
    "purple": (156, 39, 176),
    "violet": (103, 58, 183),
    "indigo": (63, 81, 181),
    "sky": (3, 169, 244),
    "cyan": (0, 188, 212),
    "teal": (0, 150, 136),
    "green": (76, 175, 80),
    "leaf": (139, 195, 74),
    "lime": (205, 220, 57),
    "yellow": (255, 235, 59),
    "amber": (255, 152, 0),
    "orange": (255, 87, 34),
    "brown": (121, 85, 72),
    "grey": (158, 158, 158),
    "slate": (120, 144, 156),
    # Colours of the out-of-distribution sets.
    "olive": (103, 110, 0),
    "rose": (255, 155, 238),
    "maroon": (145, 0, 0),
    "lavender": (194, 188, 255),
}

COLOR_NAMES: tuple[str, ...] = tuple(_MEANS)
"""Colour names; the position is the colour id. The last four are out of distribution."""

COLOR_MEANS: NDArray[np.int16] = np.array(list(_MEANS.values()), dtype=np.int16)
"""Mean red, green and blue (0 to 255) of every colour: ``[20, 3]``."""

N_COLORS: int = 16
"""How many colours the objects of training have: ids 0 to 15."""
