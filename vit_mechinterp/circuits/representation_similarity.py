"""Representation similarity across layers and models: linear CKA, and RSA.

Both compare what images look like to two layers, without matching features: CKA (Kornblith et al. 2019) by
the inner products of centred activations, RSA (Kriegeskorte et al. 2008) by the ranks of distances between
images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from vit_mechinterp.circuits.features import features_at, readable_sites
from vit_mechinterp.circuits.images import image_column
from vit_mechinterp.circuits.reading import read_from, reading_data
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.errors import DataError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["linear_cka", "representation_similarity", "rsa"]

Matrix = Float[np.ndarray, "example feature"]


def representation_similarity(
    vit: HookedViT,
    images: Any,
    *,
    other: HookedViT | None = None,
    other_images: Any = None,
    sites: Sequence[str] | str = "resid_post",
    tokens: Any = "all",
    base: str = "base",
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool = True,
) -> CircuitResult:
    """Compare every site with every other one, of one model or between two.

    Args:
        vit: the model.
        images: images, a folder, or data; see `image_column`.
        other: another model; its sites make the columns then.
        other_images: the same images in the same order as ``other`` takes them, where these are tensors of
            its own input size; pictures fit both models as they are.
        sites: site names, globs, or short names that mean every block.
        tokens: the tokens whose mean activation is compared.
        base: the image column.
        seed: of the control, which puts one side's images in random order.
        folder: keeps what has been read, so that the same call goes on where it was stopped.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per pair of sites: ``model, site, other_model, other_site, cka, rsa``, and
        ``control_cka, control_rsa`` with the images of one side in random order (CKA is above 0 by chance
        where there are fewer images than features).

    Raises:
        DataError: there are fewer than four images, or the two sides differ in number.
    """
    data = image_column(images, vit, column=base)
    columns = reading_data(vit, data, base, progress=progress)
    if columns.n < 4:
        raise DataError(f"{columns.n} images are too few to compare representations by; give four or more.")
    here, left_out = readable_sites(vit, sites)
    there, there_columns = here, columns
    if other is not None:
        also = image_column(images if other_images is None else other_images, other, column=base)
        there_columns = reading_data(other, also, base, progress=progress)
        if there_columns.n != columns.n:
            raise DataError(
                f"One side has {columns.n} images, the other {there_columns.n}; give the same ones."
            )
        there, lacking = readable_sites(other, sites)
        left_out |= {f"other model: {name}": reason for name, reason in lacking.items()}
    how: dict[str, Any] = {"folder": folder, "progress": progress}
    rows_features = _arrays(features_at(vit, columns, base, here, tokens, **how))
    column_features = rows_features
    if other is not None:
        column_features = _arrays(features_at(other, there_columns, base, there, tokens, **how))
    order = np.random.default_rng(seed).permutation(columns.n)
    import pandas as pd

    ranks = {a: _distance_ranks(rows_features[a]) for a in here}
    alike = {}
    for b in there:
        y, mixed = column_features[b], column_features[b][order]
        own, control = _distance_ranks(y), _distance_ranks(mixed)
        for a in here:
            x = rows_features[a]
            alike[a, b] = {
                "cka": linear_cka(x, y), "rsa": float(ranks[a] @ own),
                "control_cka": linear_cka(x, mixed), "control_rsa": float(ranks[a] @ control),
            }  # fmt: skip
    second = "model" if other is None else "other"
    table = pd.DataFrame(
        [
            {"model": "model", "site": a, "other_model": second, "other_site": b, **alike[a, b]}
            for a in here
            for b in there
        ]
    )
    apart = table if other is not None else table[table["site"] != table["other_site"]]
    summary: dict[str, float | int | str] = {"images": columns.n}
    for name in ("cka", "rsa"):
        if len(apart):
            top = apart.iloc[int(apart[name].argmax())]
            summary[f"most alike by {name.upper()}"] = f"{top[name]:.3f} ({top['site']}, {top['other_site']})"
        summary[f"{name.upper()} of images in random order, mean"] = float(table[f"control_{name}"].mean())
    records = [] if other is None else [read_from(other, there_columns, [base])]
    return CircuitResult(
        name="representation_similarity",
        table=table,
        provenance=provenance(
            read_from(vit, columns, [base]), *records, left_out=left_out, tokens=str(tokens), seed=seed
        ),
        summary=summary,
        description=_DESCRIPTION,
        captions={
            "cka": "Linear CKA between sites: 1 is the same up to rotation and size.",
            "rsa": "Rank correlation of the distances between images: 1 is the same order.",
        },
        draw=_draw,
    )


def linear_cka(x: Matrix, y: Matrix) -> float:
    """Return linear CKA of two activations of the same examples (Kornblith et al. 2019, section 3)."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    if len(x) <= max(x.shape[1], y.shape[1]):
        # By inner products of examples where these are fewer than features.
        gram_x, gram_y = x @ x.T, y @ y.T
        shared, size = float((gram_x * gram_y).sum()), np.linalg.norm(gram_x) * np.linalg.norm(gram_y)
    else:
        shared = float(np.square(x.T @ y).sum())
        size = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(shared / size) if size > 0 else float("nan")


