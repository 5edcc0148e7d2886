"""Where a site is read and written: a tensor at a boundary, a difference of two, a share of a sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from vit_mechinterp.model.packing import Packing

__all__ = ["Difference", "Port", "Share", "is_missing", "lookup"]

_MISSING = object()
_ANY = object()


@dataclass(frozen=True)
class Port:
    """One tensor that enters or leaves a module: the place where a site can be read and written.

    Args:
        path: dotted path of the module, relative to the block (or to the model); ``""`` is the block itself.
        side: whether the tensor is the module's first input or its output.
        field: name of the tensor in a dict-like output (a HuggingFace ``ModelOutput``); otherwise the output
            itself, or its first element if it is a tuple.
        part: ``(i, n)`` for chunk ``i`` of ``n`` along the last axis (packed gated MLPs).
        in_place: write with ``copy_``. The residual stream between attention and MLP is one tensor with two
            readers, the next norm and the skip connection; only a write in place reaches both.
        call: which of the module's calls within one block is meant, for a module that a block calls twice (a
            dropout shared by attention and MLP).
        spatial: the tensor is ``[batch, height, width, channel]``; visitors see it with one token axis.
        heads: the first or the last features of the tensor are all heads side by side; visitors see these
            alone, as ``[batch, token, head, d_head]``.
        head_first: the tensor is ``[batch, head, token, d_head]``; visitors see the token axis first. If it
            has several narrower heads for each of the model's, visitors see these side by side, as one.
        token_first: the tensor is ``[token, batch, channel]``; visitors see the batch first.
        requires: attributes, relative to the block, that must exist for this port to apply; with a value,
            they must also equal it.
        scope: path of the block whose beginning starts the count of calls; set by `resolve`.
        head_shape: number of heads and width of one; set by `resolve`.
        packing: how images lie in the sequence that a module packs them into; set by `resolve`.
    """

    path: str
    side: Literal["input", "output"] = "output"
    field: str | None = None
    part: tuple[int, int] | None = None
    in_place: bool = False
    call: int | None = None
    spatial: bool = False
    heads: Literal["first", "last"] | None = None
    head_first: bool = False
    token_first: bool = False
    requires: tuple[tuple[str, Any], ...] = ()
    scope: str = ""
    head_shape: tuple[int, int] = (0, 0)
    packing: Packing | None = None

    def applies_to(self, block: nn.Module) -> bool:
        """Whether the module and the required attributes exist on ``block``."""
        return isinstance(lookup(block, self.path), nn.Module) and _fulfils(block, self.requires)

    @property
    def needs(self) -> str:
        """The module and the attributes without which the port does not apply, for messages."""
        return repr(self.path) + _conditions(self.requires)

    @staticmethod
    def has(path: str, value: Any = _ANY) -> tuple[str, Any]:
        """A requirement: the attribute at ``path`` exists (and equals ``value``, if one is given)."""
        return (path, value)


@dataclass(frozen=True)
class Difference:
    """An increment of the residual stream that no module puts out: one site's value minus an earlier one's.

    Read when the later site is reached; a write replaces the later site's value by the earlier one's plus the
    new increment. Both are names of block sites with ports of their own. (An instrument installed inside
    another one reads the later site behind the other's edits of it, and so includes them.)
    """

    of: str
    minus: str
    requires: tuple[tuple[str, Any], ...] = ()

    def applies_to(self, block: nn.Module) -> bool:
        """Whether the required attributes exist on ``block``."""
        return _fulfils(block, self.requires)

    @property
    def needs(self) -> str:
        """The sites and the attributes without which the increment does not apply, for messages."""
        return f"{self.of} - {self.minus}" + _conditions(self.requires)


@dataclass(frozen=True)
class Share:
    """An increment of the residual stream that is added to it in one sum with another (parallel blocks).

    Read as what a linear layer makes of its input; a write moves the sum by the change.

    Args:
        projection: path of the linear layer.
        through: path of the module that puts out the sum as it is added to the stream.
        scale: path of the vector that multiplies the sum on the way (LayerScale), if it is there.
        inputs: which input features of the layer belong to the increment: all, those of the heads, which come
            first, or those behind them. The layer's bias goes with the heads.
        requires: as for a port.
        n_first: number of features of all heads; set by `resolve`.
    """

    projection: str
    through: str
    scale: str | None = None
    inputs: Literal["all", "first", "last"] = "all"
    requires: tuple[tuple[str, Any], ...] = ()
    n_first: int = 0

    def applies_to(self, block: nn.Module) -> bool:
        """Whether both modules and the required attributes exist on ``block``."""
        modules = (lookup(block, path) for path in (self.projection, self.through))
        return all(isinstance(module, nn.Module) for module in modules) and _fulfils(block, self.requires)

    @property
    def needs(self) -> str:
        """The modules and the attributes without which the share does not apply, for messages."""
        return f"{self.projection!r} and {self.through!r}" + _conditions(self.requires)

    def resolved(self, scope: str, n_first: int) -> Share:
        """The same with paths relative to the model."""
        scale = None if self.scale is None else f"{scope}.{self.scale}"
        projection, through = f"{scope}.{self.projection}", f"{scope}.{self.through}"
        return replace(self, projection=projection, through=through, scale=scale, n_first=n_first)


def _fulfils(block: nn.Module, requires: tuple[tuple[str, Any], ...]) -> bool:
    return all(
        (value := lookup(block, path)) is not _MISSING and (wanted is _ANY or value == wanted)
        for path, wanted in requires
    )


def _conditions(requires: tuple[tuple[str, Any], ...]) -> str:
    beside = [path if wanted is _ANY else f"{path} = {wanted!r}" for path, wanted in requires]
    return f" beside {' and '.join(map(repr, beside))}" if beside else ""


def lookup(root: Any, path: str) -> Any:
    """Follow a dotted path of attributes, list indices and module children; a sentinel if a step is
    missing."""
    current = root
    for step in path.split(".") if path else ():
        if not step.isdigit():
            current = getattr(current, step, _MISSING)
        elif not hasattr(current, "__getitem__") or int(step) >= len(current):
            current = _MISSING
        else:
            current = current[int(step)]
        if current is _MISSING:
            return _MISSING
    return current


def is_missing(value: Any) -> bool:
    """Whether `lookup` failed."""
    return value is _MISSING or value is None
