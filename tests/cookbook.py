"""The cookbook: its Python runs from top to bottom, and every picture is drawn by the block before it.

``python -m tests.cookbook`` draws the pictures anew.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

from PIL import Image

from tests.documents import DOCS
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.figures import png_bytes

COOKBOOK = DOCS / "cookbook.md"

_SMALL = 130_000
"""Bytes of a picture that may keep all its colours."""

_BLOCK = re.compile(r"```python\n(?P<code>.*?)```|!\[[^\]]*\]\((?P<picture>cookbook/[^)]+)\)", flags=re.DOTALL)


def recipes(document: str) -> list[tuple[str, list[str]]]:
    """Every block of Python, and the pictures that follow it."""
    found: list[tuple[str, list[str]]] = []
    for match in _BLOCK.finditer(document):
        if match["code"] is not None:
            found.append((match["code"], []))
        else:
            found[-1][1].append(match["picture"])
    return found


def pictures(document: str) -> Iterator[tuple[str, bytes]]:
    """Run the document, and yield the path of every picture with its PNG file.

    A picture ``cookbook/CIRCUIT-FIGURE.png`` is that figure of ``result`` as the block before left it.
    """
    names: dict[str, Any] = {}
    for code, shown in recipes(document):
        exec(compile(code, "cookbook", "exec"), names)
        for path in shown:
            result = names["result"]
            assert isinstance(result, CircuitResult)
            circuit, figure = path.removeprefix("cookbook/").removesuffix(".png").split("-")
            assert circuit == result.name, (circuit, result.name)
            yield path, _small(png_bytes(result.figures()[figure], dpi=110))


def _small(png: bytes) -> bytes:
    """The same picture in fewer bytes; photographs have 256 colours, so that colour bars stay smooth."""
    with Image.open(io.BytesIO(png)) as image:
        plain, buffer = image.convert("RGB"), io.BytesIO()
        plain.save(buffer, format="png", optimize=True)
        if len(buffer.getvalue()) < _SMALL:
            return buffer.getvalue()
        buffer = io.BytesIO()
        plain.quantize(256, kmeans=1, dither=Image.Dither.NONE).save(buffer, format="png", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    (DOCS / "cookbook").mkdir(exist_ok=True)
    for path, content in pictures(COOKBOOK.read_text(encoding="utf-8")):
        (DOCS / path).write_bytes(content)
