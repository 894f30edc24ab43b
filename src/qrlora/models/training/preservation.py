"""Preserve the base model's predictions for other prompts while an adapter trains.

Prior preservation (Ruiz et al. 2023, "DreamBooth", section 3.3) trains on pictures that the base model made, against
noise. Here the base model's predictions while it makes them are the target: every denoiser call on the way is recorded,
with both halves of classifier-free guidance, and the adapted denoiser is trained to predict the same. So the loss is
zero until the adapter changes one of these predictions, and no encoder or second copy of the model is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from qrlora.models.families import ModelFamily
from qrlora.models.generation import generate_jobs


@dataclass(frozen=True)
class Call:
    """One call of the denoiser: its arguments, and the prediction it returned."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    prediction: Tensor

    def loss(self, denoiser: nn.Module) -> Float[Tensor, ""]:
        """Return the mean squared difference from that prediction."""
        prediction = denoiser(*self.arguments, **self.keywords)[0]
        return (prediction.float() - self.prediction.float()).pow(2).mean()


@dataclass(frozen=True)
class Preservation:
    """Calls of the base model's denoiser that an adapter should leave as they are."""

    calls: Sequence[Call]

    def draw(self, generator: Generator) -> Call:
        """Return a random call."""
        return self.calls[int(torch.randint(len(self.calls), (1,), generator=generator))]


def record(pipe: Any, family: ModelFamily, prompts: Sequence[str], seed: int, batch_size: int) -> Preservation:
    """Make one picture of each prompt with the base model, and keep every call of its denoiser.

    Args:
        pipe: a pipeline of `family`, without adapters or with one that does nothing yet.
        prompts: of pictures that the adapter should not change, best of things similar to the one it learns.
        seed: of the first picture; the others count on from it.
        batch_size: rows of a call; guidance makes two of each prompt.
    """
    calls: list[Call] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        calls.append(Call(arguments, keywords, output[0].detach()))

    handle = family.denoiser_of(pipe).register_forward_hook(keep, with_kwargs=True)
    try:
        jobs = [(prompt, seed + i) for i, prompt in enumerate(prompts)]
        generate_jobs(pipe, family, jobs, batch_size=max(1, batch_size // 2))
    finally:
        handle.remove()
    return Preservation(calls)
