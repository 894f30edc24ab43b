"""`qrlora space build` and `qrlora space show`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._files import make_folder, write_atomically
from qrlora.apps.cli.command import Group, Options, command
from qrlora.apps.cli.recorded import recorder_here, referable, shown
from qrlora.apps.cli.shared import (
    COUNT,
    OVERWRITE_HELP,
    PATH,
    SEED,
    check_png,
    claim,
    json_option,
    load_adapters,
    refuse_to_replace,
    sampling_options,
)
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.method.space import Projection, Space

DEFAULT = "adapters.space.safetensors"
STEPS = (-2.0, -1.0, 0.0, 1.0, 2.0)
"""Standard deviations of a walk's pictures."""
SHOWN = 5


@click.group(cls=Group)
def space() -> None:
    """Build a space from adapters of one role, to train the next one as a point of it (train --space)."""


@command(
    "build",
    "Write the space of adapters that share a basis: mean and principal components of their ΔR",
    OVERWRITE_HELP,
)
@click.argument("files", nargs=-1, required=True, type=PATH, metavar="ADAPTER...", help="two adapter files or more")
@click.option("-o", "--output", type=PATH, help=f"file to write (default: {DEFAULT})")
@click.option("--components", type=COUNT, help="principal components to keep (default: one less than adapters)")
@referable(".space.safetensors")
def run_build(options: Options) -> None:
    """Write the space of the adapters and say how much of them its components hold."""
    if options.output is None:
        options.output = Path(DEFAULT)
        refuse_to_replace(options.output)
    claim(options.output)
    from qrlora.method.space import Space, save_space

    built = Space.of(load_adapters(options.files, None), options.components)
    save_space(built, options.output)
    if recorder := recorder_here():
        recorder.spanned(options.output, options.files)
    print(
        f"{shown(options.output)}: {built.count} components of {len(built.members)} adapters, "
        f"{sum(built.shares[: built.count]):.1%} of their variance, {options.output.stat().st_size:,} bytes"
    )


@command(
    "show",
    "Print what a space is made of and where an adapter is in it; sample a walk along a component",
)
@click.argument("file", type=PATH, metavar="SPACE")
@click.argument("adapter", type=PATH, required=False)
@json_option
@click.option(
    "--walk",
    type=COUNT,
    metavar="I",
    help="sample a picture at -2, -1, 0, 1, 2 standard deviations of component I (the first is 1); needs -o",
)
@click.option("-o", "--output", type=PATH, help="PNG to write the walk to")
@click.option("--prompt", help="prompt of the walk (default: the role's caption, with the trigger of the space)")
@click.option("--seed", type=SEED, default=0, help="seed of the walk (default: 0)")
@sampling_options
@referable(records=False)
def run_show(options: Options) -> None:
    """Print what the space is, where an adapter is in it; sample a walk."""
    if (options.walk is None) != (options.output is None):
        raise QrloraError(
            "a walk and its picture belong together",
            expected="--walk I -o walk.png",
            got="--walk without -o" if options.output is None else "-o without --walk",
        )
    if options.output:
        check_png(options.output)
        make_folder(options.output.parent)
        claim(options.output)
    from qrlora.method.space import load_space

    loaded = load_space(options.file)
    if options.walk and options.walk > loaded.count:
        raise QrloraError("no such component", expected=f"--walk from 1 to {loaded.count}", got=options.walk)
    placed = loaded.project(load_adapters([options.adapter], None)[0]) if options.adapter else None
    described = describe(options.file, loaded, placed)
    print(json.dumps(described, indent=2, ensure_ascii=False) if options.json else "\n".join(_lines(described)))
    if options.walk:
        _walk(loaded, options)
        if not options.json:
            print(options.output)


def describe(path: Path, space: Space, placed: Projection | None) -> dict[str, Any]:
    """Return everything that `show` prints, as JSON values."""
    from dataclasses import asdict

    meta = space.mean.metadata
    names = ("role", "trigger", "rank", "alpha", "family", "base_model", "licence")
    return {
        "file": shown(path),
        "bytes": path.stat().st_size,
        "digest": space.digest,
        "components": space.count,
        "shares": list(space.shares),
        "members": [{"name": name, "digest": digest} for name, digest in space.members],
        **{name: getattr(meta, name) for name in names},
        "columns": list(meta.columns),
        "basis": meta.basis_fingerprint,
        "adapter": asdict(placed) if placed else None,
    }


def _lines(of: dict[str, Any]) -> list[str]:
    names = [member["name"] for member in of["members"]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    rows = {
        "what": f"{of['components']} components of {len(names)} adapters, role {of['role'] or 'none'}",
        "members": ", ".join(names[:SHOWN]) + more,
        "spectrum": _numbers([100 * share for share in of["shares"][: 2 * SHOWN]], "%.1f")
        + f" % of the variance; kept {sum(of['shares'][: of['components']]):.1%}",
        "trigger": of["trigger"] or "none",
        "needs": f"base model {of['base_model'] or 'not recorded'}, family {of['family'] or 'unknown'}",
        "train with": f"rank {of['rank']}, alpha {of['alpha']:g}, columns {_columns(of['columns'])}",
        "basis": f"fingerprint {of['basis'][:16]}",
        "file": f"{of['bytes']:,} bytes",
        "licence": of["licence"] or "none given",
    }
    if placed := of["adapter"]:
        near = list(placed["nearest"].items())[:3]
        rows |= {
            "unexplained": f"{placed['unexplained']:.1%} of the adapter's ‖ΔR‖²",
            "nearest": ", ".join(f"{name} ({cosine:+.2f})" for name, cosine in near),
            "mean": f"{placed['mean']:.3f}",
            "coordinates": _numbers(placed["coordinates"][: 2 * SHOWN], "%+.2f") + " standard deviations",
        }
    return [of["file"], *(f"  {key:<12}{value}" for key, value in rows.items())]


def _numbers(values: Sequence[float], form: str) -> str:
    return " ".join(form % value for value in values)


def _columns(columns: Sequence[int]) -> str:
    first, last = columns[0], columns[-1]
    return f"{first} to {last}" if len(columns) == last - first + 1 else ",".join(map(str, columns))


def _walk(space: Space, options: Options) -> None:
    """Write one picture, from left to right at -2 to 2 standard deviations of the component."""
    import torch
    from PIL import Image

    from qrlora.apps.cli.generate import described_png
    from qrlora.models.families import load_pipeline
    from qrlora.models.generation import weight_sampler
    from qrlora.models.training.recipe import TRIGGER, TRIGGERS, default_caption

    meta = space.mean.metadata
    role = meta.role if meta.role in TRIGGERS else "style"
    said = default_caption(role, "").replace(TRIGGER, meta.trigger or TRIGGERS[role])
    pipe, family = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    component = space.adapter([0.0] * (options.walk - 1) + [1.0], mean=0.0)
    adapters = {"mean": space.mean, "component": component}
    names = ("steps", "guidance", "resolution", "batch_size")
    with weight_sampler(pipe, family, adapters, **{name: getattr(options, name) for name in names}) as sampler:
        images = sampler([((1.0, deviations), options.prompt or said, options.seed) for deviations in STEPS])
    strip = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for number, image in enumerate(images):
        strip.paste(image, (number * image.width, 0))
    made = {key: value for key, value in vars(options).items() if key != "output"}
    write_atomically(options.output, described_png(strip, made))


space.add_command(run_build)
space.add_command(run_show)
