"""Qwen-Image: MMDiT, flow matching on packed latents, Qwen2.5-VL text encoder, an autoencoder made for video.

Source: Qwen team, "Qwen-Image Technical Report" (arXiv 2508.02324), as diffusers implements it.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad

from qrlora.models.families.base import JOINT_ATTENTION, Conditions, ModelFamily, refuse_long_prompts
from qrlora.models.families.flux import resolution
from qrlora.models.families.objectives import FLOW, Latents, Timesteps

TOKENS = 512
"""Tokens of a prompt that are read: the default of diffusers' training example, half of what the pipeline allows."""


def prompt_options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Return the token limit, and the negative prompt of the model's card, without which the pipeline uses no guidance.

    Raises:
        DataError: a prompt is longer than that.
    """
    limit = TOKENS + pipe.prompt_template_encode_start_idx  # the instruction before the prompt is cut off again
    refuse_long_prompts(pipe.tokenizer, limit, prompts, pipe.prompt_template_encode.format)
    return {"max_sequence_length": TOKENS, "negative_prompt": [" "] * len(prompts)}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Encode text to `encoder_hidden_states` (n, 512, features), zero after the last token, and their mask (n, 512).

    The pipeline pads to the longest of its prompts; rows of one length are what a dataset can stack.
    """
    prompt_options(pipe, prompts)
    hidden, mask = pipe.encode_prompt(prompts, max_sequence_length=TOKENS)
    if mask is None:  # no padding
        mask = hidden.new_ones(hidden.shape[:2], dtype=torch.long)
    missing = TOKENS - hidden.shape[1]
    return {
        "encoder_hidden_states": pad(hidden, (0, 0, 0, missing)),
        "encoder_hidden_states_mask": pad(mask, (0, missing)),
    }


def blank_conditions(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Return what `encode_prompts` does: the states in shape alone, the mask in value."""
    prompt_options(pipe, prompts)
    ids = pipe.tokenizer([pipe.prompt_template_encode.format(prompt) for prompt in prompts]).input_ids
    length = torch.tensor([len(tokens) - pipe.prompt_template_encode_start_idx for tokens in ids])
    size = (len(prompts), TOKENS, pipe.transformer.config.joint_attention_dim)
    return {
        "encoder_hidden_states": torch.empty(size, dtype=pipe.transformer.dtype, device="meta"),
        "encoder_hidden_states_mask": (torch.arange(TOKENS) < length[:, None]).long(),
    }


@torch.no_grad()
def encode_images(pipe: Any, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n c h w"]:
    """Encode pictures in [-1, 1] to latents in the denoiser's scale: a video's frame, normalised by channel."""
    vae = pipe.vae
    video = images.unsqueeze(2).to(device=vae.device, dtype=vae.dtype)
    latents = vae.encode(video).latent_dist.mode().squeeze(2).float()
    mean, std = (
        torch.tensor(x, device=latents.device).view(1, -1, 1, 1)
        for x in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents - mean) / std


def predict(
    denoiser: nn.Module, scheduler: Any, noisy: Latents, timesteps: Timesteps, conditions: Conditions
) -> Latents:
    """Return the velocity of packed latents, as diffusers' `train_dreambooth_lora_qwen_image` computes it."""
    n, channels, height, width = noisy.shape
    read = conditions["encoder_hidden_states_mask"]
    read = read[:, : int(read.sum(1).max())]  # to the longest prompt of the batch, as the pipeline: padding costs time
    packed = denoiser(
        hidden_states=diffusers.QwenImagePipeline._pack_latents(noisy, n, channels, height, width),
        timestep=timesteps / scheduler.config.num_train_timesteps,
        encoder_hidden_states=conditions["encoder_hidden_states"][:, : read.shape[1]],
        encoder_hidden_states_mask=None if read.all() else read,
        img_shapes=[[(1, height // 2, width // 2)]] * n,
        return_dict=False,
    )[0]
    return diffusers.QwenImagePipeline._unpack_latents(packed, height, width, vae_scale_factor=1).squeeze(2)


QWEN_IMAGE = ModelFamily(
    name="qwen-image",
    pipeline_class="QwenImagePipeline",
    denoiser="transformer",
    # The published FLUX.1 set in Qwen-Image's names: all attention projections and feed-forwards of both streams.
    targets=(*JOINT_ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    steps=50,
    guidance=4.0,
    resolution=resolution,
    prompt_options=prompt_options,
    encode_prompts=encode_prompts,
    encode_images=encode_images,
    predict=predict,
    objective=FLOW,
    guidance_argument="true_cfg_scale",
    blank_conditions=blank_conditions,
)
