"""Behind the last attention call only what somebody reads is computed, and nothing that is read differs."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

import vit_mechinterp as vmi
from tests.engine.world import World, world_of
from tests.tiny_models import HF_CLIP, HF_DINOV2, HF_VIT, TIMM_PLAIN, TIMM_POOLED, TIMM_REGISTERS, Tiny
from vit_mechinterp import Run
from vit_mechinterp.engine import Batch, prepare, run_together
from vit_mechinterp.engine.binding.ops import register_operator
from vit_mechinterp.spec import Intervention, register_op

Document = dict[str, Any]
BEHIND = ("attn.z", "attn.result", "attn_out", "resid_mid", "ln2", "mlp.pre", "mlp.post", "mlp_out", "resid_post")
BEFORE = ("resid_pre", "ln1", "attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern")


def swap(site: str, tokens: Any = "all", **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", "tokens": tokens, **fields}


def run(name: str, *edits: Document, capture: tuple[str, ...] = ()) -> Document:
    return {"name": name, "interventions": list(edits), "capture": list(capture)}


def levelled(site: str) -> Intervention:
    """An intervention of one's own that looks at several tokens: each becomes the mean of all."""

    @register_op
    class Level(Intervention):
        """Every selected token becomes the mean over tokens and examples."""

        op: Any = "level_of_test_unread"

    @register_operator(Level)
    def level(spec: Level, h: Tensor, inputs: Any) -> Tensor:
        return h.mean(dim=0, keepdim=True).expand_as(h)

    return Level(site=site)


