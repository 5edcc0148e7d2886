"""Blocks compiled by ``torch.compile``, used wherever nothing looks into them.

The native module is left as it is: for the duration of a forward, the ``forward`` of every block that is
neither skipped nor read, edited or hooked inside is shadowed by its compiled form. All others run as they
are written. The batch is dynamic from the start, so rows that join cause no compilation of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from vit_mechinterp.errors import ExecutionError
from vit_mechinterp.model.layout import Layout
from vit_mechinterp.model.ports import lookup
from vit_mechinterp.model.tap import shadowed_forward

__all__ = ["CompiledBlocks", "explained"]


class CompiledBlocks:
    """Compiled forms of a model's blocks.

    Args:
        module: the native module.
        layout: what is where in it.
        options: what ``torch.compile`` is given, beside ``dynamic=True``.
    """

    def __init__(self, module: nn.Module, layout: Layout, **options: Any) -> None:
        self.options = options
        self.blocks: list[nn.Module] = [
            lookup(module, layout.block_path(layer)) for layer in range(layout.n_layers)
        ]
        self.compiled: list[Callable[..., Any]] = [
            torch.compile(block.forward, **{"dynamic": True, **options}) for block in self.blocks
        ]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let blocks that nobody looks into run in their compiled form."""
        with ExitStack() as stack:
            for block, compiled in zip(self.blocks, self.compiled, strict=True):
                if not _is_opened(block):
                    stack.enter_context(shadowed_forward(block, compiled))
            yield


def _is_opened(block: nn.Module) -> bool:
    """Whether a block is skipped, or a part of it is hooked or shadowed."""
    if "forward" in vars(block):
        return True
    inside = (part for part in block.modules() if part is not block)
    return any(p._forward_hooks or p._forward_pre_hooks or "forward" in vars(p) for p in inside)


@contextmanager
def explained(what: str, undo: Callable[[], object]) -> Iterator[None]:
    """Turn whatever a compiler raises into one error that says what to do, after ``undo``."""
    try:
        yield
    except Exception as error:
        undo()
        reason = " ".join(str(error).strip().splitlines()[:2]).rstrip(".")
        raise ExecutionError(
            f"{what} cannot be compiled: {reason}. The default backend needs a C++ compiler on a CPU; "
            'backend="aot_eager" needs none, and gains little.'
        ) from error
