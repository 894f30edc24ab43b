"""`qrlora space`: built from files, shown, walked along, and trained in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qrlora.apps.cli import main
from qrlora.method.adapter import load_adapter


@pytest.fixture
def styles(tmp_path: Path, tiny_sd3: Path) -> list[str]:
    """Files of three adapters, each of a picture of its own."""
    files = []
    for i in range(3):
        colour = np.full((16, 16, 3), 80 * i, np.uint8)
        Image.fromarray(colour).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"style{i}.safetensors"))
        train = ["train", "--model", str(tiny_sd3), "--rank", "2", "--steps", "2", "--batch-size", "2"]
        assert main([*train, "--style", str(tmp_path / f"{i}.png"), "-o", files[-1]]) == 0
    return files


def test_from_adapters_to_a_point_of_their_space(
    styles: list[str], tmp_path: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space, point, walk = (str(tmp_path / name) for name in ("s.space.safetensors", "point.safetensors", "walk.png"))
    assert main(["space", "build", *styles, "-o", space]) == 0
    assert "2 components of 3 adapters, 100.0% of their variance" in capsys.readouterr().out
    assert main(["space", "show", space, styles[1], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [member["name"] for member in shown["members"]] == ["style0", "style1", "style2"]
    assert next(iter(shown["adapter"]["nearest"])) == "style1" and shown["adapter"]["unexplained"] < 1e-6
    given = ["--model", str(tiny_sd3), "--style", str(tmp_path / "0.png"), "--rank", "2", "--space", space]
    assert main(["plan", *given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["estimates"]["qrlora"]["parameters"] == 3
    assert main(["train", *given, "--steps", "2", "-o", point]) == 0
    assert "3 coefficients of s.space.safetensors" in capsys.readouterr().out
    assert main(["inspect", point]) == 0
    assert "s.space.safetensors" in capsys.readouterr().out
    assert load_adapter(point).metadata.role == "style"
    sampling = ["--model", str(tiny_sd3), "--steps", "2"]
    assert main(["space", "show", space, "--walk", "2", "-o", walk, *sampling]) == 0
    with Image.open(walk) as strip:
        assert strip.width == 5 * strip.height


def test_what_is_no_space_or_not_in_it_is_said(
    styles: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = str(tmp_path / "s.space.safetensors")
    assert main(["space", "build", *styles, "-o", space]) == 0
    cases = {
        "no space of adapters": ["show", styles[0]],
        "no such component": ["show", space, "--walk", "3", "-o", str(tmp_path / "walk.png")],
        "a walk and its picture belong together": ["show", space, "--walk", "1"],
        "at most one component less": ["build", *styles, "--components", "3", "-o", space],
        "the same adapter twice": ["build", *styles, styles[0], "-o", space],
    }
    for said, arguments in cases.items():
        assert main(["space", *arguments]) == 2
        assert said in capsys.readouterr().err
