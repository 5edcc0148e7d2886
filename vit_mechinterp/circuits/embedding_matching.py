"""Embedding matching: change an image, little, until its embedding is that of quite another image (Salman,
Shams and Liu 2024).

From an image x, gradient descent on the input makes ``|f(x) - f(target)|^2`` small, f being the activation at
any site. Whole sets of visibly different images share an embedding: their equivalence sets. The objective
``1/2 |f(x) - f(t)|^2`` and plain gradient descent are the paper's; the authors' later code minimises the mean
over dimensions and keeps the input within the range of the base's values. Step sizes and stopping rules of
the paper are not known, those here are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.embeddings import Embedding
from vit_mechinterp.circuits.images import image_pairs
from vit_mechinterp.circuits.pixels import PixelScale
from vit_mechinterp.circuits.result import CircuitResult, provenance
from vit_mechinterp.engine.data import Data
from vit_mechinterp.errors import SpecError
from vit_mechinterp.model.hooked import HookedViT
from vit_mechinterp.spec.tokens import Tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["embedding_matching"]

_FIRST_STEP = 0.05
"""Length of the first step of an adaptive descent, as a share of the image's own length."""
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
            every pair's own that grows by a fifth while its loss falls, and is taken back and halved when it
            rises.
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

    Raises:
        SpecError: no such site, or a setting out of range; DataError: the images are no pairs.
    """
    import pandas as pd

    _check(step_size, max_steps, bound, value_range)
    embedding = Embedding.of(vit, site, tokens)
    rule = _Rule(loss, None if step_size == "adaptive" else step_size, stop_distance, stop_cosine)
    data = Data(image_pairs(images, vit, base=base, source=target), vit)
    rows: list[dict[str, Any]] = []
    tensors: dict[str, list[Tensor]] = {"base": [], "target": [], "matched": []}
    total = data.n * max_steps
    with tqdm(total=total, desc="matching", unit="step", delay=2, disable=not progress) as bar:
        for first in range(0, data.n, batch_size):
            examples = range(first, min(first + batch_size, data.n))
            x, t = data.images(base, examples), data.images(target, examples)
            limits = _limits(x, value_range, bound)
            matched, own = _descend(vit, embedding, x, t, limits, rule, max_steps, record_every, bar)
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
            stop_cosine=stop_cosine,
            bound=bound,
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
            "pairs": f"Image, target, what the image became, and the change, {_AMPLIFIED} times enlarged.",
            "trajectories": "Squared distance to the target's embedding (share of the first), and cosine.",
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


@dataclass(frozen=True)
class _Rule:
    """How pairs descend, and when one is done."""

    loss: str
    step_size: float | None
    stop_distance: float | None
    stop_cosine: float


@dataclass
class _State:
    """Where each pair is: its image, and what the model makes of it."""

    x: Float[Tensor, "pair *image"]
    squared: Float[Tensor, " pair"]
    cosine: Float[Tensor, " pair"]
    gradient: Float[Tensor, "pair *image"]
    prediction: Tensor

    def take(self, pairs: Tensor, other: _State, which: Tensor) -> None:
        """Put some pairs of another state in place of these."""
        for name in ("x", "squared", "cosine", "gradient", "prediction"):
            getattr(self, name)[pairs] = getattr(other, name)[which]


def _look(
    vit: HookedViT, embedding: Embedding, x: Tensor, wanted: Float[Tensor, "pair feature"], loss: str
) -> _State:
    """Run the model on the pairs' images, with the gradient of each pair's loss."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        output, cache = vit.run(leaf, capture=[embedding.site])
        found = embedding.select(cache[embedding.site])
        squared = ((found - wanted) ** 2).sum(1)
        weight = 0.5 if loss == "half_squared" else 1.0 / wanted.shape[1]
        (gradient,) = torch.autograd.grad(weight * squared.sum(), leaf)
    cosine = torch.nn.functional.cosine_similarity(found.detach(), wanted)
    return _State(leaf.detach(), squared.detach(), cosine, gradient, _predictions(output))


