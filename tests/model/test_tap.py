"""The attention tap against attention written out, on a module that makes every kind of call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.model.raw import moved, near
from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.tap import Visit, shadowed_forward, tapped

HEADS, TOKENS, D_HEAD = 4, 6, 5


class Call(nn.Module):
    """Calls attention as it is told to; ``[batch, head, token, d_head]`` in and out."""

    def __init__(self, times: int = 1, **options: Any) -> None:
        super().__init__()
        self.options, self.times = options, times

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(self.times):
            out = F.scaled_dot_product_attention(q, k, v, **self.options)
        return out if self.times else q


def written_out(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> dict[str, Tensor]:
    """Scores, pattern and z, one head and query after another."""
    scale = options.get("scale") or 1 / math.sqrt(q.shape[-1])
    groups = q.shape[1] // k.shape[1]
    mask = options.get("attn_mask")
    scores = torch.full((*q.shape[:3], k.shape[2]), -math.inf, dtype=q.dtype)
    for head in range(q.shape[1]):
        scores[:, head] = q[:, head] @ k[:, head // groups].mT * scale
        for query in range(q.shape[2]):
            for key in range(k.shape[2]):
                at = (slice(None), head, query, key)
                if options.get("is_causal") and key > query:
                    scores[at] = -math.inf
                if mask is not None:
                    entry = mask.expand(scores.shape)[at]
                    scores[at] = (
                        torch.where(entry, scores[at], -math.inf)
                        if mask.dtype == torch.bool
                        else scores[at] + entry
                    )
    pattern = scores.exp() / scores.exp().sum(-1, keepdim=True)
    z = torch.stack([pattern[:, head] @ v[:, head // groups] for head in range(q.shape[1])], dim=1)
    return {"scores": scores, "pattern": pattern, "z": z}


def inputs(kv_heads: int = HEADS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = lambda heads: (2, heads, TOKENS, D_HEAD)  # noqa: E731
    q, k, v = (torch.randn(shape(n), generator=draw).to(dtype) for n in (HEADS, kv_heads, kv_heads))
    return q, k, v


def keeping(kept: dict[str, Tensor], *sites: str) -> dict[str, Visit]:
    def at(site: str) -> Visit:
        def visit(value: Tensor) -> Tensor:
            kept[site] = value
            return value

        return visit

    return {site: at(site) for site in sites}


BIAS = torch.randn(1, HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(3))
HOLES = torch.rand(2, 1, 1, TOKENS, generator=torch.Generator().manual_seed(4)) > 0.3
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.3},
    "bias": {"attn_mask": BIAS},
    "mask": {"attn_mask": HOLES},
    "causal": {"is_causal": True},
    "grouped": {"enable_gqa": True},
}


@pytest.mark.parametrize("name", CALLS)
def test_everything_in_the_call_is_seen(name: str) -> None:
    options = CALLS[name]
    q, k, v = inputs(2 if name == "grouped" else HEADS)
    wanted = written_out(q, k, v, **options)
    module = Call(**options)
    native = module(q, k, v)
    kept: dict[str, Tensor] = {}
    with tapped(module, keeping(kept, "q", "k", "v", "z"), "here"):
        assert torch.equal(module(q, k, v), native)
    for site, value in (("q", q), ("k", k), ("v", v), ("z", native)):
        assert torch.equal(kept[site], value.transpose(1, 2))
    with tapped(module, keeping(kept, "scores", "pattern", "z"), "here"):
        near(module(q, k, v), native)
    finite = torch.isfinite(wanted["scores"])
    assert torch.equal(torch.isfinite(kept["scores"]), finite)
    near(kept["scores"][finite], wanted["scores"][finite])
    near(kept["pattern"], wanted["pattern"])
    near(kept["z"], wanted["z"].transpose(1, 2))
    assert torch.equal(module(q, k, v), native)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("site", ["q", "k", "v", "scores", "pattern", "z"])
def test_edits_go_on_from_where_they_are(name: str, site: str) -> None:
    options = CALLS[name]
    q, k, v = inputs(2 if name == "grouped" else HEADS)
    module = Call(**options)
    edit = lambda value: value * 1.7  # noqa: E731
    with tapped(module, {site: edit}, "here"):
        found = module(q, k, v)
    groups = HEADS // k.shape[1]
    parts = {"q": q, "k": k, "v": v}
    if site in parts:
        parts[site] = edit(parts[site])
        wanted = written_out(parts["q"], parts["k"], parts["v"], **options)["z"]
    else:
        middle = written_out(q, k, v, **options)
        spread = v.repeat_interleave(groups, dim=1)
        pattern = edit(middle["scores"]).softmax(-1) if site == "scores" else edit(middle["pattern"])
        wanted = edit(middle["z"]) if site == "z" else pattern @ spread
    near(found, wanted)
    moved(wanted, module(q, k, v))


def test_the_fused_kernel_runs_unless_scores_or_pattern_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    q, k, v = inputs()
    module = Call()

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append("fused" if func is fused else "other")
            return func(*args, **(kwargs or {}))

    for sites, expected in (("qkvz", 1), (("scores",), 0), (("pattern",), 0)):
        calls.clear()
        with torch.no_grad(), tapped(module, keeping({}, *sites), "here"), Counting():
            module(q, k, v)
        assert calls.count("fused") == expected


@pytest.mark.parametrize("name", CALLS)
def test_a_pattern_without_its_scores_and_without_gradients(name: str) -> None:
    options = CALLS[name]
    q, k, v = inputs(2 if name == "grouped" else HEADS)
    module, kept = Call(**options), {}
    expected = written_out(q, k, v, **options)
    before = [x.clone() for x in (q, k, v, BIAS)]
    with torch.no_grad(), tapped(module, keeping(kept, "pattern"), "here"):
        found = module(q, k, v)
    near(kept["pattern"], expected["pattern"])
    near(found, expected["z"])
    assert all(torch.equal(x, y) for x, y in zip((q, k, v, BIAS), before, strict=True))


def test_transforms_of_functions_see_the_pattern() -> None:
    q, k, v = inputs()
    module, kept = Call(), {}

    def attend(q: Tensor) -> Tensor:
        with tapped(module, keeping(kept, "pattern"), "here"):
            return module(q, k, v)

    with torch.no_grad():
        expected, (_, tangent) = module(q, k, v), torch.func.jvp(lambda q: written_out(q, k, v)["z"], (q,), (q,))
        near(torch.vmap(attend)(torch.stack([q, q]))[1], expected)
        found, along = torch.func.jvp(attend, (q,), (q,))
    near(found, expected)
    near(along, tangent)
    moved(along, torch.zeros_like(along))


def test_dropout_acts_on_the_pattern_after_its_edit() -> None:
    q, k, v = inputs()
    module = Call(dropout_p=0.5)
    with tapped(module, {"pattern": torch.ones_like}, "here"):
        torch.manual_seed(0)
        found = module(q, k, v)
    torch.manual_seed(0)
    near(found, F.dropout(torch.ones(2, HEADS, TOKENS, TOKENS), 0.5) @ v)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_softmax_is_as_precise_as_its_input_and_float32_at_least(dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    module = Call()
    kept: dict[str, Tensor] = {}
    with tapped(module, keeping(kept, "scores", "pattern"), "here"):
        found = module(q, k, v)
    assert kept["pattern"].dtype == found.dtype == dtype
    allowed = {torch.float64: 1e-14, torch.bfloat16: 1e-2}[dtype]
    near(kept["pattern"], kept["scores"].double().softmax(-1), allowed)
    near(found, module(q, k, v), allowed)


@pytest.mark.parametrize(
    ("times", "text"),
    [
        (0, "Use fused attention: attn_implementation='sdpa'"),
        (2, "Its family's adapter should refuse this module."),
    ],
)
def test_a_module_must_make_one_call(times: int, text: str) -> None:
    module = Call(times)
    with tapped(module, keeping({}, "q"), "blocks.3.attn"), pytest.raises(ExecutionError) as raised:
        module(*inputs())
    assert str(raised.value).startswith(
        f"blocks.3.attn (Call) made {times} attention calls where one was expected"
    )
    assert str(raised.value).endswith(text) or text in str(raised.value)
    assert "forward" not in vars(module)


def test_taps_on_one_module_add_up() -> None:
    q, k, v = inputs()
    module = Call()
    seen: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        seen.append(value)
        return value

    with tapped(module, {"z": lambda z: z + 1}, "here"):
        with (
            tapped(module, {"z": lambda z: z * 2}, "here"),
            tapped(module, {"z": keep, "pattern": lambda p: p * 0}, "here"),
        ):
            near(module(q, k, v), torch.full_like(q, 2.0))
        near(module(q, k, v) - 1, F.scaled_dot_product_attention(q, k, v), 1e-5)
    assert torch.equal(seen[0], torch.full_like(seen[0], 2.0))
    assert "forward" not in vars(module)


def test_attention_elsewhere_is_left_alone() -> None:
    q, k, v = inputs()
    tapped_module, other = Call(), Call()
    with tapped(tapped_module, {"z": lambda z: z * 0}, "here"):
        assert bool(other(q, k, v).any())
        assert not tapped_module(q, k, v).any()


def test_a_forward_of_the_instances_own_comes_back() -> None:
    module = Call()
    own = lambda *args: args[0]  # noqa: E731
    module.forward = own  # type: ignore[method-assign]
    with shadowed_forward(module, lambda *args: args[1]):
        assert module(1, 2) == 2
    with pytest.raises(ZeroDivisionError), shadowed_forward(module, lambda *args: args[1]):
        1 / 0  # noqa: B018
    assert vars(module)["forward"] is own
