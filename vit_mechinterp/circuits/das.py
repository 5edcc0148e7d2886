"""Distributed alignment search: at which layers does a subspace of an object's tokens carry an attribute?

Lepori et al. 2024, "Beyond the Doors of Perception", section 4 and appendix: at every layer a rotation and a
gate are trained on counterfactual pairs (`vit_mechinterp.stimuli.counterfactuals`), then the part of the
edited object's tokens that lies in the gated subspace is exchanged for the source object's, and the answer is
compared with the answer that the exchanged attribute demands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypedDict

from vit_mechinterp.circuits.alignment import Permutation, Schedule
from vit_mechinterp.circuits.backdrop import backdrop_of
from vit_mechinterp.circuits.das_controls import CONTROLS, Control
from vit_mechinterp.circuits.das_data import pairs_by_attribute, splits_of
from vit_mechinterp.circuits.das_questions import Options, Question, interchange_run
from vit_mechinterp.circuits.das_result import assemble
from vit_mechinterp.circuits.das_search import answer
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.errors import SpecError
from vit_mechinterp.spec import TokenBox, Tokens

if TYPE_CHECKING:
    from vit_mechinterp.engine import ActivationStore
    from vit_mechinterp.model import HookedViT

__all__ = ["CONTROLS", "TINY", "Control", "Settings", "das", "das_by_attribute", "interchange_run"]


class Settings(TypedDict, total=False):
    """The keyword arguments of `das` that set the training."""

    epochs: int
    batch_size: int
    learning_rate: float
    mask_learning_rate: float
    sparsity: float


TINY: Final[Settings] = {
    "epochs": 5,
    "batch_size": 32,
    "learning_rate": 5e-3,
    "mask_learning_rate": 1e-1,
}
"""Settings for small models (a width of about 128) and a few hundred pairs: a hundred steps at higher rates
in place of the published 640 steps. ``das(vit, train, test, **TINY)``."""

_EDITED, _SOURCE, _OTHER = (TokenBox(box=f"{name}_box") for name in ("edited", "source", "source_other"))


def das(
    vit: HookedViT,
    train: Any,
    test: Any,
    *,
    attribute: str = "attribute",
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    tokens: Tokens = _EDITED,
    source_tokens: Tokens = _SOURCE,
    control: Control | None = None,
    control_tokens: Tokens = _OTHER,
    base: str = "base",
    source: str = "source",
    label: str = "counterfactual_label",
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    mask_learning_rate: float = 1e-2,
    sparsity: float = 1e-3,
    permute_sources: bool = True,
    permutation: Permutation = "batch",
    schedule: Schedule = "exact",
    tied: bool = True,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    layers_at_once: int | None = None,
    rows_at_once: int | None = None,
    store: ActivationStore | None = None,
    stages: CircuitResult | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Find, layer by layer, the subspace that carries one attribute of an object, and measure by held-out
    interchange accuracy how far it does (distributed alignment search, Lepori et al. 2024).

    Per layer a full orthogonal rotation R and a gate g = sigmoid(m / T) are trained with Adam to minimise
    ``CE(logits, counterfactual label) + sparsity * sum(g)`` under the intervention

        h[T] += (g * (h_src[T_src] R - h[T] R)) R^T

    at all tokens of the object at once. T falls from 1 to 1/200, and the gates are binary when measured. The
    model is frozen: clean forwards are made once, and all layers and seeds are trained in the same growing
    batches, each as if alone.

    The defaults are the published settings, one rotation and gate for all tokens of the object among them
    (``tied=False`` gives every token its own).
    Three details differ from the published code without moving any optimum: the rotation is parametrised by
    the Cayley map instead of the matrix exponential, the temperatures are not rounded to bfloat16, and the
    warm-up's first step is not empty (``schedule="authors"`` gives both of the latter). Its penalty, summed
    over the object's tied tokens and divided by their number, is the sum of the one gate.

    Args:
        vit: the model; nothing of it changes.
        train: counterfactual pairs to train on (a ``datasets.Dataset`` or a mapping of columns), such as
            `vit_mechinterp.stimuli.counterfactuals` makes.
        test: held-out pairs to measure on, or several such sets by the name of the split: ``{"iid": ...,
            "compositional": ...}``. Figures and summary show the first.
        attribute: what the pairs exchange ("shape", "color"); a name for the table and the figure.
        layers: blocks to analyse; all of them if left out. Each is trained as if alone (up to rounding).
        site: the site within each block, a name without its layer.
        tokens: the edited object's tokens in the base image, a selector such as ``{"box": "edited_box"}`` or
            ``{"column": "edited_tokens"}``.
        source_tokens: the source object's tokens in the source image.
        control: search without the thing that is searched for, in training as in measuring.
            ``"wrong_object"`` takes ``control_tokens`` in place of ``source_tokens``; ``"random_patch"``
            takes random patches of both images outside all objects (the columns of boxes, or of tokens, say
            where these are), and ``"random_patch_anywhere"`` any patches, as published;
            ``"random_weights"`` searches the same architecture with fresh weights.
        control_tokens: the other object's tokens in the source image.
        base, source: image columns.
        label: the column of classes that the intervention should lead to.
        epochs, batch_size, learning_rate, mask_learning_rate, sparsity, permute_sources, permutation,
            schedule, tied, seed: see `Training`; ``**TINY`` suits small models. The seed also draws random
            patches and fresh weights.
        seeds: train once from each of these, in place of ``seed``.
        layers_at_once: train the layers in groups of this many, which bounds the clean values held at the
            cost of one clean pass for each group; all at once if left out.
        rows_at_once: most (training, example) pairs in one forward; a step of more takes several. Chosen by
            device and memory if left out, and halved if memory runs out.
        store: where clean values are read from if they are there, and kept if they are not.
        stages: a result of `attention_stages` on this model, whose global scores colour the layers of the
            figures.
        progress: show bars if it takes longer than two seconds.

    Returns:
        A table of one row per seed, split and layer: ``attribute``, ``control`` ("none" or its name),
        ``seed``, ``layer``, ``site``, ``split`` ("test" if there is one), ``accuracy`` (fraction of held-out
        items whose predicted class is the counterfactual label) with ``accuracy_low`` and ``accuracy_high``
        (95 % bootstrap interval over items), ``rank`` (open dimensions of the gate; untied, their mean over
        tokens), ``loss`` (held-out cross-entropy), ``train_loss`` (last epoch, penalty included),
        ``no_effect`` (accuracy if nothing were changed) and ``n`` (held-out items); for
        `rmts_counterfactuals`, also the accuracy of each variant with its interval (``accuracy_same_sample``,
        ...). Figures: ``das_by_layer``; ``das_controls`` with several controls, ``das_splits`` with several
        splits, ``das_variants`` where there are any. ``tensors`` holds ``rotation_<layer>`` ``[d, d]`` and
        ``gate_<layer>`` ``[d]`` (zeros and ones; both with a leading axis of tokens if untied), ready as
        ``basis`` and ``gate`` of an `InjectSubspace`, and as the subspaces of `novel_representations`; with
        ``seeds``, ``seed_<seed>.rotation_<layer>`` and so on. Summary and figure show means over seeds.

    Raises:
        SpecError, DataError, UnsupportedModelError: before the first forward, if anything does not fit.
    """
    heat = backdrop_of(stages, vit)
    options = Options(
        layers=layers,
        site=site,
        tokens=tokens,
        source_tokens=source_tokens,
        control_tokens=control_tokens,
        base=base,
        source=source,
        label=label,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        mask_learning_rate=mask_learning_rate,
        sparsity=sparsity,
        permute_sources=permute_sources,
        permutation=permutation,
        schedule=schedule,
        tied=tied,
        seed=seed,
        seeds=seeds,
        layers_at_once=layers_at_once,
        rows_at_once=rows_at_once,
        store=store,
        progress=progress,
    )
    found = answer(vit, [Question(attribute, control, train, splits_of(test))], options)
    return assemble(found.table, found.tensors, found.records[0], found.chance, heat)


