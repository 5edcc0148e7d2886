"""The sweep against plain hooks on the native model, one run at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import vit_mechinterp as vmi
from vit_mechinterp.circuits.interchange_sweep import _handover, interchange_sweep, sweep_runs
from vit_mechinterp.circuits.statistics import bootstrap_interval
from vit_mechinterp.circuits.token_sets import with_background
from vit_mechinterp.errors import DataError, SpecError

N, LAYERS = 12, 3
CELLS = {"a": [0, 1, 4, 5], "b": [10, 11, 14, 15], "c": [2, 3, 6, 7]}
BOXES = {"a": [0, 0, 16, 16], "b": [16, 16, 32, 32], "c": [16, 0, 32, 16]}


def model(**options) -> VisionTransformer:
    torch.manual_seed(0)
    module = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=LAYERS, num_heads=3, num_classes=3, **options
    ).eval()
    # Freshly initialised weights are so small that no intervention would change an answer.
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2 and "pos" not in name:
                parameter.copy_(torch.randn(parameter.shape) * 1.6 / parameter[0].numel() ** 0.5)
    return module


def data() -> dict:
    draw = torch.Generator().manual_seed(1)
    columns = {
        "base": torch.randn(N, 3, 32, 32, generator=draw),
        "source": torch.randn(N, 3, 32, 32, generator=draw),
    }
    places = {"edited": "ab", "other": "ba", "source": "ca", "source_other": "bc"}
    for name, cells in places.items():
        columns[f"{name}_tokens"] = [CELLS[cells[i % 2]] for i in range(N)]
        columns[f"{name}_box"] = [BOXES[cells[i % 2]] for i in range(N)]
    columns["label"] = torch.arange(N) % 3
    columns["counterfactual_label"] = (torch.arange(N) + 1) % 3
    return columns


def positions(columns: dict, token_set: str, example: int) -> tuple[list[int], list[int]]:
    """Positions in the base and in the source image, by hand: CLS is token 0, patches follow."""
    here, there = {"edited object": ("edited", "source"), "other object": ("other", "source_other")}.get(
        token_set, ("", "")
    )
    if here:
        return tuple([1 + p for p in columns[f"{name}_tokens"][example]] for name in (here, there))
    taken = {
        p
        for name in ("edited", "other", "source", "source_other")
        for p in columns[f"{name}_tokens"][example]
    }
    same = {
        "CLS": [0],
        "background": [1 + p for p in range(16) if p not in taken],
        "all": list(range(17)),
    }[token_set]
    return same, same


def by_hooks(
    module: VisionTransformer,
    columns: dict,
    part: Callable[[nn.Module], nn.Module],
    layer: int,
    token_set: str,
) -> Tensor:
    """Logits with the part's output exchanged, by a plain forward hook, one example at a time."""
    logits = []
    for i in range(N):
        here, there = positions(columns, token_set, i)
        kept: list[Tensor] = []
        hook = part(module.blocks[layer]).register_forward_hook(
            lambda _, __, out, kept=kept: kept.append(out)
        )
        with torch.no_grad():
            module(columns["source"][i : i + 1])
        hook.remove()

        def swap(_, __, out, here=here, there=there, kept=kept):  # type: ignore[no-untyped-def]
            out = out.clone()
            out[:, here] = kept[0][:, there]
            return out

        hook = part(module.blocks[layer]).register_forward_hook(swap)
        with torch.no_grad():
            logits.append(module(columns["base"][i : i + 1])[0])
        hook.remove()
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("site", "part"),
    [
        ("resid_post", lambda block: block),
        ("attn_out", lambda block: block.attn),
        ("mlp_out", lambda block: block.mlp),
    ],
)
def test_the_table_equals_plain_hooks_one_run_at_a_time(
    site: str, part: Callable[[nn.Module], nn.Module]
) -> None:
    module, columns = model(), data()
    with torch.no_grad():
        clean = module(columns["base"])
    label, counterfactual = columns["label"], columns["counterfactual_label"]
    rows = torch.arange(N)

    def difference(logits: Tensor) -> Tensor:
        return logits[rows, counterfactual] - logits[rows, label]

    table = interchange_sweep(vmi.wrap(module), columns, site=site).table
    assert len(table) == 5 * LAYERS + 1
    swept = table[table["layer"].notna()].set_index(["token_set", "layer"])
    changes, decisions = [], []
    for token_set in ("edited object", "other object", "CLS", "background", "all"):
        for layer in range(LAYERS):
            logits = by_hooks(module, columns, part, layer, token_set)
            row = swept.loc[(token_set, layer)]
            expected = float((difference(logits) - difference(clean)).double().mean())
            assert row["logit_difference"] == pytest.approx(expected, abs=1e-5)
            assert row["decision"] == float((logits.argmax(1) == counterfactual).double().mean())
            assert row["n"] == N
            changes.append(expected)
            decisions.append(row["decision"])
    (unchanged,) = table[table["layer"].isna()].to_dict("records")
    assert unchanged["decision"] == float((clean.argmax(1) == counterfactual).double().mean())
    assert unchanged["logit_difference"] == unchanged["logit_difference_high"] == 0
    assert sum(abs(change) > 0.01 for change in changes) > LAYERS * 3
    assert len(set(decisions)) > 1


