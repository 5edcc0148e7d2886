"""Gradients through interventions, from clean values that are computed once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vit_mechinterp as vmi
from tests.engine.world import Counted, World, world_of
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, TIMM_PLAIN, TIMM_REGISTERS, Tiny
from vit_mechinterp import Run
from vit_mechinterp.engine import prepare
from vit_mechinterp.engine.training.batch import Batch
from vit_mechinterp.errors import ExecutionError, SpecError

Document = dict[str, Any]
Formula = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]

FORMULAS: dict[str, tuple[Document, Formula]] = {
    "subspace": (
        {"op": "inject_subspace", "basis": "R", "gate": "g", "source": "source"},
        lambda h, source, t: h + (t["g"] * (source @ t["R"] - h @ t["R"])) @ t["R"].T,
    ),
    "vectors": (
        {"op": "inject_subspace", "basis": "R", "vectors": "c"},
        lambda h, source, t: h + (t["c"] - h @ t["R"]) @ t["R"].T,
    ),
    "direction": (
        {"op": "add_direction", "vector": "v", "alpha": 0.7},
        lambda h, source, t: h + 0.7 * t["v"],
    ),
}
SITES = ("embed", "blocks.0.mlp_out", "blocks.1.resid_pre", "blocks.1.attn.q", "blocks.1.attn.pattern", "blocks.1.attn.z",
         "blocks.1.attn.result", "blocks.1.resid_mid", "blocks.1.mlp.post", "blocks.1.resid_post", "blocks.2.mlp_out",
         "pooled", "logits")  # fmt: skip


def leaves(d: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(d)
    rank = min(3, d)
    tensors = {
        "R": torch.linalg.qr(torch.randn(d, rank, generator=draw)).Q,
        "g": torch.rand(rank, generator=draw),
        "c": torch.randn(rank, generator=draw),
        "v": torch.randn(d, generator=draw),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def gradients(outputs: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3))
    found = torch.autograd.grad((outputs * weights).sum(), list(tensors.values()), allow_unused=True)
    return {name: grad for name, grad in zip(tensors, found, strict=True) if grad is not None}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_gradients_are_those_of_a_whole_forward(tiny: Tiny, formula: str) -> None:
    world = world_of(tiny, 4)
    fields, edit = FORMULAS[formula]
    positions = [0, len(tiny.prefix) + 2, len(tiny.prefix) + 5]
    for site in SITES:
        local = site.split(".", 2)[-1]
        pairs = {} if local in ("pooled", "logits") else {"tokens": ["cls", 2, 5]}
        run = Run.model_validate({"name": "r", "interventions": [{"site": site, **pairs, **fields}]})
        tensors = leaves(world.shape(site)[-1])
        examples = [2, 0, 3]
        with prepare(world.vit, run, world.columns, tensors, progress=False) as prepared:
            outputs = prepared(examples, tensors)
        found = gradients(outputs[0], tensors)

        def touch(
            name: str, h: Tensor, site: str = site, local: str = local, tensors: Any = tensors
        ) -> Tensor:
            if name != site:
                return h
            source = world.oracle.clean("source")[1][site]
            if local in ("pooled", "logits"):
                return edit(h, source, tensors)
            if local == "attn.pattern":
                h, source = h.transpose(1, 2), source.transpose(1, 2)
            h = h.index_copy(1, torch.tensor(positions), edit(h[:, positions], source[:, positions], tensors))
            return h.transpose(1, 2) if local == "attn.pattern" else h

        expected = by_hand(world.module, world.columns["base"], touch)[examples]
        assert torch.allclose(outputs[0], expected, atol=1e-5 * world.scale), site
        wanted = gradients(expected, tensors)
        assert set(found) == set(wanted) == {name for name in tensors if name in fields.values()}
        for name, gradient in wanted.items():
            size = float(gradient.abs().max())
            assert size > 1e-3, (site, name)
            assert float((found[name] - gradient).abs().max()) <= 1e-4 * size, (site, name)


def das(site: str = "blocks.1.resid_post", **fields: Any) -> Document:
    tokens = {"tokens": {"column": "here"}, "source_tokens": {"column": "there"}}
    return {
        "op": "inject_subspace",
        "site": site,
        "basis": "R",
        "gate": "g",
        "source": "source",
        **tokens,
        **fields,
    }


def test_clean_blocks_run_once() -> None:
    world = World(TIMM_PLAIN, 6)
    world.vit.sites()
    runs = [
        Run.model_validate({"name": f"{n}", "interventions": [das(f"blocks.{n}.resid_post")]})
        for n in range(2)
    ]
    tensors = leaves(24)
    with Counted(world.module) as counted:
        with prepare(world.vit, runs, world.columns, tensors, batch_size=4, progress=False) as prepared:
            assert counted.rows == [12, 12, 0]  # base and source, up to the last block that is read
            assert prepared.clean_evaluations == 24
            for step in range(3):
                prepared([step, 5], tensors).sum().backward()
        # Each step: two rows of the first run from block 1 on, two of the second from block 2 on.
        assert counted.rows == [12, 12 + 3 * 2, 3 * 4]
    assert 0 < prepared.nbytes < 10**6
    assert tensors["R"].grad is not None


def test_parameters_need_no_gradient_meanwhile_and_what_they_needed_afterwards() -> None:
    world = World(TIMM_PLAIN, 4)
    parameters = list(world.module.parameters())
    for parameter in parameters[::3]:
        parameter.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in parameters]
    tensors = leaves(24)
    run = Run.model_validate({"name": "a", "interventions": [das()]})
    with prepare(world.vit, run, world.columns, tensors, progress=False) as prepared:
        assert not any(parameter.requires_grad for parameter in parameters)
        prepared([0, 1], tensors).sum().backward()
    assert [parameter.requires_grad for parameter in parameters] == flags
    assert all(parameter.grad is None for parameter in parameters)
    with pytest.raises(ZeroDivisionError), prepare(world.vit, run, world.columns, tensors, progress=False):
        raise ZeroDivisionError
    assert [parameter.requires_grad for parameter in parameters] == flags


def test_outputs_are_those_of_execute_for_any_examples_in_any_order() -> None:
    world = world_of(TIMM_PLAIN, 5)
    d = world.module_width
    documents: list[Document] = [
        {"name": "das", "interventions": [das()]},
        {"name": "clean"},
        {"name": "ragged", "interventions": [das("blocks.0.mlp_out", tokens={"box": "box"}, source_tokens=None)]},
        {"name": "mean", "interventions": [{"op": "ablate", "site": "blocks.1.attn.z", "method": "mean"}]},
        {"name": "resample", "interventions": [{"op": "ablate", "site": "blocks.1.ln2", "method": "resample", "seed": 2}]},
        {"name": "chosen", "interventions": [
            {"op": "add_direction", "site": "blocks.2.resid_pre", "vector": "many", "choose": {"column": "kind"}}]},
    ]  # fmt: skip
    runs = [Run.model_validate(document) for document in documents]
    tensors = {**{name: x.detach() for name, x in leaves(d).items()}, "many": torch.randn(4, d)}
    expected = vmi.execute(world.vit, runs, world.columns, tensors, progress=False).logits
    with (
        torch.no_grad(),
        prepare(world.vit, runs, world.columns, tensors, batch_size=2, progress=False) as prepared,
    ):
        assert prepared.run_names == tuple(run.name for run in runs)
        assert prepared.n_examples == 5
        for examples in ([0, 1, 2, 3, 4], [4], [3, 1], [2, 2, 0], torch.tensor([1, 4]).tolist()):
            outputs = prepared(examples, tensors)
            assert not outputs.requires_grad
            assert torch.allclose(outputs, expected[:, examples], atol=1e-5 * world.scale), examples


def test_the_source_order_repairs_tokens() -> None:
    world = world_of(TIMM_PLAIN, 4)
    tensors = {name: x.detach() for name, x in leaves(24).items()}
    columns = {**world.columns, "permuted": world.columns["there"][:, [2, 0, 1]]}
    runs = [
        Run.model_validate({"name": name, "interventions": [das(source_tokens={"column": name})]})
        for name in ("there", "permuted")
    ]
    with prepare(world.vit, runs, columns, tensors, progress=False) as prepared:
        plain = prepared([0, 1, 3], tensors)
        reordered = prepared([0, 1, 3], tensors, source_order=[2, 0, 1])
        with pytest.raises(SpecError, match="is no order of the sources' tokens: give each of 0 to 2 once"):
            prepared([0], tensors, source_order=[0, 0, 1])
    assert torch.allclose(reordered[0], plain[1], atol=1e-6)
    assert float((plain[0] - plain[1]).abs().max()) > 1e-2


def test_what_cannot_be_prepared_is_refused() -> None:
    world = World(TIMM_PLAIN, 4)
    swap = {"op": "interchange", "site": "blocks.2.resid_post", "source": {"run": "sender"}}
    runs = [
        Run.model_validate({"name": "sender", "interventions": [das()]}),
        Run.model_validate({"name": "receiver", "interventions": [swap]}),
    ]
    tensors = leaves(24)
    with (
        pytest.raises(SpecError, match="reads another edited run cannot be prepared"),
        prepare(world.vit, runs, world.columns, tensors, progress=False),
    ):
        pass
    with (
        pytest.raises(SpecError, match="not orthonormal"),
        prepare(world.vit, runs[:1], world.columns, {**tensors, "R": torch.ones(24, 2)}, progress=False),
    ):
        pass
    world.module.set_grad_checkpointing(True)
    with (
        pytest.raises(
            ExecutionError, match=r"uses gradient checkpointing: its blocks run again.* Switch it off"
        ),
        prepare(world.vit, runs[:1], world.columns, tensors, progress=False),
    ):
        pass
    world.module.set_grad_checkpointing(False)
    with prepare(world.vit, runs[:1], world.columns, tensors, progress=False) as prepared:
        for examples in ([], [4], [-1]):
            with pytest.raises(
                SpecError, match=r"examples=.* must name at least one of the 4 examples, 0 to 3"
            ):
                prepared(examples, tensors)
        with pytest.raises(SpecError, match=r"examples=\[0.5\] are no numbers of examples, 0 to 3"):
            prepared([0.5], tensors)  # type: ignore[list-item]
        with pytest.raises(SpecError, match=r"Tensor 'R' has shape \(23, 4\); it was prepared with \(24, \d\)"):
            prepared([0], {**tensors, "R": torch.ones(23, 4)})
        for mask in ([True, False], torch.tensor([True, False])):
            with pytest.raises(SpecError, match=r"examples are a mask; name them by their numbers, 0 to 3"):
                prepared(mask, tensors)
        for wrong in (3, "ab"):
            with pytest.raises(SpecError, match=r"examples=.* is no list of numbers of examples, 0 to 3"):
                prepared(wrong, tensors)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match="source_order=3 is no order of the sources' tokens"):
            prepared([0], tensors, source_order=3)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match=r"is one name; a batch names its runs in a list: \['sender'\]"):
            Batch(prepared, [0], "sender").checked()
    outside: Any = prepare(world.vit, runs[:1], world.columns, tensors, progress=False)
    with pytest.raises(AttributeError, match=r"write 'with prepare\(...\) as prepared:'; prepared.run_names is there inside"):
        outside.run_names  # noqa: B018
    with pytest.raises(SpecError, match=r"write 'with prepare\(...\) as prepared:', and call prepared\(...\) inside"):
        outside([0], tensors)
    with pytest.raises(SpecError, match=r"preparation is over.* inside the block"):
        prepared([0], tensors)
    for size in (0, "auto", True):
        with (
            pytest.raises(SpecError, match=r"batch_size is a positive integer, got"),
            prepare(world.vit, runs[:1], world.columns, tensors, batch_size=size, progress=False),  # type: ignore[arg-type]
        ):
            pass


def test_what_a_store_loses_meanwhile_is_computed_anew(tmp_path: Path) -> None:
    """Another process may make room in the folder, or a file may be damaged, between two steps of a training."""
    world = world_of(TIMM_REGISTERS, 4)
    runs = [
        Run.model_validate(
            {"name": site, "interventions": [{"site": site, "tokens": ["cls", 2], **FORMULAS["subspace"][0]}]}
        )
        for site in ("embed", "blocks.0.mlp_out", "blocks.1.attn_out", "blocks.1.resid_post")
    ]
    tensors = leaves(world.module_width)
    store, least = vmi.ActivationStore(tmp_path, host=0), world.one_row(runs, tensors)
    with prepare(world.vit, runs, world.columns, tensors, progress=False, store=store, memory=least) as prepared:
        before = prepared([3, 0], tensors)
        lost = list(tmp_path.rglob("*.safetensors"))
        for file in lost:
            file.unlink()
        after = prepared([3, 0], tensors)
    assert len(lost) >= 5
    assert torch.equal(before, after)
    own = {name: tensors[name] for name in ("R", "g")}
    again = gradients(after, own)
    for name, gradient in gradients(before, own).items():
        assert torch.equal(again[name], gradient)
        assert float(gradient.abs().max()) > 1e-3


@pytest.mark.parametrize("given", [False, True], ids=["temporary", "store"])
def test_clean_values_beyond_the_budget_are_read_batch_by_batch(tmp_path: Path, given: bool) -> None:
    """The same gradients, nothing held, nothing computed again, and no folder left behind."""
    world = world_of(TIMM_REGISTERS, 8)
    runs = [
        Run.model_validate(
            {"name": site, "interventions": [{"site": site, "tokens": ["cls", 2], **FORMULAS["subspace"][0]}]}
        )
        for site in ("embed", "blocks.1.resid_post", "blocks.1.mlp_out")
    ]
    runs.append(Run(name="mean", interventions=[vmi.Ablate(site="blocks.1.attn.z", method="mean")]))
    runs.append(Run(name="clean"))
    tensors = leaves(world.shape("embed")[-1])
    found, held = [], []
    for memory in ("1GiB", world.one_row(runs, tensors)):
        folder = tmp_path / str(memory)
        store = vmi.ActivationStore(folder, host=4096) if given else None
        with prepare(
            world.vit, runs, world.columns, tensors, batch_size=3, progress=False, store=store, memory=memory
        ) as prepared:
            with Counted(world.module) as count:
                outputs = [prepared(examples, tensors) for examples in ([7, 0, 3], [3, 5], [1, 2, 4, 6])]
            assert count.total <= 9 * (3 + 1 + 1 + 2)  # suffixes alone: no image passes through again
            grads = gradients(torch.cat([out.flatten() for out in outputs]), {k: tensors[k] for k in ("R", "g")})
            found.append([*outputs, *grads.values()])
            held.append(prepared.nbytes)
    for whole, read in zip(*found, strict=True):
        assert float((whole - read).detach().abs().max()) < 1e-5 * float(whole.detach().abs().max())
    assert held[0] > 4096
    assert held[1] == 0
    assert float(found[0][-1].abs().max()) > 1e-3


def room_for_two(module: Any, args: tuple[Tensor, ...]) -> None:
    if len(args[0]) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("stored", [False, True])
def test_memory_that_runs_out_halves_the_images(stored: bool, caplog: pytest.LogCaptureFixture) -> None:
    world = World(TIMM_PLAIN, 4)
    runs = [Run(name="swap", interventions=[vmi.Interchange(site="blocks.1.mlp_out", tokens=["cls"], source="source")])]
    with prepare(world.vit, runs, world.columns, {}, progress=False) as prepared:
        wanted = prepared(range(4), {})
    clean = world.oracle.clean("base")[0]
    assert float((wanted[0] - clean).abs().max()) > 1e-3
    handle = world.module.register_forward_pre_hook(room_for_two)
    try:
        with caplog.at_level(logging.WARNING):
            store = vmi.ActivationStore() if stored else None
            with prepare(world.vit, runs, world.columns, {}, batch_size=64, progress=False, store=store) as prepared:
                handle.remove()
                found = prepared(range(4), {})
    finally:
        handle.remove()
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory at 8 rows per forward: going on with 4.",
        "Out of memory at 4 rows per forward: going on with 2.",
    ]
    assert torch.allclose(found, wanted, atol=1e-5 * world.scale)


def test_a_backend_whose_memory_runs_out_takes_half_the_images(caplog: pytest.LogCaptureFixture) -> None:
    world = World(TIMM_PLAIN, 4)
    document = {"name": "swap", "interventions": [{"op": "interchange", "site": "blocks.1.mlp_out", "source": "source"}]}
    handle = world.module.register_forward_pre_hook(room_for_two)
    try:
        with caplog.at_level(logging.WARNING):
            results = world.execute([document], backend="hooks", batch_size=64)
    finally:
        handle.remove()
    assert [record.getMessage() for record in caplog.records] == ["Out of memory at 4 rows per forward: going on with 2."]
    world.check([document], results)


def test_captures_of_prepared_runs_are_refused() -> None:
    world = World(TIMM_PLAIN, 3)
    seen = Run(name="seen", interventions=[vmi.Interchange(site="blocks.0.resid_post", source="source")], capture=["pooled"])
    message = (
        "Prepared runs give outputs and keep no captures, which are asked for of seen. Leave capture out, or use "
        "execute for them."
    )
    with pytest.raises(SpecError) as refused:
        prepare(world.vit, [seen], world.columns, {}).__enter__()
    assert str(refused.value) == message


def test_another_thread_is_refused_and_does_not_wait() -> None:
    world = World(TIMM_PLAIN, 3)
    runs = [Run(name="swap", interventions=[vmi.Interchange(site="blocks.1.mlp_out", source="source")])]
    said: list[str] = []

    def other() -> None:
        try:
            prepared([0], {})
        except ExecutionError as error:
            said.append(str(error))

    with prepare(world.vit, runs, world.columns, {}, progress=False) as prepared:
        thread = threading.Thread(target=other, name="other", daemon=True)
        thread.start()
        thread.join(timeout=20)
        assert not thread.is_alive()
        assert prepared([0], {}).shape[:2] == (1, 1)
    assert said == [
        "This preparation holds the model for the thread that entered its 'with prepare(...)' block, 'MainThread', "
        "and is called in 'other'. Call it in the former, or write the block in the latter."
    ]
