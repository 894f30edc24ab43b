"""A page out of data: blocks of text, pictures and numbers become one HTML file that needs nothing else.

    section = Section("Pictures", [Gallery([Picture(pixels, "a red mug")])])
    Report("Title", "One line under it", [section], {"n": 1}).write(Path("out"))   # out/report.html, out/report.json

All text is escaped. Nothing is fetched: style sheet and pictures (PNG data URIs) are inside, and there is no script.
"""

from __future__ import annotations

import base64
import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from qrlora._files import make_folder, write_all
from qrlora.quality.images.png import png_bytes
from qrlora.quality.metrics.shares import Share

TONES = ("", "good", "bad", "note")


@dataclass(frozen=True)
class Picture:
    """One picture. pixels: (h, w, 3) uint8. marks: (what was looked at, whether it is right), shown under the picture.

    enlarge: whole factor by which it is enlarged beforehand (Lanczos): browsers blur what they enlarge.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    alt: str
    caption: str = ""
    marks: Sequence[tuple[str, bool]] = ()
    enlarge: int = 1


@dataclass(frozen=True)
class Equation:
    """Pictures that went in, with plus signs between, and the one that came out, large."""

    parts: Sequence[Picture]
    result: Picture


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, as many a row as fit."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Matrix:
    """Pictures in labelled rows and columns: ``cells[row][column]``; the titles say what the labels are."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Picture]]
    row_title: str = ""
    column_title: str = ""


@dataclass(frozen=True)
class Figure:
    """One number that matters: the number, what it is, and what to hold it against."""

    value: str
    label: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Figures:
    """Numbers that matter, side by side."""

    items: Sequence[Figure]


@dataclass(frozen=True)
class Table:
    """A table. First column: row headers; a row of one cell is a heading for the rows under it.

    A Share among the cells is drawn as a bar with its interval, None as a dash.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Share | None]]
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """Lengths to compare: (label, value, the value in words)."""

    items: Sequence[tuple[str, float, str]]


@dataclass(frozen=True)
class Prose:
    """Paragraphs; ``tone`` is one of TONES. Several in one block become a list if ``listed``."""

    paragraphs: Sequence[str]
    tone: str = ""
    listed: bool = False


@dataclass(frozen=True)
class Code:
    """Text in a fixed-width font."""

    text: str


Block = Picture | Equation | Gallery | Matrix | Figures | Table | Bars | Prose | Code


@dataclass(frozen=True)
class Section:
    """A heading (none for the opening one), a line about it, and blocks."""

    title: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclass(frozen=True)
class Report:
    """A page, and the data behind it (JSON values only)."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    data: dict[str, Any] = field(default_factory=dict)
    footer: str = ""

    def html(self) -> str:
        """The whole page as one string."""
        template = files("qrlora.quality").joinpath("report.template.html").read_text(encoding="utf-8")
        return string.Template(template).substitute(
            title=escape(self.title),
            subtitle=escape(self.subtitle),
            body="\n".join(map(_section, self.sections)),
            footer=escape(self.footer),
        )

    def write(self, folder: Path, beside: Mapping[str, bytes] | None = None) -> Path:
        """Write report.json, report.html and files beside them into ``folder`` (made if missing), each whole or not.

        Returns the page's path. Raises ValueError if the data holds NaN or infinity, which JSON cannot say.
        """
        data = json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False)
        make_folder(folder)
        contents = {"report.json": (data + "\n").encode(), "report.html": self.html().encode(), **(beside or {})}
        write_all({folder / name: content for name, content in contents.items()})
        return folder / "report.html"


def _section(section: Section) -> str:
    heading = f"<h2>{escape(section.title)}</h2>" if section.title else ""
    lead = f'<p class="lead">{escape(section.lead)}</p>' if section.lead else ""
    return f"<section>{heading}{lead}{''.join(map(render, section.blocks))}</section>"


@singledispatch
def render(block: Any) -> str:
    """One block as HTML. Raises TypeError for what is no block."""
    raise TypeError(f"no block of a report: {type(block).__name__}")


@render.register
def _(block: Picture) -> str:
    image = Image.fromarray(block.pixels)
    width, height = block.enlarge * image.width, block.enlarge * image.height
    image = image.resize((width, height), Image.Resampling.LANCZOS) if block.enlarge > 1 else image
    source = base64.b64encode(png_bytes(image)).decode()
    shown = f'<img src="data:image/png;base64,{source}" width="{width}" height="{height}" alt="{escape(block.alt)}">'
    caption = f"<span>{escape(block.caption)}</span>" if block.caption else ""
    marks = "".join(map(_mark, block.marks))
    under = f'<span class="marks">{marks}</span>' if marks else ""
    below = f"<figcaption>{caption}{under}</figcaption>" if caption or under else ""
    return f"<figure>{shown}{below}</figure>"


