"""A catalog on many cards, by a discrete event model with measured times: ``qrlora lab speed catalog``.

The model is the engine of `qrlora.operations.catalog`: workers with two jobs each, of which they do one; a driver that
takes finished batches one after another, commits them to the journal and, if asked, to the registry, and gives out the
next; a storage that all share. What the driver takes is measured here, on this machine: planning, the journal, and
registries on SQLite and PostgreSQL. What a picture takes is given, of a card that is named.
"""

from __future__ import annotations

import itertools
import random
import sqlite3
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib

from qrlora._files import make_folder, write_atomically
from qrlora.errors import QrloraError
from qrlora.lab.speed.common import report
from qrlora.operations.catalog.engine import AHEAD
from qrlora.operations.catalog.journal import FILE, Journal, Outcome
from qrlora.operations.catalog.plan import Settings, cells, pictures
from qrlora.operations.catalog.tables import PROMPT, Item, Style
from qrlora.operations.registry import Addition, Link, Registry

STEADY = 4000
"""Batches of a point of the sweep: enough that the beginning does not count."""
SPREAD = 0.05
"""Standard deviation of a batch's time, as a share of it."""


@dataclass(frozen=True)
class Site:
    """The hardware and the settings of a simulated catalog.

    Attributes:
        picture, training: seconds of a card for a picture and for an adapter.
        picture_bytes, adapter_bytes: of their files.
        bandwidth: of the storage that all share, bytes a second.
        batch_driver, picture_driver: seconds of the driver for a batch, and for each picture in it.
        registry: seconds of the driver for a picture's entry in the registry; 0 without one.
    """

    workers: int
    batch: int
    picture: float
    training: float
    picture_bytes: float
    adapter_bytes: float
    bandwidth: float
    batch_driver: float
    picture_driver: float
    registry: float = 0.0


@dataclass
class Busy:
    """Seconds of work of each part."""

    cards: float = 0.0
    driver: float = 0.0
    storage: float = 0.0


@dataclass(frozen=True)
class Forecast:
    """Seconds of a run, and the share of it that each part worked."""

    seconds: float
    pictures: int
    shares: Mapping[str, float]

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds


def simulate(site: Site, batches: int, of_product: int, seed: int = 0) -> Forecast:
    """Simulate so many batches, and return the time."""
    simpy = _simpy()
    world: Any = simpy.Environment()
    driver, storage = simpy.Resource(world), simpy.Resource(world)
    queues: list[Any] = [simpy.Store(world) for _ in range(site.workers)]
    chance, busy = random.Random(seed), Busy()
    left: Iterator[int] = iter(range(batches))

    def used(resource: Any, seconds: float, part: str) -> Iterator[Any]:
        with resource.request() as turn:
            yield turn
            yield world.timeout(seconds)
        setattr(busy, part, getattr(busy, part) + seconds)

    def give(queue: Any) -> None:
        for number in itertools.islice(left, 1):
            queue.put(number)

    def commit(queue: Any) -> Iterator[Any]:
        each = site.picture_driver + site.registry
        yield from used(driver, site.batch_driver + site.batch * each, "driver")
        give(queue)

    def worker(queue: Any) -> Generator[Any, Any, None]:
        while True:
            number = yield queue.get()
            if number % of_product == 0 and site.adapter_bytes:
                yield from used(storage, site.adapter_bytes / site.bandwidth, "storage")
            seconds = max(0.0, chance.gauss(1, SPREAD)) * site.batch * site.picture
            yield world.timeout(seconds)
            busy.cards += seconds
            yield from used(storage, site.batch * site.picture_bytes / site.bandwidth, "storage")
            world.process(commit(queue))

    for queue in queues:
        world.process(worker(queue))
    for queue in queues * AHEAD:
        give(queue)
    world.run()
    return _forecast(site, batches, float(world.now), busy)


def _forecast(site: Site, batches: int, total: float, busy: Busy) -> Forecast:
    shares = {
        "cards": busy.cards / site.workers / total,
        "driver": busy.driver / total,
        "storage": busy.storage / total,
    }
    return Forecast(total, batches * site.batch, shares)


def _simpy() -> Any:
    try:
        import simpy
    except ImportError as error:
        remedy = "pip install 'qrlora[lab]'"
        raise QrloraError("the simulation needs more packages", got=f"no {error.name}", remedy=remedy) from error
    return simpy


