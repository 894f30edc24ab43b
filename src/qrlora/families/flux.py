"""FLUX.1 dev and schnell: MMDiT with single blocks, flow matching on packed latents, CLIP (pooled) and T5.

Source: Black Forest Labs, FLUX.1 (2024), as diffusers implements it; recipe of the published QR-LoRA (arXiv 2507.04599,
section 4.1): rank 64, learning rate 1e-4, 1000 steps, 512 pixels, guidance 1 in training.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FluxPipeline
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.families.base import Conditions, ModelFamily, encode_images, refuse_long_prompts
from qrlora.families.sd3 import SD3, sample_timesteps

T5_TOKENS = 512
"""The pipeline's own default for how much T5 reads."""
TRAINING_GUIDANCE = 1.0
"""What the dev model, distilled with guidance as an input, is told in training."""


def resolution(pipe: Any) -> int:
    """Side in pixels of the pictures the pipeline makes by default."""
    return pipe.default_sample_size * pipe.vae_scale_factor


def prompt_options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """How much T5 reads, for `pipe(...)` and `pipe.encode_prompt(...)` alike.

    Raises:
        DataError: a prompt is longer than that. CLIP reads its beginning only, which is how the model was trained.
    """
    refuse_long_prompts(pipe.tokenizer_2, T5_TOKENS, prompts)
    return {"max_sequence_length": T5_TOKENS}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Text to `encoder_hidden_states` (n, tokens, features) and `pooled_projections` (n, features)."""
    hidden, pooled, _ = pipe.encode_prompt(prompts, prompt_2=None, **prompt_options(pipe, prompts))
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def loss(
    denoiser: nn.Module,
    scheduler: Any,
    latents: Float[Tensor, "n c h w"],
    noise: Float[Tensor, "n c h w"],
    timesteps: Float[Tensor, " n"],
    conditions: Conditions,
) -> Float[Tensor, ""]:
    """Conditional flow matching as in `sd3.loss`, on packed latents (diffusers' `train_dreambooth_lora_flux`).

    Packing only rearranges, so the mean over packed elements is the mean over latents.
    """
    sigma = (timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    n, channels, height, width = latents.shape
    dtype, device = next(denoiser.parameters()).dtype, latents.device
    noisy, target = (
        FluxPipeline._pack_latents(x, n, channels, height, width)
        for x in ((1 - sigma) * latents + sigma * noise, noise - latents)
    )
    places = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, device, dtype)
    words = torch.zeros(conditions["encoder_hidden_states"].shape[1], 3, device=device, dtype=dtype)
    config: Any = denoiser.config
    guidance = torch.full((n,), TRAINING_GUIDANCE, device=device) if config.guidance_embeds else None
    velocity = denoiser(
        hidden_states=noisy.to(dtype),
        timestep=timesteps / scheduler.config.num_train_timesteps,
        guidance=guidance,
        img_ids=places,
        txt_ids=words,
        return_dict=False,
        **conditions,
    )[0]
    return (velocity.float() - target).pow(2).mean()


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
    sample_timesteps=sample_timesteps,
    loss=loss,
    timestep_options=SD3.timestep_options,
)
