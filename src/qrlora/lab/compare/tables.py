"""Means over pairs with their intervals, paired differences, and what the files foretell."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.stats import bootstrap, spearmanr

from qrlora.lab import tasks
from qrlora.lab.compare.cells import TRUE_SCENES
from qrlora.lab.compare.identity import Record
from qrlora.lab.compare.plan import ROWS
from qrlora.pico import world

DRAWS = 4000
"""Bootstrap samples."""
SCENES = 6
"""Over which the distance of a part from the seen ones is averaged."""
Pairs = dict[tuple[str, str], float]
"""(subject, style) -> a value, in the mean over seeds."""
PER_PAIR: tuple[str, ...] = (
    "both", "subject", "style", "recognised", "among_subject", "among_style", "named", "p_subject", "p_style",
    "obedience", "leaked_subject", "leaked_style", "diversity", "energy", "excess", "merge_seconds", "cosine",
    "rows_shared",
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs and its 95 % interval (percentile bootstrap over pairs, Efron 1979)."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values. Raises ValueError if there are none."""
    return _estimate(np.mean, values)


def ratio(values: Sequence[float], others: Sequence[float]) -> Estimate | None:
    """Mean of values over mean of others, pair by pair the same pairs; None if that of the others is not above 0."""
    if fmean(others) <= 0:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        return _estimate(lambda a, b, axis: a.mean(axis) / b.mean(axis), values, others)


def _estimate(statistic: Callable[..., Any], *columns: Sequence[float]) -> Estimate:
    """A statistic of columns over pairs, and the percentiles of its paired bootstrap. Seeded.

    Resamples in which the statistic is undefined are left out, so the percentiles are taken here and not by scipy.
    """
    data = np.array(columns, float)
    count = data.shape[1]
    if count == 0:
        raise ValueError("an estimate needs a pair")
    resampled = np.array([statistic(*data, axis=-1)])
    if count > 1:
        options: dict[str, Any] = {"n_resamples": DRAWS, "paired": True, "method": "percentile"}
        resampled = bootstrap(data, statistic, rng=np.random.default_rng(0), **options).bootstrap_distribution
    low, high = np.nanpercentile(np.where(np.isfinite(resampled), resampled, np.nan), (2.5, 97.5))
    return Estimate(float(statistic(*data, axis=-1)), float(low), float(high), count)


def by_pair(records: Iterable[Record], row: str, measure: str) -> Pairs:
    """A measure of a row's composed pairs, of their pictures or their files; pairs without it are left out."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        if record["kind"] != "pair" or record["row"] != row:
            continue
        value = (record["measured"] | (record["measured"].get("files") or {})).get(measure)
        if value is not None:
            found[record["subject"], record["style"]].append(value)
    return {pair: fmean(values) for pair, values in found.items()}


def alone(records: Iterable[Record], adapter: str, role: str, measure: str) -> dict[str, float]:
    """A measure of the adapters of one method and role, each alone: name -> mean over seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        value = record["measured"].get(measure)
        if record["kind"] == "alone" and record["adapter"] == adapter and record.get(role) and value is not None:
            found[record[role]].append(value)
    return {name: fmean(values) for name, values in found.items()}


def crosstalk(records: Sequence[Record], row: str, score: str = "among") -> Pairs:
    """`lab.tasks.crosstalk` of every composed pair, in the mean of subject and style; empty for joint training.

    score: "among", the probability of the name among the world's, or "p", which also falls where pictures show nothing
    clearly.
    """
    if ROWS[row].joint:
        return {}
    roles = ("subject", "style")
    before = {role: alone(records, ROWS[row].adapter, role, f"{score}_{role}") for role in roles}
    inside = {role: by_pair(records, row, f"{score}_{role}") for role in roles}
    found = {
        pair: tasks.crosstalk(
            {role: before[role].get(name) for role, name in zip(roles, pair, strict=True)},
            {role: inside[role].get(pair) for role in roles},
        )["both"]
        for pair in inside["subject"]
    }
    return {pair: lost for pair, lost in found.items() if lost is not None}


