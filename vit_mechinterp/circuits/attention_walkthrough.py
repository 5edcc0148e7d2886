"""Walk-through of single heads on one image: which tokens the tokens of an object attend to.

Lepori et al. (2024), Figs. 21 and 22, where one head of CLIP attends within an object from left to right, one
over the whole object, one compares objects, and one uses background tokens as registers.
`attention_roles` says how heads are chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vit_mechinterp.circuits.attention_example import ExampleAttention, attend_in_example
from vit_mechinterp.circuits.attention_parts import default_objects, part_tokens
from vit_mechinterp.circuits.attention_roles import (
    ChosenHead,
    HeadMeasures,
    Heads,
    choose_heads,
    given_heads,
    measure_heads,
    named_heads,
)
from vit_mechinterp.circuits.attention_stages import origin
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.engine.binding.checks import refuse_train_mode
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import UnsupportedModelError
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["attention_walkthrough"]


def attention_walkthrough(
    vit: HookedViT,
    data: Any,
    objects: Sequence[Any] | None = None,
    *,
    display: Sequence[Any] | None = None,
    index: int = 0,
    heads: Heads | None = None,
    base: str = "base",
    progress: bool = True,
) -> CircuitResult:
    """Show on one image where single heads attend from the tokens of an object; nothing is changed.

    Args:
        vit: the model, in eval mode (or without dropout).
        data: images with the places of their objects; heads are chosen by their means over all of them.
        objects, display: token selectors of the objects, see `attention_stages`.
        index: the image that is shown (or the next one in which every object has a patch of its own).
        heads: the heads to show, as (layer, head), or names to these; by default one for each role.
        base: the image column.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per head shown: ``role``, ``layer``, ``head``, ``score`` (the mean over images of what
        it was chosen by), ``queries`` (the object or pair whose tokens are shown: the one with the larger
        share in this image), the shares of these tokens' attention in this image (to their ``own`` object or
        pair, the other ``objects``, ``background``, ``CLS``, ...), which add up to 1, and ``image``. One
        figure, ``walkthrough``: lines from every token to the patches that it attends to.

    Raises:
        SpecError: the model has no attention patterns, or there is no such image or head.
        DataError: a column is missing, or objects have no patches of their own.
        UnsupportedModelError: the model's patches form no plane grid, so there is nothing to draw on.
    """
    refuse_train_mode(vit)
    if len(vit.layout.tokens.grid) != 2:
        grid = "x".join(map(str, vit.layout.tokens.grid))
        raise UnsupportedModelError(f"attention_walkthrough draws on an image; this model's grid is {grid}.")
    named = None if heads is None else named_heads(vit, heads)
    columns = Data(data, vit)
    compared, others = default_objects(columns, objects, display, "attention_walkthrough")
    tokens = part_tokens(vit, columns, compared, base, others)
    shown = tokens.shown(index)
    measures = measure_heads(vit, columns, base, tokens, progress=progress)
    chosen = choose_heads(measures, shown) if named is None else given_heads(named, measures, shown)
    labels = {
        f"{one.name}\nlayer {one.layer}, head {one.head}, {tokens.query_names[one.query]}": one
        for one in chosen
    }
    where = {label: (one.layer, one.head, one.query) for label, one in labels.items()}
    picture = attend_in_example(vit, columns, base, tokens, where, shown)
    assert picture is not None  # the grid is a plane
    return CircuitResult(
        name="attention_walkthrough",
        table=_table(chosen, measures, shown),
        provenance=provenance(
            origin("attention_walkthrough", vit, columns, [*compared, *others], base),
            image=shown,
            heads=None if named is None else {name: list(place) for name, place in named.items()},
        ),
        summary={one.name: f"layer {one.layer}, head {one.head} ({one.score:.2f})" for one in chosen},
        description=_DESCRIPTION,
        captions={"walkthrough": _caption(shown, int(tokens.counted.sum()), named is None)},
        draw=lambda result: {"walkthrough": _figure(result, picture, labels)},
    )


_FACTS = ("role", "layer", "head", "score", "queries", "image")


def _table(chosen: Sequence[ChosenHead], measures: HeadMeasures, shown: int) -> pd.DataFrame:
    import pandas as pd

    tokens = measures.tokens
    n, m = tokens.n_compared, tokens.n_objects
    rows = []
    for one in chosen:
        found = measures.shares[one.layer, shown, one.head, one.query].tolist()
        members = {m: range(n), m + 1: range(n, m)}.get(one.query, [one.query])
        own = sum(found[member] for member in members)
        rest = {"CLS" if name == "cls" else name: found[m + 1 + i] for i, name in enumerate(tokens.names)}
        facts = (one.name, one.layer, one.head, one.score, tokens.query_names[one.query])
        goes = {"own": own, "objects": sum(found[:m]) - own, "background": found[m], **rest}
        rows.append(dict(zip(_FACTS[:-1], facts, strict=True)) | goes | {"image": shown})
    return pd.DataFrame(rows)


_DESCRIPTION = (
    "Single heads on one image: lines lead from every token of an object (or of a pair) to the patches that "
    "it attends to. This only looks; nothing is changed. Heads that were chosen by their numbers are the "
    "clearest cases of their kind, not typical heads."
)


def _caption(shown: int, n_images: int, by_role: bool) -> str:
    how = "The heads were given; each is named by where the attention of its objects goes most."
    if by_role:
        how = (
            f"For each role the head with the largest mean over {n_images} images is shown, no head twice: "
            "the attention to that other token of the object that gets most; the attention within the object "
            "times its evenness; the shares of attention to the other object, to the other pair, to the "
            "background, and to registers, as far as there are any. This choice is this project's own."
        )
    return (
        f"Image {shown}. Ringed: the tokens whose attention is shown, those of the object (between pairs, of "
        "the pair) with the larger share in this image. An arrow leads to each of the three patches that a "
        "token attends to most, if it gets at least a twentieth; its width grows with the attention, and a "
        "dot is attention to the token itself. Bright patches receive most over all these tokens. Below: "
        f"where their attention goes. {how}"
    )


def _figure(result: CircuitResult, picture: ExampleAttention, labels: dict[str, ChosenHead]) -> Figure:
    from vit_mechinterp.figures.links import Links, attention_links

    shares = [column for column in result.table.columns if column not in _FACTS]
    boxes = list(picture.boxes.values())
    panels = {}
    for (label, one), (_, row) in zip(labels.items(), result.table.iterrows(), strict=True):
        goes = ", ".join(f"{column} {row[column]:.2f}" for column in shares if row[column] >= 0.005)
        view = boxes[one.query] if one.within else None
        panels[label] = Links(picture.attention[label], picture.queries[label], goes, view)
    return attention_links(picture.image, panels, boxes=picture.boxes)
