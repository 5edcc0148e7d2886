"""Values and edits by plain torch hooks and by the libraries' own eager attention: a second opinion on every model.

Nothing here is taken from the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

Edit = Callable[[Tensor], Tensor]


def native(module: nn.Module, images: Tensor, output: str) -> Tensor:
    """The native output, or the named field of it."""
    found = module(images)
    return found if isinstance(found, Tensor) else found[output]


def blocks_of(module: nn.Module) -> nn.ModuleList:
    """The one list of blocks in a model."""
    for part in module.modules():
        for name in ("blocks", "layers", "layer"):
            blocks = getattr(part, name, None)
            if isinstance(blocks, (nn.ModuleList, nn.Sequential)):
                return blocks  # type: ignore[return-value]
    raise AssertionError("no blocks")


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], *, before: bool = False) -> Iterator[None]:
    """One plain hook for the duration."""
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def block_input(module: nn.Module, layer: int, run: Callable[[], Any]) -> Tensor:
    """What a block was given."""
    kept: list[Tensor] = []
    with hooked(blocks_of(module)[layer], lambda _, args: kept.append(args[0]), before=True):
        run()
    return kept[0]


def block_output(module: nn.Module, layer: int, run: Callable[[], Any]) -> Tensor:
    """What a block returned."""
    kept: list[Tensor] = []
    with hooked(blocks_of(module)[layer], lambda _, args, out: kept.append(out)):
        run()
    return kept[0]


def with_block_output(module: nn.Module, layer: int, edit: Edit, run: Callable[[], Tensor]) -> Tensor:
    """The output of a run in which a block returns something else."""
    with hooked(blocks_of(module)[layer], lambda _, args, out: edit(out)):
        return run()


def patterns(module: nn.Module, images: Tensor) -> list[Tensor]:
    """Attention patterns of every block as the library's own unfused attention has them."""
    if hasattr(module, "set_attn_implementation"):
        module.set_attn_implementation("eager")
        try:
            return list(module(images, output_attentions=True).attentions)
        finally:
            module.set_attn_implementation("sdpa")
    kept: list[Tensor] = []
    with unfused(module, lambda _, args, out: kept.append(out)):
        module(images)
    return kept


@contextmanager
def unfused(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """timm's unfused attention in every block, with a hook on the dropout behind its softmax."""
    attentions = [block.attn for block in blocks_of(module)]
    handles = [attention.attn_drop.register_forward_hook(hook) for attention in attentions]
    for attention in attentions:
        attention.fused_attn = False
    try:
        yield
    finally:
        for attention, handle in zip(attentions, handles, strict=True):
            attention.fused_attn = True
            handle.remove()


def near(found: Tensor, wanted: Tensor, allowed: float = 1e-6) -> None:
    """Assert that two tensors agree to a share of the wanted one's scale."""
    assert found.shape == wanted.shape
    difference = float((found.double() - wanted.double()).detach().abs().max())
    assert difference <= allowed * float(wanted.detach().abs().max()), difference


def moved(found: Tensor, clean: Tensor) -> None:
    """Assert that an effect is worth comparing."""
    assert float((found - clean).detach().abs().max()) > 1e-3 * float(clean.detach().abs().max())
