"""Steering curves: what the model answers as more and more of a direction is added to an activation.

The direction comes from `mean_directions`, a probe, a dictionary, or anywhere. It is added with
`AddDirection` at one site and many strengths; random directions of the same length are the control.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.cells import BatchSize, check_runs, compared, grouped, measure
from vit_mechinterp.circuits.effects import strongest
from vit_mechinterp.circuits.images import image_column
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.reading import interval_columns
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import AddDirection, Run, TensorRef

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["steering"]


def steering(
    vit: HookedViT,
    images: Any,
    directions: Mapping[str, Float[Tensor, " feature"]],
    *,
    alphas: Sequence[float] = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0),
    tokens: Any = "all",
    metric: MetricLike | None = None,
    controls: int = 5,
    base: str = "base",
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Add directions at several strengths and measure the answer.

    Args:
        vit: the model.
        images: images, a folder, or data; see `image_column`.
        directions: site to direction ``[d]``, such as ``mean_directions(...).tensors``.
        alphas: the strengths, in lengths of the direction as given.
        tokens: the tokens that it is added to.
        metric: what to measure; ``LogitDifference(1, 0)`` and the like for a class of your own. By default
        the
            lead of the class predicted without steering.
        controls: number of random directions of the same length per site.
        base: the image column.
        resamples: of the bootstrap over images.
        seed: of the bootstrap and the random directions.
        folder: keeps finished runs, so that the same call goes on where it was stopped.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per site, direction and strength: ``site, direction`` (``given``, ``random 0``, ...),
        ``alpha``, the metric's mean ``value`` with its interval, and ``change`` against no steering
        (likewise).

    Raises:
        SpecError: there is no direction or strength, or a direction does not fit its site.
    """
    check_resampling(resamples, seed)
    if not directions or not alphas:
        raise SpecError("Steering needs at least one direction and one strength.")
    if len(set(alphas)) != len(alphas):
        raise SpecError(f"A strength occurs twice: {list(alphas)}.")
    sites = {vit.expand([site])[0]: torch.as_tensor(vector).float() for site, vector in directions.items()}
    for site, vector in sites.items():
        width = vit.sites()[site].shape[-1]
        if tuple(vector.shape) != (width,) or not bool(vector.isfinite().all()):
            raise SpecError(
                f"The direction for {site} has shape {tuple(vector.shape)}; finite numbers [{width}] fit "
                "there."
            )
    data = image_column(images, vit, column=base)
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    tensors: dict[str, Tensor] = {}
    rows: list[tuple[str, str, float, Run]] = []
    generator = torch.Generator().manual_seed(seed)
    for site, vector in sites.items():
        own = {"given": vector}
        for index in range(controls):
            drawn = torch.randn(len(vector), generator=generator)
            own[f"random {index}"] = drawn * vector.norm() / drawn.norm()
        for name, direction in own.items():
            key = f"{site}, {name}"
            tensors[key] = direction
            for alpha in alphas:
                edit = AddDirection(site=site, tokens=tokens, vector=TensorRef(name=key), alpha=float(alpha))
                rows.append(
                    (site, name, float(alpha), Run(name=f"{key}, {alpha:g}", interventions=[edit], base=base))
                )
    n = Data(data, vit).n
    check_runs(vit, [run for *_, run in rows], data)
    bound, origin, clean = compared(vit, data, metric, base=base, source=None, folder=folder, **how)
    groups = grouped([run for *_, run in rows], n, clean[0].numel())
    measured = measure(vit, groups, data, bound, tensors=tensors, folder=folder, **how)
    values = measured.stack([run.name for *_, run in rows])
    import pandas as pd

    place = [{"site": site, "direction": name, "alpha": alpha} for site, name, alpha, _ in rows]
    table = pd.DataFrame(place).assign(
        **interval_columns(values.numpy(), resamples=resamples, seed=seed),
        **interval_columns((values - bound.clean).numpy(), name="change", resamples=resamples, seed=seed),
    )
    given = table[table["direction"] == "given"]
    top = strongest(given, "change")
    random = table[table["direction"] != "given"]["change"].abs()
    summary: dict[str, float | int | str] = {
        f"{bound.label}, not steered": float(bound.clean.mean()),
        "largest change": f"{top['change']:+.3g} ({top['site']}, alpha {top['alpha']:g})",
        "images": n,
    }
    if len(random):
        summary["largest change by a random direction"] = float(random.max())
    label = bound.label
    return CircuitResult(
        name="steering",
        table=table,
        provenance=provenance(
            origin,
            *measured.provenances,
            metric=bound.description,
            tokens=str(tokens),
            seed=seed,
            resamples=resamples,
        ),
        summary=summary,
        description=f"{_DESCRIPTION}\n\n{bound.description}",
        captions={
            _key(site): f"The {label} as the direction is added at {site}. Grey: random directions as long."
            for site in sites
            if len(alphas) > 1
        },
        draw=lambda result: _draw(result, label),
        tensors=tensors,
    )


_DESCRIPTION = (
    "A direction times alpha is added to the activation at the chosen tokens, and everything behind is "
    "computed anew. A direction that the model uses moves the answer further than random directions of the "
    "same length, and the other way with the other sign."
)


def _key(site: str) -> str:
    return site.replace(".", "_")


def _draw(result: CircuitResult, label: str) -> dict[str, Figure]:
    from vit_mechinterp.figures import Curve, curves

    figures: dict[str, Figure] = {}
    if result.table["alpha"].nunique() < 2:
        return figures
    for site, rows in result.table.groupby("site", sort=False):
        lines = {}
        for name, own in rows.groupby("direction", sort=False):
            own = own.sort_values("alpha")
            ends = own[["value_low", "value_high"]].to_numpy(dtype=float)
            low, high = ([], []) if bool((ends != ends).any()) else ends.T.tolist()
            control = name != "given"
            lines["direction" if not control else str(name)] = Curve(
                own["alpha"].tolist(), own["value"].tolist(), low, high, control=control
            )
        figures[_key(str(site))] = curves(lines, x_label="alpha", label=label, title=str(site))
    return figures
