"""Heads chosen for their roles, and where they attend in one image, by loops over a native attention matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.text import Annotation

import vit_mechinterp as vmi
from tests.oracles import by_hand
from tests.tiny_models import HF_DINOV2, TIMM_PLAIN, Tiny
from vit_mechinterp.circuits.attention_roles import within_object
from vit_mechinterp.circuits.attention_walkthrough import attention_walkthrough
from vit_mechinterp.errors import DataError, SpecError
from vit_mechinterp.figures.links import Links, attention_links

BOXES = {
    "box_1": [0, 16, 16, 32], "box_2": [16, 16, 32, 32], "display_box_1": [0, 0, 8, 8], "display_box_2": [8, 0, 16, 8],
}  # fmt: skip


def columns_of(tiny: Tiny, n: int = 4, display: bool = True) -> dict:
    boxes = {name: [box] * n for name, box in BOXES.items() if display or "display" not in name}
    return {"base": tiny.images(n), **boxes}


@torch.no_grad()
def patterns(tiny: Tiny, columns: dict) -> np.ndarray:
    """[layer, image, head, query, key]"""
    found = {}

    def keep(site: str, value: torch.Tensor) -> torch.Tensor:
        found[site] = value
        return value

    by_hand(tiny.module(), columns["base"], keep)
    return torch.stack([found[f"blocks.{layer}.attn.pattern"] for layer in range(3)]).double().numpy()


def tokens_of(tiny: Tiny, name: str) -> list[int]:
    x0, y0, x1, y1 = (edge // 8 for edge in BOXES[name])
    return [len(tiny.prefix) + 4 * row + column for row in range(y0, y1) for column in range(x0, x1)]


def measures(tiny: Tiny, a: np.ndarray) -> dict[str, list[float]]:
    """Every role's measure of one pattern, for each candidate."""
    o1, o2, d1, d2 = (tokens_of(tiny, name) for name in BOXES)
    background = [t for t in range(len(tiny.prefix), tiny.n_tokens) if t not in o1 + o2 + d1 + d2]

    def r(x: list[int], y: list[int]) -> float:
        return a[np.ix_(x, y)].sum() / len(x)

    def one(o: list[int]) -> float:
        return float(np.mean([max(a[q, k] for k in o if k != q) for q in o]))

    def whole(o: list[int]) -> float:
        values = []
        for q in o:
            p = a[q, o] / a[q, o].sum()
            values.append(a[q, o].sum() * np.exp(-(p * np.log(p)).sum()) / len(o))
        return float(np.mean(values))

    roles = {
        "one token of the object": [one(o1), one(o2)], "whole object": [whole(o1), whole(o2)],
        "between objects": [r(o1, o2), r(o2, o1)], "between pairs": [r(o1 + o2, d1 + d2), r(d1 + d2, o1 + o2)],
        "background": [r(o1, background), r(o2, background)],
    }  # fmt: skip
    registers = [n for n, name in enumerate(tiny.prefix) if name == "registers"]
    return roles | ({"registers": [r(o1, registers), r(o2, registers)]} if registers else {})


@pytest.mark.parametrize("tiny", [TIMM_PLAIN, HF_DINOV2], ids=lambda tiny: tiny.name)
def test_heads_are_chosen_by_loops_over_the_attention_matrix(tiny: Tiny) -> None:
    columns = columns_of(tiny)
    all_patterns = patterns(tiny, columns)
    found = {index: measures(tiny, all_patterns[index]) for index in np.ndindex(all_patterns.shape[:3])}
    result = attention_walkthrough(vmi.wrap(tiny.module()), columns, index=2, progress=False)
    table = result.table.set_index("role")
    assert list(table.index) == list(found[0, 0, 0])
    taken: list[tuple[int, int]] = []
    for role, row in table.iterrows():
        means = {
            (layer, head): np.mean([max(found[layer, image, head][role]) for image in range(4)])
            for layer, head in np.ndindex(3, tiny.n_heads)
            if (layer, head) not in taken
        }
        best = max(means, key=means.__getitem__)
        assert (row["layer"], row["head"]) == best
        assert np.isclose(row["score"], means[best], atol=1e-5)
        taken.append(best)
        larger = int(np.argmax(found[best[0], 2, best[1]][role]))
        names = ("sample pair", "display pair") if role == "between pairs" else ("object 1", "object 2")
        assert row["queries"] == names[larger]
    assert np.ptp(table["score"]) > 0.05
    goes = [column for column in table if column not in ("layer", "head", "score", "queries", "image")]
    assert goes == ["own", "objects", "background", "CLS"] + (["registers"] if tiny is HF_DINOV2 else [])
    np.testing.assert_allclose(table[goes].sum(axis=1), 1, atol=1e-5)
    across = table.loc["between pairs"]
    both = tokens_of(tiny, "box_1") + tokens_of(tiny, "box_2")
    other = tokens_of(tiny, "display_box_1") + tokens_of(tiny, "display_box_2")
    queries, keys = (both, other) if across["queries"] == "sample pair" else (other, both)
    a = all_patterns[across["layer"], 2, across["head"]]
    assert np.isclose(across["objects"], a[np.ix_(queries, keys)].sum() / len(queries), atol=1e-5)
    assert np.isclose(across["own"], a[np.ix_(queries, queries)].sum() / len(queries), atol=1e-5)
    assert (table["image"] == 2).all()
    assert result.captions["walkthrough"].startswith("Image 2.")


