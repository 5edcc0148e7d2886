"""The page is one whole file: well-formed, self-contained, escaped, and it shows the numbers it was given."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.errors import DataError
from vit_mechinterp.report import ComposedRun, Example, Page

HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/a.png> & {{ 7*7 }}"
VOID = {"meta", "img", "rect", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Collects elements and text, and fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID or (tag == "rect" and not self.get_starttag_text().endswith("/>")):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, f"</{tag}> closes out of order"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def read(page: Page) -> Reader:
    reader = Reader()
    reader.feed(page.html())
    reader.close()
    assert not reader._open
    return reader


def circuit(**changes) -> CircuitResult:
    from vit_mechinterp.figures import lines_by_layer

    fields = {
        "name": "sweep",
        "table": pd.DataFrame({"layer": [0, 1], "effect": [0.123456, -1234.5], "tokens": ["cls", "all"]}),
        "provenance": provenance(seed=7),
        "summary": {"best": 0.98765, "where": "layer 1"},
        "description": "First paragraph.\n\nSecond paragraph.",
        "captions": {"line": "What the line shows."},
        "draw": lambda result: {"line": lines_by_layer({"effect": [0.1, 0.9]})},
    }
    return CircuitResult(**{**fields, **changes})


def page(**changes) -> Page:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    fields = {
        "title": "A title",
        "introduction": "Hello.",
        "facts": {"accuracy": 0.97, "images": 1500},
        "examples": [Example(image, "same", {"edited": (4, 8, 20, 24)}), Example(image)],
        "composed": ComposedRun("runs:\n  - name: a  # note\n", "1 forward", pd.DataFrame({"run": ["a"]})),
        "sections": [circuit(), circuit(name="das", title="Alignment")],
    }
    return Page(**{**fields, **changes})


def test_nothing_on_the_page_comes_from_elsewhere() -> None:
    reader = read(page())
    references = [
        value
        for _, attributes in reader.elements
        for key, value in attributes.items()
        if key in {"src", "href", "srcset", "data", "action", "poster", "xlink:href"}
    ]
    assert len(references) > 6
    assert all(value.startswith(("data:", "#")) for value in references)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in reader.elements}
    assert "url(" not in page().html()
    assert "@import" not in page().html()
    assert not re.search(r"https?://", page().html())
    policies = [meta["content"] for meta in reader.named("meta") if "http-equiv" in meta]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_image_is_embedded_and_whole() -> None:
    images = read(page()).named("img")
    assert len(images) == 4
    for image in images:
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        picture = Image.open(io.BytesIO(content))
        picture.load()
        ratio = int(image["width"]) / int(image["height"])
        assert ratio == pytest.approx(picture.width / picture.height, rel=0.01)
        assert image["alt"]


def test_boxes_are_laid_over_their_image_in_its_own_pixels() -> None:
    reader = read(page())
    boxes = [rect for rect in reader.named("rect") if "vector-effect" in rect]
    assert [(box["x"], box["y"], box["width"], box["height"]) for box in boxes] == [
        ("4.0", "8.0", "16.0", "16.0")
    ]
    assert reader.named("svg")[1]["viewbox"] == "0 0 48 32"
    with pytest.raises(DataError, match=r"box 'edited' of an example is \(1, 2, 3\)"):
        page(examples=[Example(Image.new("RGB", (8, 8)), "", {"edited": (1, 2, 3)})]).html()


def test_hostile_text_is_shown_and_never_obeyed() -> None:
    table = pd.DataFrame({HOSTILE: [HOSTILE]})
    hostile = page(
        title=HOSTILE,
        introduction=HOSTILE,
        facts={HOSTILE: HOSTILE},
        examples=[Example(Image.new("RGB", (8, 8)), HOSTILE, {HOSTILE: (0, 0, 4, 4)})],
        examples_note=HOSTILE,
        composed=ComposedRun(f"{HOSTILE}\nkey: {HOSTILE}\n# {HOSTILE}", HOSTILE, table, HOSTILE, HOSTILE),
        sections=[
            circuit(
                title=HOSTILE,
                table=table,
                description=HOSTILE,
                summary={HOSTILE: HOSTILE},
                captions={"line": HOSTILE},
                provenance={HOSTILE: HOSTILE},
            )
        ],
    )
    reader = read(hostile)
    assert not reader.named("script")
    assert all(image["src"].startswith("data:image/png;base64,") for image in reader.named("img"))
    assert len(reader.named("img")) == 2
    assert "".join(reader.text).count("{{ 7*7 }}") >= 16
    assert "evil.example" not in " ".join(attributes.get("src") or "" for _, attributes in reader.elements)


def test_numbers_are_rounded_for_reading_and_whole_in_the_file() -> None:
    reader = read(page())
    text = "".join(reader.text)
    for shown in ("0.123", "−1,234.5", "0.988", "1,500", "layer 1", "First paragraph.", "Second paragraph."):
        assert shown in text
    assert '"seed": 7' in text
    link = next(attributes for attributes in reader.named("a") if "download" in attributes)
    assert link["download"] == "sweep.csv"
    content = base64.b64decode(link["href"].removeprefix("data:text/csv;base64,"))
    pd.testing.assert_frame_equal(pd.read_csv(io.BytesIO(content)), circuit().table, check_exact=True)


def test_a_composed_run_shows_its_images_and_figures() -> None:
    from vit_mechinterp.figures import lines_by_layer

    pair = Example(Image.new("RGB", (40, 16)), "different → same", {"edited object": (0, 0, 8, 8)})
    run = ComposedRun(
        "runs: []",
        "Plan\n  clean forwards\n    none",
        pd.DataFrame({"run": ["a"]}),
        examples=[pair, pair],
        examples_note="Pairs of images.",
        figures={"One dot per image.": lines_by_layer({"a": [0.0, 1.0]})},
    )
    reader = read(page(composed=run, examples=(), sections=()))
    assert len(reader.named("img")) == 3
    assert [
        attributes["class"]
        for attributes in reader.named("div")
        if "gallery" in (attributes.get("class") or "")
    ] == ["gallery wide-pictures"]
    lines = [attributes for attributes in reader.named("span") if attributes.get("class") == "line"]
    assert len(lines) == 3
    text = "".join(reader.text)
    for shown in ("different → same", "edited object", "Pairs of images.", "One dot per image.", "    none"):
        assert shown in text


def test_long_tables_are_cut_and_say_so() -> None:
    long = circuit(table=pd.DataFrame({"layer": range(1000)}))
    text = "".join(read(page(sections=[long])).text)
    assert "The first 400 of 1,000 rows; the CSV file holds all." in text


def test_every_section_is_linked_from_the_contents() -> None:
    reader = read(page())
    targets = {
        attributes["href"][1:] for attributes in reader.named("a") if attributes["href"].startswith("#")
    }
    identifiers = {attributes["id"] for attributes in reader.named("section")}
    assert targets == identifiers == {"stimuli", "composed", "section-1", "section-2"}


def test_an_almost_empty_page_is_a_page(tmp_path) -> None:
    path = Page("Only a title").write(tmp_path / "deep" / "page.html")
    assert "Only a title" in path.read_text(encoding="utf-8")
    assert read(Page("Only a title")).named("section") == []
