"""`qrlora bench`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora.apps.cli.shared import Parsers, claim, command, count, seed

if TYPE_CHECKING:
    from qrlora.lab.compare.plan import Scope


def add_bench(commands: Parsers) -> None:
    parser = command(
        commands,
        "bench",
        run_bench,
        "measure this method beside its baselines on pico, where the truth is known",
        "Everything is kept in the folder under digests: an interrupted run goes on where it was, and a wider one does "
        "only what is new. All of it takes a night on a laptop; --small takes minutes, and is no verdict.",
    )
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="its folder (default: out/bench)")
    parser.add_argument("--small", action="store_true", help="a few rows, pairs, steps and pictures, to see it work")
    parser.add_argument("--rows", type=_names, help="rows of the table, separated by commas (default: all; see --list)")
    parser.add_argument("--subjects", type=_names, help="reserved subjects, separated by commas (default: all)")
    parser.add_argument("--styles", type=_names, help="reserved styles, separated by commas (default: all)")
    parser.add_argument("--seeds", type=_seeds, help="seeds of picture, training and drawing (default: 0,1,2)")
    parser.add_argument("--steps", type=count, help="training steps of each adapter (default: 240)")
    parser.add_argument("--pictures", type=count, help="pictures of each composed pair (default: 8)")
    parser.add_argument("--workers", type=count, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument(
        "--records", type=Path, help="records.jsonl of an earlier run, whose measurements are taken as they are"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose the rows' learning rates and weights anew, write them to the folder's rates.json, and stop",
    )
    parser.add_argument("--list", action="store_true", help="print the rows, and stop")


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(seed(part) for part in text.split(",")))


def run_bench(options: argparse.Namespace) -> None:
    """Run what is missing and write the report; print where it is."""
    from qrlora.lab import compare as bench
    from qrlora.lab.compare import page, plan, run, tuning

    if options.list:
        sys.stdout.write("".join(f"{row.name:36} {bench.about(row)}\n" for row in plan.ROWS.values()))
        return
    scope = scope_of(options)
    claim(options, options.out, folder=True)
    if options.tune:
        rates, balance = tuning.tune(options.out, scope, options.workers, _say)
        for adapter, found in rates.items():
            each = [f"{role} {' or '.join(f'{rate:g}' for rate in halves.values())}" for role, halves in found.items()]
            print(f"{adapter:28} rates: {', '.join(each)}")
        for row, weights in balance.items():
            print(f"{row:28} weights: {' or '.join(f'{a:g}, {b:g}' for a, b in dict.fromkeys(weights.values()))}")
        return
    given = run.read_records(options.records) if options.records else []
    scope = tuning.tuned(options.out, scope, options.workers, _say)
    records = run.run(options.out, scope, options.workers, _say, given)
    print(page.write(options.out, scope, records, shlex.join(["qrlora", "bench", *_asked(options)])))


def scope_of(options: argparse.Namespace) -> Scope:
    """The plan that was asked for. Raises DataError for a name that the bench lacks."""
    from qrlora.lab.compare import plan
    from qrlora.pico import world

    fields: dict[str, Any] = dict(plan.SMALL) if options.small else {}
    known = {"rows": tuple(plan.ROWS), "subjects": world.RESERVED_SUBJECTS, "styles": world.RESERVED_STYLES}
    for name, names in known.items():
        if getattr(options, name) is not None:
            fields[name] = plan.chosen(name.rstrip("s"), getattr(options, name), names)
    fields |= {n: getattr(options, n) for n in ("seeds", "steps", "pictures") if getattr(options, n) is not None}
    return plan.Scope(**fields)


def _asked(options: argparse.Namespace) -> list[str]:
    """The options that decide the result, as they would be typed."""
    words = ["--small"] if options.small else []
    for name in ("rows", "subjects", "styles", "seeds"):
        if getattr(options, name) is not None:
            words += [f"--{name}", ",".join(map(str, getattr(options, name)))]
    for name in ("steps", "pictures"):
        if getattr(options, name) is not None:
            words += [f"--{name}", str(getattr(options, name))]
    return words


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
