"""Saved results of circuits on one page."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.errors import DataError
from vit_mechinterp.report.page import Page

__all__ = ["collect", "page_of", "result_folders"]


def collect(
    folders: str | Path | Sequence[str | Path], out: str | Path, *, title: str = "", introduction: str = ""
) -> Path:
    """Write one self-contained HTML page of saved results and return its path.

    Args:
        folders: folders that `CircuitResult.save` wrote, or folders of such folders, in reading order.
        out: the page, a path that ends in ``.html``; or a folder, which gets an ``index.html``.
        title: heading of the page; by default made of the results' titles.
        introduction: plain text; blank lines part paragraphs.

    Raises:
        DataError: a folder holds no result, or one that cannot be read.
    """
    given = [folders] if isinstance(folders, (str, Path)) else list(folders)
    found = [folder for entry in given for folder in result_folders(entry)]
    results = [CircuitResult.load(folder) for folder in dict.fromkeys(found)]
    titles = Counter(result.title for result in results)
    shown = [
        replace(result, title=f"{result.title} ({folder.name})") if titles[result.title] > 1 else result
        for folder, result in zip(dict.fromkeys(found), results, strict=True)
    ]
    path = Path(out)
    path = path if path.suffix == ".html" else path / "index.html"
    return page_of(shown, title=title, introduction=introduction).write(path)


def page_of(results: Sequence[CircuitResult], *, title: str = "", introduction: str = "") -> Page:
    """Return the page of some results, in reading order.

    Raises:
        DataError: there is none.
    """
    if not results:
        raise DataError("A page needs at least one result.")
    models = list(dict.fromkeys(name for r in results for name in _entries(r.provenance.get("model_source"))))
    facts: dict[str, float | int | str] = {}
    if models:
        facts["model" if len(models) == 1 else "models"] = ", ".join(models)
    counts = {n for result in results for n in _entries(result.provenance.get("examples"))}
    if len(counts) == 1:
        facts["examples"] = counts.pop()
    own = title or (results[0].title if len(results) == 1 else f"{len(results)} analyses")
    return Page(title=own, introduction=introduction, facts=facts, sections=tuple(results))


def result_folders(entry: str | Path) -> list[Path]:
    """Return the folder itself if it holds a result, else those of its folders that do, in order of name.

    Raises:
        DataError: there is none.
    """
    folder = Path(entry)
    if (folder / "result.json").is_file():
        return [folder]
    if folder.is_dir():
        found = (path.parent for path in folder.glob("*/result.json"))
        within = sorted(found, key=lambda path: _natural(path.name))
        if within:
            return within
    raise DataError(
        f"{folder} holds no result of a circuit, neither itself nor in its folders. Give folders that "
        "CircuitResult.save or 'vit-mechinterp circuit ... --out FOLDER' wrote."
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|\D+", name)]


def _entries(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
