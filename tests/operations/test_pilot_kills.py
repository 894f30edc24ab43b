"""A pilot whose process is killed at any moment: the next start goes on, and nothing finished is lost or made twice."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from models.test_kills import FORKED, run
from operations.test_pilot import SAMPLE, quick
from qrlora.operations.registry import Registry
from qrlora.operations.registry.upkeep import verify

pytestmark = pytest.mark.slow


def started(place: Path) -> FORKED.Process:
    process = FORKED.Process(
        target=run, args=(["pilot", "run", str(place / "pilot" / "line.toml")], place / "log", place / "cache")
    )
    process.start()
    return process


@pytest.fixture(scope="module")
def seconds(tmp_path_factory: pytest.TempPathFactory) -> float:
    for name in ("warm", "timed"):
        place = tmp_path_factory.mktemp(name)
        quick(SAMPLE, place / "pilot")
        begin = time.perf_counter()
        process = started(place)
        process.join(300)
        assert process.exitcode in (0, 1), (place / "log").read_text()
        taken = time.perf_counter() - begin
    return taken


@pytest.mark.parametrize("attempt", range(20))
def test_a_killed_stage_is_finished_by_the_next_start(attempt: int, seconds: float, tmp_path: Path) -> None:
    quick(SAMPLE, tmp_path / "pilot")
    process = started(tmp_path)
    time.sleep(random.Random(attempt).uniform(0, 1.1 * seconds))
    process.kill()  # SIGKILL; nothing if it has ended
    process.join(60)
    folder = tmp_path / "pilot" / "line.pilot"
    whole = [*folder.glob("pictures/*.png"), *folder.glob("adapters/*.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in whole}

    again = started(tmp_path)
    again.join(300)
    assert again.exitcode in (0, 1), (tmp_path / "log").read_text()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(folder.glob("pictures/*.png"))) == 2
    assert list(json.loads((folder / "state.json").read_text())) == ["one_picture"]
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    registry = Registry.open(folder / "registry", create=False)
    assert verify(registry) == []
    registry.close()
