"""Activation patching against forwards written out by hand: every cell of every table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vit_mechinterp as vmi
from tests.oracles import by_hand
from tests.tiny_models import HF_CLIP, HF_DINOV2, HF_VIT, N_LAYERS, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS
from vit_mechinterp.circuits.activation_patching import activation_patching
from vit_mechinterp.circuits.patching_cells import windows
from vit_mechinterp.errors import DataError, SpecError, UnsupportedSiteError

N = 2
ANSWER, OTHER = 1, 3


def difference(outputs: torch.Tensor) -> torch.Tensor:
    return outputs[:, ANSWER] - outputs[:, OTHER]


def pairs(tiny) -> dict:
    return {"base": tiny.images(N, seed=1), "source": tiny.images(N, seed=2)}


@torch.no_grad()
def patched(tiny, module, images, there, row, side: int) -> torch.Tensor:
    """The output with one cell of one row of the table written over, token by token."""
    values: dict[str, torch.Tensor] = {}

    def keep(site, value):
        values[site] = value
        return value

    by_hand(module, there, keep)
    first = len(tiny.prefix)
    if row["kind"] == "patches":
        r, c = int(row["row"]), int(row["column"])
        tokens = [
            first + y * tiny.grid[1] + x
            for y in range(r, min(r + side, tiny.grid[0])) for x in range(c, min(c + side, tiny.grid[1]))
        ]  # fmt: skip
    elif row["kind"] == "tokens":
        tokens = [i for i, name in enumerate(tiny.prefix) if name == row["tokens"]]
    else:
        tokens = list(range(tiny.n_tokens))
    target = f"blocks.{row['layer']}.{row['site']}"

    def touch(site, value):
        if site != target or row["kind"] == "no effect":
            return value
        value = value.clone()
        for token in tokens:
            if row["kind"] != "head":
                value[:, token] = values[site][:, token]
            elif row["site"] == "attn.pattern":
                value[:, row["head"], token] = values[site][:, row["head"], token]
            else:
                value[:, token, row["head"]] = values[site][:, token, row["head"]]
        return value

    return by_hand(module, images, touch)


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2, HF_CLIP], ids=lambda tiny: tiny.name)
def test_every_cell_is_the_hand_made_patch(tiny) -> None:
    module, data, side = tiny.module(), pairs(tiny), 2
    result = activation_patching(
        vmi.wrap(module), data, direction="both", metric=difference, window=side, sites=("resid_pre", "attn_out", "mlp_out"),
        heads=("z", "q", "k", "v", "pattern"), progress=False,
    )  # fmt: skip
    with torch.no_grad():
        ends = {name: difference(by_hand(module, data[name], lambda site, value: value)).double() for name in data}
    table = result.table
    squares = -(-tiny.grid[0] // side) * -(-tiny.grid[1] // side)
    special = len(set(tiny.prefix))
    assert len(table) == 2 * (N_LAYERS * (3 * (squares + special) + 5 * tiny.n_heads) + 2)
    effects = []
    for row in table.to_dict("records"):
        into, origin = ("base", "source") if row["direction"] == "noising" else ("source", "base")
        found = difference(patched(tiny, module, data[into], data[origin], row, side)).double()
        change = found - ends[into]
        gap = ends[origin] - ends[into]
        assert row["value"] == pytest.approx(float(found.mean()), abs=2e-5)
        assert row["change"] == pytest.approx(float(change.mean()), abs=2e-5)
        assert row["pair_change"] == pytest.approx(float(change[0]), abs=2e-5)
        if not row["reason"]:
            assert row["normalised"] == pytest.approx(float(change.mean() / gap.mean()), rel=1e-3, abs=1e-4)
        assert row["n"] == N
        if row["kind"] == "no effect":
            assert abs(row["change"]) < 1e-5
        elif row["kind"] == "whole stream":
            assert row["value"] == pytest.approx(float(ends[origin].mean()), abs=2e-5)
        else:
            effects.append(abs(row["change"]))
    assert float(np.mean(np.array(effects) > 1e-3)) > 0.6


def test_sites_that_a_model_lacks_are_left_out_with_the_reason() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    result = activation_patching(vit, pairs(TIMM_PLAIN), sites=("resid_pre", "mlp.pre_linear"), heads=(), metric=difference)
    assert result.provenance["left_out"] == {"mlp.pre_linear": "the MLP of this block is not gated"}
    assert "Left out: mlp.pre_linear (the MLP of this block is not gated)." in result.description
    assert set(result.table["site"]) == {"resid_pre", "resid_post"}
    with pytest.raises(UnsupportedSiteError, match=r"VisionTransformer has none of these sites: blocks\.0\.mlp\.pre_linear: the MLP"):
        activation_patching(vit, pairs(TIMM_PLAIN), sites=("mlp.pre_linear",), heads=())


def test_windows_cover_every_patch_once() -> None:
    layout = vmi.wrap(TIMM_REGISTERS.module()).layout.tokens
    for side in (1, 2, 3, 4, 9):
        cut, _ = windows(layout, side)
        assert sorted(patch for window in cut for patch in window.patches) == list(range(15))
    assert windows(layout)[1] == 1
    with pytest.raises(SpecError, match="window=0 must be a positive number"):
        windows(layout, 0)


def test_two_photographs_answer_at_once_and_a_corruption_stands_in_for_the_second() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    draw = np.random.default_rng(0)
    one, two = (Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)) for _ in range(2))
    result = activation_patching(vit, (one, two), heads=())
    assert set(result.table["n"]) == {1}
    assert result.table[["change_low", "normalised_low", "p_value", "p_corrected"]].isna().all(axis=None)
    assert result.table["normalised"].notna().all()
    shuffled = activation_patching(vit, [one, two], corruption="shuffle", heads=(), metric="kl")
    assert set(shuffled.table["n"]) == {2}
    assert shuffled.provenance["corruption"] == "shuffle"
    for metric in ("probability", "log_probability", "rank", "cosine"):
        assert len(activation_patching(vit, (one, two), sites=("resid_post",), heads=(), metric=metric).table) == 53


def test_a_gap_that_is_none_gives_nan_and_the_reason() -> None:
    vit, images = vmi.wrap(TIMM_PLAIN.module()), TIMM_PLAIN.images(1)
    table = activation_patching(vit, {"base": images, "source": images}, heads=(), metric=difference).table
    assert table[["normalised", "pair_normalised"]].isna().all(axis=None)
    assert table["reason"].str.contains("too small to divide by").all()
    balanced = {"base": torch.cat([images, TIMM_PLAIN.images(1, 5)] * 3), "source": torch.cat([TIMM_PLAIN.images(1, 5), images] * 3)}
    balanced["base"] = balanced["base"] * 1.01
    result = activation_patching(vit, balanced, sites=("resid_pre",), heads=(), metric=difference)
    assert result.table["reason"].str.contains("cannot be told from zero|too small").all()
    assert "Effects are not normalised" in result.description
    assert set(result.figures()) == set(result.captions)


def test_token_sets_take_the_place_of_squares() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    data = {**pairs(TIMM_PLAIN), "here": [[0, 1], [4, 5]], "there": [[2, 3], [6, 7]]}
    sets = {"object": ({"column": "here"}, {"column": "there"})}
    result = activation_patching(vit, data, token_sets=sets, sites=("resid_pre",), heads=(), direction="both", metric=difference)
    cells = result.table[result.table["kind"] == "tokens"]
    assert set(cells["tokens"]) == {"object"}
    assert len(cells) == 2 * N_LAYERS
    assert cells["change"].abs().min() > 1e-3
    assert set(result.figures()) == set(result.captions) == {"denoising_tokens", "noising_tokens"}


def test_many_pairs_have_intervals_and_p_values() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module())
    data = {"base": TIMM_PLAIN.images(8, 1), "source": TIMM_PLAIN.images(8, 2)}
    table = activation_patching(vit, data, sites=("resid_pre",), heads=(), metric="kl", direction="noising").table
    cells = table[table["kind"] != "no effect"]
    assert (cells["change_low"] <= cells["change"]).all()
    assert (cells["change"] <= cells["change_high"]).all()
    assert (cells["normalised_low"] <= cells["normalised"]).all()
    assert (cells["p_corrected"] >= cells["p_value"]).all()
    assert float(table.loc[table["kind"] == "whole stream", "p_value"].iloc[0]) == pytest.approx(2 / 2**8)


def test_finished_cells_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vit_mechinterp.circuits.cells as cells

    vit, data = vmi.wrap(TIMM_PLAIN.module()), pairs(TIMM_PLAIN)
    options = {"sites": ("resid_pre",), "heads": ("z",), "metric": difference}
    wanted = activation_patching(vit, data, **options)
    monkeypatch.setattr(cells, "runs_at_once", lambda vit, n: 10)
    calls = []
    execute = cells.execute

    def stops_at_the_fourth(vit, runs, *args, **kwargs):
        calls.append([run.name for run in runs])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return execute(vit, runs, *args, **kwargs)

    monkeypatch.setattr(cells, "execute", stops_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        activation_patching(vit, data, folder=tmp_path, **options)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    monkeypatch.setattr(cells, "runs_at_once", lambda vit, n: 7)  # however the rest is cut
    found = activation_patching(vit, data, folder=tmp_path, **options)
    done, later = ([name for call in some for name in call] for some in (calls[1:3], calls[5:]))
    assert len(done) == 20
    assert not set(done) & set(later)
    assert len(done) + len(later) == len(found.table)
    np.testing.assert_allclose(found.table["change"], wanted.table["change"], atol=1e-5)
    assert found.provenance["spec"] == wanted.provenance["spec"]
    before = len(calls)
    again = activation_patching(vit, data, folder=tmp_path, **options)
    assert len(calls) == before + 1, "only the clean forwards"
    assert again.provenance == found.provenance
    other = activation_patching(vit, {**data, "base": TIMM_PLAIN.images(N, 7)}, folder=tmp_path, **options).table
    assert len(calls) == before + 1 + 1 + -(-len(other) // 7), "other images find nothing finished"
    assert float((other["change"] - wanted.table["change"]).abs().max()) > 1e-3


def test_runs_that_read_each_other_stay_together() -> None:
    from vit_mechinterp.circuits.finished_cells import pieces, runs_at_once

    def run(name: str, *reads: str) -> vmi.Run:
        site = "blocks.1.attn.z"
        return vmi.Run(name=name, interventions=[vmi.Interchange(site=site, source={"run": r}) for r in reads])

    runs = [run("a"), run("b"), run("c", "a"), run("d"), run("e", "c"), run("f", "b")]
    assert [[r.name for r in piece] for piece in pieces(runs, 1)] == [["a", "c", "e"], ["b", "f"], ["d"]]
    assert [[r.name for r in piece] for piece in pieces(runs, 1, {"a", "b", "d", "f"})] == [["a", "c", "e"]]
    assert [[r.name for r in piece] for piece in pieces(runs, 5)] == [["a", "c", "e", "b", "f"], ["d"]]
    vit = vmi.wrap(TIMM_PLAIN.module())
    assert runs_at_once(vit, 10) > runs_at_once(vit, 1000) > 8 == runs_at_once(vit, 10**9)


def test_a_metric_that_fails_later_is_named(caplog: pytest.LogCaptureFixture) -> None:
    vit, data = vmi.wrap(TIMM_PLAIN.module()), pairs(TIMM_PLAIN)
    seen = []

    def fussy(outputs: torch.Tensor) -> torch.Tensor:
        seen.append(outputs)
        return outputs[:, 0] if len(seen) != 5 else outputs[:, 0] * torch.nan

    table = activation_patching(vit, data, sites=("resid_pre",), heads=(), metric=fussy).table
    assert "The metric is not a finite number on 1 of" in caplog.text
    odd = table["change"].isna()
    assert odd.sum() == 1
    assert table.loc[odd, "p_corrected"].isna().all()
    assert table.loc[~odd, "p_corrected"].notna().all()


def test_figures_show_the_table() -> None:
    vit = vmi.wrap(TIMM_REGISTERS.module())
    data = pairs(TIMM_REGISTERS)
    result = activation_patching(vit, data, metric=lambda outputs: outputs[:, 0] ** 2, direction="both")
    figures = result.figures()
    assert set(figures) == set(result.captions)
    assert {"noising_map_resid_pre", "denoising_heads_attn_z", "noising_tokens"} <= set(figures)
    rows = result.table[(result.table["direction"] == "noising") & (result.table["kind"] == "head")]
    column = "change" if rows["normalised"].isna().all() else "normalised"
    shown = np.asarray(figures["noising_heads_attn_z"].axes[0].images[0].get_array())
    np.testing.assert_allclose(shown, rows[column].to_numpy().reshape(N_LAYERS, 3).T)
    panels = [axes for axes in figures["noising_map_resid_pre"].axes if axes.images and axes.get_visible()]
    assert len(panels) == 2 + N_LAYERS


def test_bad_input_is_named_before_the_work() -> None:
    vit, data = vmi.wrap(TIMM_PLAIN.module()), pairs(TIMM_PLAIN)
    with pytest.raises(SpecError, match="direction='up' is not known"):
        activation_patching(vit, data, direction="up")
    with pytest.raises(SpecError, match=r"Unknown site 'blocks\.0\.resid'"):
        activation_patching(vit, data, sites=("resid",))
    with pytest.raises(SpecError, match=r"mlp_out has no heads"):
        activation_patching(vit, data, heads=("mlp_out",))
    with pytest.raises(SpecError, match="Layer 3 is out of range; the model has layers 0 to 2"):
        activation_patching(vit, data, layers=[3])
    with pytest.raises(SpecError, match="example=2 is out of range; there are 2 pairs"):
        activation_patching(vit, data, example=2)
    with pytest.raises(SpecError, match="class 9 of example 0 is out of range"):
        activation_patching(vit, data, metric=vmi.circuits.LogitDifference(answer=9))
    with pytest.raises(DataError, match="Pair 0: 'base' has 40 x 40 pixels and 'source' 40 x 41"):
        activation_patching(vit, (Image.new("RGB", (40, 40)), Image.new("RGB", (40, 41))))
