"""The bench's report: one page, the same as JSON and CSV, every record, and the plots as files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qrlora._files import make_folder, write_atomically
from qrlora.lab.compare import about
from qrlora.lab.compare.cells import MEASURES
from qrlora.lab.compare.identity import Cell, Record, digest_of, weights_digest
from qrlora.lab.compare.plan import BASELINE, COMPOSED, DEFAULT, ROWS, Scope
from qrlora.lab.compare.plots import (
    Plot,
    across_weights,
    crosstalk_bars,
    foretelling,
    freedom,
    subject_against_style,
    with_many,
)
from qrlora.lab.compare.run import facts, write_records
from qrlora.lab.compare.tables import Estimate, against, agreement, as_json, by_pair, by_seed, foretold, table
from qrlora.models.generation import labelled_grid
from qrlora.models.training.pictures import open_picture
from qrlora.quality.images.png import png_bytes
from qrlora.quality.report import Code, Picture, Prose, Report, Section, Table

COLUMNS = ("recognised", "both", "named", "subject", "style", "crosstalk", "obedience", "energy", "diversity")
RATIOS = ("recognised", "named", "crosstalk")
SHOWN = 3
"""Pictures of a pair on a sheet."""
BLOCK = 30
"""Most lines below one another on a sheet: more are laid in blocks of equal height, side by side."""


def write(folder: Path, scope: Scope, records: Sequence[Record], command: str) -> Path:
    """Write report.html, report.json, table.csv and .md, records.jsonl and plots/*; returns the page's path."""
    rows = [row for row in scope.rows if by_pair(records, row, "both")]
    found = table(records, rows)
    beside = {row: against(records, row, BASELINE) for row in _order(found) if row != BASELINE and BASELINE in rows}
    told = foretold(records, [row for row in rows if row == ROWS[row].adapter])
    charts = [
        subject_against_style(found),
        crosstalk_bars(found),
        across_weights(records),
        with_many(records),
        freedom(records),
        foretelling(told),
    ]
    plots = [chart for chart in charts if chart]
    drawn = sheets(folder, scope, records, _order(found))
    data = _data(scope, records, command, rows) | {
        "table": as_json(found),
        f"against {BASELINE}": as_json(beside),
        "foretold": {name: {k: v for k, v in each.items() if k != "points"} for name, each in told.items()},
    }
    make_folder(folder / "plots")
    write_records(folder / "records.jsonl", records)
    write_atomically(folder / "table.csv", _csv(found).encode())
    write_atomically(folder / "table.md", _markdown(found, beside).encode())
    for plot in plots:
        png = png_bytes(Image.fromarray(plot.pixels).quantize(256))
        write_atomically(folder / "plots" / f"{plot.name}.png", png)
    for sheet in drawn:
        write_atomically(folder / "plots" / f"{sheet.name}.jpg", _jpeg(sheet.pixels))
    sections = [
        Section("", [Prose([_opening(scope, found, beside)]), Code(command)]),
        _table(found, scope),
        *([_beside(beside)] if beside else []),
        *([_agreement(data)] if data["agreement"] else []),
        *(Section(each.title, [Picture(each.pixels, each.title), Prose([each.said])]) for each in (*plots, *drawn)),
        _measured(),
    ]
    under = f"{len(scope.subjects)} subjects x {len(scope.styles)} styles, {len(scope.seeds)} seeds, one picture each"
    return Report("Does it really separate?", under, sections, data).write(folder)


def _data(scope: Scope, records: Sequence[Record], command: str, rows: Sequence[str]) -> dict[str, Any]:
    """Plan, rates, weights and the agreement of seeds, for report.json."""
    return {
        "command": command,
        "weights": weights_digest(),
        "plan": {name: value for name, value in facts(scope).items() if name not in ("rates", "balance")},
        "rates": {ROWS[row].rated: scope.rates[ROWS[row].rated] for row in rows},
        "balance": {row: scope.balance[row] for row in rows},
        "by seed": {row: by_seed(records, row, "recognised") for row in rows},
        "agreement": agreement(records, rows, "recognised"),
    }


def _opening(scope: Scope, found: Mapping[str, Mapping[str, Any]], beside: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text that states the aim, and whether it is met."""
    ours = next((row for row in (COMPOSED, DEFAULT) if row in beside), None)
    if ours is None:
        return f"Neither {COMPOSED} nor {DEFAULT} stands beside {BASELINE} in this run."
    merged = [row for row in found if not ROWS[row].joint]
    best, seen = (max(merged, key=lambda row: found[row][name].value) for name in ("both", "recognised"))
    mine, other = found[ours], found[BASELINE]
    times, lost = beside[ours]["both_ratio"], beside[ours]["crosstalk_ratio"]
    met = bool(times and times.low > 1 and times.value >= 1.25 and lost and lost.value <= 0.5 and best == ours)
    return (
        f"The aim: {ours} composes at least 1.25 times as many pictures with both right as {BASELINE} added "
        f"directly, at no more than half its crosstalk, and leads the table. Found: both right {mine['both']} "
        f"against {other['both']}, ratio {times or 'not defined, the baseline has none'}; crosstalk ratio {lost}. "
        f"{'The aim is met.' if met else 'The aim is not met.'} Recognised in "
        f"{mine['recognised']} of pictures against {other['recognised']}, ratio {beside[ours]['recognised_ratio']}; "
        f"first by it, of those that merge: {seen}."
    )


def _table(found: Mapping[str, Mapping[str, Any]], scope: Scope) -> Section:
    header = ["method", *COLUMNS, "numbers trained"]
    order = _order(found)
    rows: list[Sequence[Any]] = []
    for row in order:
        count = found[row]["trained"]
        cells = [_cell(found[row][name]) for name in COLUMNS]
        rows.append([_name(row), *cells, None if count is None else f"{count:,.0f}"])
    listed = [f"{row}: {about(ROWS[row])}" for row in order]
    lead = f"Mean and 95 % interval over {len(scope.pairs)} pairs; ordered by how often both are recognised."
    return Section("Every method", [Table(header, rows), Prose(listed, listed=True)], lead)


def _name(row: str) -> str:
    """Return a row's name, which may be broken before its merge."""
    return row.replace("+", "\u200b+")


def _cell(found: Estimate | None) -> str | None:
    """An estimate in two lines, its interval below."""
    return None if found is None else f"{found.value:.2f}\n{found.low:.2f}\u00a0to\u00a0{found.high:.2f}"


def _beside(beside: Mapping[str, Mapping[str, Estimate | None]]) -> Section:
    names = [
        f"{name}_{kind}" for name in ("recognised", "both", "named", "crosstalk") for kind in ("difference", "ratio")
    ]
    rows = [[_name(row), *(_cell(each[n]) for n in names)] for row, each in beside.items()]
    header = ["method", *(name.replace("_", ", ") for name in names)]
    lead = "On the same pairs, pair by pair: differences less direct LoRA's, and ratios of means."
    return Section(f"Beside {BASELINE}, added directly", [Table(header, rows)], lead)


def _agreement(data: Mapping[str, Any]) -> Section:
    seeds = sorted({seed for found in data["by seed"].values() for seed in found})
    whole = {row: found for row, found in data["by seed"].items() if found}
    order = sorted(whole, key=lambda row: -fmean(whole[row].values()))
    rows = [
        [_name(row), *(f"{whole[row][seed]:.2f}" if seed in whole[row] else None for seed in seeds)] for row in order
    ]
    said = [f"{name}: {value:+.2f}" for name, value in data["agreement"].items() if value is not None]
    lead = "Recognised, by seed: of the picture learned from, the training and the noise. "
    lead += f"Rank correlation over the rows of seeds {', '.join(said)}." if said else ""
    return Section("Does it agree with itself?", [Table(["method", *(f"seed {seed}" for seed in seeds)], rows)], lead)


def sheets(folder: Path, scope: Scope, records: Sequence[Record], rows: Sequence[str]) -> list[Plot]:
    """Return the default's best, median and worst pair by `recognised`, then `named`, with every row's pictures that
    are here."""
    if DEFAULT not in rows:
        return []
    seen, named = by_pair(records, DEFAULT, "recognised"), by_pair(records, DEFAULT, "named")
    order = sorted(named, key=lambda pair: (-seen[pair], -named[pair]))
    found = []
    for place, pair in (("best", order[0]), ("median", order[len(order) // 2]), ("worst", order[-1])):
        drawn = {
            row: folder / "pictures" / f"{digest_of(_pair(scope, row, pair), scope, judged=False)}.png" for row in rows
        }
        drawn = {row: file for row, file in drawn.items() if file.exists()}
        if drawn:
            title = f"The {place} pair of {DEFAULT}: {pair[0]}, {pair[1]}"
            scores = f"recognised {seen[pair]:.2f}, named {named[pair]:.2f}"
            said = f"{DEFAULT}: {scores}; seed {scope.seeds[0]}, as every method drew it."
            found.append(Plot(f"sheet-{place}", title, said, _sheet(_training_pictures(folder, scope, pair), drawn)))
    return found


def _pair(scope: Scope, row: str, pair: tuple[str, str]) -> Cell:
    return Cell("pair", ROWS[row].adapter, scope.seeds[0], *pair, row)


def _sheet(trained_on: Sequence[Image.Image], drawn: Mapping[str, Path]) -> UInt8[np.ndarray, "h w 3"]:
    """Lay out the training pictures in the first row, then a row for every method, in blocks side by side."""
    strips = {row: open_picture(file).image for row, file in drawn.items()}
    side = next(iter(strips.values())).height
    count = min(SHOWN, next(iter(strips.values())).width // side)
    blank = Image.new("RGB", (side, side), "white")
    lines = [("learned from", [*trained_on, *[blank] * count][:count])] if trained_on else []
    for row, strip in strips.items():
        lines.append((row, [strip.crop((i * side, 0, (i + 1) * side, side)) for i in range(count)]))
    blocks = []
    size = math.ceil(len(lines) / math.ceil(len(lines) / BLOCK))
    for start in range(0, len(lines), size):
        labels, cells = zip(*lines[start : start + size], strict=True)
        blocks.append(np.asarray(labelled_grid(cells, labels, [""] * count)))
    high = max(map(len, blocks))
    return np.concatenate(
        [np.pad(b, ((0, high - len(b)), (0, 0), (0, 0)), constant_values=255) for b in blocks], axis=1
    )


def _jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Encode in full colour: a palette of 256 changes the colours of small things, and a PNG is four times as large."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def _training_pictures(folder: Path, scope: Scope, pair: tuple[str, str]) -> list[Image.Image]:
    """The two pictures learned from, as far as they are here."""
    names = (f"subject-{pair[0]}", f"style-{pair[1]}")
    files = [folder / "tasks" / f"{name.replace(' ', '-')}-{scope.seeds[0]}.png" for name in names]
    return [open_picture(file).image for file in files if file.exists()]


def _measured() -> Section:
    listed = [f"{name}: {said}, {'more' if more else 'less'} is better" for name, (said, more) in MEASURES.items()]
    return Section("What was measured", [Prose(listed, listed=True)])


def _markdown(found: Mapping[str, Mapping[str, Any]], beside: Mapping[str, Mapping[str, Estimate | None]]) -> str:
    """The page's table, and ratios beside the baseline (in bold, intervals that leave out 1), for other pages."""
    lines = ["| method | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [_line([row, *(found[row][name] for name in COLUMNS)]) for row in _order(found)]
    if beside:
        heads = [f"{name}, of {BASELINE}'s" for name in (*RATIOS, "numbers trained")]
        lines += ["", "| method | " + " | ".join(heads) + " |", "|---" * (1 + len(heads)) + "|"]
    for row, each in beside.items():
        ratios = [each[f"{name}_ratio"] for name in RATIOS]
        said = [f"**{r}**" if r and (r.low > 1 or r.high < 1) else r for r in ratios]
        mine, theirs = found[row]["trained"], found[BASELINE]["trained"]
        lines.append(_line([row, *said, f"{mine / theirs:.2f}" if mine and theirs else None]))
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |"


def _order(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return sorted(found, key=lambda row: (-found[row]["recognised"].value, -found[row]["named"].value))


def _csv(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Row, measure, value, low, high, pairs."""
    stream = io.StringIO()
    lines = csv.writer(stream, lineterminator="\n")
    lines.writerow(["row", "measure", "value", "low", "high", "pairs"])
    for row, measures in found.items():
        for name, value in measures.items():
            if isinstance(value, Estimate):
                numbers = [f"{x:.5g}" for x in (value.value, value.low, value.high)]
                lines.writerow([row, name, *numbers, value.pairs])
            elif value is not None:
                lines.writerow([row, name, f"{value:.8g}", "", "", ""])
    return stream.getvalue()
