"""What a trained subspace reaches without the thing that it is said to carry: the controls of `das`.

Lepori et al. 2024 train a search of its own for every control, on data that the control was applied to:

* ``"wrong_object"``: the source's other object, which lacks the wanted value of the attribute;
* ``"random_patch"``: random patches of base and source that no object covers, as many as the object has;
* ``"random_patch_anywhere"``: the published variant, random patches that may lie on objects;
* ``"random_weights"``: the object itself, in the same architecture with fresh weights (not in the paper).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from vit_mechinterp.circuits.token_sets import positions_of
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError, suggest
from vit_mechinterp.spec import TokenBox, TokenColumn, Tokens

if TYPE_CHECKING:
    from vit_mechinterp.model import HookedViT

__all__ = [
    "CONTROLS",
    "RANDOM_PATCHES",
    "Control",
    "check_control",
    "control_words",
    "random_patch_tokens",
    "with_random_patches",
]

Control = Literal["wrong_object", "random_patch", "random_patch_anywhere", "random_weights"]
CONTROLS: Final[tuple[Control, ...]] = get_args(Control)
RANDOM_PATCHES: Final = ("random_patch", "random_patch_anywhere")

_BOX, _TOKENS = re.compile(r"(.*_)?box(_\d+)?"), re.compile(r".*_tokens")


def check_control(control: str | None) -> None:
    """Raise SpecError unless there is such a control."""
    if control is not None and control not in CONTROLS:
        raise SpecError(
            f"Unknown control {control!r}.{suggest(control, CONTROLS)} Known: {', '.join(CONTROLS)}, or None."
        )


def control_words(control: str) -> str:
    """The name of a control as a reader sees it."""
    return control.replace("_", " ")


def random_patch_tokens(control: str) -> tuple[TokenColumn, TokenColumn]:
    """The selectors of the columns that `with_random_patches` adds, in the base and in the source image."""
    return TokenColumn(column=f"{control}_tokens"), TokenColumn(column=f"{control}_source_tokens")


def with_random_patches(
    vit: HookedViT,
    data: Any,
    controls: Sequence[str],
    *,
    tokens: Tokens,
    source_tokens: Tokens,
    base: str,
    source: str,
    seed: int,
) -> Any:
    """Return the data with random patches for some controls, drawn once and for every example apart.

    Args:
        vit: the model whose patch grid counts.
        data: a ``datasets.Dataset`` or a mapping of columns.
        controls: which of `RANDOM_PATCHES` to draw for.
        tokens, source_tokens: the object in the base and in the source image: how many patches are drawn.
        base, source: the image columns.
        seed: of the draws.

    Raises:
        DataError: fewer patches lie outside all objects than an object has, or boxes of different sizes
            stand in one pair.
    """
    added: dict[str, list[list[int]]] = {}
    if not controls:
        return data
    columns = Data(data, vit)
    here, there = (
        positions_of(selector, vit, columns, image, "das, random patches")
        for selector, image in ((tokens, base), (source_tokens, source))
    )
    for control in controls:
        free = _free(vit, columns, base, source) if control == "random_patch" else None
        both = random_patch_tokens(control)
        for side, (selector, selected) in enumerate(zip(both, (here, there), strict=True)):
            generator = np.random.default_rng((seed, RANDOM_PATCHES.index(control), side))
            rows = []
            for example, own in enumerate(selected):
                among = np.arange(vit.layout.tokens.n_patches) if free is None else free[example]
                if len(among) < len(own):
                    raise DataError(
                        f"Example {example}: {len(among)} patches lie outside all objects, and the control "
                        f"'random_patch' draws {len(own)}. The control 'random_patch_anywhere' draws from "
                        "all patches."
                    )
                rows.append(generator.choice(among, size=len(own), replace=False).tolist())
            added[selector.column] = rows
    if isinstance(data, Mapping):
        return {**data, **added}
    for name, rows in added.items():
        data = data.add_column(name, rows)
    return data


def _free(vit: HookedViT, columns: Data, base: str, source: str) -> list[np.ndarray[Any, Any]]:
    """For every example, the patches that no object of either image covers."""
    boxes = [name for name in columns.columns if _BOX.fullmatch(name)]
    selectors: list[Tokens] = [TokenBox(box=name) for name in boxes]
    if not boxes:
        selectors = [TokenColumn(column=name) for name in columns.columns if _TOKENS.fullmatch(name)]
    if not selectors:
        raise DataError(
            "The control 'random_patch' avoids the objects, and the data has no columns of boxes or tokens "
            f"(such as 'edited_box' or 'edited_tokens'). Columns: {', '.join(columns.columns)}."
        )
    first = len(vit.layout.tokens.prefix)
    taken: list[set[int]] = [set() for _ in range(columns.n)]
    for selector in selectors:
        name = selector.box if isinstance(selector, TokenBox) else getattr(selector, "column", "")
        image = source if name.startswith("source") else base
        found = positions_of(selector, vit, columns, image, f"das, random patches, column {name!r}")
        for own, positions in zip(taken, found, strict=True):
            own.update(position - first for position in positions)
    every = np.arange(vit.layout.tokens.n_patches)
    return [np.setdiff1d(every, list(own)) for own in taken]
