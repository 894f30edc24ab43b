"""The command line, end to end on a tiny model: what it writes, what it says, and how it fails."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import qrlora
from qrlora.apps.cli import main
from qrlora.apps.cli.inspect import run_inspect
from qrlora.apps.cli.shared import Bar, Bars, weighted_path
from qrlora.errors import QrloraError
from qrlora.method.adapter import load_adapter, save_adapter
from qrlora.models import families
from qrlora.models.training import loop
from tiny_pipelines import build_tiny_flux, build_tiny_sd3

COMMANDS = (
    "train", "plan", "basis", "compose", "generate", "inspect", "export", "import", "extract", "similarity", "serve",
    "evaluate", "study", "tune", "demo",
)  # fmt: skip


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
    script = "import sys; from qrlora.apps.cli import main\ntry: main(['--help'])\nfinally: print(sorted(sys.modules))"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert all(command in said for command in COMMANDS)
    assert not any(f"'{module}'" in said for module in ("torch", "diffusers", "peft", "pydantic", "numpy"))


WITH_A_WORKER = """
import multiprocessing, pkgutil, sys
from qrlora.apps.cli import main

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(pkgutil.resolve_name, ("qrlora.lab.compare.run:run_stages",))
    sys.exit(main(["generate", "--prompt", "a mug", "--steps", "1", "-o", "mug.png"]))
"""


def test_a_command_and_its_workers_say_nothing_but_their_own() -> None:
    """No library's announcements, whatever optional packages are or are not there."""
    Path("command.py").write_text(WITH_A_WORKER)
    silent = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    source = {"PYTHONPATH": str(Path(qrlora.__file__).parents[1])}
    done = subprocess.run([sys.executable, "command.py"], env=silent | source, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "mug.png\n")
    assert done.stderr in ("", "picture 1/1\n")  # the picture may take more than a second


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0 and "Usage: qrlora " + command in capsys.readouterr().out


def test_train_help_lists_every_recipe_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    for flag in ("--subject", "--style", "--learning-rate", "--no-triangular", "--checkpoint-every", "-o", "--resume"):
        assert flag in said


def test_a_misspelt_command_or_option_is_named_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, hint in (
        (["train", "--subject", "a.png", "--wieght-decay", "1"], "--weight-decay"),
        (["inspect", "--jsn", "a.safetensors"], "--json"),
        (["inspct", "a.safetensors"], "inspect"),
    ):
        assert main(arguments) == 2 and f"Did you mean '{hint}'?" in capsys.readouterr().err


def test_train_prints_the_schema_of_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--schema"]) == 0
    committed = Path(__file__).parents[2] / "recipes" / "recipe.schema.json"
    assert capsys.readouterr().out == committed.read_text()


def test_training_wrote_what_the_recipe_and_flags_say(work: Path) -> None:
    style = load_adapter(work / "chalk.safetensors").metadata
    assert (style.role, style.trigger, style.rank) == ("style", "<s>", 2)
    assert style.recipe["learning_rate"] == 0.02 and style.recipe["caption"] == "a mug in [trigger] style"
    assert load_adapter(work / "lora.safetensors").metadata.method == "lora"


