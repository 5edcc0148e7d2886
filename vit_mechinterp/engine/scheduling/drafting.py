"""What is left of an experiment once all that need not be computed is left out, before it is cut."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial

import numpy as np
from torch import Tensor

from vit_mechinterp.engine.arrays import IntArray
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.inputs.images import image_numbers
from vit_mechinterp.engine.reduction.alone import Alone
from vit_mechinterp.engine.reduction.anatomy import Anatomy
from vit_mechinterp.engine.reduction.pruning import pruned
from vit_mechinterp.engine.reduction.reach import Reach
from vit_mechinterp.engine.reduction.spelling import Spelling
from vit_mechinterp.engine.rows.inside import starting_inside
from vit_mechinterp.engine.rows.sharing import Sharing
from vit_mechinterp.engine.scheduling.schedule import Schedule
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.output_tokens import output_tokens
from vit_mechinterp.model.sparing import why_nothing_is_spared
from vit_mechinterp.model.structure import adding_up, by_token, follows_from, handed_on
from vit_mechinterp.spec import TensorRef

__all__ = ["draft_of"]


def draft_of(
    vit: HookedViT,
    bound: Bound,
    data: Data | None,
    tensors: Mapping[TensorRef, Tensor] | None,
    *,
    progress: bool = False,
    stored: bool = False,
) -> Schedule:
    """Find what need not be computed and what is shared.

    Args:
        vit: the model.
        bound: the bound runs.
        data: the examples; without them, one stands for all.
        tensors: the given tensors, where they are known.
        progress: show a bar while images are compared, if that takes longer than two seconds.
        stored: whether clean values may be read out of a store, in which what enters blocks is likelier to
            be found than what is inside them.

    Returns:
        A schedule of single rows, all examples in one chunk.
    """
    columns = sorted(bound.image_columns)
    if data is None:
        images = {column: np.array([n]) for n, column in enumerate(columns)}
    else:
        images = image_numbers(data, columns, progress=progress)
    return _drafted(vit, bound, images, tensors, imagined=data is None, stored=stored)


def _drafted(
    vit: HookedViT,
    bound: Bound,
    images: Mapping[str, IntArray],
    tensors: Mapping[TensorRef, Tensor] | None,
    *,
    imagined: bool,
    stored: bool,
) -> Schedule:
    n, by_output = len(next(iter(images.values()))), output_tokens(vit)
    last = frozenset(() if by_output is None else (vit.layout.n_layers - 1,))
    passed_on = cache(partial(handed_on, vit))
    alone = Alone(vit, tensors)
    spelling = Spelling(vit, tensors, alone, passed_on, imagined=imagined)
    anatomy = Anatomy(
        vit.layout,
        spelling.n_heads,
        cache(partial(follows_from, vit)),
        cache(lambda: last | by_token(vit)),
        passed_on,
    )
    reach = Reach(anatomy, by_output, n, tensors, alone, cache(partial(adding_up, vit)), imagined=imagined)
    bound = pruned(bound, reach, spelling, postponing=not stored)
    spares = why_nothing_is_spared(vit.layout) is None
    if spares and not stored:
        bound = starting_inside(bound)
    sites = {edit.site.name for run in bound.runs for edit in run.edits}
    same = passed_on() if "resid_pre" in sites and sites & {"embed", "resid_post"} else frozenset()
    sharing = Sharing(bound, images, imagined=imagined, handed_on=same)
    return Schedule(
        sharing,
        n_layers=vit.layout.n_layers,
        chunk=n,
        width=1,
        one_image=vit.layout.family.one_image,
        spares=spares,
        by_output=by_output,
    )
