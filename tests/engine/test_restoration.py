"""A model after a run is the model before it: whatever happened in between, and whoever else has hooks on it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vit_mechinterp as vmi
from tests.engine.world import World, world_of
from tests.tiny_models import HF_CLIP, HF_VIT, TIMM_PLAIN, TIMM_REGISTERS, Tiny
from vit_mechinterp import Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.errors import ExecutionError

Document = dict[str, Any]

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip

EVERYWHERE: list[Document] = [
    {"name": f"{n}", "interventions": [{"op": "interchange", "site": site, "source": "source", "tokens": [1, 2]}],
     "capture": ["blocks.*.attn.*", "logits"]}
    for n, site in enumerate(f"blocks.1.{name}" for name in ("attn.q", "attn.pattern", "attn.result", "resid_mid", "mlp_out"))
]  # fmt: skip
EVERYWHERE.append(
    {
        "name": "reader",
        "interventions": [{"op": "interchange", "site": "blocks.2.ln1", "source": {"run": "0"}}],
    }
)


def state(module: nn.Module) -> dict[str, Any]:
    """Everything on a module that an experiment could leave changed; tensors by identity and version."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in HOOKS:
                found[path, name] = dict(value)
            elif name not in ("_parameters", "_buffers", "_modules"):
                found[path, name] = value
    for name, parameter in module.named_parameters():
        found[name] = (id(parameter), parameter._version, parameter.requires_grad, parameter.grad)
    found["attention"] = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return found


class BoomError(Exception):
    """Raised in the middle of a forward."""


def failing(error: type[BaseException], after: int) -> Callable[..., None]:
    calls = iter(range(10**6))

    def hook(*args: Any) -> None:
        if next(calls) >= after:
            raise error("in the middle of a forward")

    return hook


MODELS = pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_VIT, HF_CLIP], ids=lambda tiny: tiny.name)


@MODELS
def test_nothing_is_left_behind(tiny: Tiny) -> None:
    world = World(tiny)
    part = world.module.get_submodule("blocks.1" if tiny is TIMM_REGISTERS else "")
    part.forward = type(part).forward.__get__(part)  # somebody else's shadow, which must come back
    next(world.module.parameters()).requires_grad_(False)
    before = state(world.module)
    world.check(EVERYWHERE, world.execute(EVERYWHERE, batch_size=7), effect=None)
    vmi.plan(world.vit, [Run.model_validate(document) for document in EVERYWHERE], world.columns)
    world.vit.run(world.columns["base"], capture=["*"])
    with world.vit.hooks({"blocks.*.attn.pattern": lambda pattern: pattern * 0}):
        world.vit(world.columns["base"])
    assert state(world.module) == before


@MODELS
@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("after", [0, 2, 5])
def test_nothing_is_left_behind_after_an_exception(
    tiny: Tiny, error: type[BaseException], after: int
) -> None:
    world = World(tiny)
    norm = [
        m
        for path, m in world.module.named_modules()
        if path.endswith(("1.norm2", "1.layernorm_after", "1.layer_norm2"))
    ]
    grad, handle = torch.is_grad_enabled(), norm[0].register_forward_hook(failing(error, after))
    world.vit.sites() if after else None
    before = state(world.module)
    with pytest.raises(error):
        world.execute(EVERYWHERE, batch_size=3)
    with pytest.raises(error), world.vit.hooks({"blocks.*.attn.scores": lambda scores: scores}):
        world.vit(world.columns["base"])
    with pytest.raises(error):
        world.vit.run(world.columns["base"], capture=["*"])
    with pytest.raises(error):
        _train(world, after + 1)
    assert state(world.module) == before
    assert torch.is_grad_enabled() == grad
    handle.remove()
    assert world.vit.lock.acquire(blocking=False)
    world.vit.lock.release()
    world.check(EVERYWHERE, world.execute(EVERYWHERE), effect=None)


def _train(world: World, steps: int) -> None:
    run = Run.model_validate(EVERYWHERE[0])
    run = run.model_copy(update={"capture": ()})
    with prepare(world.vit, [run], world.columns, {}, progress=False) as prepared:
        for _ in range(steps):
            prepared([0, 1], {})


def test_an_exception_in_a_users_function_leaves_nothing_behind() -> None:
    world = World(HF_VIT)
    world.vit.sites()
    before = state(world.module)
    for site in ("blocks.1.attn.q", "blocks.0.resid_mid", "blocks.2.attn.result", "logits"):
        with pytest.raises(BoomError), world.vit.hooks({site: failing(BoomError, 0)}):
            world.vit(world.columns["base"])
    assert state(world.module) == before


@pytest.mark.parametrize(
    "path", ["blocks.0", "blocks.1", "blocks.1.mlp", "blocks.1.drop_path2", "blocks.2.attn", "patch_embed"]
)
def test_foreign_hooks_fire_and_count(path: str) -> None:
    """With somebody else's editing hook on a module, results are those of the edited model."""
    world = World(TIMM_PLAIN)
    fired: list[int] = []

    def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        fired.append(len(output))
        return output * 1.5

    hook = world.module.get_submodule(path).register_forward_hook(double)
    before = state(world.module)
    for site in (
        "blocks.1.mlp_out",
        "blocks.1.resid_post",
        "blocks.1.attn.z",
        "blocks.2.resid_pre",
        "blocks.0.mlp_out",
        "embed",
    ):
        edit = {"op": "interchange", "site": site, "source": "source", "tokens": ["cls", 1]}
        results = world.execute(
            [{"name": "a", "interventions": [edit], "capture": ["blocks.1.mlp_out", "blocks.1.resid_post"]}]
        )
        assert torch.allclose(results["a"], _by_plain_hooks(world, site), atol=1e-5 * world.scale), site
        clean = world.oracle.clean("base")[0]
        assert float((results["a"] - clean).abs().max()) > 1e-3 * world.scale
    assert fired
    assert state(world.module) == before
    hook.remove()


