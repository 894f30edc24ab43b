"""Proportions of small samples of pictures, with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Share:
    """A proportion: ``right`` of ``n`` pictures. Raises ValueError unless 0 <= right <= n and n >= 1."""

    right: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.n or self.n < 1:
            raise ValueError(f"a share needs 0 <= right <= n and n >= 1, got {self.right} of {self.n}")

    @classmethod
    def of(cls, verdicts: Iterable[Any]) -> Share:
        """Return the proportion of true verdicts, for example in a boolean array."""
        listed = [bool(verdict) for verdict in verdicts]
        return cls(sum(listed), len(listed))

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return f"{self.right} of {self.n}, 95% interval {low:.0f} to {high:.0f}%"

    def to_dict(self) -> dict[str, Any]:
        """Return the proportion and its interval as JSON values."""
        return {"right": self.right, "n": self.n, "interval": list(self.interval)}

    @property
    def value(self) -> float:
        """The proportion, in [0, 1]."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % score interval (Wilson 1927): inside [0, 1], and no single point at 0 of n or n of n."""
        from scipy.stats import binomtest

        low, high = binomtest(self.right, self.n).proportion_ci(method="wilson")
        return float(low), float(high)


def least_above(limit: float) -> int | None:
    """Return the smallest n at which the 95 % score interval of n of n lies above a limit; None if none does.

    With fewer, not even a unanimous result is surely above it. Wilson's lower bound of n of n is n / (n + Z^2).
    """
    return None if limit >= 1 else math.floor(Z**2 * limit / (1 - limit)) + 1


def difference(a: Share, b: Share) -> tuple[float, tuple[float, float]]:
    """Return a - b and its 95 % interval, each in [-1, 1], from the two score intervals (Newcombe 1998, method 10).

    The pictures are taken as independent; seeds shared by both sides make the true interval a little narrower.
    """
    gap, (a_low, a_high), (b_low, b_high) = a.value - b.value, a.interval, b.interval
    low = gap - math.hypot(a.value - a_low, b_high - b.value)
    return gap, (low, gap + math.hypot(a_high - a.value, b.value - b_low))
