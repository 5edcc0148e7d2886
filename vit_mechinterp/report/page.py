"""One self-contained HTML page: what was asked, what was run, what came out.

The page holds its style, its images and its numbers itself and forbids the browser every request
(Content-Security-Policy), so it can be mailed, archived and opened offline. It runs no script.
"""

from __future__ import annotations

import base64
import io
import json
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.circuits.result import CircuitResult, package_versions
from vit_mechinterp.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from markupsafe import Markup
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["ComposedRun", "Example", "Page"]

_MAX_ROWS = 400
_YAML_KEY = re.compile(r"^(\s*(?:- )*)([\w.]+)(:)(\s.*|)$")


@dataclass(frozen=True)
class Example:
    """One image of the page's gallery.

    Attributes:
        image: a PIL image.
        caption: a few words below it.
        boxes: name to pixel box ``(x0, y0, x1, y1)``, half-open, drawn over the image; one colour per name.
    """

    image: Image
    caption: str = ""
    boxes: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ComposedRun:
    """An experiment shown as the document that it is.

    Attributes:
        yaml: the document.
        plan: the printed plan.
        table: its effect, a few rows.
        description: what the interventions do together.
        title: heading of the section.
        examples: images that it ran on.
        examples_note: what these images and boxes are.
        figures: caption to figure, shown with the table.
    """

    yaml: str
    plan: str
    table: pd.DataFrame
    description: str = ""
    title: str = "One composed run"
    examples: Sequence[Example] = ()
    examples_note: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """Everything on the page, in order.

    Attributes:
        title: heading and window title.
        introduction: plain text; blank lines part paragraphs.
        facts: a few numbers for the head of the page ("accuracy": 0.97).
        examples: images with their boxes.
        examples_note: what the images and boxes are.
        composed: an experiment with its document, plan and effect.
        sections: one per circuit, in reading order.
    """

    title: str
    introduction: str = ""
    facts: Mapping[str, float | int | str] = field(default_factory=dict)
    examples: Sequence[Example] = ()
    examples_note: str = ""
    composed: ComposedRun | None = None
    sections: Sequence[CircuitResult] = ()

    def html(self) -> str:
        """Return the page as HTML. All text is escaped; nothing in it refers to another file or host."""
        import jinja2

        files = resources.files("vit_mechinterp.report")
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        environment.filters.update(brief=_brief, number=_number, paragraphs=_paragraphs, yaml=_yaml)
        template = environment.from_string((files / "page.html.j2").read_text(encoding="utf-8"))
        style = (files / "page.css").read_text(encoding="utf-8")
        return template.render(
            page=self,
            style=_trusted(style),
            examples=_gallery(self.examples),
            composed=self.composed and _composed(self.composed),
            sections=[_section(result) for result in self.sections],
            versions=package_versions(),
        )

    def write(self, path: str | Path) -> Path:
        """Write the page to ``path`` (folders are made if need be) and return the path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path


def _section(result: CircuitResult) -> dict[str, Any]:
    return {
        "result": result,
        "figures": _figures(result),
        "table": _table(result.table),
        "csv": _data_uri(result.table.to_csv(index=False).encode(), "text/csv"),
        "provenance": json.dumps(result.provenance, indent=2, ensure_ascii=False, default=str),
    }


def _figures(result: CircuitResult) -> list[dict[str, Any]]:
    """A result's figures, drawn, or as the files that a loaded result has."""
    drawn = result.figures()
    shown = [_figure(figure, name, result.captions.get(name, "")) for name, figure in drawn.items()]
    left = [name for name in result.pictures if name not in drawn]
    return shown + [_picture(result.pictures[name], name, result.captions.get(name, "")) for name in left]


def _composed(run: ComposedRun) -> dict[str, Any]:
    return {
        "run": run,
        "table": _table(run.table),
        "examples": _gallery(run.examples),
        "figures": [_figure(figure, caption, caption) for caption, figure in run.figures.items()],
    }


