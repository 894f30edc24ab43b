"""Groups of pictures measured and judged: the numbers, as JSON, as CSV, and as a page.

found = assess({"pictures": pictures}, references, chosen(None, pictures, references), sheet)
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

from qrlora.quality.images.read import Exhibit
from qrlora.quality.metrics.copies import LIMIT
from qrlora.quality.metrics.shares import Share
from qrlora.quality.metrics.table import MEASURES, Measure, References, measure
from qrlora.quality.report import Block, Figure, Figures, Gallery, Picture, Prose, Report, Section, Table

if TYPE_CHECKING:
    from qrlora.quality.brand import Sheet, Verdict
    from qrlora.quality.metrics.learned import Eyes

THUMBNAIL = 256
"""Longest side in pixels of a picture on the page."""

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Spread:
    """Mean, lowest and highest of a measure over a group, and over how many of its pictures."""

    mean: float
    lowest: float
    highest: float
    n: int


@dataclass(frozen=True, eq=False)
class Assessment:
    """What was found. rows and verdicts: by group, a picture an entry, in the order of its pictures."""

    groups: Mapping[str, Sequence[Exhibit]]
    references: References
    measures: Sequence[Measure]
    rows: Mapping[str, Sequence[Row]]
    sheet: Sheet | None = None
    verdicts: Mapping[str, Sequence[Verdict]] | None = None

    def spread(self, group: str, name: str) -> Spread | None:
        """Of one measure; None if no picture of the group has it."""
        values = [value for row in self.rows[group] if (value := row[name]) is not None]
        return Spread(float(np.mean(values)), min(values), max(values), len(values)) if values else None

    def passing(self, group: str) -> tuple[Share, bool] | None:
        """The share of the group's pictures that the sheet passes, and whether that is enough; None without a sheet."""
        if self.sheet is None or self.verdicts is None:
            return None
        return self.sheet.together(self.verdicts[group])

    @property
    def passes(self) -> bool:
        """Every group passes, or nothing was asked."""
        return all(found is None or found[1] for found in map(self.passing, self.groups))

    def copies(self, group: str) -> list[str]:
        """Names of the pictures that count as copies of a training picture."""
        pairs = zip(self.groups[group], self.rows[group], strict=True)
        return [picture.name for picture, row in pairs if (row.get("copied") or 0.0) >= LIMIT]

    def data(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        return {
            "measures": {one.name: _facts(one) for one in self.measures},
            "groups": {name: self._group(name) for name in self.groups},
            "brand": self.sheet.model_dump(mode="json", exclude={"logo"}) if self.sheet else None,
            "passes": self.passes if self.sheet else None,
        }

    def _group(self, group: str) -> dict[str, Any]:
        spreads = {one.name: self.spread(group, one.name) for one in self.measures}
        found: dict[str, Any] = {
            "summary": {name: vars(spread) if spread else None for name, spread in spreads.items()},
            "copies": self.copies(group),
            "pictures": [
                {"name": picture.name, "prompt": picture.prompt, "measures": dict(row)}
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
        """A line a picture: group, name, prompt, the measures, and with a sheet the verdict and its reasons."""
        stream = io.StringIO()
        writer = csv.writer(stream)
        names = [one.name for one in self.measures]
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


def assess(
    groups: Mapping[str, Sequence[Exhibit]],
    references: References,
    measures: Sequence[Measure],
    sheet: Sheet | None = None,
    eyes: Eyes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Assessment:
    """Measure every picture of every group, and judge it by the sheet if there is one.

    Raises:
        ModelError: a network's weights are missing.
    """
    everything = [picture for pictures in groups.values() for picture in pictures]
    rows = iter(measure(everything, references, measures, eyes, progress))
    by_group = {name: [next(rows) for _ in pictures] for name, pictures in groups.items()}
    verdicts = None
    if sheet:
        verdicts = {
            name: [sheet.judge(picture, row) for picture, row in zip(pictures, by_group[name], strict=True)]
            for name, pictures in groups.items()
        }
    return Assessment(groups, references, measures, by_group, sheet, verdicts)


def _facts(one: Measure) -> dict[str, Any]:
    needs = {"about": one.about, "needs": list(one.needs), "better": one.better, "unit": one.unit}
    return needs | {"range": list(one.bounds), "source": one.source, "network": one.model or None}


def thumbnail(picture: Exhibit, caption: str = "", marks: Sequence[tuple[str, bool]] = ()) -> Picture:
    """For a page: no larger than it is shown."""
    image = picture.image
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    return Picture(np.asarray(image), picture.prompt or picture.name, caption, marks)


def report(found: Assessment) -> Report:
    """The page and its data."""
    count = sum(map(len, found.groups.values()))
    subtitle = f"{count} pictures" + (f" in {len(found.groups)} groups" if len(found.groups) > 1 else "")
    subtitle += f", {len(found.measures)} measures" + (f", and the sheet of {_brand(found)}" if found.sheet else "")
    sections = [_opening(found), _numbers(found)]
    sections += [_reasons(found)] if found.sheet else []
    sections += [_pictures(found, name) for name in found.groups]
    return Report(
        title="What the pictures show",
        subtitle=subtitle + ".",
        sections=[*sections, _meaning(found)],
        data=found.data(),
        footer="Written by qrlora evaluate. Beside this page: all numbers in report.json, a line a picture in "
        "pictures.csv.",
    )


def _brand(found: Assessment) -> str:
    return (found.sheet.name if found.sheet else "") or "the brand"


def _opening(found: Assessment) -> Section:
    figures = []
    for name in found.groups:
        together = found.passing(name)
        if together:
            share, enough = together
            low, high = share.interval
            note = f"{share.right} of {share.n}, 95% interval {100 * low:.0f} to {100 * high:.0f}%"
            tone = "good" if enough else "bad"
            figures.append(Figure(f"{100 * share.value:.0f}%", f"{name}: keeps to the brand sheet", note, tone))
        if found.references.training:
            copies = len(found.copies(name))
            note = f"edges coincide with a training picture's by {LIMIT:g} and more"
            figures.append(Figure(str(copies), f"{name}: copies", note, "bad" if copies else "good"))
    blocks: list[Block] = [Figures(figures)] if figures else []
    given = [
        thumbnail(one, f"{kind}: {one.name}")
        for kind in ("subject", "style", "training")
        for one in getattr(found.references, kind)[:8]
    ]
    blocks += [Prose(["Held against:"]), Gallery(given)] if given else []
    return Section("", blocks)


def _numbers(found: Assessment) -> Section:
    header = ["measure", "better", *(f"{name}: mean (lowest to highest)" for name in found.groups)]
    rows = []
    for one in found.measures:
        cells = [_cell(found.spread(name, one.name)) for name in found.groups]
        rows.append([one.name + (f", {one.unit}" if one.unit else ""), one.better, *cells])
    return Section("Numbers", [Table(header, rows)])


def _cell(spread: Spread | None) -> str | None:
    if spread is None:
        return None
    return f"{spread.mean:.3f} ({spread.lowest:.3f} to {spread.highest:.3f}), n = {spread.n}"


def _reasons(found: Assessment) -> Section:
    assert found.sheet is not None and found.verdicts is not None
    rows: list[list[str | Share | None]] = []
    for name in found.groups:
        together = found.passing(name)
        assert together is not None
        share, enough = together
        rows.append([name, share, "passes" if enough else "fails"])
    asked = f"asked: {100 * found.sheet.composition.passing:.3g}% of the pictures"
    blocks: list[Block] = [Table(["group", "pictures that pass", asked], rows)]
    listed = [
        f"{name}, {picture.name}: {'; '.join(verdict.reasons)}"
        for name in found.groups
        for picture, verdict in zip(found.groups[name], found.verdicts[name], strict=True)
        if not verdict.passes
    ]
    blocks += [Prose(listed, "bad", listed=True)] if listed else [Prose(["Every picture passes."], "good")]
    return Section(f"The sheet of {_brand(found)}", blocks)


def _pictures(found: Assessment, group: str) -> Section:
    copies, shown = set(found.copies(group)), []
    for i, picture in enumerate(found.groups[group]):
        marks: list[tuple[str, bool]] = []
        if found.verdicts:
            verdict = found.verdicts[group][i]
            marks = [(check.what, False) for check in verdict.checks if not check.holds] or [("brand", True)]
        marks += [("a copy", False)] if picture.name in copies else []
        shown.append(thumbnail(picture, picture.name, marks))
    return Section(group, [Gallery(shown)])


def _meaning(found: Assessment) -> Section:
    rows = [[name, m.about, m.better, f"{m.bounds[0]:g} to {m.bounds[1]:g} {m.unit}".strip(), m.source]
            for name, m in MEASURES.items() if m in found.measures]  # fmt: skip
    note = (
        "Measures of place (edges, structure, lpips) fall when a subject is moved, though it is the same; likeness by "
        "networks is blind to small print and logos. None replaces a look at the pictures."
    )
    return Section(
        "What the measures say", [Table(["measure", "what it says", "better", "range", "source"], rows, note)]
    )
