"""The vision tower of a checkpoint that holds more: found in the architecture, loaded without the rest."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vit_mechinterp.model.registry import families
from vit_mechinterp.model.resolve import missing_for

__all__ = ["Tower", "tower_in"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tower:
    """A part of a transformers architecture that some family describes.

    Args:
        path: where it stands in the whole model.
        kind: its class.
        config: its configuration.
    """

    path: str
    kind: Any
    config: Any

    def unloaded(self, making: Mapping[str, Any]) -> nn.Module:
        """The tower with random weights."""
        module: nn.Module = self.kind._from_config(self.config, **making)
        return module

    def loaded(
        self, name: str, whole: Any, options: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> nn.Module:
        """The tower with its weights out of the whole checkpoint.

        The whole model is loaded first only where its weights have other names than the tower's path.

        Args:
            name: of the checkpoint.
            whole: class of the whole model.
            options: for ``from_pretrained``.
            changes: of the configuration, which the tower's own has seen already.
        """
        own = {rf"^(?:.*\.)?{re.escape(self.path.rpartition('.')[2])}\.": ""}
        module: nn.Module
        with _quiet():  # a report would list the weights of all other parts
            module, info = self.kind.from_pretrained(
                name, config=self.config, key_mapping=own, output_loading_info=True, **options
            )
            if info["missing_keys"] or info["mismatched_keys"]:
                module = whole.from_pretrained(name, **options, **changes).get_submodule(self.path)
        return module


def tower_in(make: Callable[[], nn.Module]) -> Tower | None:
    """The first part of a transformers model that a family describes; None if none is.

    The model is made without memory; one that cannot be made so has no tower to find.
    """
    from transformers import PreTrainedModel

    try:
        with torch.device("meta"):
            module = make()
    except Exception as error:
        logger.debug("Cannot be made without memory: %s", error)
        return None
    known = families()
    for path, part in module.named_modules():
        if path and isinstance(part, PreTrainedModel) and any(missing_for(f, part) is None for f in known):
            logger.info("Of %s, %s (%s) is loaded.", type(module).__name__, path, type(part).__name__)
            return Tower(path, type(part), part.config)
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own reports of weights, off for a while."""
    from transformers.utils import logging as reports

    level = reports.get_verbosity()
    reports.set_verbosity_error()
    try:
        yield
    finally:
        reports.set_verbosity(level)