def das_by_attribute(
    vit: HookedViT,
    data: Mapping[str, tuple[Any, Any]],
    *,
    controls: Sequence[Control | None] = (None, "wrong_object"),
    **settings: Any,
) -> CircuitResult:
    """Run `das` for several attributes, each with its controls, and put the tables into one.

    All trainings on equally many examples share their forwards: layers, attributes, controls and seeds are
    trained at once, each as if alone. Clean values of all attributes are held at the same time.

    Args:
        vit: the model.
        data: attribute to its training and held-out pairs: ``{"shape": (train, test), "color": ...}``; each
            ``test`` may be several sets by the name of the split.
        controls: what to run for each attribute; None is the search itself.
        settings: further arguments of `das`, the same for all.

    Returns:
        The rows of every search; ``tensors`` holds ``<attribute>.rotation_<layer>``, and for a control
        ``<attribute>.<control>.rotation_<layer>``; gates likewise. With ``seeds``, ``seed_<seed>.`` stands
        before ``rotation``.

    Raises:
        SpecError, DataError: there is no attribute or no search, or an argument of `das` does not fit.
        TypeError: `das` has no such argument.
    """
    given_pairs = pairs_by_attribute(data, "das_by_attribute", "training pairs, held-out pairs")
    if not controls:
        raise SpecError("Nothing to search: give at least one entry of controls, None for no control.")
    if unknown := sorted(set(settings) - set(_SHARED)):
        raise TypeError(f"das_by_attribute takes no {', '.join(unknown)}. It takes {', '.join(_SHARED)}.")
    parted = {attribute: (train, splits_of(test)) for attribute, (train, test) in given_pairs.items()}
    questions = [
        Question(attribute, control, train, tests, f"{attribute}.{f'{control}.' if control else ''}")
        for attribute, (train, tests) in parted.items()
        for control in controls
    ]
    heat = backdrop_of(settings.get("stages"), vit)
    given = {name: settings.get(name, default) for name, default in _SHARED.items() if name != "stages"}
    found = answer(vit, questions, Options(**given))
    searches = {
        f"{own.attribute}, {own.control or 'none'}": record["training"]
        for own, record in zip(questions, found.records, strict=True)
    }
    record = provenance(*found.records, searches=searches, model=vit.fingerprint())
    del record["training"]
    return assemble(found.table, found.tensors, record, found.chance, heat)


_SHARED: Final[Mapping[str, Any]] = {
    name: value for name, value in (das.__kwdefaults__ or {}).items() if name not in ("attribute", "control")
}
"""What all searches have in common: the keyword arguments of `das`, with their defaults."""
