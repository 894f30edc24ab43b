"""What the documentation shows works: commands and snippets run to their pictures, recipe fields and files exist."""

from __future__ import annotations

import ast
import contextlib
import functools
import itertools
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import types
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from PIL import Image

import qrlora
from qrlora._reading import tomllib
from qrlora.apps.cli import cli, main
from qrlora.apps.cli.train import recipe_of
from qrlora.method.adapter import Adapter, AdapterMetadata, save_adapter
from qrlora.method.basis import weight_digest
from qrlora.models.families import FAMILIES
from qrlora.models.training.recipe import Recipe
from qrlora.operations.registry import Registry
from qrlora.pico import world
from tiny_pipelines import BUILDERS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMING_FROM = sorted((ROOT / "docs").glob("from-*.md"))


def snippets(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block, and of every `qrlora` command that stands in an indented one. A block of
    shell comes a line at a time, without what continues it."""
    lines = iter(page.read_text().replace("\\\n", " ").splitlines())
    for line in lines:
        if fence := re.fullmatch(r" *```(\w+)", line):
            block = list(itertools.takewhile(lambda inner: inner.strip() != "```", lines))
            shell = fence[1] == "sh"
            yield from ((fence[1], part) for part in (block if shell else [textwrap.dedent("\n".join(block))]) if part)
        elif re.match(r" {4}(\$ )?qrlora ", line):
            yield "sh", line.strip().removeprefix("$ ")


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in snippets(page) if found == language]


def commands(page: Path) -> list[list[str]]:
    return [shlex.split(line, comments=True)[1:] for line in blocks(page, "sh") if line.startswith("qrlora ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_on_a_page_can_be_typed(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what trains takes fields and values that a recipe has, from a recipe that ships or that the page shows."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    for arguments in commands(page):
        try:
            options = parsed(arguments)
        except click.UsageError as error:
            pytest.fail(f"qrlora {shlex.join(arguments)}\n{error.format_message()}")
        if getattr(options, "recipe", None) and options.recipe.parts[0] != "recipes":
            options.recipe.write_text("\n".join(blocks(page, "toml")))
        if arguments[0] in ("train", "plan"):
            if str(options.output).startswith("registry:"):  # a file stands in for it when the command runs
                options.output = "in-the-registry.safetensors"
            recipe_of(options)


def parsed(arguments: list[str]) -> types.SimpleNamespace:
    """The options of a command as click reads them, without running it."""
    context, command = click.Context(cli, info_name="qrlora"), cli
    while isinstance(command, click.Group):
        name, command, arguments = command.resolve_command(context, arguments)
        context = command.make_context(name, list(arguments), parent=context)
        arguments = [*context._protected_args, *context.args]
    return types.SimpleNamespace(**context.params)


def test_pages_show_commands_at_all() -> None:
    assert all(commands(page) for page in PAGES if page.parent.name == "families" or page in COMING_FROM)
    assert len(COMING_FROM) == 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_toml_and_links_on_a_page_hold(page: Path) -> None:
    for block in blocks(page, "python"):
        ast.parse(block)
    for block in blocks(page, "toml"):
        Recipe.of(tomllib.loads(block))
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", COMING_FROM, ids=lambda page: page.stem)
def test_what_others_names_are_translated_to_exists(page: Path) -> None:
    """The first column of the table: recipe fields, or commands and flags, which start with a dash or with qrlora."""
    cells = [line.split("|")[1] for line in page.read_text().splitlines() if line.startswith("| `")]
    names = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    fields = {name for name in names if not name.startswith(("--", "qrlora "))}
    assert fields and not fields - set(Recipe.model_fields)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_has_a_page_that_names_its_class_and_recipe(family) -> None:
    page = (ROOT / "docs/families" / f"{family.name}.md").read_text()
    assert f"`{family.pipeline_class}`, `{family.name}`" in page
    assert str(family.steps) in page and f"guidance {family.guidance:g}" in page
    assert f"families/{family.name}.md" in (ROOT / "docs/families.md").read_text()


def test_both_languages_show_the_same() -> None:
    english, japanese = (list(snippets(ROOT / name)) for name in ("README.md", "README.ja.md"))
    for (kind, one), (other_kind, other) in zip(english, japanese, strict=True):
        assert kind == other_kind
        if kind == "python":
            assert ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))
        else:
            assert plain(kind, one) == plain(kind, other)


TRANSLATED = sorted((ROOT / "docs/ja").glob("*.md"))
SHORTER = {"studio.md"}
"""Japanese pages that say less than the English ones."""


def outline(page: Path) -> dict[str, Any]:
    """Links, numbers of two digits and more (smaller ones are words), code in sentences, headings, lists and rows."""
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    numbers = re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"(\d+)年\d+月", r"\1 ", prose))
    return {
        "links": {re.sub(r"^(\.\./)+", "", link) for link in re.findall(r"\]\(([^)]+)\)", prose)},
        "numbers": Counter(number for number in numbers if len(number) > 1),
        "code": {" ".join(code.split()) for code in re.findall(r"`[^`]+`", prose)},
        "shape": Counter(re.findall(r"^(#+|- |\|(?!-))", prose, re.MULTILINE)),
    }


@pytest.mark.parametrize("page", TRANSLATED, ids=lambda page: page.name)
def test_a_japanese_page_shows_what_its_english_page_shows(page: Path) -> None:
    english = ROOT / "docs" / page.name
    shown, meant = ([(kind, plain(kind, text)) for kind, text in snippets(one)] for one in (page, english))
    if page.name in SHORTER:
        assert set(shown) <= set(meant)
        return
    assert shown == meant
    said, asked = outline(page), outline(english)
    assert {what: said[what] for what in asked if said[what] != asked[what]} == {}, asked


# ---------------------------------------------------------------------------------------- what is shown, to its picture

ELSEWHERE = {
    "qrlora approval ": "needs people with keys: test_policy_command.py",
    "qrlora pilot ": "minutes, and people with keys: test_pilot.py",
    "qrlora demo": "minutes: test_demo.py runs it with fewer steps",
    "qrlora studio": "a browser: test_studio_pages.py",
}
"""Beginnings of commands that are run by other tests."""

LISTED = {
    "qrlora lab compare --small": "minutes: test_bench.py runs smaller ones",
    "qrlora lab compare --tune": "hours: test_bench.py runs smaller ones",
    "qrlora lab compare": "a night: test_bench.py runs smaller ones",
    "qrlora lab where --tasks teapot,rocket,chalk,mosaic": "minutes: test_bench.py runs a smaller one",
    "qrlora lab where --quick": "minutes: test_bench.py runs a smaller one",
    "qrlora lab speed inference": "minutes: test_benchmarks.py runs a smaller table",
    "qrlora lab speed inference --quick": "a minute: test_benchmarks.py runs a smaller table",
    "qrlora lab speed basis --whole flux.1": "minutes, and 12 GB",
    "qrlora lab speed basis --shapes flux.1 --peft": "minutes",
    "qrlora lab speed basis --shapes sd3.5-medium --peft --rounds 3": "minutes",
    "qrlora lab speed training --dtypes float32": "minutes: test_benchmarks.py runs a smaller table",
    "qrlora lab speed training --width 640 --seconds 90": "minutes: test_benchmarks.py runs a smaller table",
    "qrlora lab speed studio": "needs a browser: test_studio_shots.py drives one",
    "qrlora studio": "ends when it is told to: test_studio_pages.py starts it",
    "qrlora study --tally votes-ann.json votes-bea.json": "needs people: test_study.py makes votes up",
    "qrlora tune mug.safetensors chalk.safetensors --subject mug.png --style chalk.png --style-metrics csd "
    "--weights csd=csd.pth": "needs weights to download: test_learned.py makes some up",
    "qrlora serve --adapters /shared/adapters --address HEAD:6379 --engines 2 --threads 8 --host 0.0.0.0": "machines",
    "qrlora serve --adapters adapters --address 127.0.0.1:6379 --engines 2 --threads 1": "a cluster: test_serve.py",
    "qrlora catalog products.csv styles.toml": "needs the page's files: test_catalog.py makes some",
    "qrlora catalog products.csv styles.toml -o spring --brand brands/brand.toml --policy policy.toml": "as above",
    "qrlora catalog products.csv styles.toml --workers 2 --threads 1": "Ray: test_catalog_kills.py",
    "qrlora catalog products.csv styles.toml --address HEAD:6379 --workers 64": "machines: test_catalog_kills.py",
    "qrlora registry export chalk --to mlflow:sqlite:///runs.db": "an extra: test_registry_tracking.py",
    "qrlora registry import 'mlflow:sqlite:///runs.db#RUN' --registry partner": "as above",
    "qrlora lab speed catalog --postgresql postgresql+psycopg://localhost/qrlora --plot catalog.svg": "a database: "
    "test_catalog_model.py runs a smaller one",
    'StableDiffusionXLPipeline.from_single_file("model.safetensors").save_pretrained("model")': "needs a real model",
}
"""Commands and Python blocks that are not run here, and why."""

OTHERS = {".", "accelerate", "hf", "make", "pip", "python", "ray", "st", "torchrun"}
"""First words of lines that are not run: they make environments, ask the hub, start several processes, or (st) have a
test of their own."""

MODELS = {"exchange": "sdxl"} | {name: name for name in BUILDERS}
"""Page -> family of the tiny model that its commands run on; on pico where there is none."""

RECIPES = {"pico": "", "sd1.5": "sd", "sd3.5": "sd3"}
"""Beginning of a recipe's name -> family of its model, where it is not that family's name."""


def picture(path: Path, subject: str, style: str = "flat") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = int.from_bytes(path.name.encode()[:3], "big")
    Image.fromarray(world.render(world.sample_scene(seed, subject=subject, style=style))[0]).save(path)


def draw_inputs(folder: Path) -> None:
    """The pictures that the pages name."""
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for name in ("src", "docs", "brands"):
        (folder / name).symlink_to(ROOT / name)
    single = ["teapot.png", "mug.png", "front.png", "side.png", "mine.jpg", "dog.jpg", "dog.png", "painting.jpg"]
    several = [
        "mugs/front.png",
        "images/a.png",
        "train/10_teapot/a.png",
        "holiday/a.png",
        "holiday/b.png",
        "paintings/a.png",
    ]
    shown = [f"{group}/{name}.png" for group in ("pictures", "ours", "theirs") for name in "ab"]
    for name in [*single, *several, *shown]:
        picture(folder / name, "mug")
    for name in ("chalk.png", "style.png"):
        picture(folder / name, "car", "ink")
    with Image.open(folder / "mug.png") as mug:
        mask = Image.radial_gradient("L").resize(mug.size)
        mask.save(folder / "mugs/front.mask.png")
        cut = mug.convert("RGBA")
        cut.putalpha(mask)
        cut.save(folder / "cutout.png")
        mug.resize((160, 96)).save(folder / "holiday/b.png")


@functools.cache
def made_adapters(folder: Path, family: str) -> Path:
    """A folder with a model of the family, and a subject, a style and somebody's LoRA that were trained on it."""
    here = folder / (family or "pico")
    here.mkdir()
    draw_inputs(here / "inputs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        if family:
            BUILDERS[family]().save_pretrained(family)
        train = ["train", "--noun", "mug", "-o"]
        subject = ["subject.safetensors", "--subject", "inputs/mug.png"]
        style = ["style.safetensors", "--style", "inputs/chalk.png"]
        somebody = ["anybodys-lora.safetensors", "--style", "inputs/chalk.png", "--method", "lora"]
        for what in (subject, style, somebody):
            assert main(shortened([*train, *what], family)) == 0
        assert main(["export", somebody[0], "--for", "diffusers", "-o", "anybodys.safetensors"]) == 0
    return here


def laid_out(made: Path, family: str, page: Path, folder: Path) -> None:
    """The folder of a reader of the page, with all that its commands begin with."""
    shutil.copytree(made / "inputs", folder, dirs_exist_ok=True, symlinks=True)
    (folder / "adapters").mkdir()
    names = {
        "teapot": "subject",
        "mug": "subject",
        "chalk": "style",
        "adapters/teapot": "subject",
        "adapters/chalk": "style",
    }
    if page.stem == "exchange":
        names["chalk"] = "anybodys"
    for name in ("subject", "style", "anybodys", "anybodys-lora"):
        names[name] = name
    for name, source in names.items():
        shutil.copy(made / f"{source}.safetensors", folder / f"{name}.safetensors")
    if family:
        (folder / family).symlink_to(made / family)
    if page.stem == "exchange":
        assert main(["export", "mug.safetensors", "--for", "diffusers", "-o", "mug-diffusers.safetensors"]) == 0
        tuned = BUILDERS[family]()
        with torch.no_grad():
            for name, module in tuned.unet.named_modules():
                if name.endswith("to_q"):
                    module.weight += torch.randn(len(module.weight), 2) @ torch.randn(2, module.weight.shape[1])
        tuned.save_pretrained("tuned")


def shortened(arguments: list[str], model: str) -> list[str]:
    """The same command with a hundredth of the steps, a few pictures, and `model`, if any, in place of a large one."""
    command = arguments[0]
    small = ["--model", model, "--resolution", "64", "--dtype", "float32"] if model else []
    tiny = [*small, "--rank", "2", "--alpha", "2", "--accumulation", "1", "--batch-size", "1"] if model else []
    steps = int(arguments[arguments.index("--steps") + 1]) // 100 if "--steps" in arguments else 2
    added = {
        "train": ["--steps", f"{max(steps, 2)}", *tiny],
        "plan": tiny,
        "generate": ["--steps", "2", *small],
        "evaluate": ["--steps", "2", "--seeds", "2"] if "--prompt" in arguments else [],
        "tune": ["--steps", "2", "--budget", "24"],
    }
    return [*arguments, *added.get(command, [])]


def pictures_of(value: Any) -> Iterator[Image.Image]:
    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from pictures_of(part)


def assert_shows_something(image: Image.Image) -> None:
    pixels = np.asarray(image.convert("RGB"), float)
    assert pixels.max() > 32 and pixels.std() > 1, "a picture without content"


class Reader:
    """Somebody who types what a page shows, from top to bottom, in one folder."""

    def __init__(self, family: str, made: Path, serving: contextlib.ExitStack):
        self.family, self.made, self.serving, self.names = family, made, serving, dict[str, Any]()
        with socket.socket() as trial:
            trial.bind(("127.0.0.1", 0))
            self.port = str(trial.getsockname()[1])

    def type(self, kind: str, text: str) -> None:
        text = text.replace("8000", self.port)
        before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
        if kind == "toml":  # the recipe of the command that follows
            self.recipe = text
        elif kind == "python":
            exec(compile(text, "a documented snippet", "exec"), self.names)
        elif text.startswith("curl "):
            subprocess.run(shlex.split(text)[:1] + ["-sSf", *shlex.split(text)[1:]], check=True, capture_output=True)
        else:
            self.command(shlex.split(text, comments=True)[1:])
        made = [path for path in Path().rglob("*") if path.is_file() and before.get(path) != path.stat().st_mtime_ns]
        images = [Image.open(path) for path in made if path.suffix == ".png"] + [*pictures_of([*self.names.values()])]
        for image in images:
            assert_shows_something(image)
        if re.search(r"^qrlora generate(?!.* registry:)|\.save\(|generate_mixed|write_bytes", text, re.MULTILINE):
            assert images
        if re.match("qrlora (train|compose|export|import|extract|study|tune)", text):
            assert made

    def command(self, arguments: list[str]) -> None:
        recipes = [Path(value).stem.rpartition("-")[0] for value in arguments if value.startswith("recipes/")]
        family = RECIPES.get(recipes[0], recipes[0]) if recipes else self.family
        if family and not Path(family).exists():
            Path(family).symlink_to(made_adapters(self.made, family) / family)
        if recipe := next((Path(value) for value in arguments[1:2] if value.endswith(".toml")), None):
            recipe.exists() or recipe.write_text(self.recipe)
        if arguments[0] == "serve":
            self.serving.enter_context(served([*arguments, "--port", self.port], self.port))
            return
        if arguments[0] == "train":
            self.before_training(arguments, family)
        if "-o" not in arguments:  # a default name is never replaced
            role = "style" if "--style" in arguments else "subject"
            default = {"train": f"{role}.safetensors", "evaluate": "evaluation/report.html", "tune": "tune/report.html"}
            Path(default.get(arguments[0], "none")).unlink(missing_ok=True)
        assert main(shortened(arguments, family)) in (0, 1), shlex.join(arguments)  # 1: found wanting

    def before_training(self, arguments: list[str], family: str) -> None:
        """A page's trainings are alternatives, so none meets another's checkpoints; what resumes has begun before."""
        for folder in {found for part in (Path(), Path("recipes")) for found in part.glob("*.checkpoints")}:
            shutil.rmtree(folder)
        if "--resume" in arguments:
            begun = [part for part in arguments if part != "--resume"]
            assert main(shortened(begun, family)) == 0, shlex.join(begun)


@contextlib.contextmanager
def served(arguments: list[str], port: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "qrlora", *arguments])
    try:
        for _ in range(1200):
            assert process.poll() is None, "the server ended"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
                break
            time.sleep(0.1)
        yield
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRLORA_CACHE", str(folder / "cache"))
        yield folder


RUN = [
    pytest.param(page, marks=() if page.name == "README.md" else pytest.mark.slow)
    for page in PAGES
    if page not in TRANSLATED  # they show the same
]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_what_a_page_shows_runs_to_its_picture(page: Path, made: Path, tmp_path: Path, monkeypatch: Any) -> None:
    family = MODELS.get(page.stem, "")
    monkeypatch.setenv("QRLORA_CACHE", str(made / "cache"))
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    monkeypatch.setenv("QRLORA_REGISTRY", str(tmp_path / "company"))
    Registry.open(tmp_path / "company").close()  # where one is named, it has to be there
    monkeypatch.chdir(tmp_path)
    laid_out(made_adapters(made, family), family, page, tmp_path)
    with contextlib.ExitStack() as serving:
        reader = Reader(family, made, serving)
        for kind, text in snippets(page):
            if not is_listed(kind, text):
                reader.type(kind, text)


def plain(kind: str, text: str) -> str:
    return shlex.join(shlex.split(text, comments=True)) if kind == "sh" else text.strip()


def is_listed(kind: str, text: str) -> bool:
    shell = kind == "sh" and (text.split()[0] in OTHERS or text.startswith(tuple(ELSEWHERE)))
    return shell or plain(kind, text) in LISTED


def test_nothing_is_listed_that_no_page_shows_and_every_block_has_a_language() -> None:
    shown = {
        shlex.join(shlex.split(t, comments=True)) if k == "sh" else t.strip() for p in PAGES for k, t in snippets(p)
    }
    assert not set(LISTED) - shown
    for page in PAGES:
        kinds = {kind for kind, _ in snippets(page)}
        assert kinds <= {"sh", "python", "toml"}, page
        assert len(re.findall(r"^ *```\w*$", page.read_text(), re.MULTILINE)) % 2 == 0, page
        assert not re.search(r"^ *```\w+ \w", page.read_text(), re.MULTILINE), page


def test_both_sites_build_without_a_warning_and_ask_nothing_of_others(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="needs Python 3.11")
    subprocess.run([sys.executable, ROOT / "docs" / "build.py", "--out", tmp_path], check=True, capture_output=True)
    for language, words in (("en", "Does it really separate?"), ("ja", "1枚の画像")):
        assert words in (tmp_path / language / "index.html").read_text("utf-8")
        for page in (tmp_path / language).rglob("*.html"):
            fetched = re.findall(r'(?:src|href)="(https?://[^"]+)"[^>]*(?:script|stylesheet)', page.read_text("utf-8"))
            fetched += re.findall(r'<script[^>]+src="(https?:[^"]+)', page.read_text("utf-8"))
            assert not fetched, page
    across = 0
    for page in (tmp_path / "ja").rglob("*.html"):
        for link in re.findall(r'href="((?:\.\./)+en/[^"#]*)', page.read_text("utf-8")):
            across += (page.parent / link / "index.html").exists() or pytest.fail(f"{page}: {link}")
    assert across
    commands = (tmp_path / "en" / "commands" / "index.html").read_text("utf-8")
    assert "qrlora pilot decide" in commands
    assert "Adapter" in (tmp_path / "en" / "reference" / "index.html").read_text("utf-8")


def test_the_example_of_the_file_format_is_what_is_written(tmp_path: Path) -> None:
    """docs/file-format.md, byte for byte, but for the order of keys."""
    shown = (ROOT / "docs/file-format.md").read_text("utf-8")
    payload = re.search(r"^    ((?:[0-9a-f]{2} ){7}[0-9a-f]{2})$", shown, re.MULTILINE)
    header = re.search(r"^    \{\n(?:    .*\n)+?    \}$", shown, re.MULTILINE)
    assert payload and header
    weight = torch.tensor([[2.0, 0, 0], [0, 1, 0]])
    metadata = AdapterMetadata(
        **{"method": "qrlora", "rank": 1, "alpha": 1.0, "basis_rank": 2, "columns": (1,), "triangular": True},
        **{"algorithm": "exact", "basis_fingerprint": "0" * 16, "family": "sd3", "base_model": "pico"},
        **{"role": "style", "trigger": "<s>", "licence": "CC0-1.0"},
    )
    delta = torch.tensor([[0.0, 0.5, -0.25]])
    save_adapter(
        Adapter(metadata, {"proj": delta}, {"proj": (2, 3)}, {"proj": weight_digest(weight)}),
        tmp_path / "a.safetensors",
    )
    data = (tmp_path / "a.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert json.loads(data[8 : 8 + size]) == json.loads(textwrap.dedent(header[0]))
    assert data[8 + size :] == bytes.fromhex(payload[1])
    assert f"is {size} bytes with its padding" in shown


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: qrlora\.(\w+)$", (ROOT / "docs/reference.md").read_text(), re.MULTILINE)
    assert sorted([*listed, "__version__"]) == sorted(qrlora.__all__)
