"""The optimisers a recipe can name: torch's AdamW, and three from packages of their own.

adamw          Loshchilov & Hutter 2019 (arXiv 1711.05101)
adamw8bit      its two moments in 8 bits, block by block (Dettmers et al. 2022, arXiv 2110.02861)
prodigy        AdamW that finds its own step size (Mishchenko & Defazio 2024, arXiv 2306.06101)
schedulefree   AdamW whose weights are an average over the run (Defazio et al. 2024, arXiv 2405.15682)
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from qrlora.errors import RecipeError
from qrlora.models.training.recipe import Recipe

STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 8 / 256, "prodigy": 12.0, "schedulefree": 8.0}
"""Bytes that each keeps for a number it trains, which starts at zero (8 bits share a scale among 256)."""
PACKAGES = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "schedulefree": "schedulefree"}


def optimizer_for(recipe: Recipe, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the recipe's optimiser on these parameters, ready to train.

    Raises:
        RecipeError: its package is not installed.
    """
    common: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **common)
    package = needed(f"optimizer = {recipe.optimizer!r}", PACKAGES[recipe.optimizer])
    if recipe.optimizer == "adamw8bit":
        return package.optim.AdamW8bit(parameters, **common)
    if recipe.optimizer == "prodigy":
        with contextlib.redirect_stdout(io.StringIO()):  # it announces its kind of weight decay
            # The short steps of a warm-up must not raise the estimate; where there is none, this would only slow it.
            return package.Prodigy(parameters, safeguard_warmup=recipe.warmup_steps > 0, **common)
    optimizer = package.AdamWScheduleFree(parameters, **common)
    optimizer.train()
    return optimizer


def needed(field: str, package: str) -> Any:
    """Import the optional package that a recipe's field needs.

    Raises:
        RecipeError: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RecipeError(
            f"{field} needs a package that cannot be imported",
            expected=package,
            got=error,
            remedy=f"pip install {package}",
        ) from error


@contextlib.contextmanager
def evaluated(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the context the parameters have the values of the adapter; after it the training values, bit for bit.

    They differ for schedule-free AdamW alone, whose gradients are taken at another point than the average that it
    returns.
    """
    modes: Any = optimizer
    if not hasattr(modes, "eval"):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    training = [parameter.detach().clone() for parameter in parameters]
    modes.eval()
    try:
        yield
    finally:
        modes.train()
        for parameter, value in zip(parameters, training, strict=True):
            parameter.data.copy_(value)  # the way back by interpolation is exact to rounding only
