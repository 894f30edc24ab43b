"""A catalog whose processes are killed: the next start is clean, and nothing finished is lost or made twice."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import catalogs
from models.test_kills import FORKED, run

pytestmark = pytest.mark.slow
SUBJECTS, STYLES = 12, 2


@pytest.fixture(scope="module")
def shelf(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shelf")
    catalogs.adapters(tiny_sd3, folder, SUBJECTS, STYLES)
    catalogs.tables(folder, SUBJECTS, STYLES)
    return folder


def arguments(shelf: Path, model: Path, out: Path, workers: int) -> list[str]:
    tables = [str(shelf / "products.csv"), str(shelf / "styles.toml")]
    return ["catalog", *tables, "-o", str(out), "--model", str(model), "--batch-size", "2", "--workers", str(workers)]


def committed(out: Path) -> dict[str, tuple[str, str, int]]:
    """Digest, time and attempts of every finished picture, as the journal has them after a kill."""
    if not (out / "catalog.db").is_file():
        return {}
    with sqlite3.connect(out / "catalog.db") as database:
        if not database.execute("PRAGMA user_version").fetchone()[0]:
            return {}
        found = database.execute("SELECT file, digest, at, attempts FROM picture WHERE error = ''").fetchall()
    database.close()
    return {file: (digest, at, count) for file, digest, at, count in found}


def files(out: Path) -> dict[str, int]:
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("pictures/**/*.png")}


def check(out: Path, before: dict[str, tuple[str, str, int]], there: dict[str, int]) -> None:
    """All is there once, what was finished is as it was, and nothing else is left."""
    table = json.loads((out / "catalog.json").read_text())["pictures"]
    assert [row["state"] for row in table] == ["done"] * (SUBJECTS * STYLES)
    assert sorted(files(out)) == sorted(row["file"] for row in table)
    after = committed(out)
    assert {name: after[name] for name in before} == before
    assert {name: time for name, time in files(out).items() if name in there} == there  # whole files, row or not
    assert not [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def seconds(shelf: Path, tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """What an uninterrupted run takes once everything is imported."""
    place = tmp_path_factory.mktemp("whole")
    for name in ("warm", "timed"):
        started = time.perf_counter()
        process = FORKED.Process(
            target=run, args=(arguments(shelf, tiny_sd3, place / name, 0), place / "log", place / "cache")
        )
        process.start()
        process.join(300)
        assert process.exitcode == 0, (place / "log").read_text()
    return time.perf_counter() - started


@pytest.mark.parametrize("attempt", range(20))
def test_killed_at_any_moment(attempt: int, shelf: Path, tiny_sd3: Path, tmp_path: Path, seconds: float) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    given = (arguments(shelf, tiny_sd3, out, 0), log, tmp_path / "cache")
    process = FORKED.Process(target=run, args=given)
    process.start()
    time.sleep(random.Random(attempt).uniform(0.1, 1) * seconds)
    process.kill()
    process.join(60)
    before, there = committed(out), files(out)
    process = FORKED.Process(target=run, args=given)
    process.start()
    process.join(300)
    assert process.exitcode == 0, log.read_text()
    check(out, before, there)


@pytest.mark.parametrize("attempt", range(2))
def test_the_driver_of_two_workers_is_killed(attempt: int, shelf: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    """Its Ray and its workers end with it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qrlora", *arguments(shelf, tiny_sd3, out, 2)]
    process = subprocess.Popen(command, start_new_session=True)
    until(lambda: len(files(out)) > 2 + 6 * attempt or process.poll() is not None)
    process.kill()
    process.wait()
    until(lambda: not alive(process.pid))
    before, there = committed(out), files(out)
    assert before
    assert subprocess.run(command, timeout=600).returncode == 0
    check(out, before, there)


def until(holds: Any, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.05)


def alive(session: int) -> list[int]:
    """Processes of a session that are not zombies."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = entry.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(entry.parent.name))
    return found


NODES = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from qrlora.operations.catalog.cluster import Actors
from qrlora.operations.catalog.journal import Journal
from qrlora.operations.catalog.plan import Settings
from qrlora.operations.catalog.run import Line
from qrlora.operations.catalog.tables import no_registry, read_products, read_styles

shelf, model, out = map(Path, sys.argv[1:])
options = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "_system_config": {"worker_niceness": 0}}
cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
options.pop("_system_config")
second = cluster.add_node(**options)
products, _ = read_products(shelf / "products.csv", no_registry)
file, styles = read_styles(shelf / "styles.toml", no_registry)
settings = Settings(str(model), "float32", out, steps=1)
out.mkdir()
with Journal(out) as journal:
    killed = []

    def progress(what, done, of, note, left):
        workers = {row["worker"] for row in rows().values()}
        if what == "picture" and not killed and len(workers) == 2 and done < of - 6:
            killed.append(sum(len(slot.jobs) for slot in pool.slots))
            cluster.remove_node(second, allow_graceful=False)

    def rows():
        return journal.rows([one.key for row in line.rows() if (one := row.picture)])

    line = Line(products, styles, file, settings, journal, batch_size=2, progress=progress)
    pool = Actors(settings, 2, cluster.address)
    line.train(pool)
    import time
    while not all(slot.started for slot in pool.slots):
        pool.wait() if any(not slot.started for slot in pool.slots) else None
    line.render(pool, line.check())
    found = rows()
    Path(out, "found.json").write_text(json.dumps({
        "killed": len(killed), "states": [row.state for row in line.rows()],
        "again": [row["file"] for row in found.values() if row["attempts"] > 1],
        "workers": sorted({row["worker"] for row in found.values()}),
    }))
    pool.close()
cluster.shutdown()
"""


def test_a_node_that_is_killed_costs_its_current_pictures_alone(shelf: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-c", NODES, str(shelf), str(tiny_sd3), str(out)]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            assert process.wait(500) == 0
        finally:
            for number in alive(process.pid):
                os.kill(number, signal.SIGKILL)
    found = json.loads((out / "found.json").read_text())
    assert found["killed"] == 1 and found["states"] == ["done"] * (SUBJECTS * STYLES)
    assert len(found["workers"]) == 2
    assert len(found["again"]) <= 2  # a batch: what the worker was making
