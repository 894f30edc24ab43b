"""`qrlora study`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qrlora.cli.evaluate import add_pictures
from qrlora.cli.shared import Parsers, claim, command, count, refuse_to_replace, seed
from qrlora.errors import QrloraError

DEFAULT_OUTPUT = "study"
KEY = "key.json"


def add_study(commands: Parsers) -> None:
    parser = command(
        commands,
        "study",
        run_study,
        "ask people: a blind vote between folders of pictures, and the count of it",
        "Writes vote.html, one page to send to people, which needs no server and tells no names, and key.json, which "
        "stays here: with it --tally counts the files that the page saved.",
    )
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="FOLDER", help="two or more; pictures of one name are compared"
    )
    parser.add_argument("--question", help="what to choose by (default: which picture do you like better?)")
    add_pictures(parser, "--reference", "shown above every pair")
    parser.add_argument("--trials", type=count, help="at most so many pairs for each person (default: all)")
    parser.add_argument(
        "--catch", type=int, default=4, metavar="COUNT", help="trials with a right answer, to find who guesses (4)"
    )
    parser.add_argument("--by-order", action="store_true", help="compare first with first, whatever their names")
    parser.add_argument("--seed", type=seed, default=0, help="of what is drawn by chance (default: 0)")
    parser.add_argument("--tally", nargs="+", type=Path, metavar="JSON", help="count these files instead")
    parser.add_argument("--key", type=Path, help=f"with --tally: the study's key (default: {DEFAULT_OUTPUT}/{KEY})")
    parser.add_argument(
        "--misses", type=int, default=1, metavar="COUNT", help="with --tally: catch trials that one may miss (1)"
    )
    parser.add_argument("--json", action="store_true", help="with --tally: print the numbers as JSON")
    parser.add_argument("-o", "--output", type=Path, help="folder (default: study/); with --tally, for a report")


def run_study(options: argparse.Namespace) -> None:
    """Write the page and its key, or count votes."""
    if options.tally:
        _tally(options)
        return
    folder = options.output or Path(DEFAULT_OUTPUT)
    if options.output is None:
        refuse_to_replace(folder / KEY)
    claim(options, folder, folder=True)
    from qrlora.evaluation.pictures import gather
    from qrlora.evaluation.study import QUESTION, make
    from qrlora.files import write_all

    if options.catch < 0:
        raise QrloraError("a number of catch trials", expected="0 or more", got=options.catch)
    names = [str(path.resolve().name) for path in options.folders]
    unique = names if len(set(names)) == len(names) else [str(path) for path in options.folders]
    if len(set(unique)) < len(unique):
        raise QrloraError("one folder named twice", expected="different ones", got=unique)
    for path in options.folders:
        if not path.is_dir():
            raise QrloraError(f"no folder: {path}", remedy="name folders of pictures")
    page, key = make(
        {name: gather([path]) for name, path in zip(unique, options.folders, strict=True)},
        options.question or QUESTION,
        references=gather(options.reference),
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


def _tally(options: argparse.Namespace) -> None:
    """Print the count, and write a report if an output is named."""
    if options.output:
        claim(options, options.output, folder=True)
    from qrlora.evaluation.tally import lines, report, tally

    if options.folders:
        raise QrloraError("--tally counts votes of a study that was made", got=[str(path) for path in options.folders])
    key = _read(options.key or Path(DEFAULT_OUTPUT) / KEY, "the key of a study")
    missing = [name for name in ("study", "question", "arms", "pictures", "trials") if name not in key]
    if missing:
        raise QrloraError("no key of a study", expected=f"{KEY} as qrlora study wrote it", got=f"without {missing}")
    found = tally([_read(path, "votes") for path in options.tally], key, options.misses)
    print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False) if options.json else "\n".join(lines(found)))
    if options.output:
        page = report(found).write(options.output)
        if not options.json:
            print(page)


def _read(path: Path, what: str) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise QrloraError(f"cannot read {what}: {path}", got=error.strerror, remedy="check the path") from error
    except ValueError as error:
        raise QrloraError(f"{path} is not JSON", expected=what, got=error) from error
    if not isinstance(read, dict):
        raise QrloraError(f"{path} is not {what}", expected="a JSON object", got=type(read).__name__)
    return read
