"""The parts of a logit for a batch of images: what every layer, head, token and neuron adds to it.

The last residual stream is the embedding plus every increment. A logit is a dot product with that stream and
a constant once the norms' scales are held (`vit_mechinterp.model.tail`), so it is a sum with one term per
increment; heads, source tokens and neurons cut increments further, each linearly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vit_mechinterp.circuits.reading import merged_reasons
from vit_mechinterp.errors import UnsupportedSiteError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.tail import LinearReadout

__all__ = ["PartSites", "Parts", "logit_parts", "part_sites"]


_BY_LAYER = ("heads", "sources", "neurons")


@dataclass(frozen=True)
class PartSites:
    """Which layers and increments are read.

    Attributes:
        first: the layer whose input is the first part; 0 unless earlier layers have other tokens.
        increments: layer to those of ``attn_out`` and ``mlp_out`` that it has.
        heads, sources, neurons: layers that are cut into these.
        left_out: site to the reason why it is not read.
    """

    first: int
    increments: Mapping[int, Sequence[str]]
    heads: Sequence[int]
    sources: Sequence[int]
    neurons: Sequence[int]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class Parts:
    """Contributions, one row per image. Keys of ``heads``, ``sources``, ``neurons`` are layers.

    Attributes:
        components: name to ``[batch]``; with ``constant`` they sum to the value.
        tokens: the same sum by position of the last stream, ``[batch, token]``.
        heads: ``[batch, head]``.
        sources: what a layer's heads bring from each token, ``[batch, token]``.
        neurons: ``[batch, neuron]``.
        residual: value minus the sum of the components and the constant, ``[batch]``: rounding.
        size: sum of the sizes of the components, ``[batch]``.
    """

    components: dict[tuple[str, int], Float[Tensor, " batch"]]
    tokens: Float[Tensor, "batch token"]
    heads: dict[int, Float[Tensor, "batch head"]]
    sources: dict[int, Float[Tensor, "batch token"]]
    neurons: dict[int, Float[Tensor, "batch neuron"]]
    residual: Float[Tensor, " batch"]
    size: Float[Tensor, " batch"]

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as `of` takes it."""
        named = {f"components/{layer}/{part}": value for (part, layer), value in self.components.items()}
        for kind in _BY_LAYER:
            named |= {f"{kind}/{layer}": value for layer, value in getattr(self, kind).items()}
        return named | {kind: getattr(self, kind) for kind in ("tokens", "residual", "size")}

    @classmethod
    def of(cls, named: Mapping[str, Tensor]) -> Parts:
        """Put together what `tensors` took apart."""
        whole: dict[str, Any] = {"components": {}, **{kind: {} for kind in _BY_LAYER}}
        for name, value in named.items():
            kind, *place = name.split("/")
            if kind == "components":
                whole[kind][place[1], int(place[0])] = value
            elif place:
                whole[kind][int(place[0])] = value
            else:
                whole[kind] = value
        return cls(**whole)


def part_sites(vit: HookedViT, kinds: Sequence[str]) -> PartSites:
    """Return what can be read on this model.

    Raises:
        UnsupportedSiteError: the last block's residual stream cannot be read.
    """
    absent, sites = vit.layout.absent, vit.sites()
    n = vit.layout.n_layers
    last = f"blocks.{n - 1}.resid_post"
    vit.expand([last])
    first = n
    for layer in reversed(range(n)):
        ends = (f"blocks.{layer}.resid_pre", f"blocks.{layer}.resid_post")
        if any(end not in sites or sites[end].shape != sites[last].shape for end in ends):
            break
        first = layer
    if first == n:
        raise UnsupportedSiteError(
            f"The last block of {type(vit.module).__name__} has no residual stream of one shape before and "
            "behind it, so nothing can be added up."
        )
    left_out = {f"blocks.{r}": "its tokens are not those of the last stream" for r in range(first)}
    increments: dict[int, list[str]] = {}
    found: dict[str, list[int]] = {"heads": [], "sources": [], "neurons": []}
    needed = {
        "heads": ("attn_out", "attn.z", "attn.result"),
        "sources": ("attn_out", "attn.z", "attn.result", "attn.v", "attn.pattern"),
        "neurons": ("mlp_out", "mlp.post"),
    }
    for layer in range(first, n):
        increments[layer] = []
        for site in ("attn_out", "mlp_out"):
            name = f"blocks.{layer}.{site}"
            if name in absent:
                left_out[name] = absent[name]
            else:
                increments[layer].append(site)
        for kind, wanted in needed.items():
            if kind not in kinds:
                continue
            lacking = [f"blocks.{layer}.{site}" for site in wanted if f"blocks.{layer}.{site}" in absent]
            left_out.update({name: absent[name] for name in lacking})
            if not lacking:
                found[kind].append(layer)
    return PartSites(
        first, increments, found["heads"], found["sources"], found["neurons"], merged_reasons(left_out, n)
    )


