"""Write a report as one self-contained HTML file, and the same data as JSON.

    section = Section("Pictures", [Gallery([Picture(pixels, "a red mug")])])
    Report("Title", "One line under it", [section], {"n": 1}).write(Path("out"))   # out/report.html, out/report.json

The blocks are data; templates/blocks.html says how each looks. All text is escaped. Style sheet and pictures (PNG data
URIs) are embedded, nothing is fetched, and there is no script.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import UInt8
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from qrlora._files import make_folder, write_all
from qrlora.quality.images.png import data_uri, png_bytes
from qrlora.quality.metrics.shares import Share

TONES = ("", "good", "bad", "note")


@dataclass(frozen=True)
class Picture:
    """One picture with its alternative text and caption.

    Attributes:
        marks: (property, whether it is right), shown under the picture with a tick or a cross.
        enlarge: integer factor of a Lanczos resize before embedding, because browsers blur what they enlarge.
        href: what a click on it opens, from the page's folder.
    """

    pixels: UInt8[np.ndarray, "h w 3"]
    alt: str
    caption: str = ""
    marks: Sequence[tuple[str, bool]] = ()
    enlarge: int = 1
    href: str = ""

    def embedded(self) -> tuple[str, int, int]:
        """Return the picture as a data URI, with its width and height in pixels."""
        image = Image.fromarray(self.pixels)
        size = self.enlarge * image.width, self.enlarge * image.height
        image = image.resize(size, Image.Resampling.LANCZOS) if self.enlarge > 1 else image
        return data_uri(png_bytes(image)), *size


@dataclass(frozen=True)
class Equation:
    """Input pictures joined by plus signs, and the resulting picture, large."""

    parts: Sequence[Picture]
    result: Picture


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side, in rows that fill the width."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Matrix:
    """Pictures in labelled rows and columns: ``cells[row][column]``. Raises ValueError unless there is a label each."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Picture]]
    row_title: str = ""
    column_title: str = ""

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.cells]
        if shape != [len(self.columns)] * len(self.rows):
            raise ValueError(f"expected {len(self.rows)} rows of {len(self.columns)} cells, got rows of {shape}")


@dataclass(frozen=True)
class Figure:
    """One headline number: the number, its label, and what to compare it with."""

    value: str
    label: str
    note: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Figures:
    """Headline numbers side by side."""

    items: Sequence[Figure]


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads to another file, from the page's folder."""

    text: str
    href: str


@dataclass(frozen=True)
class Table:
    """A table. The first column holds row headers; a row of one cell is a heading for the rows under it.

    A Share is shown as a bar with its confidence interval, a Link as a link, None as a dash.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | Share | Link | None]]
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """A bar chart of (label, value, formatted value)."""

    items: Sequence[tuple[str, float, str]]


@dataclass(frozen=True)
class Prose:
    """Paragraphs, or a bulleted list if ``listed``. Raises ValueError unless ``tone`` is one of TONES."""

    paragraphs: Sequence[str]
    tone: str = ""
    listed: bool = False

    def __post_init__(self) -> None:
        if self.tone not in TONES:
            raise ValueError(f"tone is one of {TONES}, got {self.tone!r}")


@dataclass(frozen=True)
class Code:
    """Monospaced text."""

    text: str


Block = Picture | Equation | Gallery | Matrix | Figures | Table | Bars | Prose | Code


@dataclass(frozen=True)
class Section:
    """A heading (empty for the opening section), an introductory line, and blocks."""

    title: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclass(frozen=True)
class Report:
    """A page, and the data behind it as JSON values."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    data: dict[str, Any] = field(default_factory=dict)
    footer: str = ""

    def html(self) -> str:
        """Return the page as one string."""
        return page("report.html", report=self)

    def write(self, folder: Path, beside: Mapping[str, bytes] | None = None) -> Path:
        """Write report.json, report.html and the files ``beside`` them into ``folder``, each whole or not at all.

        The folder is created. Returns the page's path.

        Raises:
            ValueError: the data holds NaN or infinity, which JSON cannot represent.
        """
        data = json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False)
        make_folder(folder)
        contents = {"report.json": (data + "\n").encode(), "report.html": self.html().encode(), **(beside or {})}
        write_all({folder / name: content for name, content in contents.items()})
        return folder / "report.html"


def page(template: str, **values: Any) -> str:
    """Render a template of this package."""
    return _environment().get_template(template).render(values)


def render(block: Any) -> str:
    """Render one block as HTML, marked as safe. Raises TypeError for anything else."""
    if not isinstance(block, get_args(Block)):
        raise TypeError(
            f"expected a block of a report ({', '.join(t.__name__ for t in get_args(Block))}), got {block!r}"
        )
    macros: Any = _environment().get_template("blocks.html").module
    return getattr(macros, type(block).__name__.lower())(block)


@functools.cache
def _environment() -> Environment:
    templates = PackageLoader("qrlora.quality.report")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["render"] = render
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return environment
