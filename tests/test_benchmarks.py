"""`make bench` runs what there is with options that it has, and every table comes as JSON with the machine's facts."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


class Parsed(Exception):
    pass


def commands() -> list[list[str]]:
    """What `make bench` runs, its variables put in."""
    text = (ROOT / "Makefile").read_text()
    variables = dict(re.findall(r"^(\w+) \??= ?(.*)$", text, re.MULTILINE))
    recipe = text.split("\nbench:")[1].split("\n\n")[0].replace("\\\n", " ").splitlines()[1:]
    filled = (re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], line) for line in recipe)
    return [shlex.split(line)[1:] for line in filled]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a benchmark by its name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.mark.parametrize("command", commands(), ids=lambda command: Path(command[0]).stem)
def test_make_bench_asks_for_what_there_is(command: list[str], script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser) -> None:
        options = parse(parser, command[1:])
        assert options.json.parent == Path("out/benchmarks")
        assert getattr(options, "quick", True), "the default of `make bench` is minutes"
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(Parsed):
        script(Path(command[0]).stem).main()


def test_make_bench_writes_every_table_to_a_file_of_its_own() -> None:
    files = [command[command.index("--json") + 1] for command in commands()]
    assert len(set(files)) == len(files)
    assert {Path(command[0]).stem for command in commands()} >= {"basis", "training", "inference", "serve"}


def test_a_table_comes_with_what_was_asked_for_and_on_which_machine(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "training.json"
    asked = "--quick --width 512 --side 2 --rank 4 --dtypes float32 --methods lora;qrlora --device cpu"
    monkeypatch.setattr("sys.argv", ["training.py", *asked.split(), "--json", str(path)])
    script("training").main()
    found = json.loads(path.read_text())
    assert found["options"]["width"] == 128 and found["options"]["rank"] == 4
    for fact in ("date", "device", "cores", "threads", "load_before", "memory_gb", "system", "python", "torch", "peft"):
        assert found["machine"][fact] is not None, fact
    table = found["results"]["float32"]
    assert table["lora"]["wall_ratio"] == [1.0, 1.0, 1.0]
    assert table["qrlora"]["optimizer_bytes"] < 0.6 * table["lora"]["optimizer_bytes"]
    assert "qrlora" in capsys.readouterr().out
