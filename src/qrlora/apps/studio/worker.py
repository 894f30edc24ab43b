"""Run one training run, or one stage or study of a pilot, in a process of its own:
`python -m qrlora.apps.studio.worker FOLDER` (see runs.py)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora._said import packed
from qrlora.apps.quiet import hush, wait_passively
from qrlora.errors import QrloraError

hush()
wait_passively()

if TYPE_CHECKING:
    from PIL import Image

    from qrlora.method.adapter import Adapter
    from qrlora.models.training.loop import Progress

NICENESS = 5
"""Previews come first."""


class Journal(logging.Handler):
    """A log handler that appends events to events.jsonl, and the notes of training (how new a picture is for a
    space)."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        logging.getLogger("qrlora").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.say(note=record.getMessage().replace(f"{self.folder}{os.sep}", ""))

    def say(self, **event: Any) -> None:
        with (self.folder / "events.jsonl").open("a") as stream:
            stream.write(json.dumps(event) + "\n")

    def step(self, progress: Progress) -> None:
        self.say(step=progress.step, loss=round(progress.loss, 5), left=round(progress.seconds_left, 1))

    def sampled(self, step: int, images: Sequence[Image.Image], adapter: Callable[[], Adapter]) -> None:
        """Save a sheet's pictures side by side, and the adapter of that step."""
        from PIL import Image

        from qrlora._files import write_atomically
        from qrlora.method.adapter import save_adapter
        from qrlora.quality.images.png import png_bytes

        strip = Image.new("RGB", (sum(one.width for one in images), images[0].height))
        for place, image in enumerate(images):
            strip.paste(image, (place * image.width, 0))
        stem = self.folder / "steps" / f"step-{step:06d}"
        if step:
            made = adapter()
            spelling = "compact" if made.metadata.on_basis else "lora"
            save_adapter(made, stem.with_suffix(".safetensors"), spelling=spelling)
        write_atomically(stem.with_suffix(".png"), png_bytes(strip))
        self.say(sample=step)


def main(folder: Path) -> int:
    """Do what the folder's run asks for, from where the last attempt ended; returns the exit code."""
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    journal = Journal(folder)
    run = json.loads((folder / "run.json").read_text())
    try:
        (_train if run["kind"] == "training" else _make_stage)(folder, run, journal)
    except QrloraError as error:
        journal.say(error=packed(error.text))
        return 2
    except KeyboardInterrupt as stopped:  # or TrainingInterrupted, which knows its step
        journal.say(stopped=getattr(stopped, "step", 0))
        return 130
    journal.say(done=True)
    return 0


def _train(folder: Path, run: Mapping[str, Any], journal: Journal) -> None:
    """Train by the folder's recipe, from the newest checkpoint if there is one."""
    from qrlora.models.training.loop import train
    from qrlora.models.training.outputs import newest
    from qrlora.models.training.recipe import Recipe

    recipe = Recipe.of(json.loads((folder / "recipe.json").read_text()))
    train(recipe, progress=journal.step, resume=newest(recipe) is not None, sampled=journal.sampled)


def _make_stage(folder: Path, run: Mapping[str, Any], journal: Journal) -> None:
    """Run a pilot's stage, or make its study, as the person who asked for it. What is trained and sampled is used
    again."""
    from qrlora.apps.pilots import open_pilot
    from qrlora.apps.studio.forms import renamed
    from qrlora.apps.studio.projects import project_file
    from qrlora.operations.registry import Registry

    path = project_file(folder.parent.parent, run["name"])
    try:
        with contextlib.closing(Registry.open(actor=run["person"], create=False)) as registry:
            pilot = open_pilot(path, registry)
            work = pilot.make_study if run["kind"] == "study" else pilot.run
            work(run["role"], lambda what, at, of: journal.say(work=what, at=at, of=of))
    except QrloraError as error:
        raise renamed(error, path.parent, ".") from error


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
