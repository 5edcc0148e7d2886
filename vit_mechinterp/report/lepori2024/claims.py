"""What the paper says, what came out here, and whether the two agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vit_mechinterp.circuits.result import CircuitResult

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AGREEMENT", "Claim", "agreement", "by_layer"]

AGREEMENT = "agreement"
"""Name of the section that `agreement` makes."""


@dataclass(frozen=True)
class Claim:
    """One statement of the paper beside what was measured here.

    Attributes:
        figure: where the paper makes it.
        claim: the statement, in our words.
        published: its number, or "".
        here: what was measured, in words and numbers.
        rule: what counts as agreement.
        holds: whether it is met; None where it cannot be told.
    """

    figure: str
    claim: str
    published: str
    here: str
    rule: str
    holds: bool | None


def agreement(
    claims: Sequence[Claim], scale: str, left_out: Mapping[str, str] | None = None
) -> CircuitResult:
    """Put the claims into one table; it has no figure.

    Args:
        claims: what was compared.
        scale: at which scale.
        left_out: sections that were not made, and why.
    """
    import pandas as pd

    verdicts = {True: "agrees", False: "does not agree", None: "cannot be told"}
    table = pd.DataFrame(
        [(own.figure, own.claim, own.published, own.here, own.rule, verdicts[own.holds]) for own in claims],
        columns=["figure", "the paper", "its number", "here", "agrees if", "verdict"],
    )
    counts = {word: int((table["verdict"] == word).sum()) for word in verdicts.values()}
    different = [own for own in claims if own.holds is False]
    said = (
        f"At the scale {scale}, {counts['agrees']} of {len(claims)} statements come out as in the paper, "
        f"{counts['does not agree']} do not, and of {counts['cannot be told']} it cannot be told."
    )
    if different:
        said += " What does not agree: " + " ".join(f"{own.figure}: {own.here}." for own in different)
    if left_out:
        reasons: dict[str, list[str]] = {}
        for name, reason in left_out.items():
            reasons.setdefault(reason, []).append(name)
        said += "\n\nNot shown at this scale: " + "; ".join(
            f"{', '.join(names)} ({reason})" for reason, names in reasons.items()
        ) + "."
    return CircuitResult(
        name=AGREEMENT,
        title="What agrees with the paper, and what does not",
        table=table,
        summary=counts,
        provenance={"scale": scale},
        description=said
        + "\n\nThe paper's models are pretrained on many millions of images and have twelve blocks; numbers "
        "beside ours are those of the authors' logs. A verdict compares the pattern of a result; its size "
        "only where the same model stands in the logs.",
    )


def by_layer(rows: pd.DataFrame, column: str) -> dict[int, float]:
    """Means of a column by layer."""
    means = rows.groupby("layer")[column].mean()
    return {int(str(layer)): float(value) for layer, value in means.items()}
