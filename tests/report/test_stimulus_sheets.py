"""Sheets of the stimuli: every image that is drawn is in the table, and is what the table says."""

from __future__ import annotations

import pytest

from vit_mechinterp import stimuli
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.figures.sheets import SheetRow, image_rows
from vit_mechinterp.report.stimulus_sheets import stimulus_sheets

SMALL = {"canvas": 64, "patch": 8, "cell": 16}


def test_the_sheets_show_what_their_table_says() -> None:
    result = stimulus_sheets(n=2, **SMALL)
    figures = result.figures()
    assert list(figures) == list(result.captions) == ["tasks", "objects", "stimuli", "realistic"]
    pictures = {name: [axes for axes in figure.axes if axes.images] for name, figure in figures.items()}
    # The last row of photographs shows those above it again.
    assert {name: len(axes) for name, axes in pictures.items()} == {"tasks": 8, "objects": 40, "stimuli": 8, "realistic": 6}
    table = result.table
    assert table["figure"].value_counts().to_dict() == {"tasks": 8, "stimuli": 8, "realistic": 4}
    data = {
        "discrimination": stimuli.discrimination("test", 12, progress=False, **SMALL),
        "rmts": stimuli.rmts("test", 12, progress=False, **SMALL),
        "realistic": stimuli.realistic_discrimination(),
    }
    for row in table.itertuples():
        assert data[row.task][row.example]["label"] == ["different", "same"].index(row.label)
    for name in ("tasks", "stimuli"):
        shown = [axes.images[0].get_array().tobytes() for axes in pictures[name]]
        rows = table[table["figure"] == name]
        wanted = [data[row.task][row.example]["base"].convert("RGB").tobytes() for row in rows.itertuples()]
        assert sorted(shown) == sorted(wanted)
    assert [len(axes.patches) for axes in pictures["realistic"]] == [0, 0, 0, 0, 2, 2]
    assert {text.get_text() for text in figures["tasks"].texts} >= {"Discrimination", "Relational match to sample"}


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(SpecError, match="n=13: a row shows 1 to 12 images"):
        stimulus_sheets(n=13)
    with pytest.raises(SpecError, match="canvas=65"):
        stimulus_sheets(canvas=65)
    (image,) = stimuli.object_gallery([(0, 0)], 16)
    with pytest.raises(DataError, match="at least one image"):
        image_rows([SheetRow("none", [])])
    with pytest.raises(DataError, match="'one' has 1 images but 2 captions"):
        image_rows([SheetRow("one", [image], ["a", "b"])])
