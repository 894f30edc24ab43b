"""Every remedy can be followed where it is printed: its flags, commands, fields, extras and documents are there.

The source is read: which command can raise an error is found by what its function calls and imports.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import pytest

from qrlora.apps.cli import cli
from qrlora.apps.cli.command import less_memory
from qrlora.models.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]*|-[a-z])(?![\w-])")
GROUPS = "space|lab|registry|keys|policy|approval|audit|pilot"
OURS = re.compile(
    rf"qrlora ((?:(?:{GROUPS}) )?[a-z-]+)((?: (?:--?[a-z][a-z-]*|\{{\}}|registry:[A-Za-z@]+|[A-Z][A-Za-z.]*|'[^']*'))*)"
)
OTHERS = re.compile(r"`(?:hf|serve|ulimit)[^`]*`|(?:ray start|pip install|python -[cm]|ulimit)[^;,`]*")
"""Commands of other programs, with their flags."""


class Remedy(NamedTuple):
    module: str
    function: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.module}:{self.line}"


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Every module by its name."""
    files = {path: path.relative_to(SOURCE).with_suffix("").parts for path in sorted(SOURCE.rglob("*.py"))}
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): ast.parse(path.read_text())
        for path, parts in files.items()
    }


def words(node: ast.expr) -> str:
    """The text that an expression makes, what is filled in as {}."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "said":
        return re.sub(r"%\(\w+\)s", "{}", words(node.args[0]))
    if isinstance(node, ast.FormattedValue) or not list(ast.iter_child_nodes(node)):
        return "{}"
    parts = [words(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return ("" if isinstance(node, (ast.JoinedStr, ast.BinOp)) else " ").join(parts)


@functools.cache
def remedies() -> list[Remedy]:
    """All of the source, in whatever way they are given; what is expected is one as well, and may name a flag."""
    found: list[Remedy] = []
    constants: set[str] = set()
    for module, tree in trees().items():
        for top in tree.body:
            for node in ast.walk(top):
                given: list[ast.expr] = []
                if isinstance(node, ast.Call):
                    given = [one.value for one in node.keywords if one.arg in ("remedy", "expected")]
                elif isinstance(node, ast.Assign) and "remed" in " ".join(map(ast.unparse, node.targets)):
                    given = [node.value]
                constants |= {name for one in given for name in names_in(one) if name.isupper()}
                name = getattr(top, "name", "")
                found += [Remedy(module, name, one.lineno, words(one)) for one in given]
    for module, tree in trees().items():
        for top in tree.body:
            if isinstance(top, ast.Assign) and constants & names_in(top.targets[0]):
                found.append(Remedy(module, "", top.lineno, words(top.value)))
    return [one for one in found if one.text.strip("{} ")]


def names_in(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def imports_in(node: ast.AST) -> Iterator[tuple[str, str]]:
    """Modules of ours that are imported, and the names that are; not those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("qrlora"):
            yield from ((child.module or "", one.name) for one in child.names)
        yield from imports_in(child)


def functions(module: str) -> dict[str, ast.AST]:
    return {one.name: one for one in trees()[module].body if isinstance(one, (ast.FunctionDef, ast.ClassDef))}


@functools.cache
def commands() -> dict[str, tuple[str, str]]:
    """Each command's module and the function that runs it; those of the lab print for people who read its source."""
    found: dict[str, tuple[str, str]] = {}
    for name, one in cli.commands.items():
        grouped = name in GROUPS.split("|") and name != "lab"
        inner = {f"{name} {sub}": command for sub, command in one.commands.items()} if grouped else {name: one}
        for path, command in inner.items():
            if path != "lab":
                found[path] = command.callback.__module__, command.callback.__name__
    return found


def source_of(module: str, part: str) -> str:
    """The module that `from module import part` comes from: a package may hand it on."""
    if f"{module}.{part}" in trees():
        return f"{module}.{part}"
    handed_on = {name: one for one, name in imports_in(trees()[module])} if module in trees() else {}
    return source_of(handed_on[part], part) if part in handed_on else module


