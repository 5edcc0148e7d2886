"""pyvene as a backend, and a model that pyvene takes, whatever library it comes from.

pyvene edits tensors in place, removes all hooks of a model at every call and freezes it; here it works on a
copy of what enters a module, hooks of others stay, and everything is put back.
Runs as configurations are `vit_mechinterp.bridges.pyvene_configs`, trained rotations
`vit_mechinterp.bridges.pyvene_rotations`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pyvene as pv
import torch
from torch import Tensor, nn

from vit_mechinterp.bridges.boundaries import Step, called_again, inside_attention, steps, z_port
from vit_mechinterp.bridges.restoring import as_it_came
from vit_mechinterp.bridges.sequential import Forward, Touch, execute_sequentially
from vit_mechinterp.engine.backends import register_backend
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.ports import lookup
from vit_mechinterp.spec import Site, TensorRef

__all__ = ["PyveneViT", "intervenable", "run_pyvene"]


@register_backend("pyvene")
def run_pyvene(
    vit: HookedViT,
    bound: Bound,
    data: Data,
    tensors: Mapping[TensorRef, Tensor],
    *,
    batch_size: int,
    progress: bool,
) -> Results:
    """Carry out bound runs with an `IntervenableModel` each; see `execute_sequentially`."""
    return execute_sequentially(
        "pyvene",
        ("pyvene",),
        _opened,
        _refusal,
        vit,
        bound,
        data,
        tensors,
        batch_size=batch_size,
        progress=progress,
    )


def _refusal(vit: HookedViT, site: Site) -> str | None:
    no_z = site.layer is None or z_port(vit, site.layer) is None
    if inside_attention(vit, site) and (site.name != "attn.z" or no_z):
        return (
            f"{site} lies within the attention call, and pyvene sees what enters and leaves modules. "
            'Use the engine, backend="hooks" or backend="nnsight"'
        )
    if site.name == "attn.result" and no_z:
        return f"{site} follows from what enters the output projection, which is not the heads' output here"
    if called_again(vit, str(site)):
        return f"{site} lies at a module that its block calls more than once, and pyvene allows one call"
    return None


class PyveneViT(nn.Module):
    """What pyvene asks of a model (``config``, ``device``, inputs by name), around a native one.

    Attributes are the native module's, so components are named as in it: ``"blocks.3.output"``. Its input is
    ``{"images": batch}``.
    """

    config: Any = None

    def __init__(self, vit: HookedViT) -> None:
        super().__init__()
        self.native = vit.module
        self._vit = vit

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("native"), name)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._vit.device

    def forward(self, images: Tensor) -> Any:
        """The native module's output."""
        args, kwargs = self._vit.layout.family.inputs(self.native, images)
        return self.native(*args, **kwargs)


def intervenable(vit: HookedViT, config: Any) -> Any:
    """An `IntervenableModel` of pyvene's on any supported model; hooks of others stay when it is called.

    It freezes the model and puts it in eval mode, as pyvene does: call it within
    `vit_mechinterp.bridges.restoring.as_it_came` to have that undone.
    """
    model = pv.IntervenableModel(config, model=PyveneViT(vit))
    # Called at the beginning and the end of every call, to remove all hooks there are; pyvene's own are
    # removed through their handles.
    model._remove_forward_hooks = lambda: None
    return model


class _Acting(pv.SourcelessIntervention):  # type: ignore[misc]  # pyvene has no types
    """An intervention that does what it is told with the whole tensor."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__(keep_last_dim=True)
        self.act = act

    def forward(self, base: Tensor, source: Any = None, subspaces: Any = None, **kwargs: Any) -> Tensor:
        return self.act(base)


@contextmanager
def _opened(vit: HookedViT, sites: Iterable[Site]) -> Iterator[Forward]:
    with as_it_came(vit.module):
        yield partial(_forward, vit)


def _forward(vit: HookedViT, images: Tensor, touches: Mapping[Site, Touch]) -> Tensor:
    """One call of an `IntervenableModel` with an intervention at every module boundary."""
    boundaries: dict[tuple[str, str], list[Step]] = {}
    for step in steps(vit, touches):
        boundaries.setdefault((step.port.path, step.port.side), []).append(step)
    components = [
        {
            "component": f"{path}.{side}" if path else f"native.{side}",
            "unit": "pos",
            "intervention": _Acting(partial(_act, own)),
        }
        for (path, side), own in boundaries.items()
    ]
    with ExitStack() as stack:
        for (path, side), own in boundaries.items():
            if side == "input" and not any(step.port.in_place for step in own):
                module: nn.Module = lookup(vit.module, path)
                hook = module.register_forward_pre_hook(_copied, with_kwargs=True)
                stack.callback(hook.remove)
        if not components:
            return vit(images)
        model = intervenable(vit, pv.IntervenableConfig(components))
        _, native = model({"images": images}, None, None)
    return vit.layout.outcome(native)


def _act(own: list[Step], value: Tensor) -> Tensor:
    for step in own:
        value = step.on_tensor(value)
    return value


def _copied(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A module's input as a copy: what pyvene writes into it must not reach others who hold it."""
    if args:
        return (args[0].clone(), *args[1:]), kwargs
    first = next(iter(kwargs))
    return args, {**kwargs, first: kwargs[first].clone()}
