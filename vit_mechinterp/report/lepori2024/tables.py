"""The behavioural tables of the paper: which models each is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.lepori2024.cast import TASK_NAMES, Player
from vit_mechinterp.report.lepori2024.work import Section, Work
from vit_mechinterp.training.records import Training, by_condition

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["TABLES", "table_sections"]

TABLES: Final = {
    "table2": "accuracy_discrimination_256",
    "table3": "accuracy_discrimination_32",
    "table6": "accuracy_b32",
    "table_rmts_256": "accuracy_rmts_256",
    "table_rmts_32": "accuracy_rmts_32",
}
"""Figure to section, of the tables of pretrained models; which numbers the paper's tables of such models
on relational match to sample have is not known here."""

_ALL: Final = "256-256-256"


def table_sections() -> Iterator[Section]:
    """The sections of all tables, in the order of the page."""
    for task, name in TASK_NAMES.items():
        yield _section(
            f"accuracy_{task}",
            f"Accuracy on {name}, models from scratch",
            lambda own, task=task: own.config.task == task and not _is_pretrained(own),  # type: ignore[misc]
            f"no model from scratch that was trained on {name}",
        )
    for task, name in TASK_NAMES.items():
        for number in (256, 32):
            yield _section(
                f"accuracy_{task}_{number}",
                f"Accuracy on {name}, pretrained models, {number} combinations",
                lambda own, task=task, number=number: (  # type: ignore[misc]
                    own.config.task == task
                    and own.config.patch < 32
                    and (own.config.combinations == _ALL) == (number == 256)
                    and (_is_pretrained(own) or (own.losses == "none" and isinstance(own.config.model, str)))
                ),
                f"no pretrained model with patches of 14 or 16 px trained on {number} combinations of {name}",
                _is_pretrained,
            )
    yield _section(
        "accuracy_b32",
        "Accuracy of pretrained models with patches of 32 px",
        lambda own: own.config.patch == 32 and _is_pretrained(own),
        "no pretrained model with patches of 32 px",
    )


def _is_pretrained(training: Training) -> bool:
    return isinstance(training.config.model, str) and training.config.pretrained


def _section(
    name: str,
    title: str,
    takes: Callable[[Training], bool],
    lacking: str,
    asks: Callable[[Training], bool] | None = None,
) -> Section:
    """A section on the trainings that ``takes`` accepts, if ``asks`` (or ``takes``) accepts one of them."""

    def of(work: Work) -> list[Training]:
        own = [one for one in work.cast.records if takes(one)]
        return own if any((asks or takes)(one) for one in own) else []

    def compute(work: Work, player: Player | None) -> CircuitResult:
        from vit_mechinterp.circuits.generalization import generalization

        del player
        own = of(work)
        photographs = None
        if any(one.config.task == "discrimination" for one in own):
            photographs = _photographs(work)
        return generalization(
            by_condition(own), n=work.sizes.accuracy, realistic=photographs, device=work.device, **work.how
        )

    return Section(name, title, compute, records=of, lacking=lacking)


def _photographs(work: Work) -> Dataset:
    from vit_mechinterp.stimuli import realistic_discrimination

    found: Dataset = work.data(realistic_discrimination, n=work.sizes.realistic)
    return found
