"""Queue training runs and stages of pilots fairly: one worker process at a time, and a folder for each run from which a
restart goes on.

runs/ID/run.json        what was asked for, by whom, and where it stands
runs/ID/recipe.json     the recipe's fields
runs/ID/pictures/       what it trains on
runs/ID/events.jsonl    what the worker says: steps with their loss, sample sheets, its end
runs/ID/steps/          step-000100.png and .safetensors of every sample sheet
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qrlora._files import make_folder, write_atomically
from qrlora._said import Said, packed, said
from qrlora.errors import QrloraError, RequestError
from qrlora.operations.registry.registry import PLACE

log = logging.getLogger(__name__)

TRAINING, STAGE, STUDY = "training", "pilot", "study"
PILOTS = (STAGE, STUDY)
"""Kinds of runs that a pilot's page shows: a stage, and the pictures of its blind study."""
WAITING, RUNNING, STOPPED, FAILED, DONE = "waiting", "running", "stopped", "failed", "done"
ADAPTER = "adapter.safetensors"
GRACE_SECONDS = 30
"""Seconds that a worker may take to write its checkpoint when the studio ends."""


@dataclass(frozen=True)
class Run:
    """The state of one training run, or of a stage of a pilot or its study: then `name` is the pilot's and `role` the
    stage."""

    id: str
    person: str
    name: str
    role: str
    steps: int
    created: float
    state: str = WAITING
    started: float = 0.0
    error: Any = ""
    """The text of an error as `packed` has it, or a plain text."""
    reference: str = ""
    taken: dict[str, str] = field(default_factory=dict)
    kind: str = TRAINING

    @property
    def over(self) -> bool:
        return self.state in (STOPPED, FAILED, DONE)


