"""Weights of a composition, found by looking at pictures: the frontier of subject against style, under a budget.

    found = search(score, dials=2, budget=120)
    for tried in found.frontier: print(tried.weights, tried.mean)

Three parts of the budget, a third each: points spread over all weights; points between neighbours of the frontier so
far, and around it; and the best of both looked at again, with seeds that the search has not seen. Only those last
scores are reported: the best of many noisy ones would look better than it is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from qrlora.errors import DataError

Weights = tuple[float, ...]
Scores = tuple[float, float]
"""Subject, style; more is better."""
Score = Callable[[Sequence[tuple[Weights, int]]], Sequence[Scores]]
"""Scores of pictures, each asked for by weights and the number of its prompt and seed."""

FIRST = 2
"""Pictures of a point before it is looked at again."""
AGAIN = 8
"""And then, if the budget lets five points have as many."""
LEAST_BUDGET = 24
STEP = 0.1
"""Spread of the points around the frontier, in parts of the largest weight."""


@dataclass(eq=False)
class Tried:
    """Weights, and the scores of their pictures: of the search, and of the second look (empty if there was none)."""

    weights: Weights
    first: list[Scores] = field(default_factory=list)
    again: list[Scores] = field(default_factory=list)

    @property
    def guess(self) -> Scores:
        """Mean over the search's pictures."""
        return _mean(self.first)

    @property
    def mean(self) -> Scores:
        """Mean over the second look."""
        return _mean(self.again)

    @property
    def error(self) -> Scores:
        """Standard error of that mean."""
        spread = np.std(self.again, axis=0, ddof=1) if len(self.again) > 1 else np.full(2, math.nan)
        return tuple((spread / math.sqrt(max(len(self.again), 1))).tolist())


@dataclass(frozen=True)
class Found:
    """All that was tried, and what of it was looked at again."""

    tried: tuple[Tried, ...]
    confirmed: tuple[Tried, ...]

    @property
    def frontier(self) -> list[Tried]:
        """Of the confirmed those that none beats in both scores; the best subject first."""
        return [self.confirmed[i] for i in frontier([one.mean for one in self.confirmed])]

    @property
    def balanced(self) -> Tried:
        """The one of the frontier whose worse score is best, each score in parts of its range over all confirmed."""
        means = np.array([one.mean for one in self.confirmed])
        least, span = means.min(0), np.maximum(np.ptp(means, axis=0), 1e-12)
        return max(self.frontier, key=lambda one: float(((one.mean - least) / span).min()))


def search(
    score: Score,
    dials: int,
    budget: int,
    *,
    highest: float = 1.5,
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Found:
    """Look for the frontier with `budget` pictures.

    Args:
        score: of pictures; more is better.
        dials: how many weights there are, each from 0 to `highest`.
        tell: told in words what is begun.

    Raises:
        DataError: a budget too small to tell anything.
    """
    if budget < LEAST_BUDGET or dials < 1:
        expected = f"{LEAST_BUDGET} pictures and one weight, or more"
        raise DataError("nothing can be found so", expected=expected, got=f"{budget} pictures, {dials} weights")
    rng = np.random.default_rng(seed)
    points = budget // 3 // FIRST
    tell(f"{points} points over all weights")
    tried = _look([*_spread(points, dials, highest, seed)], score)
    for part in (points // 2, points - points // 2):
        tell(f"{part} points around the frontier so far")
        tried += _look(_near(tried, part, highest, rng), score)
    left = budget - FIRST * len(tried)
    again = max(FIRST, min(AGAIN, left // 5))
    order = ranked([one.guess for one in tried])
    confirmed = [tried[i] for i in order[: max(1, left // again)]]
    tell(f"{len(confirmed)} points again, {again} pictures each")
    jobs = [(one.weights, number) for one in confirmed for number in range(FIRST, FIRST + again)]
    scores = iter(score(jobs))
    for one in confirmed:
        one.again = [next(scores) for _ in range(again)]
    return Found(tuple(tried), tuple(confirmed))


def _look(points: Sequence[Weights], score: Score) -> list[Tried]:
    jobs = [(weights, number) for weights in points for number in range(FIRST)]
    scores = iter(score(jobs))
    return [Tried(weights, [next(scores) for _ in range(FIRST)]) for weights in points]


def _spread(count: int, dials: int, highest: float, seed: int) -> list[Weights]:
    """What everyone tries first, all weights 1; the rest evenly (Halton's sequence)."""
    from scipy.stats import qmc

    points = qmc.Halton(dials, scramble=True, seed=seed).random(count - 1) * highest
    return [(min(1.0, highest),) * dials, *(_rounded(point, highest) for point in points)]


def _near(tried: Sequence[Tried], count: int, highest: float, rng: np.random.Generator) -> list[Weights]:
    """Midpoints between neighbours on the frontier, then steps by chance from its points; none that was tried."""
    best = [tried[i].weights for i in frontier([one.guess for one in tried])]
    known, found = {one.weights for one in tried}, []
    middles = (np.mean(pair, axis=0) for pair in itertools.pairwise(best))
    steps = (rng.normal(best[i % len(best)], STEP * highest) for i in itertools.count())
    for point in itertools.chain(middles, steps):
        weights = _rounded(point, highest)
        if weights not in known:
            known.add(weights)
            found.append(weights)
        if len(found) == count:
            break
    return found


def _rounded(point: Float[np.ndarray, " dials"], highest: float) -> Weights:
    """To what a command line is typed with."""
    return tuple(float(round(value, 3)) for value in np.clip(point, 0, highest))


def _mean(scores: Sequence[Scores]) -> Scores:
    return tuple(np.mean(scores, axis=0).tolist())


def frontier(points: Sequence[Scores]) -> list[int]:
    """Positions of the points that no other beats or equals in both and beats in one; the best first score first."""
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if not best or points[i][1] > points[best[-1]][1]:
            best.append(i)
    return best


def ranked(points: Sequence[Scores]) -> list[int]:
    """All positions, frontier by frontier; of one frontier its ends and what stands alone first (NSGA-II, Deb 2002)."""
    left, order = list(range(len(points))), []
    while left:
        layer = [left[i] for i in frontier([points[i] for i in left])]
        order += sorted(layer, key=lambda i: -_room(layer, i, points))
        left = [i for i in left if i not in set(layer)]
    return order


def _room(layer: Sequence[int], one: int, points: Sequence[Scores]) -> float:
    """Distance between the neighbours of a point on its frontier, in parts of the frontier; infinite at the ends."""
    place = layer.index(one)
    if place in (0, len(layer) - 1):
        return math.inf
    ends = np.abs(np.subtract(points[layer[0]], points[layer[-1]]))
    apart = np.abs(np.subtract(points[layer[place - 1]], points[layer[place + 1]]))
    return float((apart / np.maximum(ends, 1e-12)).sum())
