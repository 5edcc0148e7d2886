"""Logit lens: what the model would answer if it stopped after each layer.

Each layer's residual stream takes the place of the last one, and the model's own norm, pooling and head read
it (nostalgebraist 2020; for ViTs Vilas et al. 2023). This fits any readout, attention pooling too. For single
patches every token of the stream is that patch's, so that any pooling reads nothing else. With the directions
of a text encoder (CLIP) layers and patches are read in words.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vit_mechinterp.circuits.cells import BatchSize, kept_in
from vit_mechinterp.circuits.images import image_column, model_view
from vit_mechinterp.circuits.logit_attribution import classes_of
from vit_mechinterp.circuits.logit_lens_figures import captions_of, drawing
from vit_mechinterp.circuits.metrics import Classes, Probability
from vit_mechinterp.circuits.patching_cells import chosen_layers
from vit_mechinterp.circuits.reading import (
    class_names,
    directed,
    interval_columns,
    merged_reasons,
    reading_data,
)
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine import execute
from vit_mechinterp.errors import UnsupportedSiteError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.tail import last_stream
from vit_mechinterp.spec import Interchange, Run

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["logit_lens"]

_TOKENS_AT_ONCE = 256


def logit_lens(
    vit: HookedViT,
    images: Any,
    *,
    answer: Classes = None,
    directions: Float[Tensor, "class d_output"] | None = None,
    names: Sequence[str] | None = None,
    layers: Sequence[int] | Literal["all"] = "all",
    patches: bool = True,
    scale: float = 100.0,
    base: str = "base",
    example: int = 0,
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Read every layer's residual stream, and every patch's, through the model's own norm and head.

    Args:
        vit: the model.
        images: images, a folder, or data; see `image_column`.
        answer: the class to follow: a number, a column, or one per image; by default the predicted one.
        directions: one direction per class, ``[class, d_output]``, such as the text embeddings of class
            names: outputs are compared with them by cosine. Needed for models that give features.
        names: names of the classes.
        layers: the layers to read.
        patches: read every token of ``example`` on its own, too.
        scale: what cosines are multiplied by to make logits (CLIP's logit scale).
        base: the image column.
        example: the image whose patches are read.
        resamples, seed: of the bootstrap over images.
        folder: keeps what has been read, so that the same call goes on where it was stopped.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table: rows of the kind ``image``, one per layer and ``quantity`` (``logit``, ``probability``,
        ``rank`` of the answer, ``agreement`` with the model's own prediction, ``KL`` to its own output in
        nats): mean and interval over images. Rows of the kind ``token`` (one image): ``layer, token``, the
        answer's ``logit`` and ``probability`` as ``value``, and ``top``, the class that is read there, with
        its ``top_probability``. The last layer is the model itself.

    Raises:
        SpecError: a class or layer is out of range, or a model without classes was given no directions.
    """
    check_resampling(resamples, seed)
    data = image_column(images, vit, column=base)
    columns = reading_data(vit, data, base, example, progress=progress)
    along, n_classes = directed(vit, directions, "The logit lens")
    labels = class_names(names, n_classes)
    Probability(answer).check(columns, (n_classes,))
    numbers, left_out = _readable(vit, chosen_layers(vit, layers))
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}

    runs = [_lens(vit, layer, base) for layer in numbers]
    results = execute(vit, runs, data, out=kept_in(folder, vit, data, runs), **how)
    logits = _logits(results.logits, along, scale)
    clean = [Run(name="clean", base=base)]
    final = execute(vit, clean, data, out=kept_in(folder, vit, data, clean), **how)
    own = _logits(final.logits[0], along, scale)
    classes = classes_of(answer, columns, list(range(columns.n)), own)
    table = _image_rows(numbers, logits, own, classes, resamples, seed)
    origins = [results.provenance, final.provenance]
    if patches:
        one = {base: columns.images(base, [example]).cpu()}
        shown = int(classes[example])
        rows, origin = _token_rows(vit, one, numbers, base, along, scale, shown, labels, folder, how)
        table = _joined(table, rows)
        origins.append(origin)
    word = labels[int(classes[example])]
    last = table[(table["kind"] == "image") & (table["layer"] == numbers[-1])].set_index("quantity")["value"]
    agreement = table[(table["kind"] == "image") & (table["quantity"] == "agreement")]
    since = [layer for layer in numbers if (agreement["value"][agreement["layer"] >= layer] > 0.5).all()]
    summary: dict[str, float | int | str] = {
        "images": columns.n,
        "answer's probability, last layer": float(last["probability"]),
        "most predictions are there from layer": min(since) if since else "none",
    }
    missing = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
    return CircuitResult(
        name="logit_lens",
        table=table,
        provenance=provenance(
            *origins,
            left_out=left_out,
            classes=classes.tolist(),
            seed=seed,
            resamples=resamples,
            scale=None if along is None else scale,
        ),
        summary=summary,
        description=_DESCRIPTION + (f"\n\nLeft out: {missing}." if missing else ""),
        captions=captions_of(columns.n, patches, word),
        draw=drawing({"image": model_view(vit, data, base, example)}, vit.layout.tokens, word, n_classes),
    )


