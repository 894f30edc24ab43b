"""`qrlora catalog`."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora.apps.cli.command import Options, command, hold
from qrlora.apps.cli.keys import c2pa_option, load_certificate
from qrlora.apps.cli.permission import permission_options, place_of
from qrlora.apps.cli.recorded import open_registry, registry_option
from qrlora.apps.cli.shared import (
    COUNT,
    NOT_NEGATIVE,
    PATH,
    WHOLE,
    Bars,
    Names,
    check_there,
    claim,
    json_option,
    model_options,
)
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.operations.catalog.engine import Pool
    from qrlora.operations.catalog.governed import Governed
    from qrlora.operations.catalog.plan import Settings
    from qrlora.operations.catalog.run import Line


@command(
    "catalog",
    "Make pictures of every product in every style, score them, and write a gallery and a table",
    "PRODUCTS is a CSV table, STYLES a TOML file (docs/catalog.md). Missing adapters are trained first. What is "
    "finished is not made again: the same command continues an interrupted run. The exit code is 1 if pictures failed.",
)
@click.argument("products", type=PATH, help="CSV table of products: name, picture or adapter, word, tags")
@click.argument("styles", type=PATH, help="TOML file of styles: name, picture or adapter, weight, prompts, seeds")
@click.option("-o", "--output", type=PATH, default=Path("catalog"), help="folder (default: catalog/)")
@model_options
@click.option(
    "--workers", type=WHOLE, help="processes, each with the base model; 0: in this one (default: one a GPU, or 1)"
)
@click.option("--threads", type=COUNT, help="processor cores of a worker (default: equal shares)")
@click.option("--address", default="local", help="HOST:PORT of a Ray cluster to work on (default: this machine)")
@click.option("--batch-size", type=COUNT, default=8, help="pictures a worker makes at once (default: 8)")
@click.option(
    "--brand", type=PATH, metavar="TOML", help="brand sheet that every picture is checked by (docs/evaluate.md)"
)
@click.option("--metrics", type=Names(), metavar="NAME,...", help="metrics (default: those without a neural network)")
@click.option("--watts", type=NOT_NEGATIVE, default=65, help="power of a worker, for the energy estimate (default: 65)")
@c2pa_option
@registry_option
@permission_options
@json_option
def run_catalog(options: Options) -> int:
    """Make what is missing; returns the exit code."""
    load_certificate(options.c2pa)
    claim(options.output, folder=True)
    governed = _governed(options)
    line = _line(options, governed)
    try:
        with _pool(options, line.settings) as pool:
            line.train(pool)
            line.render(pool, line.check())
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("interrupted; what is finished stays: the same command continues") from interrupt
    return _tell(line, options)


def _governed(options: Options) -> Governed | None:
    """Return the registry and the rules in play; None if neither is."""
    place = place_of(options)
    if not place and not options.policy and not options.require_approval:
        return None
    registry = open_registry(options, create=True) if place or options.require_approval else None
    from qrlora.operations.catalog.governed import Governed
    from qrlora.operations.policy.action import Rules

    rules = Rules.of(registry, options.policy, options.require_approval)
    return Governed(registry, None if rules.empty else rules, options.output.resolve(), options.model)


def _line(options: Options, governed: Governed | None) -> Line:
    from qrlora.operations.catalog.journal import Journal
    from qrlora.operations.catalog.plan import Settings
    from qrlora.operations.catalog.run import Line
    from qrlora.operations.catalog.tables import no_registry, read_products, read_styles
    from qrlora.quality.brand import BrandSheet

    resolve = governed.resolve if governed else no_registry
    products, unknown = read_products(options.products, resolve)
    if unknown:
        print(f"{options.products}: not read: {', '.join(unknown)}", file=sys.stderr)
    file, styles = read_styles(options.styles, resolve)
    settings = Settings(
        model=options.model,
        dtype=options.dtype,
        folder=options.output.resolve(),
        sheet=BrandSheet.load(options.brand) if options.brand else None,
        metrics=tuple(options.metrics) if options.metrics else None,
        threads=options.threads,
        c2pa=options.c2pa,
        **file.sampling.model_dump(),
    )
    journal = Journal(options.output)
    hold(journal)
    return Line(products, styles, file, settings, journal, options.batch_size, governed, Bars())


@contextlib.contextmanager
def _pool(options: Options, settings: Settings) -> Iterator[Pool]:
    """Yield the workers, and end them with the work."""
    pool: Any
    if options.workers == 0:
        from qrlora.operations.catalog.engine import Here

        pool = Here(settings)
    else:
        if options.address not in ("local", "auto"):
            check_there(options.address)
        try:
            from qrlora.operations.catalog.cluster import Actors
        except ImportError as error:
            remedy = "pip install 'qrlora[catalog]', or --workers 0 for one in this process"
            raise QrloraError("workers need more packages", got=f"no {error.name}", remedy=remedy) from error
        pool = Actors(settings, options.workers, options.address)
    with contextlib.closing(pool):
        yield pool


def _tell(line: Line, options: Options) -> int:
    from qrlora.operations.catalog.gallery import write

    index, totals, spent = write(line, options.watts, "Written by qrlora catalog. All rows are in catalog.csv.")
    found = totals.data()
    if options.json:
        cost = {"seconds": dict(spent.seconds), "kilowatt_hours": spent.kilowatt_hours, "bytes": spent.size}
        print(json.dumps({**found, "cost": cost, "index": str(index)}, indent=2, ensure_ascii=False))
    else:
        counts = [f"{count} {state}" for state, count in found.items() if count and state not in ("passing", "judged")]
        print(", ".join(counts) + (f"; brand sheet: {totals.passing} pass" if totals.passing else ""))
        print(f"{spent.hours:.2f} hours of workers, {spent.kilowatt_hours:.3g} kWh at {spent.watts:g} W each")
        print(options.output / index.name)
    return 1 if found["failed"] else 0
