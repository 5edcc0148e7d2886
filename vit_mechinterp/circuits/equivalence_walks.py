"""Walks from an image: how far the embedding drifts, where the class flips, and how straight the lines
between images with one embedding are (after Salman, Shams and Liu 2024).

Two questions. First, from an image x along a direction u of length 1: how far can one go in an equivalence
direction (in the null space of the Jacobian) before the embedding moves, and how little in a normal direction
(a singular vector) before the class flips? Second, on the straight line between two images with nearly the
same embedding (an image's match and its target, or two matches of one target): does the embedding stay? If
equivalence sets are piecewise linear, whole stretches of such lines lie in them.

* drift: ``|f(z) - f(x)| / |f(x)|`` at a point z of a walk;
* departure from linearity on the line from a to b, at the share t:
  ``|f((1 - t) a + t b) - ((1 - t) f(a) + t f(b))| / |f(a)|``.

Both measures and the choice of walks are this project's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.embeddings import Embedding
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.spectrum import null_directions, singular_directions
from vit_mechinterp.circuits.statistics import bootstrap_interval
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.tokens import Tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["equivalence_walks"]

_LENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
_SHARES = tuple(np.linspace(0, 1, 11).round(6).tolist())
_DIRECTIONS = ("singular", "random", "null")
_LINES = ("image to match", "match to target", "match to match", "image to target")


def equivalence_walks(
    vit: HookedViT,
    matching: CircuitResult,
    *,
    site: str | None = None,
    tokens: Tokens = "all",
    lengths: Sequence[float] = _LENGTHS,
    shares: Sequence[float] = _SHARES,
    n_directions: int = 2,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> CircuitResult:
    """Walk from images along directions, and along the lines between images, their matches and targets.

    Args:
        vit: the model.
        matching: what `embedding_matching` gave for it.
        site, tokens: where the embedding is read; as in the matching.
        lengths: of the walks along directions, as shares of the length of the image itself.
        shares: places on the lines, from 0 to 1.
        n_directions: directions of every kind per image.
        seed: seeds random directions and the bootstrap.
        batch_size: most rows in one forward.
        progress: show a bar.

    Returns:
        Table, one row per walk and place: ``walk`` (``"singular"``, ``"random"``, ``"null"``, or a line such
        as ``"image to match"``), ``pair``, ``direction``, ``place`` (a length or a share), ``drift``,
        ``departure`` (lines alone), ``same_class`` (as at the start). Figures: ``drift``, ``lines``.

    Raises:
        SpecError: the site is not the matching's; DataError: the result holds no matched images.
    """
    import pandas as pd

    embedding = Embedding.of(vit, site, tokens)
    images = _images(matching)
    matched_at = matching.provenance.get("site")
    if matched_at not in (None, str(embedding)):
        raise SpecError(
            f"The images were matched at {matched_at}, and the walks would read {embedding}: give the same "
            "site and tokens to both."
        )
    rows: list[dict[str, Any]] = []
    n = len(images["base"])
    for pair in tqdm(range(n), desc="walks", unit="image", delay=2, disable=not progress):
        base = images["base"][pair].to(vit.device, vit.dtype)
        for kind, directions in _directions(embedding, base, n_directions, seed + pair, batch_size):
            for number, u in enumerate(directions):
                points = torch.stack([base, *(base + s * float(base.norm()) * u for s in lengths)])
                drift, _, same = _walk(embedding, points, None, batch_size)
                rows += [
                    {"walk": kind, "pair": pair, "direction": number, "place": place, "drift": drift[k + 1],
                     "departure": float("nan"), "same_class": same[k + 1]}
                    for k, place in enumerate(lengths)
                ]  # fmt: skip
        for line, start, end in _lines(images, pair, n):
            a, b = (z.to(vit.device, vit.dtype) for z in (start, end))
            points = torch.stack([a, *((1 - t) * a + t * b for t in shares), b])
            drift, departure, same = _walk(embedding, points, shares, batch_size)
            rows += [
                {"walk": line, "pair": pair, "direction": 0, "place": place, "drift": drift[k + 1],
                 "departure": departure[k], "same_class": same[k + 1]}
                for k, place in enumerate(shares)
            ]  # fmt: skip
    table = pd.DataFrame(rows)
    return CircuitResult(
        name="equivalence_walks",
        table=table,
        provenance=provenance(
            {"model_fingerprint": vit.fingerprint()}, site=str(embedding), seed=seed
        ),
        summary=_summary(table, lengths),
        description=(
            "Walks along singular directions leave the embedding soon, walks along null directions late. On "
            "the line from a match to its target the two ends look different and share an embedding; how far "
            "the embedding departs in between tells how straight their equivalence set is."
        ),
        captions={
            "drift": "Drift of the embedding along directions; means over images with 95 % intervals.",
            "lines": "Departure of the embedding from the straight line between its ends' values.",
        },
        draw=_draw,
    )


def _images(matching: CircuitResult) -> dict[str, Tensor]:
    missing = [name for name in ("base", "target", "matched") if name not in matching.tensors]
    if missing:
        raise DataError(
            f"The result {matching.name!r} holds no {' and no '.join(missing)} images: give the result of "
            "embedding_matching."
        )
    return dict(matching.tensors)


def _directions(
    embedding: Embedding, x: Tensor, n: int, seed: int, batch_size: int
) -> Iterator[tuple[str, Tensor]]:
    spectrum = singular_directions(
        embedding, x, max(n, 8), tolerance=1e-2, seed=seed, batch_size=batch_size
    )
    random = torch.randn(n, *x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    null, _ = null_directions(embedding, x, random, spectrum, batch_size=batch_size)
    for kind, directions in zip(_DIRECTIONS, (spectrum.directions[:n], random, null), strict=True):
        length = directions.flatten(1).norm(dim=1).reshape(-1, *[1] * x.ndim)
        yield kind, (directions / length).to(x)


def _lines(images: dict[str, Tensor], pair: int, n: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    base, matched, target = (images[name][pair] for name in ("base", "matched", "target"))
    yield "image to match", base, matched
    yield "match to target", matched, target
    yield "image to target", base, target
    # Another image that was brought to the same embedding.
    others = [i for i in range(n) if i != pair and torch.equal(images["target"][i], target)]
    if others:
        yield "match to match", matched, images["matched"][others[0]]


def _walk(
    embedding: Embedding, points: Tensor, shares: Sequence[float] | None, batch_size: int
) -> tuple[list[float], list[float], list[bool]]:
    """Drift and class at every point, the first being the start; departure at the shares of a line, whose
    points are its start, the shares', and its end.
    """
    values, classes = [], []
    with torch.no_grad():
        for first in range(0, len(points), batch_size):
            output, cache = embedding.vit.run(points[first : first + batch_size], capture=[embedding.site])
            values.append(embedding.select(cache[embedding.site]))
            classes.append(output.argmax(-1) if output.ndim == 2 else torch.zeros(len(output)))
    value, answer = torch.cat(values), torch.cat(classes)
    length = value[0].norm().clamp_min(1e-30)
    drift = ((value - value[0]).norm(dim=1) / length).tolist()
    departure: list[float] = []
    if shares is not None:
        t = torch.tensor(shares, device=value.device, dtype=value.dtype)[:, None]
        straight = (1 - t) * value[0] + t * value[-1]
        departure = ((value[1:-1] - straight).norm(dim=1) / length).tolist()
    return drift, departure, (answer == answer[0]).tolist()


def _summary(table: pd.DataFrame, lengths: Sequence[float]) -> dict[str, float | int | str]:
    summary: dict[str, float | int | str] = {}
    for kind in _DIRECTIONS:
        own = table[table["walk"] == kind]
        moved = own[own["drift"] > 0.1].groupby(["pair", "direction"])["place"].min()
        walks = own.groupby(["pair", "direction"]).ngroups
        beyond = [max(lengths) * 2] * (walks - len(moved))
        summary[f"median length to a drift of 10 %, {kind}"] = float(np.median([*moved.tolist(), *beyond]))
        flipped = own[~own["same_class"]].groupby(["pair", "direction"]).ngroups
        summary[f"walks that change the class, {kind}"] = flipped / walks
    for line in _LINES:
        own = table[table["walk"] == line]
        if len(own):
            summary[f"largest departure, {line}"] = float(own.groupby("pair")["departure"].max().mean())
    return summary


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures.matching import drift_along

    table = result.table
    drift = {kind: _curve(table[table["walk"] == kind], "drift") for kind in _DIRECTIONS}
    lines = {
        line: _curve(table[table["walk"] == line], "departure")
        for line in _LINES
        if (table["walk"] == line).any()
    }
    return {
        "drift": drift_along(
            drift, label="length of the walk, share of the image's own", value="drift |f(z) - f(x)| / |f(x)|"
        ),
        "lines": drift_along(
            lines, label="place on the line", value="departure from the straight line", logarithmic=False
        ),
    }


def _curve(own: pd.DataFrame, column: str) -> tuple[list[float], list[float], list[float], list[float]]:
    means = own.groupby(["place", "pair"])[column].mean().unstack("pair")
    values = means.to_numpy()
    low, high = bootstrap_interval(values)
    return means.index.tolist(), values.mean(axis=1).tolist(), low.tolist(), high.tolist()
