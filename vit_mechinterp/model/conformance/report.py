"""What conformance checks found, as rows and as a readable table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Record", "Report", "Row"]

FAILURES_SHOWN = 4


@dataclass(frozen=True)
class Row:
    """One finding: a check, the site that it is about (or ``""``), and what was seen.

    ``deviation`` is the largest difference found, as a share of the compared values' scale, where a check
    compares numbers. ``left_out`` says of a finding that there was nothing to compare; ``detail`` is the
    reason then, and ``passed`` is true.
    """

    check: str
    site: str
    passed: bool
    detail: str = ""
    deviation: float | None = None
    left_out: bool = False


@dataclass(frozen=True)
class Report:
    """All findings on one model.

    ``print`` shows one line per check, the first failures of each, what was left out and why, and which sites
    the model lacks and why. ``absent`` maps the names of those sites to the reasons.
    """

    model: str
    rows: tuple[Row, ...]
    absent: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def passed(self) -> bool:
        """Whether every check passed (and there was one)."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The findings that did not pass."""
        return tuple(row for row in self.rows if not row.passed)

    def to_pandas(self) -> pd.DataFrame:
        """One row per finding: ``check``, ``site``, ``passed``, ``detail``, ``deviation``, ``left_out``."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])

    def __str__(self) -> str:
        names = list(dict.fromkeys(row.check for row in self.rows))
        width = max(map(len, names), default=0)
        lines = [self.model]
        for name in names:
            rows = [row for row in self.rows if row.check == name]
            made = [row for row in rows if not row.left_out]
            good = sum(row.passed for row in made)
            verdict = "FAILED" if good < len(made) else "passed" if made else "none  "
            line = f"  {verdict}  {name:{width}}  {f'{good}/{len(made)}':>9}  {_summary(made)}"
            lines.append(line.rstrip())
        for name in names:
            failures = [row for row in self.failures if row.check == name]
            for row in failures[:FAILURES_SHOWN]:
                where = f"{row.site}: " if row.site else ""
                lines.append(f"  {name}: {where}{row.detail or 'failed'}")
            if len(failures) > FAILURES_SHOWN:
                lines.append(f"  {name}: {len(failures) - FAILURES_SHOWN} more (to_pandas() lists all)")
        for name in names:
            left = {row.site: row.detail for row in self.rows if row.check == name and row.left_out}
            lines += [f"  {name}: left out {text}" for text in _by_reason(left)]
        lines += [f"  not there: {text}" for text in _by_reason(self.absent)]
        lines.append("  The model conforms." if self.passed else "  The model does not conform.")
        return "\n".join(lines)


def _summary(rows: list[Row]) -> str:
    deviations = [row.deviation for row in rows if row.deviation is not None]
    if deviations:
        largest = max(deviations)
        return "exact" if largest == 0 else f"largest difference {largest:.0e} of the scale"
    details = {row.detail for row in rows}
    return details.pop() if len(details) == 1 and rows[0].passed else ""


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Sites that share a reason in one line each, blocks counted."""
    sites: dict[str, dict[str, int]] = {}
    for site, reason in reasons.items():
        name = re.sub(r"^blocks\.\d+\.", "blocks.*.", site)
        counts = sites.setdefault(reason, {})
        counts[name] = counts.get(name, 0) + 1
    lines = []
    for reason, counts in sites.items():
        groups: dict[int, list[str]] = {}
        for name, count in counts.items():
            groups.setdefault(count if name.startswith("blocks.*.") else 0, []).append(name)
        names = "; ".join(
            ", ".join(group) + (f" ({count} blocks)" if count > 1 else f" ({count} block)" if count else "")
            for count, group in groups.items()
        )
        lines.append(f"{names}: {reason}" if names else reason)
    return lines


@dataclass
class Record:
    """Collects findings; a check that raises is a failed check, and the next one runs."""

    rows: list[Row] = field(default_factory=list)
    check: str = ""

    @contextmanager
    def under(self, check: str) -> Iterator[None]:
        """Everything inside is recorded under this check's name."""
        self.check = check
        try:
            yield
        except Exception as error:
            self.add(False, detail=f"{type(error).__name__}: {error}")

    def add(self, passed: bool, site: str = "", detail: str = "", deviation: float | None = None) -> None:
        """Record one finding under the current check."""
        self.rows.append(Row(self.check, site, passed, detail, deviation))

    def leave_out(self, site: str, reason: str) -> None:
        """Record that there is nothing to compare at a site under the current check, and why."""
        self.rows.append(Row(self.check, site, True, reason, left_out=True))

    def near(
        self, deviation: float, allowed: float, site: str = "", detail: str = "", hint: str = ""
    ) -> None:
        """Record a comparison of numbers; it passes up to ``allowed`` (0: only if they are bit-identical).

        ``hint`` says what to look at where it does not.
        """
        passed = deviation <= allowed
        wanted = "bit-identity" if allowed == 0 else f"at most {allowed:.0e}"
        seen = detail or "differs"
        text = "" if passed else f"{seen} by {deviation:.1e} of the scale where {wanted} is required"
        text += f"; {hint}" if hint and not passed else ""
        self.add(passed, site, text, deviation)
