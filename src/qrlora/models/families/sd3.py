"""Stable Diffusion 3 and 3.5: MMDiT, flow matching, two CLIP text encoders and an optional T5.

Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv 2403.03206).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qrlora.models.families.base import JOINT_ATTENTION, Conditions, ModelFamily, encode_images, refuse_long_prompts
from qrlora.models.families.objectives import FLOW, Latents, Timesteps

T5_TOKENS = 256
"""The pipeline's own default for how much T5 reads."""


def resolution(pipe: Any) -> int:
    """Return the side in pixels of the model's square pictures: latent side times the autoencoder's reduction."""
    return pipe.transformer.config.sample_size * pipe.vae_scale_factor


def largest_side(pipe: Any) -> int:
    """Return the longest side in pixels for which the denoiser has position embeddings."""
    config = pipe.transformer.config
    return config.pos_embed_max_size * config.patch_size * pipe.vae_scale_factor


def prompt_options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Return the options that set T5's length, for `pipe(...)` and `pipe.encode_prompt(...)` alike.

    Without T5 the pipeline passes `max_sequence_length` zero embeddings in its place. They carry nothing, but the
    denoiser attends to each, so the length is set to 1, in training and in generation.

    Raises:
        DataError: there is no T5 and a prompt is longer than CLIP reads; the pipeline would truncate it silently.
    """
    if pipe.text_encoder_3 is not None:
        return {"max_sequence_length": T5_TOKENS}
    refuse_long_prompts(pipe.tokenizer, pipe.tokenizer_max_length, prompts)
    return {"max_sequence_length": 1}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Encode text to `encoder_hidden_states` (n, tokens, features) and `pooled_projections` (n, features).

    Errors: as `prompt_options`.
    """
    hidden, _, pooled, _ = pipe.encode_prompt(
        prompts,
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        **prompt_options(pipe, prompts),
    )
    return {"encoder_hidden_states": hidden, "pooled_projections": pooled}


def predict(
    denoiser: nn.Module, scheduler: Any, noisy: Latents, timesteps: Timesteps, conditions: Conditions
) -> Latents:
    """Return the velocity, as diffusers' `train_dreambooth_lora_sd3` computes it without output preconditioning, by
    which that script weights each example with σ²."""
    return denoiser(hidden_states=noisy, timestep=timesteps, return_dict=False, **conditions)[0]


SD3 = ModelFamily(
    name="sd3",
    pipeline_class="StableDiffusion3Pipeline",
    denoiser="transformer",
    # The published FLUX set in SD3's names: all attention projections of both streams, and both feed-forwards.
    targets=(*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    steps=28,
    guidance=7.0,
    resolution=resolution,
    prompt_options=prompt_options,
    encode_prompts=encode_prompts,
    encode_images=encode_images,
    predict=predict,
    objective=FLOW,
    largest_side=largest_side,
)
