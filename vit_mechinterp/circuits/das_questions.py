"""What a distributed alignment search is asked, and the runs that answer it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vit_mechinterp.circuits.alignment import Permutation, Schedule, Training, gate_name, rotation_name
from vit_mechinterp.circuits.das_controls import (
    RANDOM_PATCHES,
    Control,
    random_patch_tokens,
    with_random_patches,
)
from vit_mechinterp.circuits.token_sets import positions_of
from vit_mechinterp.engine.binding.positions import moved_note
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.spec import InjectSubspace, Run, TensorRef, Tokens

if TYPE_CHECKING:
    from vit_mechinterp.engine import ActivationStore
    from vit_mechinterp.model import HookedViT

__all__ = [
    "Case",
    "Options",
    "Question",
    "case_of",
    "check",
    "data_of",
    "interchange_run",
    "tokens_of",
    "with_patches",
]


@dataclass(frozen=True)
class Question:
    """One attribute or one control of it: what to search for, the data to train on, and by split the data to
    measure on. ``prefix`` is what the names of its tensors begin with.
    """

    attribute: str
    control: Control | None
    train: Any
    tests: Mapping[str, Any]
    prefix: str = ""


@dataclass(frozen=True)
class Options:
    """What all searches of one call have in common; the arguments of `das`."""

    layers: Sequence[int] | None
    site: str
    tokens: Tokens
    source_tokens: Tokens
    control_tokens: Tokens
    base: str
    source: str
    label: str
    epochs: int
    batch_size: int
    learning_rate: float
    mask_learning_rate: float
    sparsity: float
    permute_sources: bool
    permutation: Permutation
    schedule: Schedule
    tied: bool
    seed: int
    seeds: Sequence[int] | None
    layers_at_once: int | None
    rows_at_once: int | None
    store: ActivationStore | None
    progress: bool

    @property
    def numbers(self) -> list[int]:
        """The seeds."""
        return [self.seed] if self.seeds is None else list(self.seeds)

    def training(self) -> Training:
        """How subspaces are trained."""
        names = set(Training.__dataclass_fields__) - {"seed"}
        return Training(**{name: getattr(self, name) for name in names}, seed=min(self.numbers))

    def tokens_for(self, control: str | None) -> tuple[Tokens, Tokens]:
        """The tokens that a search pairs, in the base and in the source image."""
        if control in RANDOM_PATCHES:
            return random_patch_tokens(str(control))
        return self.tokens, self.control_tokens if control == "wrong_object" else self.source_tokens


@dataclass(frozen=True)
class Case:
    """One question with one seed: its runs by layer, and what the names of its tensors begin with."""

    question: Question
    seed: int
    prefix: str
    runs: Mapping[int, Run]


def interchange_run(
    layer: int,
    site: str,
    tokens: Tokens,
    source_tokens: Tokens,
    *,
    base: str = "base",
    source: str = "source",
    prefix: str = "",
) -> Run:
    """The run that exchanges a trained subspace, for `execute` with ``tensors=result.tensors``.

    Args:
        layer: the block.
        site: the site within it, without its layer.
        tokens, source_tokens: which tokens of base and source are paired.
        base, source: image columns.
        prefix: of the tensors' names, such as ``"shape."`` for a result of `das_by_attribute`.
    """
    swap = InjectSubspace(
        site=f"blocks.{layer}.{site}",
        tokens=tokens,
        source=source,
        source_tokens=source_tokens,
        basis=TensorRef(prefix + rotation_name(layer)),
        gate=TensorRef(prefix + gate_name(layer)),
    )
    return Run(name=f"layer_{layer}", interventions=(swap,), base=base)


def case_of(question: Question, seed: int, layers: Sequence[int], options: Options) -> Case:
    """The runs of a question from one seed; their names differ between searches on one dataset."""
    prefix = question.prefix if options.seeds is None else f"{question.prefix}seed_{seed}."
    tokens, source_tokens = options.tokens_for(question.control)
    runs = {
        n: interchange_run(
            n, options.site, tokens, source_tokens, base=options.base, source=options.source, prefix=prefix
        )
        for n in layers
    }
    named = {n: run.model_copy(update={"name": prefix + run.name}) for n, run in runs.items()}
    return Case(question, seed, prefix, named)


def with_patches(
    vit: HookedViT, questions: Sequence[Question], labels: Mapping[int, Tensor], options: Options
) -> tuple[list[Question], dict[int, Tensor]]:
    """The questions on data that holds their random patches; all keep sharing one object for each dataset."""
    controls = [c for c in RANDOM_PATCHES if any(question.control == c for question in questions)]
    if not controls:
        return list(questions), dict(labels)
    made: dict[int, Any] = {}
    for data in (data for question in questions for data in data_of(question)):
        if id(data) not in made:
            made[id(data)] = with_random_patches(
                vit, data, controls, tokens=options.tokens, source_tokens=options.source_tokens,
                base=options.base, source=options.source, seed=min(options.numbers),
            )  # fmt: skip
    changed = [
        replace(
            question,
            train=made[id(question.train)],
            tests={split: made[id(data)] for split, data in question.tests.items()},
        )
        for question in questions
    ]
    return changed, {id(made[key]): own for key, own in labels.items()}


def tokens_of(vit: HookedViT, questions: Sequence[Question], options: Options) -> int:
    """How many tokens every object has, where each of them gets a subspace of its own.

    Raises:
        DataError: objects have different numbers of tokens.
    """
    sizes: dict[int, int] = {}
    for question in questions:
        selector, _ = options.tokens_for(question.control)
        for data in {id(own): own for own in data_of(question)}.values():
            found = positions_of(selector, vit, Data(data, vit), options.base, "das, tied=False")
            for example, positions in enumerate(found):
                sizes.setdefault(len(positions), example)
    if len(sizes) > 1:
        said = " and ".join(f"{n} (example {example})" for n, example in list(sizes.items())[:2])
        raise DataError(
            "tied=False gives the first token of every object one subspace, the second another, and so on, "
            f"so all objects need equally many tokens; here they have {said}. Leave it out, or give stimuli "
            f"whose cells lie on the model's grid of {' x '.join(map(str, vit.layout.tokens.patch_size))} px."
            + moved_note(vit, Data(questions[0].train, vit), options.base)
        )
    return next(iter(sizes))


def data_of(question: Question) -> list[Any]:
    """All data of a question."""
    return [question.train, *question.tests.values()]


def check(layers: Sequence[int], options: Options) -> None:
    """Raise SpecError unless layers, site, seeds and groups can be meant."""
    seeds = options.numbers
    if options.site in ("attn.scores", "attn.pattern"):
        raise SpecError(
            f"site={options.site!r} holds one number per key, which are no features to search a subspace of. "
            "Search at 'resid_post' or 'attn_out'."
        )
    if not layers or len(set(layers)) != len(layers) or min(layers) < 0:
        raise SpecError(f"layers={list(layers)}: name at least one block, each once, counted from 0.")
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise SpecError(f"seeds={list(seeds)}: name at least one, each once, none negative.")
    if options.layers_at_once is not None and options.layers_at_once < 1:
        raise SpecError(f"layers_at_once={options.layers_at_once}: a group holds at least 1 layer.")
    if options.rows_at_once is not None and options.rows_at_once < 1:
        raise SpecError(f"rows_at_once={options.rows_at_once}: a forward holds at least 1 row.")
