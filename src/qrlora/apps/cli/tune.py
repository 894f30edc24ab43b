"""`qrlora tune`."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora.apps.cli.command import Decorator, Options, command, together
from qrlora.apps.cli.evaluate import weights_options
from qrlora.apps.cli.recorded import recorder_here, referable, shown
from qrlora.apps.cli.shared import (
    COUNT,
    NUMBER,
    PATH,
    SEED,
    Bar,
    check_null_space,
    claim,
    json_option,
    load_adapters,
    null_space_of,
    null_space_option,
    refuse_to_replace,
    sampling_options,
    say_null_space,
)
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.method.adapter import Adapter

DEFAULT_OUTPUT = "tune"
DEFAULTS = {"subject": "edges,structure", "style": "texture,grain"}


def _aim_options(side: str) -> tuple[Decorator, Decorator]:
    aim = (
        f"reference pictures of the {side}: picture or folder (several times), or a name of pico's world for its judge"
    )
    metrics = f"metrics of qrlora evaluate that score against pictures (default: {DEFAULTS[side]})"
    return (
        click.option(f"--{side}", multiple=True, required=True, metavar="WHAT", help=aim),
        click.option(f"--{side}-metrics", f"--{side}-measures", f"{side}_metrics", metavar="NAME,...", help=metrics),
    )


@command(
    "tune",
    "Search the weights of a composition for the best trade-offs between subject and style",
    "Every picture is cached in the folder named by -o, so the same command resumes an interrupted search. "
    "docs/evaluate.md describes the search.",
)
@click.argument(
    "adapters",
    nargs=-1,
    required=True,
    type=PATH,
    metavar="ADAPTER...",
    help="adapter files: the subject, the style, then any others",
)
@click.option("--prompt", multiple=True, help="prompt; may be given several times (default: from the adapters)")
@together(*_aim_options("subject"), *_aim_options("style"))
@click.option(
    "--budget", type=COUNT, default=120, metavar="PICTURES", help="largest number of pictures to sample (default: 120)"
)
@click.option(
    "--per-block",
    type=COUNT,
    metavar="PARTS",
    help="split each adapter's blocks into this many groups, each with its own weight",
)
@click.option("--highest", type=NUMBER, default=1.5, help="largest weight tried (default: 1.5)")
@click.option("--seed", type=SEED, default=0, help="seed of the search and of the first picture (default: 0)")
@null_space_option
@sampling_options
@weights_options
@json_option
@click.option("-o", "--output", type=PATH, default=Path(DEFAULT_OUTPUT), help="folder (default: tune/)")
@referable()
def run_tune(options: Options) -> None:
    """Search, print the frontier and write the report."""
    if options.output == Path(DEFAULT_OUTPUT):
        refuse_to_replace(options.output / "report.html")
    if options.highest <= 0:
        raise QrloraError("no weights to search", expected="--highest above 0", got=options.highest)
    claim(options.output, folder=True)
    import json

    from qrlora.quality.search.page import lines, report

    aims = {side: _aim(options, side) for side in ("subject", "style")}
    check_null_space(options.null_space, len(options.adapters))
    adapters = load_adapters(options.adapters, options.model)
    options.null_space = null_space_of(options.null_space, adapters)
    if options.null_space:
        _print_to_stderr(say_null_space(options.null_space))
    prompts = options.prompt or [default_prompt(adapters)]
    tuned = _tuned(options, adapters, prompts, aims)
    page = report(tuned).write(options.output)
    if recorder := recorder_here():
        recorder.reported(page, tuned.data(), [recorder.artifact(path) for path in options.adapters])
    if options.json:
        print(json.dumps(tuned.data(), indent=2, ensure_ascii=False))
    else:
        print("\n".join([*lines(tuned), shown(page)]))


def default_prompt(adapters: Sequence[Adapter]) -> str:
    """Return the published prompt for both: "a <c> dog in <s> style", from the adapters' triggers and nouns."""
    by_role = {adapter.metadata.role: adapter.metadata for adapter in adapters}
    if "subject" not in by_role or "style" not in by_role:
        remedy = '--prompt "a photo of a <c> mug in <s> style", with their triggers'
        raise QrloraError(
            "no prompt", expected="one, or adapters of a subject and a style", got=[*by_role], remedy=remedy
        )
    noun = by_role["subject"].recipe.get("noun", "")
    subject = f"{by_role['subject'].trigger} {noun}".strip()
    return f"a {subject} in {by_role['style'].trigger} style"


