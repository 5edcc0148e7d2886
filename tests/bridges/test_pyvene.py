"""Runs and rotations in pyvene's words, and back."""

from __future__ import annotations

from typing import Any

import pytest
import pyvene as pv
import torch

import vit_mechinterp as vmi
from tests.engine.world import world_of
from tests.tiny_models import HF_VIT, TIMM_PLAIN, Tiny
from vit_mechinterp import Ablate, AddDirection, InjectSubspace, Interchange, Run
from vit_mechinterp.bridges.pyvene import intervenable
from vit_mechinterp.bridges.pyvene_configs import from_config, to_config
from vit_mechinterp.bridges.pyvene_rotations import to_rotation, to_subspace
from vit_mechinterp.bridges.restoring import as_it_came
from vit_mechinterp.errors import SpecError

MOVED: dict[str, Any] = {"tokens": {"column": "here"}, "source": "source", "source_tokens": {"column": "there"}}


def turned(kind: Any, width: int = 6, **options: Any) -> Any:
    """A trained intervention of pyvene's: parameters drawn anew."""
    torch.manual_seed(0)
    intervention = kind(embed_dim=width, **options)
    with torch.no_grad():
        for name, parameter in intervention.named_parameters():
            if name.endswith(("masks", "mask")):
                parameter.copy_(torch.randn(width) * float(intervention.temperature))
            if name == "intervention_boundaries":
                parameter.fill_(0.6)
    return intervention


@pytest.mark.parametrize(
    ("kind", "options", "gated"),
    [
        (pv.RotatedSpaceIntervention, {}, False),
        (pv.LowRankRotatedSpaceIntervention, {"low_rank_dimension": 2}, False),
        (pv.BoundlessRotatedSpaceIntervention, {}, True),
        (pv.SigmoidMaskRotatedSpaceIntervention, {}, True),
        (pv.SigmoidMaskIntervention, {}, True),
    ],
)
def test_their_rotations_are_our_subspaces_and_ours_theirs(kind: Any, options: dict[str, Any], gated: bool) -> None:
    theirs = turned(kind, **options)
    if kind is pv.RotatedSpaceIntervention:
        theirs.set_interchange_dim(2)
    base, source = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    expected = theirs(base.clone(), source.clone()).detach()
    assert float((expected - base).abs().max()) > 0.1
    ours = to_subspace(theirs)
    assert ("gate" in ours) is gated
    R, g = ours["basis"], ours.get("gate", torch.ones(ours["basis"].shape[1]))
    torch.testing.assert_close(base + (g * ((source - base) @ R)) @ R.T, expected)
    again = to_rotation(**ours)
    torch.testing.assert_close(again(base.clone(), source.clone()).detach(), expected, atol=1e-5, rtol=1e-5)


KINDS = [
    (pv.RotatedSpaceIntervention, {"keep_last_dim": True}, 3),
    (pv.LowRankRotatedSpaceIntervention, {"low_rank_dimension": 2, "keep_last_dim": True}, 3),
    (pv.BoundlessRotatedSpaceIntervention, {}, 1),
    (pv.SigmoidMaskRotatedSpaceIntervention, {}, 1),
    (pv.SigmoidMaskIntervention, {}, 1),
]


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_VIT], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize(("kind", "options", "n_tokens"), KINDS, ids=[kind.__name__ for kind, *_ in KINDS])
def test_a_trained_rotation_does_the_same_there_and_here(tiny: Tiny, kind: Any, options: dict[str, Any], n_tokens: int) -> None:
    world = world_of(tiny)
    vit, block = world.vit, "blocks[1]" if tiny is TIMM_PLAIN else "vit.layers[1]"
    theirs = turned(kind, width=world.module_width, **options)
    if kind is pv.RotatedSpaceIntervention:
        theirs.set_interchange_dim(4)
    config = pv.IntervenableConfig([{"component": f"{block}.output", "unit": "pos", "intervention": theirs}])
    data = {**world.columns, "at": world.columns["here"][:, :n_tokens], "of": world.columns["there"][:, :n_tokens]}
    there, here = ([(data[c] + len(tiny.prefix)).tolist()] for c in ("of", "at"))
    with as_it_came(vit.module), torch.no_grad():
        images = ({"images": data["base"]}, [{"images": data["source"]}])
        _, native = intervenable(vit, config)(*images, {"sources->base": (there, here)})
    expected = vit.layout.outcome(native)
    assert float((expected - world.oracle.clean("base")[0]).abs().max()) > 1e-3 * world.scale

    run, tensors = from_config(vit, config, "r", {"column": "at"}, source_tokens={"column": "of"})
    assert float((vmi.execute(vit, run, data, tensors).logits[0] - expected).abs().max()) < 1e-5 * world.scale
    again = to_config(vit, run, data, tensors)(vit, data)
    assert float((again - expected).abs().max()) < 1e-5 * world.scale


