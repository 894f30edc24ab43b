"""Z-Image: single-stream transformer, flow matching, Qwen3 text encoder.

Source: Z-Image team, "Z-Image: An Efficient Image Generation Foundation Model with Single-Stream Diffusion Transformer"
(arXiv 2511.22699), as diffusers implements it. Z-Image-Turbo has the same pipeline class and nothing in it that tells
them apart, so its few steps have to be asked for: 8, and guidance 0. The pipeline guides at every scale above 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from qrlora.models.families.base import ATTENTION, Conditions, ModelFamily, chat, encode_images, refuse_long_prompts
from qrlora.models.families.objectives import FLOW, Latents, Timesteps

TOKENS = 512
"""The pipeline's own default for how much of a prompt is read."""


def resolution(pipe: Any) -> int:
    """Return the side in pixels of the pictures the pipeline makes by default."""
    return 1024


def prompt_options(pipe: Any, prompts: list[str]) -> dict[str, Any]:
    """Return the token limit, for `pipe(...)` and `pipe.encode_prompt(...)`. Raises DataError for a longer prompt."""
    refuse_long_prompts(pipe.tokenizer, TOKENS, prompts, chat(pipe.tokenizer, thinking=True))
    return {"max_sequence_length": TOKENS}


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Encode text to `captions` (n, 512, features), zero after the last token, and their `mask` (n, 512).

    The denoiser is given each caption without padding; rows of one length are what a dataset can stack.
    """
    options = {"do_classifier_free_guidance": False, **prompt_options(pipe, prompts)}
    captions, _ = pipe.encode_prompt(list(prompts), **options)  # a copy: the pipeline writes its template into the list
    length = torch.tensor([len(caption) for caption in captions], device=captions[0].device)
    return {
        "captions": torch.stack([pad(caption, (0, 0, 0, TOKENS - len(caption))) for caption in captions]),
        "mask": torch.arange(TOKENS, device=length.device) < length[:, None],
    }


def blank_conditions(pipe: Any, prompts: list[str]) -> dict[str, Tensor]:
    """Return what `encode_prompts` does: the captions in shape alone, the mask in value."""
    prompt_options(pipe, prompts)
    ids = pipe.tokenizer([chat(pipe.tokenizer, thinking=True)(prompt) for prompt in prompts]).input_ids
    size = (len(prompts), TOKENS, pipe.transformer.config.cap_feat_dim)
    return {
        "captions": torch.empty(size, dtype=pipe.transformer.dtype, device="meta"),
        "mask": torch.arange(TOKENS) < torch.tensor([len(tokens) for tokens in ids])[:, None],
    }


def predict(
    denoiser: nn.Module, scheduler: Any, noisy: Latents, timesteps: Timesteps, conditions: Conditions
) -> Latents:
    """Return the velocity, as diffusers' `train_dreambooth_lora_z_image` computes it.

    Z-Image counts time from noise (0) to picture (1), and predicts the velocity that way: the others' negative.
    """
    total = scheduler.config.num_train_timesteps
    captions = [row[read] for row, read in zip(conditions["captions"], conditions["mask"], strict=True)]
    frames = list(noisy.unsqueeze(2))  # one frame each, as of a video
    predicted = denoiser(frames, (total - timesteps) / total, captions, return_dict=False)[0]
    return -torch.stack(predicted).squeeze(2)


Z_IMAGE = ModelFamily(
    name="z-image",
    pipeline_class="ZImagePipeline",
    denoiser="transformer",
    # The published FLUX.1 set in Z-Image's names: all attention projections and the gated feed-forward.
    targets=(*ATTENTION, "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    steps=50,
    guidance=5.0,
    resolution=resolution,
    prompt_options=prompt_options,
    encode_prompts=encode_prompts,
    encode_images=encode_images,
    predict=predict,
    objective=FLOW,
    blank_conditions=blank_conditions,
)
