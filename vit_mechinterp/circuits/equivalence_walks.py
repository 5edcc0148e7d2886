"""Walks from an image: how far the embedding drifts, where the class flips, and how straight the lines
between images with one embedding are (after Salman, Shams and Liu 2024).

Two questions. First, from an image x along a direction u of length 1: how far can one go in an equivalence
direction (in the null space of the Jacobian) before the embedding moves, and how little in a normal direction
(a singular vector) before the class flips? Second, on the straight line between two images with nearly the
same embedding (an image's match and its target, or two matches of one target): does the embedding stay? If
equivalence sets are piecewise linear, whole stretches of such lines lie in them.

Walks along directions go both ways, since neither is preferred.

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
from numpy.typing import NDArray
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

_LENGTHS = tuple(np.geomspace(1e-3, 1, 13).round(6).tolist())
_SHARES = tuple(np.linspace(0, 1, 11).round(6).tolist())
_DIRECTIONS = ("singular", "random", "null")
_DRIFT = 0.1
"""Drift (on lines, departure) from which on the embedding counts as moved."""
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
        as ``"image to match"``), ``pair``, ``direction``, ``way`` (1 or -1), ``place`` (a length or a share),
        ``drift``, ``departure`` (lines alone), ``same_class`` (as at the start). Figures: ``drift``,
        ``reach`` (how far to a drift of 10 %, and to another class), ``lines``.

    Raises:
        SpecError: the site is not the matching's, or a length or share is out of range; DataError: the result
            holds no matched images.
    """
    import pandas as pd

    fits = lengths and min(lengths) > 0 and shares and 0 <= min(shares) <= max(shares) <= 1
    if not fits or n_directions < 1:
        raise SpecError(
            f"lengths={tuple(lengths)} are positive, shares={tuple(shares)} lie between 0 and 1, and "
            f"n_directions={n_directions} is at least 1."
        )
    lengths = sorted(lengths)
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
            # All walks of one kind are one batch behind their common start.
            ways = [(n, way, s) for n in range(len(directions)) for way in (1, -1) for s in lengths]
            far = float(base.float().norm())
            points = torch.stack([base, *((base + way * s * far * directions[n]) for n, way, s in ways)])
            drift, _, same = _walk(embedding, points.to(vit.dtype), None, batch_size)
            rows += [
                {"walk": kind, "pair": pair, "direction": number, "way": way, "place": place,
                 "drift": drift[k + 1], "departure": float("nan"), "same_class": same[k + 1]}
                for k, (number, way, place) in enumerate(ways)
            ]  # fmt: skip
        for line, start, end in _lines(images, pair, n):
            a, b = (z.to(vit.device, vit.dtype) for z in (start, end))
            points = torch.stack([a, *((1 - t) * a + t * b for t in shares), b])
            drift, departure, same = _walk(embedding, points, shares, batch_size)
            rows += [
                {"walk": line, "pair": pair, "direction": 0, "way": 1, "place": place, "drift": drift[k + 1],
                 "departure": departure[k], "same_class": same[k + 1]}
                for k, place in enumerate(shares)
            ]  # fmt: skip
    table = pd.DataFrame(rows)
    return CircuitResult(
        name="equivalence_walks",
        table=table,
        provenance=provenance(
            {"model_fingerprint": vit.fingerprint()},
            site=str(embedding),
            lengths=lengths,
            shares=shares,
            n_directions=n_directions,
            matching=matching.provenance,
            seed=seed,
        ),
        summary=_summary(table),
        description=(
            "From every image, walks go along singular, random and null directions: how far until the "
            "embedding has moved, and until the class is another one? A null direction is one to first order "
            "alone: far out the embedding bends away from it. On the line from a match to its target the two "
            "ends look different and share an embedding; how far the embedding departs in between tells how "
            "straight their equivalence set is."
        ),
        captions={
            "drift": "Drift of the embedding along directions, both ways; means over images with 95 % "
            "bootstrap intervals.",
            "reach": f"How far a walk goes until the embedding has drifted by {_DRIFT:.0%}, and until the "
            "class is another: geometric means over images with 95 % bootstrap intervals. A walk that does "
            "not get there counts with its whole length.",
            "lines": "Departure of the embedding from the straight line between its ends' values; means over "
            "images with 95 % bootstrap intervals.",
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
    with torch.no_grad():
        most = embedding(x[None]).shape[1]
    spectrum = singular_directions(
        embedding, x, min(max(n, 8), most), tolerance=1e-2, seed=seed, batch_size=batch_size
    )
    random = torch.randn(n, *x.shape, generator=torch.Generator().manual_seed(seed)).to(x)
    null, _ = null_directions(embedding, x, random, spectrum, batch_size=batch_size)
    for kind, directions in zip(_DIRECTIONS, (spectrum.directions[:n], random, null), strict=True):
        length = directions.float().flatten(1).norm(dim=1).clamp_min(1e-30)
        yield kind, directions.float() / length.reshape(-1, *[1] * x.ndim)


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


def _reach(own: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
    """How far the walks of one kind go, per pair: geometric means over its directions and ways.

    The place of the drift is interpolated between the two that it lies between, on logarithmic scales.
    """
    drifted: dict[int, list[float]] = {}
    flipped: dict[int, list[float]] = {}
    for key, walk in own.groupby(["pair", "direction", "way"]):
        walk = walk.sort_values("place")
        place, drift = walk["place"].to_numpy(float), walk["drift"].to_numpy(float)
        over, other = np.flatnonzero(drift > _DRIFT), np.flatnonzero(~walk["same_class"].to_numpy(bool))
        far = place[-1]
        if len(over):
            far = place[over[0]]
            if over[0]:
                span = slice(over[0] - 1, over[0] + 1)
                far = np.exp(np.interp(np.log(_DRIFT), np.log(drift[span].clip(1e-30)), np.log(place[span])))
        pair = int(np.asarray(key)[0])
        drifted.setdefault(pair, []).append(float(np.log(far)))
        flipped.setdefault(pair, []).append(float(np.log(place[other[0]] if len(other) else place[-1])))
    return {
        "drift": np.array([np.mean(values) for values in drifted.values()]),
        "class": np.array([np.mean(values) for values in flipped.values()]),
    }


def _summary(table: pd.DataFrame) -> dict[str, float | int | str]:
    summary: dict[str, float | int | str] = {}
    for kind in _DIRECTIONS:
        own = table[table["walk"] == kind]
        reach = _reach(own)
        summary[f"length to a drift of {_DRIFT:.0%}, {kind}"] = float(np.exp(reach["drift"].mean()))
        summary[f"length to another class, {kind}"] = float(np.exp(reach["class"].mean()))
        walks = own.groupby(["pair", "direction", "way"])
        summary[f"walks that change the class, {kind}"] = float((~walks["same_class"].all()).mean())
    for line in _LINES:
        own = table[table["walk"] == line]
        if len(own):
            summary[f"largest departure, {line}"] = float(own.groupby("pair")["departure"].max().mean())
            inside = own[(own["place"] > 0) & (own["place"] < 1)]
            if len(inside):
                summary[f"places within {_DRIFT:.0%}, {line}"] = float((inside["departure"] <= _DRIFT).mean())
    return summary


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures import dots_by_row
    from vit_mechinterp.figures.matching import drift_along

    table = result.table
    drift = {kind: _curve(table[table["walk"] == kind], "drift") for kind in _DIRECTIONS}
    lines = {
        line: _curve(table[table["walk"] == line], "departure")
        for line in _LINES
        if (table["walk"] == line).any()
    }
    reach: dict[str, dict[str, tuple[float, float, float]]] = {}
    for kind in _DIRECTIONS:
        for name, values in _reach(table[table["walk"] == kind]).items():
            low, high = bootstrap_interval(values[None])
            ends = (float(np.exp(v)) for v in (values.mean(), low[0], high[0]))
            said = f"to a drift of {_DRIFT:.0%}" if name == "drift" else "to another class"
            reach.setdefault(said, {})[kind] = tuple(ends)  # type: ignore[assignment]
    return {
        "reach": dots_by_row(reach, label="length of the walk, share of the image's own", logarithmic=True),
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