def test_all_tokens_of_a_block_s_output_give_the_source_s_own_answer() -> None:
    module, columns = model(), data()
    with torch.no_grad():
        logits = module(columns["source"])
    rows = torch.arange(N)
    label, counterfactual = columns["label"], columns["counterfactual_label"]
    table = interchange_sweep(vmi.wrap(module), columns).table
    everything = table[table["token_set"] == "all"]
    assert (everything["decision"] == float((logits.argmax(1) == counterfactual).double().mean())).all()
    assert everything["logit_difference"].nunique() <= LAYERS
    with torch.no_grad():
        clean = module(columns["base"])
    change = (logits - clean)[rows, counterfactual] - (logits - clean)[rows, label]
    np.testing.assert_allclose(everything["logit_difference"], change.double().mean(), atol=1e-5)


def test_tokens_that_nothing_reads_have_no_effect() -> None:
    # The answer is read from CLS, so patches exchanged after the last block change nothing.
    table = interchange_sweep(vmi.wrap(model()), data()).table
    last = table[(table["layer"] == LAYERS - 1) & table["token_set"].isin(["edited object", "background"])]
    assert (last["logit_difference"].abs() < 1e-5).all()


def test_the_whole_sweep_is_one_plan() -> None:
    result = interchange_sweep(vmi.wrap(model()), data())
    # Two clean forwards, and 2 + 1 + 0 blocks above the three block outputs for each token set but "all", whose runs are
    # the source image's own.
    assert (
        result.provenance["plan"]
        .splitlines()[1]
        .startswith(
            f"  {(2 * LAYERS + 4 * 3) * N / LAYERS:.4g} forwards' worth of blocks ({(2 * LAYERS + 4 * 3) * N} block"
        )
    )
    assert result.summary["forwards' worth of blocks"] == (2 * LAYERS + 4 * 3) * N / LAYERS
    document = vmi.Experiment.model_validate(yaml.safe_load(result.provenance["document"]))
    assert len(document.expand(LAYERS)) == 5 * LAYERS + 1


def test_background_is_what_no_object_covers_in_either_image() -> None:
    vit, columns = vmi.wrap(model()), data()
    objects = [
        ({"box": "edited_box"}, {"box": "source_box"}),
        ({"box": "other_box"}, {"box": "source_other_box"}),
    ]
    found = with_background(columns, vit, objects)["background_tokens"]
    assert found == [[8, 9, 12, 13]] * N
    assert "background_tokens" not in columns
    mine = {**columns, "background_tokens": [[8]] * N}
    assert with_background(mine, vit, objects) is mine
    whole = [({"column": "everything"}, "patches")]
    with pytest.raises(
        DataError, match="Example 0: the objects cover every patch, so there is no background"
    ):
        with_background({**columns, "everything": [list(range(16))] * N}, vit, whole)


def test_datasets_and_patch_indices_give_the_same() -> None:
    from datasets import Dataset

    vit, columns = vmi.wrap(model()), data()
    indices = {name: values for name, values in columns.items() if not name.endswith("_box")}
    table = interchange_sweep(vit, columns).table
    assert interchange_sweep(vit, indices).table.equals(table)
    plain = {name: v.tolist() if isinstance(v, Tensor) else v for name, v in columns.items()}
    stored = Dataset.from_dict(plain).with_format(
        "numpy", columns=["base", "source"], output_all_columns=True
    )
    np.testing.assert_allclose(
        interchange_sweep(vit, stored).table["decision"], table["decision"], atol=1e-12
    )


def test_a_model_without_cls_has_no_cls_row_and_layers_can_be_chosen() -> None:
    vit = vmi.wrap(model(class_token=False, global_pool="avg"))
    table = interchange_sweep(vit, data(), layers=[2, 0]).table
    assert list(dict.fromkeys(table["token_set"])) == [
        "none (clean)", "edited object", "other object", "background", "all",
    ]  # fmt: skip
    assert set(table["layer"].dropna()) == {0, 2}


def test_own_token_sets() -> None:
    vit, columns = vmi.wrap(model()), data()
    table = interchange_sweep(vit, columns, token_sets={"corner": ([0], [15]), "all": ("all", "all")}).table
    assert set(table["token_set"]) == {"none (clean)", "corner", "all"}
    runs = sweep_runs({"corner": ([0], [15])}, site="mlp_out", layers=[1])
    (run,) = runs[1].runs(LAYERS)
    (swap,) = run.interventions
    assert (run.name, swap.site, swap.tokens, swap.source_tokens) == (
        "corner, layer 1",
        "blocks.1.mlp_out",
        (0,),
        (15,),
    )


