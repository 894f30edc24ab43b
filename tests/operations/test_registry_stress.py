"""Many writers at once, and writers that are killed: nothing that was finished is lost, and the audit log is whole."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qrlora.errors import QrloraError
from qrlora.lab.speed.registry import postgresql, together
from qrlora.operations.provenance.audit import broken
from qrlora.operations.registry import Registry
from qrlora.operations.registry.upkeep import remove_unreferenced, verify

WRITERS, OPERATIONS, KILLS = 8, 1000, 50


def assert_nothing_is_lost(registry: Registry, added: list[str], operations: int) -> None:
    log = registry.log()
    assert broken(log) == [] and len(log) == operations
    assert len(set(added)) == len(added) == sum(entry.action == "add" for entry in log)
    assert {one.digest for one in registry.search(limit=10 * operations)} == set(added)
    for digest in added[::50]:
        assert registry.path(digest).stat().st_size == 1000
    newest = [entry for entry in log if entry.action == "alias"][-1]
    assert registry.get("all@newest").digest in newest.details
    assert verify(registry) == [] and remove_unreferenced(registry) == set()


@pytest.mark.slow
def test_eight_writers_lose_nothing_on_sqlite(tmp_path: Path) -> None:
    added, _ = together(str(tmp_path / "registry"), str(tmp_path / "objects"), WRITERS, OPERATIONS)
    registry = Registry.open(tmp_path / "registry", store=str(tmp_path / "objects"))
    assert_nothing_is_lost(registry, added, OPERATIONS)


@pytest.mark.slow
def test_eight_writers_lose_nothing_on_postgresql(tmp_path: Path) -> None:
    try:
        with postgresql() as url:
            added, _ = together(url, str(tmp_path / "objects"), WRITERS, OPERATIONS)
            registry = Registry.open(url, store=str(tmp_path / "objects"))
            assert_nothing_is_lost(registry, added, OPERATIONS)
            registry.close()
    except QrloraError as error:
        if "no PostgreSQL server" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.slow
def test_after_a_kill_at_any_moment_the_next_start_is_clean(tmp_path: Path) -> None:
    """50 kill -9 in the middle of writes: what was said to be done is there, whole, and the rest leaves no trace."""
    place, chance = tmp_path / "registry", random.Random(0)
    finished: list[str] = []
    script = str(Path(__file__).with_name("registry_writer.py"))
    for run in range(KILLS):
        words = [sys.executable, script, str(place), str(run)]
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.1))
            writer.kill()
            finished += [line.strip() for line in [first, *writer.stdout] if line.endswith("\n")]
        registry = Registry.open(place, actor="after")
        remove_unreferenced(registry)
        assert not [path for path in (place / "objects").rglob("*") if path.name.startswith(".")]
        registry.close()
    assert len(finished) >= KILLS
    registry = Registry.open(place)
    assert verify(registry) == []
    for digest in finished:
        assert registry.has(digest) and registry.store.has(digest)
    assert len(registry.store.digests()) == len(registry.search(limit=10**6)) <= len(finished) + KILLS
