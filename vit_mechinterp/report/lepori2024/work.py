"""The work behind the page: results on demand, each computed once and kept with the question it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vit_mechinterp.circuits.result import CircuitResult, package_versions
from vit_mechinterp.errors import SpecError
from vit_mechinterp.report.lepori2024.cast import HELD_OUT, SUBJECT, TASK_NAMES, Cast, Player, digest_of
from vit_mechinterp.report.lepori2024.sizes import Sizes
from vit_mechinterp.report.reproduction import Asked
from vit_mechinterp.training.records import Training

__all__ = ["Section", "Work"]


@dataclass(frozen=True)
class Section:
    """One section of the page.

    Attributes:
        name: of its result, which names its folder.
        title: its heading; the model is added.
        compute: makes the result, given the work (for other results) and the player.
        task: whose models it is about; "" for none.
        part: which of them; None for all together.
        needs: how many models of the task there have to be.
        records: the trainings that it is about, where they are not those of a task.
        lacking: what the folder does not hold if there is no such training.
    """

    name: str
    title: str
    compute: Callable[[Work, Player | None], CircuitResult]
    task: str = ""
    part: str | None = None
    needs: int = 1
    records: Callable[[Work], Sequence[Training]] | None = None
    lacking: str = ""


class Work:
    """Computes sections, or takes them from where an earlier call with the same question left them.

    Args:
        asked: what the reproduction is to do.
        cast: the models.
        sizes: how much is computed.
        sections: all sections by name.
    """

    def __init__(self, asked: Asked, cast: Cast, sizes: Sizes, sections: Mapping[str, Section]) -> None:
        self.asked, self.cast, self.sizes = asked, cast, sizes
        self.sections = sections
        self._found: dict[str, CircuitResult] = {}
        self._data: dict[tuple[Any, ...], Any] = {}

    @property
    def device(self) -> str | None:
        """Where models run; None for the CPU."""
        import torch

        return "cuda" if torch.cuda.is_available() else None

    @property
    def how(self) -> dict[str, Any]:
        """Arguments that every circuit takes."""
        return {"progress": self.asked.progress}

    def missing(self, name: str) -> str | None:
        """Why a section cannot be made with these models; None if it can."""
        section = self.sections[name]
        if section.records is not None and not section.records(self):
            return f"{self.cast.where} holds {section.lacking}"
        if not section.task:
            return None
        task = TASK_NAMES[section.task]
        if section.part is not None and self.cast.player(section.task, section.part) is None:
            what = "model" if section.part == SUBJECT else f"{section.part} model"
            if section.part == HELD_OUT:
                what = "model that held objects out of its training (combinations 32-32-224), and was"
            return f"{self.cast.where} holds no {what} trained on {task}"
        if (there := len(self.cast.players(section.task))) < section.needs:
            models = "1 model" if there == 1 else f"{there} models"
            return f"{self.cast.where} holds {models} trained on {task}; {section.needs} are needed"
        return None

    def check(self, name: str) -> None:
        """Raise SpecError if a section cannot be made with these models."""
        if (reason := self.missing(name)) is not None:
            raise SpecError(
                f"{name} cannot be made: {reason}. Train one (docs/training.md) and give the folder of "
                "all trainings with --model, or leave it out."
            )

    def result(self, name: str) -> CircuitResult:
        """Return a section's result under its name.

        Raises:
            SpecError: there is no model for it.
        """
        if name not in self._found:
            self.check(name)
            found = self.at_hand(name)
            if found is None:
                question = self._question(name)
                found = self.asked.keep(self._computed(self.sections[name]), question)
            self._found[name] = found
        return self._found[name]

    def at_hand(self, name: str) -> CircuitResult | None:
        """Return a section's result if it was made already, in this call or in an earlier one; else None."""
        if name in self._found or name not in self.sections or self.missing(name) is not None:
            return self._found.get(name)
        return self.asked.kept(name, self._question(name))

    def as_circuit(self, name: str, circuit: str) -> CircuitResult:
        """Return a section's result under the name of its circuit, as another circuit takes it."""
        return replace(self.result(name), name=circuit)

    def data(self, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Make stimuli once for all sections that look at them."""
        key = (make.__name__, arguments, tuple(sorted(options.items())))
        if key not in self._data:
            self._data[key] = make(*arguments, **options, progress=self.asked.progress)
        return self._data[key]

    def _player(self, section: Section) -> Player | None:
        return None if section.part is None else self.cast.player(section.task, section.part)

    def _computed(self, section: Section) -> CircuitResult:
        player = self._player(section)
        found = section.compute(self, player)
        title, said = section.title, found.description
        if player is not None:
            title = f"{title}: {player.words}"
            if not player.learned:
                said = (
                    f"This model is right on {player.accuracy:.1%} of new images. It has hardly learned the "
                    f"task, and what follows has to be read with that.\n\n{said}"
                )
        return replace(found, name=section.name, title=title, description=said)

    def _question(self, name: str) -> dict[str, Any]:
        """What the result depends on: the section, the sizes, the models and the versions."""
        section = self.sections[name]
        player = self._player(section)
        models = [player.digest] if player is not None else []
        if section.records is not None:
            models = [digest_of(one) for one in section.records(self)]
        elif section.task and section.part is None:
            models = [one.digest for one in self.cast.players(section.task)]
        return {
            "section": name,
            "scale": self.asked.scale,
            "sizes": self.sizes.as_dict(),
            "models": models,
            "versions": package_versions(),
        }
