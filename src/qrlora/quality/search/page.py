"""What tuning found, as a page: the frontier as a plot, as pictures, and as commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrlora.quality.assessment import thumbnail
from qrlora.quality.images.read import Exhibit
from qrlora.quality.report import Code, Figure, Figures, Matrix, Picture, Prose, Report, Section, Table
from qrlora.quality.search.search import FIRST, Found, Scores, Tried

COLUMNS = 6
"""Pictures of each point on the page."""


@dataclass(frozen=True, eq=False)
class Tuning:
    """A search that is done.

    dials: what each weight turns. aims: what the two scores are, in words. pictures: of each point of the frontier, in
    its order, those of the second look. commands: of each point, what makes it. made: pictures made in this run.
    """

    found: Found
    dials: Sequence[str]
    aims: tuple[str, str]
    pictures: Sequence[Sequence[Exhibit]]
    commands: Sequence[str]
    made: int
    settings: Mapping[str, Any]

    def data(self) -> dict[str, Any]:
        """JSON values."""
        front = {id(one): i for i, one in enumerate(self.found.frontier)}
        confirmed = sorted(self.found.confirmed, key=lambda one: one.mean, reverse=True)
        return {
            "settings": dict(self.settings),
            "dials": list(self.dials),
            "aims": {"subject": self.aims[0], "style": self.aims[1]},
            "points": len(self.found.tried),
            "pictures": sum(len(one.first) + len(one.again) for one in self.found.tried),
            "made": self.made,
            "confirmed": [_facts(one) | {"frontier": id(one) in front} for one in confirmed],
            "frontier": [
                _facts(one) | {"command": command, "balanced": one is self.found.balanced}
                for one, command in zip(self.found.frontier, self.commands, strict=True)
            ],
            "tried": [{"weights": list(one.weights), "guess": list(one.guess)} for one in self.found.tried],
        }


def _facts(one: Tried) -> dict[str, Any]:
    errors = [None if np.isnan(value) else value for value in one.error]
    return {"weights": list(one.weights), "mean": list(one.mean), "error": errors, "pictures": len(one.again)}


def named(tuning: Tuning, one: Tried) -> str:
    """A point by its weights: teapot 0.9, chalk 0.7."""
    return ", ".join(f"{dial} {weight:g}" for dial, weight in zip(tuning.dials, one.weights, strict=True))


def lines(tuning: Tuning) -> list[str]:
    """The frontier for people, line by line."""
    said = []
    for i, one in enumerate(tuning.found.frontier):
        balanced = "  (balanced)" if one is tuning.found.balanced else ""
        said.append(f"{i + 1}: {named(tuning, one)}: subject {_pm(one, 0)}, style {_pm(one, 1)}{balanced}")
        said.append(f"   {tuning.commands[i]}")
    return said


def _pm(one: Tried, side: int) -> str:
    error = "" if np.isnan(one.error[side]) else f" ± {one.error[side]:.3f}"
    return f"{one.mean[side]:.3f}{error}"


def report(tuning: Tuning) -> Report:
    """The page and its data."""
    found, data = tuning.found, tuning.data()
    figures = [
        Figure(
            str(len(found.frontier)), "points on the frontier", f"of {len(found.confirmed)} that were looked at twice"
        ),
        Figure(str(len(found.tried)), "points tried", f"each with {FIRST} pictures at first"),
        Figure(str(data["pictures"]), "pictures", f"{tuning.made} of them made in this run"),
    ]
    explained = (
        f"Subject: {tuning.aims[0]}. Style: {tuning.aims[1]}. More is better in both. No point of the frontier is "
        "beaten by another in both; which one to take is for the eye to say. ± is one standard error over the "
        "pictures: points that lie closer than that are not told apart."
    )
    shown = min(COLUMNS, len(found.confirmed[0].again))
    cells = [[thumbnail(one) for one in row[:shown]] for row in tuning.pictures]
    first = tuning.pictures[0][:shown]
    several = len({one.prompt for one in first}) > 1
    columns = [f"{one.prompt}, {one.name}" if several else one.name for one in first]
    rows = [f"{i + 1}" + (" balanced" if one is found.balanced else "") for i, one in enumerate(found.frontier)]
    table = [
        [str(i + 1), *(f"{weight:g}" for weight in one.weights), _pm(one, 0), _pm(one, 1)]
        for i, one in enumerate(found.frontier)
    ]
    return Report(
        title="What the weights trade",
        subtitle=f"{' and '.join(tuning.dials)}: subject against style, over {data['pictures']} pictures.",
        sections=[
            Section("", [Figures(figures), Prose([explained])]),
            Section("The frontier", [Picture(_plot(tuning), "subject score against style score of all points"),
                                     Table(["point", *tuning.dials, "subject score", "style score"], table)]),
            Section("Its pictures", [Matrix(rows, columns, cells, "point")],
                    "The same prompts and seeds in every row, none of them used by the search."),
            Section("To go on with", [Code("\n".join(tuning.commands))]),
        ],
        data=data,
        footer="Written by qrlora tune. All points that were tried are in report.json.",
    )  # fmt: skip


def _plot(tuning: Tuning) -> np.ndarray:
    """(h, w, 3) uint8: all guesses in pale grey, second looks with their errors, the frontier as a numbered line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(9, 5), layout="constrained")
    axes = plot.subplots()
    axes.scatter(*_columns([one.guess for one in tuning.found.tried]), s=14, color="0.75", label="tried")
    again = tuning.found.confirmed
    errors = np.nan_to_num(np.array([one.error for one in again])).T
    axes.errorbar(*_columns([one.mean for one in again]), errors[1], errors[0], "o", color="0.45", lw=1, label="again")
    front = tuning.found.frontier
    axes.plot(*_columns([one.mean for one in front]), "o-", color="#3454d1", label="frontier")
    for i, one in enumerate(front):
        axes.annotate(str(i + 1), one.mean, xytext=(7, 7), textcoords="offset points", color="#3454d1", weight="bold")
    axes.set(xlabel=f"subject: {tuning.aims[0]}", ylabel=f"style: {tuning.aims[1]}")
    axes.legend(loc="best", frameon=False)
    axes.grid(alpha=0.25)
    plot.set_dpi(120)
    canvas = FigureCanvasAgg(plot)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _columns(points: Sequence[Scores]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def command(parts: Sequence[tuple[str, float]], prompt: str, model: str, null_space: float = 0.0) -> str:
    """The command that makes a picture at these weights and this strength of null-space projection."""
    adapters = " ".join(f"--adapter {shlex.quote(f'{path}:{weight:g}')}" for path, weight in parts)
    base = "" if model == "pico" else f" --model {shlex.quote(model)}"
    adapters += f" --null-space {null_space:g}" if len(parts) > 1 else ""  # also 0, which may not be the default
    return f"qrlora generate {adapters} --prompt {shlex.quote(prompt)}{base}"
