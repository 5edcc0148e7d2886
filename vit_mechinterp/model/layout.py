"""What an adapter declares about a family of ViTs, and what is read off one live module.

A `Family` is a row of metadata: where the blocks are, at which module boundary every site appears, and three
small readers for what only the live module knows (token layout, width, output). Laid over a module (see
`vit_mechinterp.model.resolve`) it becomes a `Layout`: plain facts, no tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from vit_mechinterp.model.packing import Packing, Rows
from vit_mechinterp.model.ports import Difference, Port, Share, is_missing, lookup

__all__ = [
    "Difference",
    "Family",
    "Layout",
    "Packing",
    "Port",
    "Readout",
    "Rows",
    "Share",
    "TokenLayout",
    "is_missing",
    "lookup",
]

TAP_SITES = ("attn.q", "attn.k", "attn.v", "attn.scores", "attn.pattern", "attn.z")
"""Sites that live inside the attention call and are reached by the tap, in forward order."""


@dataclass(frozen=True)
class TokenLayout:
    """The token axis of the residual stream: prefix tokens, then the patch grid (row-major), then a suffix.

    ``prefix`` and ``suffix`` name one token per entry; a name may repeat (``("cls", "registers",
    "registers")``). ``patch_size`` is ``(height, width)`` in pixels of the model's input, ``image_size`` the
    input's size. For video the grid is ``[t, h, w]`` and ``frames`` the number of frames of the input; it is
    None for images. ``padded`` says that an image of whole patches is made of one that is not.
    """

    prefix: tuple[str, ...]
    grid: tuple[int, ...]
    patch_size: tuple[int, int]
    image_size: tuple[int, int]
    suffix: tuple[str, ...] = ()
    frames: int | None = None
    padded: bool = False

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example of the model's input: ``[3, height, width]``, for video with frames first."""
        frames = () if self.frames is None else (self.frames,)
        return (*frames, 3, *self.image_size)

    def resized(self, image_size: tuple[int, int]) -> TokenLayout:
        """The layout for images of another size ``(height, width)``, in whole patches."""
        grid = tuple(
            -(-edge // patch) if self.padded else edge // patch
            for edge, patch in zip(image_size, self.patch_size, strict=True)
        )
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
        output: field of a dict-like native output (or index in a tuple) that ``vit(x)`` returns; None if the
            model returns a tensor.
        name: what ``vit(x)`` is where the model returns a tensor or a tuple.
        ports: for ``ln_final``, ``pooled`` and ``logits``, a port relative to the model, or the reason why
            the model has no such site.
    """

    output: str | int | None
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
            applies to a block is used. A site inside the call that has a port is not tapped. (``attn.result``
            follows from z and the output projection; its port only says that tokens come first there.)
        attention: path from a block to the module that makes one ``scaled_dot_product_attention`` call;
            ``""`` where the block itself makes it.
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
        absent: sites that the family cannot have, and why; a function of the block where blocks differ.
        returns_tuple: whether a block returns a tuple whose first element is the residual stream; a function
            of the block where versions of a library differ.
        inputs: makes the arguments of the native call from a batch of images, where the call needs more than
            the images (random choices to be pinned, patches instead of images).
        one_image: why the module takes only one image per forward, or None. Such a module packs all images
            into one sequence, so that rows can neither join nor leave the batch on the way.
        recorded: whether the output is made from values that transformers' own recording hooks keep; then
            edits must come before these hooks.
        strangers: layers whose sites cannot be named, and why (a token axis that is not the stream's).
        mixing: what becomes of the pattern before it multiplies the values, given the attention module, for
            families whose heads read each other's patterns; None where nothing does.
        counts_rows: whether the model, behind its blocks, expects as many rows as images went in. Then a
            growing batch begins with as many blank images as it has rows in the end.
        parallel: whether attention and MLP run side by side on one input, so that neither reaches the other.
        refuses: returns a reason why a module of this family cannot be supported, or None.
        any_size: whether a module takes images of other sizes than ``tokens`` reads off it.
        packing: for modules that pack all images of a batch into one sequence: how the tokens of an image of
            that layout lie in it. Their blocks take the ends of the stretches by name. `Rows` where only the
            output is such a sequence.
    """

    name: str
    library: str
    blocks: tuple[str, ...]
    ports: Mapping[str, tuple[Port | Difference | Share, ...]]
    attention: str
    out_projection: str
    readout: Callable[[nn.Module], Readout]
    tokens: Callable[[nn.Module], TokenLayout]
    d_model: Callable[[nn.Module], int]
    heads: Callable[[nn.Module], tuple[int, int]]
    attention_scale: tuple[str, ...] = ()
    parts: Mapping[str, frozenset[str]] = field(default_factory=lambda: MappingProxyType({}))
    absent: Mapping[str, str | Callable[[nn.Module], str | None]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    returns_tuple: bool | Callable[[nn.Module], bool] = False
    inputs: Callable[[nn.Module, Tensor], tuple[tuple[Any, ...], dict[str, Any]]] = lambda module, x: (
        (x,),
        {},
    )
    one_image: str | None = None
    recorded: bool = False
    strangers: Callable[[nn.Module], Mapping[int, str]] = lambda module: MappingProxyType({})
    mixing: Callable[[nn.Module, Tensor], Tensor] | None = None
    counts_rows: bool = False
    parallel: bool = False
    refuses: Callable[[nn.Module], str | None] = lambda module: None
    any_size: Callable[[nn.Module], bool] = lambda module: False
    packing: Callable[[nn.Module, TokenLayout], Packing | Rows] | None = None

    def lacks(self, site: str, block: nn.Module) -> str | None:
        """Why a block of this family has no such site; None if it has one."""
        reason = self.absent.get(site)
        return reason(block) if callable(reason) else reason


@dataclass(frozen=True, repr=False)
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
    ports: Mapping[str, Port | Difference | Share]
    absent: Mapping[str, str]
    packing: Packing | Rows | None = None
    returns_tuple: bool = False

    @property
    def sequence(self) -> Packing | None:
        """How images lie in the sequence that the blocks see, if they see one."""
        return self.packing if isinstance(self.packing, Packing) else None

    def outcome(self, native: Any) -> Tensor:
        """What ``vit(x)`` returns, taken from the native output: one row per image."""
        value: Tensor = native if self.readout.output is None else native[self.readout.output]
        return value if self.packing is None else self.packing.split(value)

    @property
    def output(self) -> str:
        """What ``vit(x)`` returns: ``"logits"``, another field of the native output, or its last features."""
        output = self.readout.output
        return output if isinstance(output, str) else self.readout.name

    def block_path(self, layer: int) -> str:
        """Dotted path from the model to a block."""
        return f"{self.blocks_path}.{layer}"

    def attention_path(self, layer: int) -> str:
        """Dotted path from the model to a block's attention module."""
        inside = f".{self.family.attention}" if self.family.attention else ""
        return f"{self.blocks_path}.{layer}{inside}"

    def __repr__(self) -> str:
        return f"Layout({self})"

    def __str__(self) -> str:
        return (
            f"{self.family.name}: {self.n_layers} blocks, {self.n_heads} heads of {self.d_head}, "
            f"width {self.d_model}, {self.tokens}"
        )
