"""``stimuli``: any stimuli by name, saved as a dataset."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.errors import SpecError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["stimuli"]


def stimuli(arguments: argparse.Namespace) -> int:
    """Make stimuli and save them, or say what there is."""
    from vit_mechinterp.stimuli import build, names
    from vit_mechinterp.stimuli.registry import builder

    if arguments.list:
        width = max(map(len, names()))
        for name in names():
            print(f"{name:{width}}  {_first_sentence(builder(name))}")
        return 0
    if arguments.name is None:
        raise SpecError(f"Name the stimuli: {', '.join(names())} (--list says what they are).")
    if arguments.options:
        print(_described(builder(arguments.name)))
        return 0
    if arguments.out is None:
        raise SpecError("stimuli needs --out FOLDER or --out FILE.parquet (--options says what can be set).")
    _check_free(arguments.out)
    options = _given(arguments.set)
    if arguments.n is not None:
        options["n"] = arguments.n
    as_file = arguments.out.suffix == ".parquet"
    takes = inspect.signature(builder(arguments.name)).parameters
    if "folder" in takes and not as_file:
        # Slow images are kept one by one beside the dataset, so that an interrupted call goes on.
        options.setdefault("folder", str(arguments.out / "images"))
    made = build(arguments.name, progress=not arguments.quiet, **options)
    _save(made, arguments.out, as_file)
    print(f"{len(made)} examples in {arguments.out}. Columns: {', '.join(made.column_names)}")
    return 0


def _check_free(out: Path) -> None:
    """Refuse to write over a dataset, before anything is made."""
    if out.is_file() or (out / "dataset_info.json").exists():
        raise SpecError(f"{out} exists already: name another place, or delete it.")


def _save(made: Dataset, out: Path, as_file: bool) -> None:
    if as_file:
        out.parent.mkdir(parents=True, exist_ok=True)
        made.to_parquet(out)
    else:
        made.save_to_disk(out)


def _given(settings: list[str]) -> dict[str, Any]:
    from vit_mechinterp.spec.documents import load_yaml

    options: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise SpecError(f"--set takes KEY=VALUE, got {setting!r}.")
        options[key] = load_yaml(value, f"--set {key}")
    return options


def _first_sentence(function: Any) -> str:
    text = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".")


def _described(function: Any) -> str:
    taken = [str(parameter) for parameter in inspect.signature(function).parameters.values()]
    return "\n".join([*taken, "", inspect.getdoc(function) or ""])
