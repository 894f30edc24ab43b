"""Search over the weights of a composition for the Pareto frontier of subject and style scores, under a picture budget.

    result = search(score, dimensions=2, budget=120)
    for candidate in result.frontier: print(candidate.weights, candidate.mean)

The budget is spent in thirds: on points of a Halton sequence over all weights; on points near the frontier so far; and
on confirming the best candidates with prompts and seeds that the search has not used. Only the confirmed scores are
reported: the best of many noisy scores is an overestimate.
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
"""(subject, style); higher is better."""
Score = Callable[[Sequence[tuple[Weights, int]]], Sequence[Scores]]
"""Scores of samples, each given by its weights and the number of its prompt and seed."""

SEARCH_SAMPLES = 2
"""Pictures per candidate during the search."""
CONFIRMATION_SAMPLES = 8
"""Pictures per confirmed candidate, if the budget allows that for five candidates."""
MIN_BUDGET = 24
STEP = 0.1
"""Standard deviation of the points around the frontier, relative to the largest weight."""


@dataclass(eq=False)
class Candidate:
    """Weights with the scores of their samples; confirmation_scores is empty unless the candidate was confirmed."""

    weights: Weights
    search_scores: list[Scores] = field(default_factory=list)
    confirmation_scores: list[Scores] = field(default_factory=list)

    @property
    def search_mean(self) -> Scores:
        """Mean over the samples of the search."""
        return _mean(self.search_scores)

    @property
    def mean(self) -> Scores:
        """Mean over the samples of the confirmation."""
        return _mean(self.confirmation_scores)

    @property
    def error(self) -> Scores:
        """Standard error of `mean`; NaN for fewer than two samples."""
        scores = self.confirmation_scores
        spread = np.std(scores, axis=0, ddof=1) if len(scores) > 1 else np.full(2, math.nan)
        return tuple((spread / math.sqrt(max(len(scores), 1))).tolist())


@dataclass(frozen=True)
class SearchResult:
    """All candidates of a search, and the confirmed ones."""

    candidates: tuple[Candidate, ...]
    confirmed: tuple[Candidate, ...]

    @property
    def frontier(self) -> list[Candidate]:
        """The confirmed candidates that no other dominates, by descending subject score."""
        return [self.confirmed[i] for i in frontier([one.mean for one in self.confirmed])]

    @property
    def balanced(self) -> Candidate:
        """The maximin point of the frontier, with each score scaled to its range over all confirmed candidates."""
        means = np.array([one.mean for one in self.confirmed])
        least, span = means.min(0), np.maximum(np.ptp(means, axis=0), 1e-12)
        return max(self.frontier, key=lambda one: float(((one.mean - least) / span).min()))


def search(
    score: Score,
    dimensions: int,
    budget: int,
    *,
    max_weight: float = 1.5,
    seed: int = 0,
    notify: Callable[[str], None] = lambda _: None,
) -> SearchResult:
    """Search for the frontier with at most `budget` pictures.

    Args:
        score: called once per stage with all samples of that stage.
        dimensions: number of weights; each is searched from 0 to `max_weight`.
        notify: receives one line of text at the start of each stage.

    Raises:
        DataError: fewer than MIN_BUDGET pictures, or no weights.
    """
    if budget < MIN_BUDGET or dimensions < 1:
        expected = f"at least {MIN_BUDGET} pictures and one weight"
        raise DataError("too little to search", expected=expected, got=f"{budget} pictures, {dimensions} weights")
    rng = np.random.default_rng(seed)
    points = budget // 3 // SEARCH_SAMPLES
    notify(f"{points} points over all weights")
    candidates = _evaluated(_initial_points(points, dimensions, max_weight, seed), score)
    for part in (points // 2, points - points // 2):
        notify(f"{part} points near the frontier so far")
        candidates += _evaluated(_points_near_frontier(candidates, part, max_weight, rng), score)
    left = budget - SEARCH_SAMPLES * len(candidates)
    samples = max(SEARCH_SAMPLES, min(CONFIRMATION_SAMPLES, left // 5))
    order = ranked([one.search_mean for one in candidates])
    confirmed = [candidates[i] for i in order[: max(1, left // samples)]]
    notify(f"confirming {len(confirmed)} points, {samples} pictures each")
    numbers = range(SEARCH_SAMPLES, SEARCH_SAMPLES + samples)
    scores = iter(score([(one.weights, number) for one in confirmed for number in numbers]))
    for one in confirmed:
        one.confirmation_scores = [next(scores) for _ in numbers]
    return SearchResult(tuple(candidates), tuple(confirmed))


def _evaluated(points: Sequence[Weights], score: Score) -> list[Candidate]:
    scores = iter(score([(weights, number) for weights in points for number in range(SEARCH_SAMPLES)]))
    return [Candidate(weights, [next(scores) for _ in range(SEARCH_SAMPLES)]) for weights in points]


def _initial_points(count: int, dimensions: int, max_weight: float, seed: int) -> list[Weights]:
    """Return the point of all weights 1, which is the usual default, and then a Halton sequence."""
    from scipy.stats import qmc

    points = qmc.Halton(dimensions, scramble=True, seed=seed).random(count - 1) * max_weight
    return [(min(1.0, max_weight),) * dimensions, *(_rounded(point, max_weight) for point in points)]


def _points_near_frontier(
    candidates: Sequence[Candidate], count: int, max_weight: float, rng: np.random.Generator
) -> list[Weights]:
    """Return new points: midpoints between neighbours on the frontier, then Gaussian steps from its points in turn."""
    best = [candidates[i].weights for i in frontier([one.search_mean for one in candidates])]
    known, found = {one.weights for one in candidates}, []
    middles = (np.mean(pair, axis=0) for pair in itertools.pairwise(best))
    steps = (rng.normal(best[i % len(best)], STEP * max_weight) for i in itertools.count())
    for point in itertools.chain(middles, steps):
        weights = _rounded(point, max_weight)
        if weights not in known:
            known.add(weights)
            found.append(weights)
        if len(found) == count:
            break
    return found


def _rounded(point: Float[np.ndarray, " dimensions"], max_weight: float) -> Weights:
    """Clip the weights, and round them so that they can be typed on a command line."""
    return tuple(float(round(value, 3)) for value in np.clip(point, 0, max_weight))


def _mean(scores: Sequence[Scores]) -> Scores:
    return tuple(np.mean(scores, axis=0).tolist())


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points that no other dominates (Pareto), by descending first score, equals once."""
    best: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i], reverse=True):
        if not best or points[i][1] > points[best[-1]][1]:
            best.append(i)
    return best


def ranked(points: Sequence[Scores]) -> list[int]:
    """Rank indices by non-dominated sorting, within one frontier by crowding distance (NSGA-II, Deb et al. 2002)."""
    left, order = list(range(len(points))), []
    while left:
        layer = [left[i] for i in frontier([points[i] for i in left])]
        order += sorted(layer, key=lambda i: -_crowding_distance(layer, i, points))
        left = [i for i in left if i not in set(layer)]
    return order


def _crowding_distance(layer: Sequence[int], one: int, points: Sequence[Scores]) -> float:
    """Distance between the two neighbours of a point, relative to the extent of its frontier; infinite at the ends."""
    place = layer.index(one)
    if place in (0, len(layer) - 1):
        return math.inf
    ends = np.abs(np.subtract(points[layer[0]], points[layer[-1]]))
    apart = np.abs(np.subtract(points[layer[place - 1]], points[layer[place + 1]]))
    return float((apart / np.maximum(ends, 1e-12)).sum())
