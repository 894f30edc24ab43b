"""`qrlora study`."""

from __future__ import annotations

import json
from pathlib import Path

import rich_click as click

from qrlora._reading import read_json
from qrlora.apps.cli.command import Options, Several, command
from qrlora.apps.cli.evaluate import pictures_option
from qrlora.apps.cli.shared import COUNT, PATH, SEED, WHOLE, claim, refuse_to_replace
from qrlora.errors import DataError, QrloraError

DEFAULT_OUTPUT = "study"
KEY = "key.json"


@command(
    "study",
    "Ask people: a blind vote between folders of pictures, and the count of it",
    "Writes vote.html, one page to send to people, which needs no server and shows no names, and key.json, which "
    "stays here: with it --tally counts the files that the page saved.",
)
@click.argument(
    "folders",
    nargs=-1,
    type=PATH,
    metavar="[FOLDER...]",
    help="two folders or more; pictures of the same name are compared",
)
@click.option("--question", help="what to choose by (default: which picture do you like better?)")
@pictures_option("--reference", "shown above every pair")
@click.option("--trials", type=COUNT, help="largest number of pairs for each person (default: all)")
@click.option(
    "--catch",
    type=WHOLE,
    default=4,
    metavar="COUNT",
    help="trials with a right answer, to exclude people who guess (0: none; default: 4)",
)
@click.option("--by-order", is_flag=True, help="compare pictures by their order instead of by name")
@click.option("--seed", type=SEED, default=0, help="seed of all random choices (default: 0)")
@click.option(
    "--tally",
    cls=Several,
    type=PATH,
    metavar="JSON...",
    help="count the votes in these files, instead of writing a page",
)
@click.option("--key", type=PATH, help=f"with --tally: the study's key (default: {DEFAULT_OUTPUT}/{KEY})")
@click.option(
    "--misses",
    type=WHOLE,
    default=1,
    metavar="COUNT",
    help="with --tally: catch trials that one person may miss (default: 1)",
)
@click.option("--json", is_flag=True, help="with --tally: print the result as JSON")
@click.option("-o", "--output", type=PATH, help="folder (default: study/); with --tally, for a report")
def run_study(options: Options) -> None:
    """Write the page and its key, or count votes."""
    if options.tally:
        _tally(options)
        return
    folder = options.output or Path(DEFAULT_OUTPUT)
    if options.output is None:
        refuse_to_replace(folder / KEY)
    claim(folder, folder=True)
    from qrlora._files import write_all
    from qrlora.quality.images.read import load_pictures
    from qrlora.quality.study.trials import QUESTION, make_study

    names = [str(path.resolve().name) for path in options.folders]
    unique = names if len(set(names)) == len(names) else [str(path) for path in options.folders]
    if len(set(unique)) < len(unique):
        raise QrloraError("one folder named twice", expected="different ones", got=unique)
    for path in options.folders:
        if not path.is_dir():
            raise QrloraError(f"no folder: {path}", remedy="name folders of pictures")
    page, key = make_study(
        {name: load_pictures([path]) for name, path in zip(unique, options.folders, strict=True)},
        options.question or QUESTION,
        references=load_pictures(options.reference),
        trials=options.trials,
        catch=options.catch,
        seed=options.seed,
        by_order=options.by_order,
    )
    known = (json.dumps(key, indent=1, ensure_ascii=False) + "\n").encode()
    write_all({folder / KEY: known, folder / "vote.html": page.encode()})
    asked = sum(trial["kind"] == "pair" for trial in key["trials"].values())
    print(f"{folder / 'vote.html'}: {asked} pairs and {len(key['trials']) - asked} catch trials, to send to people")
    print(f"{folder / KEY}: keep it; without it the votes cannot be read")


def _tally(options: Options) -> None:
    """Print the count, and write a report if an output is named."""
    if options.output:
        claim(options.output, folder=True)
    from qrlora.quality.study.votes import checked_key, count_votes, lines, report

    if options.folders:
        raise QrloraError("--tally counts votes of a study that was made", got=[str(path) for path in options.folders])
    key_file = options.key or Path(DEFAULT_OUTPUT) / KEY
    key = checked_key(read_json(key_file, "the key of a study", DataError), str(key_file))
    votes = [read_json(path, "the votes", DataError) for path in options.tally]
    found = count_votes(votes, key, options.misses, [str(path) for path in options.tally])
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if options.json else "\n".join(lines(found)))
    if options.output:
        page = report(found).write(options.output)
        if not options.json:
            print(page)
