"""`qrlora lab`: every command has help, and a speed table comes as JSON with the machine's facts."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest

from qrlora.apps.cli import main
from qrlora.apps.cli.lab import lab, speed
from qrlora.pico import world

PAIR = world.HELD_BACK_PAIRS[0]


def names(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, command in group.commands.items():
        found += names(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.mark.parametrize("path", names(lab), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", *path, "--help"]) == 0
    said = capsys.readouterr().out
    assert f"qrlora lab {' '.join(path)}" in said and "--" in said


def test_speed_tables_go_to_files_of_their_own() -> None:
    defaults = [
        parameter.default
        for command in speed.commands.values()
        for parameter in command.params
        if parameter.name == "json"
    ]
    assert len(set(defaults)) == len(defaults) == len(speed.commands)


def test_unknown_names_are_refused_with_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["claims", "--only", "beauty"], ["where", "--tasks", "unicorn"]):
        assert main(["lab", *arguments]) == 2
        said = capsys.readouterr().err
        assert "expected:" in said and "Traceback" not in said


def test_a_table_comes_with_what_was_asked_for_and_on_which_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "training.json"
    asked = "--quick --width 512 --side 2 --rank 4 --dtypes float32 --methods lora;qrlora --device cpu"
    assert main(["lab", "speed", "training", *asked.split(), "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["options"]["width"] == 128 and found["options"]["rank"] == 4
    for fact in ("date", "device", "cores", "threads", "load_before", "memory_gb", "system", "python", "torch", "peft"):
        assert found["machine"][fact] is not None, fact
    table = found["results"]["float32"]
    assert table["lora"]["wall_ratio"] == [1.0, 1.0, 1.0]
    assert table["qrlora"]["optimizer_bytes"] < 0.6 * table["lora"]["optimizer_bytes"]
    assert "qrlora" in capsys.readouterr().out


def test_strictness_falls_with_blur_on_reserved_and_held_back_pairs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, few in (("RESERVED_SUBJECTS", ("teapot",)), ("RESERVED_STYLES", ("gold",)), ("HELD_BACK_PAIRS", (PAIR,))):
        monkeypatch.setattr(world, name, few)
    assert main(["lab", "judge", "--each", "2", "--json", str(tmp_path / "judge.json")]) == 0
    found = json.loads((tmp_path / "judge.json").read_text())
    assert list(found) == ["reserved pairs", "held-back pairs"] and "mirrored" in capsys.readouterr().out
    for group in found.values():
        rows = group["measured"]
        assert group["pictures"] == 2 and rows["as they are"]["recognised"] == 1
        assert rows["blur 3"]["named"] < 0.5 < rows["as they are"]["named"]
        assert len({tuple(row.values()) for row in rows.values()}) > len(rows) / 2
