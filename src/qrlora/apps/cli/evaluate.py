"""`qrlora evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora.apps.cli.command import Decorator, Options, command, print_and_exit, together
from qrlora.apps.cli.recorded import recorder_here, referable, shown
from qrlora.apps.cli.shared import (
    PATH,
    Bar,
    Names,
    check_null_space,
    claim,
    json_option,
    load_weighted,
    null_space_of,
    null_space_option,
    refuse_to_replace,
    sampling_options,
    say_null_space,
    seed_options,
    seeds_of,
    weighted_path,
)
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.apps.cli.recorded import Recorder
    from qrlora.method.adapter import Adapter
    from qrlora.operations.registry import Artifact
    from qrlora.quality.evaluation import Evaluation
    from qrlora.quality.images.read import MeasuredPicture
    from qrlora.quality.metrics.table import References

DEFAULT_OUTPUT = "evaluation"
NETWORKS = ("dino", "clip", "csd", "lpips")
METRIC_HELP = (
    "without a neural network: palette, palette_subject, colours, texture, grain, edges, structure, copied; with one: "
    "dino, clip_i, clip_style, clip_t, csd, lpips (docs/evaluate.md describes them)"
)


def pictures_option(option: str, text: str) -> Decorator:
    """Return an option that names a picture or a folder of them."""
    return click.option(option, multiple=True, type=PATH, metavar="PICTURE", help=f"{text}; a folder, or given again")


def _located(text: str) -> tuple[str, str]:
    name, equals, where = text.partition("=")
    if name not in NETWORKS or not equals or not where:
        raise click.BadParameter(f"expected NAME=WHERE, NAME one of {', '.join(NETWORKS)}, got {text!r}")
    return name, where


weights_options = together(
    click.option(
        "--weights",
        multiple=True,
        type=_located,
        metavar="NAME=WHERE",
        help=f"network weights of {', '.join(NETWORKS)}: a folder or file, or an id in the Hugging Face cache",
    ),
    click.option("--device", help="device of the networks: cpu, cuda, ... (default: a GPU if there is one)"),
)


def _schema() -> str:
    from qrlora.quality.brand import BrandSheet

    return json.dumps(BrandSheet.file_schema(), indent=2, ensure_ascii=False)


@command(
    "evaluate",
    "Evaluate pictures against a subject, a style, a palette, a brand sheet",
    f"Metrics {METRIC_HELP}. Report, numbers and samples are written to the folder named by -o. The exit "
    "code is 0 after a complete evaluation; with --strict it is 1 if a group fails the brand sheet.",
)
@click.argument(
    "what",
    nargs=-1,
    metavar="WHAT...",
    help="pictures and folders of them (each folder is a group), or adapters, FILE[:WEIGHT], which are composed and "
    "sampled with --prompt",
)
@pictures_option("--subject", "reference picture of the subject")
@pictures_option("--style", "reference picture of the style")
@pictures_option("--training", "training pictures, to detect copies of")
@click.option("--palette", metavar="HEX,...", help="reference colours, such as '#d7263d,#f7b538'")
@click.option("--brand", type=PATH, metavar="TOML", help="brand sheet (docs/evaluate.md)")
@click.option("--strict", is_flag=True, help="exit code 1 if a group fails the brand sheet")
@click.option(
    "--metrics",
    "--measures",
    "metrics",
    type=Names(),
    metavar="NAME,...",
    help="metrics, or all (default: those that need no neural network and whose inputs are given)",
)
@weights_options
@click.option(
    "--prompt",
    multiple=True,
    help="prompt to sample adapters with, or that the pictures were made from; may be given several times",
)
@seed_options
@null_space_option
@sampling_options
@json_option
@print_and_exit("--brand-schema", "print the JSON Schema of brand sheets, and end", _schema)
@click.option("-o", "--output", type=PATH, default=Path(DEFAULT_OUTPUT), help="folder (default: evaluation/)")
@referable()
def run_evaluate(options: Options) -> int:
    """Evaluate, print and write; returns the exit code."""
    if options.output == Path(DEFAULT_OUTPUT):
        refuse_to_replace(options.output / "report.html")
    claim(options.output, folder=True)
    from qrlora.quality.brand import BrandSheet
    from qrlora.quality.evaluation import evaluate, report
    from qrlora.quality.metrics.learned import FeatureNetworks
    from qrlora.quality.metrics.table import select_metrics

    sheet = BrandSheet.load(options.brand) if options.brand else None
    if options.strict and sheet is None:
        raise QrloraError("--strict needs a brand sheet", expected="--brand TOML", got="none")
    references = references_of(options, sheet)
    adapters = _adapters(options.what)
    check_null_space(options.null_space, len(adapters))
    # Metrics are checked before sampling; samples have a prompt and no mask.
    groups = {"made": _prompts_alone(options)} if adapters else _groups(options)
    everything = [picture for pictures in groups.values() for picture in pictures]
    names = options.metrics
    if names is None and sheet and not _anything(references):
        names = []  # the metrics of the sheet suffice
    metrics = select_metrics(names, everything, references)
    if sheet:
        metrics += select_metrics(
            [n for n in sheet.scores if n not in [m.name for m in metrics]], everything, references
        )
    if adapters:
        loaded = load_weighted(adapters, options.model)
        strength = null_space_of(options.null_space, [adapter for adapter, _ in loaded])
        groups = {_title(adapters, strength): _made(options, adapters, loaded, strength)}
    networks = FeatureNetworks(dict(options.weights), options.device)
    found = evaluate(groups, references, metrics, sheet, networks, Bar("picture"))
    page = report(found).write(options.output, {"pictures.csv": found.csv().encode()})
    if recorder := recorder_here():
        numbers = found.data()
        if options.brand:
            shares = [passing[0].value for group in groups if (passing := found.passing(group))]
            numbers["brand_sheet"] = {"digest": recorder.brand(options.brand).digest, "share": min(shares, default=0.0)}
        recorder.reported(page, numbers, _about(recorder, options, adapters, strength if adapters else 0.0))
    print(json.dumps(found.data(), indent=2, ensure_ascii=False) if options.json else table(found))
    if not options.json:
        print(shown(page))
    return 1 if options.strict and not found.passes else 0


def _about(
    recorder: Recorder, options: Options, adapters: Sequence[tuple[Path, float]], strength: float
) -> list[Artifact]:
    """Return the artifacts of the report: the composition and its adapters, or the registered pictures."""
    if adapters:
        parts = [recorder.artifact(path) for path, _ in adapters]
        return [recorder.composition(adapters, strength, options.model), *parts]
    return recorder.registered(Path(text) for text in options.what)


def references_of(options: Options, sheet: Any = None) -> References:
    """Return the references from the options and the brand sheet."""
    from qrlora.quality.images.read import hex_colour, load_pictures
    from qrlora.quality.metrics.table import References

    try:
        palette = [hex_colour(code) for code in options.palette.split(",")] if options.palette else []
    except ValueError as error:
        raise QrloraError("unreadable palette", got=error, remedy="--palette '#d7263d,#f7b538'") from error
    if not palette and sheet and sheet.palette:
        palette = list(sheet.palette.colours)
    kinds = {name: load_pictures(getattr(options, name)) for name in ("subject", "style", "training")}
    return References(palette=palette, **kinds)


def _anything(references: References) -> bool:
    """Return True if there is any reference."""
    return bool(references.subject or references.style or references.training or references.palette)


def _adapters(what: Sequence[str]) -> list[tuple[Path, float]]:
    """The arguments as weighted adapters; empty if they are pictures."""
    if not what:
        raise QrloraError("nothing to evaluate", expected="pictures, folders of pictures, or adapters")
    try:
        parts = [weighted_path(text) for text in what]
    except click.BadParameter as error:
        raise QrloraError(error.message) from error
    are = [path.suffix == ".safetensors" for path, _ in parts]
    if any(are) and not all(are):
        got = [text for text, is_adapter in zip(what, are, strict=True) if not is_adapter]
        raise QrloraError("adapters and pictures in one evaluation", expected="one of the two", got=got)
    return parts if all(are) else []


def _groups(options: Options) -> dict[str, list[MeasuredPicture]]:
    """Return groups of pictures: one for each folder, and one for all single pictures."""
    from qrlora.quality.images.read import load_pictures

    paths = [Path(text) for text in options.what]
    if len(options.prompt or []) > 1:
        raise QrloraError(
            "pictures have one prompt each",
            expected="--prompt once",
            got=options.prompt,
            remedy="write mug.txt beside mug.png for each",
        )
    loose = [path for path in paths if not path.is_dir()]
    groups = {"pictures": load_pictures(loose)} if loose else {}
    for path in paths:
        if path.is_dir():
            groups[path.resolve().name if path.resolve().name not in groups else str(path)] = load_pictures([path])
    if not options.prompt:
        return groups
    return {name: [replace(one, prompt=options.prompt[0]) for one in group] for name, group in groups.items()}


def _prompts_alone(options: Options) -> list[MeasuredPicture]:
    """Return placeholders with the prompts, for pictures that are not sampled yet."""
    import numpy as np

    from qrlora.quality.images.read import MeasuredPicture

    if not options.prompt:
        raise QrloraError("no prompt to sample with", expected="--prompt TEXT, once or several times")
    return [MeasuredPicture("", np.zeros((16, 16, 3), np.uint8), None, prompt) for prompt in options.prompt]


def _title(adapters: Sequence[tuple[Path, float]], strength: float) -> str:
    together = " + ".join(f"{path.stem} {weight:g}" for path, weight in adapters)
    return f"{together}, {say_null_space(strength)}" if strength else together


def _made(
    options: Options,
    parts: Sequence[tuple[Path, float]],
    loaded: Sequence[tuple[Adapter, float]],
    strength: float,
) -> list[MeasuredPicture]:
    """Sample a composition, and store the pictures in the output folder."""
    import torch

    from qrlora._files import write_all
    from qrlora.apps.cli.generate import described_png, picture_file
    from qrlora.method.composition import project_out
    from qrlora.models.families import load_pipeline
    from qrlora.models.generation import generate
    from qrlora.quality.images.read import load_picture

    adapters, seeds = project_out(loaded, strength), seeds_of(options)
    pipe, family = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    sampling = {name: getattr(options, name) for name in ("steps", "guidance", "resolution", "batch_size")}
    images = iter(
        generate(pipe, family, options.prompt, seeds, adapters=adapters, progress=Bar("picture made"), **sampling)
    )
    folder = options.output / "pictures"
    pictures: dict[Path, bytes] = {}
    for index, prompt in enumerate(options.prompt):
        for seed in seeds:
            path = picture_file(folder, index, prompt, seed)
            adapter = [f"{shown(file)}:{weight:g}" for file, weight in parts]
            made = {"prompt": [prompt], "seed": [seed], "adapter": adapter, "null_space": strength}
            made |= {"model": options.model, **sampling}
            pictures[path] = described_png(next(images), made)
    write_all(pictures, make_folder=True)
    return [load_picture(path) for path in pictures]


def table(found: Evaluation) -> str:
    """Format the numbers for a terminal: a column for each group; then the failures of the brand sheet by picture."""
    names = list(found.groups)
    head = ["", "better", *names]
    rows = [
        head,
        *(
            [_titled(one), one.better, *(str(found.summary(name, one.name) or "-") for name in names)]
            for one in found.metrics
        ),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines = lines if found.metrics else []
    for name in names:
        copies = found.copies(name)
        lines += [f"{name}: copies of a training picture: {', '.join(copies)}"] if copies else []
        together = found.passing(name)
        if together and found.verdicts:
            share, enough = together
            lines.append(f"{name}: {share}: {'enough' if enough else 'not enough'} pass the brand sheet")
            for picture, verdict in zip(found.groups[name], found.verdicts[name], strict=True):
                lines += [f"  {picture.name}: {reason}" for reason in verdict.reasons]
    return "\n".join(lines)


def _titled(one: Any) -> str:
    return f"{one.name} ({one.unit})" if one.unit else str(one.name)
