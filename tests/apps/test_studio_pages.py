"""The studio in a browser: sliders, keyboard, screen reader, content policy; and from a picture to stock diffusers."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from browsers import AXE_VERSION, chromium, findings, page_of, shown, slide
from qrlora.apps.samples import sample_files
from qrlora.apps.studio import train
from qrlora.apps.studio.guard import POLICY
from qrlora.apps.studio.pages import HERE
from qrlora.apps.studio.runs import STUDY
from qrlora.apps.studio.state import Studio
from qrlora.operations.registry import Registry
from studios import made_studio, ran_stage, serving, trust, work_off

PAGES = ("/mix?c=teapot:1,chalk:0.5", "/train", "/library", "/explore", "/prove", "/pilot", "/nowhere")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def squares(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Studio]]:
    """A studio whose pictures are squares; its address."""
    with pytest.MonkeyPatch.context() as patch:
        studio = made_studio(tmp_path_factory.mktemp("studio"), patch)
        with serving(studio) as address:
            yield address, studio
        studio.close()


def test_a_slider_moves_the_picture_and_the_mix_is_kept(browser: Any, squares: tuple[str, Studio]) -> None:
    address, studio = squares
    with page_of(browser, address) as page:
        page.goto("/mix")
        pictures = [shown(page)]
        slide(page, "teapot", 1)
        page.wait_for_function("() => document.querySelector('.caption').textContent")
        page.wait_for_timeout(300)
        pictures.append(shown(page))
        assert page.get_by_label("Prompt").input_value() == "a photo of a teal <c> in flat style on a white background"
        page.get_by_label("chalk", exact=True).focus()
        page.keyboard.press("End")  # sliders are moved by keys, too
        page.wait_for_timeout(300)
        pictures.append(shown(page))
        assert page.get_by_label("Prompt").input_value().endswith("in <s> style")
        assert page.get_by_label("Keep them apart").input_value() == "0.5"
        page.get_by_role("button", name="Without adapters").click()
        page.wait_for_selector(".picture[data-stage=before]:not(.busy)")
        page.get_by_role("button", name="Without adapters").click()
        assert len(set(pictures)) == 3 and shown(page) == pictures[-1]
        page.get_by_label("Name").fill("chalk-teapot")
        page.get_by_role("button", name="Save as composition").click()
        page.get_by_role("link", name="chalk-teapot@v1").click()
        page.get_by_role("heading", name="chalk-teapot@v1").wait_for()
    assert {part["weight"] for part in studio.registry.get("chalk-teapot").facts["parts"]} == {1.0, 1.5}


CHECKED = Path(__file__).parents[2] / "docs/studio/checks.md"


def report(browser: str) -> str:
    """The page that says what the test below has checked; it is written when nothing was found."""
    rows = "".join(f"| `{page}` | 0 | 0 |\n" for page in (*PAGES, "/library/DIGEST", "/login", "/train with a picture"))
    policy = "\n".join(f"    {part}" for part in POLICY.split("; "))
    return f"""# What was checked on the studio's pages

Written by `STUDIO_REPORT=1 pytest tests/apps/test_studio_pages.py -k axe`, which fails at any finding.
axe-core {AXE_VERSION}, Playwright {version("playwright")}, Chromium {browser}. Serious and critical findings:

| page | light | dark |
|---|---|---|
{rows}
No page threw an error, and nothing on one was refused by its content security policy, which every page bears:

