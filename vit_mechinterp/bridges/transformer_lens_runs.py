"""Runs on a `TransformerLensViT`, with TransformerLens's own ``run_with_hooks``, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from vit_mechinterp.bridges.sequential import Forward, Touch, execute_sequentially
from vit_mechinterp.bridges.transformer_lens import TransformerLensViT, hooked
from vit_mechinterp.engine.backends import register_backend
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site, TensorRef

__all__ = ["run_transformer_lens"]


@register_backend("transformer_lens")
def run_transformer_lens(
    vit: HookedViT,
    bound: Bound,
    data: Data,
    tensors: Mapping[TensorRef, Tensor],
    *,
    batch_size: int,
    progress: bool,
) -> Results:
    """Carry out bound runs through TransformerLens's hook points; see `execute_sequentially`."""
    return execute_sequentially(
        "transformer_lens",
        ("transformer-lens",),
        _opened,
        _refusal,
        vit,
        bound,
        data,
        tensors,
        batch_size=batch_size,
        progress=progress,
    )


def _refusal(vit: HookedViT, site: Site) -> str | None:
    if site.name in ("pooled", "logits"):
        return f"TransformerLens has no hook point that means {site}"
    return None


@contextmanager
def _opened(vit: HookedViT, sites: Iterable[Site]) -> Iterator[Forward]:
    model = hooked(vit)
    yield partial(_forward, model, {site: hook for hook, site in model.site_of.items()})


def _forward(
    model: TransformerLensViT, hook_of: Mapping[str, str], images: Tensor, touches: Mapping[Site, Touch]
) -> Tensor:
    def passing(touch: Touch) -> Any:
        return lambda activation, hook: touch(activation)

    hooks = [(hook_of[str(site)], passing(touch)) for site, touch in touches.items()]
    output: Tensor = model.run_with_hooks(images, fwd_hooks=hooks)
    return output