def _aim(options: Options, side: str) -> tuple[str, Any]:
    """Return a score's description and its objective, checked before a model is loaded."""
    from qrlora.pico.judge.objective import judge_objective
    from qrlora.pico.world import STYLES, SUBJECTS
    from qrlora.quality.images.read import load_pictures
    from qrlora.quality.metrics.learned import FeatureNetworks
    from qrlora.quality.metrics.table import METRICS, References, select_metrics
    from qrlora.quality.search.pictures import metric_objective

    wanted, names = getattr(options, side), SUBJECTS if side == "subject" else STYLES
    listed = getattr(options, f"{side}_metrics")
    if len(wanted) == 1 and wanted[0] in names and not Path(wanted[0]).exists():
        if listed:
            raise QrloraError(f"{wanted[0]} is for pico's judge", expected=f"no --{side}-metrics", got=listed)
        return f"pico's judge, asked for {wanted[0]}", judge_objective(side, wanted[0])
    strange = [text for text in wanted if not Path(text).exists()]
    if strange:
        near = difflib.get_close_matches(strange[0], names, 1)
        expected = f"a picture, a folder of pictures, or one of {', '.join(names)}"
        remedy = f"did you mean {near[0]}?" if near else "check the path or the spelling"
        raise QrloraError(f"no such {side}", expected=expected, got=", ".join(strange), remedy=remedy)
    pictures = load_pictures(Path(path) for path in wanted)
    given = References(subject=pictures) if side == "subject" else References(style=pictures)
    metrics = select_metrics([part.strip() for part in (listed or DEFAULTS[side]).split(",")], pictures, given)
    if any(need != side for one in metrics for need in one.needs):
        fitting = ", ".join(name for name, row in METRICS.items() if row.needs == (side,))
        raise QrloraError(f"no metric of the {side} alone", expected=f"some of {fitting}", got=listed)
    networks = FeatureNetworks(dict(options.weights), options.device)
    for one in metrics:
        if one.network:
            networks.load(one.network)
    return " and ".join(one.name for one in metrics), metric_objective(metrics, given, networks)


def _tuned(options: Options, adapters: list[Adapter], prompts: list[str], aims: dict[str, Any]) -> Any:
    """Run the search, and return it with everything its report needs."""
    import torch

    from qrlora.models.families import load_pipeline
    from qrlora.models.generation import weight_sampler
    from qrlora.quality.search.page import TuningResult
    from qrlora.quality.search.pictures import PictureCache, cached_scores
    from qrlora.quality.search.search import SEARCH_SAMPLES, search

    pipe, family = load_pipeline(options.model, dtype=getattr(torch, options.dtype))
    names, parts = _parts(options, adapters, [name for name, _ in family.denoiser_of(pipe).named_modules()])
    sampling = {name: getattr(options, name) for name in ("steps", "guidance", "resolution")}
    settings = {"adapters": [one.digest for one in parts], "model": options.model, "dtype": options.dtype, **sampling}
    settings["null_space"] = options.null_space
    named = dict(zip(names, parts, strict=True))
    with weight_sampler(
        pipe, family, named, null_space=options.null_space, batch_size=options.batch_size, **sampling
    ) as sampler:
        folder = options.output / "pictures"
        cache = PictureCache(sampler, folder, settings, prompts, options.seed, options.batch_size)
        cache.progress = _BudgetBar(options.budget)
        score = cached_scores(cache, aims["subject"][1], aims["style"][1])
        notify = (lambda _: None) if options.json else _print_to_stderr
        limits = {"max_weight": options.highest, "seed": options.seed, "notify": notify}
        result = search(score, len(parts), options.budget, **limits)
        numbers = range(SEARCH_SAMPLES, SEARCH_SAMPLES + len(result.confirmed[0].confirmation_scores))
        pictures = [cache.pictures([(one.weights, n) for n in numbers]) for one in result.frontier]
    commands = [_command(options, parts, one.weights, i + 1, prompts[0]) for i, one in enumerate(result.frontier)]
    settings |= {"prompts": prompts, "budget": options.budget, "seed": options.seed, "highest": options.highest}
    descriptions = (aims["subject"][0], aims["style"][0])
    return TuningResult(result, names, descriptions, pictures, commands, cache.made, settings)


class _BudgetBar:
    """Progress over the budget, from what `PictureCache` reports."""

    def __init__(self, budget: int) -> None:
        self.bar, self.done, self.budget = Bar("picture"), 0, budget

    def __call__(self, more: int) -> None:
        if more and self.done < self.budget:
            self.done = min(self.done + more, self.budget)
            self.bar(self.done, self.budget)


def _print_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _parts(options: Options, adapters: list[Adapter], order: list[str]) -> tuple[list[str], list[Adapter]]:
    """Return names and adapters that get a weight each: whole adapters, or parts by blocks."""
    from qrlora.quality.search.pictures import split_by_blocks

    names = [path.stem for path in options.adapters]
    if len(set(names)) < len(names):
        names = [f"{name} ({i + 1})" for i, name in enumerate(names)]
    if not options.per_block:
        return names, adapters
    labels, parts = [], []
    for name, adapter in zip(names, adapters, strict=True):
        for i, part in enumerate(split_by_blocks(adapter, options.per_block, order)):
            labels.append(f"{name} {i + 1}/{options.per_block}")
            parts.append(part)
    return labels, parts


def _command(options: Options, parts: list[Adapter], weights: Sequence[float], place: int, prompt: str) -> str:
    """Return the command that samples at a point; with weights by blocks, write the composition to a file first."""
    from qrlora.method.adapter import save_adapter
    from qrlora.method.composition import Composition
    from qrlora.quality.search.page import command

    if not options.per_block:
        paths = [shown(path).partition(" ")[0] for path in options.adapters]
        return command(list(zip(paths, weights, strict=True)), prompt, options.model, options.null_space)
    file = options.output / f"point-{place}.safetensors"
    save_adapter(Composition(list(zip(parts, weights, strict=True)), options.null_space).adapter(), file)
    return command([(str(file), 1.0)], prompt, options.model)
