"""Build the documentation as two sites, English and Japanese: python docs/build.py [--out out/site]

The pages of docs/ are copied, the reference of commands and schemas is generated from the code, links to files outside
docs/ become plain text, and zensical builds each site in strict mode. Nothing is fetched, by the build or by the pages.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from qrlora.apps.cli import PANELS, cli

DOCS = Path(__file__).parent
LANGUAGES = ("en", "ja")
ENGLISH = re.compile(r"\]\(\.\./(?!\.\./)([^)#]+)\.md(#[^)]*)?\)")
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]*)(?:#[^)]*)?\)")


def commands(context: click.Context, command: click.Command) -> Iterator[tuple[click.Context, click.Command]]:
    """Yield a command and those below it, each with its context."""
    yield context, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(click.Context(inner, info_name=name, parent=context), inner)


def command_page() -> str:
    """Return the page of all commands, with the arguments and options of their --help."""
    parts = ["# Commands\n"]
    for panel, names in PANELS.items():
        parts.append(f"## {panel}\n")
        for name in names:
            top = cli.get_command(click.Context(cli, info_name="qrlora"), name)
            assert top is not None
            start = click.Context(top, info_name=name, parent=click.Context(cli, info_name="qrlora"))
            for context, command in commands(start, top):
                parts.append(f"### `{context.command_path}`\n\n{(command.help or '').strip()}\n")
                rows = [(_flags(one, context), _help(one)) for one in command.get_params(context)]
                rows = [row for row in rows if row[0] != "-h, --help"]
                if rows:
                    parts.append("| | |\n|---|---|")
                    parts += [f"| `{flags}` | {text} |" for flags, text in rows]
                    parts.append("")
    return "\n".join(parts)


def _flags(one: click.Parameter, context: click.Context) -> str:
    if isinstance(one, click.Option):
        return ", ".join([*one.opts, *one.secondary_opts])
    return one.make_metavar(context)


def _help(one: click.Parameter) -> str:
    return (getattr(one, "help", None) or "").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def schema_page(schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page of the fields of every file that a person writes."""
    parts = ["# Files that you write\n", "Each is TOML; the commands print the same as JSON Schema, for editors.\n"]
    for title, schema in schemas.items():
        parts += [f"## {title}\n", *_fields("", schema, schema)]
    return "\n".join(parts)


def _fields(place: str, schema: Mapping[str, Any], whole: Mapping[str, Any]) -> Iterator[str]:
    rows, below = [], []
    for name, field in schema.get("properties", {}).items():
        inner = _resolved(field, whole)
        default = f" (default: `{json.dumps(field['default'], ensure_ascii=False)}`)" if "default" in field else ""
        text = (field.get("description") or inner.get("description") or "").replace("|", "\\|").replace("\n", " ")
        rows.append(f"| `{place}{name}` | {text.replace('<', '&lt;')}{default if len(default) < 60 else ''} |")
        if inner.get("properties"):
            below.append((f"{place}{name}.", inner))
    if rows:
        yield from ("| field | |\n|---|---|", *rows, "")
    for inside, inner in below:
        yield from _fields(inside, inner, whole)


def _resolved(field: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of the object that a field holds, alone or in a list."""
    for one in (field, *field.get("anyOf", ()), field.get("items", {}), *field.get("allOf", ())):
        if "$ref" in one:
            found = whole
            for part in one["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            return found
        if one is not field and one.get("items", {}).get("$ref"):
            return _resolved(one, whole)
    return field


def schemas() -> dict[str, Mapping[str, Any]]:
    """Return title -> JSON Schema."""
    from qrlora.models.training.recipe import Recipe
    from qrlora.operations.pilot import Line
    from qrlora.operations.policy.rules import Policy
    from qrlora.quality.brand import BrandSheet

    return {
        "Recipes: `qrlora train --schema`": Recipe.file_schema(),
        "Brand sheets: `qrlora evaluate --brand-schema`": BrandSheet.file_schema(),
        "Policies: `qrlora policy schema`": Policy.file_schema(),
        "Projects of a pilot: `qrlora pilot new --schema`": Line.file_schema(),
    }


def prepare(language: str, folder: Path) -> Path:
    """Copy and generate the pages of one language; returns the site's configuration."""
    source = folder / "docs"
    root = DOCS if language == "en" else DOCS / language
    shutil.copytree(root, source, ignore=shutil.ignore_patterns("ja", "*.py", "*.toml", "table.csv", "__pycache__"))
    if language == "en":
        (source / "commands.md").write_text(command_page(), "utf-8")
        (source / "schemas.md").write_text(schema_page(schemas()), "utf-8")
    else:
        for shared in ("grid.png", "studio", "figures"):
            if (found := DOCS / shared).exists():
                (shutil.copytree if found.is_dir() else shutil.copy)(found, source / shared)
    for page in source.rglob("*.md"):
        if language != "en":  # pictures are shared, and were copied; what is in English alone is in the other site
            text = ENGLISH.sub(r"](<../en/\1/\2>)", page.read_text("utf-8"))
            page.write_text(text.replace("](../", "]("), "utf-8")
        page.write_text(_without_outside(page, source), "utf-8")
    settings = (DOCS / f"site.{language}.toml").read_text("utf-8").replace("@SOURCE@", str(DOCS.parent / "src"))
    (folder / "zensical.toml").write_text(settings, "utf-8")
    return folder / "zensical.toml"


def _without_outside(page: Path, root: Path) -> str:
    """Return the page's text, with links that leave the site as plain text."""

    def kept(link: re.Match[str]) -> str:
        inside = (page.parent / link[2]).resolve().is_relative_to(root.resolve())
        return link[0] if inside else f"{link[1]} (`{re.sub(r'^(../)+', '', link[2])}` in the repository)"

    return OUTSIDE.sub(kept, page.read_text("utf-8"))


def build(out: Path) -> None:
    """Build both sites; raises CalledProcessError on any warning."""
    for language in LANGUAGES:
        with tempfile.TemporaryDirectory() as folder:
            config = prepare(language, Path(folder))
            subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "-f", str(config)], check=True)
            shutil.rmtree(out / language, ignore_errors=True)
            shutil.copytree(Path(folder) / "site", out / language)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/site"), help="folder (default: out/site)")
def main(out: Path) -> None:
    """Build the documentation, English and Japanese."""
    build(out)
    print(*(out / language / "index.html" for language in LANGUAGES), sep="\n")


if __name__ == "__main__":
    main()
