"""What machines cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .model import ON_DEMAND


@dataclass(frozen=True)
class Tariff:
    """USD an hour: on demand by type, spot by type and zone. `source`: where that is from, for people."""

    on_demand: Mapping[str, float]
    spot: Mapping[tuple[str, str], float]
    source: str

    @classmethod
    def unknown(cls) -> Tariff:
        return cls({}, {}, "unknown")

    def price(self, kind: str, market: str = ON_DEMAND, zone: str = "") -> float | None:
        """None where nobody knows; without a zone that of the cheapest one."""
        if market == ON_DEMAND:
            return self.on_demand.get(kind)
        if zone:
            return self.spot.get((kind, zone))
        return min((usd for (name, _), usd in self.spot.items() if name == kind), default=None)
