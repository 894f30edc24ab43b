"""FLUX.2-klein, base and distilled: MMDiT with fused single blocks, flow matching on packed latents, Qwen3.

Source: Black Forest Labs, FLUX.2 [klein] (2026), as diffusers implements it. Its makers train on the base models.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.models.families.base import JOINT_ATTENTION, Conditions, ModelFamily, chat, refuse_long_prompts
from qrlora.models.families.flux import resolution
from qrlora.models.families.objectives import FLOW, Latents, Timesteps

TOKENS = 512
"""The pipeline's own default for how much of a prompt is read, and the number every prompt is padded to."""


def prompt_options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Return the token limit, for `pipe(...)` and `pipe.encode_prompt(...)`. Raises DataError for a longer prompt."""
    refuse_long_prompts(pipe.tokenizer, TOKENS, prompts, chat(pipe.tokenizer, thinking=False))
    return {"max_sequence_length": TOKENS}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Encode text to `encoder_hidden_states` (n, 512, 3 features): three layers of the text encoder, padding included.

    They are the layers that the pipeline reads. The example script reads others by default (10, 20, 30 for 9, 18, 27):
    an adapter trained on those would see other embeddings in training than in use.
    """
    return {"encoder_hidden_states": pipe.encode_prompt(prompts, **prompt_options(pipe, prompts))[0]}


def blank_conditions(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Return what `encode_prompts` does, in shape alone."""
    prompt_options(pipe, prompts)
    denoiser = pipe.transformer
    size = (len(prompts), TOKENS, denoiser.config.joint_attention_dim)
    return {"encoder_hidden_states": torch.empty(size, dtype=denoiser.dtype, device="meta")}


@torch.no_grad()
def encode_images(pipe: Any, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
    """Encode pictures in [-1, 1] to latents in the denoiser's scale: patches of 2 x 2, normalised by the autoencoder's
    own running mean and variance."""
    vae = pipe.vae
    mean = vae.encode(images.to(device=vae.device, dtype=vae.dtype)).latent_dist.mode().float()
    centre, variance = (x.float().view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    patches = diffusers.Flux2KleinPipeline._patchify_latents(mean)
    return (patches - centre) / torch.sqrt(variance + vae.config.batch_norm_eps)


def few_steps(pipe: Any) -> tuple[int, float] | None:
    """Return steps and guidance of the distilled models, as their cards give them."""
    return (4, 1.0) if pipe.config.is_distilled else None


def predict(
    denoiser: nn.Module, scheduler: Any, noisy: Latents, timesteps: Timesteps, conditions: Conditions
) -> Latents:
    """Return the velocity of packed latents, as diffusers' `train_dreambooth_lora_flux2_klein`, without guidance."""
    packed = denoiser(
        hidden_states=diffusers.Flux2KleinPipeline._pack_latents(noisy),
        timestep=timesteps / scheduler.config.num_train_timesteps,
        guidance=None,
        img_ids=diffusers.Flux2KleinPipeline._prepare_latent_ids(noisy).to(noisy.device),
        txt_ids=diffusers.Flux2KleinPipeline._prepare_text_ids(conditions["encoder_hidden_states"]).to(noisy.device),
        return_dict=False,
        **conditions,
    )[0]
    return packed.transpose(1, 2).reshape(noisy.shape)


FLUX2_KLEIN = ModelFamily(
    name="flux2-klein",
    pipeline_class="Flux2KleinPipeline",
    denoiser="transformer",
    # The published FLUX.1 set in FLUX.2's names. The single blocks' q, k and v are one matrix with the way into their
    # MLP; as published, the way out of them (to_out, there a plain layer) is left alone.
    targets=(
        *JOINT_ATTENTION,
        "ff.linear_in",
        "ff.linear_out",
        "ff_context.linear_in",
        "ff_context.linear_out",
        "to_qkv_mlp_proj",
    ),
    steps=50,
    guidance=4.0,
    resolution=resolution,
    prompt_options=prompt_options,
    encode_prompts=encode_prompts,
    encode_images=encode_images,
    predict=predict,
    objective=FLOW,
    few_steps=few_steps,
    blank_conditions=blank_conditions,
)
