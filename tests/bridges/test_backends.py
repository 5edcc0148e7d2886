"""Runs carried out by other packages: the same numbers, the same form of results, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vit_mechinterp as vmi
from tests.engine.experiments import DOCUMENTS
from tests.engine.world import World, world_of
from tests.tiny_models import HF_DINOV2, HF_VIT, TIMM_PLAIN, Tiny
from vit_mechinterp import Ablate, Interchange, Results, Run
from vit_mechinterp.bridges import hooks as plain
from vit_mechinterp.bridges.agreement import difference, size
from vit_mechinterp.bridges.parity_runs import parity_data, parity_runs
from vit_mechinterp.errors import ExecutionError, SpecError
from vit_mechinterp.model.visiting import replace_output

BACKENDS = ("hooks", "nnsight", "pyvene", "transformer_lens")
# Sites that every backend reaches.
COMMON: list[dict[str, Any]] = [
    {"name": "clean", "capture": ["blocks.1.resid_post", {"site": "blocks.0.mlp.post", "tokens": {"box": "box"}}]},
    *DOCUMENTS[1:],
]
COMMON[1] = {**COMMON[1], "capture": ["pooled", {"site": "embed", "tokens": {"box": "box"}}, "blocks.2.resid_mid"]}


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a backend could leave changed on a model."""
    return {
        name: (
            {key: value for key, value in vars(m).items() if not isinstance(value, dict)},
            {key: list(value.items()) for key, value in vars(m).items() if isinstance(value, dict)},
            [(p.requires_grad, p.grad) for p in m.parameters(recurse=False)],
        )
        for name, m in module.named_modules()
    }


def same(one: Results, other: Results, scale: float) -> None:
    assert one.run_names == other.run_names
    assert one.labels == other.labels
    assert one.logits.dtype == other.logits.dtype
    assert float((one.logits - other.logits).abs().max()) <= 1e-5 * scale
    for run in one.run_names:
        assert list(one.captures[run]) == list(other.captures[run])
        for site, value in one.captures[run].items():
            again = other.captures[run][site]
            assert type(value) is type(again)
            for a, b in zip(value, again, strict=True):
                assert a.shape == b.shape
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_under_autocast_numbers_are_the_engines_in_its_precision(backend: str) -> None:
    world = world_of(TIMM_PLAIN)
    swap = {"op": "interchange", "site": "blocks.1.resid_post", "source": "source", "tokens": {"column": "here"}}
    runs = [{"name": "clean"}, {"name": "swap", "interventions": [swap]}]
    precise = world.execute(runs).logits
    with torch.autocast("cpu", torch.bfloat16):
        ours = world.execute(runs).logits
        theirs = world.execute(runs, backend=backend).logits
    assert not torch.equal(ours, precise)
    assert (ours - theirs).abs().max() <= 0.03 * world.scale
    assert (precise[0] - precise[1]).abs().max() > 0.1 * world.scale


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_captures_and_labels_are_the_engines(backend: str) -> None:
    world = world_of(TIMM_PLAIN)
    documents = COMMON
    if backend == "transformer_lens":
        documents = [COMMON[0], {**COMMON[1], "capture": COMMON[1]["capture"][1:]}, *COMMON[2:]]
    ours, theirs = world.execute(documents), world.execute(documents, backend=backend, batch_size=2)
    same(ours, theirs, world.scale)
    assert isinstance(theirs.captures["swap"]["embed"], list)
    world.check(COMMON[2:], theirs)
    mine = dict(theirs.provenance)
    assert mine.pop("backend")["name"] == backend
    assert set(mine) == set(ours.provenance)
    assert {key: mine[key] for key in ("spec", "model", "data", "tensors")} == {
        key: ours.provenance[key] for key in ("spec", "model", "data", "tensors")
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_basis_for_each_token_means_the_same_everywhere(backend: str) -> None:
    world = world_of(TIMM_PLAIN)
    moved: dict[str, Any] = {"op": "inject_subspace", "tokens": {"column": "here"}, "basis": f"bases.3.{world.module_width}"}
    edits = [
        {**moved, "site": "blocks.1.resid_post", "source": "source", "source_tokens": {"column": "there"}, "gate": "gates.3"},
        {**moved, "site": "blocks.0.resid_post", "vectors": "kinds.3.3", "choose": {"column": "kind"}},
    ]
    documents = [{"name": f"edit {n}", "interventions": [edit]} for n, edit in enumerate(edits)]
    world.check(documents, world.execute(documents, backend=backend))


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_plain_hooks_reach_every_site(tiny: Tiny) -> None:
    world = world_of(tiny)
    documents: list[dict[str, Any]] = [
        {"name": site, "interventions": [{"op": "interchange", "site": site, "source": "source"}], "capture": [site]}
        for site in world.sites
        if not site.startswith("blocks.2.attn.q")
    ]
    world.check(documents, world.execute(documents, backend="hooks"), effect=None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_VIT], ids=lambda tiny: tiny.name)
