"""Figures of a logit lens: layers, and what is read off every patch, as probabilities and as words."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vit_mechinterp.circuits.attribution_figures import patch_grid, patch_words
from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.model.layout import TokenLayout

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["captions_of", "drawing"]


def captions_of(n: int, patches: bool, shown: str) -> dict[str, str]:
    mean = "One image" if n == 1 else f"Mean over {n} images"
    captions = {"layers": f"The answer's probability, and agreement with the model, layer by layer. {mean}."}
    if patches:
        captions["patches"] = f"Probability of {shown!r} that is read from every patch alone. One image."
        captions["words"] = (
            "The class that is read from every patch alone, the stronger coloured the likelier. One image."
        )
    return captions


def drawing(
    pictures: dict[str, Image], layout: TokenLayout, shown: str, n_classes: int
) -> Callable[[CircuitResult], dict[str, Figure]]:
    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import Curve, curves, position_maps, round_up
        from vit_mechinterp.figures.words import word_maps

        table = result.table
        image = table[table["kind"] == "image"]
        lines = {}
        for name, what in {"probability": "answer's probability", "agreement": "same prediction"}.items():
            rows = image[image["quantity"] == name]
            ends = rows[["value_low", "value_high"]].to_numpy(dtype=float)
            low, high = ([], []) if bool((ends != ends).any()) else ends.T.tolist()
            lines[what] = Curve(rows["layer"].tolist(), rows["value"].tolist(), low, high)
        figures = {}
        figures["layers"] = curves(lines, x_label="read after layer", label="share")
        tokens = table[(table["kind"] == "token") & (table["quantity"] == "probability")]
        if len(tokens):
            maps = {}
            for layer, rows in tokens.groupby("layer"):
                values = rows.set_index("token")["value"].reindex(range(layout.n_tokens))
                maps[f"layer {layer}"] = patch_grid(values.to_numpy(dtype=float), layout)
            # The middle of the colours is chance, and they end where values do: of a thousand classes, one
            # that stands out may still be far from certain.
            chance = 1 / n_classes
            reach = min(round_up(max(float(tokens["value"].max()) - chance, chance)), 1 - chance)
            limits, label = (chance - reach, chance + reach), f"probability of {shown}"
            figures["patches"] = position_maps(pictures, maps, limits=limits, least=0.0, label=label)
            words, strengths = {}, {}
            for layer, rows in tokens.groupby("layer"):
                read = rows.set_index("token").reindex(range(layout.n_tokens))
                certain = read["top_probability"].to_numpy(dtype=float)
                strengths[f"layer {layer}"] = patch_grid(certain, layout)
                words[f"layer {layer}"] = patch_words(read["top"].tolist(), layout)
            figures["words"] = word_maps(next(iter(pictures.values())), words, strengths)
        return figures

    return draw
