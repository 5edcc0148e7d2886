"""The model under examination: images, reference values, tolerances, and ways to run it with visitors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor, nn

from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.instrument import Instrument, StopForward, Visitor
from vit_mechinterp.model.layout import TAP_SITES, is_missing, lookup
from vit_mechinterp.model.multihead import is_closed
from vit_mechinterp.spec import Site

__all__ = ["Subject", "deviation", "keeping", "returning", "wide"]

_DRAWS = 5
"""Of a rounding: a single one may by chance move the output a tenth as far as others do."""


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def deviation(found: Tensor, wanted: Tensor, scale: float | None = None) -> float:
    """The largest difference as a share of ``scale`` (of what was wanted, by default); 0 if bit-identical."""
    if found.shape != wanted.shape:
        return math.inf
    if torch.equal(found, wanted):
        return 0.0
    if scale is None:
        finite = wide(wanted)[torch.isfinite(wanted)]  # scores are infinite where a mask forbids a key
        scale = float(finite.abs().max()) if len(finite) else 0.0
    apart = torch.where(found == wanted, 0.0, wide(found) - wide(wanted))
    difference = float(apart.abs().max())
    return difference / max(scale, 1e-30) if math.isfinite(difference) else math.inf


class Subject:
    """One model with ``n`` random images, and what is known of its clean forwards.

    Everything random comes from ``seed``. ``sites`` are the sites that checks rely on: all of the model's,
    until those that do not fire as declared are left out. ``layers`` are those that have sites.
    """

    def __init__(self, vit: HookedViT, n_images: int, seed: int) -> None:
        self.vit = vit
        self.layout = vit.layout
        self.generator = torch.Generator().manual_seed(seed)
        self.images = self.noise((n_images, *self.layout.tokens.input_shape))
        self.native = vit(self.images)
        self.sites = vit.site_names()
        strangers = self.layout.family.strangers(vit.module)
        self.layers = [layer for layer in range(self.layout.n_layers) if layer not in strangers]

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers, drawn on the CPU so that every device is given the same."""
        drawn = torch.randn(tuple(shape), generator=self.generator)
        return drawn.to(self.vit.device, self.vit.dtype)

    def explicit(self, name: str) -> bool:
        """Whether reading a site replaces the kernel that computes attention otherwise.

        Scores and pattern exist in explicit attention only; of `nn.MultiheadAttention` no part can be seen
        while one kernel computes it.
        """
        site = Site.parse(name)
        if site.name in ("attn.scores", "attn.pattern"):
            return True
        if site.layer is None or site.name not in (*TAP_SITES, "attn.result"):
            return False
        return is_closed(lookup(self.vit.module, self.layout.attention_path(site.layer)))

    @property
    def unit(self) -> float:
        """What rounding may do to one block: 1e-6 in float32, in proportion to the precision elsewhere."""
        precision = torch.finfo(self.vit.dtype).eps
        device = self.vit.device.type
        if torch.is_autocast_enabled(device):
            precision = max(precision, torch.finfo(torch.get_autocast_dtype(device)).eps)
        if precision > 1e-4:  # kernels in 16 bits sum in 32, so that errors do not add up
            return 4 * precision
        if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            precision = max(precision, 2.0**-10)
        return 8 * precision

    @cached_property
    def sensitivity(self) -> float:
        """How far one rounding, added to the stream at the first block, moves the output at most, of several.

        Where that is more than rounding within the blocks explains, the output itself is known no better.
        """
        precision = torch.finfo(self.vit.dtype).eps
        drawn = (self.noise(self.values["embed"].shape) for _ in range(_DRAWS))
        return max(self._moved_by(1 + precision * noise) for noise in drawn)

    def _moved_by(self, factor: Tensor) -> float:
        """How far the output moves when the stream at the first block is multiplied by a factor."""
        return deviation(self.output({"embed": lambda value: value * factor}), self.native)

    def run(
        self,
        visitors: Mapping[str, Visitor],
        images: Tensor | None = None,
        *,
        skip: Iterable[int] = (),
        stop: int | None = None,
        before: bool = False,
        verify: bool = True,
        then: Mapping[str, Visitor] = MappingProxyType({}),
    ) -> Tensor | None:
        """One forward with visitors in place, those of ``then`` behind the others; None if it was stopped at
        block ``stop``."""
        instrument = Instrument(self.vit.module, self.layout)
        for name, visitor in (*visitors.items(), *then.items()):
            instrument.visit(Site.parse(name), visitor)
        instrument.skip(skip)
        if stop is not None:
            instrument.stop(stop, before=before)
        with instrument.installed():
            try:
                output = self.vit(self.images if images is None else images)
            except StopForward:
                output = None
            if verify:
                instrument.verify()
        return output

    def output(self, visitors: Mapping[str, Visitor]) -> Tensor:
        """The output of one whole forward on the images, with visitors in place."""
        output = self.run(visitors)
        assert output is not None
        return output

    def capture(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Values at sites in one clean forward."""
        kept: dict[str, Tensor] = {}
        self.run({name: keeping(kept, name) for name in names})
        return kept

    def projection(self, layer: int) -> tuple[Tensor, Tensor | None, Tensor | float]:
        """Weight and bias of a block's output projection, and the LayerScale behind it."""
        family = self.layout.family
        block: nn.Module = lookup(self.vit.module, self.layout.block_path(layer))
        projection: nn.Linear = lookup(block, family.out_projection)
        scales = [lookup(block, path) for path in family.attention_scale]
        gain = next((wide(scale) for scale in scales if not is_missing(scale)), 1.0)
        return wide(projection.weight), None if projection.bias is None else wide(projection.bias), gain

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """Values at every site, from a forward with attention as it is where the site can be read there."""
        fused = self.capture(name for name in self.sites if not self.explicit(name))
        return {**self.capture(filter(self.explicit, self.sites)), **fused}

    def culprits(
        self, names: Sequence[str], deviates: Callable[[Sequence[str]], float], allowed: float
    ) -> dict[str, tuple[float, str]]:
        """How far each of several sites deviates, and what it raised; tried together, then in halves."""
        try:
            found, error = deviates(names), ""
        except Exception as raised:
            found, error = math.inf, f"{type(raised).__name__}: {raised}"
        if found <= allowed or len(names) <= 1:
            return dict.fromkeys(names, (found, error))
        middle = len(names) // 2
        return {
            **self.culprits(names[:middle], deviates, allowed),
            **self.culprits(names[middle:], deviates, allowed),
        }


def returning(new: Tensor) -> Visitor:
    """A visitor that writes a given value."""
    return lambda value: new


def keeping(kept: dict[str, Tensor], name: str) -> Visitor:
    """A visitor that keeps the value at a site."""

    def visitor(value: Tensor) -> None:
        kept[name] = value

    return visitor