def _mark(mark: tuple[str, bool]) -> str:
    what, right = mark
    kind, sign, said = ("right", "✓", "right") if right else ("wrong", "✗", "wrong")
    return f'<span class="{kind}"><b aria-label="{said}:">{sign}</b> {escape(what)}</span>'


@render.register
def _(block: Equation) -> str:
    plus = '<span class="sign" aria-hidden="true">+</span>'
    parts = plus.join(map(render, block.parts))
    equals = '<span class="sign" aria-hidden="true">=</span>'
    return (
        f'<div class="equation"><div class="parts">{parts}</div>{equals}'
        f'<div class="result">{render(block.result)}</div></div>'
    )


@render.register
def _(block: Gallery) -> str:
    return f'<div class="gallery">{"".join(map(render, block.pictures))}</div>'


@render.register
def _(block: Matrix) -> str:
    side = f'<th class="side" rowspan="{len(block.rows)}"><span>{escape(block.row_title)}</span></th>'
    side, corner = (side, "<td></td>") if block.row_title else ("", "")
    across = (
        f'<tr>{corner}<td></td><th class="across" colspan="{len(block.columns)}">{escape(block.column_title)}</th></tr>'
    )
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in block.columns)
    rows = [
        f'<th scope="row">{escape(label)}</th>{"".join(f"<td>{render(cell)}</td>" for cell in cells)}'
        for label, cells in zip(block.rows, block.cells, strict=True)
    ]
    size = "few" if len(block.columns) <= 5 else "many"
    return (
        f'<div class="scroll"><table class="matrix {size}">{across if block.column_title else ""}'
        f"<tr>{corner}<td></td>{head}</tr><tr>{side}{'</tr><tr>'.join(rows)}</tr></table></div>"
    )


@render.register
def _(block: Figures) -> str:
    items = "".join(
        f'<div class="{item.tone}"><strong>{escape(item.value)}</strong><span>{escape(item.label)}</span>'
        f"<small>{escape(item.note)}</small></div>"
        for item in block.items
    )
    return f'<div class="figures">{items}</div>'


@render.register
def _(block: Table) -> str:
    head = "".join(f'<th scope="col">{escape(label)}</th>' for label in block.header)
    rows = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>{"".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])}</tr>'
        if len(row) > 1
        else f'<tr class="group"><th colspan="{len(block.header)}" scope="colgroup">{escape(str(row[0]))}</th></tr>'
        for row in block.rows
    )
    note = f'<p class="small">{escape(block.note)}</p>' if block.note else ""
    return f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{rows}</table></div>{note}'


def _cell(cell: str | Share | None) -> str:
    """A share as a bar: full to its value, with a whisker over its interval."""
    if not isinstance(cell, Share):
        return "–" if cell is None else escape(cell)
    low, high = (100 * bound for bound in cell.interval)
    said = f"{cell.right} of {cell.n}, 95% interval {low:.0f} to {high:.0f}%"
    return (
        f'<span class="share" title="{said}"><b>{100 * cell.value:.0f}%</b>'
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * cell.value:.1f}%"></i>'
        f'<u style="left:{low:.1f}%;width:{high - low:.1f}%"></u></span>'
        f"<small>{cell.right} of {cell.n} · {low:.0f} to {high:.0f}%</small></span>"
    )


@render.register
def _(block: Bars) -> str:
    longest = max((value for _, value, _ in block.items), default=0) or 1
    items = "".join(
        f"<dt>{escape(label)}</dt>"
        f'<dd><i style="width:{100 * value / longest:.1f}%"></i><span>{escape(text)}</span></dd>'
        for label, value, text in block.items
    )
    return f'<dl class="bars">{items}</dl>'


@render.register
def _(block: Prose) -> str:
    if block.tone not in TONES:
        raise ValueError(f"tone is one of {TONES}, got {block.tone!r}")
    if block.listed:
        inside = "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in block.paragraphs) + "</ul>"
    else:
        inside = "".join(f"<p>{escape(text)}</p>" for text in block.paragraphs)
    return f'<div class="prose {block.tone}">{inside}</div>'


@render.register
def _(block: Code) -> str:
    return f"<pre><code>{escape(block.text)}</code></pre>"
