"""``models``, ``check`` and ``sites``: what is supported, and what one model shows."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.errors import SpecError, UnsupportedModelError, suggest

if TYPE_CHECKING:
    from vit_mechinterp.catalogue import Catalogue, Entry
    from vit_mechinterp.model import HookedViT

__all__ = ["check", "models", "opened", "sites"]


def models(arguments: argparse.Namespace) -> int:
    """List supported models with their families and the sites that they lack."""
    from vit_mechinterp.catalogue import catalogue

    known = catalogue()
    found = known.select(arguments.library, arguments.search)
    if arguments.json:
        rows = {row.name: {"growth": row.growth, "skip": row.skip} for row in known.rows}
        entries = [{**asdict(entry), **rows[entry.row]} for entry in found]
        print(json.dumps({"versions": known.versions, "models": entries}, indent=2))
        return 0 if found else 1
    if not found:
        print(_not_listed(known, arguments.search, arguments.library))
        return 1
    print("\n".join(_listing(found)))
    print("\n".join(_notes(known, found)))
    return 0


def _listing(entries: Sequence[Entry]) -> Iterable[str]:
    """A line for every model; reasons are numbered, and stand below."""
    reasons: dict[str, int] = {}
    table = [("model", "family", "layout", "lacks (reason below)")]
    for entry in entries:
        by_reason: dict[str, list[str]] = {}
        for site, reason in entry.missing.items():
            by_reason.setdefault(reason, []).append(site)
        lacks = (
            f"{', '.join(sites)} ({reasons.setdefault(reason, len(reasons) + 1)})"
            for reason, sites in by_reason.items()
        )
        name = entry.string or f"transformers.{entry.name}"
        table.append((name, entry.row, entry.layout, "; ".join(lacks)))
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for *cells, last in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        yield "  ".join([*padded, last]).rstrip()
    yield ""
    for reason, number in reasons.items():
        yield f"({number}) {reason}"


def _notes(known: Catalogue, entries: Sequence[Entry]) -> Iterable[str]:
    """What was verified with which versions, and what other packages add."""
    counts = {name: sum(entry.library == name for entry in entries) for name in known.libraries}
    shown = [f"{count} of {name}" for name, count in counts.items() if count]
    yield f"{len(entries)} models ({', '.join(shown)}), verified with {_versions(known.versions)}."
    if counts.get("hf"):
        yield "Those of hf are classes: load a checkpoint of one as 'hf/ORG/NAME'."
    installed = {name: _installed(name) for name in known.versions}
    if differing := {
        name: version for name, version in installed.items() if version and version != known.versions[name]
    }:
        yield f"Installed: {_versions(differing)}; 'vit-mechinterp check MODEL' verifies a model with these."
    for entry in metadata.entry_points(group="vit_mechinterp.adapters"):
        yield f"Another package adds the adapter {entry.name} ({entry.value})."


_DISTRIBUTIONS = {"hf": "transformers", "open_clip": "open_clip_torch"}


def _installed(library: str) -> str | None:
    try:
        return metadata.version(_DISTRIBUTIONS.get(library, library))
    except metadata.PackageNotFoundError:
        return None


def _versions(versions: Any) -> str:
    return ", ".join(f"{_DISTRIBUTIONS.get(name, name)} {version}" for name, version in versions.items())


def _not_listed(known: Catalogue, search: str, library: str | None) -> str:
    """What can be said of a name that is not in the catalogue: timm's are looked at themselves."""
    where = f" of {library}" if library else ""
    text = f"The catalogue lists no model{where} with {search!r} in its name, class or family."
    text += known.near(search)
    if library in (None, "timm"):
        import timm
        import torch

        from vit_mechinterp.model import wrap

        if timm.is_model(search):
            try:
                with torch.device("meta"):
                    module = timm.create_model(search, pretrained=False)
                vit = wrap(module)
            except UnsupportedModelError as error:
                return f"timm/{search} is not supported. {error}"
            return f"timm/{search} is not in the catalogue, and yet it is described: {vit.layout}."
    return text


def check(arguments: argparse.Namespace) -> int:
    """Run the conformance checks on a model."""
    from vit_mechinterp.model.conformance import check

    vit = opened(arguments.model, arguments.pretrained, arguments.allow_pickle)
    size = tuple(arguments.image_size) if arguments.image_size else None
    report = check(vit, subset="fast" if arguments.fast else "all", image_size=size)
    if arguments.json:
        # JSON has no infinity: a difference of shapes or of what is not finite is said in the detail.
        rows = [{**asdict(row), "deviation": _finite(row.deviation)} for row in report.rows]
        absent = dict(vit.layout.absent)
        print(json.dumps({"model": report.model, "passed": report.passed, "rows": rows, "absent": absent}))
    else:
        print(report)
    return 0 if report.passed else 1


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def sites(arguments: argparse.Namespace) -> int:
    """List the sites of a model."""
    from vit_mechinterp.spec import GLOBAL_SITES

    vit = opened(arguments.model, arguments.pretrained, arguments.allow_pickle)
    table = [("site", "shape", "axes", "note")]
    for name, info in vit.sites().items():
        table.append((name, "x".join(map(str, info.shape)), " ".join(info.axes), info.note))
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for *cells, note in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print("  ".join([*padded, note]).rstrip())
    for name, reason in vit.layout.absent.items():
        if name in GLOBAL_SITES:
            print(f"No {name}: {reason}.")
    return 0


def opened(name: str, pretrained: bool = True, allow_pickle: bool = False) -> HookedViT:
    """The model that a command was given: a model string, a folder, or ``module:factory``.

    A factory is a module of torch, or something that returns one when it is called without arguments, in a
    Python module that can be imported from here. What it makes is put in eval mode.

    Raises:
        SpecError: there is no such model, Python module or factory, or the factory fails.
        UnsupportedModelError: no family describes what was made.
    """
    from vit_mechinterp.model import load, wrap

    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        return load(name, pretrained=pretrained, allow_pickle=allow_pickle)
    made = _imported(*name.split(":"))
    from torch import nn

    if isinstance(made, type) or not isinstance(made, nn.Module):
        if not callable(made):
            raise SpecError(f"{name!r} is a {type(made).__name__}, and no module of torch, nor callable.")
        try:
            made = made()
        except Exception as error:
            raise SpecError(
                f"{name!r} could not be called without arguments: {type(error).__name__}: {error}."
            ) from error
    return wrap(made.eval() if isinstance(made, nn.Module) else made)


def _imported(module: str, path: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:
        raise SpecError(
            f"The Python module {module!r} cannot be imported: {type(error).__name__}: {error}."
        ) from error
    for step in path.split("."):
        if not hasattr(found, step):
            names = [name for name in dir(found) if not name.startswith("_")]
            raise SpecError(f"{getattr(found, '__name__', module)} has no {step!r}.{suggest(step, names)}")
        found = getattr(found, step)
    return found
