"""What a ViT's positions alone make it attend to: similarity of positional encodings, positional attention,
and how well both find neighbours or known sets (after Jelassi, Sander and Li 2022).

* **Similarity map**: P P^T with the rows of P made of length 1, so that values lie in [-1, 1]; a third
  party's account of the paper's first figure has them thresholded at 0.55. That the normalisation is the
  cosine is this project's choice.
* **Positional attention matrix** of a head: the pattern of the block's own attention when its input holds the
  positional encodings in place of the patches' tokens (class tokens and the like as they enter the first
  block), with keys outside the patches left out and rows made to sum to 1 again. In a model with positional
  attention it is the attention itself; in an ordinary one it is what positions would do on their own. This
  definition is this project's.

Both are scored against sets of patches (see `vit_mechinterp.circuits.association`): known ones, or the
neighbourhoods of the patch grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.association import association, members_of, neighbourhoods
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.errors import SpecError, UnsupportedSiteError
from vit_mechinterp.model.encodings import patch_encodings
from vit_mechinterp.model.hooked import HookedViT

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["encoding_similarity", "patch_association", "positional_attention_matrix"]

_MOST_ROWS = 200
"""Patches beyond which the matrix of a head is not drawn."""


@torch.no_grad()
def encoding_similarity(vit: HookedViT) -> Float[Tensor, "patch patch"]:
    """Return the cosines of all pairs of positional encodings of patches, in [-1, 1].

    Raises:
        UnsupportedModelError: the model adds no table of encodings to its tokens; the reason is given.
    """
    rows = patch_encodings(vit).detach().float()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    similarity: Tensor = (unit @ unit.T).clamp(-1, 1).cpu()
    return similarity


@torch.no_grad()
def positional_attention_matrix(vit: HookedViT, layer: int) -> Float[Tensor, "head patch patch"]:
    """Return the attention between patches that positions alone bring about in a layer; see the module.

    Raises:
        UnsupportedModelError: the model adds no table of encodings to its tokens.
        UnsupportedSiteError: the layer shows no attention pattern.
    """
    tokens = vit.layout.tokens
    start = f"blocks.{layer}.resid_pre"
    image = vit.blank(1)
    _, cache = vit.run(image, capture=["blocks.0.resid_pre"])
    first, last = len(tokens.prefix), len(tokens.prefix) + tokens.n_patches
    stream = cache["blocks.0.resid_pre"].clone()
    stream[:, first:last] = patch_encodings(vit).to(stream)
    with vit.hooks({start: lambda value: stream.expand_as(value)}):
        _, cache = vit.run(image, capture=[f"blocks.{layer}.attn.pattern"])
    pattern = cache[f"blocks.{layer}.attn.pattern"][0, :, first:last, first:last].float()
    between: Tensor = (pattern / pattern.sum(dim=-1, keepdim=True).clamp_min(1e-30)).cpu()
    return between


def patch_association(
    vit: HookedViT,
    *,
    sets: Sequence[Sequence[int]] | None = None,
    radius: int = 1,
    layers: Sequence[int] | None = None,
    threshold: float = 0.55,
    progress: bool = True,
) -> CircuitResult:
    """Score similarity maps and positional attention against sets of patches, for every layer and head.

    Args:
        vit: any supported model that adds a table of positional encodings to its tokens.
        sets: disjoint sets of patches that belong together; by default every patch's neighbourhood.
        radius: of the neighbourhoods, in patches: 1 is the patch and the eight around it.
        layers: whose positional attention is looked at; all by default. Layers without a pattern are left
            out.
        threshold: above which two encodings count as similar.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row for the ``encodings`` and one per layer and head of the ``attention``: ``agreement``,
        ``exact``, ``corrected``; for the encodings ``above`` (share of other patches above the threshold) and
        ``precision`` (share of those that belong with the patch). Tensors: ``similarity`` ``[patch, patch]``
        and ``attention`` ``[layer, head, patch, patch]``. Figures: ``similarity``, ``attention`` (of the
        heads with the largest score) and, with several layers, ``scores``.

    Raises:
        UnsupportedModelError: positions are no table of encodings here (rotary, relative); SpecError: no such
            layer.
    """
    import pandas as pd

    tokens = vit.layout.tokens
    similarity = encoding_similarity(vit)
    members = neighbourhoods(tokens.grid, radius) if sets is None else members_of(sets)
    if members.shape != similarity.shape:
        raise SpecError(f"The sets hold {len(members)} patches, the model has {tokens.n_patches}.")
    chosen = list(range(vit.layout.n_layers)) if layers is None else list(layers)
    for layer in chosen:
        if not 0 <= layer < vit.layout.n_layers:
            raise SpecError(f"There is no layer {layer}: the model has {vit.layout.n_layers}, from 0 on.")
    found: dict[int, Tensor] = {}
    for layer in tqdm(chosen, desc="positional attention", delay=2, disable=not progress):
        try:
            found[layer] = positional_attention_matrix(vit, layer)
        except UnsupportedSiteError:
            if layers is not None:
                raise
    rows: list[dict[str, Any]] = [
        {"of": "encodings", **_scores(similarity, members), **_passing(similarity, members, threshold)}
    ]
    for layer, matrices in found.items():
        rows += [
            {"of": "attention", "layer": layer, "head": head, **_scores(matrix, members)}
            for head, matrix in enumerate(matrices)
        ]
    columns = ["of", "layer", "head", "agreement", "exact", "corrected", "above", "precision"]
    table = pd.DataFrame(rows).reindex(columns=columns).astype({"layer": "Int64", "head": "Int64"})
    tensors = {"similarity": similarity}
    if found and len({len(matrices) for matrices in found.values()}) == 1:
        tensors["attention"] = torch.stack(list(found.values()))
    against = (
        f"the neighbourhood of every patch (radius {radius})" if sets is None else f"{len(sets)} known sets"
    )
    return CircuitResult(
        name="patch_association",
        table=table,
        tensors=tensors,
        provenance=provenance(
            {"model_fingerprint": vit.fingerprint()},
            circuit="patch_association",
            sets=sets,
            radius=radius if sets is None else None,
            threshold=threshold,
        ),
        summary=_summary(table),
        title="Patch association",
        description=(
            "Which patches do positions alone bring together? Positional encodings are compared with each "
            "other, and "
            "every head is given encodings in place of tokens, so that its attention can follow positions "
            "only. Both "
            f"are scored against {against}: the share of a patch's nearest others that belong with it, "
            f"corrected for "
            "chance (0 is a random order, 1 all of them). Normalisation, score and the attention matrix of "
            "an ordinary "
            "model are this project's own definitions."
        ),
        captions={
            "similarity": (
                "Cosines between positional encodings: one map per patch, at the patch's own place, a white "
                "dot on "
                f"the patch itself; right, what passes the threshold of {threshold:g}."
            ),
            "attention": "Positional attention matrices of the heads with the largest scores.",
            "scores": "Association of every head's positional attention, corrected for chance.",
        },
        draw=partial(_draw, grid=tokens.grid, threshold=threshold, layers=tuple(found)),
    )


def _scores(matrix: Tensor, members: Tensor) -> dict[str, float]:
    return {name: float(score) for name, score in association(matrix, members).items()}


def _passing(similarity: Tensor, members: Tensor, threshold: float) -> dict[str, float]:
    others = ~torch.eye(len(members), dtype=torch.bool)
    above = (similarity > threshold) & others
    n = int(above.sum())
    return {
        "above": n / int(others.sum()),
        "precision": float((above & members).sum()) / n if n else float("nan"),
    }


def _summary(table: pd.DataFrame) -> dict[str, float | int | str]:
    encodings = table[table["of"] == "encodings"].iloc[0]
    heads = table[table["of"] == "attention"]
    summary: dict[str, float | int | str] = {
        "encodings, corrected association": float(encodings["corrected"]),
        "similar pairs that belong together": float(encodings["precision"]),
    }
    if len(heads):
        best = heads.iloc[int(heads["corrected"].argmax())]
        summary["heads, mean corrected association"] = float(heads["corrected"].mean())
        summary["best head"] = f"layer {int(best['layer'])}, head {int(best['head'])}"
        summary["best head, corrected association"] = float(best["corrected"])
    return summary


def _draw(
    result: CircuitResult, grid: tuple[int, ...], threshold: float, layers: tuple[int, ...]
) -> dict[str, Figure]:
    from vit_mechinterp.figures import head_layer_map
    from vit_mechinterp.figures.spatial import patch_matrices, similarity_maps

    figures: dict[str, Figure] = {}
    similarity = result.tensors["similarity"].numpy()
    if len(grid) == 2:
        figures["similarity"] = similarity_maps(similarity, (grid[0], grid[1]), threshold=threshold)
    heads = result.table[result.table["of"] == "attention"]
    if "attention" in result.tensors and len(similarity) <= _MOST_ROWS:
        best = heads.sort_values("corrected", ascending=False).head(4).sort_values(["layer", "head"])
        attention = result.tensors["attention"]
        chosen = [
            (int(row["layer"]), int(row["head"]), float(row["corrected"])) for _, row in best.iterrows()
        ]
        figures["attention"] = patch_matrices(
            {
                f"layer {layer}, head {head} ({score:.2f})": attention[layers.index(layer), head].numpy()
                for layer, head, score in chosen
            },
            label="attention",
        )
    if "attention" in result.tensors and len(layers) > 1 and layers == tuple(range(len(layers))):
        values = heads.pivot(index="layer", columns="head", values="corrected").to_numpy(dtype=float)
        figures["scores"] = head_layer_map(
            values, label="corrected association", ends=("", ""), limits=(-1.0, 1.0)
        )
    return figures