def _readable(vit: HookedViT, layers: Sequence[int]) -> tuple[list[int], dict[str, str]]:
    """Part layers into those whose stream can stand for the last one, and reasons for the others."""
    site = last_stream(vit)
    vit.expand([site])
    sites, absent = vit.sites(), vit.layout.absent
    found, left_out = [], {}
    for layer in layers:
        name = f"blocks.{layer}.resid_post"
        if name in absent:
            left_out[name] = absent[name]
        elif sites[name].shape != sites[site].shape:
            left_out[name] = "its tokens are not those of the last stream"
        else:
            found.append(layer)
    if not found:
        raise UnsupportedSiteError(f"No layer can be read: {left_out}.")
    return found, merged_reasons(left_out, vit.layout.n_layers)


def _lens(vit: HookedViT, layer: int, base: str, token: int | str | None = None) -> Run:
    """The run whose last stream is a layer's, or a stream of nothing but one of that layer's tokens."""
    swap = Interchange(
        site=last_stream(vit), source=base, source_site=f"blocks.{layer}.resid_post",
        source_tokens="all" if token is None else [token] * vit.layout.tokens.n_tokens,
    )  # fmt: skip
    name = f"layer {layer}" + ("" if token is None else f", token {token}")
    return Run(name=name, interventions=[swap], base=base)


def _logits(outputs: Tensor, along: Tensor | None, scale: float) -> Tensor:
    if along is None:
        return outputs.float()
    return scale * F.normalize(outputs.float(), dim=-1) @ F.normalize(along.cpu(), dim=-1).T


def _image_rows(
    layers: Sequence[int], logits: Tensor, own: Tensor, classes: Tensor, resamples: int, seed: int
) -> pd.DataFrame:
    import pandas as pd

    index = classes.view(1, -1, 1).expand(len(layers), -1, 1)
    picked = logits.gather(2, index)
    log, log_own = logits.double().log_softmax(2), own.double().log_softmax(1)
    quantities = {
        "logit": picked[..., 0],
        "probability": log.exp().gather(2, index)[..., 0],
        "rank": (logits > picked).sum(2),
        "agreement": logits.argmax(2) == own.argmax(1),
        "KL": (log_own.exp() * (log_own - log)).sum(2),
    }
    frames = []
    for name, values in quantities.items():
        intervals = interval_columns(values.double().numpy(), resamples=resamples, seed=seed)
        frames.append(pd.DataFrame({"kind": "image", "layer": list(layers), "quantity": name, **intervals}))
    return pd.concat(frames, ignore_index=True)


def _token_rows(
    vit: HookedViT, one: Any, layers: Sequence[int], base: str, along: Tensor | None, scale: float,
    answer: int, labels: Sequence[str], folder: str | Path | None, how: dict[str, Any],
) -> tuple[pd.DataFrame, Any]:  # fmt: skip
    """Read every token of one image at every layer: special tokens by their name's first, then patches."""
    import pandas as pd

    layout = vit.layout.tokens
    # A selector can only pick a special token that has a name of its own.
    every_name = dict.fromkeys((*layout.prefix, *layout.suffix))
    special = [name for name in every_name if len(layout.positions(name) or []) == 1]
    own: list[int | str] = [*special, *range(layout.n_patches)]
    every = [(layer, token) for layer in layers for token in own]
    found: list[Tensor] = []
    origin: Any = {}
    for start in range(0, len(every), _TOKENS_AT_ONCE):
        some = every[start : start + _TOKENS_AT_ONCE]
        runs = [_lens(vit, layer, base, token) for layer, token in some]
        results = execute(vit, runs, one, out=kept_in(folder, vit, one, runs), **how)
        found.append(_logits(results.logits[:, 0], along, scale))
        origin = results.provenance
    logits = torch.cat(found)
    first = len(layout.prefix)
    at = [
        first + token if isinstance(token, int) else (layout.positions(token) or [0])[0] for _, token in every
    ]
    top = [labels[k] for k in logits.argmax(1).tolist()]
    best = logits.double().softmax(1).max(1).values.numpy()
    place: dict[str, Any] = {"kind": "token", "layer": [layer for layer, _ in every], "token": at, "top": top}
    place["top_probability"] = best
    values = {"logit": logits[:, answer], "probability": logits.double().softmax(1)[:, answer]}
    frames = [
        pd.DataFrame({**place, "quantity": name, "value": numbers.double().numpy()})
        for name, numbers in values.items()
    ]
    return pd.concat(frames, ignore_index=True), origin


def _joined(image: pd.DataFrame, tokens: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    table = pd.concat([image, tokens], ignore_index=True)
    return table.assign(token=table["token"].astype("Int64"))


_DESCRIPTION = (
    "Every layer's residual stream takes the place of the last one and is read by the model's own norm, "
    "pooling and head, as if the model stopped there; the last layer is the model itself. A patch is read "
    "as if every token of the stream were that patch's. Early layers need not use the last layer's code: a "
    "class that is read there is there, one that is not may still be there in another form."
)