def test_train_reports_parameters_against_lora(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(work / "style.toml"), "-o", "here.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "of a LoRA of the same rank" in said and "'a mug in <s> style'" in said


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


def test_compose_with_null_space_projection(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [str(work / "mug.safetensors"), str(work / "chalk.safetensors")]
    assert main(["compose", *parts, "--json"]) == 0  # a subject with a style: the default is 0.5
    told = json.loads(capsys.readouterr().out)
    assert 0 <= told["energy_kept"] <= 1 and told["null_space"] == 0.5
    assert load_adapter("composition.safetensors").metadata.provenance["null_space"] == 0.5
    assert main(["inspect", "composition.safetensors"]) == 0
    assert "null space projection 0.5" in capsys.readouterr().out
    composed = load_adapter("composition.safetensors")
    provenance = {"parts": composed.metadata.provenance["parts"], "giving_way": 0.5}  # as older files name it
    older = dataclasses.replace(composed, metadata=dataclasses.replace(composed.metadata, provenance=provenance))
    save_adapter(older, Path("older.safetensors"))
    assert main(["inspect", "older.safetensors"]) == 0
    assert "null space projection 0.5" in capsys.readouterr().out
    assert main(["compose", *parts, "--null-space", "0", "-o", "sum.safetensors"]) == 0
    assert "null-space" not in capsys.readouterr().out
    assert "null_space" not in load_adapter("sum.safetensors").metadata.provenance
    assert main(["compose", parts[0], parts[0], "-o", "twice.safetensors"]) == 0  # two subjects: the default is 0
    assert "null-space" not in capsys.readouterr().out
    assert main(["compose", parts[0], "--null-space", "1", "-o", "one.safetensors"]) == 2
    assert "needs several adapters" in capsys.readouterr().err
    assert main(["compose", *parts, "--null-space", "1", "-o", "all.safetensors"]) == 0
    assert "null-space projection 1: 0." in capsys.readouterr().out
    mixed = [parts[0], str(work / "lora.safetensors"), "--delta-weights", "8", "-o", "mixed.safetensors"]
    assert main(["compose", *mixed, "--null-space", "1"]) == 0
    assert "null-space projection 1: 0." in capsys.readouterr().out
    assert load_adapter("mixed.safetensors").metadata.provenance["null_space"] == 1
    assert main(["compose", *parts, "--null-space", "2"]) == 2
    assert "expected a number from 0 to 1" in capsys.readouterr().err


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
    assert main(["generate", *common, "--prompt", "a <c> mug", "-o", "one.png"]) == 0 and Path("one.png").is_file()
    for more in (["--seeds", "2", "-o", "two.png"], ["-o", "one.jpg"]):
        assert main(["generate", *common, "--prompt", "a <c> mug", *more]) == 2
    assert not Path("two.png").exists() and not Path("one.jpg").exists()


def test_generate_with_null_space_projection(work: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The picture is that of the composition with the same strength, given or by default, and not that of the sum."""
    parts = [str(work / "mug.safetensors"), str(work / "chalk.safetensors")]
    common = ["generate", "--model", str(tiny_sd3), "--steps", "1", "--prompt", "a mug"]
    both = [word for part in parts for word in ("--adapter", f"{part}:3")]
    assert main([*common, *both, "--null-space", "1", "-o", "way.png"]) == 0
    assert "null-space projection 1: 0." in capsys.readouterr().err
    assert main([*common, *both, "--null-space", "0", "-o", "sum.png"]) == 0
    assert "null-space" not in capsys.readouterr().err
    assert main([*common, *both, "-o", "default.png"]) == 0
    assert main([*common, *both, "--null-space", "0.5", "-o", "half.png"]) == 0
    assert main(["compose", *(f"{part}:3" for part in parts), "-o", "default.safetensors"]) == 0
    assert main([*common, "--adapter", "default.safetensors", "-o", "default-file.png"]) == 0
    composed = [f"{part}:3" for part in parts]
    assert main(["compose", *composed, "--null-space", "1", "-o", "way.safetensors"]) == 0
    assert main([*common, "--adapter", "way.safetensors", "-o", "file.png"]) == 0
    seen = {
        name: np.asarray(Image.open(f"{name}.png")).astype(int)
        for name in ("way", "sum", "file", "default", "half", "default-file")
    }
    assert abs(seen["way"] - seen["file"]).max() <= 1 < abs(seen["way"] - seen["sum"]).max()
    assert (seen["default"] == seen["half"]).all() and abs(seen["default"] - seen["default-file"]).max() <= 1
    assert abs(seen["default"] - seen["sum"]).max() > 1
    assert main([*common, *both[:2], "--null-space", "1", "-o", "one.png"]) == 2
    assert "needs several adapters" in capsys.readouterr().err and not Path("one.png").exists()


def test_generate_grid(work: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = ["--adapter", str(work / "mug.safetensors"), "--adapter", str(work / "chalk.safetensors")]
    grid = ["generate", "--model", str(tiny_sd3), "--steps", "1", "--prompt", "a mug", "--grid", "0,0.5,1"]
    assert main([*grid, *adapters]) == 0
    with Image.open("grid.png") as picture:
        assert picture.width > 3 * 96 and picture.height > 3 * 96 and np.array(picture).std() > 0
    assert main([*grid, *adapters[:2], "-o", "b.png"]) == 2
    assert "two adapters" in capsys.readouterr().err
    for output, said in (("b.jpg", "a file *.png"), (".", "a folder")):
        assert main([*grid, *adapters, "-o", output]) == 2
        assert said in capsys.readouterr().err
    weighted = ["--adapter", str(work / "mug.safetensors"), "--adapter", f"{work / 'chalk.safetensors'}:0.5"]
    assert main([*grid, *weighted, "-o", "b.png"]) == 2
    assert "leave the weights out" in capsys.readouterr().err


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
    assert main(["similarity", pair[0], str(work / "lora.safetensors"), "--files-only"]) == 2
    assert "leave out --files-only" in capsys.readouterr().err


def test_similarity_plots_a_panel_of_every_quantity(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    pair = [str(work / "mug.safetensors"), str(work / "chalk.safetensors")]
    assert main(["similarity", *pair, "--plot", "new/cosines.png"]) == 0
    panels = drawn[0].axes
    assert [axes.get_title(loc="left")[:2].strip(":") for axes in panels] == ["ΔR", "ΔW", "Q", "R"]
    layers = len(load_adapter(work / "mug.safetensors").deltas)
    assert all(len(axes.lines[0].get_ydata()) == layers for axes in panels)


def test_demo_hands_its_options_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    stand_in = types.ModuleType("qrlora.apps.demo")
    stand_in.run = lambda **options: calls.append(options) or "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qrlora.apps.demo", stand_in)
    monkeypatch.setattr(qrlora.apps, "demo", stand_in, raising=False)
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
        (["basis", "./missing"], "no such base model"),
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
        patch.setattr(Bar, "__call__", lambda bar, done, of, loss, *_: loss and os.kill(os.getpid(), signal.SIGINT))
        assert main(command) == 130
    said = capsys.readouterr().err
    assert "step-000001.safetensors" in said and "--resume" in said
    assert main([*command, "--resume"]) == 0


# Bad input


def undigested(data: bytes) -> bytes:
    """An adapter file as versions without digests wrote it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for key in ("qrlora.digest", "qrlora.identity"):
        header["__metadata__"].pop(key, None)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda data: data[:-7], "truncated"),
        (lambda data: b"", "0 bytes"),
        (lambda data: (1 << 40).to_bytes(8, "little") + data[8:], "oversized header"),
        (lambda data: pickle.dumps({"a": 1}), "pickle"),
        (lambda data: data[:-4] + b"\xff\xff\xff\x7f", "damaged"),
        (lambda data: undigested(data)[:-4] + b"\xff\xff\xff\x7f", "NaN"),
        (lambda data: data.replace(b'"F32"', b'"I32"'), "wrong dtype"),
        (lambda data: data.replace(b'qrlora.rank":"2"', b'qrlora.rank":"3"'), "rank and columns disagree"),
        (lambda data: data.replace(b"qrlora.trigger", b"qrlora.tregger"), "'qrlora.tregger'"),
    ],
)
def test_bad_files_are_said_without_a_traceback(
    work: Path, harm: Callable[[bytes], bytes], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (work / "mug.safetensors").read_bytes()
    assert harm(data) != data
    Path("bad.safetensors").write_bytes(harm(data))
    for command in (
        ["inspect"],
        ["compose", str(work / "chalk.safetensors")],
        ["generate", "--prompt", "a", "--adapter"],
    ):
        assert main([*command, "bad.safetensors"]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"qrlora {command[0]}: bad.safetensors: ") and said in error and "expected:" in error
    assert not list(Path().glob("composition*"))


def test_another_base_is_refused_by_every_command(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build_tiny_sd3()
    with torch.no_grad():
        other.transformer.transformer_blocks[0].attn.to_q.weight.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    build_tiny_flux().save_pretrained(tmp_path / "flux")
    one, two = (str(work / name) for name in ("mug.safetensors", "chalk.safetensors"))
    for model, said in (("other", "first transformer_blocks.0.attn.to_q"), ("flux", "lacks")):
        assert (
            main(["generate", "--model", str(tmp_path / model), "--prompt", "a", "--steps", "1", "--adapter", one]) == 2
        )
        assert said in capsys.readouterr().err
    for model, said in (("other", "another base weight"), ("flux", "lacks")):
        asked = ["--model", str(tmp_path / model)]
        for command in (["similarity", one, two], ["compose", one, two, "--spelling", "lora"]):
            assert main([*command, *asked]) == 2
            error = capsys.readouterr().err
            assert said in error and str(load_adapter(Path(one)).metadata.base_model) in error


def test_another_rank_of_basis_is_refused_with_both_and_the_way_out(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wider = ["train", str(work / "style.toml"), "--basis-rank", "6", "-o", "wider.safetensors"]
    assert main(wider) == 0
    parts = [str(work / "mug.safetensors"), "wider.safetensors"]
    assert main(["compose", *parts]) == 2
    error = capsys.readouterr().err
    assert "'basis_rank': 4" in error and "'basis_rank': 6" in error and "--delta-weights RANK" in error
    assert main(["compose", *parts, "--delta-weights", "4"]) == 0
    assert "of the sum's energy is lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: Image.new("RGB", (1, 1)).save(path), "too small"),
        (lambda path: path.write_text("no picture"), "unreadable picture"),
        (lambda path: path.mkdir(), "no pictures in"),
        (
            lambda path: Image.new("RGB", (40, 40)).save(
                path, save_all=True, append_images=[Image.new("RGB", (40, 40), "red")]
            ),
            "2 frames",
        ),
    ],
)
def test_bad_pictures_are_said_without_a_traceback(
    make: Callable[[Path], object], said: str, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Path("bad.png"))
    assert main(["train", "--subject", "bad.png", "--model", str(tiny_sd3), "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("qrlora train:") and not Path("subject.safetensors").exists()


def test_a_cmyk_picture_trains(tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("CMYK", (40, 40), (0, 255, 255, 0)).save("print.jpg")
    options = ["--model", str(tiny_sd3), "--steps", "1", "--rank", "2", "--batch-size", "1"]
    Path("print.txt").write_text("a [trigger] print")
    assert main(["train", "--subject", "print.jpg", *options]) == 0
    assert capsys.readouterr().out.startswith("1 picture, 1 captioned by file\n")


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("generate", "--steps", "0"),
        ("generate", "--steps", "-1"),
        ("generate", "--batch-size", "0"),
        ("generate", "--seeds", "0"),
        ("generate", "--seed", str(2**70)),
        ("generate", "--seed", "one"),
        ("generate", "--resolution", "-16"),
        ("generate", "--guidance", "nan"),
        ("generate", "--grid", "0,inf"),
        ("compose", "--delta-weights", "0"),
        ("basis", "--rank", "0"),
        ("basis", "--basis-rank", "-4"),
        ("demo", "--steps", "0"),
        ("study", "--catch", "-1"),
        ("extract", "--rank", "0"),
        ("import", "--alpha", "nan"),
    ],
)
def test_numbers_that_cannot_be_are_named(
    command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = {"generate": ["--prompt", "a"], "compose": ["a.safetensors"], "basis": [], "demo": [], "study": []}
    needed |= {"extract": ["a", "--base", "b"], "import": ["a.safetensors"]}
    assert main([command, *needed[command], option, value]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"qrlora {command}: Invalid value for '{option}': expected a") and "--help" in said


def test_a_weight_that_is_no_number_makes_no_picture(
    work: Path, tiny_sd3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for weight in ("nan", "1_0", "x"):
        adapter = f"{work / 'mug.safetensors'}:{weight}"
        assert main(["generate", "--model", str(tiny_sd3), "--steps", "1", "--prompt", "a", "--adapter", adapter]) == 2
        assert "expected a finite number" in capsys.readouterr().err
        assert main(["evaluate", adapter, "--palette", "#fff"]) == 2
        assert "expected a finite number" in capsys.readouterr().err and not list(Path().rglob("*.png"))


@pytest.mark.parametrize("output", ["mug", "mug.bin", "."])
def test_an_output_that_cannot_be_is_refused_before_training(
    output: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "train", lambda *_, **__: pytest.fail("trained"))
    assert main(["train", str(work / "style.toml"), "-o", output]) == 2
    assert ".safetensors" in capsys.readouterr().err


def test_used_up_memory_comes_with_a_remedy_and_faults_with_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory", "a fault"]
    monkeypatch.setattr(families, "load_pipeline", lambda *_, **__: (_ for _ in ()).throw(RuntimeError(said.pop(0))))
    for _ in range(2):
        assert main(["generate", "--prompt", "a"]) == 2
        assert "lower --batch-size" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a fault"):
        main(["generate", "--prompt", "a"])


def test_all_commands_on_pico(capsys: pytest.CaptureFixture[str]) -> None:
    """The default base model from a picture to a grid, with steps too few to learn anything."""
    Image.radial_gradient("L").convert("RGB").save("mug.png")
    short = ["--steps", "1", "--rank", "2", "--batch-size", "1"]
    for role in ("subject", "style"):
        assert main(["train", f"--{role}", "mug.png", "--noun", "mug", *short]) == 0
    parts = ["subject.safetensors", "style.safetensors"]
    assert main(["compose", "subject.safetensors:0.9", "style.safetensors", "--spelling", "lora"]) == 0
    assert main(["inspect", "composition.safetensors", *parts]) == 0
    said = capsys.readouterr().out
    assert "base model pico, family sd3" in said and "ratio 0.49" in said
    assert main(["similarity", *parts, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["total"]) == {"q", "r", "delta_r", "delta_w"}
    prompt = ["--prompt", "a <c> in <s> style", "--steps", "1"]
    assert main(["generate", *prompt, "--adapter", "composition.safetensors"]) == 0
    adapters = ["--adapter", parts[0], "--adapter", parts[1]]
    assert main(["generate", *prompt, *adapters, "--grid", "0,1"]) == 0
    with Image.open("pictures/00-a-c-in-s-style-seed0.png") as picture, Image.open("grid.png") as grid:
        assert picture.size == (128, 128) and grid.width > 2 * 128


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def tick(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let a bar see this many seconds pass before each unit of work."""
    clock = itertools.count(0, seconds)
    monkeypatch.setattr("qrlora.apps.cli.shared.time", types.SimpleNamespace(perf_counter=lambda: next(clock)))


@pytest.mark.parametrize(
    ("units", "seconds", "printed"),
    [
        (9, 0.1, []),
        (5, 1.0, ["layer 5/5  to_q"]),
        (20, 3.0, ["layer 10/20  to_q  0:30 left", "layer 20/20  to_q"]),
        (40, 60.0, [f"layer {4 * i}/40  to_q  {40 - 4 * i}:00 left" for i in range(1, 10)] + ["layer 40/40  to_q"]),
    ],
)
def test_a_log_gets_few_lines_and_none_of_short_work(
    units: int, seconds: float, printed: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tick(monkeypatch, seconds)
    bar = Bar("layer")
    for done in range(1, units + 1):
        bar(done, units, "to_q")
    assert capsys.readouterr().err.splitlines() == printed


def test_a_resumed_run_estimates_from_its_own_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 0.0, 60.0])
    monkeypatch.setattr("qrlora.apps.cli.shared.time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    bars = Bars()
    bars("step", 70, 100)
    bars("step", 80, 100)
    assert capsys.readouterr().err == "step 80/100  2:00 left\n"


def test_a_terminal_sees_a_bar_and_errors_in_colour_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        bar = Bar("layer")
        for done in (1, 2):
            bar(done, 3, "to_q")
        raise QrloraError("no such thing", expected="a mug")

    monkeypatch.setattr(run_inspect, "callback", fail)
    monkeypatch.setenv("TERM", "xterm")
    tick(monkeypatch, 1.0)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(["inspect", "a.safetensors"]) == 2
    bar, error = terminal.getvalue().split("\x1b[?25h")  # the cursor is back
    assert "1/3" in bar and "2/3" in bar and "to_q" in bar and "left" in bar
    assert error == "\x1b[1;31mqrlora inspect: no such thing\x1b[0m\n  expected: a mug\n"


def test_options_that_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    for one, other in (("--subject a.png b.png", "--style c.png"), ("--resume", "--restart")):
        assert main(["train", *one.split(), *other.split()]) == 2
        said = capsys.readouterr().err
        assert f"{one.split()[0]} and {other.split()[0]} exclude each other" in said and "--help" in said


def test_a_shell_is_told_what_completes_a_word() -> None:
    typed = {"COMP_WORDS": "qrlora train --weight", "COMP_CWORD": "2", "_QRLORA_COMPLETE": "bash_complete"}
    asked = [sys.executable, "-m", "qrlora"]
    done = subprocess.run(asked, env={**os.environ, **typed}, capture_output=True, text=True)
    assert done.stdout == "plain,--weight-decay\n"


def test_long_preparations_show_progress_and_short_ones_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_sd3: Path, here: Path
) -> None:
    for name in ("a", "b"):
        Image.radial_gradient("L").convert("RGB").save(here / f"{name}.png")
    flags = ["--model", str(tiny_sd3), "--rank", "2", "--steps", "1", "--batch-size", "1", "--buckets", "--flip"]
    flags += ["--num-repeats", "2,1"]
    for patience, seen in ((60.0, 0), (0.0, 1)):
        monkeypatch.setattr("qrlora.apps.cli.shared.PATIENCE", patience)
        assert (
            main(["train", "--subject", "a.png", "b.png", "--num-repeats", "2,1", *flags, "-o", "a.safetensors"]) == 0
        )
        said = capsys.readouterr().err
        assert said.count("pictures read 2/2") == seen and said.count("pictures encoded 4/4") == seen
    assert load_adapter("a.safetensors").metadata.recipe["num_repeats"] == [2, 1]
