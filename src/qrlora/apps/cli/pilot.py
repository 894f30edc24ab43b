"""`qrlora pilot`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._files import make_folder, write_all
from qrlora.apps.cli.command import Group, Options, command, print_and_exit
from qrlora.apps.cli.keys import c2pa_option, load_certificate, load_key
from qrlora.apps.cli.permission import permission_options
from qrlora.apps.cli.recorded import open_registry, packages
from qrlora.apps.cli.shared import PATH, Bars, json_option, refuse_to_replace
from qrlora.apps.samples import SAMPLES, sample_files

if TYPE_CHECKING:
    from qrlora.operations.pilot import Pilot

LINE = click.argument("line", type=PATH, help="the project file, line.toml")
REGISTRY = click.option(
    "--registry",
    metavar="PLACE",
    help="registry of the pilot (default: $QRLORA_REGISTRY, else one beside the project file)",
)


@click.group("pilot", cls=Group)
def pilot() -> None:
    """Go from one picture to several styles to the whole product line, with a report and a decision after each stage.

    Begin with `qrlora pilot new line.toml`.
    """


def _schema() -> str:
    from qrlora.operations.pilot import Line

    return json.dumps(Line.file_schema(), indent=2, ensure_ascii=False)


@command("new", "Write a project file to begin with, and the sample's pictures beside it")
@click.argument("line", type=PATH, help="project file to write: line.toml")
@click.option("--sample", type=click.Choice(SAMPLES), default="teapots", help="sample project (default: teapots)")
@print_and_exit("--schema", "print the JSON Schema of project files, and end", _schema)
def new(options: Options) -> None:
    """Copy a sample project."""
    make_folder(options.line.parent)
    contents = sample_files(options.sample, options.line)
    for path in contents:
        refuse_to_replace(path, "name another folder")
    write_all(contents, make_folder=True)
    print(*contents, sep="\n")
    print(f"next: qrlora pilot run {options.line}")


@command("run", "Run the next stage, and write its reports")
@LINE
@REGISTRY
@click.option("--stage", type=click.Choice(["one_picture", "several_styles", "line"]), help="run this stage again")
@permission_options
@c2pa_option
@json_option
def run(options: Options) -> int:
    """Run a stage; returns 1 if the gate recommends a no-go."""
    load_certificate(options.c2pa)
    found = _opened(options)
    result = found.run(options.stage, Bars())
    if options.json:
        print(json.dumps(result.to_dict(), indent=2, ensure_ascii=False))
    else:
        for check in result.checks:
            value = "not measured" if check.value is None else f"{check.value:.3f}"
            print(f"{check.name}: {value} (limit {check.limit:g}) {'holds' if check.passed else 'does not hold'}")
        for asked in result.to_approve:
            print(f"to be approved: {asked.title}: qrlora approval approve {asked.request[:19]} --key NAME")
        print(*(found.report_folder(result.stage, name) / "report.html" for name in found.line.languages), sep="\n")
        print(f"{'a go' if result.passes else 'a no-go'} is recommended; a person decides:")
        print(f"  qrlora pilot decide {options.line} --{'go' if result.passes else 'no-go'} --reason TEXT --key NAME")
    return 0 if result.passes else 1


@command("decide", "Record a signed go or no-go on the stage that has run")
@LINE
@REGISTRY
@click.option("--go/--no-go", default=None, help="permit the next stage, or not")
@click.option("--reason", required=True, metavar="TEXT", help="why, in a sentence")
@click.option("--key", required=True, metavar="NAME", help="your signing key (`qrlora keys new NAME`)")
def decide(options: Options) -> None:
    """Sign and record the decision."""
    if options.go is None:
        raise click.UsageError("expected --go or --no-go")
    found = _opened(options)
    stage = found.next
    digest = found.decide(options.go, options.reason, load_key(options.key))
    print(f"{stage}: {'go' if options.go else 'no-go'}, recorded as {digest[:19]}")
    if found.next and options.go:
        print(f"next: qrlora pilot run {options.line}")


@command("status", "Print which stages have run, and what was decided")
@LINE
@REGISTRY
@json_option
def status(options: Options) -> int:
    """Print the state; returns 1 if a recorded stage or decision does not hold."""
    from qrlora.operations.pilot import STAGES

    found = _opened(options)
    faults = found.verify()
    if options.json:
        stages = {name: vars(done) for name, done in found.stages.items()}
        print(json.dumps({"stages": stages, "next": found.next, "faults": faults}, indent=2))
        return 1 if faults else 0
    for stage in STAGES:
        print(f"{stage}: {_told(found, stage)}")
    print(*faults, sep="\n")
    print(f"next: {found.next}" if found.next else "all stages have their go")
    return 1 if faults else 0


def _told(found: Pilot, stage: Any) -> str:
    ran = found.ran(stage)
    if ran is None:
        return "not run"
    if ran.inputs != found.inputs(stage):
        return "run, but its inputs have changed since: run it again"
    decided = {None: "no decision that counts", True: "go", False: "no-go"}[ran.go]
    return f"run by {ran.author}, {'passes' if ran.passes else 'does not pass'} the gate, {decided}"


@command("study", "Write a blind vote on a stage: with the adapters, or the same said in words")
@LINE
@REGISTRY
@click.option(
    "--stage",
    type=click.Choice(["one_picture", "several_styles"]),
    default="several_styles",
    help="whose pictures (default: several_styles)",
)
def study(options: Options) -> None:
    """Write the page to send to people."""
    ballot = _opened(options).make_study(options.stage)
    print(f"{ballot.page}: send it to people, and put the files they save into {ballot.votes}")
    print(f"then: qrlora pilot run {options.line} --stage {options.stage}")


def _opened(options: Options) -> Pilot:
    with packages():
        from qrlora.apps.pilots import open_pilot
        from qrlora.operations.pilot import Line
    Line.load(options.line)  # before a registry is made beside it
    beside = options.line.with_suffix(".pilot") / "registry"
    place = options.registry or os.environ.get("QRLORA_REGISTRY") or beside
    registry = open_registry(Options(registry=str(place)), create=True)
    given = {name: getattr(options, name) for name in ("policy", "require_approval", "c2pa") if hasattr(options, name)}
    return open_pilot(options.line, registry, **given)


for _command in (new, run, decide, status, study):
    pilot.add_command(_command)  # type: ignore[arg-type]
