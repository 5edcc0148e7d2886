"""Shares of attention, worked out by hand and against a native model's own attention matrix."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import vit_mechinterp as vmi
from vit_mechinterp.circuits import attention_shares as shares_module
from vit_mechinterp.circuits.attention_kinds import kinds_of
from vit_mechinterp.circuits.attention_parts import TokenSets, part_tokens
from vit_mechinterp.circuits.attention_shares import attention_shares, measure_shares
from vit_mechinterp.circuits.attention_stages import attention_stages, layer_heat, peak_heads
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, ExecutionError, SpecError

# Tokens: CLS, four patches; object 1 covers patches 0 and 1, object 2 patch 2, the background is patch 3.
OBJECTS = torch.tensor([[[0, 1, 1, 0, 0], [0, 0, 0, 1, 0]]], dtype=torch.bool)
SETS = torch.cat([OBJECTS, torch.tensor([[[0, 0, 0, 0, 1], [1, 0, 0, 0, 0]]], dtype=torch.bool)], dim=1)


def model(**options) -> VisionTransformer:
    torch.manual_seed(0)
    module = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=2, **options
    ).eval()
    # Wide weights, so that attention is far from uniform.
    with torch.no_grad():
        for block in module.blocks:
            block.attn.qkv.weight.mul_(20)
    return module


def data(n: int = 5) -> dict:
    draw = torch.Generator().manual_seed(1)
    # Cells of 16 px on a 4 x 4 grid of 8-px patches: two by two tokens each.
    cells = {"left": ([0, 1, 4, 5], [0, 0, 16, 16]), "right": ([10, 11, 14, 15], [16, 16, 32, 32])}
    sides = [("left", "right") if i % 2 else ("right", "left") for i in range(n)]
    columns = {"base": torch.randn(n, 3, 32, 32, generator=draw)}
    for k in (1, 2):
        columns[f"object_{k}_tokens"] = [cells[side[k - 1]][0] for side in sides]
        columns[f"box_{k}"] = [cells[side[k - 1]][1] for side in sides]
    return columns


def native_patterns(module: VisionTransformer, images: torch.Tensor) -> np.ndarray:
    """Attention [layer, image, head, query, key] from timm's own unfused path: what enters attn_drop."""
    patterns, hooks = [], []
    for block in module.blocks:
        block.attn.fused_attn = False
        hooks.append(block.attn.attn_drop.register_forward_pre_hook(lambda _, args: patterns.append(args[0])))
    with torch.no_grad():
        module(images)
    for block, hook in zip(module.blocks, hooks, strict=True):
        hook.remove()
        block.attn.fused_attn = True
    return torch.stack(patterns).double().numpy()


def by_loops(patterns: np.ndarray, columns: dict) -> dict[str, np.ndarray]:
    """The formulas with plain loops over layers, heads and images."""
    n_layers, n_images, n_heads, n_tokens, _ = patterns.shape
    kinds = {name: np.zeros((n_layers, n_heads)) for name in ("WO_direct", "WP", "BG", "CLS")}
    for layer, image, head in np.ndindex(n_layers, n_images, n_heads):
        a = patterns[layer, image, head]
        o = [[1 + p for p in columns[f"object_{k}_tokens"][image]] for k in (1, 2)]
        background = [t for t in range(1, n_tokens) if t not in o[0] + o[1]]

        def r(x: list[int], y: list[int], a: np.ndarray = a) -> float:
            return sum(a[q, k] for q in x for k in y) / sum(a[q].sum() for q in x)

        kinds["WO_direct"][layer, head] += max(r(o[0], o[0]), r(o[1], o[1])) / n_images
        kinds["WP"][layer, head] += max(r(o[0], o[1]), r(o[1], o[0])) / n_images
        kinds["BG"][layer, head] += max(r(o[0], background), r(o[1], background)) / n_images
        kinds["CLS"][layer, head] += max(r(o[0], [0]), r(o[1], [0])) / n_images
    return kinds


