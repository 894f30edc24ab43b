"""`qrlora plan`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import rich_click as click

from qrlora.apps.cli.command import Options, command
from qrlora.apps.cli.recorded import referable
from qrlora.apps.cli.train import RecipeCommand, recipe_of, recipe_options

if TYPE_CHECKING:
    from qrlora.models.training.plan import Estimate, Plan


@command(
    "plan",
    "Estimate what training would take, before anything heavy is loaded: parameters, files, memory",
    "Takes the options of `qrlora train`. Only the base model's configs are read.",
    cls=RecipeCommand,
)
@click.option("--json", is_flag=True, help="print everything as JSON, in bytes")
@recipe_options
@referable(".safetensors", records=False)
def run_plan(options: Options) -> None:
    """Print the plan as a table, or as JSON."""
    from qrlora.models.training.plan import plan

    recipe = recipe_of(options)
    made = plan(recipe)
    print(json.dumps(made.to_dict(), indent=2, ensure_ascii=False) if options.json else table(made))


def table(plan: Plan) -> str:
    """Format the plan for a terminal: a column a method."""
    recipe, estimates = plan.recipe, list(plan.estimates.values())
    first = estimates[0]
    rows = {
        "": list(plan.estimates),
        "trained parameters": [f"{one.parameters:,}" for one in estimates],
        "file, compact": [_size(one.file_bytes.get("compact")) for one in estimates],
        "file, as a LoRA": [_size(one.file_bytes["lora"]) for one in estimates],
        **{f"  {part.replace('_', ' ')}": [_size(one.memory[part]) for one in estimates] for part in first.memory},
        **({"  the program itself": [_size(plan.program_bytes)] * len(estimates)} if plan.program_bytes else {}),
        "memory while training": [_size(plan.program_bytes + sum(one.memory.values())) for one in estimates],
        "operations of a step": [f"{one.flops:.2e}" for one in estimates],
    }
    widths = [max(len(row[i]) for row in rows.values()) for i in range(len(estimates))]
    lines = [
        f"{recipe.model} ({plan.family}), {first.layers} layers at rank {recipe.rank}, {plan.resolution} pixels, "
        f"batch {recipe.batch_size}, {recipe.dtype}",
        f"on {plan.device}: {_size(plan.free_bytes)} free",
        *(
            f"{name:<24}" + "".join(f"{cell:>{width + 3}}" for cell, width in zip(row, widths, strict=True))
            for name, row in rows.items()
        ),
        f"before that, until the encoders leave: at most {_size(plan.program_bytes + plan.loading_bytes)} "
        f"({_size(plan.host_bytes)} are loaded)",
        *_warnings(plan, first),
    ]
    return "\n".join(line.rstrip() for line in lines)


def _warnings(plan: Plan, first: Estimate) -> list[str]:
    need = plan.program_bytes + max(plan.loading_bytes, sum(first.memory.values()))
    if need <= plan.free_bytes:
        return []
    short = f"It does not fit: {_size(need)} are needed and {_size(plan.free_bytes)} are free."
    return [short + " Lower batch_size or resolution, or load the model in half precision (dtype)."]


def _size(count: int | None) -> str:
    """Format bytes with a unit."""
    if count is None:
        return "-"
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while size >= 1000:
        size, unit = size / 1024, next(units)
    return f"{size:.3g} {unit}"
