"""Stable Diffusion XL: UNet, epsilon or v-prediction, two CLIP text encoders, conditioned on the picture's size.

Source: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (arXiv 2307.01952).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qrlora.models.families.base import ATTENTION, Conditions, ModelFamily, encode_images, refuse_long_prompts
from qrlora.models.families.objectives import NOISE, Latents, Timesteps

REDUCTION = 8
"""Pixels of a picture's side to one of its latents, for every SDXL autoencoder."""


def resolution(pipe: Any) -> int:
    """Return the side in pixels of the model's square pictures: latent side times the autoencoder's reduction."""
    return pipe.default_sample_size * pipe.vae_scale_factor


def prompt_options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Return no options: training uses the pipeline's defaults. Raises DataError for a prompt that CLIP would cut."""
    refuse_long_prompts(pipe.tokenizer, pipe.tokenizer.model_max_length, prompts)
    return {}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Encode text to `encoder_hidden_states` (n, tokens, features) and `text_embeds` (n, features)."""
    prompt_options(pipe, prompts)
    hidden, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": hidden, "text_embeds": pooled}


def predict(
    denoiser: nn.Module, scheduler: Any, noisy: Latents, timesteps: Timesteps, conditions: Conditions
) -> Latents:
    """Return noise or v, as diffusers' `train_text_to_image_lora_sdxl` computes it.

    The picture's size is given as original and target size, uncropped.
    """
    size = [side * REDUCTION for side in noisy.shape[-2:]]
    sizes = noisy.new_tensor([[*size, 0, 0, *size]]).expand(len(noisy), -1)
    return denoiser(
        noisy,
        timesteps,
        encoder_hidden_states=conditions["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": conditions["text_embeds"], "time_ids": sizes},
        return_dict=False,
    )[0]


SDXL = ModelFamily(
    name="sdxl",
    pipeline_class="StableDiffusionXLPipeline",
    denoiser="unet",
    targets=ATTENTION,  # the published set: all attention projections
    steps=30,
    guidance=5.0,
    resolution=resolution,
    prompt_options=prompt_options,
    encode_prompts=encode_prompts,
    encode_images=encode_images,
    predict=predict,
    objective=NOISE,
)