def test_shares_of_a_pattern_worked_out_by_hand() -> None:
    rows = [
        [1.0, 0.0, 0.0, 0.0, 0.0],
        [0.1, 0.4, 0.2, 0.2, 0.1],
        [0.3, 0.1, 0.1, 0.1, 0.4],
        [0.2, 0.3, 0.1, 0.3, 0.1],
        [0.0, 0.0, 0.0, 0.0, 1.0],
    ]
    shares = attention_shares(torch.tensor([[rows]]), OBJECTS, SETS)
    # Object 1 is the mean of rows 1 and 2, object 2 is row 3; columns: object 1, object 2, background, CLS.
    expected = torch.tensor([[0.4, 0.15, 0.25, 0.2], [0.4, 0.3, 0.1, 0.2]])
    assert torch.allclose(shares[0, 0], expected, atol=1e-7)


def test_the_shares_of_an_object_add_up_to_one() -> None:
    pattern = torch.softmax(3 * torch.randn(1, 4, 5, 5), dim=-1)
    shares = attention_shares(pattern, OBJECTS, SETS)
    assert torch.allclose(shares.sum(dim=-1), torch.ones(1, 4, 2), atol=1e-6)
    # Rows that are scaled as a whole give the same shares.
    assert torch.allclose(attention_shares(3 * pattern, OBJECTS, SETS), shares, atol=1e-6)


def test_the_table_equals_loops_over_the_native_attention_matrix() -> None:
    module, columns = model(), data()
    expected = by_loops(native_patterns(module, columns["base"]), columns)
    result = attention_stages(vmi.wrap(module), columns)
    table = result.table
    kinds = ["WO_direct", "WO_complement", "WP", "BG", "CLS", "heat", "perceptual", "relational"]
    with_ends = [f"{kind}{end}" for kind in kinds for end in ("", "_low", "_high")]
    assert list(table.columns) == ["layer", "head", *with_ends, "images"]
    assert list(zip(table["layer"], table["head"], strict=True)) == [
        (x, h) for x in range(3) for h in range(3)
    ]
    for name, values in expected.items():
        np.testing.assert_allclose(table[name].to_numpy().reshape(3, 3), values, atol=2e-6, err_msg=name)
        assert np.ptp(values) > 0.01, f"{name} does not depend on the head, so nothing was compared"
    np.testing.assert_allclose(table["WO_complement"], 1 - table["WP"] - table["BG"], atol=1e-12)
    np.testing.assert_allclose(table["heat"], table["WP"] + table["BG"], atol=1e-12)
    np.testing.assert_allclose(table["perceptual"], table["WO_direct"] - table["heat"], atol=1e-12)
    np.testing.assert_allclose(table["relational"], table["WP"], atol=1e-12)
    for kind in kinds:
        inside = (table[f"{kind}_low"] <= table[kind]) & (table[kind] <= table[f"{kind}_high"])
        assert inside.all()
        assert (table[f"{kind}_high"] - table[f"{kind}_low"]).max() > 0.01
    assert (table["images"] == 5).all()


def two_pairs(n: int = 5) -> dict:
    """Four objects of one to four tokens: the sample pair below, a display pair in the upper row."""
    columns = data(n)
    columns["box_1"], columns["box_2"] = [[0, 16, 16, 32]] * n, [[16 + 8 * (i % 2), 24, 32, 32] for i in range(n)]
    columns["display_box_1"], columns["display_box_2"] = [[0, 0, 8, 8]] * n, [[8, 0, 24, 8]] * n
    return columns


