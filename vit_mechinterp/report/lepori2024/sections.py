"""The analyses of the paper, one function each: what is asked of which model, on how many images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.lepori2024.cast import HELD_OUT, SUBJECT, TASK_NAMES, Player
from vit_mechinterp.report.lepori2024.tables import table_sections
from vit_mechinterp.report.lepori2024.work import Section, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ATTRIBUTES", "SECTIONS"]

ATTRIBUTES: Final = ("shape", "color")


def _stimuli(work: Work, player: Player | None) -> CircuitResult:
    from vit_mechinterp.report.stimulus_sheets import stimulus_sheets

    del work, player
    return stimulus_sheets()


def _images(work: Work, player: Player, split: str, n: int) -> Any:
    from vit_mechinterp.stimuli import discrimination, rmts

    make = rmts if player.task == "rmts" else discrimination
    return work.data(make, split, n, combinations=player.training.config.combinations, **player.sizes)


def _pairs(work: Work, player: Player, attribute: str, split: str, n: int) -> Any:
    from vit_mechinterp.stimuli import counterfactuals, rmts_counterfactuals

    make = rmts_counterfactuals if player.task == "rmts" else counterfactuals
    combinations = player.training.config.combinations
    return work.data(make, attribute, n, split=split, combinations=combinations, **player.sizes)


def _attention(work: Work, player: Player | None) -> CircuitResult:
    from vit_mechinterp.circuits.attention_stages import attention_stages

    assert player is not None
    # In DINOv2 every kind of attention is large in layer 0, so its peaks are looked for behind it.
    first = int(player.part == "dinov2")
    images = _images(work, player, "test", work.sizes.attention)
    return attention_stages(player.vit, images, first_peak_layer=first, **work.how)


def _attention_realistic(work: Work, player: Player | None) -> CircuitResult:
    from vit_mechinterp.circuits.attention_stages import attention_stages
    from vit_mechinterp.stimuli import realistic_discrimination

    assert player is not None
    images = work.data(realistic_discrimination, n=work.sizes.realistic)
    first = int(player.part == "dinov2")
    return attention_stages(player.vit, images, first_peak_layer=first, **work.how)


def _walkthrough(work: Work, player: Player | None) -> CircuitResult:
    from vit_mechinterp.circuits.attention_walkthrough import attention_walkthrough

    assert player is not None
    return attention_walkthrough(
        player.vit, _images(work, player, "test", work.sizes.attention), **work.how
    )


def _stages(work: Work, player: Player) -> CircuitResult:
    """The attention analysis of the same model, whose global scores colour the layers."""
    return work.as_circuit(_named("attention", player.task, player.part), "attention_stages")


def _das(work: Work, player: Player | None) -> CircuitResult:
    from vit_mechinterp.circuits.das import das_by_attribute

    assert player is not None
    sizes = work.sizes
    tests = ["test_iid"] + ["test"] * (player.training.config.combinations != "256-256-256")
    data = {
        attribute: (
            _pairs(work, player, attribute, "train", sizes.das_train),
            {split: _pairs(work, player, attribute, split, sizes.das_test) for split in tests},
        )
        for attribute in ATTRIBUTES
    }
    controls: Any = sizes.controls
    return das_by_attribute(
        player.vit, data, controls=controls, stages=_stages(work, player), **sizes.das, **work.how
    )


def _novel(work: Work, player: Player | None) -> CircuitResult:
    from vit_mechinterp.circuits.novel_representations import novel_representations

    assert player is not None
    sizes = work.sizes
    data = {
        attribute: (
            _pairs(work, player, attribute, "val", sizes.novel),
            _pairs(work, player, attribute, "test_iid", sizes.das_test),
        )
        for attribute in ATTRIBUTES
    }
    searched = work.as_circuit(_named("das", player.task, player.part), "das")
    return novel_representations(
        player.vit, data, searched, whole_residual=True, stages=_stages(work, player), **work.how
    )


def _probe(work: Work, player: Player | None) -> CircuitResult:
    from vit_mechinterp.circuits.probe_intervention import probe_intervention

    assert player is not None
    return probe_intervention(
        player.vit,
        _images(work, player, "train", work.sizes.probe_train),
        _images(work, player, "test_iid", work.sizes.probe_test),
        alphas=work.sizes.alphas,
        stages=_stages(work, player),
        **work.how,
    )


def _points(task: str) -> Callable[[Work, Player | None], CircuitResult]:
    def compute(work: Work, player: Player | None) -> CircuitResult:
        from vit_mechinterp.circuits.disentanglement_generalization import disentanglement_generalization

        del player
        models = work.cast.players(task, work.sizes.point_models)
        found = disentanglement_generalization([one for own in models for one in _point(work, own)])
        there = len(work.cast.players(task))
        chosen = f"All {there} models are points."
        if len(models) < there:
            chosen = (
                f"{len(models)} of {there} models are points: of every kind of training the seed that is "
                "right most often, then others as far as there is room."
            )
        layers = work.sizes.point_layers
        where = "all blocks" if layers is None else f"the first {layers} blocks"
        said = (
            f"{chosen} Subspaces were trained in {where}, on {work.sizes.point_train} pairs for each "
            f"attribute, and measured on {work.sizes.point_test}."
        )
        return replace(
            found,
            title=f"{found.title}, {TASK_NAMES[task]}",
            description=f"{found.description}\n\n{said}",
            captions={name: f"{text} {said}" for name, text in found.captions.items()},
        )

    return compute


def _point(work: Work, player: Player) -> Iterator[CircuitResult]:
    """A search and the accuracies of one model."""
    from vit_mechinterp.circuits.das import das_by_attribute
    from vit_mechinterp.circuits.generalization import generalization

    sizes = work.sizes
    layers = list(range(player.vit.layout.n_layers)[: sizes.point_layers])
    search = _searched(work, player, layers)
    if search is None:
        data = {
            attribute: (
                _pairs(work, player, attribute, "train", sizes.point_train),
                _pairs(work, player, attribute, "test_iid", sizes.point_test),
            )
            for attribute in ATTRIBUTES
        }
        search = das_by_attribute(
            player.vit, data, controls=(None,), layers=layers, **sizes.das, **work.how
        )
    yield search
    measured = generalization(
        {player.part: player.training},
        splits=("test_iid", "test", "ood-shape-color"),
        n=sizes.accuracy,
        device=work.device,
        **work.how,
    )
    # Accuracies that the training recorded are those of the weights in its folder, which were searched.
    models = dict.fromkeys(measured.provenance["models"], player.vit.fingerprint())
    yield replace(measured, provenance={**measured.provenance, "models": models})


def _searched(work: Work, player: Player, layers: Sequence[int]) -> CircuitResult | None:
    """The search of the model's own section, if it was made and asked the same of these layers."""
    sizes = work.sizes
    if (sizes.point_train, sizes.point_test) != (sizes.das_train, sizes.das_test):
        return None
    for part in (*_PARTS[player.task], HELD_OUT):
        own = work.cast.player(player.task, part)
        name = _named("das", player.task, part)
        if own is not None and own.training.folder == player.training.folder:
            found = work.at_hand(name)
            if found is not None:
                table = found.table[found.table["layer"].isin(layers) & (found.table["control"] == "none")]
                return replace(found, name="das", table=table)
    return None


