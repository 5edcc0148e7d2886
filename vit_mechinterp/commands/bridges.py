"""``parity``: whether other packages compute on a model what the engine computes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from vit_mechinterp.commands.models import opened

__all__ = ["parity"]


def parity(arguments: argparse.Namespace) -> int:
    """Print experiments by backends with the largest difference, or the reason of a refusal."""
    from vit_mechinterp.bridges import parity as matrix

    vit = opened(arguments.model, arguments.pretrained, arguments.allow_pickle)
    found = matrix.parity(vit, arguments.backend or matrix.BACKENDS, progress=not arguments.quiet)
    if arguments.json:
        print(json.dumps({**asdict(found), "passed": found.passed, "failures": found.failures}, indent=2))
    else:
        print(found)
    return 0 if found.passed else 1
