"""From a native module to a `HookedViT`: the known families, and how to make one more known."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module, metadata
from typing import TypeVar

import torch
from torch import nn

from vit_mechinterp.errors import SpecError, UnsupportedModelError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.layout import Family
from vit_mechinterp.model.nearest import describe_nearest
from vit_mechinterp.model.resolve import missing_for, resolve
from vit_mechinterp.model.sizes import require_size
from vit_mechinterp.spec import BLOCK_SITES

__all__ = ["families", "foresee", "register", "register_adapter", "wrap"]

logger = logging.getLogger(__name__)

ENTRY_POINTS = "vit_mechinterp.adapters"

_REGISTERED: dict[str, Family] = {}
_BUILT_IN: list[Family] = []


Adapter = TypeVar("Adapter", Family, Callable[[], Family])


def register(family: Family, *, replace: bool = False) -> Family:
    """Make one more family known; it is tried before the built-in ones.

    Packages can do the same with an entry point in the group ``vit_mechinterp.adapters`` that names a
    `Family`, or a function without arguments that returns one.

    Args:
        family: the row of metadata.
        replace: let it take the place of a family of the same name that was registered before (a cell of a
            notebook that is run again). The built-in families stay.

    Raises:
        SpecError: a family of that name is registered already, or the row names sites that do not exist.
    """
    _examine(family)
    if replace:
        _REGISTERED.pop(family.name, None)
    if any(known.name == family.name for known in families()):
        raise SpecError(f"A family called {family.name!r} is registered already; choose another name.")
    _REGISTERED[family.name] = family
    return family


def register_adapter(adapter: Adapter, *, replace: bool = False) -> Adapter:
    """Make one more family of ViTs known: a decorator for a function that returns its `Family`.

    The function takes no arguments, is called at once, and is returned unchanged, so it can also stand in
    the entry-point group ``vit_mechinterp.adapters``. A `Family` is taken as well. See
    docs/register_a_vit.md for the way from a model class to its row.

    Raises:
        SpecError: no Family came of it, one of that name is registered already, or it names sites that do
            not exist.
    """
    register(_family_of(adapter), replace=replace)
    return adapter


def _family_of(adapter: object) -> Family:
    made = adapter() if callable(adapter) else adapter
    if not isinstance(made, Family):
        name = getattr(adapter, "__qualname__", repr(adapter))
        raise SpecError(
            f"An adapter is a Family or a function without arguments that returns one; {name} gives a "
            f"{type(made).__name__}."
        )
    return made


def _examine(family: Family) -> None:
    """Refuse slips in a row that would otherwise only show as sites that are missing."""
    if not isinstance(family, Family):
        raise SpecError(f"register takes a Family, not a {type(family).__name__}.")
    for site in (*family.ports, *family.absent):
        if site not in BLOCK_SITES:
            raise SpecError(
                f"The family {family.name!r} names a site {site!r}, which no block has."
                f"{suggest(site, BLOCK_SITES)} Sites of a block: {', '.join(BLOCK_SITES)}."
            )
    lists: dict[str, object] = {"blocks": family.blocks, "attention_scale": family.attention_scale}
    lists |= {f"ports[{site!r}]": ports for site, ports in family.ports.items()}
    for name, value in lists.items():
        if not isinstance(value, tuple):
            raise SpecError(f"{name} of the family {family.name!r} is a tuple, even of one: ({value!r},).")
    for site in ("resid_pre", "resid_post"):
        if not family.ports.get(site):
            raise SpecError(f"The family {family.name!r} has no port for {site}, and every ViT has one.")


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
            family = _family_of(entry.load())
            _examine(family)
        except Exception as error:
            logger.warning("The adapter %s (%s) cannot be loaded: %s", entry.name, entry.value, error)
            continue
        # A module with a decorated function has registered it by being imported.
        if family.name not in _REGISTERED:
            found.append(family)
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
        image_size: height and width in pixels of the images to come, for a module that takes images of
            several sizes (DINOv2 of transformers, ``dynamic_img_size`` of timm); one blank image is tried.
            The module's own by default.
        check: run the fast conformance checks as well (a few dozen small forwards).
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
    for path, part in module.named_modules():
        if hasattr(part, "_orig_mod") or isinstance(part, torch.jit.ScriptModule):
            where = f"{type(module).__name__}.{path}" if path else type(module).__name__
            raise UnsupportedModelError(
                f"{where} is compiled, so what happens inside cannot be seen or edited; wrap the module that "
                "it was made of (and let vit.compile() compile the blocks)."
            )
    family = _describing(module)
    vit = HookedViT(module, resolve(family, module, size), source)
    if size not in (None, family.tokens(module).image_size):
        require_size(vit)
    if check:
        _require_conformance(vit)
    return vit


def foresee(make: Callable[[], nn.Module]) -> None:
    """Refuse an architecture that no family describes before its weights are downloaded.

    It is made without memory; one that cannot be made so is refused, if need be, when it is there.

    Raises:
        UnsupportedModelError: as `wrap` does.
    """
    try:
        with torch.device("meta"):
            module = make()
    except Exception as error:
        logger.debug("Cannot be made without memory: %s", error)
        return
    _describing(module)


def _describing(module: nn.Module) -> Family:
    """The first family that describes a module.

    Raises:
        UnsupportedModelError: none does; for each, what was probed and what was missing, and the nearest.
    """
    probed: dict[str, list[str]] = {}
    known = families()
    for family in known:
        reason = missing_for(family, module)
        if reason is None:
            return family
        probed.setdefault(reason, []).append(family.name)
    lines = [f"No known family of ViTs describes {type(module).__module__}.{type(module).__name__}. Probed:"]
    lines += [f"  {_listed(names)}: {reason}" for reason, names in probed.items()]
    lines += describe_nearest(known, module)
    lines.append(
        "If this is a ViT, describe it with @vit_mechinterp.register_adapter (docs/register_a_vit.md); if it "
        "is a model that holds one, wrap that part of it."
    )
    raise UnsupportedModelError("\n".join(lines))


def _listed(names: list[str]) -> str:
    """Names of families; those that stand around others, such as ``around(timm.vit)``, by the outer name."""
    return ", ".join(dict.fromkeys(name.partition("(")[0] for name in names))


def _require_conformance(vit: HookedViT) -> None:
    from vit_mechinterp.model.conformance import check

    report = check(vit, subset="fast")
    if not report.passed:
        raise UnsupportedModelError(f"{type(vit.module).__name__} fails the conformance checks:\n{report}")
