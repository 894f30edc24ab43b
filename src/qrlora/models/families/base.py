"""Facts and functions of one architecture: a row of the family table.

A family is facts and small functions, never a loop: the trainer and the generator are written once and ask the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor, nn

from qrlora._said import said
from qrlora.errors import DataError
from qrlora.models.families.objectives import Latents, Mask, Objective, Timesteps

Conditions = Mapping[str, Tensor]
"""Keyword arguments of the denoiser besides latents and timesteps, one row per example."""
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention projections as diffusers names them; of both streams in an MMDiT."""


@dataclass(frozen=True)
class ModelFamily:
    """One supported architecture.

    Attributes:
        name: how recipes, adapter files and error messages call it.
        pipeline_class: name of the diffusers pipeline class this row describes.
        denoiser: attribute of the pipeline that holds the model being adapted.
        targets: module names adapted by default (the published set), matched as PEFT matches `target_modules`.
        steps, guidance: denoising steps and guidance scale when the caller names none (see `sampling`).
        resolution: `pipe -> int`, the side in pixels of the square pictures the model was made for.
        prompt_options: `(pipe, prompts) -> dict`, checks the prompts and returns the keyword arguments that every call
            of the pipeline on them needs, so that training and generation condition alike.
        encode_prompts: `(pipe, prompts) -> Conditions`, tensors with one row per prompt.
        blank_conditions: the same for a pipeline without weights (`load_structure`): right in shape, and masks right in
            value, on the CPU. Only needed where the encoders look at values as they go.
        encode_images: `(pipe, images) -> latents`, images `(n, 3, height, width)` float32 in [-1, 1], latents
            `(n, channels, height', width')` in the scale the denoiser works in.
        predict: `(denoiser, scheduler, noisy, timesteps, conditions) -> prediction`, the denoiser's call as training
            makes it; noisy latents and prediction `(n, channels, height', width')`, in the denoiser's dtype.
        objective: the target of the prediction, and the noise levels.
        largest_side: `pipe -> int`, the longest side in pixels of the pictures it takes, or None if it has no limit.
        few_steps: `pipe -> (steps, guidance)` if its denoiser is distilled to a few steps, else None.
        guidance_argument: the pipeline's name for the scale of classifier-free guidance.
    """

    name: str
    pipeline_class: str
    denoiser: str
    targets: tuple[str, ...]
    steps: int
    guidance: float
    resolution: Callable[[Any], int]
    prompt_options: Callable[[Any, list[str]], dict[str, Any]]
    encode_prompts: Callable[[Any, list[str]], dict[str, Tensor]]
    encode_images: Callable[[Any, Float[Tensor, "n 3 height width"]], Float[Tensor, "n c h w"]]
    predict: Callable[[nn.Module, Any, Latents, Timesteps, Conditions], Latents]
    objective: Objective
    largest_side: Callable[[Any], int | None] = lambda pipe: None
    few_steps: Callable[[Any], tuple[int, float] | None] = lambda pipe: None
    blank_conditions: Callable[[Any, list[str]], dict[str, Tensor]] | None = None
    guidance_argument: str = "guidance_scale"

    @property
    def export_prefix(self) -> str:
        """Return the prefix that diffusers puts before the denoiser's module names in a LoRA file."""
        return f"{self.denoiser}."

    def denoiser_of(self, pipe: Any) -> nn.Module:
        """Return the model inside `pipe` that adapters attach to."""
        return getattr(pipe, self.denoiser)

    def sampling(self, pipe: Any) -> tuple[int, float]:
        """Return denoising steps and guidance scale of `pipe` when the caller names none."""
        return self.few_steps(pipe) or (self.steps, self.guidance)

    def training_scheduler(self, pipe: Any) -> Any:
        """Return a scheduler in its training state; generating leaves the pipeline's own at a few inference steps."""
        kind = getattr(diffusers, self.objective.scheduler) if self.objective.scheduler else type(pipe.scheduler)
        return kind.from_config(pipe.scheduler.config)

    def loss(
        self,
        denoiser: nn.Module,
        scheduler: Any,
        latents: Latents,
        noise: Latents,
        timesteps: Timesteps,
        conditions: Conditions,
        mask: Mask | None = None,
        /,
        **options: float,
    ) -> Float[Tensor, ""]:
        """Return the training loss of a batch, float32.

        Args:
            scheduler: of `training_scheduler`.
            mask: weights of the places of each example, see `objectives`.
            options: some of `objective.loss_options`.
        """
        dtype = next(denoiser.parameters()).dtype

        def predict(noisy: Latents) -> Latents:
            return self.predict(denoiser, scheduler, noisy.to(dtype), timesteps, conditions)

        return self.objective.loss(predict, scheduler, latents, noise, timesteps, mask, **options)


def size_unit(pipe: Any) -> int:
    """Return the unit of a picture's sides in pixels: the autoencoder's reduction times 2, the side of the
    transformers' patches. The UNets could do with half of it."""
    return 2 * pipe.vae_scale_factor


def refuse_long_prompts(
    tokenizer: Any, limit: int, prompts: Sequence[str], template: Callable[[str], str] = str
) -> None:
    """Raises DataError if a prompt has more tokens than `limit`: the pipeline would truncate it silently.

    template: what the pipeline makes of a prompt before it is tokenised.
    """
    for prompt in prompts:
        tokens = len(tokenizer(template(prompt)).input_ids)
        if tokens > limit:
            raise DataError(
                said("prompt too long for this model: %(prompt)s", prompt=repr(prompt)),
                expected=said("at most %(limit)s tokens, with what the model puts before and after it", limit=limit),
                got=said("%(tokens)s tokens", tokens=tokens),
                remedy="shorten the prompt or caption",
            )


def chat(tokenizer: Any, thinking: bool) -> Callable[[str], str]:
    """Return how the pipelines with a Qwen3 text encoder wrap a prompt: as a user's message, answer pending."""

    def template(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
        return tokenizer.apply_chat_template(messages, **options)

    return template


@torch.no_grad()
def encode_images(pipe: Any, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
    """Encode pictures in [-1, 1] to latents in the denoiser's scale, `(z - shift) * scaling`.

    The mean of the autoencoder's distribution is taken, not a sample, so cached latents depend on the picture alone.
    """
    vae = pipe.vae
    encoded = vae.encode(images.to(device=vae.device, dtype=vae.dtype))
    # AutoencoderKL draws, AutoencoderDC and AutoencoderTiny do not: each of the three has its own name for the result
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor
