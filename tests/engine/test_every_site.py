"""Every intervention at every site of five kinds of model is what a by-hand forward makes of it, one run at a time.

All runs of a model go through one call of `execute`, so they also share clean forwards and grow one another's batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.world import HEAD_SITES, World, world_of
from tests.oracles import by_hand
from tests.tiny_models import MAIN, TIMM_POOLED, Tiny

Document = dict[str, Any]

def by_token(site: str, kind: str, k: int) -> str:
    """Names of tensors with one entry for each token, where the site has tokens and no heads."""
    local = site.split(".", 2)[-1]
    if local in HEAD_SITES or local in ("pooled", "logits"):
        return {"bases": "basis", "gates": "gate"}[kind]
    return f"{kind}.{k}"


OPS: dict[str, Callable[[str, int, int], Document]] = {
    # Each is given the site, how many tokens are selected there, and its number of features.
    "interchange": lambda site, k, d: {"op": "interchange", "source": "source"},
    "interchange_run": lambda site, k, d: {"op": "interchange", "source": {"run": "sender"}},
    "add": lambda site, k, d: {"op": "add_direction", "vector": f"direction.{d}", "alpha": -1.5},
    "add_rows": lambda site, k, d: {"op": "add_direction", "vector": f"rows.{k}.{d}"},
    "add_flat": lambda site, k, d: {"op": "add_direction", "vector": f"flat.{k}.{d}"},
    "add_chosen": lambda site, k, d: {"op": "add_direction", "vector": f"kinds.{d}", "choose": {"column": "kind"}},
    "add_chosen_rows": lambda site, k, d: {
        "op": "add_direction", "vector": f"kinds.{k}.{d}", "choose": {"column": "kind"},
    },
    "add_chosen_flat": lambda site, k, d: {
        "op": "add_direction", "vector": f"kindsflat.{k}.{d}", "choose": {"column": "kind"},
    },
    "inject": lambda site, k, d: {"op": "inject_subspace", "basis": f"basis.{d}", "source": "source"},
    "inject_gated": lambda site, k, d: {
        "op": "inject_subspace", "basis": f"basis.{d}", "gate": "gate", "source": "source",
    },
    "inject_point": lambda site, k, d: {
        "op": "inject_subspace", "basis": f"basis.{d}", "gate": "gate", "vectors": "direction.3",
    },
    "inject_points": lambda site, k, d: {"op": "inject_subspace", "basis": f"basis.{d}", "vectors": f"rows.{k}.3"},
    "inject_chosen": lambda site, k, d: {
        "op": "inject_subspace", "basis": f"basis.{d}", "vectors": f"kinds.{k}.3", "choose": {"column": "kind"},
    },
    "inject_by_token": lambda site, k, d: {
        "op": "inject_subspace", "basis": f"{by_token(site, 'bases', k)}.{d}", "source": "source",
    },
    "inject_by_token_gated": lambda site, k, d: {
        "op": "inject_subspace", "basis": f"{by_token(site, 'bases', k)}.{d}",
        "gate": by_token(site, "gates", k), "source": "source",
    },
    "inject_by_token_chosen": lambda site, k, d: {
        "op": "inject_subspace", "basis": f"{by_token(site, 'bases', k)}.{d}",
        "gate": by_token(site, "gates", k), "vectors": f"kinds.{k}.3", "choose": {"column": "kind"},
    },
    "zero": lambda site, k, d: {"op": "ablate"},
    "mean": lambda site, k, d: {"op": "ablate", "method": "mean"},
    "mean_pooled": lambda site, k, d: {"op": "ablate", "method": "mean", "pool_tokens": True},
    "mean_given": lambda site, k, d: {"op": "ablate", "method": "mean", "mean": f"mean.{site}"},
    "mean_given_pooled": lambda site, k, d: {
        "op": "ablate", "method": "mean", "mean": f"pooled.{site}", "pool_tokens": True,
    },
    "resample": lambda site, k, d: {"op": "ablate", "method": "resample", "seed": 5},
}  # fmt: skip


def documents(world: World) -> Iterator[Document]:
    """Every op at every site, at some heads and keys in turn."""
    edit = {"op": "add_direction", "site": "embed", "vector": f"direction.{world.module_width}", "alpha": 0.5}
    yield {"name": "sender", "interventions": [edit], "base": "source"}
    for place, site in enumerate(world.sites):
        for turn, (name, make) in enumerate(OPS.items()):
            yield _document(world, site, name, make, turn + place)


def _document(world: World, site: str, name: str, make: Callable[..., Document], turn: int) -> Document:
    local = site.split(".", 2)[-1]
    d = world.shape(site)[-1]
    if local in ("pooled", "logits"):
        return {"name": f"{name} at {site}", "interventions": [{"site": site, **make(site, 1, d)}]}
    first = world.tiny.prefix[0] if world.tiny.prefix else 9
    selection: Document = {"tokens": [first, 1, 4], "source_tokens": [6, first, 2]}
    if local in HEAD_SITES and turn % 2:
        selection["heads"] = [1, 0]
    if local in ("attn.scores", "attn.pattern") and turn % 3:
        # An ablation of scores to 0, or of a pattern's largest entries, shows at some keys only.
        selection["keys"] = [first, 3, 5, 8]
    edit = make(site, 3, d)
    if "source" not in edit:
        del selection["source_tokens"]
    return {"name": f"{name} at {site}", "interventions": [{"site": site, **selection, **edit}]}


@pytest.mark.parametrize("tiny", [*MAIN, TIMM_POOLED], ids=lambda tiny: tiny.name)
def test_the_oracle_is_the_native_model(tiny: Tiny) -> None:
    world = world_of(tiny)
    with torch.no_grad():
        native = world.vit(world.columns["base"])
        written_out = by_hand(world.module, world.columns["base"], lambda site, value: value)
    assert float((native - written_out).abs().max()) <= 3e-6 * world.scale
    assert list(world.oracle.clean("base")[1]) == world.vit.site_names() == world.sites
    assert float(native.std(0).mean()) > 0.1 * world.scale  # the examples differ


@pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)
def test_every_op_at_every_site(tiny: Tiny) -> None:
    world = world_of(tiny)
    runs = list(documents(world))
    world.check(runs, world.execute(runs, batch_size=48))


@pytest.mark.parametrize("tiny", MAIN, ids=lambda tiny: tiny.name)
def test_whole_activations_at_every_site(tiny: Tiny) -> None:
    world = world_of(tiny)
    ops = ("interchange", "add_flat", "mean", "resample")
    runs = []
    for place, site in enumerate(world.sites):
        d, name = world.shape(site)[-1], ops[place % 4]
        k = tiny.n_tokens if site not in ("pooled", "logits") else 1
        runs.append({"name": f"{name} at {site}", "interventions": [{"site": site, **OPS[name](site, k, d)}]})
    world.check(runs, world.execute(runs, batch_size=24))
