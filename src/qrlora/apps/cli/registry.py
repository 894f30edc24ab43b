"""`qrlora registry`: add, search, show, lineage, alias, tag, deprecate, log; the rest is in registry_upkeep.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora.apps.cli.command import Group, Options, command, together
from qrlora.apps.cli.recorded import open_registry
from qrlora.apps.cli.registry_output import (
    REFERENCE_HELP,
    as_json,
    print_artifacts,
    print_json,
    print_table,
    reference_argument,
    registry_options,
    short,
)
from qrlora.apps.cli.registry_upkeep import COMMANDS
from qrlora.apps.cli.shared import MODEL_HELP, PATH, Bar, claim
from qrlora.errors import RegistryError

if TYPE_CHECKING:
    from qrlora.operations.registry import Artifact, Registry

KINDS = ("base", "adapter", "space", "recipe", "picture", "brand", "report", "policy")
"""Kinds of artifacts that people add by hand; the rest is recorded by the command that makes it."""

licence_option = click.option("--licence", default="", help="an SPDX expression, such as Apache-2.0")
owner_option = click.option("--owner", default="", help="its owner, such as a company")
tag_option = click.option(
    "--tag", "tags", multiple=True, metavar="TAG", help="word to search by and for policies; may be given several times"
)


@click.group(cls=Group)
def registry() -> None:
    """Keep adapters and what belongs to them: immutable, by digest, with names, aliases, lineage and an audit log.

    The registry is $QRLORA_REGISTRY, or what --registry names. Wherever a command takes an adapter, a space, a picture
    or a base model, it takes registry:NAME@alias. See docs/registry.md.
    """


@command(
    "add",
    "Add adapters, spaces, recipes, pictures or a base model; of a folder, all adapters in it",
    "What is known of a file is read from it. Names in a folder are guessed from its files; what is damaged is named "
    "and left out.",
)
@click.argument("what", nargs=-1, required=True, metavar="WHAT...", help="files, a folder of adapters, or a model")
@click.option(
    "--name", help="name for a single file, such as teapots/classic; for a folder, the part of the names before the /"
)
@click.option(
    "--kind", type=click.Choice(KINDS), help="kind, if the file's name does not tell it; base for a base model"
)
@click.option("--role", default="", help="role of an adapter that records none: subject or style")
@together(licence_option, owner_option, tag_option)
@click.option(
    "--base", help=f"the base model of the adapters, {MODEL_HELP.removeprefix('base model: ')}, or registered"
)
@registry_options
def run_add(options: Options) -> int:
    """Add them and print what came of it; exit code 1 if something was left out."""
    if options.name and len(options.what) > 1:
        raise RegistryError("one name for several", expected="one file or folder", got=len(options.what))
    to = open_registry(options, create=True)
    from qrlora.operations.registry.folders import Intake

    found = Intake()
    for text in options.what:
        if options.kind == "base":
            from qrlora.operations.registry.intake import add_base

            known = {"licence": options.licence, "owner": options.owner, "tags": options.tags}
            found.added[Path(text)] = add_base(to, text, name=options.name, **known)
        else:
            _add(to, Path(text), options, found)
    if options.json:
        skipped = {str(path): reason for path, reason in found.skipped.items()}
        print_json({"added": [as_json(one) for one in found.added.values()], "skipped": skipped})
    else:
        print_artifacts(list(found.added.values()))
    for path, reason in found.skipped.items():
        print(f"left out: {path}: {reason}", file=sys.stderr)
    return 1 if found.skipped else 0


def _add(to: Registry, path: Path, options: Options, found: Any) -> None:
    from qrlora.operations.registry.folders import add_folder
    from qrlora.operations.registry.intake import add_file

    described: dict[str, Any] = {"licence": options.licence, "owner": options.owner, "tags": options.tags}
    adapters = {"role": options.role, "base": _base(to, options.base)}
    adapters = {key: value for key, value in adapters.items() if value}
    if path.is_dir():
        came = add_folder(to, path, prefix=options.name or "", progress=Bar("file"), **described, **adapters)
        found.added |= came.added
        found.skipped |= came.skipped
    else:
        found.added[path] = add_file(to, path, options.kind, name=options.name, **described, **adapters)


def _base(to: Registry, model: str | None) -> Artifact | None:
    """Return the base model that is named: a registered one, or one that is added by this."""
    from qrlora.operations.registry import PREFIX
    from qrlora.operations.registry.intake import add_base

    if not model:
        return None
    return to.get(model) if model.startswith((PREFIX, "sha256:")) else add_base(to, model)


@command("search", "List the artifacts that match all options, newest first")
@click.argument("text", required=False, default="", metavar="[TEXT]", help="text in names, file names or triggers")
@click.option("--kind", help="only this kind: adapter, base, composition, generated, ...")
@click.option("--role", help="only this role: subject or style")
@click.option("--owner", help="only of this owner")
@click.option("--licence", help="only with this licence, as it was registered")
@click.option("--tag", help="only with this tag")
@click.option(
    "--like",
    metavar="REFERENCE",
    help="adapters in the order of how similar their effect is to this one's (`registry index`)",
)
@click.option("--deprecated", is_flag=True, help="also list what is deprecated")
@click.option("--limit", type=click.IntRange(min=1), default=100, help="largest number of results (default: 100)")
@registry_options
def run_search(options: Options) -> None:
    """Print the matches as a table, or as JSON."""
    names = ("kind", "role", "owner", "licence", "tag", "deprecated")
    where, matching = open_registry(options), {name: getattr(options, name) for name in names}
    if options.like:
        _print_alike(where, options, {one.digest for one in where.search(options.text, **matching, limit=100_000)})
        return
    found = where.search(options.text, **matching, limit=options.limit)
    print_json([as_json(one) for one in found]) if options.json else print_artifacts(found)


def _print_alike(where: Registry, options: Options, among: set[str]) -> None:
    from qrlora.operations.registry.effects import alike

    found = [one for one in alike(where, where.get(options.like)) if one.adapter.digest in among][: options.limit]
    if options.json:
        print_json([vars(one) | {"adapter": as_json(one.adapter)} for one in found])
        return
    rows = [(one.adapter.title, f"{one.cosine:+.3f}", f"{one.strength:.3f}", f"{one.consistency:.3f}") for one in found]
    print_table(("adapter", "cosine", "strength", "consistency"), rows)


@command("show", "Print everything the registry knows of one artifact")
@reference_argument
@registry_options
def run_show(options: Options) -> None:
    """Print facts, edges and the history of its aliases."""
    where = open_registry(options)
    one = where.get(options.reference)
    edges = where.edges(one.digest)
    names = sorted({name.partition("@")[0] for name in (*one.names, *one.aliases)})
    moves = [move for name in names for move in where.moves(name)]
    if options.json:
        print_json(as_json(one) | {"edges": [vars(edge) for edge in edges], "moves": [vars(move) for move in moves]})
        return
    rows = [(key, _plain(value)) for key, value in as_json(one).items() if key != "facts" and value not in ("", [])]
    rows += [(f"  {key}", _plain(value)) for key, value in one.facts.items() if value not in ("", [], {}, None)]
    rows += [(edge.relation, f"{where.get(edge.target).title}{_numbers(edge)}") for edge in edges]
    rows += [
        ("moved", f"{move.at:%Y-%m-%d %H:%M} {move.name}@{move.alias} to {short(move.digest) or 'nothing'} by {move.by}"
         + (f": {move.reason}" if move.reason else ""))
        for move in moves
    ]  # fmt: skip
    print_table(("", one.title), rows)


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}... (--json has all of it)"


def _numbers(edge: Any) -> str:
    weight = "" if edge.weight is None else f" x {edge.weight:g}"
    return weight + (f", null-space projection {edge.null_space:g}" if edge.null_space else "")


@command("lineage", "Print what an artifact was made from, and what was made from it, as a tree")
@reference_argument
@click.option("--svg", type=PATH, metavar="FILE", help="also write the tree as an SVG")
@registry_options
def run_lineage(options: Options) -> None:
    """Print the trees up and down; write the picture."""
    if options.svg:
        claim(options.svg)
    where = open_registry(options)
    from qrlora.operations.registry.lineage import draw, graph, lines

    found = graph(where, where.get(options.reference))
    if options.svg:
        from qrlora._files import write_atomically

        write_atomically(options.svg, draw(found))
    if options.json:
        nodes = [as_json(one) for one in found.nodes.values()]
        print_json({"start": found.start, "artifacts": nodes, "edges": [vars(edge) for edge in found.edges]})
    else:
        print("\n".join([*lines(found), *([str(options.svg)] if options.svg else [])]))


@command(
    "alias",
    "Point NAME@alias at an artifact; without REFERENCE, print where it pointed",
    "A protected alias moves only with --force. Its history stays.",
)
@click.argument("alias", metavar="NAME@ALIAS", help="the alias, such as chalk@production")
@click.argument("reference", required=False, metavar="[REFERENCE]", help=REFERENCE_HELP)
@click.option("--reason", default="", help="why, for the history")
@click.option("--protect/--unprotect", default=None, help="protect the alias from being moved, or stop protecting it")
@click.option("--force", is_flag=True, help="move it although it is protected")
@click.option("--remove", is_flag=True, help="remove the alias")
@registry_options
def run_alias(options: Options) -> None:
    """Move, remove or show the alias."""
    name, at, alias = options.alias.removeprefix("registry:").partition("@")
    if not at or (options.remove and options.reference):
        got = options.alias if not at else "both --remove and where to"
        raise RegistryError("no alias to move", expected="NAME@alias, and REFERENCE or --remove", got=got)
    where = open_registry(options)
    if options.remove:
        where.remove_alias(name, alias, reason=options.reason, force=options.force)
    elif options.reference or options.protect is not None:
        to = options.reference or f"{name}@{alias}"
        where.set_alias(name, alias, to, reason=options.reason, protect=options.protect, force=options.force)
    moves = [move for move in where.moves(name) if move.alias == alias]
    if options.json:
        print_json([vars(move) for move in moves])
        return
    rows = [(f"{move.at:%Y-%m-%d %H:%M}", short(move.digest) or "removed", move.by, move.reason) for move in moves]
    print_table((f"{name}@{alias}", "to", "by", "reason"), rows)


@command("tag", "Add tags to an artifact")
@reference_argument
@click.argument("tags", nargs=-1, required=True, metavar="TAG...", help="words to search by and for policies")
@registry_options
def run_tag(options: Options) -> None:
    """Add them and print the artifact."""
    where = open_registry(options)
    where.tag(options.reference, *options.tags)
    _changed(where, options)


@command(
    "deprecate",
    "Mark an artifact as no longer to be used",
    "Commands that use it print the reason; policies refuse it.",
)
@reference_argument
@click.argument("reason", required=False, default="", metavar="[REASON]", help="why")
@click.option("--undo", is_flag=True, help="clear the deprecation")
@registry_options
def run_deprecate(options: Options) -> None:
    """Set or clear the reason."""
    if bool(options.reason) == options.undo:
        raise RegistryError("nothing to say of it", expected="a reason, or --undo", got="both or neither")
    where = open_registry(options)
    where.deprecate(options.reference, options.reason)
    _changed(where, options)


def _changed(where: Registry, options: Options) -> None:
    one = where.get(options.reference)
    print_json(as_json(one)) if options.json else print_artifacts([one])


@command("log", "Print the audit log: who did what to which artifact, and when")
@click.option("--action", help="only this action, such as add, alias, deprecate, approve")
@click.option("--actor", help="only by this person or program ($QRLORA_ACTOR)")
@click.option("--last", type=click.IntRange(min=1), metavar="COUNT", help="number of newest entries (default: all)")
@registry_options
def run_log(options: Options) -> None:
    """Print the entries, oldest first."""
    entries = open_registry(options).log()
    entries = [one for one in entries if options.action in (None, one.action) and options.actor in (None, one.actor)]
    entries = entries[-options.last :] if options.last else entries
    if options.json:
        print_json([vars(one) | {"details": json.loads(one.details)} for one in entries])
        return
    rows = [(one.seq, one.at[:19], one.actor, one.action, short(one.subject), one.details) for one in entries]
    print_table(("", "at (UTC)", "who", "did", "to", "details"), rows)


for _one in (run_add, run_search, run_show, run_lineage, run_alias, run_tag, run_deprecate, run_log, *COMMANDS):
    registry.add_command(_one)