@functools.cache
def reached(command: str) -> set[tuple[str, str]]:
    """Functions of the command line (by module and name), and whole other modules (by name), that it may run."""
    queue = [commands()[command]]
    seen: set[tuple[str, str]] = set()
    while queue:
        module, name = queue.pop()
        if (module, name) in seen or module not in trees():
            continue
        seen.add((module, name))
        if not module.startswith("qrlora.apps.cli"):
            inside = {(source_of(one, part), "") for one, part in imports_in(trees()[module])}
        elif name in functions(module):
            function = functions(module)[name]
            everywhere = {part: one for one, part in imports_in(trees()[module]) if part in names_in(function)}
            inside = {(module, local) for local in functions(module) if local in names_in(function)}
            here = [*imports_in(function), *((one, part) for part, one in everywhere.items())]
            for one, part in here:
                inside |= {(one, part) if one.startswith("qrlora.apps.cli") else (source_of(one, part), "")}
        queue += inside
    return seen


def who_prints(remedy: Remedy) -> list[str]:
    name = remedy.function if remedy.module.startswith("qrlora.apps.cli") else ""
    return [command for command in commands() if (remedy.module, name) in reached(command)]


def found(command: str) -> click.Command | None:
    one: click.Command | None = cli
    for name in command.split():
        one = one.commands.get(name) if isinstance(one, click.Group) else None
    return one


@functools.cache
def flags_of(command: str) -> set[str]:
    one = found(command)
    assert one
    return {flag for option in one.get_params(click.Context(one)) for flag in (*option.opts, *option.secondary_opts)}


def faults_of(remedy: Remedy) -> list[str]:
    """What this text names that is not there for who reads it."""
    faults = []
    text = OTHERS.sub("", remedy.text)
    for command, rest in OURS.findall(text):
        if not found(command) and f"`qrlora {command}" not in text:
            continue  # prose about qrlora
        if not found(command) or not set(FLAG.findall(rest)) <= flags_of(command):
            faults.append(f"no `qrlora {command}{rest}`")
    for command in who_prints(remedy):
        lacking = set(FLAG.findall(OURS.sub("", text))) - flags_of(command)
        faults += [f"`qrlora {command}` has no {flag}" for flag in sorted(lacking)]
    return faults


def test_every_command_line_module_is_understood() -> None:
    assert {*(name.split()[0] for name in commands()), "lab"} == set(cli.commands) and len(remedies()) > 250
    assert ("qrlora.models.exchange.lora_files", "") in reached("inspect")
    assert ("qrlora.apps.cli.shared", "refuse_to_replace") not in reached("inspect")


def test_every_flag_and_command_that_a_remedy_names_is_there() -> None:
    faults = {str(one): faults_of(one) for one in remedies() if faults_of(one)}
    assert not faults, "\n".join(f"{place}: {'; '.join(said)}" for place, said in faults.items())


def test_a_command_that_runs_out_of_memory_names_its_own_flags() -> None:
    for command in commands():
        assert set(FLAG.findall(less_memory(flags_of(command)))) <= flags_of(command)
    assert "--batch-size or --resolution" in less_memory(flags_of("generate"))


@pytest.mark.parametrize(
    ("text", "fault"),
    [("leave out --nothing", "has no --nothing"), ("qrlora import FILE --like", ""), ("`qrlora imprt FILE`", "imprt")],
)
def test_a_remedy_that_cannot_be_followed_is_found(text: str, fault: str) -> None:
    found = faults_of(Remedy("qrlora.models.exchange.lora_files", "load_any", 1, text))
    assert bool(found) == bool(fault) and fault in " ".join(found)


def test_every_recipe_field_module_extra_and_document_that_a_remedy_names_is_there() -> None:
    extras = (ROOT / "pyproject.toml").read_text()
    for remedy in remedies():
        for name in re.findall(r"'qrlora\[(\w+)\]'", remedy.text):
            assert f"\n{name} = [" in extras, remedy
        for name in re.findall(r"python -m (qrlora[\w.]*)", remedy.text):
            assert name in trees(), remedy
        for name in re.findall(r"\b((?:docs|recipes|brands)/[\w.-]*)", remedy.text):
            assert (ROOT / name).exists(), remedy
        if remedy.module.startswith(("qrlora.models.training", "qrlora.models.families")):
            fields = set(re.findall(r"(?<![\w.(])[a-z]+_[a-z_]+\b(?![.(])", remedy.text))
            assert fields <= {*Recipe.model_fields, "save_pretrained", "file_name", "to_k", "to_q"}, remedy
