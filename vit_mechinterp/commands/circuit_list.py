"""The circuits that ``vit-mechinterp circuit`` knows by name, and what images each takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from vit_mechinterp.circuits.result import CircuitResult

__all__ = ["CIRCUITS", "NEEDS", "Entry"]


@dataclass(frozen=True)
class Entry:
    """A circuit by name: the module and function, what images it takes, what it is for, and the function that
    further options are handed on to.
    """

    home: str
    images: Literal["images", "pairs", "labels", "objects", "training", "result"]
    text: str
    more: str | None = None

    @property
    def function(self) -> Callable[..., CircuitResult]:
        """The circuit itself."""
        return self._at(self.home)

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """What it takes beside the model and the images."""
        taken = 3 if self.images == "training" else 2
        own = list(inspect.signature(self.function).parameters.values())[taken:]
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
    "attention_walkthrough": Entry(
        "attention_walkthrough:attention_walkthrough", "objects", "single heads on one image, each for a role"
    ),
    "attribution_patching": Entry(
        "attribution_patching:attribution_patching",
        "pairs",
        "activation patching to first order, with its error",
    ),
    "cumulative_ablation": Entry(
        "cumulative_ablation:cumulative_ablation", "images", "what is left as more and more heads go"
    ),
    "das": Entry("das:das", "training", "subspaces that carry an attribute of an object, found by training"),
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
    "equivalence_walks": Entry(
        "equivalence_walks:equivalence_walks", "result", "walks that keep an embedding, from matched images"
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
    "probe_intervention": Entry(
        "probe_intervention:probe_intervention", "objects", "whether a probe's direction moves the answer"
    ),
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

NEEDS = {
    "images": "images",
    "pairs": "pairs of images: two files, columns base and source, or --set corruption=blur",
    "labels": "images with a column of labels",
    "objects": "images with columns of objects, such as those of stimuli/discrimination_counterfactuals",
    "training": "as objects, the last quarter held out; or two datasets, to train and to measure on",
    "result": "the folder of embedding_matching's result",
}
"""What each kind of images is, in words."""
