"""``circuit``: any standard analysis, of any model, on any images."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vit_mechinterp.errors import SpecError, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from vit_mechinterp.circuits.result import CircuitResult
    from vit_mechinterp.model import HookedViT

__all__ = ["CIRCUITS", "circuit"]


@dataclass(frozen=True)
class Entry:
    """A circuit by name: the module and function, what images it takes, what it is for, and the function that
    further options are handed on to.
    """

    home: str
    images: Literal["images", "pairs", "labels", "objects"]
    text: str
    more: str | None = None

    @property
    def function(self) -> Callable[..., CircuitResult]:
        """The circuit itself."""
        return self._at(self.home)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """What it takes beside the model and the images."""
        own = list(inspect.signature(self.function).parameters.values())[2:]
        if self.more is not None:
            own += list(inspect.signature(self._at(self.more)).parameters.values())[2:]
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {parameter.name: parameter for parameter in own if parameter.kind in plain}

    @staticmethod
    def _at(home: str) -> Callable[..., CircuitResult]:
        module, name = home.split(":")
        found: Callable[..., CircuitResult] = getattr(
            importlib.import_module(f"vit_mechinterp.circuits.{module}"), name
        )
        return found


CIRCUITS: dict[str, Entry] = {
    "ablation_sweep": Entry("ablation:ablation_sweep", "images", "what the model loses without each part"),
    "activation_patching": Entry(
        "activation_patching:activation_patching",
        "pairs",
        "which activations carry the difference of two images",
    ),
    "attention": Entry("attention:attention", "images", "rollout, distance, entropy and likeness of heads"),
    "attention_stages": Entry(
        "attention_stages:attention_stages", "objects", "attention within and between objects"
    ),
    "attribution_patching": Entry(
        "attribution_patching:attribution_patching",
        "pairs",
        "activation patching to first order, with its error",
    ),
    "cumulative_ablation": Entry(
        "cumulative_ablation:cumulative_ablation", "images", "what is left as more and more heads go"
    ),
    "edge_attribution": Entry(
        "edge_attribution:edge_attribution", "pairs", "edges between parts to first order, with the error"
    ),
    "edge_patching": Entry(
        "path_patching:edge_patching",
        "pairs",
        "single edges between parts, exactly",
        "path_patching:path_patching",
    ),
    "embedding_matching": Entry(
        "embedding_matching:embedding_matching", "pairs", "images with the embedding of another"
    ),
    "faithfulness": Entry("faithfulness:faithfulness", "images", "whether a set of heads is the circuit"),
    "interchange_sweep": Entry(
        "interchange_sweep:interchange_sweep", "objects", "tokens exchanged between images, layer by layer"
    ),
    "local_lipschitz": Entry(
        "local_lipschitz:local_lipschitz", "images", "how far small changes of an image move its embedding"
    ),
    "logit_attribution": Entry(
        "logit_attribution:logit_attribution",
        "images",
        "which layers, heads, tokens and neurons write a logit",
    ),
    "logit_lens": Entry("logit_lens:logit_lens", "images", "what the model would answer after each layer"),
    "mean_directions": Entry("directions:mean_directions", "labels", "directions between groups of images"),
    "path_patching": Entry("path_patching:path_patching", "pairs", "direct effects from parts to parts"),
    "probing": Entry("probing:probing", "labels", "what a linear probe can read where"),
    "representation_similarity": Entry(
        "representation_similarity:representation_similarity",
        "images",
        "CKA and RSA between layers or models",
    ),
    "sparse_autoencoder": Entry(
        "sparse_autoencoder:sparse_autoencoder", "images", "a dictionary's features, and what they do"
    ),
    "steering": Entry("steering:steering", "images", "the answer as a direction is added"),
}
"""Every circuit that takes a model and images."""

_NEEDS = {
    "images": "images",
    "pairs": "pairs of images: two files, columns base and source, or --set corruption=blur",
    "labels": "images with a column of labels",
    "objects": "images with columns of objects, such as those of stimuli/discrimination_counterfactuals",
}


def circuit(arguments: argparse.Namespace) -> int:
    """List circuits, print one's options, or run one."""
    if arguments.list or arguments.name is None:
        width = max(map(len, CIRCUITS))
        print(
            "\n".join(f"{name:<{width}}  {entry.text} ({entry.images})" for name, entry in CIRCUITS.items())
        )
        print("\nThey take:")
        print("\n".join(f"{kind:<{width}}  {text}" for kind, text in _NEEDS.items()))
        return 0
    if arguments.name not in CIRCUITS:
        raise SpecError(
            f"There is no circuit {arguments.name!r}.{suggest(arguments.name, CIRCUITS)} Circuits: "
            f"{', '.join(CIRCUITS)}."
        )
    entry = CIRCUITS[arguments.name]
    if arguments.options:
        print(f"{arguments.name}{_signature(entry)}\n\n{inspect.getdoc(entry.function)}")
        return 0
    for flag in ("model", "data", "out"):
        if getattr(arguments, flag) is None:
            raise SpecError(f"circuit {arguments.name} needs --{flag}; it takes {_NEEDS[entry.images]}.")
    settings, for_data = _settings(arguments.set, arguments.name, entry)
    result = _run(arguments, entry, settings, for_data)
    folder = result.save(arguments.out)
    print(f"{result.title}\n")
    print("\n".join(f"  {name}: {_said(value)}" for name, value in result.summary.items()))
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    print(f"\nIn {folder}: {', '.join(files)}")
    return 0


