"""Measure the time from a slider to its picture in the studio, in Chromium: ``qrlora lab speed studio``.

`qrlora studio` in a process of its own, with a fresh registry and the adapters that come with it. Measured are the time
from the command to the first page, the time until the base model makes pictures, and for every move of a slider the
time from its last event to the first picture, and to the refined one, as the page itself takes it: debouncing,
request, denoising, transfer and decoding are all in it.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any

from qrlora.errors import QrloraError
from qrlora.lab.speed.common import report

FIRST, REFINED, START = 0.7, 3.0, 5.0
"""Seconds that were asked for, on two idle cores."""
PORT = 8766
PATIENCE = 300_000
MOVE = "(it, to) => { it.value = to; it.dispatchEvent(new Event('input', {bubbles: true})) }"


def main(options: SimpleNamespace) -> None:
    """Measure, print, write."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise QrloraError("no Playwright", got=error, remedy="pip install playwright") from error
    browser = options.browser or shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise QrloraError("no Chromium", expected="a browser", remedy="apt install chromium, or --browser PATH")
    with tempfile.TemporaryDirectory() as registry, sync_playwright() as playwright:
        started = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "qrlora",
            "studio",
            "--registry",
            registry,
            "--no-browser",
            "--port",
            str(PORT),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout
                process.stdout.readline()
                chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
                found = measure(chromium, started, options.moves)
                chromium.close()
            finally:
                process.terminate()
                process.wait(60)
    report(options, "cpu", **found)


def measure(chromium: Any, started: float, moves: int) -> dict[str, Any]:
    """Return the seconds of every measurement."""
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(PATIENCE)
    page.goto(f"http://127.0.0.1:{PORT}/mix")
    there = time.perf_counter() - started
    page.wait_for_selector(".picture[data-stage=refined]:not(.busy)")
    live = time.perf_counter() - started
    print(f"first page after {there:.1f} s (asked for: {START:g}), first refined picture after {live:.1f} s")
    rng, times = random.Random(0), {"first": list[float](), "refined": list[float]()}
    sliders = [page.get_by_label(name, exact=True) for name in ("teapot", "chalk")]
    for move in range(moves + 1):
        page.evaluate("delete document.querySelector('.picture').dataset.refined")
        for value in sorted(rng.uniform(0.3, 1.5) for _ in range(4)):  # a slide: four events, the last one counts
            sliders[move % 2].evaluate(MOVE, round(value, 2))
            page.wait_for_timeout(30)
        page.wait_for_selector(".picture[data-refined]:not(.busy)")
        page.wait_for_load_state("networkidle")  # the small variations, too: the next move begins from rest
        if move:  # the first one has warmed up what a pair of adapters needs
            data = page.evaluate("({...document.querySelector('.picture').dataset})")
            for stage, seconds in times.items():
                seconds.append(float(data[stage]))
    for stage, limit in (("first", FIRST), ("refined", REFINED)):
        low, middle, high = statistics.quantiles(times[stage], n=4)
        print(f"{stage:8} median {middle:.2f} s, quartiles {low:.2f} to {high:.2f} (asked for: {limit:g})")
    return {"first_page": there, "live": live, **times}
