"""Features of a dictionary in use: how often they act, on which images, and what the model loses without
them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from vit_mechinterp.circuits.cells import BatchSize, compared, grouped, measure
from vit_mechinterp.circuits.dictionary import Dictionary
from vit_mechinterp.circuits.dictionary_files import load_dictionary
from vit_mechinterp.circuits.effects import effect_columns, strongest
from vit_mechinterp.circuits.images import image_column, model_view
from vit_mechinterp.circuits.kept_readings import KeptReadings, in_batches
from vit_mechinterp.circuits.metrics import MetricLike
from vit_mechinterp.circuits.reading import reading_data
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.circuits.statistics import check_resampling
from vit_mechinterp.engine.binding.positions import resolve_tokens
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.model.layout import TokenLayout
from vit_mechinterp.spec import Run
from vit_mechinterp.spec.tokens import parse_tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from PIL.Image import Image

__all__ = ["sparse_autoencoder"]

_AT_ONCE = 8
"""Images of a forward."""
_TOGETHER = 64
"""Images whose features are kept together: sums, and the few images where each is largest."""


def sparse_autoencoder(
    vit: HookedViT,
    images: Any,
    dictionary: Dictionary | str | Path,
    *,
    site: str,
    features: Sequence[int] | None = None,
    top: int = 6,
    top_images: int = 6,
    tokens: Any = "patches",
    set_to: float | None = None,
    add: float | None = None,
    metric: MetricLike | None = None,
    base: str = "base",
    resamples: int = 2000,
    seed: int = 0,
    folder: str | Path | None = None,
    batch_size: BatchSize = "auto",
    progress: bool = True,
) -> CircuitResult:
    """Read a dictionary's features on images, find those that excite each most, and ablate, set or raise
    them.

    Args:
        vit: the model.
        images: images, a folder, or data; see `image_column`.
        dictionary: a dictionary, or where `load_dictionary` finds one.
        site: the site it was made for.
        features: the features to look at; by default the ``top`` with the largest mean activation.
        top_images: images on a feature's contact sheet.
        tokens: the tokens that features are read and edited at.
        set_to: set features to this value, besides ablating them.
        add: add this much to features, besides.
        metric: what to measure; by default the lead of the predicted class.
        base: the image column.
        resamples, seed: of the bootstrap and the permutation test over images.
        folder: keeps what has been read and finished edits, so that the same call goes on where it was
            stopped.
        batch_size: most rows in one forward, or ``"auto"``.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per feature and ``edit`` (``ablate``, ``set``, ``add``): ``feature, mean_activation,
        max_activation, frequency`` (the share of tokens where it is not 0), and the columns of
        `effect_columns`. Control: ``reconstruction``, the summary's share of variance that the dictionary
        explains at the site; low values mean that it was made for something else.

    Raises:
        SpecError: the dictionary does not fit the site, or a feature is out of range.
        TensorFileError, DataError: the file holds no dictionary.
    """
    check_resampling(resamples, seed)
    if not isinstance(dictionary, Dictionary):
        dictionary = load_dictionary(dictionary)
    name = dictionary.check_site(vit, site)
    if features is not None:
        dictionary.check_features(features)
        if not features or len(set(features)) != len(features):
            raise SpecError(f"features names none, or one twice: {list(features)}.")
    data = image_column(images, vit, column=base)
    columns = reading_data(vit, data, base, progress=progress)
    chosen = resolve_tokens(parse_tokens(tokens), vit, columns, base, "features, tokens")
    how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    bound, origin, clean = compared(vit, data, metric, base=base, source=None, folder=folder, **how)
    read = _Read(dictionary, top_images)

    @torch.no_grad()
    def of(examples: list[int]) -> dict[str, torch.Tensor]:
        part = _Read(dictionary, top_images)
        for first in range(0, len(examples), _AT_ONCE):
            some = examples[first : first + _AT_ONCE]
            _, cache = vit.run(columns.images(base, some), capture=[name])
            for h, example in zip(cache[name].float(), some, strict=True):
                positions = chosen.of(example)
                part.add(h, example, None if positions is None else list(positions))
        return part.tensors()

    weights = {key: value for key, value in vars(dictionary).items() if key != "source"}
    decided = {"site": name, "at": [chosen.shared, chosen.each], "top": top_images, "dictionary": weights}
    with KeptReadings(folder, vit, columns, [base], reading="dictionary", **decided) as kept:
        for _, found in in_batches(
            vit, columns.n, of, kept, at_once=_TOGETHER, progress=progress, what="features"
        ):
            read.merge(found)
    numbers = list(features) if features is not None else read.largest(top)
    wanted: dict[str, tuple[Literal["set", "add"], float | None]] = {
        "ablate": ("set", 0.0),
        "set": ("set", set_to),
        "add": ("add", add),
    }
    edits = {edit: (method, float(value)) for edit, (method, value) in wanted.items() if value is not None}
    runs = [
        Run(
            name=f"{edit} {number}", base=base,
            interventions=[dictionary.edit(name, number, value=value, method=method, tokens=tokens)],
        )
        for edit, (method, value) in edits.items()
        for number in numbers
    ]  # fmt: skip
    measured = measure(
        vit, grouped(runs, columns.n, clean[0].numel()), data, bound, tensors=dictionary.tensors(),
        folder=folder, **how
    )
    effects = effect_columns(
        measured.stack([run.name for run in runs]), bound.clean, resamples=resamples, seed=seed
    )
    table = _table(read, numbers, list(edits), effects)
    sheets = {}
    for number in numbers:
        peaks = read.peaks(number)[:top_images]
        pictures = [model_view(vit, data, base, example) for example, _, _ in peaks]
        sheets[number] = list(zip(pictures, peaks, strict=True))
    most = strongest(table, "change")
    return CircuitResult(
        name="sparse_autoencoder",
        table=table,
        provenance=provenance(
            origin, *measured.provenances, metric=bound.description, site=name, tokens=str(tokens),
            dictionary=dictionary.source, seed=seed, resamples=resamples,
        ),
        summary={
            "images": columns.n,
            "features": dictionary.n_features,
            "variance explained": read.explained(),
            "features per token": read.density(),
            "largest change": f"{most['change']:+.3g} ({most['edit']}, feature {most['feature']})",
        },
        description=f"{_DESCRIPTION}\n\n{bound.description}",
        captions={
            "effects": f"Change of the {bound.label} when a feature is edited at {name}.",
            **{
                f"feature_{number}": f"The images that excite feature {number} most, and the patch where."
                for number in numbers
            },
        },
        draw=_drawing(sheets, vit.layout.tokens, bound.label),
    )  # fmt: skip


class _Read:
    """What was read of every feature: sums over tokens, and the images where it is largest.

    Args:
        dictionary: the dictionary.
        most: images to remember of each feature.
    """

    def __init__(self, dictionary: Dictionary, most: int) -> None:
        self.dictionary, self.most = dictionary, max(1, most)
        n, wide = dictionary.n_features, torch.float64
        self.total, self.active = torch.zeros(n, dtype=wide), torch.zeros(n, dtype=wide)
        # Rows are images, the one with the largest activation first, and of equal ones the earlier.
        self.largest_by_image = torch.zeros(0, n)
        self.images, self.places = torch.zeros(0, n, dtype=torch.int32), torch.zeros(0, n, dtype=torch.int32)
        self.n_tokens = torch.zeros(1, dtype=wide)
        self.off, self.squares = torch.zeros(1, dtype=wide), torch.zeros(1, dtype=wide)
        self.sums = torch.zeros(dictionary.width, dtype=wide)

    def add(self, h: torch.Tensor, image: int, positions: list[int] | None) -> None:
        """Read one image's activations ``[token, d]`` at some positions."""
        at = torch.arange(len(h)) if positions is None else torch.tensor(positions)
        h = h[at.to(h.device)]
        found = self.dictionary.encode(h)
        rebuilt = self.dictionary.rebuild(h)
        self.total += found.double().sum(0).cpu()
        self.active += (found > 0).double().sum(0).cpu()
        self.n_tokens += len(h)
        self.off += (h - rebuilt).double().square().sum().cpu()
        self.sums += h.double().sum(0).cpu()
        self.squares += h.double().square().sum().cpu()
        peak = found.max(dim=0)
        places = at[peak.indices.cpu()].int()
        self._rank(peak.values.cpu()[None], torch.full_like(places, image)[None], places[None])

    def _rank(self, values: torch.Tensor, images: torch.Tensor, places: torch.Tensor) -> None:
        """Remember further images if they are among those with the largest activations."""
        values = torch.cat([self.largest_by_image, values])
        order = values.argsort(dim=0, descending=True, stable=True)[: self.most]
        self.largest_by_image = values.gather(0, order)
        self.images = torch.cat([self.images, images]).gather(0, order)
        self.places = torch.cat([self.places, places]).gather(0, order)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything by name, as `merge` takes it."""
        return {name: getattr(self, name) for name in (*_SUMS, *_RANKED)}

    def merge(self, found: Mapping[str, torch.Tensor]) -> None:
        """Add what was read of later images."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + found[name])
        self._rank(*(found[name] for name in _RANKED))

    def largest(self, n: int) -> list[int]:
        """The features with the largest mean."""
        return [int(number) for number in self.total.topk(min(n, len(self.total))).indices]

    def peaks(self, feature: int) -> list[tuple[int, float, int]]:
        """(image, activation, position) where the feature is largest, the largest first."""
        columns = (self.images[:, feature], self.largest_by_image[:, feature], self.places[:, feature])
        images, values, places = (column.tolist() for column in columns)
        return list(zip(images, values, places, strict=True))

    def mean(self, feature: int) -> float:
        """Mean activation over tokens."""
        return float(self.total[feature] / self.n_tokens)

    def frequency(self, feature: int) -> float:
        """Share of tokens where the feature is active."""
        return float(self.active[feature] / self.n_tokens)

    def explained(self) -> float:
        """Share of the activations' variance that the dictionary rebuilds."""
        variance = float(self.squares - self.sums.square().sum() / self.n_tokens)
        return 1 - float(self.off) / variance if variance > 0 else float("nan")

    def density(self) -> float:
        """Mean number of active features per token."""
        return float(self.active.sum() / self.n_tokens)


