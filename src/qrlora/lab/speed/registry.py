"""Commits a second of the registry, on SQLite and PostgreSQL, by one writer and by several at once.

    qrlora lab speed registry

Each operation is one transaction with its entry in the audit log: of five, three add an object of 1 kB, one moves an
alias and one adds a tag. PostgreSQL is a server of the machine's own packages that ends with the command.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from qrlora.errors import QrloraError
from qrlora.operations.registry import Registry

BINARIES = "postgresql/*/bin"


def work(place: str, store: str, writer: int, count: int) -> list[str]:
    """Write so many operations as one writer; return the digests of the added objects."""
    registry = Registry.open(place, actor=f"writer-{writer}", store=store)
    added: list[str] = []
    for number in range(count):
        if number % 5 < 3 or not added:
            content = f"{writer} {number} ".encode().ljust(1000, b".")
            added.append(registry.add(content, "report", name=f"writer-{writer}").digest)
        elif number % 5 == 3:
            registry.set_alias("all", "newest", added[-1], reason=f"{writer} {number}")
        else:
            registry.tag(added[-1], f"by-{writer}")
    registry.close()
    return added


def together(place: str, store: str, writers: int, operations: int) -> tuple[list[str], float]:
    """Run several writers at once; return all digests, and operations a second from the first start to the last end."""
    Registry.open(place, store=store).close()  # the tables
    share = [operations // writers + (i < operations % writers) for i in range(writers)]
    with multiprocessing.get_context("spawn").Pool(writers) as pool:
        pool.starmap(_ready, [(i,) for i in range(writers)], chunksize=1)
        started = time.perf_counter()
        found = pool.starmap(work, [(place, store, i, count) for i, count in enumerate(share)], chunksize=1)
        seconds = time.perf_counter() - started
    return [digest for part in found for digest in part], operations / seconds


def _ready(_: int) -> None:
    time.sleep(0.5)  # so that every process gets one, and has imported what it needs


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """Start a PostgreSQL server for the block, and yield its URL.

    Raises:
        QrloraError: its programs are not installed.
    """
    found = sorted(Path("/usr/lib").glob(BINARIES))
    on_path = shutil.which("initdb")
    if not found and not on_path:
        raise QrloraError("no PostgreSQL server", expected="its programs", got="none", remedy="apt install postgresql")
    binaries = found[-1] if found else Path(str(on_path)).parent
    as_user = ["runuser", "-u", "postgres", "--"] if os.name == "posix" and os.getuid() == 0 else []  # it refuses root
    folder = Path(tempfile.mkdtemp(prefix="qrlora-pg-"))
    if as_user:
        shutil.chown(folder, "postgres")
    data = folder / "data"

    def run(program: str, *arguments: str) -> None:
        words = [*as_user, str(binaries / program), "-D", str(data), *arguments]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)

    try:
        run("initdb", "-U", "qrlora", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-k {folder} -c listen_addresses=''"
        run("pg_ctl", "-o", options, "-l", str(folder / "log"), "-w", "start")
        yield f"postgresql+psycopg://qrlora@/postgres?host={folder}"
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # it did not start
            run("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def main(options: SimpleNamespace) -> None:
    """Measure, print, write."""
    from qrlora.lab.speed.common import report

    rows: dict[str, dict[str, float]] = {}
    print("| database | writers | commits/s |\n|---|---|---|")
    for writers in (1, options.writers):
        rates = {}
        for name in ("SQLite", "PostgreSQL"):
            with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
                place = folder if name == "SQLite" else stack.enter_context(postgresql())
                _, rates[name] = together(place, f"{folder}/objects", writers, options.operations)
            print(f"| {name} | {writers} | {rates[name]:.0f} |", flush=True)
        rows[str(writers)] = rates | {"ratio": rates["PostgreSQL"] / rates["SQLite"]}
    print("\n" + "; ".join(f"{n} writers: PostgreSQL {row['ratio']:.2f} of SQLite" for n, row in rows.items()))
    report(options, "cpu", rows=rows)
