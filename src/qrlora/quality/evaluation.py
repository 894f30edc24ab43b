"""Evaluation of groups of pictures by metrics and a brand sheet, with its report, JSON and CSV.

found = evaluate({"pictures": pictures}, references, select_metrics(None, pictures, references), sheet)
report(found).write(Path("evaluation"))
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.metrics.copies import COPY_THRESHOLD
from qrlora.quality.metrics.shares import Share
from qrlora.quality.metrics.table import METRICS, Metric, References, compute_metrics
from qrlora.quality.report import Block, Figure, Figures, Gallery, Picture, Prose, Report, Section, Table

if TYPE_CHECKING:
    from qrlora.quality.brand import BrandSheet, Verdict
    from qrlora.quality.metrics.learned import FeatureNetworks

THUMBNAIL = 256
"""Longest side in pixels of a picture in the report."""

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Summary:
    """Mean, minimum and maximum of a metric over the n pictures of a group that have it."""

    mean: float
    lowest: float
    highest: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.lowest:.3f} to {self.highest:.3f})"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of an evaluation."""

    groups: Mapping[str, Sequence[MeasuredPicture]]
    references: References
    metrics: Sequence[Metric]
    rows: Mapping[str, Sequence[Row]]
    sheet: BrandSheet | None = None
    verdicts: Mapping[str, Sequence[Verdict]] | None = None

    def summary(self, group: str, name: str) -> Summary | None:
        """Return the summary of a metric over a group; None if no picture has it."""
        values = [value for row in self.rows[group] if (value := row[name]) is not None]
        return Summary(float(np.mean(values)), min(values), max(values), len(values)) if values else None

    def passing(self, group: str) -> tuple[Share, bool] | None:
        """Return the share of the group that passes the sheet, and whether the group passes; None without a sheet."""
        if self.sheet is None or self.verdicts is None:
            return None
        return self.sheet.passing(self.verdicts[group])

    @property
    def passes(self) -> bool:
        """Return True if every group passes its brand sheet; without a sheet, every group does."""
        return all(found is None or found[1] for found in map(self.passing, self.groups))

    def copies(self, group: str) -> list[str]:
        """Return the names of the pictures that score as copies of a training picture."""
        pairs = zip(self.groups[group], self.rows[group], strict=True)
        return [picture.name for picture, row in pairs if (row.get("copied") or 0.0) >= COPY_THRESHOLD]

    def data(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        return {
            "metrics": {one.name: _facts(one) for one in self.metrics},
            "groups": {name: self._group(name) for name in self.groups},
            "brand": self.sheet.model_dump(mode="json", exclude={"logo"}) if self.sheet else None,
            "passes": self.passes if self.sheet else None,
        }

    def _group(self, group: str) -> dict[str, Any]:
        spreads = {one.name: self.summary(group, one.name) for one in self.metrics}
        found: dict[str, Any] = {
            "summary": {name: vars(spread) if spread else None for name, spread in spreads.items()},
            "copies": self.copies(group),
            "pictures": [
                {"name": picture.name, "prompt": picture.prompt, "metrics": dict(row)}
                for picture, row in zip(self.groups[group], self.rows[group], strict=True)
            ],
        }
        together = self.passing(group)
        if together and self.verdicts:
            share, enough = together
            for picture, verdict in zip(found["pictures"], self.verdicts[group], strict=True):
                picture["brand"] = verdict.to_dict()
            interval = list(share.interval)
            found["brand"] = {"passing": share.right, "n": share.n, "interval": interval, "passes": enough}
        return found

    def csv(self) -> str:
        """Return one row for each picture: group, name, prompt, metrics, and with a sheet the verdict and its
        reasons."""
        stream = io.StringIO()
        writer = csv.writer(stream)
        names = [one.name for one in self.metrics]
        writer.writerow(["group", "picture", "prompt", *names, *(["passes", "reasons"] if self.verdicts else [])])
        for group, pictures in self.groups.items():
            for i, picture in enumerate(pictures):
                values = ["" if (value := self.rows[group][i][name]) is None else repr(value) for name in names]
                line = [group, picture.name, picture.prompt, *values]
                if self.verdicts:
                    verdict = self.verdicts[group][i]
                    line += ["yes" if verdict.passes else "no", "; ".join(verdict.reasons)]
                writer.writerow(line)
        return stream.getvalue()


def evaluate(
    groups: Mapping[str, Sequence[MeasuredPicture]],
    references: References,
    metrics: Sequence[Metric],
    sheet: BrandSheet | None = None,
    networks: FeatureNetworks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Compute the metrics of every picture, and apply the brand sheet if given.

    Raises:
        ModelError: a network's weights are missing.
    """
    everything = [picture for pictures in groups.values() for picture in pictures]
    rows = iter(compute_metrics(everything, references, metrics, networks, progress))
    by_group = {name: [next(rows) for _ in pictures] for name, pictures in groups.items()}
    verdicts = None
    if sheet:
        verdicts = {
            name: [sheet.check(picture, row) for picture, row in zip(pictures, by_group[name], strict=True)]
            for name, pictures in groups.items()
        }
    return Evaluation(groups, references, metrics, by_group, sheet, verdicts)


def _facts(one: Metric) -> dict[str, Any]:
    needs = {"description": one.description, "needs": list(one.needs), "better": one.better, "unit": one.unit}
    return needs | {"range": list(one.bounds), "source": one.source, "network": one.network or None}


def thumbnail(picture: MeasuredPicture, caption: str = "", marks: Sequence[tuple[str, bool]] = ()) -> Picture:
    """Return the picture as a block of a report, reduced to THUMBNAIL pixels."""
    image = picture.image
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return Picture(np.asarray(image), picture.prompt or picture.name, caption, marks)


def report(found: Evaluation) -> Report:
    """Make the report of an evaluation."""
    count = sum(map(len, found.groups.values()))
    subtitle = f"{count} pictures" + (f" in {len(found.groups)} groups" if len(found.groups) > 1 else "")
    subtitle += f", {len(found.metrics)} metrics" + (f", and the sheet of {_brand(found)}" if found.sheet else "")
    sections = [_opening(found), _numbers(found)]
    sections += [_reasons(found)] if found.sheet else []
    sections += [_pictures(found, name) for name in found.groups]
    return Report(
        title="Evaluation of pictures",
        subtitle=subtitle + ".",
        sections=[*sections, _descriptions(found)],
        data=found.data(),
        footer="Written by qrlora evaluate. All numbers are in report.json, a row for each picture in pictures.csv.",
    )


def _brand(found: Evaluation) -> str:
    return (found.sheet.name if found.sheet else "") or "the brand"


def _opening(found: Evaluation) -> Section:
    figures = []
    for name in found.groups:
        together = found.passing(name)
        if together:
            share, enough = together
            tone = "good" if enough else "bad"
            figures.append(Figure(f"{100 * share.value:.0f}%", f"{name}: passes the brand sheet", str(share), tone))
        if found.references.training:
            copies = len(found.copies(name))
            note = f"edge agreement with a training picture of at least {COPY_THRESHOLD:g}"
            figures.append(Figure(str(copies), f"{name}: copies", note, "bad" if copies else "good"))
    blocks: list[Block] = [Figures(figures)] if figures else []
    given = [
        thumbnail(one, f"{kind}: {one.name}")
        for kind in ("subject", "style", "training")
        for one in getattr(found.references, kind)[:8]
    ]
    blocks += [Prose(["References:"]), Gallery(given)] if given else []
    return Section("", blocks)


def _numbers(found: Evaluation) -> Section:
    header = ["metric", "better", *(f"{name}: mean (lowest to highest)" for name in found.groups)]
    rows = []
    for one in found.metrics:
        summaries = [found.summary(name, one.name) for name in found.groups]
        cells = [f"{summary}, n = {summary.n}" if summary else None for summary in summaries]
        rows.append([one.name + (f", {one.unit}" if one.unit else ""), one.better, *cells])
    return Section("Numbers", [Table(header, rows)])


def _reasons(found: Evaluation) -> Section:
    assert found.sheet is not None and found.verdicts is not None
    rows: list[list[str | Share | None]] = []
    for name in found.groups:
        together = found.passing(name)
        assert together is not None
        share, enough = together
        rows.append([name, share, "passes" if enough else "fails"])
    required = f"required: {100 * found.sheet.composition.passing:.3g}% of the pictures"
    blocks: list[Block] = [Table(["group", "pictures that pass", required], rows)]
    listed = [
        f"{name}, {picture.name}: {'; '.join(verdict.reasons)}"
        for name in found.groups
        for picture, verdict in zip(found.groups[name], found.verdicts[name], strict=True)
        if not verdict.passes
    ]
    blocks += [Prose(listed, "bad", listed=True)] if listed else [Prose(["Every picture passes."], "good")]
    return Section(f"The sheet of {_brand(found)}", blocks)


def _pictures(found: Evaluation, group: str) -> Section:
    copies, shown = set(found.copies(group)), []
    for i, picture in enumerate(found.groups[group]):
        marks: list[tuple[str, bool]] = []
        if found.verdicts:
            verdict = found.verdicts[group][i]
            marks = [(check.rule, False) for check in verdict.checks if not check.passes] or [("brand", True)]
        marks += [("a copy", False)] if picture.name in copies else []
        shown.append(thumbnail(picture, picture.name, marks))
    return Section(group, [Gallery(shown)])


def _descriptions(found: Evaluation) -> Section:
    rows = [[name, m.description, m.better, f"{m.bounds[0]:g} to {m.bounds[1]:g} {m.unit}".strip(), m.source]
            for name, m in METRICS.items() if m in found.metrics]  # fmt: skip
    note = (
        "Metrics that compare place by place (edges, structure, lpips) fall when a subject moves; networks are blind "
        "to small print and logos. None replaces looking at the pictures."
    )
    return Section("Metrics", [Table(["metric", "description", "better", "range", "source"], rows, note)])
