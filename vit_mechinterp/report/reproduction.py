"""Reproductions of papers: sections that are run as far as their figures are asked for, and one page of
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.errors import DataError, SpecError, suggest
from vit_mechinterp.report.page import Page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCALES", "Asked", "Reproduced", "Reproduction", "reproduce"]

SCALES: Final = ("tiny", "small")
"""How much is computed: ``tiny`` takes minutes on two cores, ``small`` several times as long."""

_ASKED = "asked.json"


@dataclass(frozen=True)
class Asked:
    """What a reproduction is to do.

    Attributes:
        scale: one of the reproduction's scales.
        sections: names of the sections that are wanted.
        named: for every name that was asked for, the sections with its figures; one of them is to be made,
            and others are left out where there is no model for them. All sections if nothing was named.
        model: a model string, or a folder of trained models, in place of the default; or None.
        data: name of an image set in place of the default, or None.
        progress: show progress bars.
        out: where results lie.
    """

    scale: str
    sections: frozenset[str]
    named: tuple[frozenset[str], ...]
    model: str | None = None
    data: str | None = None
    progress: bool = True
    out: Path = field(default=Path("out"))

    def wants(self, *names: str) -> bool:
        """Whether one of these sections is wanted."""
        return any(name in self.sections for name in names)

    def kept(self, name: str, question: Mapping[str, Any]) -> CircuitResult | None:
        """Return the result that an earlier call left in ``out``, if it answered the same question."""
        folder = self.out / name
        try:
            asked = json.loads((folder / _ASKED).read_text(encoding="utf-8"))
            return CircuitResult.load(folder) if asked == _plain(question) else None
        except (OSError, ValueError, DataError):
            return None

    def keep(self, result: CircuitResult, question: Mapping[str, Any]) -> CircuitResult:
        """Write a result and the question that it answers, the question last: without it nothing is kept.

        Returns:
            The result as it lies there, with its pictures, so that nothing is drawn again.
        """
        folder = self.out / result.name
        (folder / _ASKED).unlink(missing_ok=True)
        result.save(folder)
        (folder / _ASKED).write_text(json.dumps(_plain(question), indent=2) + "\n", encoding="utf-8")
        return CircuitResult.load(folder)


@dataclass(frozen=True)
class Reproduction:
    """One paper.

    Attributes:
        title: of the page.
        introduction: plain text; what is the paper's, and what is this project's own.
        figures: name of a figure to (name of its result, its name there).
        run: gives the results of the wanted sections, in reading order; a result's name is its section's.
        groups: name to the figures that it stands for, where one figure of the paper is several here.
        scales: how much can be computed, the least first.
        always: results that are shown whatever is asked for.
        takes_data: whether an image set can be given in place of the default.
    """

    title: str
    introduction: str
    figures: Mapping[str, tuple[str, str]]
    run: Callable[[Asked], Iterator[CircuitResult]]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    scales: Sequence[str] = SCALES
    always: Sequence[str] = ()
    takes_data: bool = False

    def places(self, only: Sequence[str]) -> list[tuple[str, str]]:
        """Return (result, figure) of the named figures, of all without a name.

        Raises:
            SpecError: there is no such figure; the message lists them.
        """
        names: list[str] = []
        for name in only or self.figures:
            if name not in self.figures and name not in self.groups:
                known = list(dict.fromkeys([*self.figures, *self.groups]))
                raise SpecError(
                    f"There is no figure {name!r}. Figures: {', '.join(known)}.{suggest(name, known)}"
                )
            names += self.groups.get(name, [name])
        return [self.figures[name] for name in dict.fromkeys(names)]


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
                lines.append(f"  {name:{width}}  {_shown(value):>10}")
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
        scale: one of the reproduction's scales.
        only: names of figures or of groups of them; what others need is not computed. All by default.
        model: a model string in place of the default.
        data: an image set in place of the default.
        progress: show progress bars.

    Raises:
        SpecError: there is no such scale or figure (the message lists them), or the paper takes no images.
    """
    if data is not None and not reproduction.takes_data:
        raise SpecError(
            f"data={data!r}: this paper is about its own stimuli, so no other images take their place. Leave "
            "it out; model= gives other models."
        )
    if scale not in reproduction.scales:
        raise SpecError(f"There is no scale {scale!r}. Scales: {', '.join(reproduction.scales)}.")
    wanted = reproduction.places(only)
    out = Path(out)
    by_name = tuple(
        frozenset(section for section, _ in reproduction.places(names))
        for names in ([[name] for name in only] or [[]])
    )
    every = frozenset[str]().union(*by_name, reproduction.always)
    asked = Asked(scale, every, by_name, model, data, progress, out)
    results = []
    for result in reproduction.run(asked):
        if result.name in asked.sections:
            named = [figure for section, figure in wanted if section == result.name]
            shown = _showing(result, named) if only and named else result
            if not (out / result.name / _ASKED).exists():
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
    pictures = {name: png for name, png in result.pictures.items() if name in kept}
    return replace(result, draw=draw, captions=captions, pictures=pictures)


def _shown(value: float | int | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.2g}"


def _plain(question: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(question, sort_keys=True, default=str))
