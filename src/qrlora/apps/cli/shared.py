"""Options, value types, progress bars and checks that several commands share."""

from __future__ import annotations

import contextlib
import math
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._files import check_room, claimed
from qrlora._reading import plain_float, plain_int
from qrlora.apps.cli.command import Options, hold, together
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from rich.progress import Progress

    from qrlora.method.adapter import Adapter
    from qrlora.method.basis import Basis

ADAPTER_HELP = "adapter file or registry:NAME@alias, with a weight if not 1: mug.safetensors:0.9"
OVERWRITE_HELP = "An existing file is replaced only if -o names it."
MODEL_HELP = "base model: pico (small, in this package), a folder in the diffusers layout, or a hub id"
PATH = click.Path(path_type=Path)
PATIENCE = 1.0
"""Seconds before progress is shown."""
INTERVAL = 30.0
"""Seconds between two lines of progress where stderr is no terminal."""
REFRESH = 0.1
"""Seconds between two paintings of a progress bar, each of which takes some milliseconds."""
DTYPE = click.Choice(["float32", "bfloat16", "float16"])


class Plain(click.ParamType):
    """A number in plain decimal notation (no 1_0, no nan) within bounds."""

    def __init__(self, name: str, kind: Callable[[str], Any], expected: str, holds: Callable[[Any], bool]) -> None:
        self.name, self.kind, self.expected, self.holds = name, kind, expected, holds

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # a default
        with contextlib.suppress(ValueError):
            if self.holds(number := self.kind(value)):
                return number
        self.fail(f"expected {self.expected}, got {value!r}", param, ctx)


def at_least(least: int) -> Plain:
    return Plain("count", plain_int, f"a whole number from {least}", lambda value: value >= least)


