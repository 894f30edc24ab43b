"""Inputs of merges that need more than ΔW: base model, training data of each adapter, activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.errors import MismatchError
from qrlora.lab.baselines.deltas import Delta, Learned, applied, base_weights
from qrlora.models.families import ModelFamily
from qrlora.models.training.batches import family_options
from qrlora.models.training.dataset import EncodedDataset, encode
from qrlora.models.training.prepare import examples_of
from qrlora.models.training.recipe import Recipe

Call = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]
"""Latents, noise, timesteps and conditions of one forward pass."""
Moments = dict[str, Float[Tensor, "in in"]]
"""Layer -> mean of x xᵀ over the inputs x that it gets, float64."""


@dataclass(frozen=True)
class Context:
    """The base model and the recipes that trained the parts, in the order of the parts.

    Attributes:
        pipe, family: the base model, nothing attached or merged.
        recipes: their pictures, captions and noise levels are what inputs are drawn from.
        seed: of everything drawn.
        batch_size: rows of a forward pass.
        passes: forward passes for each part, for those that look at activations.
    """

    pipe: Any = None
    family: ModelFamily | None = None
    recipes: Sequence[Recipe] = ()
    seed: int = 0
    batch_size: int = 4
    passes: int = 4

    @property
    def denoiser(self) -> Any:
        """The denoiser of the base model."""
        return self._family.denoiser_of(self.pipe)

    @property
    def _family(self) -> ModelFamily:
        if self.family is None or self.pipe is None or not self.recipes:
            got = "no base model" if self.pipe is None else f"{len(self.recipes)} recipes"
            raise MismatchError(
                "this merge runs the base model on what the adapters were trained on",
                expected="a context with pipe, family and one recipe for each part",
                got=got,
                remedy="Context(pipe, family, recipes)",
            )
        return self.family

    @cached_property
    def _tasks(self) -> tuple[EncodedDataset, ...]:
        family = self._family
        return tuple(encode(examples_of(r, self.pipe, family), self.pipe, family) for r in self.recipes)

    @cached_property
    def _scheduler(self) -> Any:
        return self._family.training_scheduler(self.pipe)

    def check(self, parts: Sequence[Learned]) -> None:
        """Raise MismatchError unless there is a base model, and a recipe for each part."""
        self._family  # noqa: B018  raises the error that says what is missing
        if len(self.recipes) != len(parts):
            raise MismatchError(
                "parts and recipes differ in number", expected=f"{len(parts)} recipes", got=len(self.recipes)
            )

    def call(self, part: int, number: int) -> Call:
        """Inputs drawn from what a part was trained on; another number, another draw."""
        recipe, task = self.recipes[part], self._tasks[part]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + part) * 1_000_003 + number)
        rows = torch.randint(len(task), (self.batch_size,), generator=generator)
        latents, conditions = task.batch(rows)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        options = family_options(recipe, self._family)[1]
        timesteps = self._family.objective.timesteps(self._scheduler, len(latents), generator, **options)
        return latents, noise, timesteps.to(latents.device), conditions

    def run(self, call: Call) -> Tensor:
        """Run the denoiser on these inputs, with whatever is attached to it."""
        found: list[Tensor] = []
        hook = self.denoiser.register_forward_hook(lambda *seen: found.append(seen[2][0]))
        try:
            self._family.loss(self.denoiser, self._scheduler, *call)
        finally:
            hook.remove()
        return found[-1]

    def loss(self, call: Call) -> float:
        """The training loss of the denoiser on these inputs, as it stands."""
        return float(self._family.loss(self.denoiser, self._scheduler, *call))

    @torch.no_grad()
    def moments(self, part: int, learned: Learned) -> Moments:
        """E x xᵀ of the inputs of every layer of `learned`, while it is applied, on what this part was trained on."""
        sums: Moments = {}
        count = dict.fromkeys(learned, 0)

        def note(name: str, inputs: Tensor) -> None:
            x = inputs.detach().reshape(-1, inputs.shape[-1]).double()
            sums[name] = sums.get(name, 0) + x.T @ x
            count[name] += len(x)

        with applied(self.denoiser, learned), _listening(self.denoiser, learned, note):
            for number in range(self.passes):
                self.run(self.call(part, number))
        return {name: total.cpu() / count[name] for name, total in sums.items()}


@contextlib.contextmanager
def _listening(denoiser: nn.Module, learned: Learned, note: Any) -> Iterator[None]:
    """Call note(layer, its input) whenever one of these layers is called."""
    hooks = []
    try:
        for name, module in linear_layers(denoiser, learned).items():
            hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0])))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linear_layers(denoiser: nn.Module, learned: dict[str, Delta]) -> dict[str, nn.Linear]:
    """The layers of a ΔW. Raises MismatchError if one is missing or no Linear, whose inputs are no rows of numbers."""
    base_weights(denoiser, list(learned))
    modules = {name: denoiser.get_submodule(name) for name in learned}
    if other := [name for name, module in modules.items() if not isinstance(module, nn.Linear)]:
        raise MismatchError("only linear layers can be merged so", expected="nn.Linear", got=", ".join(other[:3]))
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
