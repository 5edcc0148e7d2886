"""The grid of an activation patching: the sites, layers, heads and token windows, one run each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vit_mechinterp.circuits.token_sets import TokenPair
from vit_mechinterp.errors import SpecError, UnsupportedSiteError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.layout import TokenLayout
from vit_mechinterp.spec import Interchange, Run, Site

__all__ = [
    "Cell",
    "Window",
    "block_site",
    "chosen_layers",
    "head_cells",
    "lacking",
    "n_heads_at",
    "token_cells",
    "windows",
]

_MOST_WINDOWS = 64
_SHORT = {name: f"attn.{name}" for name in ("q", "k", "v", "z", "scores", "pattern", "result")}


@dataclass(frozen=True)
class Window:
    """A square of patches, and where it lies: its frame (0 for images), its first row and column."""

    patches: tuple[int, ...]
    frame: int
    row: int
    column: int


@dataclass(frozen=True)
class Cell:
    """One cell: what is patched, and how the table says it."""

    site: str
    layer: int
    kind: str
    label: str
    tokens: TokenPair = ("all", "all")
    head: int | None = None
    window: Window | None = None

    def run(self, direction: str, base: str, source: str) -> Run:
        """Noising puts the source's value into the base's forward; denoising the other way round."""
        here, there = self.tokens if direction == "noising" else self.tokens[::-1]
        into, origin = (base, source) if direction == "noising" else (source, base)
        swap = Interchange(
            site=self.site,
            tokens=here,
            source=into if self.kind == "no effect" else origin,
            source_tokens=here if self.kind == "no effect" else there,
            heads=None if self.head is None else (self.head,),
        )
        return Run(name=self.name(direction), interventions=(swap,), base=into)

    def name(self, direction: str) -> str:
        """The name of the cell's run."""
        return f"{direction}, {self.kind}, {self.site}, {self.label}"


def block_site(name: str) -> str:
    """Return the name of a site within a block (``"z"`` and ``"blocks.0.attn.z"`` both give ``"attn.z"``).

    Raises:
        SpecError: there is no such site, or it stands in no block.
    """
    if name.startswith("blocks."):
        return Site.parse(name).name
    return Site.parse(f"blocks.0.{_SHORT.get(name, name)}").name


def chosen_layers(vit: HookedViT, layers: Sequence[int] | Literal["all"]) -> list[int]:
    """Return the layers meant; SpecError if one is out of range."""
    if layers == "all":
        return list(range(vit.layout.n_layers))
    for layer in layers:
        if not 0 <= layer < vit.layout.n_layers:
            last = vit.layout.n_layers - 1
            raise SpecError(f"Layer {layer} is out of range; the model has layers 0 to {last}.")
    return list(layers)


def lacking(
    vit: HookedViT, sites: Iterable[str], layers: Sequence[int]
) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """Part sites into those that the model has, as (site, layer), and reasons for those that it lacks.

    Raises:
        UnsupportedSiteError: the model has none of them.
    """
    present: list[tuple[str, int]] = []
    absent: dict[str, str] = {}
    for site in dict.fromkeys(sites):
        for layer in layers:
            name = f"blocks.{layer}.{site}"
            if name in vit.layout.absent:
                absent[name] = vit.layout.absent[name]
            else:
                present.append((site, layer))
    if not present and absent:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(absent.items())[:3])
        raise UnsupportedSiteError(f"{type(vit.module).__name__} has none of these sites: {reasons}.")
    return present, _merged(absent, layers)


def _merged(absent: Mapping[str, str], layers: Sequence[int]) -> dict[str, str]:
    """Name a site once where every layer lacks it for one reason."""
    merged: dict[str, str] = {}
    for name, reason in absent.items():
        own = name.split(".", 2)[2]
        everywhere = all(absent.get(f"blocks.{layer}.{own}") == reason for layer in layers)
        merged[own if everywhere else name] = reason
    return merged


def windows(layout: TokenLayout, side: int | None = None) -> tuple[list[Window], int]:
    """Return the squares that the patch grid is cut into (smaller at the far borders), and their side.

    Args:
        layout: the model's tokens.
        side: patches along one side; None takes the smallest with at most 64 squares in a frame.

    Raises:
        SpecError: ``side`` is not a positive whole number.
    """
    rows, columns = layout.grid[-2:]
    frames = layout.grid[0] if len(layout.grid) == 3 else 1
    if side is None:
        sides = range(1, max(rows, columns) + 1)
        side = next(s for s in sides if math.ceil(rows / s) * math.ceil(columns / s) <= _MOST_WINDOWS)
    if side < 1:
        raise SpecError(f"window={side} must be a positive number of patches.")
    cut = []
    for frame in range(frames):
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                inside = [
                    (frame * rows + r) * columns + c
                    for r in range(top, min(top + side, rows))
                    for c in range(left, min(left + side, columns))
                ]
                cut.append(Window(tuple(inside), frame, top, left))
    return cut, side


def token_cells(
    vit: HookedViT,
    places: Sequence[tuple[str, int]],
    cut: Sequence[Window],
    token_sets: Mapping[str, TokenPair] | None,
) -> list[Cell]:
    """Return a cell per site and layer, and in it per special token and window, or per token set."""
    layout = vit.layout.tokens
    special = [name for name in layout.names if name not in ("all", "patches")]
    cells = []
    for site, layer in places:
        name = f"blocks.{layer}.{site}"
        if token_sets is not None:
            cells += [Cell(name, layer, "tokens", label, pair) for label, pair in token_sets.items()]
            continue
        cells += [Cell(name, layer, "tokens", token, (token, token)) for token in special]
        for window in cut:
            chosen = list(window.patches)
            frame = f", frame {window.frame}" if window.frame else ""
            label = f"patch {window.row},{window.column}{frame}"
            cells.append(Cell(name, layer, "patches", label, (chosen, chosen), window=window))
    return cells


def head_cells(vit: HookedViT, places: Sequence[tuple[str, int]]) -> list[Cell]:
    """Return a cell per site, layer and head."""
    return [
        Cell(f"blocks.{layer}.{site}", layer, "head", f"head {head}", head=head)
        for site, layer in places
        for head in range(n_heads_at(vit, site, layer))
    ]


def n_heads_at(vit: HookedViT, site: str, layer: int) -> int:
    """Return the number of heads of a site (keys and values may have fewer than queries).

    Raises:
        SpecError: the site has no heads.
    """
    name = f"blocks.{layer}.{site}"
    parsed = Site.parse(name)
    if not parsed.has_heads:
        raise SpecError(
            f"{site} has no heads. Sites with heads: attn.q, attn.k, attn.v, attn.z, attn.scores, "
            "attn.pattern, attn.result."
        )
    shape = vit.sites()[name].shape
    return int(shape[parsed.axes[1:].index("head")])