_SUMS = ("total", "active", "n_tokens", "off", "squares", "sums")
_RANKED = ("largest_by_image", "images", "places")


def _table(
    read: _Read, numbers: Sequence[int], edits: Sequence[str], effects: dict[str, Any]
) -> pd.DataFrame:
    import pandas as pd

    rows = [
        {
            "edit": edit,
            "feature": number,
            "mean_activation": read.mean(number),
            "max_activation": read.peaks(number)[0][1],
            "frequency": read.frequency(number),
        }
        for edit in edits
        for number in numbers
    ]
    return pd.DataFrame(rows).assign(**effects)


_DESCRIPTION = (
    "A dictionary's features are read at one site. An edit moves the activation along the feature's "
    "direction "
    "until the feature has its new value, 0 if it is ablated; what the dictionary does not rebuild stays as "
    "it is."
)


def _drawing(
    sheets: dict[int, list[tuple[Image, tuple[int, float, int]]]], layout: TokenLayout, label: str
) -> Callable[[CircuitResult], dict[str, Figure]]:
    def draw(result: CircuitResult) -> dict[str, Figure]:
        from vit_mechinterp.figures import contact_sheet, dots_by_row, round_up

        table = result.table
        groups = {}
        for edit, rows in table.groupby("edit", sort=False):
            ends = rows[["change", "change_low", "change_high"]].to_numpy(dtype=float)
            ends = np.where(np.isfinite(ends), ends, ends[:, :1])
            groups[str(edit)] = {
                f"feature {number}": (float(a), float(b), float(c))
                for number, (a, b, c) in zip(rows["feature"], ends, strict=True)
            }
        reach = round_up(max(abs(v) for own in groups.values() for ends in own.values() for v in ends))
        figures = {"effects": dots_by_row(groups, label=f"change of {label}", limits=(-reach, reach))}
        for number, shown in sheets.items():
            figures[f"feature_{number}"] = contact_sheet(
                [image for image, _ in shown],
                boxes=[_box(place, image, layout) for image, (_, _, place) in shown],
                captions=[f"{value:.2f}" for _, (_, value, _) in shown],
                columns=6,
                title=f"feature {number}",
            )
        return figures

    return draw


def _box(position: int, image: Image, layout: TokenLayout) -> dict[str, tuple[float, float, float, float]]:
    patch = position - len(layout.prefix)
    rows, columns = layout.grid[-2:]
    if not 0 <= patch < rows * columns:
        return {}
    row, column = divmod(patch, columns)
    high, wide = image.height / rows, image.width / columns
    return {"largest here": (column * wide, row * high, (column + 1) * wide, (row + 1) * high)}
