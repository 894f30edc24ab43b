"""`qrlora demo`."""

from __future__ import annotations

from pathlib import Path

import rich_click as click

from qrlora.apps.cli.command import Options, check_one_of, command
from qrlora.apps.cli.shared import COUNT, PATH, SEED, claim


@command(
    "demo",
    "Train pico on a subject and a style from one picture each, compose them, and write a report",
    "With --subject or --style the picture is yours: any photograph, cropped to its square and resized.",
)
@click.option("--out", type=PATH, default=Path("out/demo"), help="folder of the report (default: out/demo)")
@click.option(
    "--company",
    is_flag=True,
    help="instead: a pilot of a teapot maker with approvals and signatures, then tampering that is detected",
)
@click.option("--subject", help="a picture of your own, or the name of a reserved subject of pico's world")
@click.option("--style", help="a picture of your own, or the name of a reserved style of pico's world")
@click.option("--seed", type=SEED, default=0, help="seed of everything (default: 0)")
@click.option("--steps", type=COUNT, help="training steps of each adapter (default: the tuned number)")
def run_demo(options: Options) -> None:
    """Run the demo and print where its report is."""
    if options.company:
        check_one_of(options, "company", "subject")
        check_one_of(options, "company", "style")
        from qrlora.apps.cli import main
        from qrlora.apps.demo.company import demonstrate

        print(demonstrate(options.out if options.out != Path("out/demo") else Path("out/company"), main))
        return
    claim(options.out, folder=True)
    from qrlora.apps import demo

    chosen = {
        name: getattr(options, name) for name in ("subject", "style", "steps") if getattr(options, name) is not None
    }
    print(demo.run(out=options.out, seed=options.seed, **chosen))
