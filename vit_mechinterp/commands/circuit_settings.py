"""Options of circuits as words: ``--set KEY=VALUE``, checked before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from vit_mechinterp.commands.circuit_list import Entry
from vit_mechinterp.errors import SpecError, listed, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from vit_mechinterp.model import HookedViT

__all__ = ["read_directions", "read_metric", "read_settings"]

_READ_LATER = ("metric", "directions", "dictionary", "other")
"""Options that words only name."""


def read_settings(given: Sequence[str], name: str, entry: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read ``--set KEY=VALUE``, values as YAML: arguments of the circuit, and options of the data."""
    from vit_mechinterp.spec.documents import load_yaml

    settings: dict[str, Any] = {}
    for setting in given:
        key, separator, value = setting.partition("=")
        if not separator:
            raise SpecError(f"--set takes KEY=VALUE, got {setting!r}.")
        *groups, last = key.split(".")
        options = settings
        for group in groups:
            options = options.setdefault(group, {})
        options[last] = load_yaml(value, f"--set {key}")
    for_data = settings.pop("data", {})
    known = entry.options
    for key in settings:
        if key not in known:
            raise SpecError(
                f"circuit {name} has no option {key!r}.{suggest(key, known)} Options: {', '.join(known)}."
            )
        settings[key] = _fitted(name, known[key], settings[key], entry.function)
    return settings, for_data


def read_directions(file: Any, entry: Entry, vit: HookedViT) -> Any:
    """Read directions from a safetensors file: one per site for steering, otherwise one tensor of all
    classes.
    """
    from vit_mechinterp.errors import TensorFileError

    path = Path(str(file))
    path = path / "tensors.safetensors" if path.is_dir() else path
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise TensorFileError(f"{path} is no readable safetensors file: {error}.") from None
    if entry.home == "steering:steering":
        names = set(vit.site_names())
        found = {name: tensor for name, tensor in tensors.items() if name in names and tensor.ndim == 1}
        if not found:
            raise SpecError(f"{path} has no direction by the name of a site. It holds: {listed(tensors)}.")
        return found
    if len(tensors) != 1:
        raise SpecError(f"{path} holds {listed(tensors)}; directions are one tensor [class, d_output].")
    return next(iter(tensors.values()))


def read_metric(given: Any) -> Any:
    """Make a metric of a name, or of a name with its classes: ``metric.name=probability metric.answer=3``."""
    if not isinstance(given, Mapping):
        return given
    from vit_mechinterp.circuits.metrics import METRICS

    options = dict(given)
    name = str(options.pop("name", "logit_difference"))
    if name not in METRICS:
        raise SpecError(
            f"There is no metric {name!r}.{suggest(name, METRICS)} Metrics: {', '.join(METRICS)}."
        )
    made: Callable[..., Any] = type(METRICS[name]())
    if name == "log_probability":
        options["log"] = True
    try:
        return made(**options)
    except TypeError:
        known = [key for key in inspect.signature(made).parameters if key != "log"]
        raise SpecError(
            f"The metric {name} takes {', '.join(known) or 'no classes'}, not {', '.join(given)}."
        ) from None


class _Annotated:
    """One annotation on its own, for `typing.get_type_hints`: among all of a function's, some may be of names
    that only type checkers import."""

    def __init__(self, annotations: dict[str, Any]) -> None:
        self.__annotations__ = annotations


def _fitted(circuit: str, option: inspect.Parameter, value: Any, function: Callable[..., Any]) -> Any:
    """Return a value that the option takes: itself, or a list of it where several may stand.

    Raises:
        SpecError: it takes neither.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    if option.name in _READ_LATER:
        return value
    if option.annotation.startswith("Iterable[") and isinstance(value, str):
        value = [value]  # a word is one of several, though it is an iterable of letters
    several = option.annotation.startswith("Sequence[")
    unchecked = [value] if several and isinstance(value, str) and value not in option.annotation else value
    try:
        kept = _Annotated({option.name: option.annotation})
        names = inspect.unwrap(function).__globals__
        (kind,) = get_type_hints(kept, names, include_extras=True).values()
        adapter: TypeAdapter[Any] = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
        for tried in (value, [value]):
            try:
                adapter.validate_python(tried)
            except ValidationError:
                continue
            return tried
    except (NameError, TypeError, PydanticUserError):
        return unchecked  # names that only type checkers import, and aliases of such
    raise SpecError(f"circuit {circuit}: {option.name} takes {option.annotation}, not {value!r}.")
