"""The page and the numbers on it: self-contained, escaped, whole or not written, and honest about few pictures."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from qrlora.quality.metrics.shares import Share, difference
from qrlora.quality.report import (
    Bars,
    Code,
    Equation,
    Figure,
    Figures,
    Gallery,
    Matrix,
    Picture,
    Prose,
    Report,
    Section,
    Table,
    render,
)

PIXELS = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
HOSTILE = '<script>alert("x")</script> & <b>'


class Page(HTMLParser):
    """Every tag with its attributes, the text, and whether tags are closed in order."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1] not in ("style", "title") else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def full_report(text: str = "some words", data: dict | None = None) -> Report:
    """Every kind of block, with ``text`` wherever text goes."""
    picture = Picture(PIXELS, text, text, [(text, True), (text, False)])
    blocks = [
        Equation([picture, picture], picture),
        Gallery([picture]),
        Matrix([text, text], [text], [[picture], [picture]], text, text),
        Figures([Figure("1", text, text, "good")]),
        Table([text, text], [[text], [text, Share(3, 4)], [text, None], [text, text]], text),
        Bars([(text, 2.0, text)]),
        Prose([text], "note"),
        Prose([text], listed=True),
        Code(text),
    ]
    return Report(text, text, [Section(text, blocks, text), Section("", [])], data or {"n": 1}, text)


def test_page_needs_nothing_else() -> None:
    html = full_report().html()
    page = Page(html)
    assert page.open == [""]
    assert not page.all("script") and not page.all("link")
    assert not re.search(r"https?:|url\(|@import", html)
    assert all((image["src"] or "").startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(image["alt"] for image in page.all("img"))
    assert {"lang": "en"} in page.all("html") and "prefers-color-scheme: dark" in html


def test_text_stays_text() -> None:
    plain, hostile = Page(full_report().html()), Page(full_report(HOSTILE).html())
    assert [tag for tag, _ in plain.tags] == [tag for tag, _ in hostile.tags]
    assert hostile.text.count(HOSTILE) == plain.text.count("some words")
    assert all(image["alt"] == HOSTILE for image in hostile.all("img"))
    assert "$5 and ${title}" in Page(full_report("$5 and ${title}").html()).text


@pytest.mark.parametrize("enlarge", [1, 3])
def test_pictures_are_the_pixels(enlarge: int) -> None:
    (image,) = Page(render(Picture(PIXELS, "pixels", enlarge=enlarge))).all("img")
    png = Image.open(io.BytesIO(base64.b64decode((image["src"] or "").split(",")[1])))
    assert png.size == (4 * enlarge, 5 * enlarge) == (int(image["width"] or 0), int(image["height"] or 0))
    if enlarge == 1:
        np.testing.assert_array_equal(np.asarray(png), PIXELS)


def test_share_says_how_many_and_how_sure() -> None:
    text = Page(render(Table(["", "x"], [["a", Share(19, 24)], ["b", None]]))).text
    assert "79%" in text and "19 of 24 · 60 to 91%" in text and "–" in text


def test_write_gives_page_and_data(tmp_path: Path) -> None:
    data = {"scores": {"lora": 0.5, "unknown": None}, "style": "Ölkreide"}
    page = full_report(data=data).write(tmp_path / "new" / "folder")
    assert page.name == "report.html" and page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((page.parent / "report.json").read_text(encoding="utf-8")) == data
    assert sorted(path.name for path in page.parent.iterdir()) == ["report.html", "report.json"]


def test_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    full_report().write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="JSON"):
        full_report(data={"score": float("nan")}).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_no_block_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a block of a report"):
        render("text")
    with pytest.raises(ValueError, match="tone is one of"):
        render(Prose(["text"], "loud"))
    with pytest.raises(ValueError, match=r"expected 1 rows of 1 cells, got rows of \[0, 0\]"):
        render(Matrix(["a"], ["b"], [[], []]))


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_interval_is_wilsons(right: int, n: int, low: float, high: float) -> None:
    """The last row is Newcombe's own example (Statistics in Medicine 17, 857, table I)."""
    assert Share(right, n).interval == pytest.approx((low, high), abs=5e-5)


def test_difference_is_newcombes() -> None:
    """Example (a) of Newcombe 1998 (Statistics in Medicine 17, 873): 56/70 - 48/80, method 10."""
    gap, interval = difference(Share(56, 70), Share(48, 80))
    assert gap == pytest.approx(0.2) and interval == pytest.approx((0.0524, 0.3339), abs=5e-5)


counts = st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts, counts)
def test_intervals_hold_their_value(a: tuple[int, int], b: tuple[int, int]) -> None:
    first, second = Share(*a), Share(*b)
    low, high = first.interval
    assert 0 <= low <= first.value + 1e-12 and first.value - 1e-12 <= high <= 1 and low < high
    gap, (least, most) = difference(first, second)
    assert -1 - 1e-9 <= least <= gap <= most <= 1 + 1e-9
    assert difference(second, first)[1] == pytest.approx((-most, -least))


def test_shares_are_counted() -> None:
    assert Share.of(np.array([True, False, True])) == Share(2, 3)
    for wrong in ((4, 3), (-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="a share needs"):
            Share(*wrong)
