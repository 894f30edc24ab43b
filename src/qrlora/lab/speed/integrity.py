"""Measure the cost of checking a file's digest, as a share of the time that loading takes.

    qrlora lab speed integrity

Adapters of random numbers: one of pico's layers at rank 8, one of FLUX.1-dev's 418 matrices at rank 64 in both dtypes.
The file is in the system's cache, so the share on a disk is less.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch

from qrlora._tensor_file import read_header, read_tensors
from qrlora.lab.speed.common import report
from qrlora.method.adapter import Adapter, AdapterMetadata, load_adapter, save_adapter
from qrlora.method.adapter.record import triangular_mask

WIDTH = 3072
SQUARE, UP, DOWN, OUTPUT = (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH, 5 * WIDTH)
FLUX = 19 * [*8 * [SQUARE], *2 * [UP], *2 * [DOWN]] + 38 * [*3 * [SQUARE], UP, OUTPUT]
PICO = 6 * [*8 * [(160, 160)], *2 * [(640, 160)], *2 * [(160, 640)]]


def made(shapes: list[tuple[int, int]], rank: int, dtype: torch.dtype) -> Adapter:
    """Return an adapter of random ΔR on a basis that need not exist."""
    columns = tuple(range(rank))
    metadata = AdapterMetadata("qrlora", rank, float(rank), rank, columns, triangular=True, algorithm="fast")
    named = {f"blocks.{i}": shape for i, shape in enumerate(shapes)}
    deltas = {
        n: (torch.randn(rank, width) * triangular_mask(columns, width)).to(dtype) for n, (_, width) in named.items()
    }
    return Adapter(metadata, deltas, named, dict.fromkeys(named, "0" * 64))


class Nothing:
    """A hash that computes nothing."""

    def update(self, data: memoryview) -> None:
        """Ignore the data."""

    def hexdigest(self) -> str:
        """Return an empty digest."""
        return ""


def checked(path: Path) -> None:
    """Read a file's tensors with their digest."""
    with path.open("rb") as stream:
        read_tensors(stream, read_header(stream))


def unchecked(path: Path) -> None:
    """Read a file's tensors without one."""
    with mock.patch("hashlib.sha256", Nothing):
        checked(path)


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median of the wall time."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main(options: SimpleNamespace) -> None:
    """Measure, print, write."""
    rows = {}
    print("| adapter | file | load | read | read and hashed | share |\n|---|---|---|---|---|---|")
    for name, shapes, rank, dtype in (
        ("pico", PICO, 8, torch.float32),
        ("FLUX.1, 418 matrices, rank 64, float32", FLUX, 64, torch.float32),
        ("the same in bfloat16", FLUX, 64, torch.bfloat16),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "adapter.safetensors")
            save_adapter(made(shapes, rank, dtype), path)
            size = path.stat().st_size
            load, read, hashed = (seconds(partial(f, path), options.rounds) for f in (load_adapter, unchecked, checked))
        share = max(0.0, hashed - read) / load
        rows[name] = {"bytes": size, "load": load, "read": read, "hashed": hashed, "share": share}
        times = " | ".join(f"{taken * 1e3:.1f} ms" for taken in (load, read, hashed))
        print(f"| {name} | {size / 1e6:.1f} MB | {times} | {share:.2f} |")
    report(options, "cpu", rows=rows)