def covered(box: list[int]) -> list[int]:
    """The tokens of a box on the 4 x 4 grid behind CLS."""
    x0, y0, x1, y1 = (edge // 8 for edge in box)
    return [1 + 4 * row + column for row in range(y0, y1) for column in range(x0, x1)]


def test_with_a_display_pair_the_background_leaves_out_four_objects() -> None:
    module, columns = model(), two_pairs()
    vit = vmi.wrap(module)
    patterns = native_patterns(module, columns["base"])
    expected = {name: np.zeros((3, 3)) for name in ("WO_direct", "WP", "BP", "within_pair", "BG")}
    for layer, image, head in np.ndindex(3, 5, 3):
        a = patterns[layer, image, head]
        o = [covered(columns[name][image]) for name in ("box_1", "box_2", "display_box_1", "display_box_2")]
        taken = [token for own in o for token in own]
        background = [token for token in range(1, 17) if token not in taken]

        def r(x: list[int], y: list[int], a: np.ndarray = a) -> float:
            return a[np.ix_(x, y)].sum() / a[x].sum()

        sample, display = o[0] + o[1], o[2] + o[3]
        within = max(r(o[0], o[1]), r(o[1], o[0]))
        expected["WO_direct"][layer, head] += max(r(o[0], o[0]), r(o[1], o[1])) / 5
        expected["WP"][layer, head] += within / 5
        expected["BP"][layer, head] += max(r(sample, display), r(display, sample)) / 5
        expected["within_pair"][layer, head] += max(within, r(o[2], o[3]), r(o[3], o[2])) / 5
        expected["BG"][layer, head] += max(r(o[0], background), r(o[1], background)) / 5
    result = attention_stages(vit, columns)
    for name, values in expected.items():
        np.testing.assert_allclose(result.table[name].to_numpy().reshape(3, 3), values, atol=2e-6, err_msg=name)
        assert np.ptp(values) > 0.01
    np.testing.assert_allclose(result.table["relational"], result.table["BP"])
    without = attention_stages(vit, columns, display=[])
    assert "BP" not in without.table
    assert (without.table["BG"] - result.table["BG"]).min() > 0.001  # the display pair counts as background

    tokens = part_tokens(
        vit, Data(columns, vit), [{"box": "box_1"}, {"box": "box_2"}], "base",
        [{"box": "display_box_1"}, {"box": "display_box_2"}],
    )  # fmt: skip
    shares = measure_shares(vit, Data(columns, vit), "base", tokens)
    assert torch.allclose(shares.sum(dim=-1), torch.ones(3, 5, 3, 6), atol=1e-5)
    assert tokens.query_names == ["object 1", "object 2", "display 1", "display 2", "sample pair", "display pair"]

    stars = [line for line in result.figures()["stages"].axes[1].lines if line.get_marker() == "*"]
    assert len(stars) == 5
    assert all(f"({kind}), largest" in " ".join(result.summary) for kind in ("WO", "WP", "BP", "BG"))
    assert result.captions["stages"].count("display pair") == 1


def test_kinds_of_a_synthetic_pattern_add_up_to_one() -> None:
    # CLS, then four objects of one, two, one and one tokens, then two background patches.
    members = [[1], [2, 3], [4], [5]]
    masks = torch.zeros(1, 6, 8, dtype=torch.bool)
    for row, own in enumerate([*members, [6, 7], [0]]):
        masks[0, row, own] = True
    tokens = TokenSets(masks[:, :4], 2, masks, ("cls",))
    pattern = torch.softmax(3 * torch.randn(1, 5, 8, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    kinds = kinds_of(attention_shares(pattern, tokens.queries, masks), tokens)
    for number in (0, 1):  # per object: itself, the other one, the display pair, background, CLS
        rows = pattern[0, :, members[number]]
        parts = [kinds[kind][0, :, number] for kind in ("WO", "WP", "BG", "CLS")]
        display = rows[:, :, [4, 5]].sum(-1).mean(-1)
        assert torch.allclose(sum(parts) + display, torch.ones(5), atol=1e-6)
    # From the pair as a whole, BP is the mean over its three tokens.
    assert torch.allclose(kinds["BP"][0, :, 0], pattern[0][:, 1:4, 4:6].sum(-1).mean(-1), atol=1e-6)
    assert torch.allclose(kinds["BP"][0, :, 1], pattern[0][:, 4:6, 1:4].sum(-1).mean(-1), atol=1e-6)
    assert kinds["within_pair"].shape[-1] == 4


def test_patches_that_objects_share_count_with_neither() -> None:
    module, columns = model(), data()
    columns["box_1"], columns["box_2"] = [[0, 0, 16, 16]] * 5, [[8, 0, 32, 8]] * 4 + [[0, 0, 16, 16]]
    vit = vmi.wrap(module)
    result = attention_stages(vit, columns)
    a = native_patterns(module, columns["base"])[:, :4]
    one, two, shared = [1, 5, 6], [3, 4], [2]

    def r(x: list[int], y: list[int]) -> np.ndarray:
        return a[..., x, :][..., y].sum(axis=(-2, -1)) / len(x)

    within = np.maximum(r(one, one), r(two, two)).mean(axis=1)
    np.testing.assert_allclose(result.table["WO_direct"].to_numpy().reshape(3, 3), within, atol=2e-6)
    overlap = np.maximum(r(one, shared), r(two, shared)).mean(axis=1)
    np.testing.assert_allclose(result.table["overlap"].to_numpy().reshape(3, 3), overlap, atol=2e-6)
    assert overlap.min() > 1e-3
    assert (result.table["images"] == 4).all()
    assert result.summary["images left out"] == 1
    assert "no patch of its own: 1." in result.description
    assert "Image 0:" in attention_stages(vit, columns, example=4).captions["example"]


def test_the_heat_of_layers_colours_other_charts() -> None:
    result = attention_stages(vmi.wrap(model()), data())
    means = result.table.groupby("layer")["heat"].mean().clip(0, 1).tolist()
    assert layer_heat(result) == means
    assert np.ptp(means) > 0.01
    with pytest.raises(SpecError, match="comes from a result of attention_stages, not of 'das'"):
        layer_heat(dataclasses.replace(result, name="das"))


def test_boxes_and_patch_indices_mean_the_same() -> None:
    vit, columns = vmi.wrap(model()), data()
    boxes = attention_stages(vit, columns)
    assert boxes.provenance["objects"] == [{"box": "box_1"}, {"box": "box_2"}]
    indices = {name: values for name, values in columns.items() if not name.startswith("box")}
    tokens = attention_stages(vit, indices)
    assert tokens.provenance["objects"] == [{"column": "object_1_tokens"}, {"column": "object_2_tokens"}]
    assert boxes.table.equals(tokens.table)
    selected = attention_stages(vit, columns, [{"box": "box_1"}, {"column": "object_2_tokens"}])
    assert boxes.table.equals(selected.table)
    part = {**columns, "object_2_tokens": [own[:1] for own in columns["object_2_tokens"]]}
    fewer = attention_stages(vit, part, [{"box": "box_1"}, {"column": "object_2_tokens"}])
    assert not boxes.table.equals(fewer.table)
    there = {f"display_{k}_tokens": columns[f"object_{k}_tokens"] for k in (2, 1)}
    there |= {"display_box_1": columns["box_2"], "display_box_2": columns["box_1"]}
    with pytest.raises(DataError, match=r"column 'display_1_tokens', example 0: patch \d+ .* outside the object's box \('display_box_1'\)"):
        attention_stages(vit, {**columns, **there}, display=[{"column": "display_1_tokens"}, {"column": "display_2_tokens"}])


def test_batches_change_nothing_and_no_hook_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    module, columns = model(), data()
    whole = attention_stages(vmi.wrap(module), columns).table
    monkeypatch.setattr(shares_module, "_PATTERN_BYTES", 2 * 3 * 3 * 17**2 * 4)
    np.testing.assert_allclose(attention_stages(vmi.wrap(module), columns).table, whole, atol=1e-6)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())
    assert all("forward" not in vars(m) for m in module.modules())
    assert all(block.attn.fused_attn for block in module.blocks)


def test_a_model_without_cls_has_no_such_column_and_registers_have_their_own() -> None:
    without = attention_stages(vmi.wrap(model(class_token=False, global_pool="avg")), data())
    assert "CLS" not in without.table
    sums = without.table[["WO_direct", "WP", "BG"]].sum(axis=1)
    assert (sums >= 1 - 1e-6).all()  # largest values over two objects add up to at least one
    registers = attention_stages(vmi.wrap(model(reg_tokens=2)), data()).table
    assert registers["registers"].between(1e-3, 1).all()


def test_figures_show_the_table() -> None:
    result = attention_stages(vmi.wrap(model()), data(), wo_mode="complement")
    figures = result.figures()
    scores = ["perceptual_score", "relational_score"]
    assert list(figures) == ["stages", "within_object", *scores, "example"] == list(result.captions)
    for score, limits in zip(scores, ((-1.0, 1.0), (0.0, 1.0)), strict=True):
        drawn = figures[score].axes[0].images[0]
        np.testing.assert_allclose(
            drawn.get_array(), result.table[score.removesuffix("_score")].to_numpy().reshape(3, 3).T, atol=1e-12
        )
        assert drawn.get_clim() == limits
        assert "this project's own" in result.captions[f"{score}"]
    heat, below = figures["stages"].axes[:2]
    np.testing.assert_allclose(
        heat.images[0].get_array(), result.table["heat"].to_numpy().reshape(3, 3).T, atol=1e-12
    )
    assert heat.images[0].get_clim() == (0.0, 1.0)
    assert len(below.collections) == 4  # the intervals of the four lines
    best = result.table.groupby("layer").max()
    lines = [line.get_ydata() for line in below.lines if line.get_marker() == "o"]
    np.testing.assert_allclose(lines, [best[name] for name in ("WO_complement", "WP", "BG", "CLS")])
    stars = [line.get_xdata()[0] for line in below.lines if line.get_marker() == "*"]
    assert stars == [int(best[name].argmax()) for name in ("WO_complement", "WP", "BG", "CLS")]


def test_the_example_shows_what_the_peak_heads_attend_to() -> None:
    module, columns = model(), data()
    patterns = native_patterns(module, columns["base"])
    result = attention_stages(vmi.wrap(module), columns, example=2)
    panels = result.figures()["example"].axes
    objects = [[1 + p for p in columns[f"object_{k}_tokens"][2]] for k in (1, 2)]
    background = [t for t in range(1, 17) if t not in objects[0] + objects[1]]
    targets = {"WO": objects, "WP": objects[::-1], "BG": [background] * 2}
    for panel, (kind, (layer, head, _)) in zip(panels[1:], peak_heads(result.table).items(), strict=True):
        a = patterns[layer, 2, head]
        shares = [a[np.ix_(q, k)].sum() for q, k in zip(objects, targets[kind], strict=True)]
        queried = int(np.argmax(shares))
        attended = a[objects[queried], 1:].mean(axis=0)
        name = {"WO": "within object", "WP": "within pair", "BG": "background"}[kind]
        assert panel.get_xlabel() == (
            f"{name}\nlayer {layer}, head {head}, object {queried + 1}\nmax. {attended.max():.2f}"
        )
    assert [patch.get_bbox().bounds for patch in panels[0].patches] == [
        (x0 - 0.5, y0 - 0.5, x1 - x0, y1 - y0) for x0, y0, x1, y1 in (columns[f"box_{k}"][2] for k in (1, 2))
    ]
    assert "example" not in attention_stages(vmi.wrap(module), columns, example=None).figures()


def test_what_is_said_is_what_was_found() -> None:
    result = attention_stages(vmi.wrap(model()), data(), first_peak_layer=1)
    peaks = peak_heads(result.table, first_layer=1)
    for kind, (layer, head, value) in peaks.items():
        column = "WO_direct" if kind == "WO" else kind
        later = result.table[result.table["layer"] >= 1]
        assert value == later[column].max()
        assert later.set_index(["layer", "head"])[column][layer, head] == value
        assert f"{value:.2f} (layer {layer}, head {head})" in result.description
    assert result.provenance["examples"] == 5
    assert result.provenance["columns"] == ["base", "box_1", "box_2"]


def test_errors_say_what_is_wrong() -> None:
    vit, columns = vmi.wrap(model()), data()
    with pytest.raises(SpecError, match=r"wo_mode='both' is not known\. Choose 'direct' or 'complement'"):
        attention_stages(vit, columns, wo_mode="both")  # type: ignore[arg-type]
    with pytest.raises(
        DataError,
        match="needs to know where an object is: a column 'box_1' of pixel boxes or 'object_1_tokens'",
    ):
        attention_stages(vit, {"base": columns["base"]})
    with pytest.raises(DataError, match="In every example an object shares all its patches with another"):
        attention_stages(vit, columns, [{"box": "box_1"}, {"box": "box_1"}])
    with pytest.raises(DataError, match="Example 0: an object has a token outside the patch grid"):
        attention_stages(vit, columns, [{"box": "box_1"}, "cls"])
    with pytest.raises(SpecError, match="compares objects; give selectors of two or more, not 1"):
        attention_stages(vit, columns, [{"box": "box_1"}])
    with pytest.raises(SpecError, match="first_peak_layer=3 is out of range; layers are 0 to 2"):
        attention_stages(vit, columns, first_peak_layer=3)
    with pytest.raises(SpecError, match="resamples=0: an interval takes at least 1"):
        attention_stages(vit, columns, resamples=0)
    with pytest.raises(SpecError, match="seed=-1: a seed is a whole number, 0 or more"):
        attention_stages(vit, columns, seed=-1)
    with pytest.raises(SpecError, match="example=5 is out of range; there are 5 images"):
        attention_stages(vit, columns, example=5)
    with pytest.raises(DataError, match="'display_box_2' of pixel boxes or 'display_2_tokens'"):
        attention_stages(vit, {**columns, "display_box_1": columns["box_1"]})
    with pytest.raises(ExecutionError, match="train mode"):
        attention_stages(vmi.wrap(model(attn_drop_rate=0.1).train()), columns)