def test_the_model_is_left_as_it_came(backend: str, tiny: Tiny) -> None:
    module = tiny.module()
    seen: list[Tensor] = []
    block = module.get_submodule("blocks.1" if tiny is TIMM_PLAIN else "vit.layers.1")
    block.register_forward_hook(lambda m, a, output: seen.append(output))
    block.register_forward_pre_hook(lambda m, a: None)
    next(module.parameters()).requires_grad_(False)
    block.train()
    vit, native = vmi.wrap(module), F.scaled_dot_product_attention
    data = parity_data(vit)
    before, logits = state_of(module), vit(data["base"])
    runs, tensors = parity_runs(vit)
    run = runs["four interventions in one run"][-1]

    result = vmi.execute(vit, run, data, tensors, backend=backend)
    assert float((result.logits[0] - logits).detach().abs().amax(dim=1).min()) > 1e-2
    assert state_of(module) == before
    assert len(seen) >= 3  # the user's hook saw the forwards
    assert torch.equal(vit(data["base"]), logits)

    for error in (ZeroDivisionError, KeyboardInterrupt):

        def fail(m: nn.Module, args: Any, output: Any, error: type[BaseException] = error) -> None:
            if len(output) == 3:
                raise error

        handle = block.register_forward_hook(fail)
        before = state_of(module)
        with pytest.raises(BaseException, match=r"^$|ZeroDivisionError|KeyboardInterrupt"):
            vmi.execute(vit, run, data, tensors, backend=backend)
        assert state_of(module) == before
        handle.remove()
    assert F.scaled_dot_product_attention is native
    assert torch.equal(vit(data["base"]), logits)


def test_an_unknown_backend_and_options_of_the_engine_are_refused() -> None:
    world = world_of(TIMM_PLAIN)
    with pytest.raises(SpecError, match=r"no backend 'pyveen'\. Close matches: pyvene\. Known: hooks, nnsight, pyvene, transformer_lens;"):
        world.execute(COMMON, backend="pyveen")
    with pytest.raises(SpecError, match="backend='hooks' computes everything anew and holds nothing"):
        world.execute(COMMON, backend="hooks", memory="1GiB")


@pytest.mark.parametrize("backend", ["hooks", "nnsight", "pyvene"])
@pytest.mark.parametrize(("tiny", "site"), [(TIMM_PLAIN, "logits"), (HF_VIT, "logits"), (HF_VIT, "pooled")])
def test_an_edit_of_what_the_model_returns_arrives(backend: str, tiny: Tiny, site: str) -> None:
    world = world_of(tiny)
    document = {"name": "r", "interventions": [{"op": "interchange", "site": site, "source": "source"}]}
    run = Run.model_validate(document)
    world.check([document], vmi.execute(world.vit, run, world.columns, backend=backend))


def test_a_backend_whose_edits_do_not_arrive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(port: Any, output: Any, touch: Any) -> Any:
        replace_output(port, output, touch)
        return output

    monkeypatch.setattr(plain, "replace_output", looks)
    world = world_of(TIMM_PLAIN)
    run = Run(name="r", interventions=[Interchange(site="blocks.0.mlp_out", source="source")])
    with pytest.raises(SpecError, match=r"computes another output of VisionTransformer, by .*, where it edits blocks\.0\.mlp_out"):
        vmi.execute(world.vit, run, world.columns, backend="hooks")


def test_masked_scores_are_compared_by_what_is_finite() -> None:
    scores = torch.tensor([[1.0, -torch.inf], [2.0, 3.0]])
    assert difference(scores, scores) == 0
    assert difference(scores, scores.nan_to_num(neginf=0)) == torch.inf
    assert difference(scores, scores + 0.5) == 0.5
    assert size(scores) == 3


def test_a_pooled_mean_over_boxes_of_any_size() -> None:
    world = world_of(TIMM_PLAIN)
    run = Run(name="r", interventions=[Ablate(site="blocks.0.resid_post", method="mean", pool_tokens=True, tokens={"box": "box"})])
    ours = vmi.execute(world.vit, run, world.columns)
    theirs = vmi.execute(world.vit, run, world.columns, backend="hooks", batch_size=1)
    same(ours, theirs, world.scale)


def test_attention_that_is_not_one_fused_call_is_refused_before_anything_runs() -> None:
    module = HF_VIT.module()
    module.set_attn_implementation("eager")
    vit = vmi.wrap(module)
    run = Run(name="r", interventions=[Interchange(site="blocks.0.attn.pattern", source="source")])
    with pytest.raises(SpecError, match=r"cannot reach blocks\.0\.attn\.pattern on ViTFor.*not reached, since its block makes no one attention call"):
        vmi.execute(vit, run, World(HF_VIT).columns, backend="hooks")


@pytest.mark.parametrize("backend", ["nnsight", "pyvene"])
def test_a_module_that_is_called_twice_is_refused(backend: str) -> None:
    torch.manual_seed(0)
    module = timm.create_model("cait_xxs24_224", img_size=64, embed_dim=24, depth=1, num_heads=3, num_classes=5)
    vit = vmi.wrap(module.eval())
    for site in ("blocks.0.attn_out", "blocks.0.attn.result"):
        with pytest.raises(SpecError, match="lies at a module that its block calls more than once"):
            vmi.execute(vit, Run(name="r", interventions=[Ablate(site=site)]), parity_data(vit), backend=backend)


def test_train_mode_with_dropout_is_refused() -> None:
    vit = vmi.wrap(TIMM_PLAIN.module().train())
    assert vmi.execute(vit, Run(name="r"), parity_data(vit), backend="hooks").logits.shape == (1, 3, 5)
    vit.module.head_drop.p = 0.5
    with pytest.raises(ExecutionError, match="drop"):
        vmi.execute(vit, Run(name="r"), parity_data(vit), backend="hooks")
