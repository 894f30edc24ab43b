"""The report of `qrlora tune`: the frontier as a plot, as pictures, and as commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qrlora.quality.evaluation import thumbnail
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.report import Code, Figure, Figures, Matrix, Picture, Prose, Report, Section, Table
from qrlora.quality.search.search import SEARCH_SAMPLES, Candidate, Scores, SearchResult

COLUMNS = 6
"""Pictures of each point on the page."""


@dataclass(frozen=True, eq=False)
class TuningResult:
    """A finished search with what its report shows.

    Attributes:
        parameters: names of the weights.
        objectives: descriptions of the subject score and of the style score.
        pictures: for each point of the frontier, the samples of its confirmation.
        commands: for each point of the frontier, the command that samples there.
        sampled: number of pictures sampled in this run; the others were in the cache.
    """

    result: SearchResult
    parameters: Sequence[str]
    objectives: tuple[str, str]
    pictures: Sequence[Sequence[MeasuredPicture]]
    commands: Sequence[str]
    sampled: int
    settings: Mapping[str, Any]

    def data(self) -> dict[str, Any]:
        """Return JSON values."""
        front = {id(one): i for i, one in enumerate(self.result.frontier)}
        confirmed = sorted(self.result.confirmed, key=lambda one: one.mean, reverse=True)
        return {
            "settings": dict(self.settings),
            "parameters": list(self.parameters),
            "objectives": {"subject": self.objectives[0], "style": self.objectives[1]},
            "points": len(self.result.candidates),
            "pictures": sum(len(one.search_scores) + len(one.confirmation_scores) for one in self.result.candidates),
            "sampled": self.sampled,
            "confirmed": [_facts(one) | {"frontier": id(one) in front} for one in confirmed],
            "frontier": [
                _facts(one) | {"command": command, "balanced": one is self.result.balanced}
                for one, command in zip(self.result.frontier, self.commands, strict=True)
            ],
            "candidates": [
                {"weights": list(one.weights), "mean": list(one.search_mean)} for one in self.result.candidates
            ],
        }


def _facts(one: Candidate) -> dict[str, Any]:
    errors = [None if np.isnan(value) else value for value in one.error]
    return {
        "weights": list(one.weights),
        "mean": list(one.mean),
        "error": errors,
        "pictures": len(one.confirmation_scores),
    }


def weights_text(tuned: TuningResult, one: Candidate) -> str:
    """Return the weights of a candidate as text: teapot 0.9, chalk 0.7."""
    return ", ".join(f"{name} {weight:g}" for name, weight in zip(tuned.parameters, one.weights, strict=True))


def lines(tuned: TuningResult) -> list[str]:
    """Return the frontier as lines of text for a terminal."""
    text = []
    for i, one in enumerate(tuned.result.frontier):
        balanced = "  (balanced)" if one is tuned.result.balanced else ""
        text.append(
            f"{i + 1}: {weights_text(tuned, one)}: subject {_score_text(one, 0)}, style {_score_text(one, 1)}{balanced}"
        )
        text.append(f"   {tuned.commands[i]}")
    return text


def _score_text(one: Candidate, side: int) -> str:
    error = "" if np.isnan(one.error[side]) else f" ± {one.error[side]:.3f}"
    return f"{one.mean[side]:.3f}{error}"


def report(tuned: TuningResult) -> Report:
    """Make the report of a search."""
    result, data = tuned.result, tuned.data()
    figures = [
        Figure(str(len(result.frontier)), "points on the frontier", f"of {len(result.confirmed)} that were confirmed"),
        Figure(str(len(result.candidates)), "points searched", f"{SEARCH_SAMPLES} pictures each"),
        Figure(str(data["pictures"]), "pictures", f"{tuned.sampled} of them sampled in this run"),
    ]
    explained = (
        f"Subject score: {tuned.objectives[0]}. Style score: {tuned.objectives[1]}. Higher is better in both. A point "
        "is on the frontier if no other is better in one score and at least as good in the other; choosing among them "
        "is up to you. ± is one standard error over the pictures: points closer than that are not distinguishable."
    )
    shown = min(COLUMNS, len(result.confirmed[0].confirmation_scores))
    cells = [[thumbnail(one) for one in row[:shown]] for row in tuned.pictures]
    first = tuned.pictures[0][:shown]
    several = len({one.prompt for one in first}) > 1
    columns = [f"{one.prompt}, {one.name}" if several else one.name for one in first]
    rows = [f"{i + 1}" + (" balanced" if one is result.balanced else "") for i, one in enumerate(result.frontier)]
    table = [
        [str(i + 1), *(f"{weight:g}" for weight in one.weights), _score_text(one, 0), _score_text(one, 1)]
        for i, one in enumerate(result.frontier)
    ]
    return Report(
        title="Trade-off between subject and style",
        subtitle=f"{' and '.join(tuned.parameters)}: over {data['pictures']} pictures.",
        sections=[
            Section("", [Figures(figures), Prose([explained])]),
            Section("The frontier", [Picture(_plot(tuned), "style score over subject score of all points"),
                                     Table(["point", *tuned.parameters, "subject score", "style score"], table)]),
            Section("Pictures", [Matrix(rows, columns, cells, "point")],
                    "The same prompts and seeds in every row; the search used none of them."),
            Section("Commands", [Code("\n".join(tuned.commands))]),
        ],
        data=data,
        footer="Written by qrlora tune. All points are in report.json.",
    )  # fmt: skip


def _plot(tuned: TuningResult) -> np.ndarray:
    """(h, w, 3) uint8: all points in pale grey, confirmed ones with error bars, the frontier as a numbered line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(9, 5), layout="constrained")
    axes = plot.subplots()
    axes.scatter(*_columns([one.search_mean for one in tuned.result.candidates]), s=14, color="0.75", label="searched")
    confirmed = tuned.result.confirmed
    errors = np.nan_to_num(np.array([one.error for one in confirmed])).T
    axes.errorbar(
        *_columns([one.mean for one in confirmed]), errors[1], errors[0], "o", color="0.45", lw=1, label="confirmed"
    )
    front = tuned.result.frontier
    axes.plot(*_columns([one.mean for one in front]), "o-", color="#3454d1", label="frontier")
    for i, one in enumerate(front):
        axes.annotate(str(i + 1), one.mean, xytext=(7, 7), textcoords="offset points", color="#3454d1", weight="bold")
    axes.set(xlabel=f"subject: {tuned.objectives[0]}", ylabel=f"style: {tuned.objectives[1]}")
    axes.legend(loc="best", frameon=False)
    axes.grid(alpha=0.25)
    plot.set_dpi(120)
    canvas = FigureCanvasAgg(plot)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _columns(points: Sequence[Scores]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def command(parts: Sequence[tuple[str, float]], prompt: str, model: str, null_space: float = 0.0) -> str:
    """Return the `qrlora generate` command that samples at these weights and this null-space strength."""
    adapters = " ".join(f"--adapter {shlex.quote(f'{path}:{weight:g}')}" for path, weight in parts)
    base = "" if model == "pico" else f" --model {shlex.quote(model)}"
    adapters += f" --null-space {null_space:g}" if len(parts) > 1 else ""  # also 0, which may not be the default
    return f"qrlora generate {adapters} --prompt {shlex.quote(prompt)}{base}"
