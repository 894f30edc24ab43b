"""FLUX.1 dev and schnell: MMDiT with single blocks, flow matching on packed latents, CLIP (pooled) and T5.

Source: Black Forest Labs, FLUX.1 (2024), as diffusers implements it; recipe of the published QR-LoRA (arXiv 2507.04599,
section 4.1): rank 64, learning rate 1e-4, 1000 steps, 512 pixels, guidance 1 in training.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from qrlora.models.families.base import Conditions, ModelFamily, encode_images, refuse_long_prompts
from qrlora.models.families.objectives import FLOW, Latents, Timesteps
from qrlora.models.families.sd3 import SD3

T5_TOKENS, T5_TOKENS_SCHNELL = 512, 256
"""Tokens that T5 reads: the pipeline's own default, and that of schnell (diffusers' page on FLUX)."""
TRAINING_GUIDANCE = 1.0
"""Guidance input of the dev model, which is distilled, in training."""


def resolution(pipe: Any) -> int:
    """Return the side in pixels of the pictures the pipeline makes by default."""
    return pipe.default_sample_size * pipe.vae_scale_factor


def prompt_options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Return the options that set T5's length, for `pipe(...)` and `pipe.encode_prompt(...)` alike.

    Raises:
        DataError: a prompt is longer than that. CLIP reads its beginning only, which is how the model was trained.
    """
    limit = T5_TOKENS if pipe.transformer.config.guidance_embeds else T5_TOKENS_SCHNELL
    refuse_long_prompts(pipe.tokenizer_2, limit, prompts)
    return {"max_sequence_length": limit}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Encode text to `encoder_hidden_states` (n, tokens, features) and `pooled_projections` (n, features)."""
    hidden, pooled, _ = pipe.encode_prompt(prompts, prompt_2=None, **prompt_options(pipe, prompts))
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def few_steps(pipe: Any) -> tuple[int, float] | None:
    """Return steps and guidance of schnell, which is distilled to a few steps and has no guidance input to embed."""
    return None if pipe.transformer.config.guidance_embeds else (4, 0.0)


def predict(
    denoiser: nn.Module, scheduler: Any, noisy: Latents, timesteps: Timesteps, conditions: Conditions
) -> Latents:
    """Return the velocity of packed latents, as diffusers' `train_dreambooth_lora_flux` computes it."""
    n, channels, height, width = noisy.shape
    places = diffusers.FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, noisy.device, noisy.dtype)
    config: Any = denoiser.config
    packed = denoiser(
        hidden_states=diffusers.FluxPipeline._pack_latents(noisy, n, channels, height, width),
        timestep=timesteps / scheduler.config.num_train_timesteps,
        guidance=torch.full((n,), TRAINING_GUIDANCE, device=noisy.device) if config.guidance_embeds else None,
        img_ids=places,
        txt_ids=noisy.new_zeros(conditions["encoder_hidden_states"].shape[1], 3),
        return_dict=False,
        **conditions,
    )[0]
    return diffusers.FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


FLUX = ModelFamily(
    name="flux",
    pipeline_class="FluxPipeline",
    denoiser="transformer",
    targets=SD3.targets,  # the published set; in the single blocks it meets to_q, to_k and to_v alone
    steps=28,
    guidance=3.5,
    resolution=resolution,
    prompt_options=prompt_options,
    encode_prompts=encode_prompts,
    encode_images=encode_images,
    predict=predict,
    objective=FLOW,
    few_steps=few_steps,
)
