"""Pictures of a catalog on several machines are marked by the process that gives out the work, and by no other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import catalogs
from operations.test_catalog_kills import alive
from qrlora.apps.cli import main
from qrlora.operations.catalog.journal import FILE
from qrlora.operations.provenance.c2pa import Origin, mark, read
from qrlora.operations.provenance.canonical import file_digest
from qrlora.operations.provenance.certificates import Certificate, own_roots

NODES = """
import os, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from qrlora.apps.cli import main

*words, keys = sys.argv[1:]
options = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
head = {**options, "_system_config": {"worker_niceness": 0}, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args=head)
cluster.add_node(**options)
os.environ["QRLORA_KEYS"] = keys  # after the nodes were started: they have none
code = main([*words, "--address", cluster.address, "--workers", "2"])
cluster.shutdown()
sys.exit(code)
"""


@pytest.fixture
def words(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A catalog of four pictures that a certificate marks."""
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    Certificate.create(None, "acme", "ACME")
    catalogs.adapters(tiny_sd3, tmp_path, 2, 2)
    tables = catalogs.tables(tmp_path, 2, 2)
    return ["catalog", *tables, "-o", str(tmp_path / "out"), "--model", str(tiny_sd3), "--c2pa", "acme"]


def check(out: Path) -> list[Path]:
    """Every picture carries a valid mark with its adapters, and the table has the digest of the marked file."""
    rows: list[dict[str, Any]] = json.loads((out / "catalog.json").read_text())["pictures"]
    assert [row["state"] for row in rows] == ["done"] * 4
    with contextlib.closing(sqlite3.connect(out / FILE)) as database:
        committed = dict(database.execute("SELECT file, digest FROM picture").fetchall())
    for row in rows:
        path = out / row["file"]
        found = read(path.read_bytes(), own_roots())
        assert (found.state, found.origin["prompt"]) == ("valid", row["prompt"])
        assert len(found.ingredients) >= 2 and committed[row["file"]] == file_digest(path)
    return [out / row["file"] for row in rows]


def test_what_was_made_but_not_marked_is_marked_when_the_catalog_goes_on(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "--workers", "0"]) == 0
    paths = check(tmp_path / "out")
    marked = {path: path.read_bytes() for path in paths}
    (tmp_path / "out" / FILE).unlink()  # as if it was killed before any row: one file is marked, the others are not
    stranger = Certificate.create(tmp_path / "strange", "acme", "ACME")
    for path in paths[1:]:
        with Image.open(path) as image:
            text = PngInfo()
            text.add_itxt("qrlora", image.info["qrlora"])
            image.load()
            image.save(path, pnginfo=text)
    paths[1].write_bytes(mark(paths[1].read_bytes(), Origin("by somebody else"), stranger))
    assert main([*words, "--workers", "0"]) == 0
    assert check(tmp_path / "out") == paths and paths[0].read_bytes() == marked[paths[0]]


@pytest.mark.slow
def test_pictures_of_two_nodes_are_marked_by_a_key_that_neither_has(words: list[str], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "QRLORA_KEYS"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", NODES, *words, "--batch-size", "1", str(tmp_path / "keys")]
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            assert process.wait(500) == 0
        finally:
            for number in alive(process.pid):
                os.kill(number, signal.SIGKILL)
    check(tmp_path / "out")