def _descend(
    vit: HookedViT,
    embedding: Embedding,
    base: Tensor,
    target: Tensor,
    limits: tuple[Tensor, Tensor],
    rule: _Rule,
    max_steps: int,
    record_every: int,
    bar: tqdm[Any],
) -> tuple[Float[Tensor, "pair *image"], list[dict[str, Any]]]:
    """Descend with one batch of pairs; each stops on its own."""
    with torch.no_grad():
        output, cache = vit.run(target, capture=[embedding.site])
        wanted = embedding.select(cache[embedding.site])
    state = _look(vit, embedding, base, wanted, rule.loss)
    fixed = {"base_prediction": state.prediction.clone(), "target_prediction": _predictions(output)}
    scale = PixelScale.of(vit, base)
    limit = state.squared * 1e-3 if rule.stop_distance is None else rule.stop_distance
    first_length = state.gradient.flatten(1).norm(dim=1).clamp_min(1e-30).float()
    steps = _FIRST_STEP * base.flatten(1).norm(dim=1).float() / first_length
    if rule.step_size is not None:
        steps = torch.full_like(steps, rule.step_size)
    rows: list[dict[str, Any]] = []
    active = torch.arange(len(base), device=base.device)
    for step in range(max_steps + 1):
        done = ((state.squared <= limit) & (state.cosine >= rule.stop_cosine))[active]
        ends = done | (step == max_steps)
        shown = active if step % record_every == 0 else active[ends]
        psnr, largest = _visible(scale, base[shown], state.x[shown])
        finals = dict(zip(active.tolist(), ends.tolist(), strict=True))
        met = dict(zip(active.tolist(), done.tolist(), strict=True))
        for n, pair in enumerate(shown.tolist()):
            rows.append(
                {
                    "pair": pair,
                    "step": step,
                    "squared_distance": float(state.squared[pair]),
                    "cosine": float(state.cosine[pair]),
                    "max_change": float(largest[n]),
                    "psnr": float(psnr[n]),
                    "prediction": int(state.prediction[pair]),
                    **{name: int(values[pair]) for name, values in fixed.items()},
                    "final": finals[pair],
                    "matched": met[pair],
                }
            )
        bar.update(int(done.sum()) * (max_steps - step) + int((~ends).sum()))
        active = active[~ends]
        if not len(active):
            break
        length = steps[active].reshape(-1, *[1] * (base.ndim - 1)).to(base.dtype)
        moved = state.x[active] - length * state.gradient[active]
        moved = torch.minimum(torch.maximum(moved, limits[0][active]), limits[1][active])
        trial = _look(vit, embedding, moved, wanted[active], rule.loss)
        if rule.step_size is None:
            lower = trial.squared <= state.squared[active]
            steps[active] *= torch.where(lower, 1.2, 0.5)
            state.take(active[lower], trial, lower)
        else:
            state.take(active, trial, torch.ones_like(active, dtype=torch.bool))
    return state.x, rows


def _limits(
    x: Tensor, value_range: tuple[float, float] | str | None, bound: float | None
) -> tuple[Float[Tensor, "pair *image"], Float[Tensor, "pair *image"]]:
    """The lowest and highest allowed value of every entry of every pair."""
    low, high = torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf)
    if value_range == "base":
        flat = x.flatten(1)
        low = low.copy_(flat.amin(1).reshape(-1, *[1] * (x.ndim - 1)))
        high = high.copy_(flat.amax(1).reshape(-1, *[1] * (x.ndim - 1)))
    elif isinstance(value_range, tuple):
        low, high = torch.full_like(x, value_range[0]), torch.full_like(x, value_range[1])
    if bound is not None:
        low, high = torch.maximum(low, x - bound), torch.minimum(high, x + bound)
    return low, high


def _predictions(output: Tensor) -> Tensor:
    """The classifier's answer; -1 for an output that is not one logit per class."""
    if output.ndim != 2:
        return torch.full((len(output),), -1, device=output.device)
    return output.detach().argmax(dim=-1)


def _visible(scale: PixelScale, base: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Peak signal-to-noise ratio in decibels, and the largest change of a pixel value, of every pair."""
    change = scale.change(x - base).flatten(1)
    return -10 * (change**2).mean(1).clamp_min(1e-20).log10(), change.abs().amax(1)


def _draw(result: CircuitResult, scale: PixelScale) -> dict[str, Figure]:
    from vit_mechinterp.figures.matching import matched_pairs, matching_trajectories

    last = result.table[result.table["final"]].set_index("pair")
    cells = []
    for pair in range(min(4, len(last))):
        base, target, matched = (result.tensors[name][pair] for name in ("base", "target", "matched"))
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
