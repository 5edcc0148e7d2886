"""How conformance reports read."""

from __future__ import annotations

import vit_mechinterp as vmi
from tests.model.zoo import plain
from vit_mechinterp.model.conformance import check
from vit_mechinterp.model.conformance.report import Report, Row


def test_a_report_reads_well() -> None:
    report = check(vmi.wrap(plain(depth=1, img_size=(24, 40))().eval()), n_images=3, seed=1)
    lines = str(report).splitlines()
    assert (
        lines[0]
        == "VisionTransformer, timm.vit: 1 blocks, 3 heads of 8, width 24, cls + 3x5 patches of 8x8 px"
    )
    assert lines[1].split() == ["passed", "eval", "mode", "1/1"]
    assert lines[-1] == "  The model conforms."
    table = report.to_pandas()
    assert list(table.columns) == ["check", "site", "passed", "detail", "deviation"]
    assert len(table) == len(report.rows)
    assert bool(table["passed"].all())


def test_long_lists_of_failures_are_cut() -> None:
    report = Report("model", tuple(Row("check", f"site {n}", False, "is wrong") for n in range(30)))
    assert str(report).splitlines()[1].split() == ["FAILED", "check", "0/30"]
    assert "  check: site 3: is wrong\n  check: 26 more (to_pandas() lists all)" in str(report)
    assert not Report("model", ()).passed
