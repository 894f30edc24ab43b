"""Examples, noise and timesteps of each training step, as functions of the seed and the step.

Nothing random has a state. Step n draws from generators seeded by (seed, n) or (seed, epoch), so a run resumed at any
step sees what the uninterrupted run would have seen, and so do several processes that each take a share of every step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qrlora.errors import RecipeError
from qrlora.models.families import ModelFamily
from qrlora.models.training.dataset import EncodedDataset
from qrlora.models.training.recipe import Recipe

Batch = tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor | None]
"""Latents, noise, timesteps, conditions and mask of one forward pass."""


def family_options(recipe: Recipe, family: ModelFamily) -> tuple[dict[str, float], dict[str, float]]:
    """Return the recipe's fields that the family's loss takes, and those that its sampling of timesteps takes.

    Raises RecipeError for a field that is set and has no meaning for this family.
    """
    given = {n: getattr(recipe, n) for n in ("logit_mean", "logit_std", "min_snr_gamma")}
    given = {name: value for name, value in given.items() if value is not None}
    taken = family.objective.loss_options, family.objective.timestep_options
    known = taken[0] | taken[1]
    if unknown := sorted(given.keys() - known):
        raise RecipeError(
            f"the family {family.name} has no {unknown[0]}",
            expected=f"of such fields only {', '.join(sorted(known))}",
            got=f"{unknown[0]} = {given[unknown[0]]}",
            remedy="leave it out of the recipe",
        )
    loss, timesteps = ({n: given[n] for n in given if n in o} for o in taken)
    return loss, timesteps


def forward_passes(
    recipe: Recipe, family: ModelFamily, scheduler: Any, data: EncodedDataset, step: int
) -> Iterator[Batch]:
    """Yield the inputs of every forward pass of a step, counted from 0."""
    generator = torch.Generator().manual_seed(mix(recipe.seed, step))
    options, buckets = family_options(recipe, family)[1], data.buckets
    for micro in range(recipe.accumulation):
        number = step * recipe.accumulation + micro
        examples = data.epoch[order(recipe.seed, buckets, recipe.batch_size, number)]
        latents, conditions = data.batch(examples)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = family.objective.timesteps(scheduler, len(latents), generator, **options)
        yield latents, noise.to(data.device), timesteps.to(data.device), conditions, data.mask(examples)


def order(seed: int, buckets: Sequence[Hashable], size: int, number: int) -> Int[Tensor, " size"]:
    """Return the entries of batch ``number`` (from 0), all of one bucket. A function of its arguments alone.

    Every epoch goes through all entries once, in an order of its own. A batch is made when a bucket has ``size`` of
    them waiting; those that wait at the end of an epoch are the first of their bucket's next batch. So no batch is
    smaller than the others, no entry is left out, and with one bucket the batches are the epochs, cut into equal parts.

    Args:
        seed: of the orders.
        buckets: the bucket of each entry.
    """
    counts = Counter(buckets)

    def made(epochs: int) -> int:
        return sum(epochs * count // size for count in counts.values())

    def shuffled(epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix(seed, -1 - epoch))
        return torch.randperm(len(buckets), generator=generator).tolist()

    epoch = number * size // len(buckets)  # not yet too late; some wait, so perhaps too early
    while made(epoch + 1) <= number:
        epoch += 1
    waiting = Counter({bucket: epoch * count % size for bucket, count in counts.items()})
    left, passed = number - made(epoch), list[int]()
    for entry in shuffled(epoch):
        passed.append(entry)
        waiting[buckets[entry]] += 1
        if waiting[buckets[entry]] == size:
            waiting[buckets[entry]], left = 0, left - 1
            if left < 0:
                break
    bucket = buckets[passed[-1]]
    batch = [entry for entry in passed if buckets[entry] == bucket]
    while len(batch) < size:
        epoch -= 1
        batch = [entry for entry in shuffled(epoch) if buckets[entry] == bucket] + batch
    return torch.tensor(batch[-size:])


def mix(seed: int, counter: int) -> int:
    """Return one generator seed from two numbers, far apart for neighbours (the finaliser of splitmix64)."""
    z = (seed * 0x9E3779B97F4A7C15 + counter * 0xD1B54A32D192ED03) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & (2**63 - 1)