def rsa(x: Matrix, y: Matrix) -> float:
    """Return Spearman's correlation between the distances (1 minus Pearson's correlation) of all pairs of
    examples.
    """
    return float(_distance_ranks(x) @ _distance_ranks(y))


def _distance_ranks(x: Matrix) -> Float[np.ndarray, " pair"]:
    """Ranks of the distances of all pairs of examples, of mean 0 and length 1, so that a product of two is
    their correlation; NaN where the distances are no numbers or all equal.
    """
    import pandas as pd

    pairs = np.triu_indices(len(x), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Equal distances come out unequal in their last bits, and ranks would see it.
        distances = np.round(1 - np.corrcoef(x)[pairs], 10)
    if not np.isfinite(distances).all() or np.ptp(distances) == 0:
        return np.full(len(distances), np.nan)
    ranks = pd.Series(distances).rank().to_numpy()
    ranks = ranks - ranks.mean()
    centred: Float[np.ndarray, " pair"] = ranks / np.linalg.norm(ranks)
    return centred


def _arrays(features: Mapping[str, Any]) -> dict[str, Matrix]:
    return {site: values.double().numpy() for site, values in features.items()}


_DESCRIPTION = (
    "Activations at two sites are compared by how the images lie to each other in them. CKA compares inner "
    "products, RSA the order of distances; neither needs features to correspond. The control compares with "
    "the images of one side in random order: what is left there is chance, and CKA's share of it grows as "
    "images get fewer."
)


def _draw(result: CircuitResult) -> dict[str, Figure]:
    from vit_mechinterp.figures import node_matrix

    figures = {}
    two = (result.table["other_model"] == "other").any()
    for name in ("cka", "rsa"):
        wide = result.table.pivot_table(
            index="site", columns="other_site", values=name, sort=False, dropna=False
        )
        (rows, row_label), (columns, column_label) = _named(wide.index), _named(wide.columns)
        figures[name] = node_matrix(
            wide.to_numpy(dtype=float),
            rows,
            columns,
            limits=(0.0, 1.0) if name == "cka" else (-1.0, 1.0),
            row_label=f"model, {row_label}" if two else row_label,
            column_label=f"other model, {column_label}" if two else column_label,
            label=name.upper(),
        )
    return figures


def _named(sites: Iterable[str]) -> tuple[list[str], str]:
    """Short names of sites, and what they are: layers, where one site of several blocks is meant."""
    parsed = [Site.parse(site) for site in sites]
    if len({site.name for site in parsed}) == 1 and all(site.layer is not None for site in parsed):
        return [str(site.layer) for site in parsed], f"layer ({parsed[0].name})"
    return [site.removeprefix("blocks.") for site in map(str, sites)], "site"
