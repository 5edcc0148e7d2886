"""Gradient descent on images towards an embedding: many pairs at once, each with its own step and end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from vit_mechinterp.circuits.embeddings import Embedding
from vit_mechinterp.circuits.pixels import PixelScale
from vit_mechinterp.model.hooked import HookedViT

__all__ = ["Rule", "descend", "limits_of"]

_FIRST_STEP = 0.05
"""Length of the first step of an adaptive descent, as a share of the image's own length."""
_RECENT = 5
"""Losses of an adaptive descent that a step is held against: it may rise for a moment."""


@dataclass(frozen=True)
class Rule:
    """How pairs descend, and when one is done."""

    loss: str
    step_size: float | None
    stop_distance: float | None
    stop_cosine: float


@dataclass
class State:
    """Where each pair is: its image, and what the model makes of it."""

    x: Float[Tensor, "pair *image"]
    squared: Float[Tensor, " pair"]
    cosine: Float[Tensor, " pair"]
    gradient: Float[Tensor, "pair *image"]
    prediction: Tensor

    def take(self, pairs: Tensor, other: State, which: Tensor) -> None:
        """Put some pairs of another state in place of these."""
        for name in ("x", "squared", "cosine", "gradient", "prediction"):
            getattr(self, name)[pairs] = getattr(other, name)[which]


def look(
    vit: HookedViT, embedding: Embedding, x: Tensor, wanted: Float[Tensor, "pair feature"], loss: str
) -> State:
    """Run the model on the pairs' images, with the gradient of each pair's loss."""
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        output, cache = vit.run(leaf.to(vit.dtype), capture=[embedding.site])
        found = embedding.select(cache[embedding.site])
        squared = ((found - wanted) ** 2).sum(1)
        weight = 0.5 if loss == "half_squared" else 1.0 / wanted.shape[1]
        total = weight * squared.sum()
        gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    if gradient is None:
        # A site that no image reaches is equal for all of them: matched from the start.
        gradient = torch.zeros_like(leaf)
    cosine = torch.nn.functional.cosine_similarity(found.detach(), wanted)
    return State(leaf.detach(), squared.detach(), cosine, gradient, _predictions(output))


def descend(
    vit: HookedViT,
    embedding: Embedding,
    base: Tensor,
    target: Tensor,
    limits: tuple[Tensor, Tensor],
    rule: Rule,
    max_steps: int,
    record_every: int,
    bar: tqdm[Any],
) -> tuple[Float[Tensor, "pair *image"], list[dict[str, Any]]]:
    """Descend with one batch of pairs; each stops on its own."""
    with torch.no_grad():
        output, cache = vit.run(target.to(vit.dtype), capture=[embedding.site])
        wanted = embedding.select(cache[embedding.site])
    state = look(vit, embedding, base, wanted, rule.loss)
    fixed = {"base_prediction": state.prediction.clone(), "target_prediction": _predictions(output)}
    scale = PixelScale.of(vit, base)
    limit = state.squared * 1e-3 if rule.stop_distance is None else rule.stop_distance
    first_length = state.gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
    steps = _FIRST_STEP * base.flatten(1).norm(dim=1) / first_length
    recent = state.squared.expand(_RECENT, -1).clone()
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
        length = steps[active].reshape(-1, *[1] * (base.ndim - 1))
        moved = state.x[active] - length * state.gradient[active]
        moved = torch.minimum(torch.maximum(moved, limits[0][active]), limits[1][active])
        trial = look(vit, embedding, moved, wanted[active], rule.loss)
        if rule.step_size is None:
            lower = trial.squared <= recent[:, active].amax(0)
            shift, turn = moved - state.x[active], trial.gradient - state.gradient[active]
            fitted = _fitted(steps[active], shift, turn, longer=step % 2 == 1)
            steps[active] = torch.where(lower, fitted, 0.5 * steps[active])
            state.take(active[lower], trial, lower)
            recent[step % _RECENT, active] = state.squared[active]
        else:
            state.take(active, trial, torch.ones_like(active, dtype=torch.bool))
    return state.x, rows


def _fitted(steps: Tensor, moved: Tensor, turned: Tensor, longer: bool) -> Float[Tensor, " pair"]:
    """The step that would have fitted the last one, were the loss quadratic: the longer or the shorter of
    Barzilai and Borwein's; doubled where the loss curves the other way, and within a tenth and ten times the
    last.
    """
    moved, turned = moved.flatten(1), turned.flatten(1)
    along = (moved * turned).sum(1)
    length, turn = (moved**2).sum(1), (turned**2).sum(1)
    fitted = length / along.clamp_min(1e-30) if longer else along / turn.clamp_min(1e-30)
    fitted = torch.where(along > 0, fitted, 2 * steps)
    return torch.minimum(torch.maximum(fitted, 0.1 * steps), 10 * steps)


def limits_of(
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
