"""`qrlora train`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._files import make_folder
from qrlora.apps.cli.command import Command, Options, Several, check_one_of, command, hold, print_and_exit, together
from qrlora.apps.cli.recorded import recorder_here, referable, shown
from qrlora.apps.cli.shared import OVERWRITE_HELP, PATH, Bar, Bars, refuse_to_replace
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.models.training.recipe import Recipe

RECIPE_PANEL = "Recipe fields"


def _schema() -> str:
    from qrlora.models.training.recipe import Recipe

    return json.dumps(Recipe.file_schema(), indent=2, ensure_ascii=False)


recipe_options = together(
    *(click.option_panel(name) for name in ("Arguments", "Options", RECIPE_PANEL)),  # in this order
    click.argument("recipe", required=False, type=PATH, help="TOML recipe (see recipes/); options override its fields"),
    click.option("--subject", cls=Several, metavar="IMAGE...", help="pictures or a folder of the subject to train on"),
    click.option("--style", cls=Several, metavar="IMAGE...", help="pictures or a folder of the style to train on"),
    click.option(
        "--images", cls=Several, metavar="IMAGE...", help="pictures or a folder to train on, instead of the recipe's"
    ),
)
"""Train by a recipe file, by options, or both; the recipe's other fields are added by `RecipeCommand`."""


class RecipeCommand(Command):
    """A command with an option for each field of the recipe; pydantic, which lists them, is imported when they are
    asked for."""

    fields: list[click.Parameter] | None = None

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if self.fields is None:
            self.fields = _recipe_fields()
        *own, help_option = super().get_params(ctx)
        return [*own, *self.fields, help_option]


def _recipe_fields() -> list[click.Parameter]:
    """Return an option for each field of the recipe, which checks the values."""
    from qrlora.models.training.recipe import Recipe

    found: list[click.Parameter] = []
    for name, field in Recipe.model_fields.items():
        if name in ("role", "images"):
            continue
        flag = name.replace("_", "-")
        text = field.description or ""
        if not field.is_required() and field.default not in (None, "", ()):
            text += f" (default: {field.default})"
        if field.annotation is bool:
            found.append(click.RichOption([f"--{flag}/--no-{flag}"], default=None, help=text, panel=RECIPE_PANEL))
        else:
            flags = [f"--{flag}", *(["-o"] if name == "output" else [])]
            found.append(click.RichOption(flags, metavar=name.upper(), help=text, panel=RECIPE_PANEL))
    return found


def recipe_of(options: Options) -> Recipe:
    """Return the recipe that file and options make together."""
    from qrlora.models.training.recipe import Recipe

    check_one_of(options, "subject", "style", "images")
    fields = {name: getattr(options, name) for name in Recipe.model_fields if getattr(options, name, None) is not None}
    for role in ("subject", "style"):
        if getattr(options, role):
            fields |= {"role": role, "images": getattr(options, role)}
    return Recipe.load(options.recipe, fields) if options.recipe else Recipe.of(fields)


@command(
    "train",
    "Train an adapter on a subject or a style, from a recipe file, from options, or both",
    "Without --output the file is subject.safetensors or style.safetensors. " + OVERWRITE_HELP,
    cls=RecipeCommand,
)
@click.option("--resume", is_flag=True, help="continue an interrupted run from its newest checkpoint")
@click.option("--restart", is_flag=True, help="delete an earlier run's checkpoints, and begin anew")
@click.option(
    "--judge",
    metavar="NAME",
    help="pico only: write the step whose sample pictures its judge finds most like this subject or style of its "
    "world (teapot, chalk), and stop by --patience; needs --sample-every",
)
@print_and_exit("--schema", "print the JSON Schema of recipes, for editors, and end", _schema)
@recipe_options
@referable(".safetensors")
def run_train(options: Options) -> None:
    """Train one adapter and say what came of it."""
    from qrlora.models.training.outputs import held

    check_one_of(options, "resume", "restart")
    recipe = recipe_of(options)
    output = recipe.output or Path(f"{recipe.role}.safetensors")
    if recipe.output is None and not options.resume:
        refuse_to_replace(output)
    make_folder(output.parent)
    recipe = recipe.replace(output=output)
    if os.environ.get("RANK", "0") == "0":  # of several processes the first alone writes
        hold(held(recipe, options.resume, options.restart))
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
        preparing=Bars(),
        resume=options.resume,
        restart=options.restart,
        score=score,
    )
    main = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not main:
        return
    if recorder := recorder_here():
        recorder.trained(output, recipe)
    count = adapter.parameters()
    what = f"{count.trained:,} trained parameters, {count.ratio:.3f} of a LoRA of the same rank"
    if place := adapter.metadata.provenance.get("space"):
        what = f"{1 + len(place['coordinates'])} coefficients of {place['name']}"
        what += f", and a remainder with {place['remainder']:.1%} of ‖ΔR‖²" if recipe.space_remainder else ""
    print(f"{shown(output)}: {what}; call it with {recipe.trigger!r}, as in {recipe.text!r}")


def _judge(name: str, model: str) -> Callable[[Any], float]:
    """Return the score of sample sheets: pico's judge, which knows pico's world alone."""
    if model != "pico":
        raise QrloraError(
            "--judge is for pico, whose world it knows",
            expected="--model pico",
            got=model,
            remedy="leave it out; in Python, train(..., score=...) takes any judge",
        )
    from qrlora.pico.judge import Judge

    return Judge.load().scorer(name)
