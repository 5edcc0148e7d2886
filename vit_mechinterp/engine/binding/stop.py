"""Where a forward may stop: at a block, behind it, or at the end."""

from __future__ import annotations

from dataclasses import dataclass

from vit_mechinterp.spec import Site

__all__ = ["Stop"]


@dataclass(frozen=True, order=True)
class Stop:
    """Where a forward may stop: before block n (2n), behind it (2n + 1), or at the end of n blocks (2n)."""

    place: int

    @classmethod
    def at_end(cls, n_layers: int) -> Stop:
        """Behind everything."""
        return cls(2 * n_layers)

    @classmethod
    def for_site(cls, site: Site, n_layers: int) -> Stop:
        """Where a forward may stop once this site has been seen."""
        if site.name == "embed":
            return cls(0)
        if site.layer is None:
            return cls.at_end(n_layers)
        return cls(2 * site.layer + (site.name != "resid_pre"))

    @property
    def blocks(self) -> int:
        """How many blocks have run by then."""
        return (self.place + 1) // 2

    def at(self, n_layers: int) -> tuple[int, bool] | None:
        """Layer, and whether the stop comes before its block; None at the end."""
        return None if self == Stop.at_end(n_layers) else (self.place // 2, self.place % 2 == 0)
