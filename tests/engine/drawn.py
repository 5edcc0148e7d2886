"""Strategies for small experiments: worlds, interventions, captures, and runs that have much to do with one another.

What planning may leave out shows where things meet: edits, captures and what is read at one place or at neighbouring ones, runs
that begin alike, runs that go on from runs. Places drawn from all of a model seldom meet, so an experiment draws most of
its own from a few, and runs are put together from parts that are known to meet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from hypothesis import strategies as st

from tests.engine.world import HEAD_SITES, World
from tests.tiny_models import MAIN, N_LAYERS, TIMM_POOLED, Tiny

Document = dict[str, Any]
N = 5
"""Examples of a world."""

MATRICES = ("attn.scores", "attn.pattern")
WHOLE = ("pooled", "logits")
"""Sites without tokens."""

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "ln_final", *WHOLE)
PAIRED: dict[str, list[Any]] = {
    str(["cls", 3]): [["cls", 7], [4, 7]],
    str([3, 1]): [[1, 3], [2, 9]],
    str([7]): [[0], [2]],
    str({"column": "here"}): [{"column": "there"}],
}
"""Tokens of a source beside tokens that they may be put in at."""


def short(site: str) -> str:
    """``attn.z`` of ``blocks.1.attn.z``."""
    return site.split(".", 2)[-1]


@cache
def plain(tiny: Tiny) -> World:
    """Five examples that have nothing in common."""
    world = World(tiny, N)
    world.tensors["shut"] = torch.zeros(3)
    world.vit.sites()  # takes a forward, once
    return world


@cache
def repeating(tiny: Tiny) -> World:
    """Five examples, of which one is another again, one has another's source, and one is its own source."""
    world = World(tiny, N)
    for column in world.columns.values():
        column[3] = column[0]
    world.columns["source"][1] = world.columns["source"][0]
    world.columns["source"][4] = world.columns["base"][4]
    world.tensors["shut"] = torch.zeros(3)
    world.vit.sites()
    return world


def worlds(*tinies: Tiny) -> st.SearchStrategy[World]:
    """Worlds of some models, or of all."""
    return st.builds(lambda make, tiny: make(tiny), st.sampled_from([plain, repeating]), st.sampled_from(tinies or (*MAIN, TIMM_POOLED)))


def _selections(world: World) -> list[Any]:
    """Tokens that may be selected."""
    two = ["cls", 3] if "cls" in world.tiny.prefix else [3, 1]
    return ["all", "all", two, [7], "patches", {"column": "here"}, {"box": "box"}]


@st.composite
def edits(draw: Any, world: World, sites: list[str], readable: list[str]) -> Document:
    """An intervention at one of some sites."""
    site = draw(st.sampled_from(sites))
    name, d = short(site), world.shape(site)[-1]
    edit: Document = {"site": site}
    if site not in WHOLE:
        edit["tokens"] = draw(st.sampled_from(_selections(world)))
    if name in HEAD_SITES and draw(st.booleans()):
        heads = st.integers(0, world.tiny.n_heads - 1)
        edit["heads"] = draw(st.lists(heads, min_size=1, max_size=2, unique=True))
    if name in MATRICES and draw(st.booleans()):
        edit["keys"] = draw(st.sampled_from(["patches", [1, 2], [0]]))
    source = st.sampled_from(["base", "source", *({"run": name} for name in readable * 2)])
    match draw(st.sampled_from(["interchange"] * 4 + ["add", "subspace", "zero", "mean", "resample"])):
        case "interchange":
            edit |= {"op": "interchange", "source": draw(source), **draw(_elsewhere(world, edit))}
        case "subspace":
            edit |= {"op": "inject_subspace", "source": draw(source), "basis": f"basis.{d}"}
            if d >= 3 and draw(st.booleans()):
                edit["gate"] = draw(st.sampled_from(["gate", "shut"]))
        case "add":
            edit |= {"op": "add_direction", "vector": f"direction.{d}", "alpha": draw(st.sampled_from([1.0, 0.0, -2.0]))}
        case "zero":
            edit |= {"op": "ablate"}
        case "mean":
            edit |= {"op": "ablate", "method": "mean", "pool_tokens": draw(st.booleans())}
        case "resample":
            edit |= {"op": "ablate", "method": "resample", "seed": draw(st.integers(0, 3))}
    return edit


@st.composite
def _elsewhere(draw: Any, world: World, edit: Document) -> Document:
    """That an interchange reads another site than its own, or other tokens."""
    site, where = edit["site"], {}
    if site not in WHOLE and short(site) not in MATRICES and draw(st.integers(0, 3)) == 0:
        # A value that is far larger than what belongs there makes patterns that rounding decides.
        kind = STREAM if short(site) in STREAM else (short(site),)
        alike = [own for own in world.sites if short(own) in kind and world.shape(own) == world.shape(site)]
        where["source_site"] = draw(st.sampled_from(alike))
    if str(edit.get("tokens")) in PAIRED and draw(st.integers(0, 2)) == 0:
        where["source_tokens"] = draw(st.sampled_from(PAIRED[str(edit["tokens"])]))
    return where