def logit_parts(
    vit: HookedViT, x: Float[Tensor, "batch *image"], readout: LinearReadout, sites: PartSites
) -> Parts:
    """Cut the values of a readout into parts.

    Args:
        vit: the model.
        x: the images that ``readout`` was made at.
        readout: see `linear_readout`.
        sites: see `part_sites`.
    """
    n = vit.layout.n_layers
    wanted = [f"blocks.{r}.{end}" for r in range(sites.first, n) for end in ("resid_pre", "resid_post")]
    wanted += [f"blocks.{r}.{site}" for r, own in sites.increments.items() for site in own]
    wanted += [f"blocks.{r}.attn.z" for r in dict.fromkeys([*sites.heads, *sites.sources])]
    wanted += [f"blocks.{r}.{site}" for r in sites.sources for site in ("attn.v", "attn.pattern")]
    wanted += [f"blocks.{r}.mlp.post" for r in sites.neurons]
    with torch.enable_grad():
        _, cache = vit.run(x.detach().clone().requires_grad_(), capture=dict.fromkeys(wanted))
    slope = readout.gradient
    wide = slope.double()

    def worth(value: Tensor) -> Tensor:
        return (wide * value.detach().double()).flatten(1).sum(1)

    components = {("embed", sites.first): worth(cache[f"blocks.{sites.first}.resid_pre"])}
    heads, sources, neurons = {}, {}, {}
    behind: Tensor | None = None
    for layer, own in sites.increments.items():
        before, after = (cache[f"blocks.{layer}.{end}"] for end in ("resid_pre", "resid_post"))
        if behind is not None:
            components["between blocks", layer] = worth(before) - behind
        behind = worth(after)
        rest = behind - worth(before)
        for site in own:
            increment = cache[f"blocks.{layer}.{site}"]
            components[site, layer] = worth(increment)
            rest = rest - components[site, layer]
            with torch.enable_grad():
                total = (slope * increment.to(slope.dtype)).sum()
            if site == "attn_out" and layer in (*sites.heads, *sites.sources):
                z = cache[f"blocks.{layer}.attn.z"]
                (pull,) = torch.autograd.grad(total, z, retain_graph=True)
                heads[layer] = (pull.double() * z.detach().double()).sum(dim=(1, 3))
                if layer in sites.sources:
                    read = {k: cache[f"blocks.{layer}.attn.{k}"].detach() for k in ("pattern", "v")}
                    brought = _by_source(pull.double(), read["pattern"].double(), read["v"].double())
                    # Where z is more than the pattern times the values (gates, mixed heads), it has no parts.
                    if bool((brought.sum(2) - heads[layer]).abs().max() < 1e-3 * heads[layer].abs().max()):
                        sources[layer] = brought.sum(1)
            if site == "mlp_out" and layer in sites.neurons:
                post = cache[f"blocks.{layer}.mlp.post"]
                (pull,) = torch.autograd.grad(total, post, retain_graph=True)
                neurons[layer] = (pull.double() * post.detach().double()).flatten(1, -2).sum(1)
        components["rest of block", layer] = rest
    assert behind is not None
    parts = torch.stack(list(components.values()))
    return Parts(
        components,
        (wide * readout.stream.double()).sum(2),
        heads,
        sources,
        neurons,
        readout.value - readout.constant - parts.sum(0),
        parts.abs().sum(0) + readout.constant.abs(),
    )


def _by_source(
    pull: Float[Tensor, "batch query head d_head"],
    pattern: Float[Tensor, "batch head query key"],
    v: Float[Tensor, "batch key kv_head d_head"],
) -> Float[Tensor, "batch head key"]:
    """What every head brings from every token: its pattern times the worth of the token's value."""
    values: Any = v.repeat_interleave(pull.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bqhe,bhqk,bkhe->bhk", pull, pattern, values)
