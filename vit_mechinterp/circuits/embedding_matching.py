"""Embedding matching: change an image, little, until its embedding is that of quite another image (Salman,
Shams and Liu 2024).

From an image x, gradient descent on the input makes ``|f(x) - f(target)|^2`` small, f being the activation at
any site. Whole sets of visibly different images share an embedding: their equivalence sets. The objective
``1/2 |f(x) - f(t)|^2`` and plain gradient descent are the paper's; the authors' later code minimises the mean
over dimensions and keeps the input within the range of the base's values. Step sizes and stopping rules of
the paper are not known, those here are this project's own.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.embeddings import Embedding
from vit_mechinterp.circuits.images import image_pairs
from vit_mechinterp.circuits.matching_descent import Rule, descend, limits_of
from vit_mechinterp.circuits.pixels import PixelScale
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.engine.inputs.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["embedding_matching"]

_AMPLIFIED = 10
"""How much figures enlarge the difference between an image and what it became."""


def embedding_matching(
    vit: HookedViT,
    images: Any,
    *,
    site: str | None = None,
    tokens: Tokens = "all",
    loss: Literal["half_squared", "mean_squared"] = "half_squared",
    step_size: float | Literal["adaptive"] = "adaptive",
    max_steps: int = 300,
    stop_distance: float | None = None,
    stop_cosine: float = 0.97,
    value_range: tuple[float, float] | Literal["base"] | None = "base",
    bound: float | None = None,
    base: str = "base",
    target: str = "source",
    record_every: int = 5,
    batch_size: int = 16,
    progress: bool = True,
) -> CircuitResult:
    """Match the embeddings of pairs of images by gradient descent on the first.

    Args:
        vit: the model; its weights stay as they are.
        images: pairs, in any form that `image_pairs` takes: the image to change, and the one to match.
        site: where the embedding is read; by default ``pooled``, else ``ln_final``, else the last block's
            output.
        tokens: token names or patch indices at a site with tokens.
        loss: ``1/2 |f(x) - f(t)|^2``, or its mean over dimensions, which scales the step alone.
        step_size: of plain gradient descent, in units of the model's input; or ``"adaptive"``: a step of
            every pair's own, fitted to how the gradient changed over the last one (Barzilai and Borwein
            1988), and taken back and halved where it leads above the last five losses.
        max_steps: gives up after that many.
        stop_distance: a pair is done when its squared distance is below this and its cosine above
            ``stop_cosine``; by default a thousandth of its squared distance at the start.
        stop_cosine: see ``stop_distance``.
        value_range: lowest and highest value of the input; ``"base"`` for those of each base image; None for
            no limit.
        bound: largest change of any value of the input; None for no limit.
        base, target: the image columns.
        record_every: steps between rows of the table.
        batch_size: pairs that descend together; each stops on its own.
        progress: show a bar if it takes longer than two seconds.

    Returns:
        Table, one row per pair and recorded step: ``squared_distance`` and ``cosine`` to the target's
        embedding, ``max_change`` (largest change of a pixel, black to white is 1), ``psnr`` in decibels
        against the base, ``prediction`` of the classifier, ``final``, and the predictions for base and
        target. Tensors: ``base``, ``target``, ``matched``. Figures: ``pairs``, ``trajectories``.

    The images are kept in float32 and rounded to the model's precision in every forward, so that small steps
    are not lost in a model in half precision; its embeddings are as coarse as ever, and a match ends there.

    Raises:
        SpecError: no such site, or a setting out of range; DataError: the images are no pairs.
    """
    import pandas as pd

    _check(step_size, max_steps, bound, value_range)
    _check_rule(loss, stop_distance, stop_cosine, record_every, batch_size)
    embedding = Embedding.of(vit, site, tokens)
    rule = Rule(loss, None if step_size == "adaptive" else step_size, stop_distance, stop_cosine)
    data = Data(image_pairs(images, vit, base=base, source=target), vit)
    rows: list[dict[str, Any]] = []
    tensors: dict[str, list[Tensor]] = {"base": [], "target": [], "matched": []}
    total = data.n * max_steps
    with tqdm(total=total, desc="matching", unit="step", delay=2, disable=not progress) as bar:
        for first in range(0, data.n, batch_size):
            examples = range(first, min(first + batch_size, data.n))
            x, t = data.images(base, examples).float(), data.images(target, examples).float()
            limits = limits_of(x, value_range, bound)
            matched, own = descend(vit, embedding, x, t, limits, rule, max_steps, record_every, bar)
            rows += [row | {"pair": first + row["pair"]} for row in own]
            for name, images_of in (("base", x), ("target", t), ("matched", matched)):
                tensors[name].append(images_of.cpu())
    table = pd.DataFrame(rows).sort_values(["pair", "step"], kind="stable").reset_index(drop=True)
    last = table[table["final"]]
    joined = {name: torch.cat(parts) for name, parts in tensors.items()}
    return CircuitResult(
        name="embedding_matching",
        table=table,
        tensors=joined,
        provenance=provenance(
            {"model_fingerprint": vit.fingerprint()},
            site=str(embedding),
            loss=loss,
            step_size=step_size,
            max_steps=max_steps,
            stop_distance=stop_distance,
            stop_cosine=stop_cosine,
            value_range=value_range,
            bound=bound,
            dtype=str(vit.dtype),
        ),
        summary={
            "pairs": len(last),
            "matched": int(last["matched"].sum()),
            "mean cosine before": float(table[table["step"] == 0]["cosine"].mean()),
            "mean cosine after": float(last["cosine"].mean()),
            "mean PSNR (dB)": float(last["psnr"].mean()),
            "answers as for the target": float((last["prediction"] == last["target_prediction"]).mean()),
        },
        description=(
            f"Each image was changed by gradient descent until its embedding at {embedding} came close to "
            "that of another image. Where it did, the model cannot tell the two apart from there on, however "
            "different they look."
        ),
        captions={
            "pairs": f"Image, target, what the image became, and the change, {_AMPLIFIED} times enlarged "
            "(grey is no change); below, the cosine of both embeddings and the peak signal-to-noise ratio of "
            "the change."
            + (" Of a video, the first frame." if len(vit.layout.tokens.input_shape) == 4 else ""),
            "trajectories": "Squared distance to the target's embedding (share of the first), and cosine; a "
            "line per pair. A dot is where a pair stopped.",
        },
        draw=partial(_draw, scale=PixelScale.of(vit, joined["base"])),
    )


def _check(step_size: Any, max_steps: int, bound: float | None, value_range: Any) -> None:
    if step_size != "adaptive" and not (isinstance(step_size, (int, float)) and step_size > 0):
        raise SpecError(f"step_size is 'adaptive' or a positive number, got {step_size!r}.")
    if max_steps < 1:
        raise SpecError(f"max_steps={max_steps}: make at least one step.")
    if bound is not None and not bound > 0:
        raise SpecError(f"bound={bound}: the largest change is positive, or None for no limit.")
    if isinstance(value_range, tuple) and not value_range[0] < value_range[1]:
        raise SpecError(f"value_range={value_range}: the lowest value comes before the highest.")
    if not isinstance(value_range, tuple) and value_range not in ("base", None):
        raise SpecError(f"value_range is 'base', None or (lowest, highest), got {value_range!r}.")


def _check_rule(
    loss: str, stop_distance: float | None, stop_cosine: float, record_every: int, batch_size: int
) -> None:
    if loss not in ("half_squared", "mean_squared"):
        raise SpecError(f"loss={loss!r} is not known. Choose 'half_squared' or 'mean_squared'.")
    if stop_distance is not None and not stop_distance >= 0:
        raise SpecError(f"stop_distance={stop_distance}: a squared distance is not negative.")
    if not -1 <= stop_cosine <= 1:
        raise SpecError(f"stop_cosine={stop_cosine}: a cosine lies between -1 and 1.")
    if record_every < 1 or batch_size < 1:
        raise SpecError(f"record_every={record_every} and batch_size={batch_size} are at least 1.")


def _draw(result: CircuitResult, scale: PixelScale) -> dict[str, Figure]:
    from vit_mechinterp.figures.matching import matched_pairs, matching_trajectories

    last = result.table[result.table["final"]].set_index("pair")
    cells = []
    for pair in range(min(4, len(last))):
        base, target, matched = (result.tensors[name][pair] for name in ("base", "target", "matched"))
        if base.ndim == 4:
            base, target, matched = base[0], target[0], matched[0]
        change = 0.5 + _AMPLIFIED * scale.change(matched - base)
        images = [scale.image(base), scale.image(target), scale.image(matched), _as_image(change)]
        cells.append((images, f"cosine {last['cosine'][pair]:.3f}, {last['psnr'][pair]:.1f} dB"))
    return {
        "pairs": matched_pairs(cells, ("image", "target", "matched", f"change x {_AMPLIFIED}")),
        "trajectories": matching_trajectories(result.table),
    }


def _as_image(values: Float[Tensor, "channel height width"]) -> Any:
    from PIL import Image

    return Image.fromarray((values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())