def table(records: Sequence[Record], rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Row -> measure -> Estimate (None where nothing was measured); "trained": numbers trained for both adapters."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        values = _measures(records, row, PER_PAIR)
        found[row] = {name: estimate(list(pairs.values())) if pairs else None for name, pairs in values.items()}
        found[row]["trained"] = trained(records, ROWS[row].adapter)
        for role in ("subject", "style"):
            for name in ("both", "recognised", "named", "drift"):
                each = alone(records, ROWS[row].adapter, role, name)
                found[row][f"{role}_alone_{name}"] = estimate(list(each.values())) if each else None
    return found


@functools.cache
def distance(role: str, name: str) -> float:
    """Distance of a part from what pico has seen: the same scenes with it and with the nearest seen part in its place,
    root mean square difference of the renders in levels of 255. It asks no model. Subjects are compared in the flat
    style, each stretched to the whole picture, so that it is their form that counts and not where they stand."""
    fixed = {} if role == "style" else {"style": "flat"}
    scenes = [world.sample_scene(TRUE_SCENES + i, **fixed, **{role: name}) for i in range(SCENES)]
    seen = world.SEEN_SUBJECTS if role == "subject" else world.SEEN_STYLES
    drawn = plain if role == "style" else stretched
    own = [drawn(scene) for scene in scenes]

    def to(other: str) -> float:
        others = [
            drawn(replace(scene, subject=other) if role == "subject" else replace(scene, style=other))
            for scene in scenes
        ]
        return fmean(float(np.square(a - b).mean() ** 0.5) for a, b in zip(own, others, strict=True))

    return min(to(other) for other in seen if other != name)


def plain(scene: world.Scene) -> Float[np.ndarray, "h w 3"]:
    return world.render(scene)[0].astype(float)


def stretched(scene: world.Scene) -> Float[np.ndarray, "h w 3"]:
    """Return the box around a scene's subject, at the size of the whole picture."""
    pixels, mask = world.render(scene)
    down, across = (np.flatnonzero((mask > 0.5).any(axis=axis)) for axis in (1, 0))
    box = (int(across[0]), int(down[0]), int(across[-1]) + 1, int(down[-1]) + 1)
    return np.asarray(Image.fromarray(pixels).resize(pixels.shape[1::-1], box=box), float)


def trained(records: Iterable[Record], adapter: str) -> float | None:
    """Return how many numbers a method trains for one adapter."""
    counted = [r["measured"]["trained"] for r in records if r["kind"] == "train" and r["adapter"] == adapter]
    return fmean(counted) if counted else None


def against(records: Sequence[Record], row: str, baseline: str) -> dict[str, Estimate | None]:
    """Compare the row with the baseline on the pairs that both have: differences (row less baseline) and ratios of
    means."""
    found: dict[str, Estimate | None] = {}
    own, other = (_measures(records, who, ("both", "recognised", "named")) for who in (row, baseline))
    for name in own:
        pairs = sorted(own[name].keys() & other[name].keys())
        a, b = [own[name][pair] for pair in pairs], [other[name][pair] for pair in pairs]
        found[f"{name}_difference"] = estimate([x - y for x, y in zip(a, b, strict=True)]) if pairs else None
        found[f"{name}_ratio"] = ratio(a, b) if pairs else None
    return found


def _measures(records: Sequence[Record], row: str, names: Sequence[str]) -> dict[str, Pairs]:
    """These measures of a row by pair, and its crosstalk by either score."""
    found = {name: by_pair(records, row, name) for name in names}
    return found | {"crosstalk": crosstalk(records, row), "crosstalk_named": crosstalk(records, row, "p")}


ROUNDED = 7
"""Decimals of what the files say: where it is zero by construction, its order is that of rounding errors."""


def foretold(records: Sequence[Record], rows: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return measure of the files -> {"all": rank correlation with crosstalk over the pairs of all rows, row: the same
    within it, "points": [[row, value, crosstalk], ...]}. Rows with fewer than 4 pairs have none."""
    files: dict[str, dict[str, Pairs]] = {}
    for row in rows:
        for record in records:
            if record["kind"] == "pair" and record["row"] == row:
                for name, value in (record["measured"].get("files") or {}).items():
                    files.setdefault(name, {}).setdefault(row, {})
                    files[name][row].setdefault((record["subject"], record["style"]), round(value, ROUNDED))
    lost = {row: crosstalk(records, row) for row in rows}
    found: dict[str, dict[str, Any]] = {}
    for name, each in files.items():
        points = [
            [row, v, lost[row][pair]] for row, pairs in each.items() for pair, v in pairs.items() if pair in lost[row]
        ]
        found[name] = {"points": points, "all": rank_correlation(points)}
        found[name] |= {row: rank_correlation([p for p in points if p[0] == row]) for row in each}
    return found


def by_seed(records: Iterable[Record], row: str, measure: str) -> dict[int, float]:
    """A measure of a row's composed pairs in the mean over pairs, for every seed that all of the row's pairs have."""
    records = [r for r in records if r["kind"] == "pair" and r["row"] == row]
    pairs = by_pair(records, row, measure).keys()
    each = {
        seed: by_pair([r for r in records if r["seed"] == seed], row, measure) for seed in {r["seed"] for r in records}
    }
    return {seed: fmean(found.values()) for seed, found in sorted(each.items()) if found.keys() == pairs}


def agreement(records: Sequence[Record], rows: Sequence[str], measure: str) -> dict[str, float | None]:
    """Return "0 and 1" (two seeds) -> rank correlation of their measures over rows: 1 if both put all rows in the same
    order."""
    each = {row: by_seed(records, row, measure) for row in rows}
    seeds = sorted({seed for found in each.values() for seed in found})
    return {
        f"{a} and {b}": rank_correlation([[row, e[a], e[b]] for row, e in each.items() if a in e and b in e])
        for i, a in enumerate(seeds)
        for b in seeds[i + 1 :]
    }


def rank_correlation(points: Sequence[Sequence[Any]]) -> float | None:
    """Spearman's, of the second with the third of each point, ties at their mean rank; None for fewer than 4 points or
    if one side is constant."""
    if len(points) < 4:
        return None
    sides = [[point[i] for point in points] for i in (1, 2)]
    if any(len(set(side)) == 1 for side in sides):
        return None
    return float(spearmanr(*sides).statistic)


def as_json(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Estimates as [value, low, high]."""
    return {
        row: {
            name: [round(x, 4) for x in (value.value, value.low, value.high)] if isinstance(value, Estimate) else value
            for name, value in measures.items()
        }
        for row, measures in found.items()
    }