def _named(analysis: str, task: str, part: str) -> str:
    return "_".join([analysis, task, *([part] if part != SUBJECT else [])])


_PARTS: Final = {
    "discrimination": (SUBJECT, "scratch", "dino", "dinov2"),
    "rmts": (SUBJECT, "dino", "dinov2", "imagenet", "mae"),
}
_TITLES: Final = {
    "attention": "Attention stages",
    "attention_realistic": "Attention stages on realistic images",
    "das": "Distributed alignment search",
    "novel": "Novel representations",
    "probe": "Probe and intervention",
}


def _sections() -> Iterator[Section]:
    yield Section("stimuli", "Stimuli", _stimuli)
    yield from table_sections()
    for task, parts in _PARTS.items():
        for part in parts:
            yield _of("attention", _attention, task, part)
        yield _of("attention", _attention, task, HELD_OUT)
    for part in (SUBJECT, "dinov2"):
        yield _of("attention_realistic", _attention_realistic, "discrimination", part)
    yield Section("walkthrough", "Single heads on one image", _walkthrough, "discrimination", SUBJECT)
    for task, parts in _PARTS.items():
        for part in parts:
            if part != "scratch":
                yield _of("das", _das, task, part)
        yield _of("das", _das, task, HELD_OUT)
    for task, parts in _PARTS.items():
        for part in parts:
            if part not in ("scratch", "dinov2"):
                yield _of("novel", _novel, task, part)
    for part in _PARTS["rmts"]:
        yield _of("probe", _probe, "rmts", part)
    for task in TASK_NAMES:
        title = f"Disentanglement and generalisation, {TASK_NAMES[task]}"
        yield Section(f"points_{task}", title, _points(task), task, needs=3)


def _of(
    analysis: str, compute: Callable[[Work, Player | None], CircuitResult], task: str, part: str
) -> Section:
    realistic = analysis.endswith("realistic")
    title = _TITLES[analysis] + ("" if realistic else f", {TASK_NAMES[task]}")
    return Section(_named(analysis, task, part), title, compute, task, part)


SECTIONS: Final = {section.name: section for section in _sections()}
"""Every section by name, in the order of the page."""
