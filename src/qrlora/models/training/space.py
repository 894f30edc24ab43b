"""Place a fresh adapter in the recipe's space before the loop, and print how new its pictures are for that space."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from qrlora._tensor_file import note
from qrlora.method.space import load_space, place_adapter, unexplained
from qrlora.models.training.recipe import Recipe

PASSES = 6


def place(denoiser: Any, recipe: Recipe, adapter_name: str) -> None:
    """Make a fresh adapter on the denoiser a point of the recipe's space, if it has one."""
    if recipe.space is None:
        return
    place_adapter(
        denoiser,
        adapter_name,
        load_space(recipe.space),
        role=recipe.role,
        base_model=recipe.model,
        remainder=recipe.space_remainder,
        name=recipe.space.name,
    )


def say_novelty(recipe: Recipe, denoiser: Any, losses: Callable[[int], Iterator[Tensor]]) -> None:
    """Print the share of the pictures' first gradient that lies in the recipe's space, from a few passes."""
    reached = 1 - unexplained(denoiser, lambda: losses(PASSES))
    note(
        f"{recipe.space}: its coefficients reach {reached:.2%} of the pictures' first gradient; the less, the newer is "
        "what the pictures show (docs/space.md has examples)"
    )
