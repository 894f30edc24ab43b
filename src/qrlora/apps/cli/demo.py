"""`qrlora demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from qrlora.apps.cli.shared import Parsers, claim, command, count, seed


def add_demo(commands: Parsers) -> None:
    parser = command(
        commands,
        "demo",
        run_demo,
        "teach pico a subject and a style from one picture each, put them together, and write a report",
        "With --subject or --style the picture is yours: any photograph, cropped to its square and resized.",
    )
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the report (default: out/demo)")
    parser.add_argument("--subject", help="a picture of your own, or the name of a reserved subject of pico's world")
    parser.add_argument("--style", help="a picture of your own, or the name of a reserved style of pico's world")
    parser.add_argument("--seed", type=seed, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--steps", type=count, help="training steps of each adapter (default: the tuned number)")


def run_demo(options: argparse.Namespace) -> None:
    """Run the demo and print where its report is."""
    claim(options, options.out, folder=True)
    from qrlora.apps import demo

    chosen = {
        name: getattr(options, name) for name in ("subject", "style", "steps") if getattr(options, name) is not None
    }
    print(demo.run(out=options.out, seed=options.seed, **chosen))
