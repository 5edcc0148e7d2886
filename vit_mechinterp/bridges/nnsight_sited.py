"""A model as nnsight sees it, with this package's site names, here or on an NDIF deployment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from nnsight import NNsight
from torch import Tensor, nn

from vit_mechinterp.bridges import nnsight_remote
from vit_mechinterp.bridges.agreement import Forward
from vit_mechinterp.bridges.boundaries import whole_port
from vit_mechinterp.bridges.sequential import execute_sequentially
from vit_mechinterp.engine.backends import BACKENDS, register_backend
from vit_mechinterp.engine.execute import execute
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.ports import lookup
from vit_mechinterp.spec import Experiment, Readout, Run, Site, Sweep

__all__ = ["Sited", "by_module", "sited"]


def by_module(model: Any) -> dict[nn.Module, Any]:
    """nnsight's proxy of every module."""
    return {envoy._module: envoy for envoy in model.modules()}


class Sited:
    """A model as nnsight sees it, with accessors for this package's site names.

    Inside ``with sited.trace(images):``, ``sited.site("blocks.3.resid_post").output`` is that site's value:
    read it, or assign to it. A site at a module's input is read and written as ``.input``; `place` says
    which. Everything else is nnsight's own model's, ``sited.model``.

    The native module's parts have another ``forward`` from the time of wrapping; it does what theirs did.
    """

    def __init__(self, vit: HookedViT) -> None:
        self.vit = vit
        self.model: Any = NNsight(vit.module)

    def __getattr__(self, name: str) -> Any:
        if name in ("model", "vit") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.model, name)

    def trace(self, *args: Any, remote: bool | str = False, **kwargs: Any) -> Any:
        """A trace of the model, as nnsight's own.

        A block that is to run remotely names nnsight's objects alone (``net = sited.model`` and what `site`
        returned before it), since a deployment does not have this package.

        Args:
            args: what the module takes: images.
            remote: ``True`` or the address of an NDIF deployment that serves the checkpoint; ``"local"``
                builds the same request, reads it where no package of the user's own can be found, and runs
                it here.
            kwargs: for nnsight and the module.

        Raises:
            SpecError: ``remote``, and the model is no checkpoint of the Hub that a deployment could know.
            ExecutionError: at the end of the block: the deployment cannot be reached, or refuses.
        """
        if remote:
            kwargs["backend"] = self.request_to(remote)
        return self.model.trace(*args, **kwargs)

    def execute(
        self,
        runs: Run | Sweep | Experiment | Iterable[Run | Sweep],
        data: Any,
        tensors: Mapping[str, Tensor] | None = None,
        *,
        remote: bool | str = True,
        batch_size: int = 32,
        progress: bool = True,
        readout: Readout | None = None,
    ) -> Results:
        """Carry out runs on a deployment, one at a time; see `vit_mechinterp.execute`.

        The deployment is first held against the model here, on random images: another checkpoint or
        precision there is refused.

        Args:
            runs, data, tensors, progress, readout: as there.
            remote: as in `trace`.
            batch_size: most images in one request.

        Raises:
            SpecError: a request cannot reach a site, the model is no checkpoint of the Hub, or the deployment
                computes something else.
            ExecutionError: the deployment cannot be reached, or refuses.
        """
        nnsight_remote.request(self.vit, self, remote)  # says now what would be wrong with it
        name = f"nnsight, remote={remote!r}"
        carry_out = partial(
            execute_sequentially,
            name,
            ("nnsight",),
            partial(self._opened, remote),
            nnsight_remote.refusal,
        )
        register_backend(name)(carry_out)
        try:
            options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "readout": readout}
            return execute(self.vit, runs, data, tensors, backend=name, **options)
        finally:
            del BACKENDS[name]

    @contextmanager
    def _opened(self, remote: bool | str, vit: HookedViT, sites: Iterable[Site]) -> Iterator[Forward]:
        send = partial(self.request_to, remote)
        yield nnsight_remote.remote_forward(vit, self.model, by_module(self.model), send)

    def request_to(self, remote: bool | str) -> Any:
        """What sends a trace: nnsight's backend for ``remote``. Nothing is sent before a trace ends."""
        return nnsight_remote.request(self.vit, self, remote)

    def _remoteable_persistent_objects(self) -> dict[str, Any]:
        """What stays on the other side, by the name that a request gives it (asked for by nnsight)."""
        modules = {f"Module:{envoy.path}": envoy._module for envoy in self.model.modules()}
        return {"Interleaver": self.model.interleaver, **modules}

    def site(self, name: str) -> Any:
        """nnsight's proxy of the module whose input or output is the site.

        Raises:
            SpecError: the model has no such site, or it is not a whole tensor at a module's boundary.
        """
        return by_module(self.model)[lookup(self.vit.module, self.place(name)[0])]

    def place(self, name: str) -> tuple[str, str]:
        """Path of that module, and ``"input"`` or ``"output"``."""
        port = whole_port(self.vit, name, "nnsight")
        return port.path, port.side


def sited(vit: HookedViT) -> Sited:
    """The model as nnsight sees it, with site names; see `Sited`."""
    return Sited(vit)
