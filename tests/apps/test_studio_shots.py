"""The pictures of docs/studio.md, made by the studio itself:

STUDIO_SCREENSHOTS=docs/studio pytest -m slow tests/apps/test_studio_shots.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from browsers import chromium, page_of, shown, slide
from qrlora.apps.studio import train
from qrlora.apps.studio.pages import HERE
from qrlora.apps.studio.state import Studio
from qrlora.operations.registry import Registry
from studios import serving, trust

MOST_BYTES = 200_000
LAPTOP = {"width": 1280, "height": 800}
COLOURS = (256, 192, 144)
STEPS = 48
"""Of the run that is shown: enough to see a style come."""


@pytest.mark.slow
def test_every_page_has_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In light, dark, Japanese and a narrow window."""
    monkeypatch.setitem(train.PRESETS, "quick", (*train.PRESETS["quick"][:2], STEPS))
    folder = Path(os.environ.get("STUDIO_SCREENSHOTS", tmp_path / "shots"))
    folder.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    studio = Studio(Registry.open(tmp_path / "registry", actor="ada"))
    trust(studio.registry, tmp_path / "keys", "grace")
    studio.start()
    try:
        with chromium() as browser, serving(studio) as address:
            with page_of(browser, address, viewport=LAPTOP) as page:
                in_light(page, folder)
                pilot(page, folder)
            with page_of(browser, address, viewport=LAPTOP, color_scheme="dark") as page:
                mix(page)
                page.screenshot(path=folder / "mix-dark.png")
            with page_of(browser, address, viewport=LAPTOP, locale="ja-JP") as page:
                mix(page, null_space="混ざりを抑える")
                page.screenshot(path=folder / "mix-ja.png")
                page.goto("/pilot/teapots")
                page.screenshot(path=folder / "pilot-ja.png")
            with page_of(browser, address, viewport={"width": 420, "height": 900}) as page:
                mix(page)
                page.screenshot(path=folder / "mix-narrow.png")
    finally:
        studio.close()
    for path in folder.glob("*.png"):
        make_small(path)
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.png")}
    assert len(sizes) >= 15 and max(sizes.values()) < MOST_BYTES, sizes


def make_small(path: Path) -> None:
    """With as many colours as a file of that size can have."""
    with Image.open(path) as whole:
        picture = whole.convert("RGB")
    for colours in COLOURS:
        picture.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < MOST_BYTES:
            return


def in_light(page: Any, folder: Path) -> None:
    run = begin_run(page, folder)
    mix(page)
    page.screenshot(path=folder / "mix.png")
    page.get_by_role("button", name="Grid of weights").click()
    page.locator(".cell img").nth(15).wait_for()
    page.wait_for_function("() => [...document.querySelectorAll('.cell img')].every((one) => one.naturalWidth)")
    page.screenshot(path=folder / "grid.png")
    page.keyboard.press("Escape")
    for name, weight in (("chalk-teapot", 1.0), ("faint-chalk-teapot", 0.5)):
        slide(page, "chalk", weight)
        page.get_by_label("Name").fill(name)
        page.get_by_role("button", name="Save as composition").click()
        page.get_by_role("link", name=f"{name}@v1", exact=True).wait_for()
    compare(page, folder)
    page.goto("/explore")
    shown(page)
    slide(page, "Component 1", 0.9)
    page.wait_for_timeout(500)
    shown(page)
    page.screenshot(path=folder / "explore.png")
    page.goto(run)
    page.get_by_text("done", exact=True).wait_for(timeout=1_500_000)
    page.wait_for_timeout(500)
    page.screenshot(path=folder / "run.png")
    page.goto("/library")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=folder / "library.png")
    page.goto("/library/chalk-teapot")
    page.screenshot(path=folder / "lineage.png")


def begin_run(page: Any, folder: Path) -> str:
    """Fill in the page of training, and begin; returns the run's address."""
    page.goto("/train")
    page.set_input_files("input[type=file]", HERE / "starters" / "mosaic.png")
    page.wait_for_selector(".upload")
    page.get_by_text("A style", exact=True).click()
    page.get_by_label("Name").fill("my-mosaic")
    page.get_by_label("What does it show?").fill("car")
    page.get_by_text("Quick", exact=True).click()
    page.wait_for_timeout(300)
    page.screenshot(path=folder / "train.png", full_page=True)
    page.get_by_role("button", name="Train", exact=True).click()
    page.wait_for_url("**/train/*")
    return str(page.url)


def mix(page: Any, null_space: str = "Keep them apart") -> None:
    """A teapot in chalk."""
    page.goto("/mix?c=teapot:1,chalk:1")
    shown(page)
    page.get_by_label(null_space).wait_for()
    page.wait_for_function("() => [...document.querySelectorAll('.seed img')].every((one) => one.src)")
    page.wait_for_timeout(300)


def pilot(page: Any, folder: Path) -> None:
    """The teapots after their first stage, as the sample project has it but for a gate that asks for votes."""
    page.goto("/pilot")
    page.get_by_role("button", name="Make the pilot").click()
    page.get_by_role("button", name="Run this stage").click()
    page.get_by_role("button", name="No-go").wait_for(timeout=1_500_000)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=folder / "pilot.png")
    page.get_by_text("Project file and pictures").click()
    toml = page.locator("textarea")
    toml.fill(toml.input_value().replace("compliance = 0.8", "compliance = 0.8\nacceptance = 0.5"))
    page.get_by_role("button", name="Keep this").click()
    page.get_by_role("button", name="Run this stage", exact=True).click()
    page.get_by_role("button", name="Make the blind study").click(timeout=1_500_000)
    page.get_by_role("link", name="Vote", exact=True).click(timeout=1_500_000)
    for number in range(1, 4):
        page.get_by_text(f"{number} / ").wait_for()
        page.keyboard.press("ArrowLeft")
    page.get_by_text("4 / ").wait_for()
    page.goto("/pilot/teapots")
    page.wait_for_load_state("networkidle")
    page.screenshot(path=folder / "pilot-study.png")


def compare(page: Any, folder: Path) -> None:
    page.goto("/prove")
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("heading", name="Scores").wait_for(timeout=900_000)
    page.wait_for_load_state("networkidle")
    page.screenshot(path=folder / "proof.png")
    page.get_by_role("link", name="Vote", exact=True).click()
    page.wait_for_load_state("networkidle")
    page.screenshot(path=folder / "vote.png")
    started = time.monotonic()
    while page.get_by_role("button", name="The left one").count() and time.monotonic() - started < 120:
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(400)
