"""Requests to an NDIF deployment, and runs as such requests.

A deployment does not have this package, so a request names nnsight's objects alone: it reads what enters and
leaves modules, and writes there what was worked out here. A run with k edits takes k + 1 requests, whatever
the edits are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import transformers
import websocket
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from torch import Tensor, nn

from vit_mechinterp.bridges.agreement import Forward, Touch
from vit_mechinterp.bridges.boundaries import Step, called_again, inside_attention, steps, z_port
from vit_mechinterp.errors import ExecutionError, SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.ports import lookup
from vit_mechinterp.model.visiting import replace_output
from vit_mechinterp.spec import Site

__all__ = ["model_key", "refusal", "remote_forward", "request"]

_TASKS = {
    "image-classification": transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    "image-feature-extraction": transformers.MODEL_MAPPING,
}
"""What NDIF calls the class that it loads for a checkpoint."""


class _Request(RemoteBackend):  # type: ignore[misc]  # nnsight has no types
    """nnsight's request, whose failures say what they are about."""

    def __call__(self, tracer: Any = None) -> Any:
        try:
            return super().__call__(tracer)
        except (OSError, websocket.WebSocketException) as error:
            raise ExecutionError(
                f"The NDIF deployment at {self.host} cannot be reached: {error or type(error).__name__}. Its "
                "address and key are nnsight.CONFIG.API.HOST and .APIKEY; pass remote='https://...' for "
                "another, or remote='local' to build, read and run the request here."
            ) from error
        except RemoteError as error:
            raise ExecutionError(
                f"The NDIF deployment at {self.host} did not carry out the request for {self.model_key}: "
                f"{error}. remote='local' runs the same request here."
            ) from error


def request(vit: HookedViT, model: Any, remote: bool | str) -> Any:
    """What sends a trace, for nnsight's ``backend=``. Nothing is sent before a trace ends.

    Args:
        vit: the model.
        model: what knows the objects that stay on the other side (`_remoteable_persistent_objects`).
        remote: ``True`` for the deployment that nnsight is configured for, its address, or ``"local"``.

    Raises:
        SpecError: the model is no checkpoint that a deployment could know, or the address is none.
    """
    if remote == "local":
        return LocalSimulationBackend(model)
    config = getattr(vit.module, "config", None)
    key, env = model_key(vit), {"attn_implementation": getattr(config, "_attn_implementation", None)}
    try:
        return _Request(key, host=remote if isinstance(remote, str) else None, env=env)
    except ValueError as error:
        raise SpecError(f"remote={remote!r}: {error}. Write True, 'local' or 'https://...'.") from error


def model_key(vit: HookedViT) -> str:
    """The name under which a deployment knows the checkpoint: its address on the Hub, and the task.

    Raises:
        SpecError: the model is no checkpoint of the Hub, or not the class that is loaded for it.
    """
    source, module = vit.source or "", vit.module
    library, _, checkpoint = source.partition("/")
    if library != "hf" or checkpoint.count("/") != 1 or checkpoint.startswith((".", "/")):
        raise SpecError(
            f"{source or type(module).__name__!r} is no checkpoint of the Hub, and a deployment knows its "
            "models by those. Load the model as 'hf/ORG/NAME', or use remote='local'."
        )
    config = getattr(module, "config", None)
    part = bool(getattr(config, "base_config_key", ""))
    for task, classes in _TASKS.items():
        known = classes.get(type(config), None)
        if not part and type(module) in (known if isinstance(known, tuple) else (known,)):
            named = json.dumps({"repo_id": checkpoint, "revision": None, "task": task})
            return f"nnsight.modeling.transformers.TransformersModel:{named}"
    raise SpecError(
        f"A deployment of {checkpoint} loads another class than {type(module).__name__}, whose parts have "
        "other names. Load the model as the class of its configuration, or use remote='local'."
    )


def refusal(vit: HookedViT, site: Site) -> str | None:
    """Why a request cannot reach a site, or None."""
    no_z = site.layer is None or z_port(vit, site.layer) is None
    if inside_attention(vit, site) and (site.name != "attn.z" or no_z):
        return (
            f"{site} lies within the attention call, and a request reads and writes what enters and leaves "
            'modules. Use backend="nnsight", which has the model here'
        )
    if site.name == "attn.result" and no_z:
        return f"{site} follows from what enters the output projection, which is not the heads' output here"
    if called_again(vit, str(site)):
        return f"{site} lies at a module that its block calls more than once, which nnsight counts otherwise"
    return None


def remote_forward(
    vit: HookedViT, model: Any, envoys: Mapping[nn.Module, Any], send: Callable[[], Any]
) -> Forward:
    """Forwards on a deployment: values come here, and what takes their place goes back.

    Args:
        vit: the model, here.
        model: the model as nnsight sees it.
        envoys: nnsight's proxy of every module.
        send: makes what sends one request.
    """
    return partial(_forward, vit, model, envoys, send)


def _forward(
    vit: HookedViT,
    model: Any,
    envoys: Mapping[nn.Module, Any],
    send: Callable[[], Any],
    images: Tensor,
    touches: Mapping[Site, Touch],
) -> Tensor:
    call = vit.layout.family.inputs(vit.module, images)
    boundaries: dict[tuple[str, str], list[Step]] = {}
    for step in steps(vit, touches):
        boundaries.setdefault((step.port.path, step.port.side), []).append(step)
    places = [
        (envoys[lookup(vit.module, path)], side, any(step.port.in_place for step in own))
        for (path, side), own in boundaries.items()
    ]
    written: dict[int, Any] = {}
    values, native = _asked(model, places, written, call, send())
    for place, own in enumerate(boundaries.values()):  # in forward order, as sites are
        new = value = values[place]
        for step in own:
            output = step.port.side == "output"
            new = replace_output(step.port, new, step.touch) if output else step.on_tensor(new)
        if new is not value:
            written[place] = new
            values, native = _asked(model, places, written, call, send())
    return vit.layout.outcome(native)


def _asked(
    model: Any,
    places: Sequence[tuple[Any, str, bool]],
    written: Mapping[int, Any],
    call: tuple[tuple[Any, ...], dict[str, Any]],
    backend: Any,
) -> tuple[Mapping[int, Any], Any]:
    """One request: the values at some places, found before what is written there, and the output.

    What stands in the block goes to the deployment as source, with the variables that it names.
    """
    args, kwargs = call
    with model.trace(backend=backend) as tracer:
        values = dict().save()  # type: ignore[attr-defined]  # noqa: C408  # nnsight gives objects the method
        with tracer.invoke(*args, **kwargs):
            pass
        for place, (envoy, side, shared) in enumerate(places):
            with tracer.invoke():
                if side == "output":
                    values[place] = envoy.output
                    if place in written:
                        envoy.output = written[place]
                else:
                    values[place] = envoy.input.clone()
                    if place in written and shared:  # the stream between attention and MLP has two readers
                        envoy.input.copy_(written[place])
                    elif place in written:
                        envoy.input = written[place]
        with tracer.invoke():
            native = model.output.save()
    return values, native
