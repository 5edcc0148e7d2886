"""No (row, block) pair is computed that need not be: a count that knows nothing of the engine gives the same number.

Every token of every row has a word at every site: equal words, equal values. From the output (CLS behind the last block) the
count asks backwards for the words that it is made of; a word that is an image's own is asked of that image. A block has to run
once for every image, and once for every row, of which such words are asked, unless another row's words hold them all.
"""

from __future__ import annotations

import random
from collections import defaultdict
from functools import cache, cached_property
from itertools import product
from typing import Any

import pytest

import vit_mechinterp as vmi
from tests.engine.test_sharing import repeating
from tests.engine.world import Counted, World, world_of
from tests.tiny_models import N_LAYERS, TIMM_PLAIN
from vit_mechinterp import Run

Document = dict[str, Any]
Place = tuple[int, str, int]
"""Layer, site and token."""

SITES = ("resid_pre", "attn.q", "attn.z", "attn_out", "resid_mid", "ln2", "mlp.post", "mlp_out", "resid_post")
TOKENS = ([1], ["cls", 2], [2, 3], [3, 1], "cls", "all")
MADE_OF = {
    "attn.q": ["resid_pre"],
    "attn.z": ["attn.q"],
    "attn_out": ["attn.z"],
    "resid_mid": ["resid_pre", "attn_out"],
    "ln2": ["resid_mid"],
    "mlp.post": ["ln2"],
    "mlp_out": ["mlp.post"],
    "resid_post": ["resid_mid", "mlp_out"],
}
"""What a token is made of, token by token; the attention call reads all of the block's input as well."""
HANDED_ON = ("resid_pre", "resid_post")
"""What enters a block and leaves it is handed on; everything between is the block's own work."""
OUTLETS = ("attn_out", "mlp_out", "resid_post")
"""Where what a token is made into comes out."""


def drawn(draw: random.Random, n_layers: int) -> list[Document]:
    """Runs of one to three interventions at random sites, some of them behind those of another run; some are equal, some do
    nothing."""
    documents: list[Document] = []
    for n in range(draw.randint(2, 7)):
        begun = draw.choice([[], [], *(document["interventions"] for document in documents)])
        edits: list[Document] = [*begun[:3]]
        for _ in range(draw.randint(1, 3)):
            source = draw.choice(["source", "source", "base"])
            site = f"blocks.{draw.randrange(n_layers)}.{draw.choice(SITES)}"
            edits.append({"op": "interchange", "site": site, "source": source, "tokens": draw.choice(TOKENS)})
        documents.append({"name": f"r{n}", "interventions": edits})
    return documents


class Row:
    """One example of one run, or an image: what every token is at every site, as a word; equal words, equal values.

    ``written`` names the image that a token is taken from.
    """

    def __init__(self, image: bytes, written: dict[Place, Row], n_layers: int, n_tokens: int) -> None:
        self.image, self.written, self.n_layers, self.n_tokens = image, written, n_layers, n_tokens
        self.words: dict[Place, int] = {}
        for layer in range(n_layers):
            for site in SITES:
                for token in range(n_tokens):
                    place = layer, site, token
                    source = written.get(place)
                    self.words[place] = self._made(place)
                    if source and self.words[place] == source.words[place]:
                        del written[place]  # it is there already
                    elif source:
                        self.words[place] = source.words[place]

    def made_of(self, place: Place) -> list[Place]:
        """The places that a place's value is made of, where nothing is written."""
        layer, site, token = place
        if site == "resid_pre":
            return [(layer - 1, "resid_post", token)] if layer else []
        every = range(self.n_tokens) if site == "attn.z" else ()
        return [*((layer, own, token) for own in MADE_OF[site]), *((layer, "resid_pre", other) for other in every)]

    def _made(self, place: Place) -> int:
        layer, site, token = place
        if site == "resid_pre":
            return word("embed", self.image, token) if layer == 0 else self.words[layer - 1, "resid_post", token]
        return word(site, layer, *(self.words[own] for own in self.made_of(place)))

    @cached_property
    def computed(self) -> list[set[int]]:
        """By block, the words that cost something."""
        places = ((layer, site) for layer in range(self.n_layers) for site in SITES if site not in HANDED_ON)
        found: list[set[int]] = [set() for _ in range(self.n_layers)]
        for layer, site in places:
            for token in range(self.n_tokens):
                found[layer].add(self.words[layer, site, token] if site == "resid_mid" else self._made((layer, site, token)))
        return found