def going_on(run: str, site: str) -> Document:
    """The edit that goes on from all that another run has at a site."""
    return {"op": "interchange", "site": site, "source": {"run": run}}


@st.composite
def heads(draw: Any, world: World, layer: int, readable: list[str]) -> list[Document]:
    """Interventions on heads of one block, side by side, some of which read a run."""
    sites = [f"blocks.{layer}.{name}" for name in HEAD_SITES]
    made = draw(st.lists(edits(world, sites, readable), min_size=1, max_size=2))
    if readable:
        site = f"blocks.{layer}.{draw(st.sampled_from(['attn.q', 'attn.v', 'attn.z', 'attn.result']))}"
        reading = going_on(draw(st.sampled_from(readable)), site) | {"tokens": draw(st.sampled_from(_selections(world)))}
        if draw(st.booleans()):
            reading["heads"] = [draw(st.integers(0, world.tiny.n_heads - 1))]
        made.insert(draw(st.integers(0, len(made))), reading)
    return made


@st.composite
def replaced(draw: Any, world: World, layer: int, readable: list[str]) -> list[Document]:
    """Interventions on all that a block adds to the stream."""
    made = []
    ways: list[Document] = [{"op": "ablate"}, {"op": "ablate", "method": "mean"}, {"op": "ablate", "method": "resample"}]
    ways += [{"op": "interchange", "source": source} for source in ("base", "source", *({"run": name} for name in readable))]
    for name in draw(st.permutations(["attn_out", "mlp_out"])):
        tokens = draw(st.sampled_from(["all", "all", "all", "patches"]))
        made.append({"site": f"blocks.{layer}.{name}", "tokens": tokens, **draw(st.sampled_from(ways))})
    return made


def _near(world: World, layer: int) -> list[str]:
    """The sites of a block, and those that are its ends by other names."""
    ends = [f"blocks.{layer - 1}.resid_post" if layer else "embed", f"blocks.{layer + 1}.resid_pre"]
    return [site for site in world.sites if site.startswith(f"blocks.{layer}.") or site in ends]


def _places(world: World) -> st.SearchStrategy[list[str]]:
    """The sites that most of an experiment is about."""
    stream = [site for site in world.sites if short(site) in STREAM]
    return st.sampled_from([world.sites, stream, *(_near(world, layer) for layer in range(N_LAYERS))])


@st.composite
def _beginnings(draw: Any, world: World, runs: list[Document]) -> list[Document]:
    """What a run shares with another, if anything: its first interventions or all of them, or all that it has at a site."""
    other = draw(st.sampled_from(runs))
    match draw(st.sampled_from(["nothing", "equal", "alike", "on", "on"])):
        case "equal":
            return list(other["interventions"])
        case "alike":
            return other["interventions"][: draw(st.integers(0, len(other["interventions"])))]
        case "on":
            stream = [site for site in world.sites if short(site) in STREAM and short(site) != "resid_mid"]
            posts = [site for site in stream if short(site) == "resid_post"]
            return [going_on(other["name"], draw(st.sampled_from(stream + 2 * posts)))]
    return []


@st.composite
def _parts(draw: Any, world: World, sites: list[str], readable: list[str]) -> list[Document]:
    """What a run has of its own."""
    layers = st.integers(0, N_LAYERS - 1)
    own: list[Callable[[], Any]] = [
        lambda: st.just([]),
        lambda: st.lists(edits(world, world.sites, readable), max_size=2),
        lambda: st.lists(edits(world, sites, readable), min_size=1, max_size=3),
        lambda: st.lists(edits(world, sites, readable), min_size=1, max_size=3),
        lambda: heads(world, draw(layers), readable),
        lambda: replaced(world, draw(layers), readable),
    ]
    return draw(draw(st.sampled_from(own))())


@st.composite
def experiments(draw: Any, most: int = 5, of: st.SearchStrategy[World] | None = None) -> tuple[World, list[Document]]:
    """A world, and documents of so many runs at most, in any order."""
    world = draw(of or worlds())
    sites = draw(_places(world))
    runs: list[Document] = []
    for n in range(draw(st.integers(1, most))):
        readable = [run["name"] for run in runs]
        begun = draw(_beginnings(world, runs)) if runs else []
        own = draw(_parts(world, sites, readable)) if len(begun) < 4 else []
        edited = [*begun, *own][:5]
        seen = st.sampled_from(world.sites) | st.sampled_from(sites)
        if edited:
            seen |= st.sampled_from([edit["site"] for edit in edited])
        captured = draw(st.lists(seen, max_size=3, unique=True))
        base = draw(st.sampled_from(["base", "base", "base", "source"]))
        runs.append({"name": f"run{n}", "base": base, "interventions": edited, "capture": captured})
    read = {edit["source"]["run"] for run in runs for edit in run["interventions"] if isinstance(edit.get("source"), dict)}
    for run in runs:
        if (run["capture"] or run["name"] in read) and draw(st.integers(0, 2)) == 0:
            run["output"] = False
    return world, draw(st.permutations(runs))