# Measured here


def driver_times(batch: int, rounds: int) -> dict[str, float]:
    """Return the driver's seconds for a batch (one commit) and for a picture (its key, its rows, its file's size)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = folder / "adapter"
        adapter.write_bytes(b"adapter")
        products = [Item(f"product {i}", "subject", f"product-{i}", trigger="<c>") for i in range(rounds)]
        styles = [Style(Item(f"s{i}", "style", f"s{i}", trigger="<s>"), 1, 0.5, (PROMPT,), (0,)) for i in range(batch)]
        adapters = {f"subject/{one.folder}": adapter for one in products}
        adapters |= {f"style/{one.item.folder}": adapter for one in styles}
        settings = Settings("pico", "float32", folder)
        _ = settings.base  # hashed once in a run, so that it is not counted here
        with Journal(folder) as journal:
            started = time.perf_counter()
            planned = [one for cell in cells(products, styles) for one in pictures(cell, adapters, settings)]
            for start in range(0, len(planned), batch):
                journal.rows([one.key for one in planned[start : start + batch]])
            planning = (time.perf_counter() - started) / len(planned)
            started = time.perf_counter()
            for start in range(0, len(planned), batch):
                some = planned[start : start + batch]
                journal.commit([(one, Outcome(one.key, digest="0" * 71, scores={"colours": 0.5})) for one in some])
            committing = (time.perf_counter() - started) / rounds
    return {"batch": committing, "picture": planning}


def registry_rate(place: str, store: str | None, rounds: int, batch: int) -> float:
    """Pictures a second that a registry records as a catalog does: of each batch the compositions in one transaction,
    then the pictures' digests and facts in another, with a line of the audit log each."""
    registry = Registry.open(place, store=store, actor="lab")
    run = time.time_ns()  # a registry that was measured before has the same pictures
    try:
        started = time.perf_counter()
        for number in range(rounds):
            names = [f"{run} {number} {one}" for one in range(batch)]
            made = registry.add_many([Addition(name.encode(), "composition") for name in names])
            pairs = zip(names, made, strict=True)
            links = [(f"{name}.png".encode(), [Link("generated_by", one.digest)]) for name, one in pairs]
            registry.add_many([Addition(png, "generated", facts={}, links=link, keep=False) for png, link in links])
        return rounds * batch / (time.perf_counter() - started)
    finally:
        registry.close()


def registry_rates(options: SimpleNamespace) -> dict[str, float]:
    """Pictures a second by database: as given, else measured."""
    rates = {"sqlite": options.sqlite_rate, "postgresql": options.postgresql_rate}
    size = options.rounds, options.batch_size
    with tempfile.TemporaryDirectory() as folder:
        if not rates["sqlite"]:
            rates["sqlite"] = registry_rate(folder, None, *size)
        if not rates["postgresql"] and options.postgresql:
            rates["postgresql"] = registry_rate(
                options.postgresql, f"{folder}/objects", options.rounds, options.batch_size
            )
    return {name: rate for name, rate in rates.items() if rate}