def test_figures_show_the_table() -> None:
    result = interchange_sweep(vmi.wrap(model()), data())
    figures = result.figures()
    assert list(figures) == list(result.captions) == ["decision", "logit_difference", "decision_lines"]
    swept = result.table[result.table["layer"].notna()]
    names = list(dict.fromkeys(swept["token_set"]))
    for name in ("decision", "logit_difference"):
        shown = np.asarray(figures[name].axes[0].images[0].get_array())
        assert shown.shape == (len(names) + (name == "decision"), LAYERS)
        np.testing.assert_allclose(shown[: len(names)], swept[name].to_numpy().reshape(len(names), LAYERS))
    labels = [text.get_text() for text in figures["decision"].axes[0].get_yticklabels()]
    assert labels == [*names, "none (clean)"]
    low, high = figures["logit_difference"].axes[0].images[0].get_clim()
    assert low == -high
    assert high >= swept["logit_difference"].abs().max()


def test_errors_say_what_is_wrong() -> None:
    vit, columns = vmi.wrap(model()), data()
    with pytest.raises(
        DataError, match=r"column 'edited_box' of pixel boxes or 'edited_tokens'.*Columns: base"
    ):
        interchange_sweep(vit, {"base": columns["base"], "source": columns["source"]})
    with pytest.raises(
        DataError, match="'counterfactual_label' holds labels from 0 to 7; the model has classes 0 to 2"
    ):
        interchange_sweep(vit, {**columns, "counterfactual_label": [7, *[0] * (N - 1)]})
    with pytest.raises(
        SpecError, match=r"Unknown site .blocks\.0\.resid_pots.\. Close matches: blocks\.0\.resid_post"
    ):
        interchange_sweep(vit, columns, site="resid_pots")
    with pytest.raises(SpecError, match="layers 0 to 2"):
        interchange_sweep(vit, columns, layers=[3])
    with pytest.raises(SpecError, match=r"gives logits.* of shape \(17, 3\) per example"):
        interchange_sweep(vmi.wrap(model(global_pool="")), columns)


def test_intervals_are_those_of_a_bootstrap_over_examples() -> None:
    values = np.random.default_rng(0).normal(size=(3, 40)) * [[1.0], [3.0], [0.0]]
    low, high = bootstrap_interval(values, resamples=4000, seed=1)
    again = bootstrap_interval(values, resamples=4000, seed=1)
    assert np.array_equal(low, again[0])
    assert np.array_equal(high, again[1])
    # By hand, with other draws: resample, average, take the middle 95 %.
    draw = np.random.default_rng(2)
    means = np.stack([values[:, draw.integers(0, 40, 40)].mean(axis=1) for _ in range(4000)])
    error = values.std(axis=1) / np.sqrt(40)
    np.testing.assert_allclose(low, np.quantile(means, 0.025, axis=0), atol=0.15 * error.max())
    np.testing.assert_allclose(high, np.quantile(means, 0.975, axis=0), atol=0.15 * error.max())
    assert (high - low)[:2] == pytest.approx(3.92 * error[:2], rel=0.12)
    assert low[2] == high[2] == 0
    with pytest.raises(DataError, match="no example"):
        bootstrap_interval(np.zeros((2, 0)))


@pytest.mark.parametrize(
    ("edited", "cls", "text"),
    [
        ([0.9, 0.8, 0.7], [0.1, 0.2, 0.3], "In every layer the edited object's tokens carry more of the decision than CLS."),
        ([0.1, 0.1, 0.1], [0.2, 0.3, 0.4], "In every layer CLS carries more of the decision than the edited object's tokens."),
        ([0.9, 0.5, 0.5], [0.1, 0.5, 0.2], "In every layer the edited object's tokens carry at least as much of the decision as CLS."),
        ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5], "In every layer CLS and the edited object's tokens carry equally much of the decision."),
        ([0.9, 0.5, 0.1], [0.1, 0.6, 0.9], "Above layer 0, CLS carries more of the decision than the edited object's tokens."),
        ([0.9, 0.5, 0.1], [0.1, 0.5, 0.9], "Above layer 0, CLS carries at least as much of the decision as the edited object's tokens."),
        ([0.1, 0.9, 0.5], [0.2, 0.1, 0.5], "Above layer 1, CLS and the edited object's tokens carry equally much of the decision."),
        ([0.1, 0.1, 0.9], [0.2, 0.3, 0.4],
         "In the last layer of the sweep (2) the edited object's tokens carry more of the decision than CLS, though not in every layer."),
    ],
)  # fmt: skip
def test_where_cls_takes_over(edited: list[float], cls: list[float], text: str) -> None:
    rows = [("edited object", n, x) for n, x in enumerate(edited)] + [("CLS", n, x) for n, x in enumerate(cls)]
    swept = pd.DataFrame(rows, columns=["token_set", "layer", "decision"])
    assert _handover(swept) == text