class Computed:
    """Tokens that each layer with weights is really computed for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: Counter[int] = Counter()
        native = torch.nn.functional.linear

        def linear(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
            self.tokens[id(weight)] += x.shape[:-1].numel()
            return native(x, weight, *args)

        monkeypatch.setattr(torch.nn.functional, "linear", linear)


@pytest.mark.parametrize(
    ("capture", "tokens"),
    [
        ((), 1),
        (("blocks.2.resid_pre", "blocks.2.attn.pattern", "blocks.1.mlp_out", "pooled"), 1),
        (({"site": "blocks.2.resid_post", "tokens": ["cls", 4]},), 2),
        (({"site": "blocks.2.mlp.post", "tokens": [3]},), 2),
        (({"site": "ln_final", "tokens": {"column": "here"}},), None),
        (("blocks.2.attn.z",), 17),
    ],
)
def test_tokens_that_nobody_reads_are_not_computed(
    capture: tuple[Any, ...], tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(TIMM_PLAIN, 2)
    documents = [run("a", swap("blocks.0.resid_post", ["cls", 1])), run("b", swap("blocks.1.resid_pre", [2]))]
    documents = [{**document, "capture": list(capture)} for document in documents]
    if tokens is None:  # those of the examples' own three patches, taken together, and CLS
        tokens = 1 + len({int(patch) for own in world.columns["here"] for patch in own})
    world.execute(documents, batch_size=4)  # the first time, modules are compared with themselves
    computed = Computed(monkeypatch)
    results = world.execute(documents, batch_size=4)
    monkeypatch.undo()
    mlp, earlier = world.module.blocks[2].mlp, world.module.blocks[1].mlp
    assert computed.tokens[id(mlp.fc1.weight)] == computed.tokens[id(mlp.fc2.weight)] == 4 * tokens
    assert computed.tokens[id(world.module.blocks[2].attn.qkv.weight)] == 4 * 17
    assert computed.tokens[id(earlier.fc1.weight)] >= 4 * 17
    if not any(isinstance(own, dict) for own in capture):
        world.check(documents, results)


def test_the_plan_says_what_is_left_out() -> None:
    world = World(TIMM_PLAIN, 2)
    runs = [Run.model_validate(run(name, swap(site, ["cls", 1]))) for name, site in [("a", "blocks.0.resid_post"), ("b", "blocks.2.mlp_out")]]
    plan = vmi.plan(world.vit, runs, world.columns)
    whole = 3 * 24 * 24 + 2 * 17 * 24 + 24 * 24 + 2 * 24 * 96
    # Run b joins behind the last block, so the two rows of run a alone pass through it.
    assert plan.unread == pytest.approx(2 * (1 - 3 * 24 * 24 / whole) * 16 / 17)
    assert "left out of the last block" in str(plan)
    looking = [runs[0].model_copy(update={"capture": (vmi.Capture(site="blocks.2.attn.pattern"),)})]
    plan = vmi.plan(world.vit, looking, world.columns)
    assert plan.unread == pytest.approx(2 * 2 * 24 * 96 / whole * 16 / 17)
    everything = [runs[0].model_copy(update={"capture": (vmi.Capture(site="blocks.2.resid_post"),)})]
    plan = vmi.plan(world.vit, everything, world.columns)
    assert plan.unread == 0
    assert "all tokens of the last block are computed, because" in str(plan)
    hook = world.module.register_forward_hook(lambda module, args, output: None)
    plan = vmi.plan(world.vit, runs, world.columns)
    hook.remove()
    assert plan.unread == 0
    assert "because hooks, forwards or modules that are not its library's are on the model" in str(plan)
    pooled = world_of(TIMM_POOLED, 2)
    plan = vmi.plan(pooled.vit, [Run.model_validate(run("a", swap("blocks.0.resid_post", [1])))], pooled.columns)
    assert plan.unread == 0
    assert "left out" not in str(plan)


@pytest.mark.parametrize(
    "tiny", [TIMM_PLAIN, TIMM_REGISTERS, TIMM_POOLED, HF_VIT, HF_DINOV2, HF_CLIP], ids=lambda tiny: tiny.name
)
def test_edits_of_the_last_block_give_what_one_run_at_a_time_gives(tiny: Tiny) -> None:
    world = world_of(tiny, 3)
    first = "cls" if "cls" in tiny.prefix else 0
    documents = [
        run(f"{site}.{n}", swap(f"blocks.2.{site}", tokens), capture=capture)
        for site in (*BEFORE, *BEHIND)
        if site not in tiny.missing
        for n, (tokens, capture) in enumerate([([first, 2], ()), ("all", (*{f"blocks.2.{site}", "blocks.2.resid_post"},))])
    ]
    plain = [document for document in documents if not document["capture"]]
    for batch_size in (200, 7):
        world.check(documents, world.execute(documents, batch_size=batch_size))
        world.check(plain, world.execute(plain, batch_size=batch_size))


def test_a_run_that_reads_another_run_there_reads_what_it_would_have_been() -> None:
    world = world_of(TIMM_PLAIN, 3)
    site = "blocks.2.mlp_out"
    documents = [
        run("first", swap("blocks.0.resid_post")),
        run("second", swap(site, ["cls"], source={"run": "first"}, source_tokens=[5])),
    ]
    world.check(documents, world.execute(documents))


def test_an_operator_that_looks_at_several_tokens_sees_them_all() -> None:
    world = World(TIMM_PLAIN, 1)
    vit, x = world.vit, world.columns["base"]
    level = levelled("blocks.2.mlp_out")
    runs = [Run(name="a", interventions=[level])]
    push = vmi.AddDirection(site="blocks.0.resid_post", vector=vmi.TensorRef("direction.24"), alpha=2.0)
    runs.append(Run(name="b", interventions=[push, level]))
    vector = world.tensors["direction.24"]
    found = vmi.execute(vit, runs, {"base": x}, {"direction.24": vector}, progress=False)
    mean = {"blocks.2.mlp_out": lambda h: h.mean(dim=(0, 1), keepdim=True).expand_as(h)}
    with torch.no_grad(), vit.hooks({**mean, "blocks.0.resid_post": lambda h: h + 2 * vector}):
        wanted = vit(x)
    assert torch.allclose(found["b"], wanted, atol=1e-5 * world.scale)
    with torch.no_grad(), vit.hooks(mean):
        assert torch.allclose(found["a"], vit(x), atol=1e-5 * world.scale)
    assert not torch.allclose(found["a"], vit(x), atol=1e-3 * world.scale)


def test_preparations_that_run_together_compute_what_either_reads() -> None:
    world = World(TIMM_PLAIN, 2)
    vector = {"v": world.tensors["direction.24"]}
    push = vmi.AddDirection(site="blocks.0.resid_post", vector=vmi.TensorRef("v"), alpha=2.0)
    runs = [Run(name="a", interventions=[push]), Run(name="b", interventions=[push, levelled("blocks.2.mlp_out")])]
    with (
        prepare(world.vit, runs[:1], world.columns, vector, progress=False) as one,
        prepare(world.vit, runs[1:], world.columns, vector, progress=False) as other,
    ):
        first, second = run_together([Batch(one, [0, 1], ["a"]), Batch(other, [0, 1], ["b"])], vector)
    hooks: dict[str, Any] = {"blocks.0.resid_post": lambda h: h + 2 * vector["v"]}
    with torch.no_grad(), world.vit.hooks(hooks):
        a = world.vit(world.columns["base"])
    with torch.no_grad(), world.vit.hooks({**hooks, "blocks.2.mlp_out": lambda h: h.mean(dim=(0, 1), keepdim=True).expand_as(h)}):
        b = world.vit(world.columns["base"])
    assert torch.allclose(first[0], a, atol=1e-5 * world.scale)
    assert torch.allclose(second[0], b, atol=1e-5 * world.scale)
    assert not torch.allclose(a, b, atol=1e-2 * world.scale)


def test_hooks_of_other_people_see_every_token() -> None:
    world = World(TIMM_PLAIN, 2)
    documents = [run("a", swap("blocks.0.resid_post"))]
    seen: list[Tensor] = []
    hook = world.module.blocks[2].mlp.register_forward_hook(lambda m, args, output: seen.append(output.clone()))
    world.execute(documents)
    hook.remove()
    wanted = world.oracle.run(documents[0])[1]["blocks.2.mlp_out"]
    assert torch.allclose(seen[-1], wanted, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_VIT, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_gradients_are_those_of_the_whole_block(tiny: Tiny) -> None:
    world = world_of(tiny, 4)
    d = world.module_width
    site = "blocks.1.resid_post"
    runs = [Run.model_validate(run("a", {"op": "add_direction", "site": site, "tokens": ["cls", 3], "vector": "v"}))]
    v = torch.randn(d, generator=torch.Generator().manual_seed(5), requires_grad=True)
    with prepare(world.vit, runs, world.columns, {"v": v}, progress=False) as prepared:
        (found,) = torch.autograd.grad(prepared(range(4), {"v": v}).square().sum(), v)
    tokens = [0, len(tiny.prefix) + 3]

    def push(h: Tensor) -> Tensor:
        added = torch.zeros_like(h)
        added[:, tokens] = 1.0
        return h + added * v

    with torch.enable_grad(), world.vit.hooks({site: push}):
        output = world.vit(world.columns["base"])
        (wanted,) = torch.autograd.grad(output.square().sum(), v)
    assert float(wanted.abs().max()) > 1e-2
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_nothing_is_left_behind_when_a_wave_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(TIMM_PLAIN, 2)
    documents = [run("a", swap("blocks.0.resid_post"))]
    world.execute(documents)
    before = {name: dict(vars(part)) for name, part in world.module.named_modules()}
    native = type(world.module).forward_head

    def fail(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        native(self, *args, **kwargs)
        raise KeyboardInterrupt

    fail.__module__ = native.__module__  # a foreign method would keep the model whole
    monkeypatch.setattr(type(world.module), "forward_head", fail)
    with pytest.raises(KeyboardInterrupt):
        world.execute(documents)
    monkeypatch.undo()
    assert {name: dict(vars(part)) for name, part in world.module.named_modules()} == before
