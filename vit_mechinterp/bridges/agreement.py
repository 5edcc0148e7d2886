"""Whether a backend reads and writes what site names mean, tried on random images before any run.

A backend that sees another tensor than the model's own names do, or whose edits do not arrive, is refused:
its numbers would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from vit_mechinterp.errors import SpecError, VitMechInterpError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.layout import TAP_SITES
from vit_mechinterp.spec import Site

__all__ = ["Forward", "Touch", "check_agreement", "difference", "size", "tolerance_of"]

Touch = Callable[[Tensor], Tensor]
"""Given the tensor at a site; returns the tensor to go on with (the same one, if it only looks)."""

Forward = Callable[[Tensor, Mapping[Site, Touch]], Tensor]
"""A forward of a batch of images with functions at sites; the model's output, as `HookedViT` gives it."""


def check_agreement(
    name: str, vit: HookedViT, forward: Forward, read: Iterable[Site], written: Iterable[Site]
) -> None:
    """Hold a backend's forwards against the model's own, at the sites that are read and at those edited.

    Raises:
        SpecError: it sees another tensor at a site, or an edit has another effect.
    """
    shape = vit.layout.tokens.input_shape
    rows = 1 if vit.layout.family.one_image is not None else 2
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(rows, *shape, generator=draw).to(vit.device, vit.dtype)
    _check_reads(name, vit, forward, sorted(set(read)), images)
    _check_writes(name, vit, forward, sorted(set(written)), images)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference; equal infinities (masked scores) do not differ."""
    one, other = one.float(), other.float()
    return float(torch.where(one == other, 0.0, (one - other).abs()).max())


def size(value: Tensor) -> float:
    """The largest finite value."""
    return float(value.float().nan_to_num(0.0, 0.0, 0.0).abs().max())


def tolerance_of(vit: HookedViT) -> float:
    """The difference that counts as agreement, as a share of a value's size, by the model's precision or that
    of autocast."""
    kind, dtypes = vit.device.type, [vit.dtype]
    if torch.is_autocast_enabled(kind):
        dtypes.append(torch.get_autocast_dtype(kind))
    return 1e-4 if all(torch.finfo(dtype).bits >= 32 for dtype in dtypes) else 5e-2


def _check_reads(name: str, vit: HookedViT, forward: Forward, sites: list[Site], images: Tensor) -> None:
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}

    def looking(site: Site) -> Touch:
        def touch(value: Tensor) -> Tensor:
            seen[site].append(value.clone())
            return value

        return touch

    output = _tried(name, vit, forward, {site: looking(site) for site in sites}, images)
    native, cache = vit.run(images, capture=[str(site) for site in sites])
    _check_output(name, vit, sites, output, native, "looks at")
    for site, values in seen.items():
        expected = cache[str(site)]
        if not values and site.name in TAP_SITES:
            problem = "is not reached, since its block makes no one attention call (eager attention does not)"
        elif len(values) != 1:
            problem = f"is reached {len(values)} times in a forward, not once"
        elif values[0].shape != expected.shape:
            problem = f"has shape {tuple(values[0].shape)} there, not {tuple(expected.shape)}"
        else:
            off = difference(values[0], expected)
            if off <= tolerance_of(vit) * size(expected):
                continue
            problem = f"holds other values there, by {off:.2g}"
        raise SpecError(
            f"backend={name!r} cannot reach {site} on {type(vit.module).__name__}: it {problem}. "
            "Use the engine, which needs no backend, or another site."
        )


def _check_writes(name: str, vit: HookedViT, forward: Forward, sites: list[Site], images: Tensor) -> None:
    def turned(site: Site) -> Touch:
        # Nothing that a norm would take back, and no more infinities among scores than there were.
        return lambda value: value * 1.5 if site.is_attention_matrix else value + value.flip(-1) / 2

    if not sites:
        return
    output = _tried(name, vit, forward, {site: turned(site) for site in sites}, images)
    with vit.hooks({str(site): turned(site) for site in sites}):
        native = vit(images)
    _check_output(name, vit, sites, output, native, "edits")


def _tried(
    name: str, vit: HookedViT, forward: Forward, touches: Mapping[Site, Touch], images: Tensor
) -> Tensor:
    try:
        return forward(images, touches)
    except VitMechInterpError:
        raise
    except Exception as error:
        raise SpecError(
            f"backend={name!r} cannot run {type(vit.module).__name__} with functions at "
            f"{', '.join(map(str, sorted(touches)))}: {type(error).__name__}: {error}. Use the engine, or "
            "other sites."
        ) from error


def _check_output(
    name: str, vit: HookedViT, sites: Iterable[Site], output: Tensor, native: Tensor, does: str
) -> None:
    off = difference(output, native)
    if not off <= tolerance_of(vit) * size(native):
        raise SpecError(
            f"backend={name!r} computes another output of {type(vit.module).__name__}, by {off:.2g}, where "
            f"it {does} {', '.join(map(str, sites))}. Use the engine, or other sites."
        )
