"""Run all cells of a plan: measure those that are missing in several processes, and save each record at once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qrlora._files import write_atomically
from qrlora.errors import DataError
from qrlora.lab.compare.cells import KINDS, Bench
from qrlora.lab.compare.identity import Cell, Record, digest_of
from qrlora.lab.compare.plan import ROWS, Scope

Say = Callable[[str], None]


def adapters_of(scope: Scope) -> list[str]:
    """The adapter methods that the rows need, in their order."""
    return list(dict.fromkeys(ROWS[row].adapter for row in scope.rows))


def cells_of(scope: Scope) -> Iterator[list[Cell]]:
    """Yield all cells in stages; a cell needs only results of earlier stages. The first seed is done before the second,
    so that what is there at any time is whole for some seeds."""
    for seed in scope.seeds:
        training = [
            Cell("train", ROWS[row].adapter, seed, subject, style)
            for row in scope.rows
            if not ROWS[row].joint
            for subject, style in [*((s, "") for s in scope.subjects), *(("", t) for t in scope.styles)]
        ]
        yield list(dict.fromkeys(training))
        pairs = [
            Cell("pair", ROWS[row].adapter, seed, subject, style, row)
            for row in scope.rows
            for subject, style in scope.pairs
        ]
        yield [*(Cell("alone", c.adapter, seed, c.subject, c.style) for c in dict.fromkeys(training)), *pairs]
        yield [*_many(scope, seed), *(_grids(scope) if seed == scope.seeds[0] else ())]


def _many(scope: Scope, seed: int) -> Iterator[Cell]:
    for row in scope.many_rows:
        for count in scope.many:
            if row in scope.rows and count // 2 <= min(len(scope.subjects), len(scope.styles)):
                yield Cell("many", ROWS[row].adapter, seed, row=row, many=count)


def _grids(scope: Scope) -> Iterator[Cell]:
    """The frontier of a few pairs, each of another subject and, as far as there are, style."""
    for i in range(min(scope.grid_pairs, len(scope.subjects))):
        for row in scope.grid_rows:
            if row in scope.rows:
                style = scope.styles[i % len(scope.styles)]
                yield Cell("grid", ROWS[row].adapter, scope.seeds[0], scope.subjects[i], style, row)


def read_records(file: Path) -> list[Record]:
    """Records of a JSON-lines file. Raises DataError if it is none."""
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} holds no records", expected="a records.jsonl of `qrlora lab compare`", got=error
        ) from error


def known_records(folder: Path, scope: Scope, cells: Sequence[Cell], given: Sequence[Record] = ()) -> dict[str, Record]:
    """Return digest -> record, of those of these cells that are in the folder or given."""
    found = {record["digest"]: record for record in given}
    known = {}
    for digest in (digest_of(cell, scope) for cell in cells):
        file = folder / "records" / f"{digest}.json"
        if file.exists():
            known[digest] = json.loads(file.read_text())
        elif digest in found:
            known[digest] = found[digest]
    return known


def run(folder: Path, scope: Scope, workers: int, say: Say, given: Sequence[Record] = ()) -> list[Record]:
    """Return every record of the plan in the order of the cells, and measure those that are missing.

    workers: processes, each on as many threads as the processor has cores for it. given: records of an earlier run that
    are taken as they are. Ctrl-C ends it after what is being done; the same call goes on from there.
    """
    stages = list(cells_of(scope))
    cells = [cell for stage in stages for cell in stage]
    todo = [missing(folder, scope, stage, given) for stage in stages]
    say(f"{len(cells)} cells, {len(cells) - sum(map(len, todo))} of them known; {folder}")
    run_stages(folder, scope, todo, workers, say)
    found = known_records(folder, scope, cells, given)
    return [found[digest_of(cell, scope)] for cell in cells]


def missing(folder: Path, scope: Scope, cells: Sequence[Cell], given: Sequence[Record] = ()) -> list[Cell]:
    """Return the cells without a record."""
    known = known_records(folder, scope, cells, given)
    return [cell for cell in cells if digest_of(cell, scope) not in known]


def run_stages(folder: Path, scope: Scope, stages: Sequence[Sequence[Cell]], workers: int, say: Say) -> None:
    """Measure these cells, stage by stage."""
    total, done, started = sum(map(len, stages)), 0, time.perf_counter()
    if total == 0:
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _begin, (folder, scope, threads)) as pool:
        for stage in stages:
            waiting = {pool.submit(_do, cell): cell for cell in stage}
            try:
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        cell, seconds, done = waiting.pop(future), future.result(), done + 1
                        left = (time.perf_counter() - started) / done * (total - done) / 60
                        say(f"[{done}/{total}] {cell.said}: {seconds:.0f} s; about {left:.0f} min left")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


_BENCH: list[Bench] = []


def _begin(folder: Path, scope: Scope, threads: int) -> None:
    """Load a worker's own base model and judge. Signals are the parent's to take; without it there is nothing to do."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(threads)
    _BENCH.append(Bench.open(folder, scope))


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, which a killed parent cannot tell its workers."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do(cell: Cell) -> float:
    started = time.perf_counter()
    KINDS[cell.kind](_BENCH[0], cell)
    return time.perf_counter() - started


def write_records(file: Path, records: Sequence[Record]) -> None:
    """Write one record a line, floats rounded to five digits."""
    lines = "".join(json.dumps(rounded(record)) + "\n" for record in records)
    write_atomically(file, lines.encode())


def rounded(value: Any) -> Any:
    """JSON values with five digits of every float."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def facts(scope: Scope) -> Record:
    """The plan, as JSON."""
    return json.loads(json.dumps(asdict(scope)))
