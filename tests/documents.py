"""Documents whose Python runs: every ``text`` block shows what the ``python`` block before it prints.

``python -m tests.documents`` writes the outputs into the documents.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
DOCUMENTS = (DOCS / "register_a_vit.md", DOCS / "experiments.md")

_BLOCK = re.compile(r"```(python|text)\n(.*?)```", flags=re.DOTALL)


def code(document: str) -> list[str]:
    """The Python blocks."""
    return [match[2] for match in _BLOCK.finditer(document) if match[1] == "python"]


def executed(document: str) -> str:
    """The document with the outputs that its Python has here, run from top to bottom in one namespace."""
    names: dict[str, Any] = {}
    printed = ""

    def renewed(match: re.Match[str]) -> str:
        nonlocal printed
        if match[1] == "text":
            return f"```text\n{printed}```"
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(match[2], "document", "exec"), names)
        printed = output.getvalue()
        return match[0]

    return _BLOCK.sub(renewed, document)


def comparable(document: str) -> str:
    """The document without the sizes of differences that depend on the machine's rounding."""
    document = re.sub(r"exact|largest difference \S+ of the scale", "(difference)", document)
    return re.sub(r"\d(\.\d)?e[+-]\d\d", "(number)", document)


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(executed(path.read_text(encoding="utf-8")), encoding="utf-8")
