"""What a run keeps: values after its edits, whole or in part, in the model's dtype, whatever the batch size."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import vit_mechinterp as vmi
from tests.engine.world import World, world_of
from tests.tiny_models import HF_VIT, MAIN, TIMM_PLAIN, TIMM_REGISTERS, Tiny
from vit_mechinterp.engine.forwards import chunk
from vit_mechinterp.engine.scheduling import drafting
from vit_mechinterp.errors import ExecutionError, SpecError
from vit_mechinterp.model.output_tokens import output_tokens

Document = dict[str, Any]


def swap(site: str, **fields: Any) -> Document:
    return {"op": "interchange", "site": site, "source": "source", "tokens": ["cls", 2, 5], **fields}


def run(name: str, *edits: Document, **fields: Any) -> Document:
    return {"name": name, "interventions": list(edits), **fields}


@pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)
def test_every_site_is_kept_as_it_is_after_the_edits(tiny: Tiny) -> None:
    world = world_of(tiny)
    everything = {"capture": ["*"]}
    runs = [run(site, swap(site, **({"tokens": "all"} if site in ("pooled", "logits") else {})), **everything)
            for site in world.sites[::3]]  # fmt: skip
    runs += [
        run(
            "mlp twice",
            swap("blocks.1.mlp_out"),
            {"op": "ablate", "site": "blocks.1.mlp_out", "tokens": [2]},
            **everything,
        )
    ]
    runs += [
        {"name": "clean", **everything},
        run("on source", swap("blocks.1.attn.z", source="base"), base="source", **everything),
    ]
    results = world.execute(runs, batch_size=11)
    world.check(runs, results)
    assert list(results.captures["clean"]) == world.sites


@pytest.mark.parametrize("batch_size", [64, 3])
def test_captures_in_part(batch_size: int) -> None:
    world = world_of(TIMM_REGISTERS, 5)
    picked: dict[str, tuple[Any, list[int] | None]] = {
        "embed": (["cls", 3], None),
        "blocks.0.resid_post": ({"box": "box"}, None),
        "blocks.1.mlp_out": ({"column": "here"}, None),
        "blocks.1.attn.z": ([7, "cls"], [2, 0]),
        "blocks.1.attn.pattern": ({"column": "there"}, [1]),
        "blocks.2.attn.scores": ({"box": "box"}, [2, 1]),
        "blocks.2.attn.result": ({"box": "box"}, [1]),
        "blocks.2.attn.k": ("all", [1, 2]),
        "blocks.0.attn.pattern": ("all", [0]),
        "ln_final": ("registers", None),
    }
    capture = [{"site": site, "tokens": tokens, "heads": heads} for site, (tokens, heads) in picked.items()]
    edits = {"clean": [], "early": [swap("embed")], "mlp": [swap("blocks.1.mlp_out", tokens="all")]}
    runs = [run(name, *own, capture=capture) for name, own in edits.items()]
    results = world.execute(runs, batch_size=batch_size)
    for document in runs:
        values = world.oracle.run(document)[1]
        for site, (tokens, heads) in picked.items():
            captured = results.captures[document["name"]][site]
            matrix = site.endswith(("scores", "pattern"))
            for i in range(world.n):
                value = values[site][i].transpose(0, 1) if matrix else values[site][i]
                value = value[world.oracle.positions(tokens, i)]
                value = value if heads is None else value[:, heads]
                expected = value.transpose(0, 1) if matrix else value
                assert captured[i].shape == expected.shape, site
                assert torch.allclose(captured[i], expected, atol=2e-5 * float(values[site].abs().max())), (
                    site
                )
            ragged = tokens == {"box": "box"}
            assert isinstance(captured, list if ragged else Tensor), site


def test_one_capture_per_site() -> None:
    world = world_of(TIMM_PLAIN)
    capture = ["blocks.0.resid_post", {"site": "blocks.*.resid_post", "tokens": ["cls"]}]
    with pytest.raises(SpecError, match=r"run 'a' captures blocks\.0\.resid_post more than once"):
        world.execute([run("a", capture=capture)])


def test_missing_captures_are_named() -> None:
    results = world_of(TIMM_PLAIN).execute([run("a", capture=["embed", "blocks.1.attn.q"])])
    with pytest.raises(
        KeyError, match=r"Run 'a': blocks\.1\.attn\.k was not captured\. Close matches: blocks\.1\.attn\.q\."
    ):
        results.captures["a"]["blocks.1.attn.k"]
    with pytest.raises(KeyError, match="There is no run 'b'"):
        results["b"]


@pytest.mark.parametrize("tiny", [TIMM_REGISTERS, HF_VIT], ids=lambda tiny: tiny.name)
def test_half_precision_models_keep_their_dtype(tiny: Tiny) -> None:
    world = World(tiny, 4, dtype=torch.bfloat16)
    sites = [site for site in world.sites if site.startswith("blocks.1")]
    d = world.module_width
    runs = [run(site, swap(site), capture=["*"]) for site in sites]
    runs += [
        run("mean", {"op": "ablate", "site": "blocks.1.attn.z", "method": "mean"}, capture=["*"]),
        run(
            "push",
            {"op": "add_direction", "site": "blocks.1.mlp_out", "vector": f"direction.{d}"},
            capture=["*"],
        ),
        run(
            "inject",
            {"op": "inject_subspace", "site": "embed", "basis": f"basis.{d}", "source": "source"},
            capture=["*"],
        ),
    ]
    results = world.execute(runs, batch_size=8)
    assert results.logits.dtype == torch.float32
    assert {value.dtype for own in results.captures.values() for value in own.values()} == {torch.bfloat16}
    for document in runs:
        output, values = world.oracle.run(document)
        pairs = {"output": (results[document["name"]], output)}
        pairs |= {site: (value, values[site]) for site, value in results.captures[document["name"]].items()}
        for site, (found, expected) in pairs.items():
            error = (found.float() - expected.float()).square().mean().sqrt()
            assert float(error) < 0.05 * float(expected.float().square().mean().sqrt()), (
                document["name"],
                site,
            )
    clean = world.oracle.clean("base")[0]
    assert float((results["push"] - clean).abs().amax(1).min()) > 0.1 * world.scale


def test_an_interchange_moves_bits_unchanged() -> None:
    world = World(HF_VIT, 4, dtype=torch.bfloat16)
    sites = [site for site in world.sites if site.startswith("blocks.1")]
    runs = [run(site, swap(site, tokens=["cls", 3], source_tokens=[3, 1]), capture=[site]) for site in sites]
    results = world.execute([*runs, run("source", base="source", capture=sites)])
    for site in sites:
        moved, source = (results.captures[name][site] for name in (site, "source"))
        if site.endswith(("scores", "pattern")):
            moved, source = moved.transpose(1, 2), source.transpose(1, 2)
        assert torch.equal(moved[:, [0, 4]], source[:, [4, 2]]), site
        assert not torch.equal(moved[:, 1:4], source[:, 1:4]), site


def test_float64_models_are_computed_in_float64() -> None:
    world = World(TIMM_REGISTERS, 3, dtype=torch.float64)
    runs = [run(site, swap(site), capture=["*"]) for site in world.sites[:-2]]
    results = world.execute(runs, batch_size=12)
    assert {value.dtype for own in results.captures.values() for value in own.values()} == {torch.float64}
    world.check(runs, results, tolerance=1e-6, effect=1e-4)
    for document in runs[::5]:
        values = world.oracle.run(document)[1]
        for site, captured in results.captures[document["name"]].items():
            assert float((captured - values[site]).abs().max()) <= 1e-12 * float(values[site].abs().max()), (
                site
            )


RUNS = [
    run("a", swap("blocks.0.attn.pattern"), capture=["blocks.*.attn.pattern", "blocks.2.resid_post"]),
    run("b", swap("blocks.1.mlp_out", tokens={"box": "box"}), capture=["blocks.*.mlp.post"]),
    run("c", {"op": "ablate", "site": "blocks.1.attn.z", "method": "mean"}),
    run("d", {"op": "ablate", "site": "blocks.1.attn.z", "method": "resample", "seed": 8}),
    run("e", swap("blocks.2.resid_pre", source={"run": "b"}, tokens="all")),
    run("f", capture=["embed"]),
]


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_VIT], ids=lambda tiny: tiny.name)
def test_batch_sizes_agree_and_repeats_are_identical(tiny: Tiny) -> None:
    world = world_of(tiny, 7)
    results = {size: world.execute(RUNS, batch_size=size) for size in (1, 2, 3, 5, 7, 16, 100, "auto")}
    world.check(RUNS, results[100])
    for size, result in results.items():
        again = world.execute(RUNS, batch_size=size)
        assert torch.equal(result.logits, again.logits), size
        assert float((result.logits - results[100].logits).abs().max()) <= 1e-5 * world.scale, size
        for name, own in result.captures.items():
            for site, value in own.items():
                reference = results[100].captures[name][site]
                assert torch.equal(value, again.captures[name][site]), (size, site)
                assert torch.allclose(value, reference, atol=1e-5 * float(reference.abs().max())), (
                    size,
                    site,
                )


@pytest.mark.parametrize("grad", [True, False])
def test_the_grad_mode_is_neither_used_nor_changed(grad: bool) -> None:
    world = world_of(TIMM_PLAIN)
    with torch.set_grad_enabled(grad):
        results = world.execute(RUNS)
        assert torch.is_grad_enabled() == grad
    assert not results.logits.requires_grad
    assert not any(value.requires_grad for own in results.captures.values() for value in own.values())
    assert all(parameter.grad is None for parameter in world.module.parameters())


@pytest.mark.parametrize(("fails", "halvings"), [((0,), 1), ((3,), 1), ((0, 1, 2), 3), ((5, 9), 2)])
def test_out_of_memory_halves_the_rows(
    monkeypatch: pytest.MonkeyPatch, fails: tuple[int, ...], halvings: int
) -> None:
    world = world_of(TIMM_PLAIN, 7)
    expected = world.execute(RUNS, batch_size=8)
    native = type(world.module).forward_features
    calls, read = iter(range(1000)), output_tokens(world.vit)
    monkeypatch.setattr(drafting, "output_tokens", lambda vit: read)  # finding out takes forwards of its own

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if next(calls) in fails:
            raise torch.OutOfMemoryError("CUDA out of memory, or so it says.")
        return native(self, *args, **kwargs)

    monkeypatch.setattr(type(world.module), "forward_features", forward)
    results = world.execute(RUNS, batch_size=8)
    assert results.provenance["halvings"] == halvings
    assert float((results.logits - expected.logits).abs().max()) <= 1e-5 * world.scale
    for name, own in expected.captures.items():
        for site, value in own.items():
            assert torch.allclose(value, results.captures[name][site], atol=1e-4), (name, site)


def test_out_of_memory_with_one_row_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    world = world_of(TIMM_PLAIN)
    world.vit.sites()

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory, or so it says.")

    monkeypatch.setattr(type(world.module), "forward_features", forward)
    with pytest.raises(ExecutionError, match=r"Out of memory with one row per forward: .*a smaller memory=.*half precision .*more memory\."):
        world.execute(RUNS, batch_size=8)


def test_captures_with_edits_of_one_run_do_not_leak_into_another() -> None:
    world = world_of(TIMM_PLAIN)
    zero = {"op": "ablate", "site": "blocks.1.resid_mid"}
    runs = [
        run("zero", zero, capture=["blocks.1.resid_mid"]),
        run("clean", capture=["blocks.1.resid_mid", "blocks.1.attn_out"]),
    ]
    results = world.execute(runs)
    world.check(runs, results)
    assert float(results.captures["zero"]["blocks.1.resid_mid"].abs().max()) == 0
    assert float(results.captures["clean"]["blocks.1.resid_mid"].abs().min()) > 0


def test_a_plan_bounds_what_is_held() -> None:
    world = world_of(TIMM_PLAIN, 7)
    documents = [run("a", swap("blocks.1.resid_post"))]
    runs = [vmi.Run.model_validate(document) for document in documents]
    four, all_tokens = (
        vmi.plan(
            world.vit,
            [vmi.Run.model_validate(run("a", swap("blocks.1.resid_post", tokens=tokens)))],
            world.columns,
        )
        for tokens in (["cls"], "patches")
    )
    assert 0 < four.peak_bytes < all_tokens.peak_bytes
    assert (
        vmi.plan(world.vit, runs, world.columns, batch_size=2).peak_bytes
        < vmi.plan(world.vit, runs, world.columns, batch_size=7).peak_bytes
    )


def test_out_of_memory_is_one_line_for_every_halving_of_what_ran(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """However many rows a forward might have held: clean forwards of both columns have 14."""
    world = world_of(TIMM_PLAIN, 7)
    original = chunk.run_wave

    def small(vit: Any, segments: Any, *args: Any, **options: Any) -> Any:
        if sum(len(segment.examples) for segment in segments) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory, or so it says.")
        return original(vit, segments, *args, **options)

    monkeypatch.setattr(chunk, "run_wave", small)
    swap = {"op": "interchange", "site": "blocks.1.resid_post", "source": "source", "tokens": [3]}
    with caplog.at_level(logging.WARNING):
        world.execute([{"name": "a", "interventions": [swap]}])
    assert [record.getMessage() for record in caplog.records] == [
        "Out of memory at 14 rows per forward: going on with 7.",
        "Out of memory at 7 rows per forward: going on with 3.",
    ]
