"""A model whose stream is no site from some block on: object queries have joined it, so no row can join there."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import vit_mechinterp as vmi
from tests.tiny_models import stirred


@pytest.fixture
def vit() -> vmi.HookedViT:
    torch.manual_seed(0)
    config = transformers.EomtConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=8,
        num_blocks=2, num_queries=5, num_upscale_blocks=1, num_labels=2,
    )  # fmt: skip
    return vmi.wrap(stirred(transformers.EomtForUniversalSegmentation(config)).eval())


def blocks_run(
    vit: vmi.HookedViT, runs: list[vmi.Run], data: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]
) -> tuple[list[int], vmi.Results]:
    """Rows that pass through each block, and the results."""
    seen = [0] * vit.layout.n_layers
    norms = [module for name, module in vit.module.named_modules() if name.endswith("norm1")]
    assert len(norms) == len(seen)

    def counting(layer: int, norm: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def count(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[layer] += len(args[0])

        return norm.register_forward_pre_hook(count)

    handles = [counting(layer, norm) for layer, norm in enumerate(norms)]
    results = vmi.execute(vit, runs, data, tensors, progress=False)
    for handle in handles:
        handle.remove()
    return seen, results


def test_rows_join_before_the_blocks_that_are_closed(vit: vmi.HookedViT) -> None:
    assert {"blocks.1.resid_post", "logits"} <= set(vit.site_names())
    assert {"blocks.2.resid_post", "blocks.3.resid_post"} <= set(vit.layout.absent)
    draw = torch.Generator().manual_seed(1)
    data = {name: torch.randn(3, 3, 16, 16, generator=draw) for name in ("base", "source")}
    begin = vmi.Interchange(site="blocks.0.mlp_out", tokens=[1, 2], source="source")
    half = vmi.InjectSubspace(site="logits", source="base", basis=vmi.TensorRef(name="basis"))
    runs = [
        vmi.Run(name="begin", interventions=[begin]),
        vmi.Run(name="further", interventions=[begin, half]),
        vmi.Run(name="logits", interventions=[vmi.Interchange(site="logits", source="source")]),
    ]
    tensors = {"basis": torch.eye(3)[:, :1]}
    vit.sites()
    plan = vmi.plan(vit, runs, data, tensors)
    seen, results = blocks_run(vit, runs, data, tensors)
    assert sum(seen) == plan.block_evaluations
    # Block 1 runs once for those that begin alike; where they part, behind the last block, none can join any more.
    images = 6  # base and source logits are read
    assert seen == [images, images + 3, images + 9, images + 9]
    with torch.no_grad():
        clean, source = vit(data["base"]), vit(data["source"])
        kept = vit.run(data["source"], capture=["blocks.0.mlp_out"])[1]["blocks.0.mlp_out"]

        def put_in(h: torch.Tensor) -> torch.Tensor:
            h = h.clone()
            h[:, [6, 7]] = kept[:, [6, 7]]  # behind CLS and four registers
            return h

        with vit.hooks({"blocks.0.mlp_out": put_in}):
            begun = vit(data["base"])
    further = torch.cat([clean[..., :1], begun[..., 1:]], dim=-1)
    close = {"rtol": 0, "atol": 1e-5 * float(clean.abs().max())}
    for name, wanted in {"begin": begun, "further": further, "logits": source}.items():
        torch.testing.assert_close(results[name], wanted, **close)
    assert min(float((a - b).abs().max()) for a, b in [(begun, clean), (further, begun), (source, clean)]) > 1e-3
