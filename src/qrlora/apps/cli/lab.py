"""`qrlora lab`: the measurements behind what the documentation claims. Each command imports what it needs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import rich_click as click
from click import get_current_context
from click.core import ParameterSource

from qrlora._files import make_folder
from qrlora.apps.cli.command import Group, together
from qrlora.apps.cli.shared import COUNT, NOT_NEGATIVE, NUMBER, PATH, SEED, Names, at_least, claim

OUT = Path("out/speed")
SPEED_MODELS = ("flux.1", "sd3.5-medium", "sdxl")


class Each(Names):
    """Values of one type separated by commas."""

    def __init__(self, kind: click.ParamType) -> None:
        self.kind, self.name = kind, f"{kind.name}s"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        given: tuple[Any, ...] = super().convert(value, param, ctx)
        return tuple(dict.fromkeys(self.kind.convert(part, param, ctx) for part in given))


def say(text: str) -> None:
    """Print progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def typed(*but: str) -> str:
    """Return the command as it was typed, for a report, without these options' defaults."""
    context = get_current_context()
    words = ["qrlora", *context.command_path.split()[1:]]
    for parameter in context.command.params:
        name = str(parameter.name)
        if name in but or context.get_parameter_source(name) is ParameterSource.DEFAULT:
            continue
        value = context.params[name]
        flag = max(parameter.opts, key=len)
        words += (
            [flag] if value is True else [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        )
    return shlex.join(words)


def _measured(measure: Callable[[SimpleNamespace], None], given: dict[str, Any]) -> None:
    """Run a measurement whose JSON was tried before, so that hours of it are not lost to a missing folder."""
    if path := given["json"]:
        make_folder(path.parent)
        claim(path)
    measure(SimpleNamespace(**given))


@click.group(cls=Group)
def lab() -> None:
    """Repeat the measurements of the docs: methods, published claims, speed, where subject and style are learned."""


@lab.command()
@click.option("--out", type=PATH, default=Path("out/compare"), show_default=True)
@click.option("--small", is_flag=True, help="A few rows, pairs, steps and pictures, to see it work.")
@click.option("--rows", type=Names(), help="Rows of the table, separated by commas (default: all; see --list).")
@click.option("--subjects", type=Names(), help="Reserved subjects, separated by commas (default: all).")
@click.option("--styles", type=Names(), help="Reserved styles, separated by commas (default: all).")
@click.option("--seeds", type=Each(SEED), help="Seeds, separated by commas (default: 0,1,2).")
@click.option("--lessons", type=COUNT, help="Pictures that each subject or style is trained on (default: 1).")
@click.option("--steps", type=COUNT, help="Training steps of each adapter (default: 240).")
@click.option("--pictures", type=COUNT, help="Pictures of each composed pair (default: 8).")
@click.option("--workers", type=COUNT, default=os.cpu_count() or 1, help="Processes (default: one a core).")
@click.option("--records", type=PATH, help="records.jsonl of an earlier run, taken as measured.")
@click.option("--tune", is_flag=True, help="Choose learning rates and weights anew, write rates.json, and stop.")
@click.option("--list", "listed", is_flag=True, help="Print the rows, and stop.")
def compare(**given: Any) -> None:
    """Compare training methods and merges on pico, where the truth is known.

    Every result is stored under a digest of what decides it: an interrupted run continues, a wider one measures only
    what is new. The whole table takes a night on a laptop; --small takes minutes and decides nothing.
    """
    from qrlora.lab import compare as table
    from qrlora.lab.compare import page, plan, run, tuning

    options = SimpleNamespace(**given)
    if options.listed:
        click.echo("".join(f"{row.name:24} {table.about(row)}\n" for row in plan.ROWS.values()), nl=False)
        return
    scope = plan.scope_of(options)
    claim(options.out, folder=True)
    if options.tune:
        click.echo(tuning.summary(*tuning.tune(options.out, scope, options.workers, say)))
        return
    records = run.read_records(options.records) if options.records else []
    scope = tuning.tuned(options.out, scope, options.workers, say)
    records = run.run(options.out, scope, options.workers, say, records)
    click.echo(page.write(options.out, scope, records, typed("out", "workers", "records")))


@lab.command()
@click.option("--only", type=Names(), help="Some of the claims, separated by commas (default: all).")
@click.option(
    "--tasks", type=Names(), default="teapot,rocket,chalk,mosaic", show_default=True, help="Names of pico's world."
)
@click.option("--steps", type=COUNT, default=100, show_default=True, help="Training steps of each adapter.")
@click.option("--rank", type=COUNT, default=16, show_default=True, help="Rank of the adapters.")
@click.option(
    "--rates", type=Each(NUMBER), default="3e-4,1e-3,3e-3", show_default=True, help="Learning rates of `convergence`."
)
@click.option("--seeds", type=COUNT, default=3, show_default=True, help="Number of seeds of `stability`.")
@click.option("--json", type=PATH, default=Path("out/claims.json"), show_default=True)
def claims(**given: Any) -> None:
    """Measure the claims of arXiv 2507.04599 one by one."""
    from qrlora.lab.claims import run

    _measured(run.main, given)


@lab.command()
@click.option("--tasks", type=Names(), default="teapot,chalk", show_default=True, help="Names of pico's world.")
@click.option("--only", type=Names(), help="Parts to measure, of blocks, groups, steps (default: all).")
@click.option("--pictures", type=COUNT, help="Pictures of each part (default: those of `compare`).")
@click.option("--steps", type=COUNT, help="Training steps (default: those of `compare`).")
@click.option("--denoising-steps", type=COUNT, help="Denoising steps (default: those of `compare`).")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed of everything.")
@click.option("--quick", is_flag=True, help="Fewer pictures and steps, to see it work.")
@click.option("--out", type=PATH, default=Path("out/where"), show_default=True)
def where(**given: Any) -> None:
    """Find the layers and denoising steps that carry subject and style."""
    from qrlora.lab import where as parts

    claim(given["out"], folder=True)
    parts.main(SimpleNamespace(**given), typed("out"))


@lab.command()
@click.option(
    "--role", type=click.Choice(["style", "subject"]), default="style", show_default=True, help="What to train."
)
@click.option(
    "--count",
    type=COUNT,
    default=24,
    show_default=True,
    help="Random styles or things, without a word for them, that span the space.",
)
@click.option("--pictures", type=COUNT, default=8, show_default=True, help="Pictures of each of them.")
@click.option("--library-steps", type=COUNT, default=80, show_default=True, help="Training steps of each of them.")
@click.option("--components", type=COUNT, help="Components to keep (default: one less than --count).")
@click.option(
    "--ways",
    type=Names(),
    default="alone,qrlora,lora_one_start,lora_own_start,delta_w",
    show_default=True,
    help="Ways to train it.",
)
@click.option("--names", type=Names(), help="Reserved ones, each trained from one picture (default: all of the role).")
@click.option(
    "--remainders",
    type=Each(NUMBER),
    default="0",
    show_default=True,
    help="Weights of a free ΔR beside the coefficients.",
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    default=0.03,
    show_default=True,
    help="Learning rate of the coefficients.",
)
@click.option("--decay", type=NOT_NEGATIVE, default=0.1, show_default=True, help="Weight decay of the coefficients.")
@click.option("--steps", type=COUNT, default=240, show_default=True, help="Training steps of a picture.")
@click.option("--asked", type=COUNT, default=16, show_default=True, help="Pictures to sample and judge for each style.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--out", type=PATH, default=Path("out/space"), show_default=True)
def space(**given: Any) -> None:
    """Train a style, or a subject, from one picture as a point in a space of adapters: QR-LoRA's, LoRA's, that of
    ΔW."""
    from qrlora.lab import space as spaces

    given["components"] = given["components"] or given["count"] - 1
    claim(given["out"], folder=True)
    spaces.main(SimpleNamespace(**given), say)


@lab.command()
@click.option("--each", type=COUNT, default=10, show_default=True, help="Renders of every pair.")
@click.option("--json", type=PATH, default=Path("out/judge.json"), show_default=True)
def judge(**given: Any) -> None:
    """Measure the strictness of pico's judge: true renders, reserved and held back, changed step by step."""
    from qrlora.lab import strictness

    _measured(strictness.main, given)


@lab.command()
@click.option("--pictures", type=at_least(2), default=1000, show_default=True)
@click.option("--steps", type=COUNT, help="Denoising steps (default: pico's own).")
@click.option("--guidance", type=NOT_NEGATIVE, help="Guidance scale (default: pico's own).")
@click.option("--seed", type=SEED, default=0, show_default=True)
@click.option("--by", type=click.Choice(["pair", "subject", "style"]), help="Print the shares of each, worst first.")
@click.option("--json", type=PATH, help="Write all scores there.")
def base(**given: Any) -> None:
    """Score the base model pico by its own judge, on seen pairs and on pairs held back from pretraining."""
    from qrlora.lab import base as scores

    _measured(scores.main, given)


@lab.group()
def speed() -> None:
    """Time a basis, a training step, adapters at inference, a server, each beside the alternatives."""


@speed.command()
@click.option("--size", type=COUNT, default=3072, show_default=True, help="Rows and columns of the random weight.")
@click.option("--shapes", type=click.Choice(SPEED_MODELS), help="Random weights of a model's shapes instead.")
@click.option("--rank", type=COUNT, default=64, show_default=True, help="Rank of the basis.")
@click.option("--decay", type=NUMBER, default=0.5, show_default=True, help="Column i is scaled by i^-decay.")
@click.option("--weights", type=PATH, help="A .safetensors file instead of a random weight.")
@click.option("--peft", is_flag=True, help="Also PEFT's pissa, pissa_niter_16, olora and mica.")
@click.option("--whole", type=click.Choice(["flux.1"]), help="Time `fast` on random weights of all layers of a model.")
@click.option("--reproduce", is_flag=True, help="Compute Q in other ways that differ by rounding alone.")
@click.option("--rounds", type=COUNT, default=1, show_default=True, help="How often each weight is timed.")
@click.option("--summary", is_flag=True, help="Print the last lines only.")
@click.option("--json", type=PATH, default=OUT / "basis.json", show_default=True)
def basis(**given: Any) -> None:
    """Time the `fast` basis beside a full SVD and PEFT's initialisations, and compare their energy."""
    from qrlora.lab.speed import basis as times

    _measured(times.main, given)


denoiser_options = together(
    click.option("--width", type=COUNT, default=1024, show_default=True, help="Width of the denoiser, n x 128."),
    click.option("--blocks", type=COUNT, default=1, show_default=True, help="Blocks of each of FLUX's kinds."),
    click.option("--side", type=COUNT, default=16, show_default=True, help="Side of the picture in tokens."),
    click.option("--rank", type=COUNT, default=16, show_default=True, help="Rank of the adapters."),
    click.option("--rounds", type=COUNT, default=30, show_default=True, help="Rounds of one step by each method."),
    click.option("--quick", is_flag=True, help="A quarter of the width and few rounds, to see it work."),
    click.option("--device", help="Device (default: a CUDA device if there is one, else the CPU)."),
)
"""Options of a benchmark on one FLUX denoiser of random weights."""


@speed.command()
@denoiser_options
@click.option("--batch-size", type=COUNT, default=1, show_default=True, help="Examples of a step.")
@click.option(
    "--dtypes", type=Names(), default="float32,bfloat16", show_default=True, help="Precisions of the denoiser."
)
@click.option("--methods", help="Methods, separated by ';' (default: all).")
@click.option("--seconds", type=NOT_NEGATIVE, default=150, show_default=True, help="Most seconds for each precision.")
@click.option("--json", type=PATH, default=OUT / "training.json", show_default=True)
def training(**given: Any) -> None:
    """Measure time and memory of a training step beside LoRA, PiSSA, OLoRA, MiCA and the published layer."""
    from qrlora.lab.speed import training as times

    _measured(times.main, given)


@speed.command()
@denoiser_options
@click.option("--dtype", default="float32", show_default=True, help="Precision of all weights.")
@click.option("--seconds", type=NOT_NEGATIVE, default=90, show_default=True, help="Most seconds for each table.")
@click.option(
    "--only", type=Names(), default="composed,changing,mixed,layers,merging", show_default=True, help="Tables."
)
@click.option("--json", type=PATH, default=OUT / "inference.json", show_default=True)
def inference(**given: Any) -> None:
    """Time composed adapters, mixed batches and merging beside PEFT's LoRA."""
    from qrlora.lab.speed import inference as times

    _measured(times.main, given)


@speed.command()
@click.option("--clients", type=COUNT, default=32, show_default=True, help="Clients at once.")
@click.option(
    "--rounds", type=COUNT, default=3, show_default=True, help="Rounds, each of the server and of plain diffusers."
)
@click.option("--each", type=COUNT, default=4, show_default=True, help="Requests of a client in a round.")
@click.option("--steps", type=COUNT, default=20, show_default=True, help="Denoising steps for throughput.")
@click.option("--batch-size", type=COUNT, default=16, show_default=True, help="Batch size of the server.")
@click.option(
    "--requests", type=COUNT, default=2000, show_default=True, help="Requests of 2 steps while memory is watched."
)
@click.option("--quick", is_flag=True, help="One round of one request each of 8 steps, 100 requests.")
@click.option(
    "--nodes", type=COUNT, default=1, show_default=True, help="Ray nodes on this machine, with an engine each."
)
@click.option("--json", type=PATH, default=OUT / "serve.json", show_default=True)
def serve(**given: Any) -> None:
    """Measure `qrlora serve` beside plain diffusers that switches LoRAs: throughput, correctness, memory."""
    from qrlora.lab.speed import serve as times

    _measured(times.main, given)


@speed.command()
@click.option(
    "--moves", type=COUNT, default=12, show_default=True, help="Moves of a slider, each after the last picture."
)
@click.option("--browser", type=PATH, help="Chromium or Chrome (default: the one on the path).")
@click.option("--json", type=PATH, default=OUT / "studio.json", show_default=True)
def studio(**given: Any) -> None:
    """Measure the time from a slider to its picture in the studio, in Chromium."""
    from qrlora.lab.speed import studio as times

    _measured(times.main, given)


@speed.command()
@click.option("--rounds", type=COUNT, default=7, show_default=True, help="Rounds of each measurement.")
@click.option("--json", type=PATH, default=OUT / "integrity.json", show_default=True)
def integrity(**given: Any) -> None:
    """Measure what an adapter file's digest costs, as a share of the time that loading takes."""
    from qrlora.lab.speed import integrity as times

    _measured(times.main, given)


@speed.command()
@click.option("--writers", type=at_least(2), default=8, show_default=True, help="Processes that write at once.")
@click.option("--operations", type=COUNT, default=1000, show_default=True, help="Operations of all writers together.")
@click.option("--json", type=PATH, default=OUT / "registry.json", show_default=True)
def registry(**given: Any) -> None:
    """Measure the registry's commits a second on SQLite and PostgreSQL, by one writer and by several at once."""
    from qrlora.lab.speed import registry as times

    _measured(times.main, given)


@speed.command()
@click.option("--products", type=COUNT, default=100_000, show_default=True, help="Products.")
@click.option("--styles", type=COUNT, default=20, show_default=True, help="Styles.")
@click.option("--each", type=COUNT, default=1, show_default=True, help="Pictures of a product in a style.")
@click.option("--workers", type=COUNT, default=64, show_default=True, help="GPUs.")
@click.option("--card", default="a card", show_default=True, help="Name of the GPU, for the report.")
@click.option("--seconds", type=NOT_NEGATIVE, default=3.0, show_default=True, help="Seconds of a GPU for a picture.")
@click.option(
    "--training-seconds", type=NOT_NEGATIVE, default=0, show_default=True, help="Seconds of a GPU for an adapter."
)
@click.option("--batch-size", type=COUNT, default=8, show_default=True, help="Pictures of a batch.")
@click.option("--picture-mb", type=NOT_NEGATIVE, default=1.5, show_default=True, help="Megabytes of a picture's file.")
@click.option("--adapter-mb", type=NOT_NEGATIVE, default=47, show_default=True, help="Megabytes of an adapter's file.")
@click.option(
    "--bandwidth-mb",
    type=NOT_NEGATIVE,
    default=1000,
    show_default=True,
    help="Megabytes that the storage writes in a second.",
)
@click.option("--sqlite-rate", type=NOT_NEGATIVE, help="Pictures recorded in a second (default: measured here).")
@click.option("--postgresql", metavar="URL", help="Database to measure commits on.")
@click.option(
    "--postgresql-rate", type=NOT_NEGATIVE, help="Pictures recorded in a second (default: measured on --postgresql)."
)
@click.option("--rounds", type=COUNT, default=300, show_default=True, help="Rounds of each measurement.")
@click.option("--against", multiple=True, type=PATH, help="Folder of a catalog that ran; may be given several times.")
@click.option("--plot", type=PATH, help="Write an SVG of pictures a second over GPUs.")
@click.option("--json", type=PATH, default=OUT / "catalog.json", show_default=True)
def catalog(**given: Any) -> None:
    """Simulate a catalog on many GPUs with measured times: hours, storage, where it saturates."""
    from qrlora.lab.speed import catalog as times

    _measured(times.main, given)
