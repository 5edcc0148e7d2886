"""Lay a family's row over a live module: does it fit, why not, and what are the facts."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

from torch import nn

from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model.layout import (
    TAP_SITES,
    Difference,
    Family,
    Layout,
    Packing,
    Port,
    Share,
    TokenLayout,
    is_missing,
    lookup,
)
from vit_mechinterp.spec import BLOCK_SITES, GLOBAL_SITES

__all__ = ["missing_for", "resolve"]


def missing_for(family: Family, module: nn.Module) -> str | None:
    """Return why ``family`` does not describe ``module`` (the paths that were probed), or None if it does."""
    blocks_path = _blocks_path(family, module)
    if blocks_path is None:
        return f"no list of blocks at {' or '.join(repr(p) for p in family.blocks)}"
    blocks = list(lookup(module, blocks_path))
    if not blocks:
        return f"{blocks_path} is empty"
    for index, block in enumerate(blocks):
        for path in (family.attention, family.out_projection):
            if is_missing(lookup(block, path)):
                return f"{blocks_path}.{index} ({type(block).__name__}) has no {path!r}"
        for site, ports in family.ports.items():
            found = any(port.applies_to(block) for port in ports)
            if found or site in _OPTIONAL or family.lacks(site, block):
                continue
            probed = " or ".join(dict.fromkeys(port.needs for port in ports))
            return f"{blocks_path}.{index} ({type(block).__name__}) has no {probed} for {site}"
        for path, known in family.parts.items():
            part = lookup(block, path)
            held = [name for name, _ in (*part.named_children(), *part.named_parameters(recurse=False))]
            foreign = ", ".join(repr(name) for name in held if name not in known)
            if foreign:
                where = f"{blocks_path}.{index}" + (f".{path}" if path else "")
                return f"{where} ({type(part).__name__}) also holds {foreign}, unknown to this family"
    return _refusal(family, module, lookup(blocks[0], family.attention))


def _refusal(family: Family, module: nn.Module, attention: nn.Module) -> str | None:
    """Why the family's readers refuse the module; a module they cannot read is none of the family's."""
    try:
        reason = family.refuses(module)
        if reason is None:
            family.tokens(module)
            family.d_model(module)
            family.heads(attention)
            for site, port in family.readout(module).ports.items():
                if isinstance(port, Port) and not port.applies_to(module):
                    return f"it has no {port.needs} for {site}"
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return f"its structure cannot be read ({type(error).__name__}: {error})"
    return reason


_OPTIONAL = frozenset({"mlp.pre_linear"})


def _no_results(family: Family, site: str, block: nn.Module) -> str | None:
    """Why heads have no results of their own: these are made with the weight of a linear layer."""
    projection = lookup(block, family.out_projection)
    if site != "attn.result" or type(projection).forward is nn.Linear.forward:
        return None
    return f"{family.out_projection} is a {type(projection).__name__}, no linear layer"


def _blocks_path(family: Family, module: nn.Module) -> str | None:
    for path in family.blocks:
        if isinstance(lookup(module, path), (nn.ModuleList, nn.Sequential)):
            return path
    return None


def _tokens(family: Family, module: nn.Module, image_size: tuple[int, int] | None) -> TokenLayout:
    tokens = family.tokens(module)
    if image_size is None or image_size == tokens.image_size:
        return tokens
    return tokens.resized(image_size)


def resolve(family: Family, module: nn.Module, image_size: tuple[int, int] | None = None) -> Layout:
    """Lay a family's row over a live module, for images of its own or of a given size ``(height, width)``.

    Raises:
        UnsupportedModelError: the row does not fit; the message says which path was missing where.
    """
    reason = missing_for(family, module)
    if reason is not None:
        raise UnsupportedModelError(f"{type(module).__name__} is not a {family.name} model: {reason}.")
    blocks_path = _blocks_path(family, module)
    assert blocks_path is not None
    blocks = list(lookup(module, blocks_path))
    n_heads, d_head = family.heads(lookup(blocks[0], family.attention))
    ports: dict[str, Port | Difference | Share] = {}
    absent: dict[str, str] = {}
    strangers = family.strangers(module)
    tokens = _tokens(family, module, image_size)
    packing = None if family.packing is None else family.packing(module, tokens)
    sequence = packing if isinstance(packing, Packing) else None
    for layer, block in enumerate(blocks):
        if layer in strangers:
            absent.update({f"blocks.{layer}.{site}": strangers[layer] for site in BLOCK_SITES})
            continue
        scope = f"{blocks_path}.{layer}"
        for site in BLOCK_SITES:
            name = f"blocks.{layer}.{site}"
            port = next((p for p in family.ports.get(site, ()) if p.applies_to(block)), None)
            if reason := family.lacks(site, block) or _no_results(family, site, block):
                absent[name] = reason
            elif isinstance(port, Difference):
                ports[name] = Difference(f"blocks.{layer}.{port.of}", f"blocks.{layer}.{port.minus}")
            elif isinstance(port, Share):
                ports[name] = port.resolved(scope, n_heads * d_head)
            elif port is not None:
                path = f"{scope}.{port.path}" if port.path else scope
                shape = n_heads, d_head
                ports[name] = replace(port, path=path, scope=scope, head_shape=shape, packing=sequence)
            elif site in _OPTIONAL:
                absent[name] = "the MLP of this block is not gated"
            elif site not in (*TAP_SITES, "attn.result"):
                absent[name] = f"{family.name} does not declare it"
    readout = family.readout(module)
    ports["embed"] = ports.get("blocks.0.resid_pre", Port(f"{blocks_path}.0", "input"))
    for site in GLOBAL_SITES[1:]:
        found = readout.ports.get(site, f"the readout of {family.name} does not name it")
        if isinstance(found, Port):
            ports[site] = replace(found, packing=sequence) if site == "ln_final" else found
        else:
            absent[site] = found
    returns_tuple = family.returns_tuple
    return Layout(
        returns_tuple=returns_tuple(blocks[0]) if callable(returns_tuple) else returns_tuple,
        family=family,
        blocks_path=blocks_path,
        n_layers=len(blocks),
        n_heads=n_heads,
        d_model=family.d_model(module),
        d_head=d_head,
        tokens=tokens,
        readout=readout,
        ports=MappingProxyType(ports),
        absent=MappingProxyType(absent),
        packing=packing,
    )
