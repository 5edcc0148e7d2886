"""From a native module to a `HookedViT`: the known families, and how to make one more known."""

from __future__ import annotations

import logging
from importlib import import_module, metadata

import torch
from torch import nn

from vit_mechinterp.errors import SpecError, UnsupportedModelError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.layout import Family
from vit_mechinterp.model.resolve import missing_for, resolve

__all__ = ["families", "register", "wrap"]

logger = logging.getLogger(__name__)

ENTRY_POINTS = "vit_mechinterp.adapters"

_REGISTERED: dict[str, Family] = {}
_BUILT_IN: list[Family] = []


def register(family: Family) -> Family:
    """Make one more family known; it is tried before the built-in ones.

    Packages can do the same with an entry point in the group ``vit_mechinterp.adapters`` that names a
    `Family`.

    Raises:
        SpecError: a family of that name is registered already.
    """
    if any(known.name == family.name for known in families()):
        raise SpecError(f"A family called {family.name!r} is registered already; choose another name.")
    _REGISTERED[family.name] = family
    return family


def families() -> list[Family]:
    """Every known family, in the order in which they are tried: registered, entry points, built in."""
    if not _BUILT_IN:
        own = import_module("vit_mechinterp.adapters").FAMILIES
        _BUILT_IN.extend([*_from_other_packages(), *own])
    return [*reversed(_REGISTERED.values()), *_BUILT_IN]


def _from_other_packages() -> list[Family]:
    """What entry points name; one that cannot be loaded is reported and left out."""
    found: list[Family] = []
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            family = entry.load()
        except Exception as error:
            logger.warning("The adapter %s (%s) cannot be loaded: %s", entry.name, entry.value, error)
            continue
        if isinstance(family, Family):
            found.append(family)
        else:
            logger.warning("The adapter %s (%s) is no vit_mechinterp Family.", entry.name, entry.value)
    return found


def wrap(
    module: nn.Module | HookedViT,
    *,
    image_size: int | tuple[int, int] | None = None,
    check: bool = False,
    source: str | None = None,
) -> HookedViT:
    """See a native ViT through one set of names; the module is not changed.

    Args:
        module: any module that a known family describes, or one that is wrapped already.
        image_size: height and width in pixels of the images to come, for a module that takes images of any
            size (DINOv2 of transformers, ``dynamic_img_size`` of timm); the module's own by default.
        check: run the conformance checks as well (a few dozen small forwards).
        source: where the module came from (a model string), for its preprocessing.

    Raises:
        UnsupportedModelError: no family describes it; for each, what was probed and what was missing.
        SpecError: the module does not take images of that size.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if isinstance(module, HookedViT):
        if size in (None, module.layout.tokens.image_size):
            if check:
                _require_conformance(module)
            return module
        other = wrap(module.module, image_size=size, check=check, source=source)
        if source is None:
            other.source, other.origin = module.source, module.origin
        return other
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(f"wrap takes a torch module, not {type(module).__name__}.")
    if hasattr(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{type(module).__name__} is compiled, so what happens inside cannot be seen or edited; wrap the "
            "module that it was made of."
        )
    probed: dict[str, list[str]] = {}
    for family in families():
        reason = missing_for(family, module)
        if reason is None:
            vit = HookedViT(module, resolve(family, module, size), source)
            if check:
                _require_conformance(vit)
            return vit
        probed.setdefault(reason, []).append(family.name)
    raise UnsupportedModelError(
        f"No known family of ViTs describes {type(module).__module__}.{type(module).__name__}. Probed:\n"
        + "\n".join(f"  {', '.join(names)}: {reason}" for reason, names in probed.items())
        + "\nIf this is a ViT, describe it with vit_mechinterp.register(Family(...)); if it is a model that "
        "holds one, wrap that part of it."
    )


def _require_conformance(vit: HookedViT) -> None:
    from vit_mechinterp.model.conformance import check

    report = check(vit)
    if not report.passed:
        raise UnsupportedModelError(f"{type(vit.module).__name__} fails the conformance checks:\n{report}")
