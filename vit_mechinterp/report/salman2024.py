"""Salman, Shams and Liu (2024), Intriguing equivalence structures of the embedding space of vision
transformers, at the scale of minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.reproduction import Asked, Reproduction

if TYPE_CHECKING:
    from PIL.Image import Image

    from vit_mechinterp.model.hooked import HookedViT

__all__ = ["REPRODUCTION"]

_MATCHING, _PHOTOS = "embedding_matching", "embedding_matching_photographs"
_LIPSCHITZ, _WALKS = "local_lipschitz", "equivalence_walks"

_SIZES: Final[dict[str, dict[str, Any]]] = {
    "tiny": {"pairs": 4, "max_steps": 200, "images": 3, "directions": 2, "sites": 3},
    "small": {"pairs": 16, "max_steps": 600, "images": 12, "directions": 4, "sites": 6},
}


def _run(asked: Asked) -> Iterator[CircuitResult]:
    from vit_mechinterp.circuits.embedding_matching import embedding_matching
    from vit_mechinterp.circuits.equivalence_walks import equivalence_walks
    from vit_mechinterp.circuits.local_lipschitz import local_lipschitz
    from vit_mechinterp.model import load
    from vit_mechinterp.stimuli import discrimination

    sizes = _SIZES[asked.scale]
    name = asked.model or "vmi/discrimination-disentangled"
    vit = load(name)
    n = max(2 * sizes["pairs"], sizes["images"])
    rows = discrimination("test_iid", n=4 * n, canvas=128, progress=False)
    if asked.wants(_MATCHING, _WALKS):
        matching = embedding_matching(
            vit, _opposites(rows, sizes["pairs"]), max_steps=sizes["max_steps"], progress=asked.progress
        )
        yield replace(
            matching, title="Matched stimuli", description=f"{matching.description} {_met(matching)}"
        )
    if asked.wants(_PHOTOS):
        found = embedding_matching(
            vit, _photographs(), max_steps=sizes["max_steps"], progress=asked.progress
        )
        about = (
            "These are crops of the two photographs that scikit-learn ships."
            if asked.model
            else "These are crops of the two photographs that scikit-learn ships. The model has seen no "
            "photographs: its answers mean nothing here, but its embedding is a function of photographs like "
            "any other. Their embeddings are alike from the start, so the distance says more than the cosine."
        )
        yield replace(
            found, name=_PHOTOS, title="Matched photographs",
            description=f"{found.description} {_met(found)}\n\n{about}",
        )
    if asked.wants(_LIPSCHITZ):
        yield local_lipschitz(
            vit,
            rows.select(range(sizes["images"])),
            **_sites(vit, sizes["sites"]),
            n_directions=sizes["directions"],
            progress=asked.progress,
        )
    if asked.wants(_WALKS):
        walks = equivalence_walks(vit, matching, n_directions=sizes["directions"], progress=asked.progress)
        yield replace(walks, description=f"{walks.description}\n\n{_straightness(matching, walks)}")


def _straightness(matching: CircuitResult, walks: CircuitResult) -> str:
    """What the lines say, and of how many pairs."""
    said = _met(matching)
    departure = walks.summary.get("largest departure, match to target")
    if isinstance(departure, float):
        said += f" From match to target the embedding departs by up to {departure:.2f} of its own length"
        said += " (mean of the pairs' largest)"
        said += (
            ": these straight lines do not stay in one equivalence set."
            if departure > 0.1
            else ": these straight lines nearly stay in one equivalence set."
        )
    return said


def _met(matching: CircuitResult) -> str:
    """How many pairs met the stopping rule, and how near the others came."""
    last = matching.table[matching.table["final"]]
    start = matching.table[matching.table["step"] == 0].set_index("pair")["squared_distance"]
    share = last.set_index("pair")["squared_distance"] / start
    met = int(last["matched"].sum())
    said = f"{met} of {len(last)} pairs met the stopping rule within the steps"
    if met < len(last):
        left = float(share[~last.set_index("pair")["matched"]].max()) ** 0.5
        said += f"; the others end near their target's embedding, at most {left:.0%} of the way off"
    return said + "."


def _opposites(rows: Any, n: int) -> dict[str, list[Any]]:
    """Pairs of stimuli of opposite classes; the last two share their target."""
    labels = list(rows["label"])
    images = {
        label: [rows[i]["base"] for i, own in enumerate(labels) if own == label][:n] for label in (0, 1)
    }
    bases = [images[number % 2][number // 2] for number in range(n)]
    targets = [images[1 - number % 2][n - 1 - number // 2] for number in range(n)]
    if n >= 3:
        targets[-1] = targets[-3]
    return {"base": bases, "source": targets}


def _photographs() -> list[tuple[Image, Image]]:
    """Pairs of square crops: either photograph to the other, and two places of one."""
    from vit_mechinterp.circuits.images import sample_photographs

    crops: dict[tuple[str, str], Image] = {}
    for name, photograph in sample_photographs().items():
        width, height = photograph.size
        side = min(width, height)
        for place, left in (("left", 0), ("right", width - side)):
            crops[name, place] = photograph.crop((left, 0, left + side, side)).resize((256, 256))
    return [
        (crops["china", "left"], crops["flower", "left"]),
        (crops["flower", "right"], crops["china", "right"]),
        (crops["china", "left"], crops["china", "right"]),
    ]


def _sites(vit: HookedViT, n: int) -> dict[str, Any]:
    """The class token after blocks of rising depth, the last included; the model's own embedding without one.

    All tokens together have so many dimensions that hardly a direction leaves them alone.
    """
    if "cls" not in vit.layout.tokens.prefix:
        return {}
    last = vit.layout.n_layers - 1
    layers = sorted({round(k * last / max(n - 1, 1)) for k in range(n)})
    return {"sites": [f"blocks.{layer}.resid_post" for layer in layers], "tokens": "cls"}


REPRODUCTION = Reproduction(
    title="Which images does a vision transformer take for the same?",
    introduction=(
        "After Salman, Shams and Liu, Intriguing equivalence structures of the embedding space of vision "
        "transformers (2024). An image is changed by gradient descent until its embedding is that of another "
        "image; directions in which the embedding moves fast, and such in which it does not move, are found "
        "with products of its Jacobian; and walks along them tell how far each of them holds.\n\nWhat is "
        "known of the paper here is its abstract and accounts of others: the objective of the matching and "
        "gradient descent are the paper's. Step sizes, stopping rules, the Lipschitz estimator, its "
        "directions and scales, and the walks are this project's own, and nothing on this page is a number "
        "of the paper's. The model is small and was trained on stimuli; another can be named."
    ),
    figures={
        "matched_pairs": (_MATCHING, "pairs"),
        "trajectories": (_MATCHING, "trajectories"),
        "matched_photographs": (_PHOTOS, "pairs"),
        "trajectories_photographs": (_PHOTOS, "trajectories"),
        "lipschitz_by_direction": (_LIPSCHITZ, "lipschitz"),
        "lipschitz_by_layer": (_LIPSCHITZ, "layers"),
        "spectra": (_LIPSCHITZ, "spectra"),
        "walks": (_WALKS, "drift"),
        "reach": (_WALKS, "reach"),
        "lines": (_WALKS, "lines"),
    },
    run=_run,
)
