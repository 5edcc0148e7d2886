"""Nodes of a model's graph: what writes into the residual stream, and what reads from it.

Writers (senders) are heads, MLPs and the embedding; readers (receivers) are the heads' queries, keys and
values, the MLPs, and the output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from vit_mechinterp.circuits.patching_cells import n_heads_at
from vit_mechinterp.errors import SpecError, UnsupportedSiteError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Interchange, Site

__all__ = [
    "LOGITS",
    "Node",
    "NodeLike",
    "frozen_sites",
    "other_writers",
    "reaches",
    "receivers_of",
    "senders_of",
]

NodeLike: TypeAlias = "Node | str | tuple[str, int]"
"""A node, a site, or a site and a head."""

LOGITS = "logits"
_READS = ("attn.q", "attn.k", "attn.v")
_MLP_INPUT = ("mlp.post", "ln2")
"""Where an MLP is met before it writes: its hidden activations, else its normalised input."""


@dataclass(frozen=True)
class Node:
    """A place that writes into the stream or reads from it: a site, and one of its heads (None: all)."""

    site: str
    head: int | None = None

    @property
    def layer(self) -> int | None:
        """The layer; None for the embedding and the output."""
        return Site.parse(self.site).layer

    @property
    def kind(self) -> str:
        """What the node is, for a reader: ``head``, ``mlp``, ``q``, ``k``, ``v``, ``embed`` or ``logits``."""
        name = Site.parse(self.site).name
        if name.startswith("mlp") or name == "ln2":
            return "mlp"
        return "head" if name == "attn.z" else name.removeprefix("attn.")

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The selector of the head."""
        return None if self.head is None else (self.head,)

    def __str__(self) -> str:
        if self.layer is None:
            return self.site
        head = "" if self.head is None else f".{self.head}"
        return f"{self.layer}{head} {self.kind}"

    def interchange(self, source: Any, tokens: Any = "all") -> Interchange:
        """The intervention that puts this node's value from elsewhere in place."""
        return Interchange(site=self.site, heads=self.heads, source=source, tokens=tokens)


def senders_of(
    vit: HookedViT, senders: Iterable[NodeLike] | None, *, embed: bool = False
) -> tuple[list[Node], dict[str, str]]:
    """Return the writers meant (None: all heads and MLPs), and reasons for those that the model lacks.

    Raises:
        SpecError: one of them writes nothing into the stream, or has no such head.
    """
    if senders is not None:
        nodes = [_node(vit, entry) for entry in senders]
        for node in nodes:
            if node.kind not in ("head", "embed", "attn_out") and not node.site.endswith("mlp_out"):
                raise SpecError(
                    f"{node.site} writes nothing into the residual stream, so it sends nothing. Senders: "
                    "('blocks.L.attn.z', head), 'blocks.L.attn.z', 'blocks.L.attn_out', 'blocks.L.mlp_out', "
                    "'embed'."
                )
        return nodes, {}
    found, left_out = ([Node("embed")] if embed else []), {}
    for layer in range(vit.layout.n_layers):
        for name in ("attn.z", "mlp_out"):
            site = f"blocks.{layer}.{name}"
            if site in vit.layout.absent:
                left_out[site] = vit.layout.absent[site]
            elif name == "mlp_out":
                found.append(Node(site))
            else:
                found += [Node(site, head) for head in range(n_heads_at(vit, name, layer))]
    return found, left_out


def receivers_of(vit: HookedViT, receivers: Iterable[NodeLike] | None) -> tuple[list[Node], dict[str, str]]:
    """Return the readers meant (None: every head's q, k and v, every MLP, the output), and what is left out.

    ``"blocks.L.mlp"`` means the MLP of a layer.

    Raises:
        SpecError: one of them reads nothing from the stream; UnsupportedSiteError: the model lacks it.
    """
    if receivers is not None:
        nodes = []
        for entry in receivers:
            node = _node(vit, _mlp_input(vit, entry))
            if node.kind not in ("q", "k", "v", "mlp", LOGITS) or node.site.endswith("mlp_out"):
                raise SpecError(
                    f"{node.site} is no place where the residual stream is read. Receivers: "
                    "('blocks.L.attn.q', head), ('blocks.L.attn.k', head), ('blocks.L.attn.v', head), "
                    "'blocks.L.mlp', 'logits'."
                )
            nodes.append(node)
        return nodes, {}
    found, left_out = [], {}
    for layer in range(vit.layout.n_layers):
        for name in _READS:
            site = f"blocks.{layer}.{name}"
            if site in vit.layout.absent:
                left_out[site] = vit.layout.absent[site]
            else:
                found += [Node(site, head) for head in range(n_heads_at(vit, name, layer))]
        try:
            found.append(_node(vit, _mlp_input(vit, f"blocks.{layer}.mlp")))
        except UnsupportedSiteError as error:
            left_out[f"blocks.{layer}.mlp"] = str(error)
    return [*found, Node(LOGITS)], left_out


