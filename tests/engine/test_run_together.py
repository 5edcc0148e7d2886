"""Trainings of several subspaces, on different data, in one growing batch: gradients as if each were alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.world import World
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, HF_VIT, TIMM_PLAIN, TIMM_REGISTERS, Tiny
from vit_mechinterp import Run
from vit_mechinterp.engine import ActivationStore, Batch, prepare, run_together
from vit_mechinterp.engine.forwards import stacking, wave
from vit_mechinterp.engine.training import rows
from vit_mechinterp.errors import SpecError

LAYERS = 3


def training(layer: int, name: str, site: str = "resid_post", **fields: Any) -> Run:
    """A run that exchanges a subspace of its own."""
    swap = {
        "op": "inject_subspace", "site": f"blocks.{layer}.{site}", "tokens": {"column": "here"}, "source": "source",
        "source_tokens": {"column": "there"}, "basis": f"R_{layer}_{name}", "gate": f"g_{layer}_{name}", **fields,
    }  # fmt: skip
    return Run.model_validate({"name": f"{layer}_{name}", "interventions": [swap]})


def leaves(runs: Sequence[Run], d: int, seed: int = 0, by_token: tuple[int, ...] = ()) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for run in runs:
        tensors[f"R_{run.name}"] = torch.linalg.qr(torch.randn(*by_token, d, d, generator=draw)).Q
        tensors[f"g_{run.name}"] = torch.rand(*by_token, d, generator=draw)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def separate(world: World, run: Run, tensors: Mapping[str, Tensor], examples: Sequence[int], order: Sequence[int]) -> Tensor:
    """One training alone: a whole forward with a hook, every block under autograd."""
    swap: Any = run.interventions[0]
    rows = torch.arange(len(world.columns["base"]))[:, None]
    prefix = len(world.tiny.prefix)
    here = prefix + world.columns["here"]
    there = prefix + world.columns["there"][:, list(order)]
    source = world.oracle.clean("source")[1][swap.site]
    R, g = (tensors[str(ref.name)].to(source.dtype) for ref in (swap.basis, swap.gate))

    def touch(name: str, h: Tensor) -> Tensor:
        if name != swap.site:
            return h
        own, given = h[rows, here], source[rows, there]
        if R.ndim == 2:
            return h.index_put((rows, here), own + ((given @ R - own @ R) * g) @ R.T)
        new = [own[:, k] + ((given[:, k] @ R[k] - own[:, k] @ R[k]) * g[k]) @ R[k].T for k in range(own.shape[1])]
        return h.index_put((rows, here), torch.stack(new, dim=1))

    return by_hand(world.module, world.columns["base"], touch)[list(examples)]


class Passes:
    """Rows that pass through every block's first norm, forward and backward."""

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for path, m in module.named_modules() if path.endswith(("norm1", "layernorm_before"))]
        self.forward, self.backward = [0] * len(self.norms), [0] * len(self.norms)

    def __enter__(self) -> Passes:
        def hook(layer: int) -> Any:
            def seen(module: nn.Module, args: object, output: Tensor) -> None:
                self.forward[layer] += len(output)
                if output.requires_grad:
                    output.register_hook(returned)

            def returned(gradient: Tensor) -> None:
                self.backward[layer] += len(gradient)

            return seen

        self.handles = [norm.register_forward_hook(hook(n)) for n, norm in enumerate(self.norms)]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()


def gradients(loss: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
    return {name: x for name, x in zip(tensors, found, strict=True) if x is not None}


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        scale = float(gradient.abs().max())
        assert scale > 1e-4, name
        assert float((found[name] - gradient).abs().max()) <= tolerance * scale, name


def loss_of(outputs: Tensor) -> Tensor:
    weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(3))
    return (outputs * weights).sum()


PLACES = (("resid_post", 0), ("resid_post", 1), ("resid_mid", 1), ("attn_out", 1), ("mlp_out", 0))