COUNT, WHOLE = at_least(1), at_least(0)
NUMBER = Plain("number", plain_float, "a finite number", lambda _: True)
NOT_NEGATIVE = Plain("number", plain_float, "a number from 0", lambda value: value >= 0)
SHARE = Plain("share", plain_float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
SEED = Plain("seed", plain_int, "a whole number from 0, below 2^63", lambda value: 0 <= value < 2**63)


class Names(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        names = value if isinstance(value, tuple) else tuple(part.strip() for part in value.split(",") if part.strip())
        if not names:
            self.fail("expected at least one name", param, ctx)
        return names


def weights(text: str) -> list[float]:
    """Parse `0,0.5,1` as numbers."""
    return [NUMBER(part.strip()) for part in text.split(",")]


def weighted_path(text: str) -> tuple[Path, float]:
    """Parse `file:weight`, or a file alone at weight 1. A colon of a path or of a reference stays there."""
    path, colon, weight = text.rpartition(":")
    if path in ("registry", "registry:sha256"):
        return Path(text), 1.0
    if colon and path and not Path(text).exists():
        try:
            return Path(path), plain_float(weight)
        except ValueError as error:
            if path.endswith(".safetensors") or Path(path).is_file():
                said = f"expected a finite number behind the last colon of {text[:200]!r}"
                raise click.BadParameter(said) from error
    return Path(text), 1.0  # the last colon belongs to the path


json_option = click.option("--json", is_flag=True, help="print the result as JSON")

seed_options = together(
    click.option(
        "--seed",
        multiple=True,
        type=SEED,
        callback=lambda _ctx, _param, value: list(value) or None,
        help="seed of a picture; may be given several times (default: 0)",
    ),
    click.option("--seeds", type=COUNT, metavar="COUNT", help="this many seeds, counted on from --seed"),
)


def seeds_of(options: Options) -> list[int]:
    """Return the seeds asked for."""
    seeds = options.seed or [0]
    return list(range(seeds[0], seeds[0] + options.seeds)) if options.seeds else seeds


model_options = together(
    click.option("--model", default="pico", help=MODEL_HELP + " (default: pico)"),
    click.option("--dtype", type=DTYPE, default="float32", help="precision of the base model (default: float32)"),
)

sampling_options = together(
    model_options,
    click.option("--steps", type=COUNT, help="denoising steps (default: the family's)"),
    click.option("--guidance", type=NUMBER, help="classifier-free guidance scale (default: the family's)"),
    click.option("--resolution", type=COUNT, help="side of the square pictures in pixels (default: the model's)"),
    click.option("--batch-size", type=COUNT, default=8, help="pictures made at once (default: 8)"),
)

null_space_option = click.option(
    "--null-space",
    type=SHARE,
    metavar="STRENGTH",
    help="null-space projection, 0 to 1: the share that each ΔR loses of its part in the input directions that the "
    "others read; 0 is the plain sum (default: 0.5 for a subject with a style, else 0; docs/compare.md)",
)


def check_null_space(strength: float | None, adapters: int) -> None:
    """Raise QrloraError if a projection is asked for and there are no other adapters to project out of."""
    if strength and adapters < 2:
        raise QrloraError(
            "null-space projection needs several adapters",
            expected="two or more",
            got=adapters,
            remedy="leave --null-space out",
        )


def null_space_of(strength: float | None, adapters: Sequence[Adapter]) -> float:
    """Return the strength asked for, else the default for these adapters."""
    from qrlora.method.composition import default_strength

    return default_strength(adapters) if strength is None else strength


def say_null_space(strength: float, kept: float | None = None) -> str:
    """Describe the projection for the user; kept: the share of the sum's energy that is left, where it is known."""
    return f"null-space projection {strength:g}" + ("" if kept is None else f": {kept:.3f} of the sum's energy is kept")


class Bar:
    """Progress on stderr of work that takes more than `PATIENCE` seconds.

    A terminal shows a bar. Elsewhere, as in the log of a CI job, there is a line at the end; before it there are at
    most nine, one for each tenth of the work, and at least `INTERVAL` seconds apart.

    first: units that were done before, as in a resumed run; they took no time of this one.
    """

    def __init__(self, unit: str, first: int = 0):
        self.unit, self.first, self.started = unit, first, time.perf_counter()
        self.shown: Progress | None = None
        self.painted, self.tenth = self.started, 0

    def __call__(self, done: int, of: int, note: str = "", seconds_left: float | None = None) -> None:
        """Show that `done` of `of` units are done; the time left is estimated unless given."""
        now = time.perf_counter()
        if now - self.started < PATIENCE:
            return
        if seconds_left is None:
            seconds_left = (now - self.started) / max(done - self.first, 1) * (of - done)
        minutes, seconds = divmod(round(seconds_left), 60)
        left = "" if done == of else f"{minutes}:{seconds:02d} left"
        with contextlib.suppress(OSError):  # the terminal may be gone, the work need not be
            if sys.stderr.isatty():
                self._show(done, of, note, left)
            elif done == of or (done * 10 // of > self.tenth and now - self.painted >= INTERVAL):
                self.painted, self.tenth = now, done * 10 // of
                line = "  ".join(filter(None, (f"{self.unit} {done}/{of}", note, left)))
                print(line, file=sys.stderr, flush=True)

    def _show(self, done: int, of: int, note: str, left: str) -> None:
        if self.shown is None:
            self.shown = _progress(self.unit)
            self.shown.start()
            hold(contextlib.closing(self))  # no longer than the command: its error is printed below the bar
        now = time.perf_counter()
        if refresh := done == of or now - self.painted > REFRESH:
            self.painted = now
        self.shown.update(self.shown.task_ids[0], completed=done, total=of, note=note, left=left, refresh=refresh)
        if done == of:
            self.close()

    def close(self) -> None:
        shown, self.shown = self.shown, None
        if shown:
            with contextlib.suppress(OSError):
                shown.stop()


class Bars:
    """A `Bar` for each kind of work, from the first unit reported to the last."""

    def __init__(self) -> None:
        self.bars: dict[str, Bar] = {}

    def __call__(self, what: str, done: int, of: int, note: str = "", seconds_left: float | None = None) -> None:
        self.bars.setdefault(what, Bar(what, done))(done, of, note, seconds_left)
        if done == of:
            del self.bars[what]


def _progress(unit: str) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("note", "left")]
    # Nothing is redirected: what a command prints is for its stdout, whatever is shown on the terminal.
    progress = Progress(
        *columns, console=Console(stderr=True), auto_refresh=False, redirect_stdout=False, redirect_stderr=False
    )
    progress.add_task(unit, total=None, note="", left="")
    return progress


def load_weighted(parts: Sequence[tuple[Path, float]], model: str | None) -> list[tuple[Adapter, float]]:
    adapters = load_adapters([path for path, _ in parts], model)
    return [(adapter, weight) for adapter, (_, weight) in zip(adapters, parts, strict=True)]


def load_adapters(paths: Sequence[Path], model: str | None) -> list[Adapter]:
    """Load the adapters in these files. The layers of a foreign LoRA are found by the names of the base model's
    modules: of the one asked for, else of the one that an adapter among them needs; without either by those of the
    known families."""
    from qrlora.models.exchange import LayerNames, is_ours, load_any
    from qrlora.models.families import load_structure

    found = {path: load_any(path) for path in paths if is_ours(path)}
    foreign = [path for path in paths if path not in found]
    bases = [adapter.metadata.base_model for adapter in found.values() if adapter.metadata.on_basis]
    model = model or next(filter(None, bases), None)
    names = None
    if foreign and model:
        pipe, family = load_structure(model)
        names = LayerNames(family, family.denoiser_of(pipe))
    for path in foreign:
        found[path] = load_any(path, names=names)
        say_left_out(path, found[path])
    return [found[path] for path in paths]


def say_left_out(path: Path, adapter: Adapter) -> None:
    """Print one line on stderr about parts of a foreign file besides the denoiser's layers."""
    from qrlora.models.exchange import left_out_of

    names = left_out_of(adapter)
    if names:
        print(f"{path}: not read, because they are not the denoiser's: {', '.join(names)}", file=sys.stderr)


def bases_of(model: str | None, adapters: Sequence[Adapter]) -> list[Basis | None]:
    """Return the basis of each adapter that stands on one, from the model asked for or the one it names.

    Where there is but one model, the adapters that stand on none have to fit it too.
    """
    from qrlora.method.adapter.attach import basis_of, check_fits
    from qrlora.models.families import load_pipeline

    loaded: dict[str, Any] = {}
    bases: list[Basis | None] = []
    for adapter in adapters:
        metadata = adapter.metadata
        if not metadata.on_basis:
            bases.append(None)
            continue
        source = model or metadata.base_model or "pico"
        if source not in loaded:
            pipe, family = load_pipeline(source)
            loaded[source] = family.denoiser_of(pipe)
        bases.append(basis_of(loaded[source], adapter))
    if len(loaded) == 1:
        for adapter in adapters:
            if not adapter.metadata.on_basis:
                check_fits(next(iter(loaded.values())), adapter)
    return bases


def claim(path: Path, size: int = 0, *, folder: bool = False) -> None:
    """Try the output of a command before anything heavy is imported, and hold it until the command ends."""
    hold(claimed(path, size, folder=folder))


def check_room_for(path: Path, adapter: Adapter, spelling: str) -> None:
    """Raise OutputError unless there is room for this adapter's file."""
    from qrlora.method.adapter.file import tensor_shapes

    shapes = tensor_shapes(adapter.metadata, adapter.shapes, spelling)
    width = max((delta.element_size() for delta in adapter.deltas.values()), default=0)
    check_room(path, width * sum(map(math.prod, shapes.values())))


def check_png(path: Path) -> None:
    """Refuse what no PNG can be written to, before time is spent on it."""
    if path.suffix.lower() != ".png" or path.is_dir():
        got = "a folder" if path.is_dir() else path.name
        raise QrloraError(f"no picture can be written to {path}", expected="a file *.png", got=got, remedy="name one")


def refuse_default_output(options: Options, default: str) -> None:
    if options.output == Path(default):
        refuse_to_replace(options.output)


def refuse_to_replace(path: Path, remedy: str | None = None) -> None:
    """Raise QrloraError if the file is there. remedy: where a command has no -o."""
    if path.exists():
        raise QrloraError(f"{path} is already there", remedy=remedy or _NAME_IT)


_NAME_IT = "name the output with -o (a named file is replaced)"


def check_there(address: str) -> None:
    """Check that a Ray cluster answers, because Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise QrloraError(
            f"no Ray cluster at {address}",
            expected="HOST:PORT of a cluster's head node, auto or local",
            got=error,
            remedy="start one there: ray start --head --port 6379",
        ) from error
