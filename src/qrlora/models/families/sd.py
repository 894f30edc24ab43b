"""Stable Diffusion 1.x and 2.x: UNet, epsilon or v-prediction, one CLIP text encoder.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qrlora.models.families.base import Conditions, ModelFamily, encode_images
from qrlora.models.families.objectives import NOISE, Latents, Timesteps
from qrlora.models.families.sdxl import SDXL, prompt_options


def resolution(pipe: Any) -> int:
    """Return the side in pixels of the model's square pictures: latent side times the autoencoder's reduction."""
    return pipe.unet.config.sample_size * pipe.vae_scale_factor


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Encode text to `encoder_hidden_states` (n, tokens, features)."""
    prompt_options(pipe, prompts)
    hidden, _ = pipe.encode_prompt(prompts, pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": hidden}


def predict(
    denoiser: nn.Module, scheduler: Any, noisy: Latents, timesteps: Timesteps, conditions: Conditions
) -> Latents:
    """Return noise or v, as diffusers' `train_text_to_image_lora` computes it."""
    return denoiser(noisy, timesteps, return_dict=False, **conditions)[0]


SD = ModelFamily(
    name="sd",
    pipeline_class="StableDiffusionPipeline",
    denoiser="unet",
    targets=SDXL.targets,
    steps=50,
    guidance=7.5,
    resolution=resolution,
    prompt_options=prompt_options,
    encode_prompts=encode_prompts,
    encode_images=encode_images,
    predict=predict,
    objective=NOISE,
)
