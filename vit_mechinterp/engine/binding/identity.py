"""What an experiment is, digest by digest, and how two differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vit_mechinterp.engine.binding.bound import Bound
from vit_mechinterp.engine.binding.tensors import digest_of
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec import Run, TensorRef
from vit_mechinterp.spec.digest import digest

__all__ = ["columns_read", "differences", "identity_of"]


def columns_read(data: Data, bound: Bound) -> list[str]:
    """Columns that decide the results: labels are in their table, so they count as read."""
    return sorted({*bound.columns, *data.labels()})


def identity_of(
    vit: HookedViT, data: Data, bound: Bound, tensors: Mapping[TensorRef, Tensor]
) -> dict[str, Any]:
    """Everything that decides the results up to rounding, as a JSON-ready mapping of digests."""
    images = bound.image_columns
    contents = digest_of(tensors)
    by_name: dict[str, str] = {}
    for ref in tensors:
        name = ref.name or ref.key or ""
        own = contents[str(ref)]
        by_name[name] = own if name not in by_name else digest([by_name[name], own])
    identity: dict[str, Any] = {
        "model": vit.fingerprint(),
        "dtype": vit.precision,
        "examples": data.n,
        "column": {c: data.digest(c) for c in columns_read(data, bound)}
        | {f"{c} (preprocessing)": data.image_digest(c) for c in sorted(images)},
        "run": {run.name: _run_digest(run.run, contents) for run in bound.runs},
        "order of runs": [run.name for run in bound.runs],
        "tensor": by_name,
    }
    if bound.readout is not None:
        identity["readout"] = bound.readout.spec.model_dump(mode="json")
    return identity


def _run_digest(run: Run, contents: Mapping[str, str]) -> str:
    """The identity of a run, with tensors by their contents: where their files lie does not matter."""
    document = run.model_dump(mode="json")
    for spec, own in zip(run.interventions, document["interventions"], strict=True):
        for field in type(spec).model_fields:
            if isinstance(ref := getattr(spec, field), TensorRef):
                own[field] = contents[str(ref)]
    return digest(document)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What differs between two mappings, in words; mappings within them are compared entry by entry."""
    found: list[str] = []
    for name in dict.fromkeys([*there, *here]):
        one, other = there.get(name), here.get(name)
        if one == other:
            continue
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found += _entries(name, one, other)
        elif isinstance(one, list) and isinstance(other, list) and sorted(one) != sorted(other):
            continue  # the entries themselves differ, and are named under their own heading
        elif isinstance(one, list):
            found.append(f"the {name} {_differ(name)}")
        else:
            found.append(f"the {name} {_differ(name)} ({_short(one)} there, {_short(other)} here)")
    return found


def _entries(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    changed = [key for key in there if key in here and there[key] != here[key]]
    gone = [key for key in there if key not in here]
    new = [key for key in here if key not in there]
    found = [f"{name} {_named(changed)} differ{'s' * (len(changed) == 1)}"] if changed else []
    found += [f"{name} {_named(gone)} only there"] if gone else []
    return found + ([f"{name} {_named(new)} only here"] if new else [])


def _differ(name: str) -> str:
    return "differ" if name in ("examples", "threads") else "differs"


def _named(names: list[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}..."
