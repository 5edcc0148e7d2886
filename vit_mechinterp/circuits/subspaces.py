"""Trained subspaces, taken from a result of `das` or from the folder that it was saved in, for reuse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vit_mechinterp.circuits.alignment import gate_name, rotation_name
from vit_mechinterp.circuits.das_rows import NO_CONTROL
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.errors import DataError, SpecError, suggest

if TYPE_CHECKING:
    from vit_mechinterp.model import HookedViT

__all__ = ["Subspace", "alignment_result", "trained_subspaces"]


@dataclass(frozen=True)
class Subspace:
    """The part of one site's activations that a search found.

    Attributes:
        attribute: what it carries.
        seed: of the search.
        layer: the block.
        site: the whole name of the site.
        rotation: ``[d, d]``, orthogonal; ``[token, d, d]`` where every token has its own.
        gate: ``[d]`` or ``[token, d]``, zeros and ones.
    """

    attribute: str
    seed: int
    layer: int
    site: str
    rotation: Float[Tensor, "*token d d"]
    gate: Float[Tensor, "*token d"]

    @property
    def n_tokens(self) -> int | None:
        """How many tokens have a subspace each; None where all share one."""
        return None if self.gate.ndim == 1 else len(self.gate)

    @property
    def rank(self) -> int | float:
        """Open dimensions; their mean over tokens where each has its own."""
        return int(self.gate.sum()) if self.n_tokens is None else float(self.gate.sum(dim=-1).mean())

    @property
    def basis(self) -> Float[Tensor, "*token d r"]:
        """The open columns of the rotation: an orthonormal basis of the subspace. Where every token has its
        own, all columns that are open for any of them; ``basis_gate`` says for which.
        """
        return self.rotation[..., self._columns]

    @property
    def basis_gate(self) -> Float[Tensor, "token r"] | None:
        """Which columns of the basis are open for each token; None where all are."""
        return None if self.n_tokens is None else self.gate[..., self._columns]

    @property
    def _columns(self) -> Bool[Tensor, " d"]:
        return (self.gate > 0).reshape(-1, self.gate.shape[-1]).any(dim=0)


def alignment_result(source: CircuitResult | str | Path, vit: HookedViT) -> CircuitResult:
    """Return a result of `das` or `das_by_attribute`, read from its folder if need be, if it is this model's.

    Raises:
        DataError: it is another circuit's, holds no subspaces, or was found on another model.
    """
    result = source if isinstance(source, CircuitResult) else CircuitResult.load(source)
    where = "The result" if isinstance(source, CircuitResult) else f"{source}"
    if result.name != "das":
        raise DataError(f"{where} is one of {result.name!r}; subspaces come from a result of 'das'.")
    if not result.tensors:
        raise DataError(f"{where} holds no subspaces: tensors.safetensors is missing. Save the result again.")
    found = result.provenance.get("model")
    if found != (own := vit.fingerprint()):
        other = result.provenance.get("model_source", "of unknown source")
        raise DataError(
            f"{where} was found on another model, {other} (fingerprint {str(found)[:12]}), not on "
            f"{vit.source or type(vit.module).__name__} ({own[:12]}). Subspaces of one model mean nothing in "
            "another: run das on this one."
        )
    return result


def trained_subspaces(
    result: CircuitResult, attribute: str, layers: Sequence[int] | None = None
) -> list[Subspace]:
    """Return the subspaces of one attribute, of every seed and layer; those of controls are left out.

    Args:
        result: of `das` or `das_by_attribute`.
        attribute: a value of the table's column.
        layers: which layers; all that were searched if left out.

    Raises:
        SpecError: the attribute or a layer was not searched; those that were are named.
    """
    table = result.table[result.table["control"] == NO_CONTROL]
    known = list(dict.fromkeys(table["attribute"]))
    if attribute not in known:
        raise SpecError(
            f"No subspace for the attribute {attribute!r} was searched.{suggest(attribute, known)} Searched: "
            f"{', '.join(known) or 'none'}."
        )
    rows = table[table["attribute"] == attribute].drop_duplicates(["seed", "layer"])
    searched = sorted(set(rows["layer"].tolist()))
    if missing := sorted(set(layers or ()) - set(searched)):
        raise SpecError(
            f"layers={list(layers or ())}: no subspace for {attribute} was searched in layer "
            f"{', '.join(map(str, missing))}. Searched: {', '.join(map(str, searched))}."
        )
    found = []
    for row in rows.itertuples():
        if layers is not None and row.layer not in layers:
            continue
        layer, seed = int(str(row.layer)), int(str(row.seed))
        prefix = _prefix(result.tensors, attribute, seed, layer)
        rotation, gate = (result.tensors[prefix + of(layer)] for of in (rotation_name, gate_name))
        if not bool(((gate == 0) | (gate == 1)).all()):
            raise DataError(f"{prefix}{gate_name(layer)} is not binary; a trained gate is zeros and ones.")
        found.append(
            Subspace(attribute, seed, layer, str(row.site), torch.as_tensor(rotation), torch.as_tensor(gate))
        )
    return found


def _prefix(tensors: Mapping[str, Tensor], attribute: str, seed: int, layer: int) -> str:
    """What the names of a search's tensors begin with; it depends on how many searches a result holds."""
    for prefix in (f"{attribute}.seed_{seed}.", f"{attribute}.", f"seed_{seed}.", ""):
        if prefix + rotation_name(layer) in tensors:
            return prefix
    raise DataError(
        f"The result has no tensor {rotation_name(layer)!r} for {attribute}, seed {seed}. It holds: "
        f"{', '.join(list(tensors)[:6])}, ..."
    )
