"""Reproductions of papers: sections that are run as far as their figures are asked for, and one page of
them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.errors import SpecError, suggest
from vit_mechinterp.report.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCALES", "Asked", "Reproduced", "Reproduction", "reproduce"]

SCALES = ("tiny", "small")
"""How much is computed: ``tiny`` takes a minute or two on two cores, ``small`` several times as long."""


@dataclass(frozen=True)
class Asked:
    """What a reproduction is to do.

    Attributes:
        scale: one of `SCALES`.
        sections: names of the sections that are wanted.
        model: a model string in place of the default, or None.
        data: name of an image set in place of the default, or None.
        progress: show progress bars.
    """

    scale: str
    sections: frozenset[str]
    model: str | None = None
    data: str | None = None
    progress: bool = True

    def wants(self, *names: str) -> bool:
        """Whether one of these sections is wanted."""
        return any(name in self.sections for name in names)


@dataclass(frozen=True)
class Reproduction:
    """One paper.

    Attributes:
        title: of the page.
        introduction: plain text; what is the paper's, and what is this project's own.
        figures: name of a figure to (name of its result, its name there).
        run: gives the results of the wanted sections, in reading order; a result's name is its section's.
    """

    title: str
    introduction: str
    figures: Mapping[str, tuple[str, str]]
    run: Callable[[Asked], Iterator[CircuitResult]]


@dataclass(frozen=True)
class Reproduced:
    """What a reproduction leaves: the page, and its results in reading order."""

    page: Path
    results: tuple[CircuitResult, ...]

    def __str__(self) -> str:
        lines = []
        for result in self.results:
            lines.append(result.title)
            width = max(map(len, result.summary), default=0)
            for name, value in result.summary.items():
                shown = f"{value:.3f}" if isinstance(value, float) else str(value)
                lines.append(f"  {name:{width}}  {shown:>10}")
        return "\n".join([*lines, "", f"The page: {self.page}"])


def reproduce(
    reproduction: Reproduction,
    out: str | Path,
    *,
    scale: str = "tiny",
    only: Sequence[str] = (),
    model: str | None = None,
    data: str | None = None,
    progress: bool = True,
) -> Reproduced:
    """Run a reproduction and write its page, with a folder per result (table, figures, provenance).

    Args:
        reproduction: the paper.
        out: a folder; made if need be. The page is its ``index.html``.
        scale: one of `SCALES`.
        only: names of figures; what others need is not computed. All by default.
        model: a model string in place of the default.
        data: an image set in place of the default.
        progress: show progress bars.

    Raises:
        SpecError: there is no such scale or figure; the message lists them.
    """
    if scale not in SCALES:
        raise SpecError(f"There is no scale {scale!r}. Scales: {', '.join(SCALES)}.")
    for name in only:
        if name not in reproduction.figures:
            raise SpecError(
                f"There is no figure {name!r}. Figures: {', '.join(reproduction.figures)}."
                f"{suggest(name, reproduction.figures)}"
            )
    wanted = [reproduction.figures[name] for name in only or reproduction.figures]
    asked = Asked(scale, frozenset(section for section, _ in wanted), model, data, progress)
    out = Path(out)
    results = []
    for result in reproduction.run(asked):
        if result.name in asked.sections:
            named = [figure for section, figure in wanted if section == result.name]
            shown = _showing(result, named) if only else result
            shown.save(out / result.name)
            results.append(shown)
    page = Page(title=reproduction.title, introduction=reproduction.introduction, sections=results)
    return Reproduced(page.write(out / "index.html"), tuple(results))


def _showing(result: CircuitResult, names: Iterable[str]) -> CircuitResult:
    """The result with some of its figures alone."""
    kept = set(names)

    def draw(own: CircuitResult) -> dict[str, Figure]:
        drawn: Any = result.draw(own) if result.draw is not None else {}
        return {name: figure for name, figure in drawn.items() if name in kept}

    captions = {name: text for name, text in result.captions.items() if name in kept}
    return replace(result, draw=draw, captions=captions)
