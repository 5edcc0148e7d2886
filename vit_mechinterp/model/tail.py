"""What a model does behind its last block, as a linear function of the residual stream.

Between the last residual stream and the output stand norms, a pooling and a head. With the scale of every
norm held at its value for the image at hand, most readouts are affine: CLS and mean pooling, norms before or
after the pooling, linear heads and projections. Then any linear function of the output is a dot product with
the stream and a constant. Nothing is known of a family here: norms are described by what they do, and whether
the rest is affine is tried out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["LinearReadout", "last_stream", "linear_readout"]

Function = Callable[[Tensor], Tensor]

_PLAIN = (nn.Identity, nn.Dropout, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class LinearReadout:
    """``value = sum(gradient * stream) + constant``, image by image, norm scales held.

    Attributes:
        stream: the residual stream behind the last block.
        gradient: what a unit of the stream adds to the value.
        constant: what biases add.
        value: what the native model gives.
    """

    stream: Float[Tensor, "batch token d_model"]
    gradient: Float[Tensor, "batch token d_model"]
    constant: Float[Tensor, " batch"]
    value: Float[Tensor, " batch"]


@dataclass(frozen=True)
class _HeldNorm:
    """A norm at one call, with the scale that it had there: ``y = weight * scale * x + bias``, x centred or
    not.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    centred: bool

    def __call__(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(dim=-1, keepdim=True)
        return (self.weight * self.scale * x + self.bias).to(x.dtype)


def last_stream(vit: HookedViT) -> str:
    """Return the site of the residual stream that the readout reads."""
    return f"blocks.{vit.layout.n_layers - 1}.resid_post"


def linear_readout(vit: HookedViT, x: Float[Tensor, "batch *image"], function: Function) -> LinearReadout:
    """Write a linear function of the output as a linear function of the last residual stream.

    Args:
        vit: the model.
        x: images as the model takes them.
        function: a linear function from outputs ``[batch, *output]`` to numbers ``[batch]``, row by row.

    Raises:
        SpecError: the output is not linear in the stream even with norm scales held (attention pooling,
            heads with a nonlinearity), a norm is none that can be held, or the output also reads something
            else.
    """
    site = last_stream(vit)
    vit.expand([site])
    with vit.lock, torch.no_grad():
        calls = _Calls(vit)
        names: list[str] = []
        streams: dict[str, Tensor] = {}

        def begin(value: Tensor) -> None:
            streams[site] = value.clone()
            calls.inside = True

        with calls.recording(names), vit.hooks({site: begin}):
            value = function(vit(x).float()).double()
        stream = streams[site]
        held = {key: _held(module, *seen) for key, (module, *seen) in calls.seen.items()}

        def at(point: Tensor) -> Tensor:
            # Another image in front: what reads anything but the last stream shows itself.
            with calls.replacing(held), vit.hooks({site: lambda _: point}):
                return function(vit(torch.zeros_like(x)).float())

        leaf = stream.detach().clone().requires_grad_()
        with torch.enable_grad():
            found = at(leaf)
            slope = None
            if found.requires_grad:
                (slope,) = torch.autograd.grad(found.sum(), leaf, allow_unused=True)
        if slope is None:
            raise SpecError(f"The output of {type(vit.module).__name__} does not depend on {site}.")
        constant = value - (slope.double() * stream.double()).flatten(1).sum(1)
        readout = LinearReadout(stream, slope, constant, value)
        _check(vit, readout, at, found.detach().double(), names)
    return readout


def _check(vit: HookedViT, readout: LinearReadout, at: Function, found: Tensor, names: list[str]) -> None:
    """The held norms must give the native value, and another stream the value that the slope foretells."""
    stream = readout.stream
    # Tokens change places and sizes, so that anything but a straight line is seen.
    other = (0.4 * stream.roll(1, dims=1) - 0.7 * stream.flip(1)).to(stream.dtype)
    foretold = (readout.gradient.double() * other.double()).flatten(1).sum(1) + readout.constant
    size = (
        (readout.gradient.double() * stream.double()).abs().flatten(1).sum(1) + readout.constant.abs() + 1e-12
    )
    tolerance = 1e-4 if stream.dtype in (torch.float32, torch.float64) else 3e-2
    off = torch.maximum((found - readout.value).abs(), (at(other).double() - foretold).abs()) / size
    if not bool((off < tolerance).all()):
        raise SpecError(
            f"The output of {type(vit.module).__name__} is not linear in its last residual stream, even with "
            f"the scales of its norms held, or reads something else (it is off by {float(off.max()):.2g} of "
            f"its size). Behind the last block run: {', '.join(dict.fromkeys(names)) or 'no modules'}. "
            "Attention pooling and heads with a nonlinearity have no exact parts: use logit_lens, "
            "activation_patching or attribution_patching."
        )


class _Calls:
    """The calls of norms behind the last block, by module and count."""

    def __init__(self, vit: HookedViT) -> None:
        inside = f"{vit.layout.blocks_path}."
        self.modules = {
            name: module
            for name, module in vit.module.named_modules()
            if name and not name.startswith(inside) and name != vit.layout.blocks_path
        }
        self.inside = False
        self.seen: dict[tuple[str, int], tuple[nn.Module, Tensor, Tensor]] = {}

    @contextmanager
    def recording(self, names: list[str]) -> Iterator[None]:
        """Keep what enters and leaves every norm, and name everything that runs."""

        def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
            counts = [0]

            def record(module: nn.Module, args: Any, output: Any) -> None:
                if not self.inside:
                    return
                if not isinstance(module, _PLAIN) and not list(module.children()):
                    names.append(type(module).__name__)
                if _is_norm(module) and args:
                    self.seen[name, counts[0]] = (module, args[0].detach(), output.detach())
                    counts[0] += 1

            return record

        with self._hooked({name: hook(name) for name in self.modules}):
            yield
        self.inside = False

    @contextmanager
    def replacing(self, held: dict[tuple[str, int], _HeldNorm]) -> Iterator[None]:
        """Let every recorded call give what the held norm gives."""
        before: dict[str, int] = {}

        def hook(name: str) -> Callable[[nn.Module, Any, Any], Tensor | None]:
            def replace(module: nn.Module, args: Any, output: Any) -> Tensor | None:
                norm = held.get((name, before.get(name, 0)))
                # The same module may also run in front of the blocks, on another number of tokens.
                if norm is None or norm.scale.shape[:-1] != args[0].shape[:-1]:
                    return None
                before[name] = before.get(name, 0) + 1
                return norm(args[0])

            return replace

        with self._hooked({name: hook(name) for name in {name for name, _ in held}}):
            yield

    @contextmanager
    def _hooked(self, hooks: dict[str, Any]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, hook in hooks.items():
                stack.callback(self.modules[name].register_forward_hook(hook).remove)
            yield


def _is_norm(module: nn.Module) -> bool:
    return (
        "norm" in type(module).__name__.lower()
        and not isinstance(module, _PLAIN)
        and not list(module.children())
    )


def _held(module: nn.Module, x: Tensor, y: Tensor) -> _HeldNorm:
    """Describe a norm by what it does to three vectors, and take its scale from the call itself."""
    d = x.shape[-1]
    zero = torch.zeros(1, d, dtype=x.dtype, device=x.device)
    probe = zero + (1.0 - 2.0 * (torch.arange(d, device=x.device) % 2)).to(x.dtype)
    probe = probe - probe.mean()
    try:
        bias = module(zero)
        weight = (module(probe) - bias) / probe * probe.float().square().mean().sqrt().to(x.dtype)
        centred = bool((module(probe + 1) - module(probe)).abs().max() < 1e-3 * module(probe).abs().max())
    except (RuntimeError, TypeError, ValueError) as error:
        raise SpecError(
            f"The norm {type(module).__name__} behind the last block takes no single vectors of {d} features "
            f"({str(error).splitlines()[0]}), so its scale cannot be held."
        ) from None
    bias, weight, wide = bias[0].double(), weight[0].double(), x.double()
    shape = weight * (wide - wide.mean(dim=-1, keepdim=True) if centred else wide)
    size = shape.square().sum(dim=-1, keepdim=True).clamp(min=1e-30)
    scale = ((y.double() - bias) * shape).sum(dim=-1, keepdim=True) / size
    off = float((shape * scale + bias - y.double()).abs().max() / y.double().abs().max().clamp(min=1e-30))
    if off > (1e-3 if x.dtype in (torch.float32, torch.float64) else 3e-2):
        raise SpecError(
            f"The norm {type(module).__name__} behind the last block is not a scale times a vector per token "
            f"(off by {off:.2g}), so its scale cannot be held."
        )
    return _HeldNorm(weight, bias, scale, centred)
