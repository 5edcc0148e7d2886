"""Sweeps are products of axes, with names that tell their runs apart."""

from __future__ import annotations

from typing import Any

import pytest

from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec import Ablate, AddDirection, Interchange, Run, Sweep, TokenColumn

SWAP = Interchange(site="blocks.0.resid_post", source="source")


def test_a_layer_sweep_is_what_one_would_write_by_hand() -> None:
    sweep = Sweep(interventions=[SWAP], over={"layer": "all"}, capture=["logits"], base="image")
    assert sweep.runs(12) == [
        Run(name=f"layer{layer}", interventions=[SWAP.at(layer=layer)], capture=["logits"], base="image")
        for layer in range(12)
    ]


def test_the_product_is_in_order_and_the_last_axis_is_fastest() -> None:
    sweep = Sweep(
        name="{where}/{layer:02d}",
        interventions=[SWAP],
        over={
            "where": {
                "edited": {"tokens": TokenColumn(column="edited_tokens"), "source_tokens": {"column": "source_tokens"}},
                "cls": {"tokens": "cls"},
            },
            "layer": range(0, 4, 2),
        },
    )
    runs = sweep.runs(4)
    assert [run.name for run in runs] == ["edited/00", "edited/02", "cls/00", "cls/02"]
    assert runs[1].interventions == (
        SWAP.at(layer=2, tokens={"column": "edited_tokens"}, source_tokens={"column": "source_tokens"}),
    )
    assert runs[2].interventions == (SWAP.at(tokens="cls"),)


def test_an_axis_named_like_a_field_sets_it_wherever_there_is_one() -> None:
    add = AddDirection(site="blocks.1.attn.z", vector="probe", heads=0)
    sweep = Sweep(
        name="h{heads}-a{alpha}",
        interventions=[add, Ablate(site="blocks.2.attn.z")],
        over={"heads": [0, [1, 2]], "alpha": [0.5, 2]},
    )
    runs = sweep.runs(6)
    assert [run.name for run in runs] == ["h0-a0.5", "h0-a2", "h1+2-a0.5", "h1+2-a2"]
    assert runs[3].interventions == (add.at(heads=[1, 2], alpha=2), Ablate(site="blocks.2.attn.z", heads=[1, 2]))


def test_what_stands_in_no_block_stays() -> None:
    sweep = Sweep(interventions=[SWAP, Ablate(site="logits")], over={"layer": [3]})
    assert [entry.site for entry in sweep.runs(4)[0].interventions] == ["blocks.3.resid_post", "logits"]


def test_site_and_layer_are_independent_axes() -> None:
    sites = {"mid": "blocks.0.hook_resid_mid", "post": "blocks.0.resid_post"}
    sweep = Sweep(name="{site}{layer}", interventions=[SWAP], over={"site": sites, "layer": [0, 1]})
    assert {run.name: run.interventions[0].site for run in sweep.runs(2)} == {
        "mid0": "blocks.0.resid_mid",
        "mid1": "blocks.1.resid_mid",
        "post0": "blocks.0.resid_post",
        "post1": "blocks.1.resid_post",
    }


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"over": {"layer": "all", "alpha": [1]}}, r"does not tell the values of alpha apart: write for example 'layer\{layer\}-\{alpha\}'"),
        ({"name": "{layr}", "over": {"layer": "all"}}, r"uses \{layr\}, which is no axis\. Close matches: layer\. Axes: layer"),
        ({"name": "{layer.real}", "over": {"layer": "all"}}, "which is no axis"),
        ({"name": "{layr}", "over": {"layr": [1]}}, "is no field of these interventions.*Close matches: layer"),
        ({"name": "{x}", "over": {"x": {"a": {"token": "cls"}}}}, r"over\.x\.a: no intervention has a field 'token'\. Close matches: tokens"),
        ({"name": "{op}", "over": {"op": ["ablate"]}}, "is no field of these interventions"),
        ({"over": {"layer": [1, 1]}}, "Two runs of the sweep would be called 'layer1'"),
        ({"over": {"layer": [-1]}}, "negative"),
        ({"over": {"layer": []}}, "Axis 'layer' is empty"),
        ({"over": {"layer": "some"}}, "takes a list of values, a mapping from label to value or 'all'"),
        ({"over": {}}, "names no axis"),
        ({"over": ["layer"]}, "is a mapping from axis to values"),
        ({"name": "{tokens}", "over": {"tokens": [None]}}, r"None needs a label, written \{label: value\}"),
        ({"name": "{a}{layer}", "over": {"a": {"x": {"layer": 1}}, "layer": [2]}}, "two axes of the sweep set layer"),
        ({"name": "{heads}", "over": {"heads": [1]}}, "has no head axis"),
        ({"interventions": [Ablate(site="logits")], "over": {"layer": [1]}}, "no intervention stands in a block"),
        ({"interventions": [], "over": {"layer": [1]}}, "has no interventions, so there is nothing to change"),
    ],
)
def test_malformed_sweeps_say_what_is_wrong(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Sweep(**{"interventions": [SWAP], **fields})


def test_layers_beyond_the_model_are_refused() -> None:
    with pytest.raises(SpecError, match="layer=6: the model has layers 0 to 5"):
        Sweep(interventions=[SWAP], over={"layer": [5, 6]}).runs(6)