@pytest.mark.parametrize("by_token", [(), (3,)], ids=["tied", "by token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_DINOV2, HF_VIT], ids=lambda tiny: tiny.name)
def test_every_trainings_gradient_is_that_of_the_training_alone(
    tiny: Tiny, dtype: torch.dtype, by_token: tuple[int, ...]
) -> None:
    shape, color = World(tiny, 5, dtype), World(tiny, 4, dtype, seed=7)
    for world in (shape, color):
        world.columns |= {name: world.columns[name].to(dtype) for name in ("base", "source")}
    runs = {name: [training(n, f"{name}_{site}", site) for site, n in PLACES] for name in ("shape", "color", "other")}
    tensors = leaves([run for own in runs.values() for run in own], shape.module_width, by_token=by_token)
    # Two trainings on the same data (another seed: other examples, another order), one on data of its own.
    asked = [("shape", shape, [4, 0, 2], [1, 0, 2]), ("other", shape, [1, 2], [2, 1, 0]), ("color", color, [3, 0, 1], [0, 2, 1])]
    with (
        prepare(shape.vit, runs["shape"] + runs["other"], shape.columns, tensors, progress=False) as first,
        prepare(shape.vit, runs["color"], color.columns, tensors, progress=False) as second,
    ):
        batches = [
            Batch(second if name == "color" else first, examples, [run.name for run in runs[name]], order)
            for name, _, examples, order in asked
        ]
        outputs = run_together(batches, tensors)
        found = gradients(torch.stack([loss_of(x) for own in outputs for x in own]).sum(), tensors)
        parts = [part for batch in batches for part in batch.cut(2)]
        assert max(part.rows for part in parts) == 2
        assert sum(part.rows for part in parts) == sum(batch.rows for batch in batches)
        apart = torch.cat([run_together([part], tensors)[0][0] for part in parts])
    scale = float(apart.detach().abs().max())
    torch.testing.assert_close(apart, torch.cat([own.flatten(0, 1) for own in outputs]), rtol=0, atol=1e-5 * scale)
    wanted: dict[str, Tensor] = {}
    for (name, world, examples, order), own in zip(asked, outputs, strict=True):
        for run, output in zip(runs[name], own, strict=True):
            alone = separate(world, run, tensors, examples, order)
            assert output.dtype == dtype
            torch.testing.assert_close(output, alone, rtol=0, atol=1e-5 * scale)
            wanted |= gradients(loss_of(alone), tensors)
    same(found, wanted, 1e-5 if dtype == torch.float64 else 1e-4)


def test_no_block_before_an_intervention_runs_forward_or_backward(tmp_path: Any) -> None:
    world, other = World(TIMM_PLAIN, 6), World(TIMM_PLAIN, 4, seed=9)
    seeds = ("first", "second")
    runs = [training(n, seed) for n in range(LAYERS) for seed in seeds]
    tensors = leaves(runs, world.module_width)
    world.vit.sites()
    store = ActivationStore(tmp_path)
    with (
        Passes(world.module) as passes,
        prepare(world.vit, runs, world.columns, tensors, progress=False, store=store) as prepared,
        prepare(world.vit, runs, other.columns, tensors, progress=False) as second,
    ):
        # Base and source of both data once: clean values are shared by all layers and seeds.
        assert passes.forward == [2 * 6 + 2 * 4] * LAYERS
        assert prepared.clean_evaluations + second.clean_evaluations == 20 * LAYERS
        passes.forward[:] = [0] * LAYERS
        for step in range(2):
            batches = [
                Batch(each, [step, 3], [f"{n}_{seed}" for n in range(LAYERS)])
                for seed, each in zip(seeds, (prepared, second), strict=True)
            ]
            torch.stack([loss_of(own) for own in run_together(batches, tensors)]).sum().backward()
        # Two steps of two trainings of two examples at each layer; what joins behind block l starts at block l + 1.
        assert passes.forward == passes.backward == [0, 8, 16]
        with prepare(world.vit, runs, world.columns, tensors, progress=False, store=store) as again:
            assert again.clean_evaluations == 0
            found = again([1, 4], tensors)
        torch.testing.assert_close(found, prepared([1, 4], tensors))
    assert passes.forward[0] == 0
    assert all(tensors[f"R_0_{seed}"].grad.abs().max() > 1e-3 for seed in seeds)


def test_subspaces_at_one_site_are_injected_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(TIMM_PLAIN, 5)
    runs = [training(n, str(seed)) for n in range(2) for seed in range(3)]
    wide, heads = training(1, "wide"), training(1, "heads", "attn.z")
    twice = runs[0].model_copy(update={"name": "twice", "interventions": (*runs[0].interventions, *wide.interventions)})
    tensors = leaves([*runs, wide], world.module_width)
    tensors["R_1_wide"] = tensors["R_1_wide"][:, :4].detach().requires_grad_()
    tensors["g_1_wide"] = tensors["g_1_wide"][:4].detach().requires_grad_()
    tensors |= leaves([heads], world.shape("blocks.1.attn.z")[-1])
    every = [*runs, wide, heads, twice]
    sizes: list[int] = []

    def counting(value: Tensor, group: Sequence[stacking.Placed]) -> None:
        sizes.append(len(group))
        stacking.edit_stack(value, group)

    with prepare(world.vit, every, world.columns, tensors, progress=False) as prepared:
        monkeypatch.setattr(wave, "edit_stack", counting)
        outputs = prepared([0, 3, 4], tensors, [2, 0, 1])
        # Three seeds and the run of two edits in block 0; three seeds, and two bases of fewer columns, in block 1.
        assert sorted(sizes) == [2, 3, 4]
        monkeypatch.setattr(wave, "stacked", lambda edits, value: [[own] for own in edits])
        alone = prepared([0, 3, 4], tensors, [2, 0, 1])
        assert len(sizes) == 3
    torch.testing.assert_close(outputs, alone, rtol=0, atol=1e-5 * world.scale)
    same(gradients(loss_of(outputs), tensors), gradients(loss_of(alone), tensors), 1e-4)


def test_examples_of_unequal_numbers_of_tokens_stay_apart() -> None:
    world = World(TIMM_PLAIN, 3)
    columns = {**world.columns, "here": [[0, 1], [2], [6, 7]], "there": [[3, 4], [5], [8, 9]]}
    runs = [training(0, str(seed)) for seed in range(2)]
    tensors = leaves(runs, world.module_width)
    names = [run.name for run in runs]
    with prepare(world.vit, runs, columns, tensors, progress=False) as prepared:
        mixed = run_together([Batch(prepared, [0], names[:1]), Batch(prepared, [1, 2], names[1:])], tensors)
        every = prepared([0, 1, 2], tensors)
    torch.testing.assert_close(mixed[0][0], every[0, :1], rtol=0, atol=1e-5 * world.scale)
    torch.testing.assert_close(mixed[1][0], every[1, 1:], rtol=0, atol=1e-5 * world.scale)
    assert float((every[0, 0] - every[1, 0]).detach().abs().max()) > 1e-3


def test_what_cannot_run_together_is_refused() -> None:
    world, other = World(TIMM_PLAIN, 3), World(TIMM_PLAIN, 3)
    runs = [training(0, "a"), training(1, "b")]
    tensors = leaves(runs, world.module_width)
    with (
        prepare(world.vit, runs, world.columns, tensors, progress=False) as prepared,
        prepare(other.vit, runs, other.columns, tensors, progress=False) as second,
    ):
        assert run_together([], tensors) == []
        with pytest.raises(SpecError, match=r"No run '0_b' was prepared\. Close matches: .* Prepared: 0_a, 1_b\."):
            run_together([Batch(prepared, [0], ["0_b"])], tensors)
        with pytest.raises(SpecError, match="A batch names at least one run"):
            run_together([Batch(prepared, [0], [])], tensors)
        with pytest.raises(SpecError, match="must name at least one of the 3 examples, 0 to 2"):
            run_together([Batch(prepared, [3])], tensors)
        with pytest.raises(SpecError, match="give each of 0 to 2 once"):
            run_together([Batch(prepared, [0], source_order=[0, 1])], tensors)
        with pytest.raises(SpecError, match=r"source_order=\[0\.0, 1\.0, 2\.0\] is no order"):
            run_together([Batch(prepared, [0], source_order=[0.0, 1.0, 2.0])], tensors)  # type: ignore[list-item]
        drawn = (Batch(prepared, [n]) for n in (0, 2))
        assert [len(own[0]) for own in run_together(drawn, tensors)] == [1, 1]
        with pytest.raises(SpecError, match="are of one model; these were prepared on several"):
            run_together([Batch(prepared, [0]), Batch(second, [0])], tensors)


def test_memory_that_runs_out_halves_the_rows_where_no_gradients_are_wanted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world = World(TIMM_PLAIN, 5)
    runs = [training(0, "a"), training(1, "b")]
    tensors = leaves(runs, world.module_width)

    def narrow(vit: Any, segments: Any, *args: Any, **kwargs: Any) -> Any:
        if sum(len(segment.examples) for segment in segments) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return wave.run_wave(vit, segments, *args, **kwargs)

    with prepare(world.vit, runs, world.columns, tensors, progress=False) as prepared, torch.no_grad():
        wanted = prepared(range(5), tensors)
        monkeypatch.setattr(rows, "run_wave", narrow)
        with caplog.at_level(logging.WARNING):
            found = prepared(range(5), tensors)
        assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * world.scale)
        assert float((wanted[0] - wanted[1]).abs().max()) > 1e-3
        with torch.enable_grad(), pytest.raises(torch.OutOfMemoryError):  # what is held for backward is the caller's
            prepared(range(5), tensors)
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory at 10 rows per forward: going on with 5.",
        "Out of memory at 5 rows per forward: going on with 2.",
    ]
