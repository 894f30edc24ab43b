"""Write a catalog's results: pages of products, an index, and the table as CSV and JSON.

Pages hold thumbnails and need no other file; a click on one opens the picture itself.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from PIL import Image

from qrlora._files import make_folder, write_atomically
from qrlora.models.training.pictures import open_picture
from qrlora.operations.catalog.journal import Journal
from qrlora.operations.catalog.run import STATES, Line, Row
from qrlora.operations.provenance.canonical import canonical_json, digest_of
from qrlora.quality.metrics.shares import Share
from qrlora.quality.metrics.table import METRICS
from qrlora.quality.report import Block, Figure, Figures, Link, Matrix, Picture, Prose, Report, Section, Table

THUMBNAIL = 128
"""Longest side in pixels of a picture on a page."""
PAGE = 200
"""Cells on a page, so that it stays below some megabytes."""
LISTED = 200
"""Refused cells and failed pictures on the index; all of them are in the table."""
COLUMNS = ("product", "style", "prompt", "seed", "state", "reason", "file", "seconds", "attempts", "passes", "reasons")


@dataclass(frozen=True)
class Spent:
    """Costs of a catalog so far.

    Attributes:
        seconds: of workers, by what they did.
        watts: power of a worker, as stated.
        size: bytes of pictures and adapters.
    """

    seconds: Mapping[str, float]
    counts: Mapping[str, int]
    watts: float
    size: int

    @property
    def hours(self) -> float:
        """Hours of workers."""
        return sum(self.seconds.values()) / 3600

    @property
    def kilowatt_hours(self) -> float:
        """Hours times the stated power: an estimate."""
        return self.hours * self.watts / 1000


@dataclass
class Totals:
    """Counts over the rows of a table."""

    states: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[bool] = field(default_factory=Counter)
    size: int = 0

    def add(self, row: Row) -> None:
        self.states[row.state] += 1
        self.size += row.found.get("size", 0)
        if row.found.get("passes") is not None and row.state == "done":
            self.verdicts[row.found["passes"]] += 1

    @property
    def passing(self) -> Share | None:
        """The share of the pictures that pass the brand sheet; None without one."""
        judged = sum(self.verdicts.values())
        return Share(self.verdicts[True], judged) if judged else None

    def data(self) -> dict[str, Any]:
        """JSON values."""
        found: dict[str, Any] = {state: self.states[state] for state in STATES}
        share = self.passing
        return found | ({"passing": share.right, "judged": share.n} if share else {})


def write(line: Line, watts: float, footer: str) -> tuple[Path, Totals, Spent]:
    """Write pages, index and table into the catalog's folder; returns the index, the counts and the cost."""
    folder = line.settings.folder
    totals, shelf, troubles = Totals(), [], list[Row]()
    make_folder(folder / "pages")
    of_product = itertools.groupby(line.rows(), key=lambda row: row.cell.product.folder)
    by_product = (list(rows) for _, rows in of_product)
    each = max(1, PAGE // len(line.styles))
    for number in itertools.count(1):
        products = list(itertools.islice(by_product, each))
        if not products:
            break
        name = f"page-{number:04d}.html"
        of_page = Totals()
        for row in itertools.chain.from_iterable(products):
            for counted in (totals, of_page):
                counted.add(row)
            if row.state in ("refused", "failed") and len(troubles) < LISTED:
                troubles.append(row)
        _write_page(folder, name, number, products, line.journal)
        shelf.append((name, products[0][0].cell.product.name, products[-1][0].cell.product.name, of_page))
    spent = _spent(line, watts, totals.size)
    _write_table(folder, line, totals, spent)
    index = folder / "index.html"
    write_atomically(index, _index(line, totals, shelf, troubles, spent, footer).html().encode(), rescue=False)
    return index, totals, spent


def _spent(line: Line, watts: float, pictures: int) -> Spent:
    found = line.journal.spent()
    adapters = sum(path.stat().st_size for path in {*line.adapters.values()} if path.is_file())
    counts = {what: count for what, (count, _) in found.items()}
    return Spent({what: seconds for what, (_, seconds) in found.items()}, counts, watts, pictures + adapters)


# Pages


def _write_page(folder: Path, name: str, number: int, products: Sequence[list[Row]], journal: Journal) -> None:
    """Write a page, unless it shows the same already."""
    path = folder / "pages" / name
    shown = [
        [row.state, row.reason, row.found.get("digest"), row.found.get("reasons")] for rows in products for row in rows
    ]
    labels = [[rows[0].cell.product.name, *(row.cell.style.item.name for row in rows)] for rows in products]
    digest = digest_of(canonical_json([shown, labels]))
    if path.is_file() and journal.page(name) == digest:
        return
    rows, names, columns = [], [], list(dict.fromkeys(row.cell.style.item.name for row in products[0]))
    for of_product in products:
        names.append(of_product[0].cell.product.name)
        of_style = itertools.groupby(of_product, key=lambda row: row.cell.style.item.folder)
        rows.append([_tile(list(found), folder) for _, found in of_style])
    page = Report(
        f"Catalog, page {number}", f"{names[0]} to {names[-1]}.", [Section("", [Matrix(names, columns, rows)])]
    )
    write_atomically(path, page.html().encode(), rescue=False)
    journal.set_page(name, digest)


def _tile(rows: list[Row], folder: Path) -> Picture:
    """Return the first picture of a cell; grey where there is none."""
    row = next((row for row in rows if row.state == "done"), rows[0])
    more = [f"{len(rows)} pictures"] if len(rows) > 1 else []
    if row.state != "done" or row.picture is None:
        blank = np.full((THUMBNAIL // 2, THUMBNAIL // 2, 3), 200, np.uint8)
        return Picture(blank, row.state, f"{row.state}: {row.reason}" if row.reason else row.state)
    image = open_picture(folder / row.picture.file).image
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    passes = row.found["passes"]
    marks = [] if passes is None else [("brand", passes)]
    href = quote(f"../{row.picture.file}")
    return Picture(np.asarray(image), row.picture.prompt, ", ".join(more), marks, href=href)


# Index


Shelf = Sequence[tuple[str, str, str, Totals]]


def _index(line: Line, totals: Totals, shelf: Shelf, troubles: Sequence[Row], spent: Spent, footer: str) -> Report:
    judged = totals.passing is not None
    header = ["page", "products", "done", "failed", "refused", *(["pass the brand sheet"] if judged else [])]
    pages = [
        [
            Link(name.removesuffix(".html"), f"pages/{name}"),
            first if first == last else f"{first} to {last}",
            *(str(of_page.states[state]) for state in ("done", "failed", "refused")),
            *([of_page.passing] if judged else []),
        ]
        for name, first, last, of_page in shelf
    ]
    sections = [Section("", [Figures(list(_figures(totals, spent)))]), Section("Pages", [Table(header, pages)])]
    for state, title in (("refused", "Refused by the policy"), ("failed", "Failed")):
        listed = [row for row in troubles if row.state == state]
        if listed:
            lines = [_told(row) for row in listed]
            lines += [f"and {totals.states[state] - len(listed)} more, in catalog.csv"] * (
                totals.states[state] > len(listed)
            )
            sections.append(Section(title, [Prose(lines, "note" if state == "refused" else "bad", listed=True)]))
    sections.append(Section("Cost so far", _cost(spent)))
    names = f"{len(line.products)} products in {len(line.styles)} styles"
    return Report("Catalog", f"{names}: {sum(totals.states.values())} pictures.", sections, footer=footer)


def _figures(totals: Totals, spent: Spent) -> Iterator[Figure]:
    states = totals.states
    wanted = sum(states.values())
    yield Figure(str(states["done"]), "pictures", f"of {wanted}", "good" if states["done"] == wanted else "")
    if share := totals.passing:
        yield Figure(f"{100 * share.value:.0f}%", "pass the brand sheet", str(share))
    if states["refused"]:
        yield Figure(str(states["refused"]), "cells refused", "by the policy; listed below with the reasons")
    if states["failed"]:
        yield Figure(str(states["failed"]), "failed", "listed below; the same command tries them again", "bad")
    if states["missing"]:
        yield Figure(str(states["missing"]), "not made yet", "the same command continues", "note")
    yield Figure(
        _duration(3600 * spent.hours), "time of workers", f"{spent.kilowatt_hours:.3g} kWh at {spent.watts:g} W"
    )


def _told(row: Row) -> str:
    what = f"{row.cell.product.name} in {row.cell.style.item.name}"
    what += f", seed {row.picture.seed}" if row.picture else ""
    tried = f" ({row.found['attempts']} attempts)" if row.found.get("attempts") else ""
    return f"{what}: {row.reason}{tried}"


def _cost(spent: Spent) -> list[Block]:
    rows = [
        [what, str(spent.counts[what]), _duration(seconds), f"{seconds / max(1, spent.counts[what]):.2f} s"]
        for what, seconds in sorted(spent.seconds.items(), key=lambda item: -item[1])
    ]
    note = (
        f"Time of workers over all runs. Energy is that time at {spent.watts:g} W a worker, which is stated (--watts) "
        f"and not measured: {spent.kilowatt_hours:.3g} kWh. Pictures and adapters take {_size(spent.size)}."
    )
    return [Table(["", "number", "time", "each"], rows, note)]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


# The table


def _scored(line: Line) -> list[str]:
    names = line.settings.metrics
    own = [name for name, one in METRICS.items() if (name in names if names is not None else not one.network)]
    return list(dict.fromkeys([*own, *(line.settings.sheet.scores if line.settings.sheet else ())]))


def _write_table(folder: Path, line: Line, totals: Totals, spent: Spent) -> None:
    names = _scored(line)

    def as_csv(stream: BinaryIO) -> None:
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="", write_through=True)  # spreadsheets look for the mark
        writer = csv.writer(text)
        writer.writerow([*COLUMNS, *names])
        for row in line.rows():
            facts = _facts(row)
            scores = facts.pop("scores")
            cells = {**facts, "reasons": "; ".join(facts["reasons"])}
            values = (scores.get(name) for name in names)
            writer.writerow(["" if one is None else one for one in (*(cells[name] for name in COLUMNS), *values)])
        text.detach()

    def as_json(stream: BinaryIO) -> None:
        cost = {"seconds": dict(spent.seconds), "watts": spent.watts, "kilowatt_hours": spent.kilowatt_hours}
        head = {"totals": totals.data(), "cost": cost | {"bytes": spent.size}}
        stream.write(json.dumps(head, ensure_ascii=False)[:-1].encode() + b', "pictures": [')
        _join(stream, (json.dumps(_facts(row), ensure_ascii=False, allow_nan=False) for row in line.rows()))
        stream.write(b"\n]}\n")

    write_atomically(folder / "catalog.csv", as_csv, rescue=False)
    write_atomically(folder / "catalog.json", as_json, rescue=False)


def _join(stream: BinaryIO, texts: Iterable[str]) -> None:
    for index, text in enumerate(texts):
        stream.write((",\n" if index else "\n").encode() + text.encode())


def _facts(row: Row) -> dict[str, Any]:
    picture, found = row.picture, row.found
    return {
        "product": row.cell.product.name,
        "style": row.cell.style.item.name,
        "prompt": picture.prompt if picture else None,
        "seed": picture.seed if picture else None,
        "state": row.state,
        "reason": row.reason,
        "file": picture.file if picture and row.state == "done" else None,
        "key": picture.key if picture else None,
        "seconds": round(found["seconds"], 3) if found else None,
        "attempts": found.get("attempts"),
        "passes": found.get("passes"),
        "reasons": list(found.get("reasons", ())),
        "scores": dict(found.get("scores", {})),
    }
