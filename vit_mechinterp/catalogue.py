"""The models that are known to be supported: by which family, without which sites, and what was measured.

The facts stand in ``catalogue.json``, which the tests of the model families write and compare. Reading them
loads neither torch nor any model library. What the catalogue lacks may be supported all the same, since
``load`` and ``wrap`` look at the module itself.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from vit_mechinterp.errors import SpecError, suggest

__all__ = ["Catalogue", "Entry", "Row", "catalogue", "read", "summarised"]

FILE = Path(__file__).parent / "catalogue.json"


@dataclass(frozen=True)
class Row:
    """What holds for all models of one family.

    Args:
        name: the family.
        growth: ``"yes"`` if rows may join a batch behind any block, or what stands in the way.
        skip: ``"yes"`` if blocks before the first edit may be skipped, or what stands in the way.
    """

    name: str
    growth: str
    skip: str


@dataclass(frozen=True)
class Entry:
    """One supported model.

    Args:
        library: the word that stands before it in a model string: ``timm``, ``hf``, ...
        name: the name in that library; for transformers the class, with what its configuration chooses.
        row: the family that describes it.
        model: class of the model.
        block: class of its blocks.
        layout: size and tokens as the library makes it by default, or ``""``.
        missing: the sites that it lacks, and why; where blocks differ the reason says which lack it.
        measured: largest differences that the conformance checks found on a small model of the same
            architecture in float32, as shares of the output's scale: ``native`` (wrapped against native
            output), ``explicit`` (attention computed step by step against the fused kernel, over all blocks),
            ``growth`` (rows that join a batch against one run at a time).
        module: the module of the library that defines it.
        checkpoint: a checkpoint of that class on the hub, or ``""``.
    """

    library: str
    name: str
    row: str
    model: str
    block: str
    layout: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)
    module: str = ""
    checkpoint: str = ""

    @property
    def string(self) -> str:
        """The model string that loads it; ``""`` for a class, of which there are many checkpoints."""
        return "" if self.library == "hf" else f"{self.library}/{self.name}"


@dataclass(frozen=True)
class Catalogue:
    """All entries, the families that they belong to, and the versions that they were verified with."""

    versions: Mapping[str, str]
    rows: tuple[Row, ...]
    entries: tuple[Entry, ...]

    @property
    def libraries(self) -> list[str]:
        """The libraries, in the order of the entries."""
        return list(dict.fromkeys(entry.library for entry in self.entries))

    def row(self, name: str) -> Row:
        """What holds for a family."""
        return next(row for row in self.rows if row.name == name)

    def select(self, library: str | None = None, search: str = "") -> list[Entry]:
        """Entries of a library whose name, class, family or checkpoint contains a text, in any case.

        Raises:
            SpecError: there is no such library.
        """
        library = "hf" if library == "transformers" else library
        if library is not None and library not in self.libraries:
            raise SpecError(
                f"The catalogue has no library {library!r}.{suggest(library, self.libraries)} "
                f"It has: {', '.join(self.libraries)}."
            )
        wanted = search.lower()
        return [
            entry
            for entry in self.entries
            if library in (None, entry.library)
            and any(
                wanted in text.lower()
                for text in (entry.name, entry.string, entry.model, entry.row, entry.checkpoint)
            )
        ]

    def near(self, name: str, *, limit: int = 4) -> str:
        """Return ``" Close matches: 'timm/a', 'hf/b'."`` for the model strings nearest to a name, or ``""``.

        Of the checkpoints on the hub it knows one for every class.
        """
        strings: dict[str, str] = {}
        for entry in self.entries:
            string = entry.string or (f"hf/{entry.checkpoint}" if entry.checkpoint else "")
            for key in (string, string.partition("/")[2], string.rpartition("/")[2], entry.name):
                strings.setdefault(_plain(key), string)
        strings = {key: string for key, string in strings.items() if string not in ("", name)}
        found = difflib.get_close_matches(_plain(name), strings, n=2 * limit, cutoff=0.7)
        if not found and len(name) > 3:
            found = [key for key in strings if _plain(name) in key]
        close = list(dict.fromkeys(strings[key] for key in found))[:limit]
        return f" Close matches: {', '.join(map(repr, close))}." if close else ""

    def write(self, file: Path = FILE) -> None:
        """Write the catalogue, one model a line, so that changes can be read."""
        rows = ",\n".join("    " + json.dumps(asdict(row)) for row in self.rows)
        lines = (json.dumps({k: v for k, v in asdict(entry).items() if v}) for entry in self.entries)
        models = ",\n".join("    " + line for line in lines)
        versions = json.dumps(dict(self.versions))
        text = f'{{\n  "versions": {versions},\n  "rows": [\n{rows}\n  ],\n  "models": [\n{models}\n  ]\n}}\n'
        file.write_text(text, encoding="utf-8")


def read(file: Path = FILE) -> Catalogue:
    """Read a catalogue."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = tuple(Row(**row) for row in content["rows"])
    return Catalogue(content["versions"], rows, tuple(Entry(**entry) for entry in content["models"]))


@cache
def catalogue() -> Catalogue:
    """The catalogue that ships with the package."""
    return read()


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def summarised(absent: Mapping[str, str], n_layers: int) -> dict[str, str]:
    """Reasons by full site name, put together by site: ``{"attn.q": "blocks 0-1, 3: in windows"}``."""
    found: dict[str, dict[str, list[int]]] = {}
    plain: dict[str, str] = {}
    for name, reason in absent.items():
        scope, _, rest = name.partition(".")
        layer, _, site = rest.partition(".")
        if scope == "blocks":
            found.setdefault(site, {}).setdefault(reason, []).append(int(layer))
        else:
            plain[name] = reason
    for site, reasons in found.items():
        whole = len(reasons) == 1 and len(next(iter(reasons.values()))) == n_layers
        plain[site] = "; ".join(
            reason if whole else f"{_spans(layers)}: {reason}" for reason, layers in reasons.items()
        )
    return plain


def _spans(layers: Iterable[int]) -> str:
    spans: list[list[int]] = []
    for layer in sorted(layers):
        if spans and spans[-1][1] == layer - 1:
            spans[-1][1] = layer
        else:
            spans.append([layer, layer])
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"block{'s' if len(spans) > 1 or spans[0][0] != spans[0][1] else ''} {shown}"


def without_measurements(entry: Entry) -> Entry:
    """The entry's facts alone, which do not depend on the machine."""
    return replace(entry, measured={})