WORDS: dict[Any, int] = {}


def word(*parts: Any) -> int:
    """A number for a word."""
    return WORDS.setdefault(parts, len(WORDS))


def needed(world: World, documents: list[Document], n_layers: int) -> int:
    """Blocks that have to run, for every row's output (CLS behind the last block), if it is wanted, and for its captures."""
    n_tokens = world.vit.layout.tokens.n_tokens

    @cache
    def clean(column: str, i: int) -> Row:
        return of_image(world.columns[column][i].numpy().tobytes())

    @cache
    def of_image(image: bytes) -> Row:
        return Row(image, {}, n_layers, n_tokens)

    asked_of: list[tuple[Row, defaultdict[int, set[int]]]] = []
    for document in documents:
        for i in range(len(world.columns["base"])):
            written = {}
            for edit in document["interventions"]:
                _, layer, site = edit["site"].split(".", 2)
                for token in positions(edit["tokens"], n_tokens):
                    written[int(layer), site, token] = clean(edit["source"], i)
            row = Row(clean("base", i).image, written, n_layers, n_tokens)
            places: list[Place] = [(n_layers - 1, "resid_post", 0)] if document.get("output", True) else []
            for capture in document.get("capture", ()):
                _, layer, site = capture.split(".", 2)
                places += [(int(layer), site, token) for token in range(n_tokens)]
            asked_of += asked(row, places)
    images = [of_image(image) for image in dict.fromkeys(row.image for row, _ in asked_of)]
    return sum(
        blocks(together(asked_of, layer), [image.computed[layer] for image in images]) for layer in range(n_layers)
    )


def together(asked_of: list[tuple[Row, defaultdict[int, set[int]]]], layer: int) -> list[set[int]]:
    """The words that are asked of one block: rows that are alike there are asked together."""
    alike: defaultdict[frozenset[int], set[int]] = defaultdict(set)
    for row, words in asked_of:
        alike[frozenset(row.computed[layer])] |= words[layer]
    return list(alike.values())


def blocks(asked_here: list[set[int]], images: list[set[int]]) -> int:
    """How often one block has to run for the words that are asked of its rows: once for every image that has them, and once
    for every other row, unless another one's words hold them all."""
    sets = {frozenset(words) for words in asked_here if words}
    image_of = {words: next((n for n, own in enumerate(images) if words <= own), None) for words in sets}
    of_rows = [words for words, image in image_of.items() if image is None]
    return len({*image_of.values()} - {None}) + sum(not any(words < other for other in of_rows) for words in of_rows)


def asked(row: Row, places: list[Place]) -> list[tuple[Row, defaultdict[int, set[int]]]]:
    """The words of each block that values are made of, for the row and the images that they are made from."""
    words: dict[Row, defaultdict[int, set[int]]] = {row: defaultdict(set)}
    left, seen = [(row, place) for place in places], set()
    while left:
        own, at = left.pop()
        if (own, at) in seen:
            continue
        seen.add((own, at))
        # What is an image's own, because it was taken from it before, can as well be taken here.
        inside = SITES[: SITES.index(at[1])] if at[1] in OUTLETS else ()
        earlier = (own.written.get((at[0], site, at[2])) for site in inside)
        given = next((s for s in (own.written.get(at), *earlier) if s and s.words[at] == own.words[at]), None)
        if given:
            if at[1] == "resid_mid":
                words.setdefault(own, defaultdict(set))[at[0]].add(own.words[at])
            left.append((given, at))
            continue
        if at[1] not in HANDED_ON:
            words.setdefault(own, defaultdict(set))[at[0]].add(own.words[at])
        left += [(own, other) for other in own.made_of(at)]
    return list(words.items())


def positions(tokens: Any, n_tokens: int) -> list[int]:
    """Places of tokens, CLS first."""
    if tokens == "all":
        return list(range(n_tokens))
    return [0] if tokens == "cls" else [0 if token == "cls" else 1 + token for token in tokens]


