"""Stable Diffusion XL: UNet, epsilon or v-prediction, two CLIP text encoders, conditioned on the picture's size.

Source: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (arXiv 2307.01952).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from qrlora.families.base import Conditions, ModelFamily, encode_images, refuse_long_prompts

REDUCTION = 8
"""Pixels of a picture's side to one of its latents, for every SDXL autoencoder."""


def resolution(pipe: Any) -> int:
    """Side in pixels of the model's square pictures: latent side times the autoencoder's reduction."""
    return pipe.default_sample_size * pipe.vae_scale_factor


def prompt_options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Nothing: the pipeline's defaults are what training does. Raises DataError for a prompt that CLIP would cut."""
    refuse_long_prompts(pipe.tokenizer, pipe.tokenizer.model_max_length, prompts)
    return {}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Text to `encoder_hidden_states` (n, tokens, features) and `text_embeds` (n, features)."""
    prompt_options(pipe, prompts)
    hidden, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": hidden, "text_embeds": pooled}


def sample_timesteps(scheduler: Any, n: int, generator: Generator) -> Float[Tensor, " n"]:
    """Whole timesteps, each as likely."""
    return torch.randint(scheduler.config.num_train_timesteps, (n,), generator=generator).float()


def loss(
    denoiser: nn.Module,
    scheduler: Any,
    latents: Float[Tensor, "n c h w"],
    noise: Float[Tensor, "n c h w"],
    timesteps: Float[Tensor, " n"],
    conditions: Conditions,
    min_snr_gamma: float | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error of what the scheduler says is predicted, as in diffusers' `train_text_to_image_lora_sdxl`.

    min_snr_gamma: weight each example with min(SNR, γ) / SNR for epsilon, / (SNR + 1) for v (Hang et al. 2023,
        arXiv 2303.09556). The picture's size is told as original and target size, uncropped.
    """
    steps = timesteps.long()
    noisy = scheduler.add_noise(latents, noise, steps)
    dtype = next(denoiser.parameters()).dtype
    size = [side * REDUCTION for side in latents.shape[-2:]]
    sizes = torch.tensor([[*size, 0, 0, *size]], dtype=dtype, device=latents.device).expand(len(latents), -1)
    predicted = denoiser(
        noisy.to(dtype),
        timesteps,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": conditions["text_embeds"], "time_ids": sizes},
        return_dict=False,
    )[0]
    by_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, steps) if by_velocity else noise
    each = (predicted.float() - target).pow(2).mean((1, 2, 3))
    return (
        each.mean() if min_snr_gamma is None else (each * _weight(scheduler, steps, min_snr_gamma, by_velocity)).mean()
    )


def _weight(scheduler: Any, steps: Tensor, gamma: float, by_velocity: bool) -> Float[Tensor, " n"]:
    kept = scheduler.alphas_cumprod.to(steps.device)[steps]
    snr = kept / (1 - kept)
    return snr.clamp(max=gamma) / (snr + by_velocity)


SDXL = ModelFamily(
    name="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    denoiser="unet",
    targets=("to_q", "to_k", "to_v", "to_out.0"),  # the published set: all attention projections
    steps=30,
    guidance=5.0,
    resolution=resolution,
    prompt_options=prompt_options,
    encode_prompts=encode_prompts,
    encode_images=encode_images,
    sample_timesteps=sample_timesteps,
    loss=loss,
    scheduler="DDPMScheduler",
    loss_options=frozenset({"min_snr_gamma"}),
)
