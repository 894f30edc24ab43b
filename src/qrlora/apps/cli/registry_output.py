"""Print artifacts for people and for programs, as the commands of `qrlora registry` do."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from io import StringIO
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora.apps.cli.command import together
from qrlora.apps.cli.recorded import registry_option
from qrlora.apps.cli.shared import json_option

if TYPE_CHECKING:
    from qrlora.operations.registry import Artifact

REFERENCE_HELP = "NAME@alias, NAME@v3, NAME (its newest version), sha256:... (8 digits or more)"
WIDTH = 200
"""Characters of a table that goes to no terminal."""

registry_options = together(registry_option, json_option)
reference_argument = click.argument("reference", metavar="REFERENCE", help=REFERENCE_HELP)


def as_json(artifact: Artifact) -> dict[str, Any]:
    """Return all facts of an artifact, as JSON values."""
    plain = ("digest", "kind", "size", "filename", "stored", "role", "owner", "licence", "created_by", "deprecated")
    found = {key: getattr(artifact, key) for key in plain}
    found |= {key: list(getattr(artifact, key)) for key in ("names", "aliases", "tags")}
    return found | {"created_at": artifact.created_at.isoformat(), "facts": dict(artifact.facts)}


def print_json(value: Any) -> None:
    """Print a value as every command's --json does."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, as wide as the terminal, or as its content where there is none."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    width = get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    console = Console(file=StringIO(), width=width)
    console.print(table)
    print("\n".join(line.rstrip() for line in console.file.getvalue().splitlines()))  # type: ignore[attr-defined]


def short(digest: str) -> str:
    """Return the beginning of a digest, short enough to type."""
    return digest[:19]


def print_artifacts(found: Sequence[Artifact]) -> None:
    """Print a line for each artifact."""
    rows = [
        (
            " ".join(one.names[-1:]) or one.filename,
            one.kind,
            one.role,
            " ".join(alias.partition("@")[2] for alias in one.aliases),
            one.licence,
            " ".join(one.tags),
            one.created_at.strftime("%Y-%m-%d %H:%M"),
            short(one.digest),
        )
        for one in found
    ]
    print_table(("name", "kind", "role", "aliases", "licence", "tags", "added", "digest"), rows)
