"""Inputs of merges that need more than ΔW: the base model and the training data of each adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from qrlora.errors import MismatchError
from qrlora.lab.baselines.deltas import Delta, base_weights
from qrlora.models.families import ModelFamily
from qrlora.models.training.batches import family_options
from qrlora.models.training.dataset import EncodedDataset, encode
from qrlora.models.training.prepare import examples_of
from qrlora.models.training.recipe import Recipe

Call = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""Latents, noise, timesteps and conditions of one forward pass."""


@dataclass(frozen=True)
class Context:
    """The base model and the recipes that trained the parts, in the order of the parts.

    Attributes:
        pipe, family: the base model, nothing attached or merged.
        recipes: their pictures, captions and noise levels are what inputs are drawn from.
        seed: of everything drawn.
        batch_size: rows of a forward pass.
    """

    pipe: Any
    family: ModelFamily
    recipes: Sequence[Recipe]
    seed: int = 0
    batch_size: int = 4

    @property
    def denoiser(self) -> Any:
        """The denoiser of the base model."""
        return self.family.denoiser_of(self.pipe)

    @cached_property
    def _tasks(self) -> tuple[EncodedDataset, ...]:
        pipe, family = self.pipe, self.family
        return tuple(encode(examples_of(recipe, pipe, family), pipe, family) for recipe in self.recipes)

    @cached_property
    def _scheduler(self) -> Any:
        return self.family.training_scheduler(self.pipe)

    def call(self, part: int, number: int) -> Call:
        """Return random inputs of the denoiser, from what a part was trained on; every number gives other ones."""
        recipe, task = self.recipes[part], self._tasks[part]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + part) * 1_000_003 + number)
        rows = torch.randint(len(task), (self.batch_size,), generator=generator)
        latents, conditions = task.batch(rows)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        options = family_options(recipe, self.family)[1]
        timesteps = self.family.objective.timesteps(self._scheduler, len(latents), generator, **options)
        return latents, noise, timesteps.to(latents.device), conditions

    def run(self, call: Call) -> Tensor:
        """Run the denoiser on these inputs, with whatever is attached to it."""
        found: list[Tensor] = []
        hook = self.denoiser.register_forward_hook(lambda *seen: found.append(seen[2][0]))
        try:
            self.family.loss(self.denoiser, self._scheduler, *call)
        finally:
            hook.remove()
        return found[-1]

    def loss(self, call: Call) -> float:
        """The training loss of the denoiser on these inputs, as it stands."""
        return float(self.family.loss(self.denoiser, self._scheduler, *call))


def linear_layers(denoiser: nn.Module, learned: dict[str, Delta]) -> dict[str, nn.Linear]:
    """The layers of a ΔW. Raises MismatchError if one is missing or no Linear, whose inputs are no rows of numbers."""
    base_weights(denoiser, list(learned))
    modules = {name: denoiser.get_submodule(name) for name in learned}
    if other := [name for name, module in modules.items() if not isinstance(module, nn.Linear)]:
        raise MismatchError("only linear layers can be merged so", expected="nn.Linear", got=", ".join(other[:3]))
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
