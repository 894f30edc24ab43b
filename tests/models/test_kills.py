"""Runs in real processes that are killed, told to end, started twice, or whose disk goes: what they leave.

Processes are forked from one that has imported everything, so that the moments tried lie in the run and not in imports.
Each number of tries is a parameter's, and a try that falls is a failure.
"""

from __future__ import annotations

import multiprocessing
import os
import pty
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from PIL import Image

from qrlora.method.adapter import load_adapter

pytestmark = pytest.mark.slow
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["qrlora.apps.cli", "qrlora.models.training.loop"])
STEPS = 24


def run(arguments: list[str], log: Path, cache: Path, terminal: str = "") -> None:
    """One command as a process of its own; what it prints goes to a file, or to a terminal that is then its own."""
    from qrlora.apps.cli import main, shared

    shared.PATIENCE = shared.INTERVAL = 0.0  # the log tells when steps are taken
    if terminal:
        os.setsid()
    there = os.open(terminal or log, os.O_RDWR | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(there, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ["QRLORA_CACHE"] = str(cache)
    torch.set_num_threads(1)
    code = main(arguments)
    os._exit(code)


class Work:
    """A folder for one run's output, and the command that fills it."""

    def __init__(self, folder: Path, model: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.output, self.log = folder / "out" / "mug.safetensors", folder / "log"
        self.output.parent.mkdir(parents=True)
        Image.radial_gradient("L").convert("RGB").save(folder / "mug.png")
        self.arguments = ["train", "--model", str(model), "--subject", str(folder / "mug.png"), "--noun", "mug"]
        self.arguments += ["--rank", "2", "--steps", str(STEPS), "--batch-size", "1", "--checkpoint-every", "1"]
        self.arguments += ["--log-with", "none", "-o", str(self.output)]

    @property
    def checkpoints(self) -> list[Path]:
        return sorted(self.output.with_suffix(".checkpoints").glob("step-*.safetensors"))

    def start(self, *more: str, terminal: str = "") -> ForkServerProcess:
        self.log.write_text("")
        process = FORKED.Process(target=run, args=([*self.arguments, *more], self.log, self.cache, terminal))
        process.start()
        return process

    def end(self, process: ForkServerProcess) -> int:
        process.join(120)
        assert process.exitcode is not None, self.log.read_text()
        return process.exitcode

    def finish(self) -> None:
        """What a user does next: the same command, with --resume if there is anything to resume."""
        if self.output.exists():
            return
        code = self.end(self.start(*(["--resume"] if self.checkpoints else [])))
        assert code == 0, self.log.read_text()

    def step(self, number: int, process: ForkServerProcess) -> None:
        """Wait until that step's checkpoint has been there."""
        while process.exitcode is None and (not self.checkpoints or int(self.checkpoints[-1].stem[5:]) < number):
            time.sleep(0.002)

    def check(self, whole: dict[str, torch.Tensor]) -> None:
        """It is the uninterrupted run bit for bit, and nothing else is left."""
        deltas = load_adapter(self.output).deltas
        assert all(torch.equal(deltas[name], whole[name]) for name in whole)
        assert sorted(path.name for path in self.output.parent.iterdir()) == ["mug.checkpoints", "mug.safetensors"]
        names = [path.name for path in self.output.with_suffix(".checkpoints").iterdir()]
        assert names == [f"step-{STEPS:06d}.safetensors"]


@pytest.fixture(scope="module")
def fresh(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Work]:
    cache = tmp_path_factory.mktemp("cache")
    return lambda: Work(tmp_path_factory.mktemp("work"), tiny_sd3, cache)


@pytest.fixture(scope="module")
def whole(fresh: Callable[[], Work]) -> dict[str, torch.Tensor]:
    """The uninterrupted run; the first fills the caches."""
    work = fresh()
    work.finish()
    return dict(load_adapter(work.output).deltas)


@pytest.fixture(scope="module")
def seconds(fresh: Callable[[], Work], whole: dict[str, torch.Tensor]) -> float:
    """What a run takes."""
    started, work = time.perf_counter(), fresh()
    work.finish()
    return time.perf_counter() - started


@pytest.mark.parametrize("attempt", range(25))
def test_killed_at_any_moment(
    attempt: int, fresh: Callable[[], Work], whole: dict[str, torch.Tensor], seconds: float
) -> None:
    work = fresh()
    process = work.start()
    time.sleep(random.Random(attempt).uniform(0, seconds))
    process.kill()
    work.end(process)
    work.finish()
    if list(work.output.parent.glob(".*")):  # killed after the adapter was there and before its lock was given up
        assert work.end(work.start("--resume")) == 0
    work.check(whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
@pytest.mark.parametrize("attempt", range(4))
def test_told_to_end_it_saves_and_says_so(
    name: str, attempt: int, fresh: Callable[[], Work], whole: dict[str, torch.Tensor]
) -> None:
    work, number = fresh(), getattr(signal, name)
    work.arguments += ["--checkpoint-every", "1000"]
    process = work.start()
    while process.exitcode is None and "step " not in work.log.read_text():
        time.sleep(0.002)
    time.sleep(attempt * 0.02)
    os.kill(process.pid or 0, number)
    assert work.end(process) in (128 + number, 0), work.log.read_text()
    if process.exitcode:
        assert "interrupted after step" in work.log.read_text() and len(work.checkpoints) == 1
        assert "--resume" in work.log.read_text() and not list(work.output.parent.glob(".*"))
    work.finish()
    deltas = load_adapter(work.output).deltas
    assert all(torch.equal(deltas[layer], whole[layer]) for layer in whole)


def test_a_terminal_that_closes_is_no_reason_to_lose_anything(
    fresh: Callable[[], Work], whole: dict[str, torch.Tensor]
) -> None:
    work = fresh()
    ours, theirs = pty.openpty()
    process = work.start(terminal=os.ttyname(theirs))
    work.step(3, process)
    os.close(theirs)
    os.close(ours)  # the kernel tells whoever leads the session on it
    assert work.end(process) == 128 + signal.SIGHUP
    assert work.checkpoints and not work.output.exists()
    work.finish()
    work.check(whole)


@pytest.mark.parametrize("attempt", range(5))
def test_of_two_at_once_one_is_refused(attempt: int, fresh: Callable[[], Work], whole: dict[str, torch.Tensor]) -> None:
    work = fresh()
    both = [work.start(), work.start()]
    assert sorted(work.end(process) for process in both) == [0, 2]
    work.check(whole)


def test_a_folder_deleted_on_the_way(fresh: Callable[[], Work], whole: dict[str, torch.Tensor]) -> None:
    work = fresh()
    process = work.start()
    work.step(3, process)
    work.output.parent.rename(work.output.parent.with_name("gone"))  # rmtree would race with the run's own deletions
    assert work.end(process) == 2
    said = work.log.read_text()
    saved = Path(said.partition("it was saved as ")[2].partition(" instead")[0])
    assert saved.name == "mug.safetensors", said
    deltas = load_adapter(saved).deltas
    assert all(torch.equal(deltas[layer], whole[layer]) for layer in whole)


@pytest.fixture
def small_disk(fresh: Callable[[], Work]) -> Iterator[Work]:
    """A run whose output lies on a file system of a megabyte."""
    work = fresh()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(work.output.parent)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("only root mounts file systems")
    yield work
    subprocess.run(["umount", "-l", str(work.output.parent)], check=True)


@pytest.mark.parametrize("left", [0, 8, 40])
def test_a_full_disk_is_said_before_the_model_is_loaded(left: int, small_disk: Work) -> None:
    """left: KB that are free."""
    work = small_disk
    (work.output.parent / "others").write_bytes(b"\0" * (1024 - left) * 1024)
    work.arguments[work.arguments.index("--model") + 1] = "pico"  # whose adapter takes more
    started = time.perf_counter()
    process = work.start()
    assert work.end(process) == 2 and time.perf_counter() - started < 20
    said = work.log.read_text()
    assert "mug.safetensors" in said and "remedy:" in said and ("no room" in said or "No space" in said)
    assert [path.name for path in work.output.parent.iterdir()] == ["others"]


def test_a_disk_that_fills_on_the_way(small_disk: Work, whole: dict[str, torch.Tensor]) -> None:
    work = small_disk
    process = work.start()
    work.step(3, process)
    with (work.output.parent / "others").open("wb", buffering=0) as stream:
        for size in (65536, 4096, 1):
            try:
                while True:
                    stream.write(b"\0" * size)
            except OSError:
                pass
    assert work.end(process) == 2
    said = work.log.read_text()
    assert "training goes on without this checkpoint" in said
    deltas = load_adapter(said.rpartition("it was saved as ")[2].partition(" instead")[0]).deltas
    assert all(torch.equal(deltas[layer], whole[layer]) for layer in whole)
    assert not list(work.output.parent.glob(".*.tmp"))
