"""Chromium for tests of pages: Debian's, driven by Playwright; what it complains about is collected."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

AXE_VERSION = "4.14.1"
AXE = (Path(__file__).parent / "apps" / "vendor" / f"axe-{AXE_VERSION}.min.js").read_text()
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 120_000
"""Milliseconds; tests share the machine."""


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser; the test is skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install 'qrlora[test]'")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def page_of(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """A fresh window at an address. At its end nothing may have been thrown, or refused by the content policy."""
    options = {"viewport": {"width": 1440, "height": 900}, "locale": "en-US", "base_url": address} | options
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(f"thrown: {error}"))
    page.on("console", lambda said: complaints.append(said.text) if "Content Security Policy" in said.text else None)
    yield page
    context.close()
    assert not complaints, complaints


def findings(page: Any) -> list[str]:
    """What axe finds serious or critical on a page, one line a finding."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    grave = [one for one in found if one["impact"] in ("serious", "critical")]
    return [f"{page.url}: {one['id']}: {node['html'][:160]}" for one in grave for node in one["nodes"]]


def slide(page: Any, name: str, value: float) -> None:
    """Move the slider with this label, as a hand does: it reports every change."""
    slider = page.get_by_label(name, exact=True)
    slider.evaluate("(it, to) => { it.value = to; it.dispatchEvent(new Event('input', {bubbles: true})) }", value)


PIXELS = """() => {
  const image = document.querySelector(".picture img"), canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  canvas.getContext("2d").drawImage(image, 0, 0);
  return canvas.toDataURL();
}"""


def shown(page: Any) -> str:
    """The large picture, once it is refined, as a data URI."""
    page.wait_for_selector(".picture[data-stage=refined]:not(.busy)")
    return str(page.evaluate(PIXELS))
