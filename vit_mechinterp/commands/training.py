"""``train``: a small ViT from scratch, or any supported model."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from typing import Any

from vit_mechinterp.errors import SpecError

__all__ = ["train"]


def train(arguments: argparse.Namespace) -> int:
    """Train a model, or list what can be set."""
    from vit_mechinterp.spec.documents import load_yaml, read_text, validate
    from vit_mechinterp.training import TrainingConfig, train
    from vit_mechinterp.training.presets import preset_settings

    if arguments.options:
        print(json.dumps(TrainingConfig.model_json_schema(), indent=2))
        return 0
    if arguments.out is None:
        raise SpecError("train needs --out FOLDER (or --options, to list what can be set).")
    given: dict[str, Any] = {} if arguments.preset is None else preset_settings(arguments.preset)
    if arguments.config is not None:
        given |= load_yaml(read_text(arguments.config), str(arguments.config))
    for setting in arguments.set:
        _put(given, setting, load_yaml)
    config = validate(TrainingConfig, given, "training options")
    command = shlex.join(["vit-mechinterp", *arguments.argv])
    progress = not arguments.quiet
    result = train(config, arguments.out, resume=arguments.resume, command=command, progress=progress)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
    if int(os.environ.get("RANK", "0")) == 0:  # accelerate launch runs this once per process
        print(f"Best checkpoint (step {result.best_step}) in {result.folder}: {metrics}")
    return 0


def _put(options: dict[str, Any], setting: str, parse: Any) -> None:
    key, separator, value = setting.partition("=")
    if not separator:
        raise SpecError(f"--set takes KEY=VALUE, got {setting!r}.")
    *groups, name = key.split(".")
    for group in groups:
        there = options.get(group)
        options[group] = dict(there) if isinstance(there, dict) else {}  # a preset's own stays as it is
        options = options[group]
    options[name] = parse(value, f"--set {key}")
