"""Sites as tensors that enter or leave modules, which is all that hooks, nnsight and pyvene know of.

`steps` turns functions at named sites into functions at module boundaries. What lies inside the attention
call (queries, scores, ...) is no such tensor; where the output projection's input is the heads' output side
by side, ``attn.z`` is one after all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vit_mechinterp.bridges.sequential import Touch
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.layout import TAP_SITES
from vit_mechinterp.model.ports import Difference, Port, Share, is_missing, lookup
from vit_mechinterp.model.visiting import contribution, replace_output
from vit_mechinterp.spec import Site

__all__ = ["Step", "called_again", "inside_attention", "steps", "whole_port", "z_port"]


@dataclass(frozen=True)
class Step:
    """A function at a module's boundary; steps at one boundary act in their order."""

    port: Port
    touch: Touch

    def on_tensor(self, value: Tensor) -> Tensor:
        """Apply the function to the native tensor, whatever part of it is meant; the same object if nothing
        changed."""
        new: Tensor = replace_output(replace(self.port, field=None), value, self.touch)
        return new


def inside_attention(vit: HookedViT, site: Site) -> bool:
    """Whether a site lies within the attention call, where no module's boundary reaches it."""
    return site.name in TAP_SITES and str(site) not in vit.layout.ports


def called_again(vit: HookedViT, name: str) -> bool:
    """Whether a site lies at a module that its block calls more than once."""
    port = vit.layout.ports.get(name)
    if name.endswith(".attn.result"):
        return called_again(vit, name.replace("attn.result", "attn_out"))
    if isinstance(port, Difference):
        return called_again(vit, port.of) or called_again(vit, port.minus)
    return isinstance(port, Port) and port.call is not None


def whole_port(vit: HookedViT, name: str | Site, package: str) -> Port:
    """The module boundary that holds a site's tensor as it is.

    Raises:
        SpecError: the model has no such site, or it is no whole tensor at a boundary, so ``package`` has no
            name for it.
    """
    site = Site.parse(name)
    vit.check_site(site)
    port, model = vit.layout.ports.get(str(site)), type(vit.module).__name__
    instead = f'Use vmi.execute(..., backend="{package}"), or vit.run and vit.hooks.'
    if not isinstance(port, Port):
        raise SpecError(
            f"{site} is not what enters or leaves a module of {model}, so {package} has no name for "
            f"it. {instead}"
        )
    arranged = port.spatial or port.head_first or port.token_first or port.packing is not None
    if port.heads is not None or port.part is not None or port.call is not None or arranged:
        raise SpecError(
            f"{site} is a part, or another arrangement, of what enters or leaves {port.path} of {model}, so "
            f"{package} has no name for it. {instead}"
        )
    return port


def z_port(vit: HookedViT, layer: int) -> Port | None:
    """Where the heads' output enters the output projection; None where it does not do so side by side."""
    layout = vit.layout
    block: nn.Module = lookup(vit.module, layout.block_path(layer))
    projection = lookup(block, layout.family.out_projection)
    width = layout.n_heads * layout.d_head
    if not isinstance(projection, nn.Linear) or projection.in_features != width:
        return None
    if layout.sequence is not None:
        return None
    path = f"{layout.block_path(layer)}.{layout.family.out_projection}"
    return Port(path, "input", heads="first", head_shape=(layout.n_heads, layout.d_head))


def steps(vit: HookedViT, touches: Mapping[Site, Touch]) -> list[Step]:
    """Functions at module boundaries for functions at sites; sites within the attention call are left out,
    apart from ``attn.z`` (see `z_port`)."""
    found: list[Step] = []
    for site in sorted(touches):
        if site.name == "attn.result":
            found += _result(vit, site, touches)
        elif site.name == "attn_out" and Site(site.layer, "attn.result") in touches:
            continue  # seen to with the results that it is the sum of
        elif not inside_attention(vit, site):
            found += _at(vit, vit.layout.ports[str(site)], touches[site])
        elif site.name == "attn.z" and site.layer is not None:
            port = z_port(vit, site.layer)
            found += [] if port is None else [Step(port, touches[site])]
    return found


def _at(vit: HookedViT, port: Port | Difference | Share, touch: Touch) -> list[Step]:
    if isinstance(port, Port):
        return [Step(port, touch)]
    return _difference(vit, port, touch) if isinstance(port, Difference) else _share(vit, port, touch)


def _difference(vit: HookedViT, port: Difference, touch: Touch) -> list[Step]:
    """The increment that a later site has over an earlier one."""
    earlier: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        earlier[:] = [value.clone()]
        return value

    def increment(value: Tensor) -> Tensor:
        before = earlier.pop()
        found = value - before
        new = touch(found)
        return value if new is found else before + new

    return [
        *_at(vit, vit.layout.ports[port.minus], keep),
        *_at(vit, vit.layout.ports[port.of], increment),
    ]


def _share(vit: HookedViT, share: Share, touch: Touch) -> list[Step]:
    """One of two increments that are added to the stream in one sum."""
    projection: nn.Linear = lookup(vit.module, share.projection)
    scale: Any = None if share.scale is None else lookup(vit.module, share.scale)
    kept: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        kept[:] = [value]
        return value

    def move(total: Tensor) -> Tensor:
        found = contribution(share, projection, kept.pop())
        found = found if is_missing(scale) else found * scale
        new = touch(found)
        return total if new is found else total + (new - found)

    return [Step(Port(share.projection, "input"), keep), Step(Port(share.through), move)]


def _result(vit: HookedViT, site: Site, touches: Mapping[Site, Touch]) -> list[Step]:
    """Each head's share of the attention increment; an edit moves the increment by the heads' sum."""
    layer = site.layer
    assert layer is not None
    block: nn.Module = lookup(vit.module, vit.layout.block_path(layer))
    projection: nn.Linear = lookup(block, vit.layout.family.out_projection)
    scales = [lookup(block, path) for path in vit.layout.family.attention_scale]
    scale: Any = next((s for s in scales if not is_missing(s)), 1.0)
    attn_out = Site(layer, "attn_out")
    kept: list[Tensor] = []
    port = z_port(vit, layer)
    assert port is not None

    def keep(z: Tensor) -> Tensor:
        kept[:] = [z]
        return z

    def move(value: Tensor) -> Tensor:
        heads = projection.weight.reshape(-1, vit.layout.n_heads, vit.layout.d_head)
        result = torch.einsum("bthd,mhd->bthm", kept.pop(), heads) * scale
        new = touches[site](result)
        value = value if new is result else value + (new - result).sum(dim=2)
        return touches[attn_out](value) if attn_out in touches else value

    return [Step(port, keep), *_at(vit, vit.layout.ports[str(attn_out)], move)]
