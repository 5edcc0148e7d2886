"""A model that packs all images of a batch into one sequence: clean forwards of one image, rows beside them."""

from __future__ import annotations

import pytest
import torch
import transformers

import vit_mechinterp as vmi
from vit_mechinterp.errors import ExecutionError

SITE = "blocks.1.resid_pre"
RUNS = [
    vmi.Run(name="clean"),
    *(
        vmi.Run(name=f"token {token}", interventions=[vmi.Interchange(site=SITE, tokens=[token], source="source")])
        for token in (0, 3)
    ),
]


@pytest.fixture
def vit() -> vmi.HookedViT:
    torch.manual_seed(0)
    config = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    return vmi.wrap(transformers.PixtralVisionModel(config).eval())


def test_the_plan_says_so(vit: vmi.HookedViT) -> None:
    images = torch.randn(8, 3, 32, 32)
    plan = vmi.plan(vit, RUNS, {"base": images[:4], "source": images[4:]})
    assert plan.launches == 4 + 4 + 1
    assert plan.width >= 8
    assert "note: clean forwards take one image each: it packs all images of a batch" in str(plan)


@pytest.mark.parametrize("batch_size", ["auto", 3, 1])
def test_images_pass_one_by_one_and_give_what_each_gives_alone(vit: vmi.HookedViT, batch_size: int | str) -> None:
    base, source = (torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    seen: list[int] = []
    hook = vit.module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    results = vmi.execute(vit, RUNS, {"base": base, "source": source}, batch_size=batch_size, progress=False)
    hook.remove()
    assert set(seen) == {1}
    for example in range(4):
        one = slice(example, example + 1)
        clean, _ = vit.run(base[one])
        _, cache = vit.run(source[one], capture=[SITE])
        torch.testing.assert_close(results.logits[0, one], clean, rtol=0, atol=1e-5)
        for run, token in ((1, 0), (2, 3)):

            def exchange(value: torch.Tensor, token: int = token) -> torch.Tensor:
                value = value.clone()
                value[:, token] = cache[SITE][:, token]  # noqa: B023
                return value

            with vit.hooks({SITE: exchange}):
                wanted = vit(base[one])
            torch.testing.assert_close(results.logits[run, one], wanted, rtol=0, atol=1e-5)
            assert (wanted - clean).abs().max() > 1e-3


def test_several_images_at_once_are_refused(vit: vmi.HookedViT) -> None:
    with pytest.raises(ExecutionError, match="PixtralVisionModel takes one image a forward, not 2: it packs all images"):
        vit(torch.zeros(2, 3, 32, 32))
