"""`HookedViT`: a native ViT seen through one set of names."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vit_mechinterp.errors import ExecutionError, SpecError, UnsupportedSiteError
from vit_mechinterp.model.as_made import are_untouched
from vit_mechinterp.model.cache import ActivationCache, SiteInfo, describe
from vit_mechinterp.model.compiling import CompiledBlocks, explained
from vit_mechinterp.model.dropout import dropping
from vit_mechinterp.model.fingerprint import fingerprint
from vit_mechinterp.model.heap import keeping_while
from vit_mechinterp.model.instrument import Instrument, Visitor
from vit_mechinterp.model.layout import Layout, lookup
from vit_mechinterp.model.meta import refuse_meta
from vit_mechinterp.model.origins import absolute
from vit_mechinterp.model.ports import Port
from vit_mechinterp.model.sizes import require_images
from vit_mechinterp.spec import Site, expand, is_glob, site_names

if TYPE_CHECKING:
    from vit_mechinterp.model.preprocess import Preprocess

__all__ = ["ActivationCache", "HookedViT", "SiteInfo"]

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_LOCKS_GUARD = threading.Lock()


def lock_of(module: nn.Module) -> threading.RLock:
    """The one re-entrant lock of a native module, shared by every wrapper around it."""
    with _LOCKS_GUARD:
        return _LOCKS.setdefault(module, threading.RLock())


class HookedViT:
    """A native timm or HuggingFace ViT behind one interface; the module itself is not changed.

    Made by `load` and `wrap`. Whatever a call installs on the module is gone when the call returns. One lock
    per native module makes calls from several threads safe.

    Attributes:
        module: the native module.
        layout: what is where in it.
        source: the model string that it was loaded by, as it was given; None for a module of the user's own.
        origin: the same, with the folder of a local model as an absolute path.
    """

    def __init__(
        self, module: nn.Module, layout: Layout, source: str | None = None, origin: str | None = None
    ) -> None:
        self.module = module
        self.layout = layout
        self.source = source
        self.origin = absolute(source) if origin is None and source is not None else origin
        self._shapes: tuple[dict[str, SiteInfo], tuple[int, ...]] | None = None
        self._preprocess: Preprocess | None = None
        self.compiled: CompiledBlocks | None = None
        self.lock = lock_of(module)
        self._watched = 0

    def __repr__(self) -> str:
        return f"HookedViT({type(self.module).__name__}, {self.layout})"

    def __copy__(self) -> HookedViT:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedViT:
        """A wrapper around a copy of the module."""
        return HookedViT(copy.deepcopy(self.module, memo), self.layout, self.source, self.origin)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "A HookedViT is not pickled, because it holds a lock and functions: send the module (or its "
            "model string) to the other process, and wrap (or load) it there."
        )

    def __call__(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch *output"]:
        """The native output, bit for bit: logits, or what ``layout.output`` names."""
        with self.lock:
            return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self._watched or not isinstance(x, Tensor):
            require_images(self, x)
        if not x.is_meta:
            refuse_meta(self.module)
        family = self.layout.family
        if family.one_image is not None and len(x) > 1:
            raise ExecutionError(
                f"{type(self.module).__name__} takes one image a forward, not {len(x)}: {family.one_image}. "
                "Pass images one at a time, as execute does."
            )
        args, kwargs = family.inputs(self.module, x)
        with nullcontext() if self.compiled is None else self.compiled.installed():
            return self.layout.outcome(self.module(*args, **kwargs))

    def compile(self, **options: Any) -> HookedViT:
        """Let this wrapper run blocks in the form that ``torch.compile`` makes of them, until `uncompile`.

        The module itself is not changed. Blocks that are read, edited or hooked inside run as they are
        written; outputs agree with uncompiled ones to rounding. ``options`` are for ``torch.compile``, such
        as ``backend`` or ``mode``; ``dynamic=True`` is given, because batches grow. Returns this wrapper.

        Raises:
            ExecutionError: they cannot be compiled here; on a CPU the usual backend needs a C++ compiler.
        """
        self.compiled = CompiledBlocks(self.module, self.layout, **options)
        images = self.blank(1 if self.layout.family.one_image is not None else 2)
        with explained(f"The blocks of {type(self.module).__name__}", self.uncompile), torch.no_grad():
            self(images)
        return self

    def uncompile(self) -> HookedViT:
        """Let blocks run as they are written again."""
        self.compiled = None
        return self

    @property
    def device(self) -> torch.device:
        """The device of the module's first parameter."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the module's first parameter."""
        return next(self.module.parameters()).dtype

    @property
    def precision(self) -> str:
        """What it computes in: its dtype, and that of autocast where this is on, such as ``"float32"`` or
        ``"float32, autocast to bfloat16"``."""
        kind, own = self.device.type, str(self.dtype).removeprefix("torch.")
        if not torch.is_autocast_enabled(kind):
            return own
        return f"{own}, autocast to {str(torch.get_autocast_dtype(kind)).removeprefix('torch.')}"

    @property
    def preprocess(self) -> Preprocess:
        """Turns PIL images into the model's input, as the source's own configuration says."""
        if self._preprocess is None:
            from vit_mechinterp.model.preprocess import Preprocess

            self._preprocess = Preprocess.of(self.module, self.layout, self.origin)
        return self._preprocess

    def run(
        self, x: Float[Tensor, "batch 3 height width"], capture: Iterable[str] = ()
    ) -> tuple[Float[Tensor, "batch *output"], ActivationCache]:
        """Run the model and keep activations, in the ambient grad mode and in the model's dtype.

        On a CPU, freed memory stays in the process for the next forward: all of it while a cache is there,
        and up to 256 MiB from the first one on.

        Args:
            x: images as the model takes them.
            capture: site names or globs, such as ``"blocks.*.resid_post"``.

        Returns:
            The native output and the captured activations by canonical site name.

        Raises:
            SpecError: a name or glob fits no site of the model; close matches are named.
            ExecutionError: something is captured, and the images are not of the layout's size.
        """
        activations: dict[str, Tensor] = {}

        def keep(name: str) -> Visitor:
            def visitor(value: Tensor) -> None:
                activations[name] = value

            return visitor

        instrument = Instrument(self.module, self.layout)
        names = self.expand(capture)
        for name in names:
            instrument.visit(Site.parse(name), keep(name))
        with self.lock, instrument.installed(), self._watching(len(names)):
            output = self._forward(x)
            instrument.verify()
        cache = ActivationCache(activations)
        if names:
            keeping_while(cache)
        return output, cache

    @contextmanager
    def _watching(self, n_sites: int) -> Iterator[None]:
        """Where sites are read or written, images must be of the size that the layout describes."""
        self._watched += n_sites
        try:
            yield
        finally:
            self._watched -= n_sites

    @contextmanager
    def hooks(self, visitors: Mapping[str, Visitor]) -> Iterator[HookedViT]:
        """For exploring: edit activations with plain functions during every call inside the ``with`` block.

        The model's lock is held for the whole block: calls from other threads wait until it ends, so a thread
        that is started inside, calls the model and is joined inside would wait for ever.

        Args:
            visitors: functions by site name or glob. Each is given a copy of the tensor at the site, which it
                may keep, or change in place, and returns a replacement of the same shape and dtype, or None
                for the copy as the function left it.

        Raises:
            SpecError: a name fits no site of the model, or a visitor is no function.
            ExecutionError: on leaving, if a site fired in none of the forwards that ran inside.
        """
        instrument = Instrument(self.module, self.layout)
        for pattern, visitor in visitors.items():
            if not callable(visitor):
                raise SpecError(
                    f"The hook at {pattern} is {visitor!r}; it must be a function that takes the tensor "
                    "at the site, and returns a replacement or None."
                )
            for name in self.expand([pattern]):
                instrument.visit(Site.parse(name), _checked(name, visitor))
        with self.lock, instrument.installed(), self._watching(len(visitors)):
            yield self
            # A forward inside may stop early or skip blocks (`execute` does), or fail and be caught.
            instrument.verify(every=False)

    def expand(self, names: Iterable[str]) -> list[str]:
        """Canonical names of the model's sites that ``names`` (names or globs) stand for, without repeats.

        Raises:
            SpecError: a name or glob fits nothing; UnsupportedSiteError, with the reason, where the model has
                no such site.
        """
        available = self.site_names()
        names = [names] if isinstance(names, str) else names
        found: dict[str, None] = {}
        for name in names:
            if is_glob(name):
                found.update(dict.fromkeys(expand(name, available)))
                continue
            site = Site.parse(name)
            self.check_site(site)
            found[str(site)] = None
        return list(found)

    def check_site(self, site: Site) -> None:
        """Raise unless the model has this site.

        Raises:
            SpecError: the layer is out of range; UnsupportedSiteError: the model has no such site, and why.
        """
        if site.layer is not None and site.layer >= self.layout.n_layers:
            raise SpecError(
                f"{site}: layer {site.layer} is out of range; {type(self.module).__name__} has "
                f"{self.layout.n_layers} blocks, 0 to {self.layout.n_layers - 1}."
            )
        reason = self.layout.absent.get(str(site))
        if reason is not None:
            raise UnsupportedSiteError(f"{site} does not exist on {type(self.module).__name__}: {reason}.")

    def site_names(self) -> list[str]:
        """Names of the model's sites, in forward order; runs nothing."""
        return [name for name in site_names(self.layout.n_layers) if name not in self.layout.absent]

    def sites(self) -> dict[str, SiteInfo]:
        """Every site of the model with its shape, in forward order.

        Shapes are read off one forward of a blank image, once per wrapper.
        """
        if self._shapes is None:
            self._shapes = self._probe()
        return dict(self._shapes[0])

    def output_shape(self) -> tuple[int, ...]:
        """Shape of the model's output for one example, whether it is a site or not; found as `sites` are."""
        if self._shapes is None:
            self._shapes = self._probe()
        return self._shapes[1]

    def _probe(self) -> tuple[dict[str, SiteInfo], tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}

        def note(name: str) -> Visitor:
            def visitor(value: Tensor) -> None:
                shapes[name] = tuple(value.shape[1:])

            return visitor

        instrument = Instrument(self.module, self.layout)
        for name in self.site_names():
            instrument.visit(Site.parse(name), note(name))
        devices = [self.device] if self.device.type == "cuda" else []
        with self.lock, torch.no_grad(), torch.random.fork_rng(devices), instrument.installed():
            output = self._forward(self.blank(1))
            instrument.verify()
        sites = {name: describe(Site.parse(name), shapes[name]) for name in self.site_names()}
        return sites, tuple(output.shape[1:])

    def blank(self, batch: int) -> Tensor:
        """Blank images ``[batch, 3, height, width]`` (videos: with frames), as the model takes them."""
        return torch.zeros(batch, *self.layout.tokens.input_shape, device=self.device, dtype=self.dtype)

    def beginning(self, rows: int) -> Tensor:
        """Blank images to begin a batch that grows to ``rows``: one, or all where the model counts them."""
        return self.blank(rows if self.layout.family.counts_rows else 1)

    def fingerprint(self) -> str:
        """SHA-256 over the module's structure and weights; made anew at every call."""
        return fingerprint(self.module)

    def has_own_return(self, layer: int) -> bool:
        """Whether somebody else acts on what a block returns, or on the way to it from the block's middle: a
        hook, or a forward of the instance's own."""
        block: nn.Module = lookup(self.module, self.layout.block_path(layer))
        before: set[nn.Module] = set(lookup(self.module, self.layout.attention_path(layer)).modules())
        norm = self.layout.ports.get(f"blocks.{layer}.ln1")
        if isinstance(norm, Port):
            before.add(lookup(self.module, norm.path))
        behind = [part for part in block.modules() if part is not block and part not in before]
        with self.lock:  # what another thread's run has installed is gone once the lock is free
            return bool(block._forward_hooks) or "forward" in vars(block) or not are_untouched(behind)

    def dropout(self) -> str | None:
        """Path of a module that is in train mode and would drop activations at random, or None."""
        return dropping(self.module)


def _checked(name: str, visitor: Visitor) -> Visitor:
    def checked(value: Tensor) -> Tensor:
        given = value.clone()
        new = visitor(given)
        if new is None:  # unless the copy was written to, this is a copy of what is there
            return given
        if isinstance(new, Tensor) and (new.shape, new.dtype) == (value.shape, value.dtype):
            return new
        wanted = f"{value.dtype} of shape {tuple(value.shape)}"
        got = f"{new.dtype} of shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
        raise ExecutionError(f"The hook at {name} returned {got}; expected {wanted}, or None.")

    return checked
