"""What the paper says, what came out here, and whether the two agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vit_mechinterp.circuits.result import CircuitResult

__all__ = ["AGREEMENT", "Claim", "agreement"]

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
        holds: whether that agrees; None where it cannot be told.
    """

    figure: str
    claim: str
    published: str
    here: str
    holds: bool | None


def agreement(claims: Sequence[Claim], scale: str) -> CircuitResult:
    """Put the claims into one table; it has no figure."""
    import pandas as pd

    verdicts = {True: "agrees", False: "does not agree", None: "cannot be told"}
    table = pd.DataFrame(
        [(own.figure, own.claim, own.published, own.here, verdicts[own.holds]) for own in claims],
        columns=["figure", "the paper", "its number", "here", "verdict"],
    )
    counts = {word: int((table["verdict"] == word).sum()) for word in verdicts.values()}
    different = [own for own in claims if own.holds is False]
    said = (
        f"At the scale {scale}, {counts['agrees']} of {len(claims)} statements come out as in the paper, "
        f"{counts['does not agree']} do not, and of {counts['cannot be told']} it cannot be told."
    )
    if different:
        said += " What does not agree: " + " ".join(f"{own.figure}: {own.here}." for own in different)
    return CircuitResult(
        name=AGREEMENT,
        title="What agrees with the paper, and what does not",
        table=table,
        summary=counts,
        provenance={"scale": scale},
        description=said
        + "\n\nThe paper's models are pretrained on many millions of images and have twelve blocks; numbers "
        "beside ours are those of the authors' logs. A verdict compares the pattern of a result, never its "
        "size.",
    )
