"""Declare, parse, run and end a command of the command line."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import SimpleNamespace as Options
from typing import Any

import rich_click as click
from click import get_current_context

from qrlora._files import disk_error
from qrlora._interrupts import ended, say_error

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]


class Command(click.RichCommand):
    """A command that ends with a message and an exit code, whatever happens in it (`qrlora._interrupts.ended`)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {flag for one in self.get_params(ctx) if isinstance(one, Several) for flag in one.opts}
        return super().parse_args(ctx, _repeated(args, several))

    def invoke(self, ctx: click.Context) -> int:
        def work() -> int:
            with contextlib.ExitStack() as ctx.obj:  # what is claimed and shown until the command ends
                code = super(Command, self).invoke(ctx) or 0
                _flush()
                return code

        try:
            return ended(ctx.command_path, work)
        except (MemoryError, RuntimeError) as error:
            # What torch raises where memory ends, on a GPU and on a CPU; any other RuntimeError is a fault of ours.
            if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            flags = [flag for one in self.get_params(ctx) for flag in one.opts]
            what = f"{ctx.command_path}: memory is used up"
            say_error(f"{what}\n  got:      {error}\n  remedy:   {less_memory(flags)}")
            return 2


class Group(click.RichGroup):
    """A group of such commands."""

    command_class = Command
    group_class = type


class Several(click.RichOption):
    """An option that takes one or more values: `--subject a.png b.png`. None if it is not given."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, multiple=True, callback=lambda _ctx, _param, value: list(value) or None, **options)


def _repeated(args: Sequence[str], several: Collection[str]) -> list[str]:
    """Rewrite `--subject a b` as `--subject a --subject b`, which click can read."""
    found: list[str] = []
    flag, first = "", True
    for i, word in enumerate(args):
        if word == "--":
            return [*found, *args[i:]]
        if word.startswith("-") and word != "-":
            flag, first = (word if word in several else ""), True
        elif flag and not first:
            found.append(flag)
        else:
            first = False
        found.append(word)
    return found


def command(name: str, text: str, more: str = "", cls: type[Command] = Command) -> Callable[[Function], click.Command]:
    """Make a click command of a function that takes all options as one object, lists where click has tuples."""

    def decorate(run: Function) -> click.Command:
        @functools.wraps(run)
        def callback(**given: Any) -> int | None:
            lists = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
            return run(Options(**lists))

        return click.command(name, cls=cls, help=f"{text}.\n\n{more}".strip())(callback)

    return decorate


def together(*decorators: Decorator) -> Decorator:
    """Combine several options to one decorator, in this order in the help."""
    return lambda function: functools.reduce(lambda done, one: one(done), reversed(decorators), function)


def print_and_exit(flag: str, text: str, made: Callable[[], str]) -> Decorator:
    """Return an option that prints something and ends, as --help does."""

    def show(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            print(made())
            ctx.exit()

    return click.option(flag, is_flag=True, is_eager=True, expose_value=False, callback=show, help=text)


def hold(resource: contextlib.AbstractContextManager[Any]) -> Any:
    """Enter a resource, and leave it when the command ends."""
    return get_current_context().obj.enter_context(resource)


def check_one_of(options: Options, *names: str) -> None:
    """Raise UsageError if more than one of these options is given."""
    given = [f"--{name}" for name in names if getattr(options, name)]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} exclude each other: give one of them.")


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
    """Return the remedy for running out of memory, naming only flags that the command has."""
    lower = " or ".join(flag for flag in ("--batch-size", "--resolution") if flag in flags)
    ways = [f"lower {lower}"] * bool(lower) + ["load the model with --dtype bfloat16"] * ("--dtype" in flags)
    return ", ".join([*ways, "or use a smaller model" if ways else "use a smaller model, or end other programs"])
