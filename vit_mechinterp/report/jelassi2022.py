"""Jelassi, Sander and Li (2022), Vision Transformers provably learn spatial structure, at the scale of
minutes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.reproduction import Asked, Reproduction

__all__ = ["REPRODUCTION"]

_PHASES, _TRANSFER, _COMPARISON = "association_phases", "structure_transfer", "positional_comparison"
_TRAINED, _OTHER = "patch_association", "patch_association_other"

_SIZES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {
        "phases": {"examples": 2000, "steps": 500},
        "transfer": {"samples": (10, 30, 100, 300), "repeats": 5, "steps": 150, "test_examples": 1000},
        "seeds": (0,),
        "steps": 500,
        "limit": 2000,
    },
    "small": {
        "phases": {"examples": 10000, "steps": 1500},
        "transfer": {"samples": (10, 30, 100, 300, 1000), "repeats": 10},
        "seeds": (0, 1, 2),
        "steps": 1500,
        "limit": 50_000,
    },
}


def _run(asked: Asked) -> Iterator[CircuitResult]:
    from vit_mechinterp.circuits.association_phases import association_phases
    from vit_mechinterp.circuits.structure_transfer import structure_transfer
    from vit_mechinterp.stimuli.spatial import SpatialStructure

    sizes = _SIZES[asked.scale]
    if asked.wants(_PHASES, _TRANSFER):
        structure = SpatialStructure.random(64, 8, dimension=64)
        phases = association_phases(structure, progress=asked.progress, **sizes["phases"])
        yield phases
        if asked.wants(_TRANSFER):
            logits = phases.tensors["logits"]
            yield structure_transfer(structure, logits, progress=asked.progress, **sizes["transfer"])
    yield from _real(asked, sizes)


def _real(asked: Asked, sizes: dict[str, Any]) -> Iterator[CircuitResult]:
    """What is measured on real ViTs."""
    from vit_mechinterp.circuits.patch_association import patch_association
    from vit_mechinterp.circuits.positional_comparison import positional_comparison, trained_vits
    from vit_mechinterp.model import load, wrap
    from vit_mechinterp.training.classifier import ClassifierSettings
    from vit_mechinterp.training.image_sets import image_set

    if asked.wants(_COMPARISON, _TRAINED):
        images = image_set(asked.data or "digits", limit=sizes["limit"])
        settings = ClassifierSettings(patch=max(2, images.size // 8), steps=sizes["steps"])
        models = trained_vits(images, settings, seeds=sizes["seeds"], progress=asked.progress)
        yield positional_comparison(models, images, settings)
        if asked.wants(_TRAINED):
            found = patch_association(wrap(models["positional attention"][0]), progress=asked.progress)
            score = float(found.summary["encodings, corrected association"])
            own = f"The encodings find their neighbours at {score:+.2f}, where a random order finds 0."
            if score < 0.3:
                own += (
                    " Neighbours were not learned here: a few hundred steps on small images leave encodings "
                    "near their random start. The maps that the paper shows are those of a model trained on "
                    "ImageNet; `--model` takes one."
                )
            yield replace(
                found,
                title=f"Patch association: positional attention, trained on {images.name}",
                description=f"{found.description}\n\n{own}",
            )
    if asked.wants(_OTHER):
        name = asked.model or "vmi/discrimination-disentangled"
        found = patch_association(load(name), progress=asked.progress)
        own = (
            "This model was trained on objects at random places of the patch grid, whose images hold no "
            "structure for neighbours to share beyond the two-by-two patches of an object."
        )
        yield replace(
            found,
            name=_OTHER,
            title=f"Patch association: {name}",
            description=found.description + ("" if asked.model else "\n\n" + own),
        )


REPRODUCTION = Reproduction(
    takes_data=True,
    title="Do vision transformers learn spatial structure?",
    introduction=(
        "After Jelassi, Sander and Li, Vision Transformers provably learn spatial structure (2022). Their "
        "data hide a structure that no label names: patches belong to disjoint sets. A model can generalise "
        "without knowing the sets, and learns them all the same (patch association), which makes it learn "
        "new tasks of the same structure from few examples.\n\nWhat is known of the paper here is its "
        "abstract and accounts of others. The data, the one-layer model, its power and slope and its start "
        "follow such an account; the association scores, the learning rates, the downstream task, the "
        "positional attention of ordinary models and all sizes are this project's own. Nothing on this page "
        "is a number of the paper's."
    ),
    figures={
        "phases": (_PHASES, "phases"),
        "attention_matrix": (_PHASES, "attention"),
        "transfer": (_TRANSFER, "transfer"),
        "comparison": (_COMPARISON, "accuracy"),
        "similarity_map": (_TRAINED, "similarity"),
        "positional_attention": (_TRAINED, "attention"),
        "head_scores": (_TRAINED, "scores"),
        "similarity_map_other": (_OTHER, "similarity"),
        "positional_attention_other": (_OTHER, "attention"),
        "head_scores_other": (_OTHER, "scores"),
    },
    run=_run,
)
