"""Run the whole demo in one call, from two pictures to the page."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from qrlora._files import make_folder
from qrlora.apps.demo.flow import Say, experiment, load
from qrlora.apps.demo.page import report, summary
from qrlora.apps.demo.plan import Budget
from qrlora.pico.judge import Judge
from qrlora.quality.images.png import png_bytes


def run(
    out: Path | str = "out/demo",
    subject: str = "teapot",
    style: str = "chalk",
    seed: int = 0,
    steps: int | None = None,
    *,
    model: str = "pico",
    judge: Judge | None = None,
    budget: Budget | None = None,
    say: Say | None = None,
) -> Path:
    """Run the whole demo; return the path of its page.

    Args:
        out: folder for report.html, report.json, summary.png, the two pictures and the adapter files.
        subject, style: a name in pico's world, or a picture file.
        seed: of the pictures to learn from, of training and of generating.
        steps: training steps of each adapter, instead of the plan's.
        model, judge, budget: other than pico, its judge and the plan's numbers, for tests.
        say: told what happens, one line at a time; stderr if None.

    Raises:
        ModelError: the base model or the judge is missing.
        DataError: ``subject`` or ``style`` is neither a name nor a picture that can be used.
    """
    budget = budget or Budget()
    budget = budget if steps is None else replace(budget, steps=steps)
    setting = load(model, judge, budget, seed, say)
    out = Path(out)
    make_folder(out / "adapters")
    outcome = experiment(setting, out, subject, style, _command(subject, style, seed, steps))
    setting.say("page")
    return report(outcome).write(out, {"summary.png": png_bytes(summary(outcome))})


def _command(subject: str, style: str, seed: int, steps: int | None) -> str:
    words = ["qrlora", "demo", "--subject", subject, "--style", style, "--seed", str(seed)]
    return shlex.join(words + ([] if steps is None else ["--steps", str(steps)]))
