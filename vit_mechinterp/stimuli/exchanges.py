"""Pairs of images that differ in one object, for interchange interventions on whole objects.

The discrimination task makes images in pairs that share their two cells: a "different" one, and a "same" one
that shows one of its two objects twice. Each image of a pair is the base of one example here, and the source
of another:

    base       A B    different          base       B B    same
    source     B B    same               source     A B    different
               ^ edited                             ^ edited

Putting the source's edited object (both attributes, at the same place) into the base makes the base show what
the source shows, so the counterfactual label is the source's own. The other object is the same in both
images, up to texture and its position in the cell, so exchanging it should change nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vit_mechinterp.stimuli.columns import check_count, object_columns, to_dataset
from vit_mechinterp.stimuli.discrimination import KIND_NAMES, DiscriminationGenerator
from vit_mechinterp.stimuli.render import to_image_column

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["object_exchanges"]


def object_exchanges(
    split: str = "train",
    n: int = 2000,
    *,
    seed: int = 0,
    canvas: int = 224,
    patch: int = 16,
    cell: int = 32,
    combinations: str = "256-256-256",
    progress: bool = True,
) -> Dataset:
    """Make pairs of images that differ in one whole object as a `datasets.Dataset`.

    The bases are the first ``n`` images of `discrimination` with the same options; with an even ``n``, both
    directions are equally frequent.

    Columns: those of `discrimination`, and ``source`` (image), ``counterfactual_label``; ``edited_object`` (1
    or 2: which of the objects the source shows changed); the places of the edited and the other object as
    ``edited_box``, ``other_box`` (in the base), ``source_box``, ``source_other_box`` (in the source image:
    the same places), and as ``*_tokens``. ``different_kind`` says in what the objects of the "different"
    image of the pair differ. ``progress`` shows a bar if it takes longer than two seconds.

    Raises:
        SpecError: an option does not fit; the message says which do.
    """
    check_count(n, "pair")
    generator = DiscriminationGenerator(
        split, seed=seed, canvas=canvas, patch=patch, cell=cell, combinations=combinations
    )
    batch = generator.batch(0, n + n % 2)
    base, source = np.arange(n), np.arange(n) ^ 1
    objects = np.stack([batch.shape, batch.color], axis=-1)
    # Exactly one of the two objects differs between the images of a pair.
    edited = (objects[base] != objects[source]).any(axis=-1).argmax(axis=-1)
    other = 1 - edited
    columns = {
        "label": batch.label[base],
        "counterfactual_label": batch.label[source],
        "edited_object": edited + 1,
    }
    for name, index in (("edited", edited), ("other", other), ("source", edited), ("source_other", other)):
        columns[f"{name}_box"] = batch.box[base, index]
        columns[f"{name}_tokens"] = batch.tokens[base, index]
    columns |= object_columns(batch.shape[base], batch.color[base], batch.box[base], batch.tokens[base])

    images = to_image_column(batch.pixels, progress=progress)
    different = np.minimum(base, source)
    return to_dataset(
        {"base": [images[i] for i in base], "source": [images[i] for i in source]},
        columns,
        {"different_kind": [KIND_NAMES[batch.different_kind[i]] for i in different]},
    )