def config_of(**fields: Any) -> Any:
    return pv.IntervenableConfig([{"component": "blocks[1].output", "unit": "pos", **fields}])


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (config_of(component="block[1].output"), r"'block\[1\]\.output' is no site of .* Close matches: blocks\.1\.output"),
        (config_of(unit="h.pos"), r"unit='h\.pos' and subspace_partition=None have no words in a run"),
        (config_of(intervention_type=pv.LowRankRotatedSpaceIntervention), "given by its type alone"),
        (config_of(intervention=pv.CollectIntervention()), "CollectIntervention is no interchange"),
        (pv.IntervenableConfig([{"component": "blocks[1].output"}], mode="serial"), "runs of a serial configuration"),
    ],
)
def test_what_a_run_cannot_say_is_refused_with_the_reason(config: Any, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        from_config(world_of(TIMM_PLAIN).vit, config)


def test_types_without_parameters_are_read() -> None:
    vit = world_of(TIMM_PLAIN).vit
    (zero,) = from_config(vit, config_of(intervention_type=pv.ZeroIntervention))[0].interventions
    (swap,) = from_config(vit, pv.IntervenableConfig([{"component": "blocks[1].output"}]))[0].interventions
    assert (zero, swap) == (Ablate(site="blocks.1.resid_post"), Interchange(site="blocks.1.resid_post", source="source"))


def test_what_is_no_subspace_is_refused() -> None:
    with pytest.raises(SpecError, match="VanillaIntervention is no interchange in a linear subspace"):
        to_subspace(pv.VanillaIntervention())
    with pytest.raises(SpecError, match=r"A basis is \[d, r\] and a gate \[r\]; got \(3, 4\) and None"):
        to_rotation(torch.zeros(3, 4))


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_VIT], ids=lambda tiny: tiny.name)
def test_a_run_goes_to_pyvene_runs_there_and_comes_back(tiny: Tiny) -> None:
    world = world_of(tiny)
    d = world.module_width
    tensors = {"direction": torch.randn(d, generator=torch.Generator().manual_seed(3)), "basis": world.tensors[f"basis.{d}"]}
    run = Run(
        name="r",
        interventions=[
            Interchange(site="blocks.0.resid_post", **MOVED),
            AddDirection(site="blocks.1.resid_mid", vector="direction", alpha=2.0, tokens="patches"),
            InjectSubspace(site="blocks.1.resid_post", basis="basis", **MOVED),
            Ablate(site="blocks.2.mlp.post", tokens=["cls", 3]),
        ],
    )
    ours = vmi.execute(world.vit, run, world.columns, tensors).logits[0]
    effect = float((ours - world.oracle.clean("base")[0]).abs().max())
    assert effect > 0.05 * world.scale
    said = to_config(world.vit, run, world.columns, tensors)
    kinds = [type(one.intervention).__name__ for one in said.config.representations]
    assert kinds == ["VanillaIntervention", "AdditionIntervention", "LowRankRotatedSpaceIntervention", "ZeroIntervention"]
    assert float((said(world.vit, world.columns) - ours).abs().max()) < 1e-5 * world.scale

    selectors = [spec.tokens for spec in run.interventions]
    back, own = from_config(
        world.vit, said.config, "r", selectors, source_tokens=[{"column": "there"}, None, {"column": "there"}, None]
    )
    assert [type(spec) for spec in back.interventions] == [type(spec) for spec in run.interventions]
    assert [spec.site for spec in back.interventions] == [spec.site for spec in run.interventions]
    again = vmi.execute(world.vit, back, world.columns, own).logits[0]
    assert float((again - ours).abs().max()) < 1e-5 * world.scale


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (Interchange(site="blocks.0.attn.q", source="source"), "blocks.0.attn.q is not what enters or leaves a module"),
        (Interchange(site="blocks.1.resid_post", source="source", source_site="blocks.0.resid_post"), "read at one place"),
        (Ablate(site="blocks.0.mlp_out", method="mean"), "its words are interchange, subspaces with a source"),
        (Interchange(site="blocks.0.resid_post", tokens={"box": "box"}, source="base"), "pyvene takes equally many"),
        (Interchange(site="pooled", source="source"), "no token axis"),
    ],
)
def test_what_pyvene_cannot_say_is_refused_with_the_reason(edit: Any, why: str) -> None:
    world = world_of(TIMM_PLAIN)
    with pytest.raises(SpecError, match=why):
        to_config(world.vit, Run(name="r", interventions=[edit]), world.columns)


def test_a_basis_for_each_token_has_no_words_in_a_configuration() -> None:
    world = world_of(TIMM_PLAIN)
    edit = InjectSubspace(site="blocks.1.resid_post", basis="bases", **MOVED)
    bases = {"bases": world.tensors[f"bases.3.{world.module_width}"]}
    with pytest.raises(SpecError, match="a basis per token has no word in a configuration"):
        to_config(world.vit, Run(name="r", interventions=[edit]), world.columns, bases)


def test_sites_within_the_attention_call_are_refused_before_anything_runs() -> None:
    world = world_of(TIMM_PLAIN)
    world.vit.sites()
    fired: list[int] = []
    handle = world.module.register_forward_hook(lambda *_: fired.append(1))
    run = Run(name="r", interventions=[Interchange(site="blocks.0.attn.pattern", source="source")])
    with pytest.raises(SpecError, match=r"cannot carry out run 'r': interchange at blocks\.0\.attn\.pattern: .* within the attention call"):
        vmi.execute(world.vit, run, world.columns, backend="pyvene")
    handle.remove()
    assert not fired
