"""Lepori et al. (2024), Beyond the Doors of Perception: every analysis, at three scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.lepori2024.claims import AGREEMENT, agreement
from vit_mechinterp.report.lepori2024.sizes import SCALES
from vit_mechinterp.report.lepori2024.tables import TABLES
from vit_mechinterp.report.reproduction import Asked, Reproduction

__all__ = ["REPRODUCTION"]


def _run(asked: Asked) -> Iterator[CircuitResult]:
    from vit_mechinterp.report.lepori2024.cast import Cast
    from vit_mechinterp.report.lepori2024.sections import SECTIONS
    from vit_mechinterp.report.lepori2024.verdicts import verdicts
    from vit_mechinterp.report.lepori2024.work import Work

    work = Work(asked, Cast(asked.model), SCALES[asked.scale], SECTIONS)
    wanted = [name for name in SECTIONS if name in asked.sections]
    left_out = {name: reason for name in wanted if (reason := work.missing(name)) is not None}
    for sections in asked.named:
        if sections <= left_out.keys():
            work.check(next(name for name in wanted if name in sections))
    shown = [name for name in wanted if name not in left_out]
    yield from map(work.result, shown)
    claims = verdicts({name: work.result(name) for name in shown})
    yield agreement(claims, asked.scale, left_out)


_FIGURES: Final[Mapping[str, tuple[str, str]]] = {
    "fig1": ("stimuli", "tasks"),
    "fig7": ("stimuli", "objects"),
    "fig8": ("stimuli", "stimuli"),
    "fig9": ("stimuli", "realistic"),
    "table1_discrimination": ("accuracy_discrimination", "table"),
    "table1_discrimination_drawn": ("accuracy_discrimination", "accuracy"),
    "table1_rmts": ("accuracy_rmts", "table"),
    "table1_rmts_drawn": ("accuracy_rmts", "accuracy"),
    **{figure: (section, "table") for figure, section in TABLES.items()},
    **{f"{figure}_drawn": (section, "accuracy") for figure, section in TABLES.items()},
    "fig2_discrimination": ("attention_discrimination", "stages"),
    "fig2_scratch": ("attention_discrimination_scratch", "stages"),
    "fig2_rmts": ("attention_rmts", "stages"),
    "fig2_dino": ("attention_rmts_dino", "stages"),
    "fig15_discrimination": ("attention_discrimination_dinov2", "stages"),
    "fig15_rmts": ("attention_rmts_dinov2", "stages"),
    "fig10_subject": ("attention_realistic_discrimination", "stages"),
    "fig10_dinov2": ("attention_realistic_discrimination_dinov2", "stages"),
    "fig22": ("walkthrough", "walkthrough"),
    "fig3_discrimination": ("das_discrimination", "das_by_layer"),
    "fig3_rmts": ("das_rmts", "das_by_layer"),
    "fig16_discrimination": ("das_discrimination_dinov2", "das_by_layer"),
    "fig16_rmts": ("das_rmts_dinov2", "das_by_layer"),
    "das_held_out_discrimination": ("das_discrimination_held_out", "das_splits"),
    "das_held_out_rmts": ("das_rmts_held_out", "das_splits"),
    "fig4": ("novel_discrimination", "novel_representations"),
    "fig29": ("novel_rmts", "novel_representations"),
    "fig30": ("novel_discrimination_dino", "novel_representations"),
    "fig31": ("novel_rmts_dino", "novel_representations"),
    "fig33": ("novel_rmts_imagenet", "novel_representations"),
    "fig35": ("novel_rmts_mae", "novel_representations"),
    "fig5": ("probe_rmts", "alpha_1"),
    "fig37": ("probe_rmts_dino", "alphas"),
    "fig37_alpha_0.5": ("probe_rmts_dino", "alpha_0.5"),
    "fig37_alpha_1": ("probe_rmts_dino", "alpha_1"),
    "fig37_alpha_2": ("probe_rmts_dino", "alpha_2"),
    "fig39": ("probe_rmts_mae", "alpha_1"),
    "probe_dinov2": ("probe_rmts_dinov2", "alpha_1"),
    "probe_imagenet": ("probe_rmts_imagenet", "alphas"),
    "fig6_discrimination": ("points_discrimination", "disentanglement_generalization"),
    "fig6_rmts": ("points_rmts", "disentanglement_generalization"),
}


def _group(name: str) -> Sequence[str]:
    return [own for own in _FIGURES if own == name or own.startswith(f"{name}_")]


REPRODUCTION = Reproduction(
    title="Beyond the doors of perception: how a vision transformer relates two objects",
    introduction=(
        "After Lepori, Tartaglini, Vong, Serre, Lake and Pavlick, Beyond the Doors of Perception: Vision "
        "Transformers Represent Relations Between Objects (2024). Is there a stage in which a ViT makes "
        "out each object, and one in which it compares them? Do their shape and colour come apart, does "
        "the comparison work on values that it has never met, and does being able to tell objects apart "
        "go with generalising?"
        "\n\nMethods are the paper's as its authors' code has them; what is this project's own, or changed, "
        "is said in each section. Where the code makes an attention share by subtraction, it is measured "
        "here; the code's variants can be asked for by name. The models of the paper are pretrained and "
        "of twelve blocks; at the scales tiny and small, those on this page are ViTs of 1.3 million "
        "parameters trained on these stimuli alone, so numbers are not to be compared, but patterns are: "
        "the last section lists each statement of the paper with the number of its authors' logs beside "
        "ours."
    ),
    figures=_FIGURES,
    groups={
        "fig2": _group("fig2"),
        "fig3": _group("fig3"),
        "das_held_out": _group("das_held_out"),
        "fig6": _group("fig6"),
        "fig10": _group("fig10"),
        "fig15": _group("fig15"),
        "fig16": _group("fig16"),
        "fig37": _group("fig37"),
        "table1": _group("table1"),
        "table7": _group("table1_discrimination"),
        **{figure: _group(figure) for figure in TABLES},
        "fig21": ["fig22"],
    },
    run=_run,
    scales=tuple(SCALES),
    always=(AGREEMENT,),
)