def reaches(vit: HookedViT, sender: Node, receiver: Node) -> bool:
    """Whether a sender writes into the stream before a receiver reads from it."""
    if receiver.layer is None or sender.layer is None:
        return receiver.site == LOGITS or sender.site == "embed"
    if receiver.kind == "mlp" and sender.kind in ("head", "attn_out") and not vit.layout.family.parallel:
        return sender.layer <= receiver.layer
    return sender.layer < receiver.layer


def frozen_sites(vit: HookedViT, sender: Node, *, mlps: bool = True) -> list[str]:
    """Return the sites to hold at their clean values so that nothing but the stream carries the sender on.

    Attention is held at ``attn.z`` (where a model lacks it, at ``attn_out``) in every later layer, MLPs at
    ``mlp_out`` behind the sender.

    Raises:
        UnsupportedSiteError: the model has neither.
    """
    first = -1 if sender.layer is None else sender.layer
    held = []
    for layer in range(max(first, 0), vit.layout.n_layers):
        if layer > first:
            held.append(
                _first_of(vit, layer, ("attn.z", "attn_out"), "hold its attention at the clean value")
            )
        if mlps and (layer > first or sender.kind != "mlp"):
            held.append(_first_of(vit, layer, ("mlp_out",), "hold its MLP at the clean value"))
    return held


def other_writers(vit: HookedViT, pixels: Tensor) -> list[int]:
    """Return the layers in which something besides attention and MLP writes into the stream, such as a
    convolution: where ``resid_pre + attn_out + mlp_out`` is not ``resid_post``.

    Such a branch has no site, so it can be neither held nor attributed to.
    """
    parts = ("resid_pre", "attn_out", "mlp_out", "resid_post")
    layers = [
        layer
        for layer in range(vit.layout.n_layers)
        if not any(f"blocks.{layer}.{part}" in vit.layout.absent for part in parts)
    ]
    with torch.no_grad():
        _, cache = vit.run(pixels, capture=[f"blocks.{n}.{part}" for n in layers for part in parts])
    found = []
    for layer in layers:
        *addends, total = (cache[f"blocks.{layer}.{part}"].float() for part in parts)
        # A share far above the rounding of half precision, and far below what a branch would write.
        if float((sum(addends) - total).norm()) > 0.02 * float(total.norm()):
            found.append(layer)
    return found


def _first_of(vit: HookedViT, layer: int, names: Sequence[str], purpose: str) -> str:
    sites = [f"blocks.{layer}.{name}" for name in names]
    for site in sites:
        if site not in vit.layout.absent:
            return site
    reasons = "; ".join(f"{site}: {vit.layout.absent[site]}" for site in sites)
    raise UnsupportedSiteError(
        f"{type(vit.module).__name__} has no site in block {layer} to {purpose} ({reasons})."
    )


def _mlp_input(vit: HookedViT, entry: NodeLike) -> NodeLike:
    if not isinstance(entry, str) or not entry.endswith(".mlp"):
        return entry
    layer = Site.parse(f"{entry}_out").layer
    assert layer is not None
    return _first_of(vit, layer, _MLP_INPUT, "meet its MLP before it writes")


def _node(vit: HookedViT, entry: NodeLike) -> Node:
    if isinstance(entry, Node):
        node = entry
    elif isinstance(entry, str):
        node = Node(str(Site.parse(entry)))
    else:
        node = Node(str(Site.parse(entry[0])), entry[1])
    parsed = Site.parse(node.site)
    if node.site != LOGITS:
        vit.check_site(parsed)
    if node.head is not None:
        assert parsed.layer is not None
        most = n_heads_at(vit, parsed.name, parsed.layer)
        if not 0 <= node.head < most:
            raise SpecError(f"{node.site} has heads 0 to {most - 1}; there is no head {node.head}.")
    return node
