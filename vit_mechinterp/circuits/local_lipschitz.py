"""How fast an embedding changes, direction by direction: local Lipschitz estimates (after Salman, Shams and
Liu 2024).

Around an image x, for a direction u of length 1 and a step e,

    L(x; u, e) = |f(x + e u) - f(x)| / e

is a directional estimate of the local Lipschitz constant. For small e it tends to ``|J u|``, and its largest
value over u is the largest singular value of J. The estimator, the directions and the scales are this
project's own; the paper's are not known. Four kinds of directions are compared:

* ``random``: Gaussian, made of length 1;
* ``singular``: the right singular vectors of J with the largest values, the normal directions in which least
  is needed to change the embedding most;
* ``null``: random directions projected onto the null space of J, along which the embedding stays, to first
  order;
* ``between``: from the image towards images of another class (or any other, without labels).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.embeddings import Embedding, in_batches
from vit_mechinterp.circuits.images import image_column
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.spectrum import Spectrum, null_directions, singular_directions
from vit_mechinterp.circuits.statistics import bootstrap_interval
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.tokens import Tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["local_lipschitz"]

_SCALES = (1e-3, 1e-2, 1e-1)
_COARSE_SCALES = (0.03, 0.1, 0.3)
"""For models in half precision, which round smaller steps away."""
_KINDS = ("singular", "between", "random", "null")


def local_lipschitz(
    vit: HookedViT,
    images: Any,
    *,
    sites: Sequence[str] | None = None,
    tokens: Tokens = "all",
    scales: Sequence[float] | None = None,
    n_directions: int = 4,
    n_singular: int = 8,
    label: str | None = "label",
    base: str = "base",
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
) -> CircuitResult:
    """Estimate local Lipschitz constants of embeddings along four kinds of directions, and singular spectra.

    Args:
        vit: the model.
        images: images, in any form that `image_column` takes.
        sites: where embeddings are read, one after the other; by default the model's own embedding.
        tokens: token names or patch indices, at sites with tokens.
        scales: lengths of the steps, as shares of the length of the image itself; by default 0.001, 0.01 and
            0.1, and for a model in half precision 0.03, 0.1 and 0.3.
        n_directions: random, null, and between-class directions each, per image.
        n_singular: singular directions per image; as many values make the spectrum.
        label: a column of classes for the between-class directions; without it (or the column) the other
            images serve.
        base: the image column.
        seed: seeds random directions and the bootstrap.
        batch_size: most rows in one forward.
        progress: show a bar.

    Returns:
        Table, one row per site, image, kind, direction and scale: ``estimate`` (embedding units per input
        unit); the scale 0 stands for the limit ``|J u|``; ``relative`` is the estimate times ``|x| /
        |f(x)|``, the relative change of the embedding per relative change of the image. For singular
        directions ``value`` holds the singular value and ``residual`` how exact it is, for null directions
        ``residual`` what is left of ``|J u|`` after the projection. Figures: ``lipschitz`` (of the last
        site), ``spectra``, and ``layers`` with several sites.

    Raises:
        SpecError: no such site, a scale that is not positive or that the model's precision rounds away, or no
            direction; DataError: fewer than two images.
    """
    import pandas as pd

    scales = _checked_scales(vit, scales)
    if n_directions < 1 or n_singular < 1:
        raise SpecError(f"n_directions={n_directions} and n_singular={n_singular} are at least 1.")
    embeddings = [Embedding.of(vit, site, tokens) for site in sites or (None,)]
    data = Data(image_column(images, vit, column=base), vit)
    if data.n < 2:
        raise DataError("Directions between images need at least two images.")
    others = _others(data, label, n_directions, seed)
    rows: list[dict[str, Any]] = []
    jobs = [(embedding, example) for embedding in embeddings for example in range(data.n)]
    for embedding, example in tqdm(jobs, desc="directions", unit="image", delay=2, disable=not progress):
        x = data.images(base, [example])[0]
        spectrum = singular_directions(
            embedding, x, n_singular, tolerance=1e-2, seed=seed + example, batch_size=batch_size
        )
        towards = data.images(base, others[example])
        for kind, directions, facts in _directions(
            embedding, x, spectrum, towards, n_directions, seed + example, batch_size
        ):
            estimates, length = _estimates(embedding, x, directions, scales, batch_size)
            share = float(x.float().norm()) / max(length, 1e-30)
            for n in range(len(directions)):
                fixed = {"site": embedding.site, "image": example, "kind": kind, "direction": n, **facts[n]}
                for scale, values in estimates.items():
                    value = float(values[n])
                    rows.append(fixed | {"scale": scale, "estimate": value, "relative": value * share})
    table = pd.DataFrame(rows)
    last = embeddings[-1].site
    at_last = table[(table["scale"] == 0) & (table["site"] == last)]
    limit = at_last.groupby("kind")["estimate"].median()
    singular, null = float(limit["singular"]), float(limit["null"])
    left = table[(table["kind"] == "null") & (table["site"] == last)]["residual"].median()
    return CircuitResult(
        name="local_lipschitz",
        title="Local Lipschitz estimates",
        table=table,
        provenance=provenance(
            {"model_fingerprint": vit.fingerprint()},
            sites=[str(e) for e in embeddings],
            scales=scales,
            n_directions=n_directions,
            n_singular=n_singular,
            label=label,
            dtype=str(vit.dtype),
            seed=seed,
        ),
        summary={
            **{f"median |J u|, {kind}": float(limit[kind]) for kind in _KINDS},
            "singular over null": singular / max(null, 1e-30),
            "null directions keep of |J u|": float(left),
            "images": data.n,
        },
        description=(
            "How much the embedding moves per unit of change of the image, along four kinds of directions. "
            "Along singular directions little change of the image moves it far; along null directions the "
            "image can change at nearly no cost. An estimate that stays the same for longer steps says that "
            "the embedding is straight so far. Estimates are this project's own."
        ),
        captions={
            "lipschitz": f"Local Lipschitz estimates at {embeddings[-1]}; means over images with 95 % "
            "bootstrap intervals, for steps of several lengths (shares of the image's own) and in the limit.",
            **(
                {
                    "layers": "The limit |J u| by site, times |x| / |f(x)|: the relative change of the "
                    "embedding per relative change of the image, so that sites can be compared; means over "
                    "images with 95 % bootstrap intervals."
                }
                if len(embeddings) > 1
                else {}
            ),
            "spectra": "The largest singular values of the Jacobian, one line per image.",
        },
        draw=_draw,
    )


def _checked_scales(vit: HookedViT, scales: Sequence[float] | None) -> tuple[float, ...]:
    finest = torch.finfo(vit.dtype).eps
    if scales is None:
        return _SCALES if finest < 1e-4 else _COARSE_SCALES
    if not len(scales) or min(scales) <= 0:
        raise SpecError(f"scales={tuple(scales)}: steps have a positive length.")
    if min(scales) < 2 * finest:
        raise SpecError(
            f"scales={tuple(scales)}: the model's precision ({vit.dtype}) rounds steps below "
            f"{2 * finest:.1g} of an image away. Take longer steps, or the model in float32."
        )
    return tuple(float(scale) for scale in scales)


def _others(data: Data, label: str | None, n: int, seed: int) -> list[list[int]]:
    """For every image, other images to walk towards: of another class where labels are known."""
    generator = np.random.default_rng(seed)
    classes: list[Any] = [None] * data.n
    if label is not None and label in data.columns:
        classes = [row[0] for row in data.integers(label)]
    chosen = []
    for example in range(data.n):
        rest = [i for i in range(data.n) if i != example]
        pool = [i for i in rest if classes[i] is None or classes[i] != classes[example]] or rest
        chosen.append([int(i) for i in generator.choice(pool, size=min(n, len(pool)), replace=False)])
    return chosen


def _directions(
    embedding: Embedding,
    x: Tensor,
    spectrum: Spectrum,
    towards: Tensor,
    n: int,
    seed: int,
    batch_size: int,
) -> Iterator[tuple[str, Float[Tensor, "direction *image"], list[dict[str, float]]]]:
    """Directions of length 1 of every kind, with what is known of each."""
    generator = torch.Generator().manual_seed(seed)
    random = _unit(torch.randn(n, *x.shape, generator=generator).to(x.device))
    nothing: list[dict[str, float]] = [{} for _ in range(max(n, len(towards)))]
    facts = [
        {"value": float(value), "residual": float(residual)}
        for value, residual in zip(spectrum.values, spectrum.residuals, strict=True)
    ]
    yield "singular", spectrum.directions, facts
    between = towards.float() - x.float()
    far = between.flatten(1).norm(dim=1) > 0
    yield "between", _unit(between[far]), nothing
    yield "random", random, nothing
    null, left = null_directions(embedding, x, random, spectrum, batch_size=batch_size)
    yield "null", _unit(null), [{"residual": float(share)} for share in left]


def _unit(directions: Tensor) -> Tensor:
    length = directions.flatten(1).norm(dim=1).clamp_min(1e-30)
    unit: Tensor = directions / length.reshape(-1, *[1] * (directions.ndim - 1))
    return unit


def _estimates(
    embedding: Embedding, x: Tensor, directions: Tensor, scales: Sequence[float], batch_size: int
) -> tuple[dict[float, Float[Tensor, " direction"]], float]:
    """``|f(x + e u) - f(x)| / e`` for every direction and scale, ``|J u|`` under 0; and ``|f(x)|``."""
    images = x.expand(len(directions), *x.shape)
    here, tangent = in_batches(embedding.jvp, images, directions, batch_size=batch_size)
    found = {0.0: tangent.norm(dim=1)}
    length = float(x.float().norm())
    for scale in scales:
        step = scale * length
        moved = (x.float() + step * directions).to(x.dtype)
        with torch.no_grad():
            (there,) = in_batches(lambda z: (embedding(z),), moved, batch_size=batch_size)
        found[float(scale)] = (there - here).norm(dim=1) / step
    return found, float(here[0].norm())


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures import dots_by_row
    from vit_mechinterp.figures.matching import by_site, spectra

    table = result.table
    sites = list(table["site"].unique())
    groups: dict[str, dict[str, tuple[float, float, float]]] = {}
    for scale, at_scale in table[table["site"] == sites[-1]].groupby("scale"):
        name = f"step {float(str(scale)):g}" if scale else "limit |J u|"
        groups[name] = {kind: _interval(at_scale, kind, "estimate") for kind in _KINDS}
    singular = table[(table["kind"] == "singular") & (table["scale"] == 0)]
    values = {
        str(site): own.pivot(index="image", columns="direction", values="value").to_numpy()
        for site, own in singular.groupby("site", sort=False)
    }
    figures = {"lipschitz": dots_by_row(groups, label="|f(x + e u) - f(x)| / e", logarithmic=True)}
    if len(sites) > 1:
        at_limit = table[table["scale"] == 0]
        figures["layers"] = by_site(
            {
                kind: [_interval(at_limit[at_limit["site"] == site], kind, "relative") for site in sites]
                for kind in _KINDS
            },
            sites,
            label="|J u| |x| / |f(x)|",
        )
    return {**figures, "spectra": spectra(values)}


def _interval(table: pd.DataFrame, kind: str, column: str) -> tuple[float, float, float]:
    """Mean over images with its interval; an image's own directions are averaged first."""
    values = table[table["kind"] == kind].groupby("image")[column].mean().to_numpy()
    low, high = bootstrap_interval(values[None])
    return float(values.mean()), float(low[0]), float(high[0])
