"""Divide one training step among several processes.

A process is accelerate's (`accelerate launch`, torchrun), and has a GPU of its own where there are any.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor

from qrlora.errors import RecipeError
from qrlora.models.families import default_device
from qrlora.models.training.recipe import Recipe


def processes_here(**tracked: Any) -> Accelerator:
    """Return accelerate's view of the processes. Without a GPU it needs `cpu=True`, or each process would run by
    itself.

    tracked: accelerate's options about trackers.
    """
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))  # the others wait while the first computes the bases
    return Accelerator(mixed_precision="no", cpu=default_device().type == "cpu", kwargs_handlers=[patience], **tracked)


def check_divisible(recipe: Recipe, processes: int, kind: str, given: bool) -> None:
    """Raise RecipeError where the work cannot be divided among the processes.

    Args:
        kind: name of accelerate's `DistributedType`.
        given: whether the caller has the pipeline, and wants it back as it was.
    """
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise RecipeError(
            "accelerate is told to divide the model",
            expected="a plain launch of several processes",
            got=kind,
            remedy="leave that out of accelerate's options; to divide the frozen base, set fsdp = true in the recipe",
        )
    whole = recipe.batch_size * recipe.accumulation
    if processes > whole:
        raise RecipeError(
            "more processes than examples in a step",
            expected=f"at most batch_size x accumulation = {whole}",
            got=processes,
            remedy="raise batch_size or accumulation, or launch fewer processes",
        )
    if recipe.fsdp and processes == 1:
        raise RecipeError(
            "fsdp divides the base model among processes",
            expected="several",
            got=1,
            remedy="launch several (docs/training.md), or leave fsdp out",
        )
    changed = [name for name in ("quantize", "fsdp") if getattr(recipe, name)]
    if given and changed:
        raise RecipeError(
            f"{changed[0]} changes the base model for good",
            expected="a model that is loaded for this run alone",
            got="a pipeline",
            remedy="leave out pipe, so that the recipe's model is loaded, or leave out " + changed[0],
        )


def share(recipe: Recipe, micro: int, process: int, processes: int) -> slice:
    """Return the rows of a step's forward pass `micro` that one of the processes takes.

    A step's `batch_size * accumulation` examples are dealt out in their order, to each process as many (to one); so
    processes divide forward passes where there are few, and take whole ones where there are many.
    """
    whole = recipe.batch_size * recipe.accumulation
    first, last = (whole * index // processes - micro * recipe.batch_size for index in (process, process + 1))
    return slice(*(min(max(row, 0), recipe.batch_size) for row in (first, last)))


def anywhere(accelerator: Accelerator, holds: bool) -> bool:
    """Return True if the flag is set in any process: all must stop after the same step, or one waits for the others."""
    return bool(summed(accelerator, torch.tensor(float(holds), device=accelerator.device)))


def summed(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Return the sum of the tensor over all processes."""
    total: Any = accelerator.reduce(tensor, reduction="sum")
    return total