def _by_plain_hooks(world: World, site: str) -> Tensor:
    """Interchange of CLS and patch 1 with hooks on top of whatever hooks there are, for a few sites of timm."""
    name, layer = site.split(".", 2)[-1], int(site.split(".")[1]) if "." in site else 0
    block = world.module.blocks[layer]
    part, before = {
        "mlp_out": (block.drop_path2, False), "resid_post": (block, False), "attn.z": (block.attn.proj, True),
        "resid_pre": (block, True), "embed": (block, True),
    }[name]  # fmt: skip
    kept: list[Tensor] = []

    def read(value: Tensor) -> None:
        kept.append(value.clone())

    def write(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, [0, 2]] = kept[0][:, [0, 2]]
        return value

    for image, act in (("source", read), ("base", write)):
        if before:
            handle = part.register_forward_pre_hook(
                lambda m, args, act=act: None if (v := act(args[0])) is None else (v,)
            )
        else:
            handle = part.register_forward_hook(lambda m, args, output, act=act: act(output))
        with torch.no_grad():
            output = world.module(world.columns[image])
        handle.remove()
    return output


def test_experiments_inside_exploratory_hooks_see_the_edited_model() -> None:
    world = World(HF_VIT)
    edit = {"op": "interchange", "site": "blocks.2.resid_pre", "source": "source", "tokens": ["cls", 3]}
    plain = world.execute([{"name": "a", "interventions": [edit]}])["a"]
    with world.vit.hooks(
        {"blocks.0.mlp_out": lambda h: h * 2, "blocks.1.attn.pattern": lambda p: p.roll(1, -1)}
    ):
        edited = world.execute([{"name": "a", "interventions": [edit]}, {"name": "clean"}])
        native = world.vit(world.columns["base"])
    assert torch.allclose(edited["clean"], native, atol=1e-5 * world.scale)
    assert float((edited["a"] - plain).abs().max()) > 1e-2 * world.scale
    assert torch.equal(world.execute([{"name": "a", "interventions": [edit]}])["a"], plain)


def test_an_intervention_that_does_not_fire_is_an_error() -> None:
    world = World(TIMM_PLAIN)
    world.vit.sites()
    world.module.blocks[1].mlp.forward = lambda x: x  # its parts no longer run
    edit = {"op": "ablate", "site": "blocks.1.mlp.post", "tokens": ["cls"]}
    with pytest.raises(
        ExecutionError, match=r"did not fire once in each of 1 forwards .*blocks\.1\.mlp\.post \(0\)"
    ):
        world.execute([{"name": "a", "interventions": [edit]}])


def test_two_threads_on_one_module() -> None:
    tiny = TIMM_PLAIN
    world = world_of(tiny)
    wrappers = [world.vit, vmi.wrap(world.module)]
    run = [Run.model_validate(document) for document in EVERYWHERE]
    images, gathered, errors = world.columns["base"], [[], []], []
    expected = vmi.execute(world.vit, run, world.columns, batch_size=6, progress=False).logits
    with torch.no_grad():
        native = world.vit(images)

    def work(n: int) -> None:
        try:
            for _ in range(4):
                gathered[n].append(
                    vmi.execute(wrappers[n], run, world.columns, batch_size=6, progress=False).logits
                )
                with torch.no_grad():
                    gathered[n].append(wrappers[n](images))
                    gathered[n].append(wrappers[n].run(images, capture=["blocks.1.attn.pattern"])[0])
        except BaseException as error:  # a failed assertion in a thread would go unseen
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not errors
    for results in gathered:
        assert len(results) == 12
        for n, result in enumerate(results):
            assert torch.allclose(result, expected if n % 3 == 0 else native, atol=1e-5 * world.scale)


def test_dropout_in_train_mode_is_refused_before_the_first_forward() -> None:
    world = World(HF_CLIP)
    world.vit.sites()
    for attention in (m for m in world.module.modules() if hasattr(m, "out_proj")):
        attention.dropout = 0.25
    world.module.train()
    world.module.register_forward_pre_hook(failing(AssertionError, 0))
    with pytest.raises(
        ExecutionError, match=r"is in train mode and would drop activations at random \(at vision_model"
    ):
        world.execute(EVERYWHERE)
    assert world.module.training


def test_train_mode_without_dropout_is_kept() -> None:
    world = World(TIMM_PLAIN)
    expected = world.execute(EVERYWHERE).logits
    world.module.train()
    world.module.blocks[1].eval()
    flags = [module.training for module in world.module.modules()]
    assert world.execute(EVERYWHERE).logits.equal(expected)
    assert [module.training for module in world.module.modules()] == flags
