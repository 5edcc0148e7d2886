"""``circuit`` and ``page``: any standard analysis, of any model, on any images; and pages of results."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vit_mechinterp.commands.circuit_list import CIRCUITS, NEEDS, Entry
from vit_mechinterp.commands.circuit_settings import read_directions, read_metric, read_settings
from vit_mechinterp.errors import DataError, SpecError, suggest

if TYPE_CHECKING:
    from vit_mechinterp.circuits.result import CircuitResult

__all__ = ["CIRCUITS", "circuit", "page"]


def circuit(arguments: argparse.Namespace) -> int:
    """List circuits, print one's options, or run one."""
    if arguments.list or arguments.name is None:
        width = max(map(len, CIRCUITS))
        print(
            "\n".join(f"{name:<{width}}  {entry.text} ({entry.images})" for name, entry in CIRCUITS.items())
        )
        print("\nThey take:")
        print("\n".join(f"{kind:<{width}}  {text}" for kind, text in NEEDS.items()))
        return 0
    from vit_mechinterp.report.collected import collect

    if arguments.name not in CIRCUITS:
        raise SpecError(
            f"There is no circuit {arguments.name!r}.{suggest(arguments.name, CIRCUITS)} Circuits: "
            f"{', '.join(CIRCUITS)}."
        )
    entry = CIRCUITS[arguments.name]
    if arguments.options:
        print(f"{arguments.name}{_signature(entry)}\n\n{inspect.getdoc(entry.function)}")
        return 0
    for flag in ("model", "data", "out"):
        if getattr(arguments, flag) is None:
            raise SpecError(f"circuit {arguments.name} needs --{flag}; it takes {NEEDS[entry.images]}.")
    settings, for_data = read_settings(arguments.set, arguments.name, entry)
    if "folder" in entry.options:
        settings.setdefault("folder", arguments.out / "finished")
    result = _run(arguments, entry, settings, for_data)
    folder = result.save(arguments.out)
    collect(folder, folder)
    print(f"{result.title}\n")
    print("\n".join(f"  {name}: {_said(value)}" for name, value in result.summary.items()))
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    print(f"\nIn {folder}: {', '.join(files)}")
    return 0


def page(arguments: argparse.Namespace) -> int:
    """Put saved results on one page."""
    from vit_mechinterp.report.collected import collect

    path = collect(arguments.results, arguments.out, title=arguments.title)
    print(f"The page: {path}")
    return 0


def _run(
    arguments: argparse.Namespace, entry: Entry, settings: dict[str, Any], for_data: Mapping[str, Any]
) -> CircuitResult:
    if "metric" in settings:
        settings["metric"] = read_metric(settings["metric"])
    if "progress" in entry.options:
        settings["progress"] = not arguments.quiet
    wanted = [
        name
        for name, parameter in entry.options.items()
        if parameter.default is inspect.Parameter.empty and name not in settings
    ]
    if wanted:
        raise SpecError(
            f"circuit {arguments.name} needs {' and '.join(wanted)}: give --set {wanted[0]}=VALUE; "
            "--options says what it is."
        )
    from vit_mechinterp.commands.image_data import image_data
    from vit_mechinterp.commands.models import opened

    vit = opened(arguments.model, arguments.pretrained, arguments.allow_pickle)
    pairs = entry.images == "pairs" and "corruption" not in settings
    given, how = arguments.data, {"n": arguments.n, "options": for_data}
    if entry.images == "result":
        data = [_matched(given, arguments.name)]
    elif entry.images == "training":
        data = [image_data([part], pairs=False, **how) for part in given]
        data = data if len(data) > 1 else _held_out(data[0])
    else:
        data = [image_data(given, pairs=pairs, **how)]
    if "other" in settings and isinstance(settings["other"], str):
        settings["other"] = opened(settings["other"], arguments.pretrained, arguments.allow_pickle)
    if "directions" in settings:
        settings["directions"] = read_directions(settings["directions"], entry, vit)
    return entry.function(vit, *data, **settings)


def _matched(given: Sequence[str], name: str) -> CircuitResult:
    """The result that a circuit goes on from."""
    from vit_mechinterp.circuits.result import CircuitResult

    if len(given) != 1:
        raise SpecError(f"circuit {name} takes {NEEDS['result']}, not {len(given)} paths.")
    return CircuitResult.load(given[0])


def _held_out(data: Any) -> list[Any]:
    """Part a dataset into three quarters to train on and the rest to measure on."""
    cut = len(data) * 3 // 4
    if not 0 < cut < len(data):
        raise DataError(f"{len(data)} examples cannot be parted to train and to measure on. Give more.")
    return [data.select(range(cut)), data.select(range(cut, len(data)))]


def _signature(entry: Entry) -> str:
    shown = (
        name if option.default is inspect.Parameter.empty else f"{name}={option.default!r}"
        for name, option in entry.options.items()
    )
    return f": {', '.join(shown)}"


def _said(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