def test_even_and_lone_attention_are_told_apart() -> None:
    even = torch.full((4, 4), 0.2)
    assert torch.allclose(within_object(even), torch.tensor([0.2, 0.8]))
    lone = 0.8 * torch.eye(4).roll(1, dims=1)
    assert torch.allclose(within_object(lone), torch.tensor([0.8, 0.2]))
    assert torch.allclose(within_object(0.8 * torch.eye(4)), torch.tensor([0.0, 0.2]))
    assert torch.allclose(within_object(torch.tensor([[0.3]])), torch.tensor([0.0, 0.3]))


def test_given_heads_are_named_by_where_they_attend_most() -> None:
    columns = columns_of(TIMM_PLAIN, display=False)
    vit = vmi.wrap(TIMM_PLAIN.module())
    result = attention_walkthrough(vit, columns, heads={"mine": (2, 1), "yours": (0, 0)}, progress=False)
    assert list(zip(result.table["layer"], result.table["head"], strict=True)) == [(2, 1), (0, 0)]
    a = patterns(TIMM_PLAIN, columns)[2, :, 1]
    o1, o2 = (tokens_of(TIMM_PLAIN, name) for name in ("box_1", "box_2"))
    rest = [t for t in range(1, 17) if t not in o1 + o2]
    sets = {"within object": (o1, o2), "between objects": (o2, o1), "background": (rest, rest), "CLS": ([0], [0])}
    means = {
        role: np.mean([max(image[np.ix_(o, to)].sum() / 4 for o, to in zip((o1, o2), both, strict=True)) for image in a])
        for role, both in sets.items()
    }
    best = max(means, key=means.__getitem__)
    assert result.table["role"][0] == f"mine: {best}"
    assert np.isclose(result.table["score"][0], means[best], atol=1e-5)
    numbered = attention_walkthrough(vit, columns, heads=[(2, 1)], progress=False)
    assert numbered.table["role"][0] == f"1: {best}"
    assert "The heads were given" in numbered.captions["walkthrough"]


def test_the_figure_draws_the_strongest_links_of_every_token() -> None:
    columns = columns_of(TIMM_PLAIN)
    result = attention_walkthrough(vmi.wrap(TIMM_PLAIN.module()), columns, heads=[(1, 0)], progress=False)
    image, panel = result.figures()["walkthrough"].axes
    assert len(image.patches) == len(panel.patches) == 4
    names = {"object 1": ["box_1"], "object 2": ["box_2"], "sample pair": ["box_1", "box_2"], "display pair": ["display_box_1", "display_box_2"]}
    queries = [token for name in names[result.table["queries"][0]] for token in tokens_of(TIMM_PLAIN, name)]
    a = patterns(TIMM_PLAIN, columns)[1, 0, 0]
    expected = set()
    for query in sorted(queries):
        strongest = sorted(range(1, 17), key=lambda key: -a[query, key])[:3]
        expected |= {(query, key) for key in strongest if a[query, key] >= 0.05 and key != query}

    def token(x: float, y: float) -> int:
        return 1 + 4 * int((y + 0.5) // 8) + int((x + 0.5) // 8)

    drawn = {(token(*note.xyann), token(*note.xy)) for note in panel.texts if isinstance(note, Annotation)}
    assert drawn == expected
    assert len(expected) > 2
    assert panel.get_xlabel().startswith(f"1: {result.table['role'][0].removeprefix('1: ')}\nlayer 1, head 0")


def test_bad_input_is_named() -> None:
    from PIL import Image

    vit, columns = vmi.wrap(TIMM_PLAIN.module()), columns_of(TIMM_PLAIN)
    for heads, said in (([1, 2], r"heads, '1': 1 is no head; name heads as \(layer, head\)"), ([(3, 0)], r"heads, '1': \(3, 0\) is no \(layer, head\) of this model; layers are 0 to 2, heads 0 to 2"), ([], "heads is empty")):
        with pytest.raises(SpecError, match=said):
            attention_walkthrough(vit, columns, heads=heads)
    with pytest.raises(SpecError, match="example=4 is out of range; there are 4 images"):
        attention_walkthrough(vit, columns, index=4)
    with pytest.raises(DataError, match="attention_walkthrough needs to know where an object is"):
        attention_walkthrough(vit, {"base": columns["base"]})
    with pytest.raises(DataError, match="at least one panel"):
        attention_links(Image.new("RGB", (32, 32)), {})
    with pytest.raises(DataError, match=r"'a' must have attention \[query, row, column\], not negative, for its 2 tokens"):
        attention_links(Image.new("RGB", (32, 32)), {"a": Links(np.ones((1, 4, 4)), [0, 1])})
