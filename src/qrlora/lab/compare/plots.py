"""The bench's plots, as arrays of pixels: matplotlib without a window."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qrlora.lab.compare.identity import Record
from qrlora.lab.compare.plan import BASELINE, COMPOSED, DEFAULT
from qrlora.lab.compare.tables import Estimate, alone, distance
from qrlora.quality.search.search import frontier

COLOURS = {COMPOSED: "#15803d", DEFAULT: "#c2410c", BASELINE: "#1d4ed8"}
OTHER = "#6b7280"
FREEDOM = {"qrlora_published": "nothing", "q_cayley": "a rotation", "qrlora_trained": "all of Q"}
"""Method -> what of Q trains beside ΔR, least first."""


@dataclass(frozen=True)
class Plot:
    """name: of its file. said: how to read it."""

    name: str
    title: str
    said: str
    pixels: UInt8[np.ndarray, "h w 3"]


def _figure(height: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure((8.2, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _pixels(figure: Figure) -> UInt8[np.ndarray, "h w 3"]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def subject_against_style(found: Mapping[str, Mapping[str, Any]]) -> Plot:
    """Plot every row at its means, with its intervals, by a number explained beside the plot."""
    figure, axes = _figure(max(6, 0.16 * len(found)))
    order = sorted(found, key=lambda row: -found[row]["among_subject"].value - found[row]["among_style"].value)
    for number, row in enumerate(order, 1):
        x, y = found[row]["among_style"], found[row]["among_subject"]
        colour, strong = COLOURS.get(row, OTHER), row in COLOURS
        axes.errorbar(
            x.value, y.value, xerr=_around(x), yerr=_around(y), fmt="o", color=colour,
            elinewidth=1.2 if strong else 0.3, ms=7 if strong else 4,
        )  # fmt: skip
        axes.annotate(f"{number}", (x.value, y.value), (4, 3), textcoords="offset points", fontsize=8, color=colour)
        at = (1.02, 1 - number * min(0.04, 1 / len(order)))
        axes.annotate(f"{number}  {row}", at, xycoords="axes fraction", fontsize=7.5, color=colour)
    axes.set(
        xlabel="probability of the right style among the world's, composed",
        ylabel="probability of the right subject, composed",
    )
    said = "Up and to the right is better. Lines are 95 % intervals over pairs."
    return Plot("subject-against-style", "Subject against style", said, _pixels(figure))


def _around(estimate: Estimate) -> list[list[float]]:
    """An interval as matplotlib wants it: how far below and above."""
    return [[estimate.value - estimate.low], [estimate.high - estimate.value]]


def crosstalk_bars(found: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """Plot the crosstalk of each row."""
    rows = sorted((r for r in found if found[r]["crosstalk"]), key=lambda r: -found[r]["crosstalk"].value)
    if not rows:
        return None
    figure, axes = _figure(1.2 + 0.26 * len(rows))
    each = [found[row]["crosstalk"] for row in rows]
    spread = [[e.value - e.low for e in each], [e.high - e.value for e in each]]
    values = [e.value for e in each]
    axes.barh(rows, values, xerr=spread, color=[COLOURS.get(row, OTHER) for row in rows], error_kw={"elinewidth": 1})
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("probability alone less probability composed, mean of subject and style")
    said = "Shorter is better; below zero, composing helped. Lines are 95 % intervals over pairs."
    return Plot("crosstalk", "Crosstalk", said, _pixels(figure))


def across_weights(records: Sequence[Record]) -> Plot | None:
    """The frontier of each row that has a grid: mean over its pairs at every two weights."""
    points: dict[str, dict[tuple[float, float], list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["kind"] == "grid":
            for point in record["measured"]["points"]:
                points[record["row"]][tuple(point["weights"])].append((point["among_style"], point["among_subject"]))
    if not points:
        return None
    figure, axes = _figure(5.4)
    for row, each in points.items():
        means = {w: (fmean(p[0] for p in found), fmean(p[1] for p in found)) for w, found in each.items()}
        reached = list(means.values())
        edge = [reached[i] for i in reversed(frontier(reached))]
        across, up = zip(*reached, strict=True)
        axes.scatter(across, up, s=12, alpha=0.5, color=COLOURS.get(row, OTHER))
        across, up = zip(*edge, strict=True)
        axes.step(across, up, where="pre", color=COLOURS.get(row, OTHER), label=row)
    axes.set(xlabel="probability of the right style among the world's", ylabel="probability of the right subject")
    axes.legend(fontsize=8)
    count = len({(r["subject"], r["style"]) for r in records if r["kind"] == "grid"})
    said = f"Every point is one choice of both weights, in the mean over {count} pairs; the line joins what none beats."
    return Plot("frontier", "The frontier over weights", said, _pixels(figure))


def with_many(records: Sequence[Record]) -> Plot | None:
    """Plot both recognised, and drift, against the number of composed adapters."""
    found: dict[str, dict[int, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record["kind"] == "many":
            found[record["row"]][record["many"]].append((record["measured"]["recognised"], record["measured"]["drift"]))
    if not found:
        return None
    figure = Figure((8.2, 3.8), dpi=110, layout="constrained")
    titles = ("both recognised", "drift of other pictures, levels of 255")
    for place, title in enumerate(titles):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.spines[["top", "right"]].set_visible(False)
        for row, each in found.items():
            counts = sorted(each)
            means = [fmean(pair[place] for pair in each[count]) for count in counts]
            shade = {"color": COLOURS[row], "linewidth": 2.2} if row in COLOURS else {"linewidth": 1}
            axes.plot(counts, means, marker="o", ms=4, label=row, **shade)
        axes.set(xlabel="adapters composed", title=title, xticks=counts)
        axes.title.set_fontsize(9)
    axes.legend(fontsize=7)
    said = "Half are subjects, half styles, each with a trigger of its own, each pair at its weights."
    return Plot("many", "Two, four and eight adapters at once", said, _pixels(figure))


def freedom(records: Sequence[Record]) -> Plot | None:
    """Plot the score of each part alone against its distance from seen parts, by how much of Q trains.

    None unless two methods of FREEDOM were measured.
    """
    found = {
        role: {method: each for method in FREEDOM if (each := alone(records, method, role, "named"))}
        for role in ("subject", "style")
    }
    if any(len(each) < 2 for each in found.values()):
        return None
    figure = Figure((8.2, 3.8), dpi=110, layout="constrained")
    for place, (role, methods) in enumerate(found.items()):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.spines[["top", "right"]].set_visible(False)
        for method, each in methods.items():
            points = sorted((distance(role, name), value) for name, value in each.items())
            axes.plot(*zip(*points, strict=True), marker="o", ms=4, linewidth=1, label=FREEDOM[method])
        names = next(iter(methods.values()))
        axes.set(xlabel="distance from the nearest seen part", title=f"{role}: probability that both are named, alone")
        for name in names:
            axes.annotate(
                name, (distance(role, name), 0.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=7,
                ha="center", color=OTHER,
            )  # fmt: skip
        axes.title.set_fontsize(9)
        axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, title="trained beside ΔR", title_fontsize=7)
    said = (
        "Distance: root mean square difference, in levels of 255, of renders that show the part and of the same scenes "
        "with the nearest seen part in its place. Every part is one point, in the mean over seeds."
    )
    return Plot("freedom", "How much of Q to free, against how far the part is from the base", said, _pixels(figure))


def foretelling(told: Mapping[str, Mapping[str, Any]]) -> Plot | None:
    """Crosstalk of every pair against the cosine of its two ΔW."""
    if "cosine" not in told or not told["cosine"]["points"]:
        return None
    cosine = told["cosine"]
    figure, axes = _figure()
    rows = list(dict.fromkeys(point[0] for point in cosine["points"]))
    other = itertools.cycle(colormaps["tab20"].colors[1:])  # type: ignore[attr-defined]  # the first is like lora's
    for row in rows:
        points = [(p[1], p[2]) for p in cosine["points"] if p[0] == row]
        correlation = cosine.get(row)
        colour = COLOURS.get(row) or (OTHER if correlation is None else next(other))
        label = row if correlation is None else f"{row}: {correlation:+.2f}"
        across, up = zip(*points, strict=True)
        axes.scatter(across, up, s=12, label=label, color=colour)
    axes.set(xlabel="cosine of the two ΔW, from the files", ylabel="crosstalk, from the pictures")
    figure.legend(loc="outside right upper", fontsize=7, title="rank correlation within", title_fontsize=7)
    whole = cosine["all"]
    said = "" if whole is None else f"Rank correlation over all pairs of all methods: {whole:+.2f}. "
    others = ", ".join(f"{n} {e['all']:+.2f}" for n, e in told.items() if n != "cosine" and e["all"] is not None)
    return Plot(
        "foretold", "What the files foretell", f"{said}Of other measures of the files: {others}.", _pixels(figure)
    )