@pytest.mark.parametrize("seed", range(16))
def test_no_pair_is_computed_that_need_not_be(seed: int) -> None:
    world = repeating()
    draw = random.Random(seed)
    documents = drawn(draw, N_LAYERS)
    floor = needed(world, documents, N_LAYERS)
    runs = [Run.model_validate(document) for document in documents]
    whole = vmi.plan(world.vit, runs, world.columns)
    assert whole.block_evaluations == floor < whole.naive_block_evaluations
    with Counted(world.module) as count:
        results = world.execute(documents)
    assert count.total == floor
    world.check(documents, results, effect=None)
    # In chunks what is computed more is said, and what is said is what is computed.
    memory = world.memory(documents, 2, 3)
    cut = vmi.plan(world.vit, runs, world.columns, batch_size=3, memory=memory)
    with Counted(world.module) as count:
        results = world.execute(documents, batch_size=3, memory=memory)
    world.check(documents, results, effect=None)
    assert count.total == cut.block_evaluations >= floor
    assert cut.chunk in (1, 2, 3)
    if cut.block_evaluations > floor:
        assert "images that occur in several chunks pass through the model" in str(cut)


def swap(site: str, tokens: Any, source: str = "source") -> Document:
    return {"op": "interchange", "site": f"blocks.{site}", "tokens": tokens, "source": source}


TWO_RUNS = {
    "a token restored behind attention is the base's again": (
        [swap("0.resid_pre", [1])],
        [swap("0.attn.z", ["cls", 2], "base")],
    ),
    "restored where another run's queries are": ([swap("0.attn.q", [2, 3])], [swap("0.attn.z", ["cls", 2], "base")]),
    "tokens of one image, behind others that attention mixes": (
        [swap("0.resid_pre", [3, 1]), swap("0.mlp.post", [2, 3]), swap("0.resid_post", ["cls", 2])],
        [swap("1.attn_out", ["cls", 2])],
    ),
    "made later in both, or in neither": (
        [swap("0.resid_mid", "cls"), swap("1.resid_mid", ["cls", 2], "base"), swap("0.attn.z", [1])],
        [swap("1.mlp_out", "all")],
    ),
    "queries reach their own tokens alone": ([swap("0.attn.q", [3, 1])], [swap("1.resid_pre", ["cls", 2], "base")]),
}
"""By what is to be seen: what two runs begin with, and what the second one makes besides."""


@pytest.mark.parametrize("name", TWO_RUNS)
def test_what_two_runs_have_in_common_is_computed_once(name: str) -> None:
    world, (begun, more) = world_of(TIMM_PLAIN, 2), TWO_RUNS[name]
    one, other = {"name": "one", "interventions": begun}, {"name": "other", "interventions": [*begun, *more]}
    for documents in ([one, other], [other]):
        assert counted(world, documents) == needed(world, documents, N_LAYERS)


def counted(world: World, documents: list[Document]) -> int:
    """Block calls of an experiment, row by row; what comes out is what the oracle says."""
    world.vit.sites()
    with Counted(world.module) as count:
        results = world.execute(documents)
    world.check(documents, results)
    return count.total


def test_a_base_that_is_put_back_first_is_the_base() -> None:
    world, capture = world_of(TIMM_PLAIN, 2), ["blocks.1.attn.q"]
    edits = [swap("0.attn.z", ["cls", 2], "base"), swap("2.resid_post", "cls")]
    documents: list[Document] = [{"name": "r", "interventions": edits, "capture": capture}]
    assert counted(world, documents) == needed(world, documents, N_LAYERS)


@pytest.mark.parametrize("site", SITES)
def test_what_one_run_captures_costs_no_pair_that_need_not_be(site: str) -> None:
    """One intervention in the middle block, and one capture anywhere, with and without the output."""
    world = world_of(TIMM_PLAIN, 2)
    for tokens, layer, captured in product(([1], "cls", "all"), range(N_LAYERS), SITES):
        edit = {"op": "interchange", "site": f"blocks.1.{site}", "source": "source", "tokens": tokens}
        for output in (True, False):
            document = {"name": "r", "interventions": [edit], "capture": [f"blocks.{layer}.{captured}"], "output": output}
            found = vmi.plan(world.vit, Run.model_validate(document), world.columns)
            assert found.block_evaluations == needed(world, [document], N_LAYERS), document
