"""Which heads a walk-through shows: for every role, the head that plays it most.

Lepori et al. (2024, Fig. 22) show heads of CLIP chosen by hand. Here a head is chosen for a role by a number
(this project's own way), the largest mean over images, no head twice:

* one token of the object: of a token's attention, what goes to that *other* token of its object that gets
  most;
* whole object: WO times the evenness of the attention within the object, exp(entropy) over its tokens;
* between objects, between pairs, background: the shares WP, BP and BG; registers: the share of attention to
  register tokens, if the model has them.

The measures of an object are means over its tokens; the largest over the objects counts, as for the shares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.attention_kinds import KIND_NAMES, kinds_of
from vit_mechinterp.circuits.attention_parts import TokenSets
from vit_mechinterp.circuits.attention_shares import attention_shares, reduce_patterns
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT

__all__ = [
    "ChosenHead",
    "HeadMeasures",
    "Heads",
    "choose_heads",
    "given_heads",
    "measure_heads",
    "named_heads",
    "within_object",
]

Heads = Sequence[tuple[int, int]] | Mapping[str, tuple[int, int]]

_ONE, _WHOLE, _WITHIN = "one token of the object", "whole object", KIND_NAMES["WO"]
_BETWEEN_PAIRS = KIND_NAMES["BP"]


@dataclass(frozen=True)
class ChosenHead:
    """A head, what it is shown for, and by how much.

    Attributes:
        name: what the reader calls it, its role or the caller's name and the role.
        role: what it is shown for.
        layer, head: the head.
        query: the query set whose attention is shown: the one with the larger share in the image.
        score: the mean of what it was chosen by over the images.
    """

    name: str
    role: str
    layer: int
    head: int
    query: int
    score: float

    @property
    def within(self) -> bool:
        """Whether its attention stays within an object, so that the object alone is worth a look."""
        return self.role in (_ONE, _WHOLE, _WITHIN)


@dataclass(frozen=True)
class HeadMeasures:
    """What heads are chosen by.

    Attributes:
        tokens: how tokens are parted.
        shares: the shares of attention ``[layer, example, head, query, set]``.
        by_role: role to its measure ``[layer, example, head, candidate]``; also attention within an object
            and to CLS, for which no head is chosen.
    """

    tokens: TokenSets
    shares: Float[Tensor, "layer example head query set"]
    by_role: Mapping[str, Float[Tensor, "layer example head candidate"]]

    def means(self, role: str) -> Float[Tensor, "layer head"]:
        """The largest over candidates, averaged over the counted images."""
        return self.by_role[role][:, self.tokens.counted].amax(dim=-1).double().mean(dim=1)

    def query(self, role: str, layer: int, head: int, example: int) -> int:
        """The query set with the larger value in an image: an object or, between pairs, a pair."""
        first = self.tokens.n_objects if role == _BETWEEN_PAIRS else 0
        return first + int(self.by_role[role][layer, example, head].argmax())


def measure_heads(
    vit: HookedViT, data: Data, base: str, tokens: TokenSets, *, progress: bool = True
) -> HeadMeasures:
    """Measure every head on every image.

    Raises:
        SpecError: the model has no attention patterns.
    """
    n_sets, n = tokens.sets.shape[1], tokens.n_compared
    own = [[mask.nonzero().flatten() for mask in example[:n]] for example in tokens.objects]

    def measure(pattern: Tensor, examples: range) -> Tensor:
        some = slice(examples.start, examples.stop)
        queries, keys = (mask[some].to(vit.device) for mask in (tokens.queries, tokens.sets))
        found = torch.zeros(*pattern.shape[:2], queries.shape[1], n_sets + 2, device=pattern.device)
        found[..., :n_sets] = attention_shares(pattern, queries, keys)
        for row, example in enumerate(examples):
            for number, places in enumerate(own[example]):
                if len(places):
                    at = places.to(pattern.device)
                    found[row, :, number, n_sets:] = within_object(pattern[row][:, at][:, :, at])
        return found

    found = reduce_patterns(vit, data, base, measure, progress=progress)
    shares, within = found[..., :n_sets], found[..., :n, n_sets:]
    kinds = kinds_of(shares, tokens)
    by_role = {_ONE: within[..., 0], _WHOLE: within[..., 1], "between objects": kinds["WP"]}
    if tokens.has_display:
        by_role[_BETWEEN_PAIRS] = kinds["BP"]
    by_role[KIND_NAMES["BG"]] = kinds["BG"]
    if "registers" in kinds:
        by_role["registers"] = kinds["registers"]
    seen = {name: kinds[name] for name in ("CLS",) if name in kinds}
    return HeadMeasures(tokens, shares, by_role | {_WITHIN: kinds["WO"]} | seen)


def within_object(pattern: Float[Tensor, "*batch query key"]) -> Float[Tensor, "*batch 2"]:
    """Measure the attention of an object's tokens to one another, given their rows and columns of a pattern.

    Returns:
        The attention to the other token that gets most, and the attention to all tokens times its evenness
        (exp(entropy) over their number: 1 if even, 1 / n if on one token); means over tokens.
    """
    n = pattern.shape[-1]
    itself = torch.eye(n, dtype=torch.bool, device=pattern.device)
    most = pattern.masked_fill(itself, 0.0).amax(dim=-1)
    total = pattern.sum(dim=-1)
    share = pattern / total.clamp(min=1e-12)[..., None]
    entropy = -torch.xlogy(share, share).sum(dim=-1)
    return torch.stack([most.mean(dim=-1), (total * entropy.exp() / n).mean(dim=-1)], dim=-1)


def choose_heads(measures: HeadMeasures, example: int) -> list[ChosenHead]:
    """Return for every role the head of the largest mean that no role before has; ``example`` is shown."""
    chosen: list[ChosenHead] = []
    for role in measures.by_role:
        means = measures.means(role)
        for one in chosen:
            means[one.layer, one.head] = -1.0
        layer, head = divmod(int(means.argmax()), means.shape[1])
        # An object of one token has no other token, and a small model may have too few heads.
        if role not in (_WITHIN, "CLS") and means[layer, head] > 0:
            query = measures.query(role, layer, head, example)
            chosen.append(ChosenHead(role, role, layer, head, query, float(means[layer, head])))
    return chosen


def given_heads(
    named: Mapping[str, tuple[int, int]], measures: HeadMeasures, example: int
) -> list[ChosenHead]:
    """Say of given heads where the attention of objects goes most."""
    means = {role: measures.means(role) for role in measures.by_role if role not in (_ONE, _WHOLE)}
    chosen = []
    for name, (layer, head) in named.items():
        role = max(means, key=lambda kind: float(means[kind][layer, head]))
        query = measures.query(role, layer, head, example)
        score = float(means[role][layer, head])
        chosen.append(ChosenHead(f"{name}: {role}", role, layer, head, query, score))
    return chosen


def named_heads(vit: HookedViT, heads: Heads) -> dict[str, tuple[int, int]]:
    """Return given heads by name, by default numbers from 1.

    Raises:
        SpecError: there is none, or the model has no such head.
    """
    named = dict(heads) if isinstance(heads, Mapping) else {f"{i + 1}": own for i, own in enumerate(heads)}
    if not named:
        raise SpecError("heads is empty; name heads as (layer, head), or leave it out.")
    layers, n_heads = vit.layout.n_layers, vit.layout.n_heads
    for name, place in named.items():
        if not isinstance(place, Sequence):
            raise SpecError(f"heads, {name!r}: {place!r} is no head; name heads as (layer, head).")
        if len(place) != 2 or not (0 <= place[0] < layers and 0 <= place[1] < n_heads):
            raise SpecError(
                f"heads, {name!r}: {tuple(place)} is no (layer, head) of this model; layers are 0 to "
                f"{layers - 1}, heads 0 to {n_heads - 1}."
            )
    return named
