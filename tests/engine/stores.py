"""What tests of the store share: captures in batches of four, and what plain forwards of four images give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.world import World
from vit_mechinterp import ActivationStore
from vit_mechinterp.engine.store import holdings, source

N = 25
SITES = ["embed", "blocks.*.resid_post", "blocks.1.attn.pattern", "blocks.0.attn.z", "pooled", "logits"]


def blocks_of(patch: pytest.MonkeyPatch, nbytes: int, least: int = 1) -> None:
    """Keep values in blocks of so many bytes, so that a tiny model fills many of them, and select from as much."""
    patch.setattr(holdings, "_LEAST_BLOCK_BYTES", least)
    patch.setattr(holdings, "_BLOCK_BYTES", nbytes)
    patch.setattr(source, "_SELECTED_BYTES", nbytes)


def captured(store: ActivationStore, world: World, sites: Any = SITES, **options: Any) -> Any:
    options = {"batch_size": 4, "progress": False, **options}
    return store.capture(world.vit, options.pop("data", world.columns), sites, **options)


def native(world: World, rows: int = 4) -> dict[str, torch.Tensor]:
    """What plain forwards of so many images give, attention matrices in forwards of their own."""
    matrices = ["*.attn.scores", "*.attn.pattern"]
    others = [name for name in world.vit.sites() if not name.endswith(("scores", "pattern"))]
    found: dict[str, torch.Tensor] = {}
    for sites in (others, matrices):
        batches = [world.vit.run(world.columns["base"][i : i + rows], sites)[1] for i in range(0, N, rows)]
        found |= {name: torch.cat([batch[name] for batch in batches]).detach() for name in batches[0]}
    return found