class Runs:
    """The queue of runs. Next is the run of whoever has waited longest since a run of theirs began.

    Args:
        place: folder of the runs.
        finished: called with the folder of a finished run and its person; returns the adapter's reference.
        registry: what opens the registry that pilots are recorded in.
    """

    def __init__(self, place: Path, finished: Callable[[Path, str], str], registry: str = ""):
        self.place, self.finished, self.registry = place, finished, registry
        make_folder(place)
        self._changed = threading.Condition()
        self._process: tuple[str, subprocess.Popen[bytes]] | None = None
        self._ending = False
        self._unwanted: set[str] = set()  # runs to be stopped, perhaps before their process is there
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to work; what ran when the studio ended last is stopped, and can be resumed."""
        for run in self.all():
            if run.state == RUNNING:
                self._save(replace(run, state=STOPPED))
        self._thread = threading.Thread(target=self._work, name="training runs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the worker, which writes a checkpoint first."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._obey()
        if self._thread:
            self._thread.join(GRACE_SECONDS)

    # What there is

    def folder(self, name: str) -> Path:
        """Return the folder of a run. RequestError (404) if there is none."""
        if not name.isalnum() or not (self.place / name / "run.json").is_file():
            raise RequestError(
                "no such training run", status=404, got=name[:40], remedy="the list of runs has them all"
            )
        return self.place / name

    def get(self, name: str) -> Run:
        return Run(**json.loads((self.folder(name) / "run.json").read_text()))

    def all(self, *kinds: str) -> list[Run]:
        """List the runs of these kinds, or of all, newest first."""
        found = [self.get(path.parent.name) for path in self.place.glob("*/run.json")]
        return sorted((run for run in found if not kinds or run.kind in kinds), key=lambda run: -run.created)

    def ahead_of(self, run: Run) -> int:
        """Count the runs that come before one that waits."""
        queue = self._queue()
        place = [one.id for one in queue].index(run.id) if run.id in {one.id for one in queue} else 0
        return place + (self._process is not None)

    def sampled(self, name: str) -> list[int]:
        """Return the steps of a run's sample sheets."""
        return sorted(int(path.stem[5:]) for path in (self.folder(name) / "steps").glob("step-*.png"))

    # What is done

    def new_folder(self) -> Path:
        """Make a folder for a run that is about to be added."""
        folder = self.place / secrets.token_hex(8)
        make_folder(folder / "pictures")
        make_folder(folder / "steps")
        return folder

    def add(self, folder: Path, person: str, name: str, recipe: Mapping[str, Any]) -> Run:
        """Queue a run whose pictures are in its folder."""
        write_atomically(folder / "recipe.json", json.dumps(recipe, indent=1).encode())
        run = Run(folder.name, person, name, recipe["role"], int(recipe["steps"]), time.time())
        self._save(run)
        return run

    def stopping(self, run: Run) -> bool:
        """Return True for a run that ends after its current step."""
        return run.state == RUNNING and run.id in self._unwanted

    def add_stage(self, pilot: str, stage: str, person: str, kind: str = STAGE) -> Run:
        """Queue a stage of a pilot, or its study; the pilot's runs that are over are forgotten, because its folder has
        all of it.

        Raises:
            RequestError: another stage of it waits or runs.
        """
        for run in self.all(*PILOTS):
            if run.name == pilot:
                self.forget(run.id)
        run = Run(self.new_folder().name, person, pilot, stage, 0, time.time(), kind=kind)
        self._save(run)
        return run

    def stop(self, name: str) -> None:
        """Stop a run after its current step, or take it out of the queue."""
        run = self.get(name)
        if run.state == WAITING:
            self._save(replace(run, state=STOPPED))
        elif run.state == RUNNING:
            self._unwanted.add(run.id)
            self._obey()

    def resume(self, name: str) -> None:
        """Queue a run again that was stopped or has failed."""
        run = self.get(name)
        if run.state in (STOPPED, FAILED):
            self._save(replace(run, state=WAITING, error="", created=time.time()))

    def took(self, name: str, step: int, reference: str) -> None:
        """Remember the reference under which a step's adapter was saved."""
        run = self.get(name)
        self._save(replace(run, taken=run.taken | {str(step): reference}))

    def forget(self, name: str) -> None:
        """Remove a run that is over, with its files; what is in the registry stays."""
        if not self.get(name).over:
            raise RequestError("this run is not over", status=409, remedy="stop it first")
        shutil.rmtree(self.folder(name))

    def _save(self, run: Run) -> None:
        with self._changed:
            write_atomically(self.place / run.id / "run.json", json.dumps(asdict(run)).encode())
            self._changed.notify_all()

    def _queue(self) -> list[Run]:
        runs = self.all()
        last = {run.person: 0.0 for run in runs}
        for run in runs:
            last[run.person] = max(last[run.person], run.started)
        return sorted((run for run in runs if run.state == WAITING), key=lambda run: (last[run.person], run.created))

    def _obey(self) -> None:
        """Interrupt the worker if it is unwanted."""
        running = self._process
        if running and (self._ending or running[0] in self._unwanted):
            with contextlib.suppress(ProcessLookupError):
                running[1].send_signal(signal.SIGTERM)

    # The thread

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._ending and not self._queue():
                    self._changed.wait(5)
                if self._ending:
                    return
                run = replace(self._queue()[0], state=RUNNING, started=time.time())
                self._unwanted.discard(run.id)
            self._save(run)
            try:
                self._save(self._made(run))
            except Exception as error:  # whatever it is, the others' turn has to come
                log.exception("run %s", run.id)
                self._save(replace(run, state=FAILED, error=packed(told(error))))

    def _made(self, run: Run) -> Run:
        """Run the worker to its end, and return the run's new state."""
        folder = self.place / run.id
        command = [sys.executable, "-m", "qrlora.apps.studio.worker", str(folder)]
        with (folder / "worker.log").open("ab") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, PLACE: self.registry},
            )
            self._process = run.id, process
            self._obey()  # whoever stopped it before it was there
            code = process.wait()
            self._process = None
        run = replace(self.get(run.id), state=RUNNING)
        last = (events(folder) or [{}])[-1]
        if code == 0 and (run.kind in PILOTS or (folder / ADAPTER).is_file()):
            return replace(run, state=DONE, reference=self.finished(folder, run.person))
        if "error" in last:
            return replace(run, state=FAILED, error=last["error"])
        if "stopped" in last or self._ending or code in (-signal.SIGTERM, 143, -signal.SIGINT, 130):
            return replace(run, state=STOPPED)
        tail = (folder / "worker.log").read_text(errors="replace")[-600:]
        error = QrloraError(
            "the process of this run ended",
            expected="its result",
            got=said("exit code %(code)s: %(tail)s", code=code, tail=tail),
        )
        return replace(run, state=FAILED, error=packed(error.text))


def told(error: Exception) -> Said | str:
    """Return the text of an error, whatever it is."""
    return error.text if isinstance(error, QrloraError) else str(error)


def events(folder: Path) -> list[dict[str, Any]]:
    """Read the worker's events so far, without a line that is still being written."""
    path = folder / "events.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]
