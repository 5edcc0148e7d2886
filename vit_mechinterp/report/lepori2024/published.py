"""Numbers of Lepori et al. (2024), to stand beside ours.

``published.csv`` holds what the authors' public repository logs for their models, under the figure or table
that it belongs to. The cells of the printed tables and the values of the printed figures were not at hand.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["best", "published"]

SOURCE = "the authors' logs"


@cache
def _table() -> pd.DataFrame:
    import pandas as pd

    with (resources.files(__package__) / "published.csv").open() as file:
        return pd.read_csv(file, keep_default_na=False)


def published(**where: Any) -> pd.DataFrame:
    """Return the rows whose columns have the given values.

    Columns: ``item`` (a figure, or "accuracy" for the tables), ``model``, ``task``, ``combinations`` (of
    shapes and colours seen in training: 256 or 32), ``kind`` (attribute or split, or empty), ``quantity``,
    ``layer`` (a block, or empty) and ``value``.
    """
    table = _table()
    for column, value in where.items():
        table = table[table[column] == value]
    return table.reset_index(drop=True)


def best(**where: Any) -> tuple[float, str]:
    """Return the largest of these values and the block it stands for ("" without one).

    Raises:
        LookupError: there is no such number.
    """
    rows = published(**where)
    if rows.empty:
        raise LookupError(f"No published number has {where}.")
    top = rows.iloc[int(rows["value"].argmax())]
    return float(top["value"]), str(top["layer"])
