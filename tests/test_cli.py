"""The command line, end to end on a tiny model: what it writes, what it says, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import qrlora
from qrlora.adapter import load_adapter
from qrlora.cli import Bar, main, weighted_path

COMMANDS = ("train", "compose", "generate", "inspect", "export", "import", "extract", "similarity", "demo")


@pytest.fixture(scope="module")
def work(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a subject, a style and a plain LoRA, trained by the command line."""
    folder = tmp_path_factory.mktemp("work")
    Image.radial_gradient("L").convert("RGB").save(folder / "mug.png")
    (folder / "style.toml").write_text(
        f'model = "{tiny_sd3}"\nrole = "style"\nimages = "mug.png"\nnoun = "mug"\noutput = "chalk.safetensors"\n'
        "rank = 2\nsteps = 2\nbatch_size = 1\n"
    )
    common = ["--model", str(tiny_sd3), "--rank", "2", "--steps", "2", "--batch-size", "1", "--noun", "mug"]
    subject = ["train", "--subject", str(folder / "mug.png"), *common]
    assert main([*subject, "-o", str(folder / "mug.safetensors")]) == 0
    assert main([*subject, "--method", "lora", "-o", str(folder / "lora.safetensors")]) == 0
    assert main(["train", str(folder / "style.toml"), "--learning-rate", "0.02"]) == 0
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Default outputs land in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_help_is_quick_and_complete() -> None:
    """Loading torch, diffusers or even pydantic would make every typing mistake wait for seconds."""
    script = "import sys; from qrlora.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert all(command in said for command in COMMANDS)
    assert not any(f"'{module}'" in said for module in ("torch", "diffusers", "peft", "pydantic", "numpy"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "usage: qrlora " + command in capsys.readouterr().out


def test_train_help_lists_every_recipe_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = capsys.readouterr().out
    for flag in ("--subject", "--style", "--learning-rate", "--no-triangular", "--checkpoint-every", "-o", "--resume"):
        assert flag in said


def test_training_wrote_what_the_recipe_and_flags_say(work: Path) -> None:
    style = load_adapter(work / "chalk.safetensors").metadata
    assert (style.role, style.trigger, style.rank) == ("style", "<s>", 2)
    assert style.recipe["learning_rate"] == 0.02 and style.recipe["caption"] == "a mug in [trigger] style"
    assert load_adapter(work / "lora.safetensors").metadata.method == "lora"


def test_train_reports_parameters_against_lora(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(work / "style.toml"), "-o", "here.safetensors"]) == 0
    said = capsys.readouterr()
    assert "of a LoRA of the same rank" in said.out and "'a mug in <s> style'" in said.out
    assert "step 2/2" in said.err and "loss" in said.err


def test_compose_prints_interference_and_writes_a_composition(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [f"{work / 'mug.safetensors'}:0.9", f"{work / 'chalk.safetensors'}:-0.5"]
    assert main(["compose", *parts]) == 0
    assert "cosine of ΔW +0.0000" in capsys.readouterr().out
    composed = load_adapter("composition.safetensors")
    assert composed.metadata.role == "composition" and composed.metadata.columns == (0, 1, 2, 3)
    assert main(["compose", *parts]) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["compose", *parts, "--json", "-o", "both.safetensors"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == [0.9, -0.5]


def test_compose_across_bases_only_by_delta_weights(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [str(work / "mug.safetensors"), str(work / "lora.safetensors")]
    assert main(["compose", *parts]) == 2
    assert "compose_delta_weights" in capsys.readouterr().err
    assert main(["compose", *parts, "--delta-weights", "4"]) == 0
    assert "0.00% of the sum's energy is lost" in capsys.readouterr().out
    assert load_adapter("composition.safetensors").metadata.rank == 4


def test_composition_in_lora_spelling(work: Path) -> None:
    parts = [str(work / "mug.safetensors"), str(work / "chalk.safetensors")]
    assert main(["compose", *parts, "--spelling", "lora", "-o", "both.safetensors"]) == 0
    assert load_adapter("both.safetensors").metadata.method == "qrlora"


def test_generate_writes_one_picture_per_prompt_and_seed(work: Path, tiny_sd3: Path) -> None:
    adapters = ["--adapter", f"{work / 'mug.safetensors'}:0.9", "--adapter", str(work / "chalk.safetensors")]
    common = ["--model", str(tiny_sd3), "--steps", "1"]
    assert main(["generate", *common, *adapters, "--prompt", "a <c> mug", "--prompt", "Ein Haus!", "--seeds", "2"]) == 0
    names = sorted(path.name for path in Path("pictures").iterdir())
    assert names == [f"{stem}-seed{seed}.png" for stem in ("00-a-c-mug", "01-ein-haus") for seed in (0, 1)]
    with Image.open(Path("pictures") / names[0]) as picture:
        assert json.loads(picture.text["qrlora"])["prompt"] == ["a <c> mug", "Ein Haus!"]
    assert main(["generate", *common, "--prompt", "a <c> mug"]) == 2  # the default name is taken
    assert main(["generate", *common, "--prompt", "a <c> mug", "-o", "pictures"]) == 0


def test_generate_grid(work: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = ["--adapter", str(work / "mug.safetensors"), "--adapter", str(work / "chalk.safetensors")]
    grid = ["generate", "--model", str(tiny_sd3), "--steps", "1", "--prompt", "a mug", "--grid", "0,0.5,1"]
    assert main([*grid, *adapters]) == 0
    with Image.open("grid.png") as picture:
        assert picture.width > 3 * 96 and picture.height > 3 * 96 and np.array(picture).std() > 0
    assert main([*grid, *adapters[:2], "-o", "b.png"]) == 2
    assert "two adapters" in capsys.readouterr().err


def test_inspect(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = work / "mug.safetensors"
    assert main(["inspect", str(path), str(work / "lora.safetensors")]) == 0
    said = capsys.readouterr().out
    for part in ("subject, method qrlora, rank 2", "family sd3", "2 of 4 columns", "a LoRA of the same rank has"):
        assert part in said
    assert main(["inspect", str(path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["bytes"] == path.stat().st_size and record["metadata"]["trigger"] == "<c>"
    assert 0 < record["parameters"]["ratio"] < 1


def test_similarity(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = [str(work / "mug.safetensors"), str(work / "chalk.safetensors")]
    assert main(["similarity", *pair, "--plot", "cosines.png"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("all layers") and {"q", "r", "delta_r", "delta_w"} <= set(said.split())
    with Image.open("cosines.png") as picture:
        assert picture.width > 400
    assert main(["similarity", *pair, "--files-only", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["total"]) == {"delta_r", "delta_w"}


def test_demo_hands_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    stand_in = types.ModuleType("qrlora.demo")
    stand_in.run = lambda **options: calls.append(options) or "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qrlora.demo", stand_in)
    monkeypatch.setattr(qrlora, "demo", stand_in, raising=False)
    assert main(["demo", "--subject", "mine.jpg", "--seed", "3"]) == 0
    assert calls == [{"out": Path("out/demo"), "seed": 3, "subject": "mine.jpg"}]
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--subject", "missing.png"], "no such picture"),
        (["train", "--images", "a.png"], "'role' is required"),
        (["train", "missing.toml"], "cannot read the recipe"),
        (["train", "--subject", "a.png", "--model", "./missing"], "no such base model"),
        (["train", "--subject", "a.png", "--rank", "many"], "rank = 'many'"),
        (["inspect", "missing.safetensors"], "missing.safetensors"),
        (["generate", "--prompt", "a", "--model", "./missing"], "no such base model"),
        (["generate", "--prompt", "a", "--adapter", "missing.safetensors:0.5"], "missing.safetensors"),
    ],
)
def test_errors_are_said_without_a_traceback(
    arguments: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "a.png").touch()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith(f"qrlora {arguments[0]}:") and "Traceback" not in error


def test_interrupt_says_what_was_saved(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(work / "style.toml"), "-o", "a.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "__call__", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert main(command) == 130
    said = capsys.readouterr().err
    assert "step-000001.safetensors" in said and "--resume" in said
    assert main([*command, "--resume"]) == 0


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.9", "a.safetensors", 0.9),
        ("a.safetensors:-1e-1", "a.safetensors", -0.1),
        (r"C:\adapters\a.safetensors", r"C:\adapters\a.safetensors", 1.0),
        (r"C:\adapters\a.safetensors:2", r"C:\adapters\a.safetensors", 2.0),
        ("run:3/a.safetensors:0.5", "run:3/a.safetensors", 0.5),
        ("run:3/a.safetensors", "run:3/a.safetensors", 1.0),
    ],
)
def test_paths_keep_their_colons(text: str, path: str, weight: float) -> None:
    assert weighted_path(text) == (Path(path), weight)


def test_existing_file_with_a_colon_is_a_path(here: Path) -> None:
    (here / "a:2").touch()
    assert weighted_path("a:2") == (Path("a:2"), 1.0)
