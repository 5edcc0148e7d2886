"""Pairs of runs that do the same in other words, and pairs that only look like it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from tests.engine.world import World
from tests.tiny_models import HF_VIT, N_LAYERS

Edits = list[dict[str, Any]]

BLOCK = "blocks.1"
PATTERN = f"{BLOCK}.attn.pattern"
STREAM, Z = f"{BLOCK}.resid_post", f"{BLOCK}.attn.z"


@cache
def world() -> World:
    made = World(HF_VIT, n=3)
    made.tensors["ones"] = torch.ones_like(made.tensors["gate"])
    made.tensors["same direction"] = made.tensors["direction.32"].clone()
    made.columns["early"] = torch.tensor([[1], [2], [3]])
    made.columns["late"] = torch.tensor([[4], [5], [3]])
    return made


def swap(site: str, **fields: Any) -> dict[str, Any]:
    return {"op": "interchange", "site": site, "source": "source", **fields}


def ablate(site: str, **fields: Any) -> dict[str, Any]:
    return {"op": "ablate", "site": site, "method": "zero", **fields}


def add(site: str, **fields: Any) -> dict[str, Any]:
    return {"op": "add_direction", "site": site, "vector": "direction.32", **fields}


def inject(site: str, **fields: Any) -> dict[str, Any]:
    basis = f"basis.{8 if '.attn.' in site else 32}"
    return {"op": "inject_subspace", "site": site, "basis": basis, "source": "source", **fields}


CHOSEN = {"vector": "kinds.32"}
VECTORS = {"vectors": "rows.2.3", "source": None}

SAME: Mapping[str, tuple[Edits, Edits]] = {
    "two tokens": ([swap(STREAM, tokens=[2, 5])], [swap(STREAM, tokens=[2]), swap(STREAM, tokens=[5])]),
    "two tokens, the last first": ([swap(STREAM, tokens=[2, 5])], [swap(STREAM, tokens=[5]), swap(STREAM, tokens=[2])]),
    "tokens in pairs": (
        [swap(STREAM, tokens=[2, 5], source_tokens=[7, 1])],
        [swap(STREAM, tokens=[5], source_tokens=[1]), swap(STREAM, tokens=[2], source_tokens=[7])],
    ),
    "pairs in another order": (
        [swap(STREAM, tokens=[2, 5], source_tokens=[7, 1])],
        [swap(STREAM, tokens=[5, 2], source_tokens=[1, 7])],
    ),
    "CLS and a token of each example": (
        [ablate(STREAM, tokens="cls"), ablate(STREAM, tokens={"column": "here"})],
        [ablate(STREAM, tokens={"column": "here"}), ablate(STREAM, tokens="cls")],
    ),
    "other operations on other tokens": (
        [add(STREAM, tokens=[3]), ablate(STREAM, tokens=[6])],
        [ablate(STREAM, tokens=[6]), add(STREAM, tokens=[3])],
    ),
    "directions": ([add(STREAM, tokens=[3, 4])], [add(STREAM, tokens=[4]), add(STREAM, tokens=[3])]),
    "subspaces": ([inject(STREAM, tokens=[3, 4])], [inject(STREAM, tokens=[4]), inject(STREAM, tokens=[3])]),
    "all heads": ([swap(Z, tokens=[2])], [swap(Z, tokens=[2], heads=[3, 0, 1, 2])]),
    "heads one by one": ([swap(Z, heads=[0, 2])], [swap(Z, heads=[2]), swap(Z, heads=[0])]),
    "every head one by one": ([inject(Z)], [inject(Z, heads=[head]) for head in (1, 3, 0, 2)]),
    "heads of one token and one of another": (
        [swap(Z, tokens=[2], heads=[0, 1]), swap(Z, tokens=[5], heads=[0])],
        [swap(Z, tokens=[5, 2], heads=[0]), swap(Z, tokens=[2], heads=[1])],
    ),
    "all heads of one token and one of another": (
        [swap(Z, tokens=[2]), ablate(Z, tokens=[5], heads=[0])],
        [ablate(Z, tokens=[5], heads=[0]), *(swap(Z, tokens=[2], heads=[head]) for head in range(4))],
    ),
    "CLS and patches": ([swap(Z)], [swap(Z, tokens="patches"), swap(Z, tokens="cls")]),
    "before heads that are replaced": (
        [swap(Z, heads=[0])],
        [ablate("blocks.1.attn.q", heads=[0]), swap(Z, heads=[0])],
    ),
    "before activations that are replaced": (
        [swap("blocks.1.mlp.post")],
        [ablate("blocks.1.mlp.pre", tokens=[3]), swap("blocks.1.mlp.post")],
    ),
    "keys in another order": (
        [ablate("blocks.1.attn.pattern", keys=[1, 2])],
        [ablate("blocks.1.attn.pattern", keys=[2, 1])],
    ),
    "keys one by one": (
        [ablate(PATTERN, tokens="cls", keys=[1, 2])],
        [ablate(PATTERN, tokens="cls", keys=[2]), ablate(PATTERN, tokens="cls", keys=[1])],
    ),
    "keys of heads and queries one by one": (
        [ablate(PATTERN, tokens=["cls", 3], keys=[1, 2], heads=[0, 2])],
        [
            ablate(PATTERN, tokens="cls", keys=[1, 2], heads=[2]),
            *(ablate(PATTERN, tokens="cls", keys=[key], heads=[0]) for key in (2, 1)),
            ablate(PATTERN, tokens=[3], keys=[1, 2], heads=[0, 2]),
        ],
    ),
    "all keys one by one": (
        [swap(PATTERN, tokens=[3])],
        [swap(PATTERN, tokens=[3], keys=[key]) for key in ("cls", *reversed(range(16)))],
    ),
    "keys twice": ([ablate(PATTERN, keys=[1])], [ablate(PATTERN, keys=[1]), ablate(PATTERN, keys=[1])]),
    "a gate of ones": ([inject(STREAM, tokens=[3])], [inject(STREAM, tokens=[3], gate="ones")]),
    "inside an MLP whose increment is replaced": (
        [swap("blocks.1.mlp_out")],
        [ablate("blocks.1.mlp.post", tokens=[3]), swap("blocks.1.mlp_out")],
    ),
    "before a pattern that is replaced": (
        [swap("blocks.1.attn.pattern"), ablate(Z, heads=[1])],
        [ablate("blocks.1.attn.q", heads=[1]), swap("blocks.1.attn.pattern"), ablate(Z, heads=[1])],
    ),
    "tokens that nobody reads": (
        [swap(f"blocks.{N_LAYERS - 1}.attn.z", tokens=["cls", 2])],
        [swap(f"blocks.{N_LAYERS - 1}.attn.z", tokens=[3, "cls", 4])],
    ),
    "all tokens, of which one is read": (
        [swap(f"blocks.{N_LAYERS - 1}.mlp.post", tokens="cls")],
        [swap(f"blocks.{N_LAYERS - 1}.mlp.post")],
    ),
    "means of tokens that nobody reads": (
        [ablate(f"blocks.{N_LAYERS - 1}.mlp.post", tokens=["cls", 2], method="mean")],
        [ablate(f"blocks.{N_LAYERS - 1}.mlp.post", tokens=[3, "cls"], method="mean")],
    ),
    "pairs that nobody reads": (
        [swap(f"blocks.{N_LAYERS - 1}.mlp.post", tokens=["cls"], source_tokens=[3])],
        [swap(f"blocks.{N_LAYERS - 1}.mlp.post", tokens=[2, "cls"], source_tokens=[1, 3])],
    ),
    "inside an MLP, at tokens whose increment is replaced": (
        [swap(f"{BLOCK}.mlp_out", tokens=[2, 3])],
        [ablate(f"{BLOCK}.mlp.post", tokens=[2]), swap(f"{BLOCK}.mlp_out", tokens=[2, 3])],
    ),
    "increments of tokens that are replaced": (
        [swap(f"{BLOCK}.resid_post", tokens=[2])],
        [add(f"{BLOCK}.mlp_out", tokens=[2]), swap(f"{BLOCK}.resid_post", tokens=[2])],
    ),
    "the middle of tokens that are replaced": (
        [ablate(f"{BLOCK}.resid_post", tokens=[2])],
        [add(f"{BLOCK}.resid_mid", tokens=[2]), ablate(f"{BLOCK}.resid_post", tokens=[2])],
    ),
    "before the middle of tokens that are replaced": (
        [ablate(f"{BLOCK}.resid_mid", tokens=[2])],
        [add(f"{BLOCK}.attn_out", tokens=[2]), ablate(f"{BLOCK}.resid_mid", tokens=[2])],
    ),
    "heads of tokens whose attention is replaced": (
        [ablate(f"{BLOCK}.attn_out", tokens=[2])],
        [swap(Z, tokens=[2], heads=[1]), ablate(f"{BLOCK}.attn_out", tokens=[2])],
    ),
    "what a norm gives to an MLP whose increment is replaced": (
        [ablate(f"{BLOCK}.mlp_out")],
        [add(f"{BLOCK}.ln2", tokens=[4]), ablate(f"{BLOCK}.mlp_out")],
    ),
    "what a norm gives to attention that is replaced": (
        [ablate(f"{BLOCK}.attn_out")],
        [add(f"{BLOCK}.ln1", tokens=[4]), ablate(f"{BLOCK}.attn_out")],
    ),
    "a stream that is written over by its other name": (
        [swap("blocks.2.resid_pre", tokens=[2])],
        [add(f"{BLOCK}.resid_post", tokens=[2]), swap("blocks.2.resid_pre", tokens=[2])],
    ),
    "tokens of a stream by both names": (
        [ablate(f"{BLOCK}.resid_post", tokens=[2, 5])],
        [ablate(f"{BLOCK}.resid_post", tokens=[2]), ablate("blocks.2.resid_pre", tokens=[5])],
    ),
    "a value put back by its other name": (
        [add(STREAM, tokens=[3])],
        [add(STREAM, tokens=[3]), add("blocks.0.resid_post", tokens=[2]), swap("blocks.1.resid_pre", tokens=[2], source="base")],
    ),
    "written over by two together": (
        [swap(STREAM, tokens=[2]), ablate(STREAM, tokens=[5])],
        [add(STREAM, tokens=[2, 5]), swap(STREAM, tokens=[2]), ablate(STREAM, tokens=[5])],
    ),
    "written over in part": (
        [ablate(STREAM, tokens=[2]), swap(STREAM, tokens=[5])],
        [ablate(STREAM, tokens=[2, 5]), swap(STREAM, tokens=[5])],
    ),
    "put back where nothing has changed": (
        [ablate(f"{BLOCK}.attn_out", tokens=[2])],
        [ablate(f"{BLOCK}.attn_out", tokens=[2]), swap(f"{BLOCK}.resid_mid", tokens=[5], source="base")],
    ),
    "there already": (
        [swap("blocks.1.resid_pre", tokens=[2, 5])],
        [swap("blocks.1.resid_pre", tokens=[2, 5]), swap("blocks.1.attn.q", tokens=[2])],
    ),
    "inside an MLP and where it comes out": ([swap(f"{BLOCK}.ln2", tokens=[3])], [swap(f"{BLOCK}.mlp_out", tokens=[3])]),
    "in the middle of a block and behind it": (
        [swap(f"{BLOCK}.resid_mid", tokens=[3, 4])],
        [swap(f"{BLOCK}.resid_post", tokens=[3, 4])],
    ),
    "all heads and what comes out of them": ([swap(Z, tokens=[3])], [swap(f"{BLOCK}.attn_out", tokens=[3])]),
    "all tokens, paired with others": (
        [swap(STREAM, source_tokens=["cls", *reversed(range(16))])],
        [swap(STREAM, tokens=["cls", *range(16)], source_tokens=["cls", *reversed(range(16))])],
    ),
    "pooled means of the same tokens": (
        [ablate(STREAM, tokens=[3, 4], method="mean", pool_tokens=True)],
        [ablate(STREAM, tokens=[4, 3], method="mean", pool_tokens=True)],
    ),
    "another name": (
        [add(STREAM, tokens=[3])],
        [add(STREAM, tokens=[3]) | {"vector": "same direction"}],
    ),
}
OTHER: Mapping[str, tuple[Edits, Edits]] = {
    "the middle of other tokens": (
        [swap(f"{BLOCK}.resid_post", tokens=[3])],
        [add(f"{BLOCK}.resid_mid", tokens=[2]), swap(f"{BLOCK}.resid_post", tokens=[3])],
    ),
    "values of tokens whose attention is replaced": (
        [ablate(f"{BLOCK}.attn_out", tokens=[2])],
        [ablate(f"{BLOCK}.attn.v", tokens=[2]), ablate(f"{BLOCK}.attn_out", tokens=[2])],
    ),
    "put back where something has changed": (
        [ablate(f"{BLOCK}.attn_out", tokens=[2, 5])],
        [ablate(f"{BLOCK}.attn_out", tokens=[2, 5]), swap(f"{BLOCK}.resid_mid", tokens=[5], source="base")],
    ),
    "what another one has changed on the way": (
        [add(f"{BLOCK}.mlp.post", tokens=[3]) | {"vector": "direction.40"}, swap(f"{BLOCK}.mlp_out", tokens=[4])],
        [add(f"{BLOCK}.mlp.post", tokens=[3]) | {"vector": "direction.40"}, swap(f"{BLOCK}.ln2", tokens=[3, 4])],
    ),
    "some heads and what comes out of all": (
        [swap(Z, tokens=[3], heads=[0, 1])],
        [swap(f"{BLOCK}.attn_out", tokens=[3])],
    ),
    "pairs of others": (
        [swap(STREAM, tokens=[2, 5], source_tokens=[7, 1])],
        [swap(STREAM, tokens=[2, 5], source_tokens=[1, 3])],
    ),
    "heads that read other tokens": (
        [swap(Z, tokens=[2], source_tokens=[5], heads=[0]), swap(Z, tokens=[2], source_tokens=[7], heads=[1])],
        [swap(Z, tokens=[2], source_tokens=[5], heads=[0, 1])],
    ),
    "tokens that overlap in a later example": (
        [add(STREAM, tokens={"column": "early"}), ablate(STREAM, tokens={"column": "late"})],
        [ablate(STREAM, tokens={"column": "late"}), add(STREAM, tokens={"column": "early"})],
    ),
    "keys of some": (
        [ablate("blocks.1.attn.pattern", tokens=[1], keys=[1, 2]), ablate("blocks.1.attn.pattern", tokens=[2], keys=[3])],
        [ablate("blocks.1.attn.pattern", tokens=[1, 2], keys=[1, 2])],
    ),
    "choices by other columns": (
        [add(STREAM, tokens=[3], choose={"column": "kind"}) | CHOSEN, add(STREAM, tokens=[4], choose={"column": "label"}) | CHOSEN],
        [add(STREAM, tokens=[3, 4], choose={"column": "kind"}) | CHOSEN],
    ),
    "vectors of tokens in another order": (
        [inject(STREAM, tokens=[3, 4]) | VECTORS],
        [inject(STREAM, tokens=[4, 3]) | VECTORS],
    ),
    "tokens that overlap": (
        [add(STREAM, tokens=[3, 4]), ablate(STREAM, tokens=[4])],
        [ablate(STREAM, tokens=[4]), add(STREAM, tokens=[3, 4])],
    ),
    "vectors by token": (
        [add(STREAM, tokens=[3, 4]) | {"vector": "rows.2.32"}],
        [add(STREAM, tokens=[4, 3]) | {"vector": "rows.2.32"}],
    ),
    "twice as much": ([add(STREAM, tokens=[3])], [add(STREAM, tokens=[3], alpha=2.0)]),
    "a gate": ([inject(STREAM, tokens=[3])], [inject(STREAM, tokens=[3], gate="gate")]),
    "three heads of four": ([swap(Z)], [swap(Z, heads=[0, 1, 2])]),
    "inside an MLP whose increment is replaced in part": (
        [swap("blocks.1.mlp_out", tokens=[3])],
        [ablate("blocks.1.mlp.post"), swap("blocks.1.mlp_out", tokens=[3])],
    ),
    "before scores that are not all replaced": (
        [swap("blocks.1.attn.pattern", heads=[0])],
        [ablate("blocks.1.attn.q"), swap("blocks.1.attn.pattern", heads=[0])],
    ),
    "before a pattern and values": (
        [swap("blocks.1.attn.pattern")],
        [ablate("blocks.1.attn.v"), swap("blocks.1.attn.pattern")],
    ),
    "means over other tokens": (
        [{"op": "ablate", "site": STREAM, "method": "mean", "pool_tokens": True, "tokens": [3, 4]}],
        [
            {"op": "ablate", "site": STREAM, "method": "mean", "pool_tokens": True, "tokens": [3]},
            {"op": "ablate", "site": STREAM, "method": "mean", "pool_tokens": True, "tokens": [4]},
        ],
    ),
}
