"""What an adapter declares about a family of ViTs, and what is read off one live module.

A `Family` is a row of metadata: where the blocks are, at which module boundary every site appears, and three
small readers for what only the live module knows (token layout, width, output). Laid over a module (see
`vit_mechinterp.model.resolve`) it becomes a `Layout`: plain facts, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

__all__ = ["Family", "Layout", "Port", "Readout", "TokenLayout", "is_missing", "lookup"]

_MISSING = object()
_ANY = object()

TAP_SITES = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z")
"""Sites that live inside the attention call and are reached by the tap, in forward order."""


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
        requires: attributes, relative to the block, that must exist for this port to apply; with a value,
            they must also equal it.
    """

    path: str
    side: Literal["input", "output"] = "output"
    field: str | None = None
    part: tuple[int, int] | None = None
    in_place: bool = False
    requires: tuple[tuple[str, Any], ...] = ()

    def applies_to(self, block: nn.Module) -> bool:
        """Whether the module and the required attributes exist on ``block``."""
        found = lookup(block, self.path)
        if not isinstance(found, nn.Module):
            return False
        return all(
            (value := lookup(block, path)) is not _MISSING and (wanted is _ANY or value == wanted)
            for path, wanted in self.requires
        )

    @property
    def needs(self) -> str:
        """The module and the attributes without which the port does not apply, for messages."""
        beside = [path if wanted is _ANY else f"{path} = {wanted!r}" for path, wanted in self.requires]
        return repr(self.path) + (f" beside {' and '.join(map(repr, beside))}" if beside else "")

    @staticmethod
    def has(path: str, value: Any = _ANY) -> tuple[str, Any]:
        """A requirement: the attribute at ``path`` exists (and equals ``value``, if one is given)."""
        return (path, value)