{policy}
"""


def test_the_report_of_the_pages_is_of_these_pages_and_this_policy() -> None:
    said = CHECKED.read_text()
    assert re.findall(r"^\| `(\S+)` \| 0 \| 0 \|$", said, re.MULTILINE) == [*PAGES, "/library/DIGEST", "/login"]
    assert "; ".join(re.findall("^    (.+)$", said, re.MULTILINE)) == POLICY and f"axe-core {AXE_VERSION}," in said


def test_axe_finds_nothing_serious_on_any_page(browser: Any, squares: tuple[str, Studio]) -> None:
    policies = {policy for scheme in ("light", "dark") for policy in checked(browser, *squares, scheme)}
    assert policies == {POLICY}
    if os.environ.get("STUDIO_REPORT"):
        CHECKED.write_text(report(browser.version))


def checked(browser: Any, address: str, studio: Studio, scheme: str) -> set[str | None]:
    """Check every page in this colour scheme; returns the content policies that were sent with them."""
    chalk = studio.registry.get("chalk").digest
    with page_of(browser, address, color_scheme=scheme) as page:
        found, policies = [], set()
        for path in (*PAGES, f"/library/{chalk}", "/login"):
            policies.add(page.goto(path).headers.get("content-security-policy"))
            if path.startswith(("/mix", "/explore")):
                shown(page)
            found += findings(page)
        page.goto("/train")
        page.set_input_files("input[type=file]", HERE / "starters" / "teapot.png")
        page.wait_for_selector(".upload")
        assert not found + findings(page)
        brush = page.locator(".upload canvas").evaluate("it => getComputedStyle(it).color")
        assert brush == {"light": "rgb(184, 64, 15)", "dark": "rgb(255, 143, 90)"}[scheme]  # a mask is painted in it
    return policies


def test_the_language_and_the_appearance_are_chosen_and_stay(browser: Any, squares: tuple[str, Studio]) -> None:
    with page_of(browser, squares[0], locale="ja-JP") as page:
        page.goto("/library")
        assert page.locator("html").get_attribute("lang") == "ja"
        page.get_by_label("外観").select_option("dark")
        page.wait_for_selector("html[data-theme=dark]")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 18, 17)"
        page.get_by_label("言語").select_option("en")
        page.get_by_role("heading", name="Library").wait_for()
        page.goto("/train")
        assert page.locator("html").get_attribute("data-theme") == "dark"


def test_a_point_of_the_map_is_reached_by_key(browser: Any, squares: tuple[str, Studio]) -> None:
    with page_of(browser, squares[0]) as page:
        page.goto("/explore")
        before = shown(page)
        page.get_by_role("button", name="Go to chalk").focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(300)
        assert shown(page) != before
        assert float(page.get_by_label("Component 1").input_value()) != 0


@pytest.mark.parametrize(("scheme", "locale"), [("light", "en-US"), ("dark", "ja-JP")])
def test_axe_finds_nothing_serious_on_a_pilot(
    browser: Any, squares: tuple[str, Studio], scheme: str, locale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first stage, with a report that waits for a decision, with a study, and while a stage waits its
    turn."""
    address, studio = squares
    name = f"teapots-{scheme}"
    with page_of(browser, address, color_scheme=scheme, locale=locale) as page:
        page.goto("/pilot")
        page.locator("summary").click()
        toml = sample_files("teapots", Path("line.toml"))[Path("line.toml")].decode()
        page.locator("textarea").fill(toml.replace('name = "teapots"', f'name = "{name}"'))
        found = findings(page)
        page.locator("main form button").click()
        page.get_by_role("heading", name=name).wait_for()
        found += findings(page)
        ran_stage(studio, name, "linus")
        page.reload()
        page.locator("main > details summary").last.click()
        found += findings(page)
        studio.runs.add_stage(name, "one_picture", "linus", STUDY)
        work_off(studio, name, monkeypatch)
        page.reload()
        page.locator(".study summary").click()
        page.locator(".study button").first.click()
        page.locator("[id^=tally] p").wait_for()
        found += findings(page)
        page.set_input_files("input[accept*=png]", HERE / "starters" / "mosaic.png")
        page.locator("figcaption", has_text="pictures/mosaic.png").wait_for(state="attached")
        page.locator("details.report button").last.focus()
        page.keyboard.press("Enter")
        page.locator("progress").wait_for()
        found += findings(page)
        page.locator(".now button").click()
        page.locator(".now form").wait_for()
    assert not found


# From a picture to stock diffusers, with the real model


def wait_for(page: Any, text: str, seconds: float = 900) -> None:
    page.get_by_text(text).first.wait_for(timeout=seconds * 1000)