def against(folder: Path, times: Mapping[str, float]) -> dict[str, Any]:
    """Compare a catalog that ran in one go, from first to last commit, with the model's time for it."""
    database = sqlite3.connect(f"{(folder / FILE).resolve().as_uri()}?mode=ro", uri=True)
    rows = database.execute("SELECT at, worker, seconds FROM picture WHERE error = '' ORDER BY at").fetchall()
    scoring = database.execute("SELECT seconds / count FROM spent WHERE what = 'scoring'").fetchone()[0]
    database.close()
    batches = [len(list(some)) for _, some in itertools.groupby(rows, key=lambda row: row[0])]
    batch, workers = max(batches), len({worker for _, worker, _ in rows})
    each = sum(seconds for _, _, seconds in rows) / len(rows) + scoring
    measured = (datetime.fromisoformat(rows[-1][0]) - datetime.fromisoformat(rows[0][0])).total_seconds()
    site = Site(workers, batch, each, 0, 0, 0, 1, times["batch"], times["picture"])
    predicted = simulate(site, -(-len(rows) // batch), 1).seconds - batch * each
    found = {"workers": workers, "pictures": len(rows), "seconds_a_picture": each}
    return found | {"measured": measured, "predicted": predicted, "ratio": predicted / measured}


# The command


def main(options: SimpleNamespace) -> None:
    """Measure, simulate, print, draw, write."""
    times, rates = driver_times(options.batch_size, options.rounds), registry_rates(options)
    site = Site(
        workers=options.workers,
        batch=options.batch_size,
        picture=options.seconds,
        training=options.training_seconds,
        picture_bytes=options.picture_mb * 1e6,
        adapter_bytes=options.adapter_mb * 1e6,
        bandwidth=options.bandwidth_mb * 1e6,
        batch_driver=times["batch"],
        picture_driver=times["picture"],
    )
    arms = {"no registry": site} | {name: replace(site, registry=1 / rate) for name, rate in rates.items()}
    wanted = options.products * options.styles * options.each
    batches, of_product = -(-wanted // site.batch), max(1, options.styles * options.each // site.batch)
    whole = {name: simulate(arm, batches, of_product) for name, arm in arms.items()}
    counts = sorted({2**power for power in range(11)} | {site.workers})
    sweep = {
        name: [(count, simulate(replace(arm, workers=count), STEADY, of_product)) for count in counts]
        for name, arm in arms.items()
    }
    _print(options, site, rates, whole)
    real = [against(folder, times) for folder in options.against]
    for one in real:
        print(
            f"{one['workers']} workers, {one['pictures']} pictures: measured {one['measured']:.1f} s, "
            f"predicted {one['predicted']:.1f} s, ratio {one['ratio']:.3f}"
        )
    if options.plot:
        make_folder(options.plot.parent)
        write_atomically(options.plot, _plot(options, sweep).encode())
    found = {
        "driver": times,
        "against": real,
        "registry_pictures_a_second": rates,
        "whole": {name: asdict(one) | {"hours": one.seconds / 3600} for name, one in whole.items()},
        "sweep": {
            name: [[count, one.rate, dict(one.shares)] for count, one in points] for name, points in sweep.items()
        },
    }
    report(options, "cpu", **found)


def _print(options: SimpleNamespace, site: Site, rates: Mapping[str, float], whole: Mapping[str, Forecast]) -> None:
    wanted = options.products * options.styles * options.each
    print(
        f"{wanted:,} pictures on {site.workers} of {options.card}, {site.picture:g} s a picture, {site.batch} a batch"
    )
    print(f"driver: {1e3 * site.batch_driver:.2f} ms a batch, {1e3 * site.picture_driver:.3f} ms a picture")
    for name, rate in rates.items():
        print(f"registry on {name}: {rate:.0f} pictures a second, in batches of {site.batch}")
    if site.training:
        hours = options.products * site.training / site.workers / 3600
        print(f"training {options.products:,} adapters before: {hours:.1f} hours")
    for name, one in whole.items():
        shares = ", ".join(f"{part} {share:.1%}" for part, share in one.shares.items())
        print(f"{name}: {one.seconds / 3600:.2f} hours, {one.rate:.1f} pictures a second; busy: {shares}")
    adapters = (options.products + options.styles) * site.adapter_bytes
    print(f"storage: pictures {wanted * site.picture_bytes / 1e12:.2f} TB, adapters {adapters / 1e12:.2f} TB")
    for name, one in whole.items():
        share, part = max((share, part) for part, share in one.shares.items() if part != "cards")
        print(f"{name}: the {part} saturates at {site.workers * one.shares['cards'] / share:,.0f} cards")


def _plot(options: SimpleNamespace, sweep: Mapping[str, Sequence[tuple[int, Forecast]]]) -> str:
    """An SVG: pictures a second over cards, for each way to record."""
    import io

    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "qrlora", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, points in sweep.items():
            axes.plot(*zip(*((count, one.rate) for count, one in points), strict=True), "o-", ms=4, label=name)
        counts = [count for count, _ in next(iter(sweep.values()))]
        axes.plot(counts, [count / options.seconds for count in counts], ":", color="0.5", label="cards alone")
        axes.axvline(options.workers, color="0.8", zorder=0)
        axes.set(xscale="log", yscale="log", xlabel=f"cards ({options.card})", ylabel="pictures a second")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()