@dataclass(frozen=True)
class TokenLayout:
    """The token axis of the residual stream: prefix tokens, then the patch grid (row-major), then a suffix.

    ``prefix`` and ``suffix`` name one token per entry; a name may repeat (``("cls", "registers",
    "registers")``). ``patch_size`` is ``(height, width)`` in pixels of the model's input, ``image_size`` the
    input's size.
    """

    prefix: tuple[str, ...]
    grid: tuple[int, ...]
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    suffix: tuple[str, ...] = ()

    def resized(self, image_size: tuple[int, int]) -> TokenLayout:
        """The layout for images of another size ``(height, width)``, in whole patches."""
        grid = tuple(edge // patch for edge, patch in zip(image_size, self.patch_size, strict=True))
        return replace(self, grid=(*self.grid[:-2], *grid), image_size=image_size)

    @property
    def n_patches(self) -> int:
        """Number of patch tokens."""
        n = 1
        for size in self.grid:
            n *= size
        return n

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the residual stream."""
        return len(self.prefix) + self.n_patches + len(self.suffix)

    @property
    def names(self) -> tuple[str, ...]:
        """Every token name that a spec may use on this model."""
        return tuple(dict.fromkeys(("all", *self.prefix, "patches", *self.suffix)))

    def positions(self, name: str) -> list[int] | None:
        """Positions on the token axis of the tokens called ``name``; None if the model has no such name."""
        first, last = len(self.prefix), len(self.prefix) + self.n_patches
        if name == "all":
            return list(range(self.n_tokens))
        if name == "patches":
            return list(range(first, last))
        positions = [i for i, own in enumerate(self.prefix) if own == name]
        positions += [last + i for i, own in enumerate(self.suffix) if own == name]
        return positions or None

    def __str__(self) -> str:
        grid = "x".join(map(str, self.grid))
        patches = f"{grid} patches of {self.patch_size[0]}x{self.patch_size[1]} px"
        return " + ".join([*_counted(self.prefix), patches, *_counted(self.suffix)])


def _counted(names: tuple[str, ...]) -> list[str]:
    return [name if (n := names.count(name)) == 1 else f"{n} {name}" for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Readout:
    """How a model turns the last residual stream into its output.

    Args:
        output: field of a dict-like native output that ``vit(x)`` returns; None if the model returns a
            tensor.
        name: what ``vit(x)`` is where the model returns a tensor.
        ports: for ``ln_final``, ``pooled`` and ``logits``, a port relative to the model, or the reason why
            the model has no such site.
    """

    output: str | None
    ports: Mapping[str, Port | str]
    name: str = "logits"


@dataclass(frozen=True)
class Family:
    """One row of metadata: everything that the library knows about a family of ViTs.

    Args:
        name: e.g. ``"timm.vit"``.
        library: the top-level package whose modules the row describes; used in messages.
        blocks: paths from the model to its list of blocks; the first that exists is used.
        ports: for every block site outside the attention call, the ports where it may appear; the first that
            applies to a block is used. (``attn.result`` follows from z and the output projection.)
        attention: path from a block to the module that makes one ``scaled_dot_product_attention`` call.
        out_projection: path from a block to the linear layer that mixes the heads back into the residual
            stream.
        attention_scale: paths from a block to the vector that multiplies the attention increment
            (LayerScale).
        readout: reads how the model turns its last residual stream into an output.
        tokens: reads the token layout off the model.
        d_model: reads the width of the residual stream off the model.
        heads: reads ``(n_heads, d_head)`` off an attention module.
        parts: for the block (path ``""``) and modules in it, the submodules and parameters that they may
            hold. What holds others computes other things under the same names, and is refused.
        absent: sites that the family cannot have, and why.
        refuses: returns a reason why a module of this family cannot be supported, or None.
        any_size: whether a module takes images of other sizes than ``tokens`` reads off it.
    """

    name: str
    library: str
    blocks: tuple[str, ...]
    ports: Mapping[str, tuple[Port, ...]]
    attention: str
    out_projection: str
    readout: Callable[[nn.Module], Readout]
    tokens: Callable[[nn.Module], TokenLayout]
    d_model: Callable[[nn.Module], int]
    heads: Callable[[nn.Module], tuple[int, int]]
    attention_scale: tuple[str, ...] = ()
    parts: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))
    absent: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    any_size: Callable[[nn.Module], bool] = lambda module: False


@dataclass(frozen=True)
class Layout:
    """What is known of one live model, as plain facts.

    ``ports`` maps canonical site names to ports relative to the *model*; sites inside the attention call have
    no port and are reached by the tap. ``absent`` maps the remaining names of the vocabulary to the reason.
    """

    family: Family
    blocks_path: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    tokens: TokenLayout
    readout: Readout
    ports: Mapping[str, Port]
    absent: Mapping[str, str]

    @property
    def output(self) -> str:
        """What ``vit(x)`` returns: ``"logits"``, another field of the native output, or its last features."""
        return self.readout.output or self.readout.name

    def block_path(self, layer: int) -> str:
        """Dotted path from the model to a block."""
        return f"{self.blocks_path}.{layer}"

    def attention_path(self, layer: int) -> str:
        """Dotted path from the model to a block's attention module."""
        return f"{self.blocks_path}.{layer}.{self.family.attention}"

    def __str__(self) -> str:
        return (
            f"{self.family.name}: {self.n_layers} blocks, {self.n_heads} heads of {self.d_head}, "
            f"width {self.d_model}, {self.tokens}"
        )


def lookup(root: Any, path: str) -> Any:
    """Follow a dotted path of attributes, list indices and module children; a sentinel if a step is
    missing."""
    current = root
    for step in path.split(".") if path else ():
        current = current[int(step)] if step.isdigit() else getattr(current, step, _MISSING)
        if current is _MISSING:
            return _MISSING
    return current


def is_missing(value: Any) -> bool:
    """Whether `lookup` failed."""
    return value is _MISSING or value is None
