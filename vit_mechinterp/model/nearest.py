"""For a module that no family describes: the family that comes nearest, and what it misses there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from vit_mechinterp.model.layout import Family, Port, is_missing, lookup
from vit_mechinterp.model.resolve import missing_for

__all__ = ["Fit", "describe_nearest", "nearest"]

SHOWN = 6


@dataclass(frozen=True)
class Fit:
    """How far a family's row fits the first block of a list of modules.

    Args:
        family: the family.
        path: where the list stands in the module.
        block: class of the list's first module.
        n_places: how many places in a block the row names.
        missing: those that are not there, and what they are wanted for.
        foreign: what the block holds beside them that the family does not know.
    """

    family: Family
    path: str
    block: str
    n_places: int
    missing: tuple[str, ...]
    foreign: tuple[str, ...]

    @property
    def n_found(self) -> int:
        """How many of the row's places are there."""
        return self.n_places - len(self.missing)

    @property
    def rank(self) -> tuple[float, bool]:
        """Sorts fits, the best last: by the places found, less what is foreign, and by the path."""
        return (self.n_found - len(self.foreign)) / self.n_places, self.path in self.family.blocks

    def __str__(self) -> str:
        where = f"{self.path}.0 ({self.block})"
        found = "all" if not self.missing else str(self.n_found)
        text = f"{self.family.name}, {found} of whose {self.n_places} places in a block are in {where}"
        if self.missing:
            rest = f" and {n} more" if (n := len(self.missing) - SHOWN) > 0 else ""
            text += f"; missing: {', '.join(self.missing[:SHOWN])}{rest}"
        if self.foreign:
            text += f"; unknown to it: {', '.join(self.foreign[:SHOWN])}"
        if self.path not in self.family.blocks:
            text += f"; it looks for the blocks at {' or '.join(map(repr, self.family.blocks))}"
        return text


def nearest(families: Sequence[Family], module: nn.Module) -> Fit | None:
    """The family of whose places in a block most are there, in whatever list; None if no block has any."""
    fits = [
        fit
        for path, blocks in _lists(module)
        for family in families
        if (fit := _fit(family, path, blocks[0])).n_found
    ]
    return max(fits, key=lambda fit: fit.rank, default=None)


def describe_nearest(families: Sequence[Family], module: nn.Module) -> list[str]:
    """Lines that say which family came nearest, and which part of the module is a ViT if one is."""
    lines = []
    fit = nearest(families, module)
    if fit is None:
        lines.append("No list of modules in it has any of the places that a family names.")
    else:
        # Where every place of a block is there, the reason lies outside the first block.
        whole = not fit.missing and not fit.foreign and fit.path in fit.family.blocks
        reason = missing_for(fit.family, module) if whole else None
        lines.append(f"Nearest is {fit}" + (f", and yet: {reason}." if reason else "."))
    for path, name in _parts(families, module):
        lines.append(f"Its part {path!r} is described by {name}; wrap that.")
    return lines


def _lists(module: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    """Lists of modules that could be a model's blocks; a sequence of different ones is a stem or a head."""
    for path, part in module.named_modules():
        if path and isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part):
            alike = isinstance(part, nn.ModuleList) or len({type(child) for child in part}) == 1
            if alike and any(True for _ in part[0].children()):
                yield path, part


def _fit(family: Family, path: str, block: nn.Module) -> Fit:
    places = {family.attention: "the attention", family.out_projection: "the output projection"}
    missing = [
        f"{place!r} for {use}" for place, use in places.items() if place and is_missing(lookup(block, place))
    ]
    n_places = sum(1 for place in places if place)
    for site, ports in family.ports.items():
        if not ports or all(isinstance(port, Port) and not port.path and not port.requires for port in ports):
            continue  # optional, or the block itself
        if site == "mlp.pre_linear" or _lacks(family, site, block):
            continue
        n_places += 1
        if not any(port.applies_to(block) for port in ports):
            probed = " or ".join(dict.fromkeys(port.needs for port in ports))
            missing.append(f"{probed} for {site}")
    known = family.parts.get("")
    held = (name for name, _ in (*block.named_children(), *block.named_parameters(recurse=False)))
    foreign = tuple(repr(name) for name in held if known is not None and name not in known)
    return Fit(family, path, type(block).__name__, n_places, tuple(missing), foreign)


def _lacks(family: Family, site: str, block: nn.Module) -> bool:
    try:
        return family.lacks(site, block) is not None
    except (AttributeError, LookupError, TypeError, ValueError):
        return False  # the block is none that the family's reasons can be asked about


def _parts(families: Sequence[Family], module: nn.Module) -> Iterator[tuple[str, str]]:
    """Parts around a list of blocks that a family describes, the outermost of each."""
    seen: set[str] = set()
    for path, _ in _lists(module):
        steps = path.split(".")
        for end in range(1, len(steps)):
            part = ".".join(steps[:end])
            if part in seen:
                continue
            seen.add(part)
            inner = module.get_submodule(part)
            found = next((family.name for family in families if missing_for(family, inner) is None), None)
            if found:
                yield part, found
                break
