"""nnsight as a backend; its wrapper with this package's site names is `sited`.

Importing nnsight gives Python's ``object`` a method ``save``, wraps ``Tensor.backward`` and reads
``sys.argv``; this module is where that happens, and nothing else in the package imports it. Wrapping a module
replaces the ``forward`` of all its parts: the backend undoes it, the wrapper's `Sited` says how.

nnsight reads the body of a ``with`` block as source, so traces stand written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from nnsight import NNsight
from torch import Tensor, nn

from vit_mechinterp.bridges.boundaries import Step, called_again, inside_attention, steps, z_port
from vit_mechinterp.bridges.hooks import attend
from vit_mechinterp.bridges.nnsight_sited import Sited, by_module, sited
from vit_mechinterp.bridges.restoring import as_it_came
from vit_mechinterp.bridges.sequential import Forward, Touch, execute_sequentially
from vit_mechinterp.engine.backends import register_backend
from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.engine.results.results import Results
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.ports import lookup
from vit_mechinterp.model.visiting import replace_output
from vit_mechinterp.spec import Site, TensorRef

__all__ = ["Sited", "run_nnsight", "sited"]

_CALL = "scaled_dot_product_attention"


@register_backend("nnsight")
def run_nnsight(
    vit: HookedViT,
    bound: Bound,
    data: Data,
    tensors: Mapping[TensorRef, Tensor],
    *,
    batch_size: int,
    progress: bool,
) -> Results:
    """Carry out bound runs as traces of an `NNsight` model; see `execute_sequentially`."""
    return execute_sequentially(
        "nnsight",
        ("nnsight",),
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
    if inside_attention(vit, site) and vit.layout.sequence is not None:
        return f"{site} is seen at the attention call, which serves all images as one sequence here"
    if site.name == "attn.result" and site.layer is not None and z_port(vit, site.layer) is None:
        return f"{site} follows from what enters the output projection, which is not the heads' output here"
    if called_again(vit, str(site)):
        return f"{site} lies at a module that its block calls more than once, which nnsight counts otherwise"
    return None


@contextmanager
def _opened(vit: HookedViT, sites: Iterable[Site]) -> Iterator[Forward]:
    with as_it_came(vit.module):
        model = NNsight(vit.module)
        yield partial(_forward, vit, model, by_module(model))


def _forward(
    vit: HookedViT, model: Any, envoys: Mapping[nn.Module, Any], images: Tensor, touches: Mapping[Site, Touch]
) -> Tensor:
    """One trace with functions at sites: an invoke for every module boundary, so order does not count."""
    args, kwargs = vit.layout.family.inputs(vit.module, images)
    acts: list[Callable[[], None]] = []
    boundaries: dict[tuple[str, str], list[Step]] = {}
    for step in steps(vit, touches):
        boundaries.setdefault((step.port.path, step.port.side), []).append(step)
    for (path, side), own in boundaries.items():
        acts.append(partial(_act, envoys[lookup(vit.module, path)], side, own))
    calls: dict[int, dict[str, Touch]] = {}
    for site, touch in touches.items():
        if inside_attention(vit, site) and not (site.name == "attn.z" and z_port(vit, site.layer or 0)):
            calls.setdefault(site.layer or 0, {})[site.name.removeprefix("attn.")] = touch
    for layer, inside in calls.items():
        acts.append(partial(_attend, envoys[lookup(vit.module, vit.layout.attention_path(layer))], inside))
    with model.trace() as tracer:
        with tracer.invoke(*args, **kwargs):
            pass
        for act in acts:
            with tracer.invoke():
                act()
        with tracer.invoke():  # the last, so that it sees what was written to the output
            native = model.output.save()
    return vit.layout.outcome(native)


def _act(envoy: Any, side: str, own: list[Step]) -> None:
    """Read what enters or leaves a module, and write what takes its place."""
    if side == "output":
        native = value = envoy.output
        for step in own:
            value = replace_output(step.port, value, step.touch)
        if value is not native:
            envoy.output = value
        return
    native = value = envoy.input
    for step in own:
        value = step.on_tensor(value)
    if value is native:
        return
    if any(step.port.in_place for step in own):
        native.copy_(value)  # the stream between attention and MLP has two readers
    else:
        envoy.input = value


def _attend(envoy: Any, touches: Mapping[str, Touch]) -> None:
    """Replace the attention call by arithmetic that can be seen, wherever the module's source makes it."""
    operation = _call_in(envoy.source)
    if operation is None:
        return  # the forward of random images finds that the site was not reached
    args, kwargs = operation.inputs
    operation.output = attend(touches, *args, **kwargs)


def _call_in(source: Any) -> Any:
    """The attention call in a forward's source, or in the function that the forward hands it to."""
    for name in source.names:
        if _CALL in name:
            return source.node(name)
    for name in source.names:
        if name.startswith("attention_interface_"):
            operation = source.node(name)
            try:
                inner = operation.source
            except Exception:  # noqa: S112  # an assignment of that name: nothing to look into
                continue
            return _call_in(inner)
    return None