def _figure(figure: Figure, name: str, caption: str) -> dict[str, Any]:
    from vit_mechinterp.figures.style import png_bytes

    return _picture(png_bytes(figure), name, caption)


def _picture(png: bytes, name: str, caption: str) -> dict[str, Any]:
    from PIL import Image

    from vit_mechinterp.figures.style import DPI

    with Image.open(io.BytesIO(png)) as image:
        width, height = (round(side / DPI * 100) for side in image.size)
    source = _data_uri(png, "image/png")
    return {"name": name, "source": source, "width": width, "height": height, "caption": caption}


def _gallery(examples: Sequence[Example]) -> dict[str, Any] | None:
    """Lay out images with one colour per name of a box; None without images."""
    names = [name for example in examples for name in example.boxes]
    shown = [_example(example, names) for example in examples]
    wide = any(example["width"] > 1.5 * example["height"] for example in shown)
    return {"examples": shown, "legend": _colours(names), "wide": wide} if shown else None


def _example(example: Example, names: Sequence[str]) -> dict[str, Any]:
    colours = _colours(names)
    width, height = example.image.size
    boxes = []
    for name, box in example.boxes.items():
        if len(box) != 4:
            raise DataError(
                f"The box {name!r} of an example is {tuple(box)}; expected (x0, y0, x1, y1) in pixels."
            )
        x0, y0, x1, y1 = (float(edge) for edge in box)
        boxes.append({"name": name, "x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0, "colour": colours[name]})
    buffer = io.BytesIO()
    example.image.convert("RGB").save(buffer, format="png")
    source = _data_uri(buffer.getvalue(), "image/png")
    return {"source": source, "width": width, "height": height, "caption": example.caption, "boxes": boxes}


def _colours(names: Sequence[str]) -> dict[str, str]:
    from vit_mechinterp.figures.images import box_colours

    return box_colours(names)


def _table(table: pd.DataFrame) -> dict[str, Any]:
    """Lay a table out as text: numbers rounded and marked, so that they align right."""
    rows = [
        [{"text": _number(cell), "numeric": _is_number(cell)} for cell in row]
        for row in table.head(_MAX_ROWS).itertuples(index=False, name=None)
    ]
    columns = [
        {"name": str(name), "numeric": all(row[index]["numeric"] for row in rows)}
        for index, name in enumerate(table.columns)
    ]
    return {"columns": columns, "rows": rows, "total": len(table)}


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(value: object) -> str:
    """Print a cell of a table: three decimals, thousands grouped, an en dash where there is no value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return str(value)
    number = float(value)
    if isinstance(value, numbers.Integral):
        text = f"{int(value):,}"
    elif number != 0 and abs(number) < 5e-4:
        text = f"{number:.1e}"
    else:
        text = f"{number:,.3f}" if abs(number) < 100 else f"{number:,.1f}"
    return text.replace("-", "−")


def _brief(value: object) -> str:
    """Print a number for the head of a section: three significant digits are enough there."""
    if _is_number(value) and not isinstance(value, numbers.Integral):
        number = float(value)  # type: ignore[arg-type]
        if math.isfinite(number) and 1e-3 <= abs(number) < 1000:
            return f"{number:.3g}".replace("-", "−")
    return _number(value)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _yaml(text: str) -> Markup:
    """Colour the keys and comments of a YAML document; everything in it is escaped."""
    from markupsafe import Markup, escape

    lines = []
    for line in text.rstrip().splitlines():
        if line.lstrip().startswith("#"):
            lines.append(Markup('<span class="comment">{}</span>').format(line))
        elif match := _YAML_KEY.match(line):
            indent, key, colon, rest = match.groups()
            lines.append(
                escape(indent) + Markup('<span class="key">{}</span>').format(key) + escape(colon + rest)
            )
        else:
            lines.append(escape(line))
    return Markup("\n").join(lines)


def _trusted(text: str) -> Markup:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704 - the package's own style sheet


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
