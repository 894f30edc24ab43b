"""The training loop of the package with any method in the adapter's place, so that methods differ in nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from qrlora._interrupts import deferred
from qrlora.models.families import ModelFamily
from qrlora.models.training.dataset import encode
from qrlora.models.training.loop import Progress, begin, run_steps
from qrlora.models.training.optimizers import evaluated
from qrlora.models.training.prepare import Losses, Prepared, examples_of, first_losses
from qrlora.models.training.processes import processes_here
from qrlora.models.training.recipe import Recipe

T = TypeVar("T")


@dataclass(frozen=True)
class Attached(Generic[T]):
    """Trainable parameters on a denoiser, in float32, by name; and the function that reads the result."""

    parameters: dict[str, nn.Parameter]
    read: Callable[[], T]


def train_attached(
    attach: Callable[[Any, ModelFamily, Recipe, Losses], AbstractContextManager[Attached[T]]],
    recipe: Recipe,
    *,
    pipe: Any,
    family: ModelFamily,
    beside: Sequence[Recipe] = (),
    progress: Callable[[Progress], None] | None = None,
) -> T:
    """Run the steps of a recipe on what `attach` puts on the denoiser; return what its `read` then reads.

    Args:
        attach: puts trainable parameters on the denoiser for the duration of a context, and takes them off again. By
            its last argument it can look at the losses of the first forward passes before.
        recipe: what to do, but for its method; nothing is written.
        pipe, family: the base model; it comes back as it was.
        beside: recipes whose pictures and captions are trained on too.
        progress: called after every step.

    Errors: as `train`.
    """
    ready = _prepared([recipe, *beside], pipe, family)
    with attach(ready.denoiser, family, recipe, functools.partial(first_losses, recipe, ready)) as attached:
        run = begin(recipe, ready, processes_here(), attached.parameters)
        with deferred() as interrupted:
            run_steps(run, interrupted, progress)
        with evaluated(run.optimizer):
            return attached.read()


def _prepared(recipes: Sequence[Recipe], pipe: Any, family: ModelFamily) -> Prepared:
    """Encode the pictures and captions of all the recipes, as the first of them says."""
    examples = [example for recipe in recipes for example in examples_of(recipe, pipe, family)]
    data = encode(examples, pipe, family, mask_min_value=recipes[0].mask_min_value)
    return Prepared(pipe, family, family.denoiser_of(pipe), family.training_scheduler(pipe), examples, data, None)
