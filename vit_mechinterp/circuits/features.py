"""Activations as feature vectors: one per image and site, for probes, directions and similarities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vit_mechinterp.circuits.kept_readings import KeptReadings, in_batches
from vit_mechinterp.circuits.reading import merged_reasons
from vit_mechinterp.engine.binding.positions import resolve_tokens
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import DataError, SpecError, UnsupportedSiteError, suggest
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Site
from vit_mechinterp.spec.tokens import parse_tokens

__all__ = ["features_at", "labels_of", "readable_sites"]


def readable_sites(vit: HookedViT, sites: Sequence[str] | str) -> tuple[list[str], dict[str, str]]:
    """Return the model's sites among names and globs, in forward order, and why others are left out.

    A short name such as ``"resid_post"`` means that site of every block.

    Raises:
        SpecError: a name is none; UnsupportedSiteError: the model has none of the sites.
    """
    given = [sites] if isinstance(sites, str) else list(sites)
    if not given:
        raise SpecError("No site is named; name at least one, such as 'resid_post'.")
    found: dict[str, None] = {}
    left_out: dict[str, str] = {}
    for name in given:
        if "*" in name or name.startswith("blocks.") or name in _GLOBAL:
            found.update(dict.fromkeys(vit.expand([name])))
            continue
        within = Site.parse(f"blocks.0.{name}").name
        for layer in range(vit.layout.n_layers):
            full = f"blocks.{layer}.{within}"
            if full in vit.layout.absent:
                left_out[full] = vit.layout.absent[full]
            else:
                found[full] = None
    merged = merged_reasons(left_out, vit.layout.n_layers)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in merged.items())
        raise UnsupportedSiteError(f"{type(vit.module).__name__} has none of these sites: {reasons}.")
    return [name for name in vit.site_names() if name in found], merged


_GLOBAL = ("embed", "ln_final", "pooled", "logits")


def features_at(
    vit: HookedViT,
    columns: Data,
    column: str,
    sites: Sequence[str],
    tokens: Any = "all",
    *,
    folder: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Float[Tensor, "example feature"]]:
    """Return one vector per image and site: the mean over the chosen tokens, heads side by side.

    Args:
        vit: the model.
        columns: the examples.
        column: the image column.
        sites: canonical site names without an axis of keys.
        tokens: a selector in any form that a spec takes; sites without tokens ignore it.
        folder: keeps what has been read, so that the same call goes on where it was stopped.
        progress: show a bar if it takes longer than two seconds.

    Raises:
        SpecError: a site is an attention matrix, or the selector fits neither the model nor the data.
    """
    for site in sites:
        if Site.parse(site).is_attention_matrix:
            raise SpecError(f"{site} is a matrix of tokens by tokens, no feature vector.")
    chosen = resolve_tokens(parse_tokens(tokens), vit, columns, column, "features, tokens")
    n_tokens = vit.layout.tokens.n_tokens

    @torch.no_grad()
    def read(examples: list[int]) -> dict[str, Tensor]:
        _, cache = vit.run(columns.images(column, examples), capture=sites)
        weights = torch.zeros(len(examples), n_tokens)
        for row, example in enumerate(examples):
            picked = chosen.of(example)
            weights[row, list(range(n_tokens)) if picked is None else list(picked)] = 1
        weights = weights / weights.sum(1, keepdim=True)
        found = {}
        for site in sites:
            value = cache[site].float()
            if Site.parse(site).has_tokens:
                if value.shape[1] != n_tokens:
                    raise SpecError(f"{site} has {value.shape[1]} tokens, not the {n_tokens} of the stream.")
                value = torch.einsum("bt,bt...->b...", weights.to(value), value)
            found[site] = value.flatten(1).cpu()
        return found

    selected = [chosen.shared, chosen.each]
    with KeptReadings(folder, vit, columns, [column], reading="features", sites=sites, at=selected) as kept:
        every = [
            found
            for _, found in in_batches(
                vit, columns.n, read, kept, sites=sites, progress=progress, what="features"
            )
        ]
    return {site: torch.cat([found[site] for found in every]) for site in sites}


def labels_of(columns: Data, column: str) -> tuple[Int[np.ndarray, " example"], list[str]]:
    """Return the labels in a column as numbers from 0, and their names in order.

    Raises:
        DataError: there is no such column, or its entries are no labels, or all are the same.
    """
    if column not in columns.columns:
        raise DataError(
            f"There is no column of labels {column!r}.{suggest(column, columns.columns)} Columns: "
            f"{', '.join(columns.columns)}."
        )
    entries = []
    for example, entry in enumerate(columns.values(column)):
        plain = entry.item() if hasattr(entry, "item") and getattr(entry, "ndim", 0) == 0 else entry
        if not isinstance(plain, (str, int, bool)):
            raise DataError(
                f"Column {column!r}, example {example}: {type(plain).__name__} is no label (a number or a "
                "word)."
            )
        entries.append(plain)
    kinds: Mapping[Any, int] = {value: index for index, value in enumerate(sorted(set(entries), key=str))}
    if len(kinds) < 2:
        raise DataError(
            f"All {len(entries)} examples have the label {next(iter(kinds), None)!r} in {column!r}; two are "
            "needed."
        )
    return np.array([kinds[entry] for entry in entries]), [str(value) for value in kinds]
