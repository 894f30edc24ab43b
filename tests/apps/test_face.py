"""What a stranger meets first: README in two languages, an installed wheel, examples, the first second of a command."""

from __future__ import annotations

import ast
import functools
import importlib
import json
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from PIL import Image

from qrlora._reading import tomllib
from qrlora.apps.cli import main
from qrlora.pico import world

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
ENGLISH, JAPANESE = ((ROOT / name).read_text() for name in ("README.md", "README.ja.md"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAKEFILE = (ROOT / "Makefile").read_text()
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
HEAVY = {"torch", "numpy", "scipy", "PIL", "pydantic", "diffusers", "transformers", "peft", "matplotlib", "fastapi"}


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    lines = "".join(fenced(text, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.join(shlex.split(line, comments=True)) for line in lines]


def run(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*map(str, arguments)], capture_output=True, text=True, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


# ------------------------------------------------------------------------------------------------------------- README


def test_both_languages_have_the_same_commands_links_numbers_and_sections() -> None:
    assert commands(ENGLISH) == commands(JAPANESE)
    other = {"README.md": "README.ja.md"}
    links = [
        [other.get(link, link) for link in re.findall(r"\]\(([^)]+)\)", text.replace("\n", ""))]
        for text in (ENGLISH, JAPANESE)
    ]
    assert links[0] == links[1]
    numbers = [Counter(re.findall(r"\d+(?:[.,]\d+)*", text)) for text in (ENGLISH, JAPANESE)]
    assert numbers[0] == numbers[1], (numbers[0] - numbers[1], numbers[1] - numbers[0])
    prose = [re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL) for text in (ENGLISH, JAPANESE)]
    code = [Counter(re.findall(r"`[^`\n]+`", text)) for text in prose]
    assert code[0] == code[1], (code[0] - code[1], code[1] - code[0])
    shapes = [re.findall(r"^(#+|-|\|(?!-)) ", text, re.MULTILINE) for text in (ENGLISH, JAPANESE)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("text", [ENGLISH, JAPANESE], ids=["english", "japanese"])
def test_readme_is_short_and_begins_with_what_a_reader_needs(text: str) -> None:
    assert len(text.splitlines()) <= 120
    assert commands(text)[0] == "pip install ."
    assert "](docs/grid.png)" in text.splitlines()[2]
    snippet = fenced(text, "python")[0]
    assert len(snippet.splitlines()) <= 10
    assert len(text[: text.index(snippet) + len(snippet)].splitlines()) <= 40


def test_results_stand_after_their_scale() -> None:
    assert ENGLISH.index("**recognised** if") < ENGLISH.index("**right** if") < ENGLISH.index("| method |")
    compare = (ROOT / "docs/compare.md").read_text()
    assert compare.index("*Recognised*:") < compare.index("**Crosstalk** is") < compare.index("| row |")


def test_readme_names_the_rooms_in_the_order_of_the_import_contract() -> None:
    contract = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["containers"] == ["qrlora"])
    rooms = [name for name in contract["layers"] if (ROOT / "src/qrlora" / name).is_dir()]
    for text in (ENGLISH, JAPANESE):
        end = text.rpartition("`make test`")[2]
        assert list(dict.fromkeys(re.findall(r"`(\w+)`", end))) == rooms


def test_no_file_and_no_function_is_long() -> None:
    lengths: dict[str, float] = {}
    for path in (ROOT / "src").rglob("*.py"):
        if path.parent.name == "versions":  # migrations are lists of columns
            continue
        text, name = path.read_text("utf-8"), str(path.relative_to(ROOT))
        lengths[name] = len(text.splitlines()) / 10  # a file as long as ten functions
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lengths[f"{name}: {node.name}"] = (node.end_lineno or 0) - node.lineno + 1
    assert lengths and not {what: length for what, length in lengths.items() if length > 45}


# ------------------------------------------------------------------------------------------------------ what is shipped


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    return [ROOT / name for name in run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0") if name]


def test_no_committed_file_is_large_but_weights() -> None:
    sizes = {path: path.stat().st_size for path in tracked() if path.is_file()}
    weights = ROOT / "src/qrlora/pico/weights"
    assert not [path for path, size in sizes.items() if size > 2_000_000 and not path.is_relative_to(weights)]
    assert sum(size for path, size in sizes.items() if path.is_relative_to(ROOT / "docs/compare")) <= 500_000


def test_metadata_and_continuous_integration_name_the_same_pythons() -> None:
    project = PROJECT["project"]
    declared = re.findall(r"Python :: (3\.\d+)", "\n".join(project["classifiers"]))
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
    assert tuple(jobs["test"]["strategy"]["matrix"]["python"]) == tuple(declared) == PYTHONS
    assert project["requires-python"] == f">={PYTHONS[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == PYTHONS[0] and f"-t={PYTHONS[0]}-" in MAKEFILE
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project["version"]


def test_the_quick_tests_are_of_every_room() -> None:
    rooms = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    quick = re.findall(r"(\w+)/test_\w+", MAKEFILE)
    assert set(quick) == rooms


def test_every_pin_can_be_installed_on_the_oldest_python() -> None:
    """A pin that needs a later Python than the oldest one carries a marker that says so."""
    oldest = {"python_version": PYTHONS[0], "python_full_version": f"{PYTHONS[0]}.0"}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        pin = Requirement(text)
        try:
            needs = metadata(pin.name).get("Requires-Python")
        except PackageNotFoundError:
            continue
        if needs and (pin.marker is None or pin.marker.evaluate(oldest)):
            assert SpecifierSet(needs).contains(f"{PYTHONS[0]}.0"), f"{pin} needs Python {needs}"


def test_libraries_whose_private_parts_are_used_are_capped() -> None:
    ranges = {pin.name: pin.specifier for pin in map(Requirement, PROJECT["project"]["dependencies"])}
    for name in ("peft", "diffusers", "transformers"):
        assert any(part.operator == "<" for part in ranges[name]), name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "src/qrlora", source / "src/qrlora", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, source)
    return next(out.glob("qrlora-*.whl"))


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = {path.relative_to(ROOT / "src").as_posix() for path in tracked() if (ROOT / "src") in path.parents}
    with zipfile.ZipFile(wheel) as archive:
        assert files <= set(archive.namelist())


@pytest.mark.slow
def test_an_installed_wheel_shows_its_help_and_makes_a_picture(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the dependencies of this one, by their path, and nothing of this checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare")
    python = tmp_path / "bare/bin/python"
    settings: dict[str, Any] = {"cwd": tmp_path, "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
    run(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel, **settings)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    here, there = (run(interpreter, "-c", where).stdout.strip() for interpreter in (sys.executable, python))
    Path(there, "dependencies.pth").write_text(here)
    found = run(python, "-c", "import qrlora; print(qrlora.__file__)", **settings).stdout
    assert Path(found.strip()).is_relative_to(there)
    command = python.with_name("qrlora")
    assert "compose" in run(command, "--help", **settings).stdout
    run(command, "generate", "--prompt", "a red mug in ink style", "--steps", 2, "-o", "mug.png", **settings)
    with Image.open(tmp_path / "mug.png") as made:
        assert made.size == (128, 128)


# -------------------------------------------------------------------------------------------- a command's first second


def after_help(then: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line's help in a new process, then some Python."""
    code = f"""
import contextlib, io, os, sys
from qrlora.apps.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["--help"])
{then}"""
    waiting = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_DISPLAY_ENV")
    inherited = {name: value for name, value in os.environ.items() if name not in waiting}
    return run(sys.executable, "-c", code, env=inherited | environment)


def test_help_imports_nothing_heavy() -> None:
    loaded = set(after_help("print(*{name.partition('.')[0] for name in sys.modules})").stdout.split())
    assert "qrlora" in loaded and not loaded & HEAVY


def test_help_takes_less_than_a_third_of_a_second_of_the_processor() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(sys.executable, "-m", "qrlora", "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.3


WAITING = "print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('GOMP_SPINCOUNT'))"


def test_waiting_threads_of_a_command_sleep_unless_the_user_has_chosen() -> None:
    assert after_help(WAITING).stdout == "PASSIVE 0\n"
    assert after_help(WAITING, OMP_WAIT_POLICY="active").stdout == "active None\n"
    assert after_help(WAITING, GOMP_SPINCOUNT="1000").stdout == "None 1000\n"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have another OpenMP")
def test_openmp_has_read_the_wait_policy_when_torch_is_loaded() -> None:
    shown = after_help("import torch", OMP_DISPLAY_ENV="verbose").stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown and "GOMP_SPINCOUNT = '0'" in shown


# ------------------------------------------------------------------------------------------------------------ examples


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two pictures and adapters of two steps, as somebody has it who has trained before."""
    folder = tmp_path_factory.mktemp("examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRLORA_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for name, subject, style in (("mug", "mug", "flat"), ("chalk", "car", "ink")):
            Image.fromarray(world.render(world.sample_scene(3, subject=subject, style=style))[0]).save(f"{name}.png")
        train = ["train", "--noun", "mug", "--steps", "2", "-o"]
        assert main([*train, "subject.safetensors", "--subject", "mug.png"]) == 0
        assert main([*train, "lora.safetensors", "--subject", "mug.png", "--method", "lora"]) == 0
        assert main([*train, "style.safetensors", "--style", "chalk.png"]) == 0
        yield folder


EXAMPLES = {
    "train_style.py": ("chalk.png car 2", "style.safetensors"),
    "compose.py": ("subject.safetensors style.safetensors", "both.safetensors"),
    "grid.py": ("subject.safetensors style.safetensors 1", "grid.png"),
    "export_for_diffusers.py": ("subject.safetensors", "exported.png"),
    "import_lora.py": ("lora.safetensors subject.safetensors", "imported.safetensors"),
    "serve_client.py": ("http://127.0.0.1:PORT pico+subject:0.9+style 2", "served.png"),
}


def test_every_example_is_run_and_has_about_ten_lines() -> None:
    files = sorted((ROOT / "examples").glob("*.py"))
    assert {path.name for path in files} == set(EXAMPLES)
    assert all(len([line for line in path.read_text().splitlines() if line.strip()]) <= 14 for path in files)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_example_runs_as_it_stands(name: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, made = EXAMPLES[name]
    monkeypatch.chdir(trained)
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = str(trial.getsockname()[1])
    monkeypatch.setattr(sys, "argv", [name, *arguments.replace("PORT", port).split()])
    before = (trained / made).stat().st_mtime_ns if (trained / made).exists() else 0
    server = serving(port) if name == "serve_client.py" else None
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    finally:
        if server:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0
    assert (trained / made).stat().st_mtime_ns > before
    if made.endswith(".png"):
        assert np.asarray(Image.open(trained / made).convert("RGB"), float).std() > 1


def serving(port: str) -> subprocess.Popen[bytes]:
    server = subprocess.Popen([sys.executable, "-m", "qrlora", "serve", "--adapters", ".", "--port", port])
    for _ in range(1200):
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
            return server
        except urllib.error.URLError:
            time.sleep(0.1)
    server.kill()
    raise AssertionError("the server did not start")


# ----------------------------------------------------------------------------------------------------------- notebooks

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


def cells(path: Path) -> list[Any]:
    jupytext = pytest.importorskip("jupytext", reason="no jupytext: pip install 'qrlora[dev]'")
    return list(jupytext.read(path, fmt="py:percent").cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_explains_every_step_and_imports_what_there_is(path: Path) -> None:
    kinds = [cell.cell_type for cell in cells(path)]
    assert kinds[0] == kinds[-1] == "markdown" and kinds.count("markdown") > 4
    assert [cell.metadata.get("tags") for cell in cells(path)].count(["parameters"]) == 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
        if isinstance(node, ast.Import):
            assert all(importlib.import_module(name.name) for name in node.names)
    assert {path.stem for path in NOTEBOOKS} == {"diffusers_users", "researchers"}
    assert f"notebooks/{path.name}" in (ROOT / "docs/index.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_notebook_runs_to_its_figures(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 2 in place of every number among its parameters; what it asserts has to hold even so."""
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    plt.close("all")
    sources = [
        re.sub(r"= \d+", "= 2", cell.source) if "parameters" in cell.metadata.get("tags", ()) else cell.source
        for cell in cells(path)
        if cell.cell_type == "code"
    ]
    exec(compile("\n".join(sources), path.name, "exec"), {})
    assert len(plt.get_fignums()) >= 5
    for number in plt.get_fignums():
        plt.figure(number).savefig("figure.png")
        assert np.asarray(Image.open("figure.png").convert("L"), float).std() > 1
    plt.close("all")


# ---------------------------------------------------------------------------------------------------------- containers


@functools.cache
def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of every stage of the Dockerfile by its name, after those of the stage that it begins from."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n|^\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in (line.split(" ", 1) for line in text.splitlines()):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, ()))
        found[name].append((word, rest))
    return found


def test_the_dockerfile_names_what_there_is() -> None:
    """Extras, files that .dockerignore lets through, stages, the Python of the classifiers."""
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    every = {step for steps in stages().values() for step in steps}
    for word, rest in every:
        if word == "COPY" and rest.startswith("--from="):
            assert rest.split()[0].removeprefix("--from=") in stages()
        elif word == "COPY":
            sources = rest.split()[:-1]
            assert all((ROOT / name).exists() for name in sources) and set(sources) <= sent, rest
        elif word == "FROM" and not rest.startswith(tuple(stages())):
            assert re.match(r"python:(3\.\d+)-", rest)[1] in PYTHONS  # type: ignore[index]
    installed = [rest for word, rest in every if word == "RUN" and "pip install" in rest]
    assert len(installed) == 2 and all("-c constraints.txt" in rest for rest in installed)
    extras = {extra for rest in installed for extra in re.findall(r"\.\[(\w+)\]", rest)}
    assert extras == {"studio"} and extras <= set(PROJECT["project"]["optional-dependencies"])
    assert "qrlora[serve,registry]" in PROJECT["project"]["optional-dependencies"]["studio"]
    kept = " ".join(rest for word, rest in every if word in ("ENV", "ARG"))
    assert not re.search("key|secret|token|password", kept, re.IGNORECASE)


@pytest.mark.parametrize("target", ["serve", "studio"])
def test_a_container_runs_a_command_that_can_be_typed_as_nobody_special(target: str) -> None:
    import click

    from qrlora.apps.cli import cli

    last = dict(stages()[target])
    program, *arguments = json.loads(last["ENTRYPOINT"])
    context = click.Context(cli, info_name=program)
    name, command, rest = cli.resolve_command(context, arguments)
    assert command is not None
    options = command.make_context(name, rest, parent=context).params
    assert name == target and options["host"] == "0.0.0.0" and str(options["port"]) == last["EXPOSE"]
    assert f"http://127.0.0.1:{last['EXPOSE']}/health" in last["HEALTHCHECK"]
    ast.parse(json.loads(last["HEALTHCHECK"].partition("CMD ")[2])[2])
    assert last["USER"] not in ("0", "root") and last["VOLUME"] == "/data"
    assert f"docker build --target {target} " in (ROOT / "docs/serve.md").read_text()


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("no hadolint: pip install 'qrlora[dev]'")
    run(hadolint, ROOT / "Dockerfile")
