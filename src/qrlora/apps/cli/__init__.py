"""The command line: parse, call, print. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Collection, Sequence
from functools import partial
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path

from qrlora._files import disk_error
from qrlora._interrupts import ended, say
from qrlora.apps.cli.basis import add_basis
from qrlora.apps.cli.compose import add_compose
from qrlora.apps.cli.demo import add_demo
from qrlora.apps.cli.evaluate import add_evaluate
from qrlora.apps.cli.exchange import add_export, add_extract, add_import
from qrlora.apps.cli.generate import add_generate
from qrlora.apps.cli.inspect import add_inspect
from qrlora.apps.cli.plan import add_plan
from qrlora.apps.cli.serve import add_serve
from qrlora.apps.cli.similarity import add_similarity
from qrlora.apps.cli.space import add_space
from qrlora.apps.cli.study import add_study
from qrlora.apps.cli.train import add_train
from qrlora.apps.cli.tune import add_tune
from qrlora.apps.quiet import hush

hush()  # here, not in `main`: the processes that a command starts import this before anything that is heavy


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 done and found wanting (where a command says so), 2 wrong input
    (said on stderr), 130 interrupted by Ctrl-C, 143 by SIGTERM, 129 by SIGHUP."""
    for stream in (sys.stdout, sys.stderr):  # a file name that is no UTF-8, a terminal without Δ
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["lab"]:
        return _run(argparse.Namespace(command="lab", run=partial(_lab, arguments[1:])), ())
    parser = build_parser(arguments)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        _refuse(parser, options.command, unknown)
    return _run(options, _subparser(parser, options.command)[1])


def _run(options: argparse.Namespace, flags: Collection[str]) -> int:
    """As `main`. What a command claims by `cli.shared.claim` is held until it ends."""

    def work() -> int:
        with contextlib.ExitStack() as options.claims:
            code = options.run(options) or 0
            _flush()
            return code

    name = f"qrlora {options.command}"
    try:
        return ended(name, work)
    except (MemoryError, RuntimeError) as error:
        # What torch raises where memory ends, on a GPU and on a CPU; any other RuntimeError is a fault of this package.
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        say(f"{name}: memory is used up\n  got:      {error}\n  remedy:   {less_memory(flags)}")
        return 2


def _flush() -> None:
    """Bring what was printed to where it goes, so that a full disk there is no silent one."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # or the interpreter would try again, and fail, as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whoever read it had enough
            raise disk_error(error, Path("the standard output")) from error


def less_memory(flags: Collection[str]) -> str:
    """What takes less memory, for a command that has these flags."""
    lower = " or ".join(flag for flag in ("--batch-size", "--resolution") if flag in flags)
    ways = [f"lower {lower}"] * bool(lower) + ["load the model with --dtype bfloat16"] * ("--dtype" in flags)
    return ", ".join([*ways, "or use a smaller model" if ways else "use a smaller model, or end other programs"])


def _subparser(parser: argparse.ArgumentParser, command: str) -> tuple[argparse.ArgumentParser, list[str]]:
    """A command's own parser, and its flags."""
    commands = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    own = commands[command]
    return own, [option for action in own._actions for option in action.option_strings]


def _lab(arguments: list[str], _: argparse.Namespace) -> None:
    import click

    from qrlora.apps.cli.lab import lab

    try:
        lab.main(arguments, prog_name="qrlora lab", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        raise KeyboardInterrupt from None


def _refuse(parser: argparse.ArgumentParser, command: str, unknown: Sequence[str]) -> None:
    """Exit as argparse does at arguments it does not know, naming the options that were perhaps meant."""
    own, known = _subparser(parser, command)
    near = {name: difflib.get_close_matches(name.partition("=")[0], known, n=1) for name in unknown}
    hints = [f"{name}: did you mean {close[0]}?" if close else name for name, close in near.items()]
    own.error("unrecognized arguments: " + ", ".join(hints))


def build_parser(arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The whole command line. The recipe's flags, which take pydantic to list, only if `arguments` begin with a command
    that takes them."""
    parser = argparse.ArgumentParser(
        prog="qrlora",
        description="Learn a subject from one picture, learn a style from one picture, and put them together.",
        epilog="`qrlora COMMAND --help` says more. Begin with `qrlora demo`.",
    )
    parser.add_argument("--version", action="version", version=f"qrlora {version('qrlora')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_train(commands, with_recipe=list(arguments[:1]) == ["train"])
    add_basis(commands)
    add_plan(commands, with_recipe=list(arguments[:1]) == ["plan"])
    add_compose(commands)
    add_generate(commands)
    add_inspect(commands)
    add_export(commands)
    add_import(commands)
    add_extract(commands)
    add_similarity(commands)
    add_space(commands)
    add_serve(commands)
    commands.add_parser("lab", help="measure: methods side by side, claims, speed (qrlora lab --help)", add_help=False)
    add_evaluate(commands)
    add_study(commands)
    add_tune(commands)
    add_demo(commands)
    return parser
