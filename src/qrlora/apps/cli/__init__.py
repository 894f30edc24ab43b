"""Define the command line, which parses, calls and prints. Everything heavy is imported by the command that needs
it."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from typing import Any

import rich_click as click

from qrlora._interrupts import say_error
from qrlora.apps.cli.command import Group
from qrlora.apps.quiet import hush, wait_passively

hush()  # here, not in `main`: the processes that a command starts import this before anything that is heavy
wait_passively()

PANELS = {
    "Learn": {"train": "train:run_train", "plan": "plan:run_plan", "basis": "basis:run_basis"},
    "Combine": {
        "compose": "compose:run_compose",
        "similarity": "similarity:run_similarity",
        "tune": "tune:run_tune",
        "space": "space:space",
    },
    "Generate": {"generate": "generate:run_generate", "demo": "demo:run_demo"},
    "Exchange": {
        "export": "exchange:run_export",
        "import": "exchange:run_import",
        "extract": "exchange:run_extract",
        "inspect": "inspect:run_inspect",
    },
    "Measure": {"evaluate": "evaluate:run_evaluate", "study": "study:run_study"},
    "Operate": {
        "registry": "registry:registry",
        "serve": "serve:run_serve",
        "studio": "studio:run_studio",
        "pilot": "pilot:pilot",
        "catalog": "catalog:run_catalog",
        "policy": "policy:policy",
        "approval": "policy:approval",
        "keys": "keys:keys",
        "audit": "audit:audit",
        "who-made": "audit:run_who_made",
    },
    "Lab": {"lab": "lab:lab"},
}
"""The commands in the order of the work, and where each is."""


class _Modules(Mapping[str, click.Command]):
    """The commands; the module of each is imported when the command is asked for."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = places

    def __getitem__(self, name: str) -> click.Command:
        command: click.Command = pkgutil.resolve_name(f"qrlora.apps.cli.{self.places[name]}")
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


CONTEXT: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "rich_help_config": {
        "theme": "slim",
        "max_width": 110,
        "options_table_column_types": ["opt_all_metavar", "help"],
        "command_groups": {"qrlora": [{"name": name, "commands": list(panel)} for name, panel in PANELS.items()]},
    },
}


@click.group(
    cls=Group,
    commands=_Modules({name: place for panel in PANELS.values() for name, place in panel.items()}),
    context_settings=CONTEXT,
    epilog="`qrlora COMMAND --help` says more. Begin with `qrlora demo`.\n\nCompletion of commands and options in your "
    'shell: eval "$(_QRLORA_COMPLETE=bash_source qrlora)", or zsh_source; for fish: '
    "_QRLORA_COMPLETE=fish_source qrlora | source.",
)
@click.version_option(package_name="qrlora", prog_name="qrlora", message="%(prog)s %(version)s")
def cli() -> None:
    """Learn a subject from one picture, learn a style from one picture, and put them together."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 done and found wanting (where a command says so), 2 wrong input
    (said on stderr), 130 interrupted by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP."""
    for stream in (sys.stdout, sys.stderr):  # a file name that is no UTF-8, a terminal without Δ
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return cli.main(argv, prog_name="qrlora", standalone_mode=False) or 0
    except click.UsageError as error:
        name = error.ctx.command_path if error.ctx else "qrlora"
        say_error(f"{name}: {error.format_message()}\n  remedy:   see {name} --help")
        return 2
    except click.Abort:  # before the command began
        return 130
