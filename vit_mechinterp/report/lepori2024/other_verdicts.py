"""The paper's other models beside ours, as far as the authors' logs have their best layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from vit_mechinterp.circuits.result import CircuitResult
from vit_mechinterp.report.lepori2024.claims import Claim, by_layer
from vit_mechinterp.report.lepori2024.published import best, published

__all__ = ["OTHER_CLAIMS"]

Claims = Callable[[Mapping[str, CircuitResult]], Iterator[Claim]]

_NEAR: Final = 0.1


def _near(figure: str, statement: str, logged: float, ours: Mapping[int, float]) -> Claim:
    """Our best layer beside the logged one."""
    top = max(ours, key=lambda n: ours[n])
    return Claim(
        figure,
        statement,
        f"{logged:.3f} (logged)",
        f"{ours[top]:.3f} in layer {top}",
        f"the two differ by no more than {_NEAR:g}",
        abs(ours[top] - logged) <= _NEAR,
    )


def _searched_beside(task: str, part: str, figure: str, model: str) -> Claims:
    """The search of another model of the paper, whose logs say how far its best layer gets."""

    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        table = results[f"das_{task}_{part}"].table
        for attribute, rows in table[table["control"] == "none"].groupby("attribute", sort=False):
            logged, _ = best(
                item="fig6", task=task, kind=attribute, combinations=256, model=model,
                quantity="best interchange accuracy",
            )  # fmt: skip
            ours = by_layer(rows[rows["split"] == "test_iid"], "accuracy")
            statement = f"the best subspace of {attribute} in {model} reaches as far as there"
            yield _near(figure, statement, logged, ours)

    return of


def _unseen_beside(task: str, figure: str) -> Claims:
    """The search of a model that held objects out, measured on pairs of these."""

    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        table = results[f"das_{task}_held_out"].table
        table = table[(table["control"] == "none") & (table["split"] == "test")]
        for attribute, rows in table.groupby("attribute", sort=False):
            logged, _ = best(
                item="fig3", task=task, kind=attribute, combinations=32, model="CLIP B/16",
                quantity="best interchange accuracy, unseen combinations",
            )  # fmt: skip
            ours = by_layer(rows, "accuracy")
            top = max(ours, key=lambda n: ours[n])
            yield Claim(
                figure,
                f"a subspace of {attribute} carries it in objects that no training showed",
                f"{logged:.3f} (logged for CLIP B/16)",
                f"{ours[top]:.3f} in layer {top}",
                "the best layer is above 0.75",
                ours[top] > 0.75,
            )

    return of


def _probed_beside(part: str, figure: str, model: str) -> Claims:
    """Probe and intervention on another model of the paper."""

    def of(results: Mapping[str, CircuitResult]) -> Iterator[Claim]:
        table = results[f"probe_rmts_{part}"].table
        whole = table[table["pair"] == "all"]
        for quantity, alpha, words in (
            ("probe accuracy", None, "probe accuracy"),
            ("success", 1.0, "intervention success, alpha 1"),
        ):
            rows = published(model=model, task="rmts", combinations=256)
            rows = rows[rows["quantity"].isin([words, f"best {words}"])]
            ours = whole[whole["quantity"] == quantity]
            ours = ours if alpha is None else ours[ours["alpha"] == alpha]
            if rows.empty or ours.empty:
                continue
            logged, found = float(rows["value"].max()), by_layer(ours, "value")
            yield _near(figure, f"the best {words} in {model} is as high as there", logged, found)

    return of


OTHER_CLAIMS: Final[Mapping[str, Claims]] = {
    "das_discrimination_dinov2": _searched_beside("discrimination", "dinov2", "Fig. 16", "DINOv2 B/14"),
    "das_rmts_dinov2": _searched_beside("rmts", "dinov2", "Fig. 16 (RMTS)", "DINOv2 B/14"),
    "das_discrimination_held_out": _unseen_beside("discrimination", "logs of Fig. 3"),
    "das_rmts_held_out": _unseen_beside("rmts", "logs of Fig. 3 (RMTS)"),
    "probe_rmts_dino": _probed_beside("dino", "Fig. 37", "DINO B/16"),
    "probe_rmts_mae": _probed_beside("mae", "Fig. 39", "MAE B/16"),
    "probe_rmts_dinov2": _probed_beside("dinov2", "logs of Fig. 5", "DINOv2 B/14"),
    "probe_rmts_imagenet": _probed_beside("imagenet", "logs of Fig. 37", "ImageNet B/16"),
}
