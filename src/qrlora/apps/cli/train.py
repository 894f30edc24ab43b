"""`qrlora train`."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora._files import make_folder
from qrlora.apps.cli.shared import OVERWRITE_HELP, Bar, Parsers, command, refuse_to_replace
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.models.training.recipe import Recipe

PATIENCE = 2.0


def add_train(commands: Parsers, with_recipe: bool) -> None:
    parser = command(
        commands,
        "train",
        run_train,
        "teach an adapter a subject or a style, from a recipe file, from flags, or both",
        "Without --output the file is subject.safetensors or style.safetensors. " + OVERWRITE_HELP,
    )
    if not with_recipe:
        return
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="continue an interrupted run from its newest checkpoint")
    again.add_argument("--restart", action="store_true", help="give up an earlier run's checkpoints, and begin anew")
    parser.add_argument(
        "--judge",
        metavar="NAME",
        help="pico only: write the step whose sample pictures its judge finds most like this subject or style of its "
        "world (teapot, chalk), and mind --patience; needs --sample-every",
    )
    parser.add_argument(
        "--schema", action=_Schema, help="print the JSON Schema of recipes, for editors, and do nothing"
    )
    add_recipe(parser)


class _Schema(argparse.Action):
    """Prints the schema and ends, as --help does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from qrlora.models.training.recipe import Recipe

        print(json.dumps(Recipe.file_schema(), indent=2, ensure_ascii=False))
        parser.exit()


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """What to train, as a recipe file, as flags, or both."""
    parser.add_argument("recipe", nargs="?", type=Path, help="TOML recipe (see recipes/); flags win over it")
    what = parser.add_mutually_exclusive_group()
    for role in ("subject", "style"):
        what.add_argument(f"--{role}", nargs="+", metavar="IMAGE", help=f"learn a {role} from these pictures or folder")
    what.add_argument("--images", nargs="+", metavar="IMAGE", help="other pictures for the recipe's role")
    _add_recipe_flags(parser)


def _add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per recipe field; values are checked by the recipe."""
    from qrlora.models.training.recipe import Recipe

    group = parser.add_argument_group("recipe fields")
    for name, field in Recipe.model_fields.items():
        if name in ("role", "images"):
            continue
        flags = [f"--{name.replace('_', '-')}"] + (["-o"] if name == "output" else [])
        text = (field.description or "").replace("%", "%%")
        if not field.is_required() and field.default not in (None, ""):
            text += f" (default: {field.default})"
        if field.annotation is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            group.add_argument(*flags, default=None, metavar=name.upper(), help=text)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe that file and flags make together."""
    from qrlora.models.training.recipe import Recipe

    fields = {name: getattr(options, name) for name in Recipe.model_fields if getattr(options, name, None) is not None}
    for role in ("subject", "style"):
        if getattr(options, role):
            fields |= {"role": role, "images": getattr(options, role)}
    return Recipe.load(options.recipe, fields) if options.recipe else Recipe.of(fields)


def run_train(options: argparse.Namespace) -> None:
    """Train one adapter and say what came of it."""
    from qrlora.models.training.outputs import held

    recipe = recipe_of(options)
    output = recipe.output or Path(f"{recipe.role}.safetensors")
    if recipe.output is None and not options.resume:
        refuse_to_replace(output)
    make_folder(output.parent)
    recipe = recipe.replace(output=output)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first alone writes
        options.claims.enter_context(held(recipe, options.resume, options.restart))
    score = _judge(options.judge, recipe.model) if options.judge else None
    from accelerate import PartialState  # what was refused so far was refused before torch is loaded

    from qrlora.models.training.loop import train
    from qrlora.models.training.overview import overview

    if os.environ.get("RANK", "0") == "0":  # of several processes the first alone speaks
        print(overview(recipe.images), flush=True)
    bar = Bar("step")
    adapter = train(
        recipe,
        progress=lambda p: bar(p.step, p.steps, f"loss {p.loss:.4f}", p.seconds_left),
        preparing=_shown_if_long(),
        resume=options.resume,
        restart=options.restart,
        score=score,
    )
    main = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not main:
        return
    count = adapter.parameters()
    what = f"{count.trained:,} trained parameters, {count.ratio:.3f} of a LoRA of the same rank"
    if place := adapter.metadata.provenance.get("space"):
        what = f"{1 + len(place['coordinates'])} coefficients of {place['name']}"
        what += f", and a remainder with {place['remainder']:.1%} of ‖ΔR‖²" if recipe.space_remainder else ""
    print(f"{output}: {what}; call it with {recipe.trigger!r}, as in {recipe.text!r}")


def _shown_if_long() -> Callable[[str, int, int], None]:
    """Progress of what comes before the steps, for folders that take longer than `PATIENCE` seconds."""
    bars: dict[str, Bar] = {}

    def show(what: str, done: int, of: int) -> None:
        bar = bars.setdefault(what, Bar(what))
        if time.perf_counter() - bar.started > PATIENCE:
            bar(done, of)

    return show


def _judge(name: str, model: str) -> Callable[[Any], float]:
    """What scores sample pictures on the command line: pico's judge, which knows pico's world alone."""
    if model != "pico":
        raise QrloraError(
            "--judge is for pico, whose world it knows",
            expected="--model pico",
            got=model,
            remedy="leave it out; in Python, train(..., score=...) takes any judge",
        )
    from qrlora.pico.judge import Judge

    return Judge.load().scorer(name)
