"""How conformance reports read."""

from __future__ import annotations

import vit_mechinterp as vmi
from tests.model.zoo import plain
from vit_mechinterp.model.conformance import check
from vit_mechinterp.model.conformance.report import Report, Row
from vit_mechinterp.model.conformance.suite import SLOW


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
    assert list(table.columns) == ["check", "site", "passed", "detail", "deviation", "left_out"]
    assert len(table) == len(report.rows)
    assert bool(table["passed"].all())


def test_what_is_left_out_and_what_is_absent_is_listed_with_its_reason() -> None:
    vit = vmi.wrap(plain(depth=3, img_size=(24, 40))().eval())
    lines = str(check(vit)).splitlines()
    assert "  not there: blocks.*.mlp.pre_linear (3 blocks): the MLP of this block is not gated" in lines
    reason = "no single pattern"
    rows = [Row("check", f"blocks.{layer}.attn_out", True, reason, left_out=True) for layer in range(2)]
    absent = {"blocks.0.ln1": "why", "blocks.1.ln1": "why", "blocks.1.ln2": "why", "ln_final": "why"}
    report = Report("model", (Row("check", "embed", True), *rows), absent)
    assert report.passed
    assert str(report).splitlines()[1:] == [
        "  passed  check        1/1",
        "  check: left out blocks.*.attn_out (2 blocks): no single pattern",
        "  not there: blocks.*.ln1 (2 blocks); blocks.*.ln2 (1 block); ln_final: why",
        "  The model conforms.",
    ]


def test_a_check_with_nothing_to_compare_says_so() -> None:
    report = Report("model", (Row("check", "embed", True, "not there", left_out=True),))
    assert str(report).splitlines()[1] == "  none    check        0/0"


def test_long_lists_of_failures_are_cut() -> None:
    report = Report("model", tuple(Row("check", f"site {n}", False, "is wrong") for n in range(30)))
    assert str(report).splitlines()[1].split() == ["FAILED", "check", "0/30"]
    assert "  check: site 3: is wrong\n  check: 26 more (to_pandas() lists all)" in str(report)
    assert not Report("model", ()).passed


def test_the_fast_checks_are_fewer_and_see_the_blocks_at_the_ends_and_in_the_middle() -> None:
    vit = vmi.wrap(plain(depth=5, img_size=(24, 40))().eval())
    fast, whole = check(vit, subset="fast"), check(vit)
    assert fast.passed
    assert str(fast).splitlines()[0].endswith("(fast checks)")
    slow = {row.check for row in whole.rows} - {row.check for row in fast.rows}
    # Of the interchanges, those behind the blocks are fast.
    assert slow == {*SLOW, "module unchanged after an exception"} - {"interchange of images"}
    written = {row.site.split(".")[1] for row in fast.rows if row.check == "residual stream adds up"}
    assert written == {"0", "2", "4"}
    assert {row.site for row in fast.rows if row.check == "write back"} == set(vit.site_names())
