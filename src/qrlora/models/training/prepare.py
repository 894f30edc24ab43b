"""Load the base model, and encode pictures and captions, so that of the pipeline only the denoiser has to stay."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from qrlora.errors import QrloraError
from qrlora.method.space import load_space
from qrlora.models.families import ModelFamily, family_of, load_pipeline, size_unit
from qrlora.models.stored import stored_weights
from qrlora.models.training import monitor
from qrlora.models.training.batches import family_options, forward_passes
from qrlora.models.training.dataset import EncodedDataset, Example, Report, encode, load_examples
from qrlora.models.training.pictures import bucket_sizes, check_resolution
from qrlora.models.training.placement import check_disk, check_fits, encoders_alone
from qrlora.models.training.recipe import Recipe
from qrlora.models.training.sources import find_pictures

Losses = Callable[[int], Iterator[Tensor]]
"""`first_losses` of a run: the same at every call, on the same denoiser."""


@dataclass
class Prepared:
    """Encoded pictures and prompts, and the parts of the pipeline still needed. `pipe` is None if its work is done."""

    pipe: Any
    family: ModelFamily
    denoiser: Any
    scheduler: Any
    examples: list[Example]
    data: EncodedDataset
    sampler: monitor.Sampler | None


def prepare(
    recipe: Recipe, pipe: Any, family: ModelFamily | None, accelerator: Accelerator, preparing: Report | None
) -> Prepared:
    """Return encoded pictures and prompts, and the denoiser on the device where its bases are to be computed."""
    find_pictures(recipe.images)  # a misspelt path should not cost the loading of a model
    if recipe.space:
        load_space(recipe.space)  # nor should a damaged file
    device, alone = (accelerator.device, True) if pipe is None else (pipe.device, False)
    if pipe is None:
        if accelerator.is_main_process:
            _check_disk(recipe)
        pipe, family = load_pipeline(recipe.model, dtype=getattr(torch, recipe.dtype), device="cpu")
        check_fits(pipe, family, recipe, device, accelerator.num_processes)
    family = family or family_of(pipe)
    family_options(recipe, family)
    examples = examples_of(recipe, pipe, family, preparing)
    with contextlib.ExitStack() as stack:
        if alone:
            stack.enter_context(encoders_alone(pipe, family, "cpu" if recipe.offload else device))
        stack.enter_context(accelerator.local_main_process_first())  # the others find it in the cache
        data = encode(examples, pipe, family, mask_min_value=recipe.mask_min_value, report=preparing)
        sampler = monitor.Sampler(recipe, pipe, family) if recipe.sample_every else None
    denoiser, scheduler = family.denoiser_of(pipe), family.training_scheduler(pipe)
    if not (recipe.quantize or recipe.fsdp):
        denoiser.to(device)  # where bases are computed faster
    kept = pipe if recipe.preserve else None
    return Prepared(kept, family, denoiser, scheduler, examples, replace(data, device=device), sampler)


def _check_disk(recipe: Recipe) -> None:
    """Raise OutputError if there is no room for what training writes, by the shapes in the model's files."""
    if recipe.output is None:
        return
    try:
        weights, _ = stored_weights(recipe.model, recipe.targets)
    except QrloraError:  # loading the model says it, or can read what this cannot
        return
    check_disk(recipe, weights.shapes.values())


def first_losses(recipe: Recipe, ready: Prepared, count: int) -> Iterator[Tensor]:
    """Yield the losses of training's first `count` forward passes, differentiable, on the denoiser as it stands."""
    options, most = family_options(recipe, ready.family)[0], math.ceil(count / recipe.accumulation)
    steps = (forward_passes(recipe, ready.family, ready.scheduler, ready.data, step) for step in range(most))
    for drawn in itertools.islice(itertools.chain.from_iterable(steps), count):
        yield ready.family.loss(ready.denoiser, ready.scheduler, *drawn, **options)


def examples_of(recipe: Recipe, pipe: Any, family: ModelFamily, report: Report | None = None) -> list[Example]:
    """Return the recipe's pictures, in sizes that the model takes."""
    resolution, unit, largest = recipe.resolution or family.resolution(pipe), size_unit(pipe), family.largest_side(pipe)
    check_resolution(resolution, unit, largest)
    return load_examples(
        recipe.images,
        recipe.text,
        recipe.trigger,
        resolution,
        sizes=bucket_sizes(resolution, unit, largest) if recipe.buckets else (),
        flip=recipe.flip,
        shift=recipe.shift,
        alpha_mask=recipe.alpha_mask,
        repeats=recipe.num_repeats,
        report=report,
    )