@pytest.mark.slow
def test_from_a_picture_to_stock_diffusers(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, mix, see the picture change, save, approve, export, load the export by diffusers alone."""
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    monkeypatch.setitem(train.PRESETS, "quick", (*train.PRESETS["quick"][:2], 8))
    studio = Studio(Registry.open(tmp_path / "registry", actor="ada"))
    trust(studio.registry, tmp_path / "keys", "grace")
    studio.start()
    try:
        with serving(studio) as address, page_of(browser, address, accept_downloads=True) as page:
            train_gold(page)
            mix_gold(page)
            approve(page)
            with page.expect_download() as download:
                page.get_by_role("link", name="Export for diffusers").click()
            exported = tmp_path / "exported.safetensors"
            download.value.save_as(exported)
    finally:
        studio.close()
    check_in_diffusers(exported)


def train_gold(page: Any) -> None:
    page.goto("/train")
    page.set_input_files("input[type=file]", HERE / "starters" / "gold.png")
    page.wait_for_selector(".upload")
    page.get_by_text("A style", exact=True).click()
    page.get_by_label("Name").fill("my-gold")
    page.get_by_label("What does it show?").fill("car")
    page.get_by_text("Quick", exact=True).click()
    page.get_by_role("button", name="Train", exact=True).click()
    page.wait_for_url("**/train/*")
    page.locator(".strip button").nth(1).wait_for(timeout=900_000)
    page.reload()  # the run goes on, and the page is told all of it again
    wait_for(page, "done")
    assert page.locator(".strip button").count() == 9
    page.get_by_role("button", name="step 4").click()
    page.get_by_role("button", name="Keep the adapter of this step").click()
    page.get_by_text("my-gold@v2").wait_for()


def mix_gold(page: Any) -> None:
    page.get_by_role("link", name="Use it in a mix").first.click()
    before = shown(page)
    slide(page, "teapot", 1)
    page.wait_for_timeout(500)
    assert shown(page) != before
    page.get_by_label("Name").fill("gold-teapot")
    page.get_by_role("button", name="Save as composition").click()
    page.get_by_role("link", name="gold-teapot@v1").click()


def approve(page: Any) -> None:
    page.get_by_label("What is it for?").fill("winter line")
    page.get_by_role("button", name="Ask for approval").click()
    page.get_by_label("Your key").fill("grace")
    page.get_by_label("Reason").last.fill("on brand")
    page.get_by_role("button", name="Approve").click()
    page.get_by_text("approved by grace").wait_for()


def check_in_diffusers(path: Path) -> None:
    """The file changes a picture of the pipeline that diffusers itself loads, by nothing but its own functions."""
    import numpy as np
    import torch
    from diffusers import DiffusionPipeline

    from qrlora.models.families import find_model

    pipe = DiffusionPipeline.from_pretrained(find_model("pico")[1].parent, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)

    def made() -> Any:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
        return pipe("a photo of a teal <c> in <s> style", **options).images[0]

    before = made()
    pipe.load_lora_weights(str(path))
    assert np.abs(made() - before).max() > 0.05


@pytest.mark.slow
def test_a_pilot_from_its_project_to_the_last_go(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With workers that train and sample; the page is left meanwhile, and comes back with the report. People vote on
    stage 2."""
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    studio = Studio(Registry.open(tmp_path / "registry", actor="ada"))
    trust(studio.registry, tmp_path / "keys", "grace")
    studio.start()
    try:
        with serving(studio) as address, page_of(browser, address) as page:
            make_pilot(page, quick_pilot())
            page.get_by_role("button", name="Run this stage").click()
            page.get_by_role("progressbar").wait_for()
            page.goto("/mix")
            page.goto("/pilot/teapots")
            page.get_by_role("button", name="No-go").wait_for(timeout=900_000)
            assert page.locator(".report img").count() == 2
            go(page, "clean on every board")
            assert "several styles" in page.locator("[aria-current=step]").inner_text()
            run_stage(page)
            page.get_by_role("button", name="Make the blind study").click()
            page.get_by_role("link", name="Vote", exact=True).click(timeout=900_000)
            vote_left(page)
            page.get_by_role("link", name="Back").click()
            page.get_by_role("button", name="Tally of 1 person").wait_for()
            go(page, "both styles hold")
            run_stage(page)
            go(page, "the line holds")
            page.get_by_text("Every stage has its go.").wait_for()
    finally:
        studio.close()
    assert studio.registry.get("teapots/teapot").created_by == "ada"


def run_stage(page: Any) -> None:
    page.get_by_role("button", name="Run this stage", exact=True).click()
    page.get_by_role("progressbar").wait_for()
    page.get_by_role("button", name="No-go").wait_for(timeout=900_000)


def go(page: Any, reason: str) -> None:
    page.get_by_label("Your key").fill("grace")
    page.get_by_label("Reason").fill(reason)
    page.get_by_role("button", name="Go", exact=True).click()
    page.get_by_text(f"decided by grace: {reason}").first.wait_for()


def vote_left(page: Any) -> None:
    """Vote for the left picture of every pair."""
    for number in range(1, 100):
        page.get_by_text(f"{number} / ").or_(page.get_by_text("All pairs are done")).wait_for()
        if page.get_by_text("All pairs are done").count():
            return
        page.keyboard.press("ArrowLeft")
    raise AssertionError("pairs without an end")


def quick_pilot() -> str:
    """The teapots with few steps and pictures."""
    text = sample_files("teapots", Path("line.toml"))[Path("line.toml")].decode()
    for long, short in {
        "steps = 240": "steps = 2",
        "= 120": "= 1",
        "pictures = 16": "pictures = 2\nsteps = 2",
        "per_product = 2": "per_product = 1",
    }.items():
        assert long in text
        text = text.replace(long, short)
    return text


def make_pilot(page: Any, text: str) -> None:
    page.goto("/pilot")
    page.get_by_text("Begin with a project file of your own").click()
    page.get_by_label("Project file (TOML)").fill(text)
    page.get_by_role("button", name="Make the pilot").click()
    page.get_by_role("button", name="Run this stage").wait_for()


# The command, and the pictures of the docs


@pytest.mark.slow
def test_the_page_is_there_before_the_model(tmp_path: Path) -> None:
    import subprocess
    import sys

    import httpx2

    command = [sys.executable, "-m", "qrlora", "studio", "--registry", str(tmp_path), "--no-browser", "--port", "8997"]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and "http://127.0.0.1:8997/" in process.stdout.readline()
            page = httpx2.get("http://127.0.0.1:8997/mix", timeout=60)
            assert page.status_code == 200 and "Loading pico" in page.text
            print(f"the first page came after {time.monotonic() - started:.1f} s")
        finally:
            process.terminate()
            process.wait(60)