def _run(
    arguments: argparse.Namespace, entry: Entry, settings: dict[str, Any], for_data: Mapping[str, Any]
) -> CircuitResult:
    if "metric" in settings:
        settings["metric"] = _metric(settings["metric"])
    if "progress" in entry.options:
        settings["progress"] = not arguments.quiet
    wanted = [
        name
        for name, parameter in entry.options.items()
        if parameter.default is inspect.Parameter.empty and name not in settings
    ]
    if wanted:
        raise SpecError(
            f"circuit {arguments.name} needs {' and '.join(wanted)}: give --set {wanted[0]}=VALUE; "
            "--options says what it is."
        )
    from vit_mechinterp.commands.image_data import image_data
    from vit_mechinterp.commands.models import opened

    vit = opened(arguments.model, arguments.pretrained, arguments.allow_pickle)
    pairs = entry.images == "pairs" and "corruption" not in settings
    data = image_data(arguments.data, pairs=pairs, n=arguments.n, options=for_data)
    if "other" in settings and isinstance(settings["other"], str):
        settings["other"] = opened(settings["other"], arguments.pretrained, arguments.allow_pickle)
    if "directions" in settings:
        settings["directions"] = _directions(settings["directions"], entry, vit)
    return entry.function(vit, data, **settings)


def _settings(given: Sequence[str], name: str, entry: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
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
    known = list(entry.options)
    for key in settings:
        if key not in known:
            raise SpecError(
                f"circuit {name} has no option {key!r}.{suggest(key, known)} Options: {', '.join(known)}."
            )
    return settings, for_data


def _directions(file: Any, entry: Entry, vit: HookedViT) -> Any:
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
            raise SpecError(f"{path} has no direction by the name of a site. It holds: {', '.join(tensors)}.")
        return found
    if len(tensors) != 1:
        raise SpecError(f"{path} holds {', '.join(tensors)}; directions are one tensor [class, d_output].")
    return next(iter(tensors.values()))


def _metric(given: Any) -> Any:
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


def _signature(entry: Entry) -> str:
    shown = (
        name if option.default is inspect.Parameter.empty else f"{name}={option.default!r}"
        for name, option in entry.options.items()
    )
    return f": {', '.join(shown)}"


def _said(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
