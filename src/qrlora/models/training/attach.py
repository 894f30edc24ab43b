"""Put a fresh adapter of the recipe's method on a denoiser for the time of a run."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftConfig
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from qrlora.errors import RecipeError
from qrlora.method.adapter import remove_adapters
from qrlora.method.tuner import QRLoraConfig
from qrlora.models.families import ModelFamily
from qrlora.models.training import space
from qrlora.models.training.recipe import Recipe

ADAPTER_NAME = "trained"


def peft_config(recipe: Recipe, family: ModelFamily) -> PeftConfig:
    """Return PEFT's configuration of the recipe's method."""
    targets = family.targets if recipe.targets is None else recipe.targets
    common: dict[str, Any] = {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha,
        "target_modules": targets if isinstance(targets, str) else list(targets),
    }
    if recipe.method == "lora":
        return LoraConfig(init_lora_weights="gaussian", **common)
    return QRLoraConfig(
        triangular=recipe.triangular,
        columns=recipe.columns if isinstance(recipe.columns, str) else list(recipe.columns),
        basis_rank=recipe.basis_rank,
        train_basis=recipe.train_basis,
        **common,
    )


@contextlib.contextmanager
def adapter_on(
    denoiser: Any,
    family: ModelFamily,
    recipe: Recipe,
    accelerator: Accelerator | None = None,
    config: PeftConfig | None = None,
) -> Iterator[dict[str, nn.Parameter]]:
    """Attach a fresh adapter to the frozen denoiser; yield its trained parameters, in float32, by name; remove it.

    config: replaces that of the recipe's method.
    """
    denoiser.requires_grad_(False)
    config = config or peft_config(recipe, family)
    checkpointing = denoiser.is_gradient_checkpointing
    if recipe.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    try:
        # The first process computes the bases, the others find them in the cache.
        first = accelerator.local_main_process_first() if accelerator else contextlib.nullcontext()
        with first, torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            try:
                denoiser.add_adapter(config, adapter_name=ADAPTER_NAME)
            except (NoMatchingPeftModuleError, re.error) as error:  # plain LoRA's own way of saying it
                raise RecipeError(
                    "targets match no layer of the denoiser",
                    expected="module names such as to_q,to_k, or one regular expression for whole names",
                    got=f"{recipe.targets!r} ({error})",
                    remedy="leave targets out to adapt what the family adapts by default",
                ) from error
        space.place(denoiser, recipe, ADAPTER_NAME)
        parameters = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        for parameter in parameters.values():
            parameter.data = parameter.data.float()
        yield parameters
    finally:
        remove_adapters(denoiser, [ADAPTER_NAME])
        if not checkpointing:
            denoiser.disable_gradient_checkpointing()
