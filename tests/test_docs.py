"""What the documentation shows can be typed: every command parses, every recipe field and file in it exists."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from qrlora.cli import build_parser
from qrlora.cli.train import recipe_of
from qrlora.families import FAMILIES
from qrlora.reading import tomllib
from qrlora.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMING_FROM = sorted((ROOT / "docs").glob("from-*.md"))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """Of blocks marked as shell, and of indented ones; what follows the prompt or stands alone, comments left out."""
    text = page.read_text()
    indented = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    lines = "\n".join([*blocks(page, "sh"), indented]).replace("\\\n", " ").splitlines()
    starts = (line.strip().removeprefix("$ ") for line in lines)
    return [shlex.split(line, comments=True)[1:] for line in starts if line.startswith("qrlora ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_command_on_a_page_can_be_typed(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what trains takes fields and values that a recipe has, from a recipe that ships or that the page shows."""
    monkeypatch.chdir(tmp_path)
    Path("recipes").symlink_to(ROOT / "recipes")
    for arguments in commands(page):
        try:
            options = build_parser(arguments).parse_args(arguments)
        except SystemExit:
            pytest.fail(f"qrlora {shlex.join(arguments)}\n{capsys.readouterr().err}")
        if getattr(options, "recipe", None) and options.recipe.parts[0] != "recipes":
            options.recipe.write_text("\n".join(blocks(page, "toml")))
        if options.command in ("train", "plan"):
            recipe_of(options)


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
