"""Stable Diffusion 1.5 and XL at their real size, from their public configs, with random weights in bfloat16.

    python tests/real_size.py sdxl FOLDER

writes a folder that every command takes for a base model. The tokenizers know bytes alone; no weight is learned, so
pictures are noise: what such a model shows is memory, time, shapes and files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tiny_pipelines import byte_tokenizer

NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _autoencoder(sample_size: int, scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
    )


def _clip(width: int, layers: int, act: str, tokens: int) -> CLIPTextConfig:
    """A text encoder of OpenAI's (768 wide) or OpenCLIP's (1280 wide), 64 numbers a head."""
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        hidden_act=act,
        bos_token_id=tokens - 2,
        eos_token_id=tokens - 1,
        pad_token_id=tokens - 1,
    )


def _sd() -> StableDiffusionPipeline:
    tokenizer = byte_tokenizer()
    return StableDiffusionPipeline(
        vae=_autoencoder(512, 0.18215),
        text_encoder=CLIPTextModel(_clip(768, 12, "quick_gelu", len(tokenizer))),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=PNDMScheduler(skip_prk_steps=True, **NOISE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> StableDiffusionXLPipeline:
    tokenizer = byte_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_autoencoder(1024, 0.13025),
        text_encoder=CLIPTextModel(_clip(768, 12, "quick_gelu", len(tokenizer))),
        text_encoder_2=CLIPTextModelWithProjection(_clip(1280, 32, "gelu", len(tokenizer))),
        tokenizer=tokenizer,
        tokenizer_2=byte_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **NOISE),
        add_watermarker=False,
    )


def build(family: str, folder: Path) -> None:
    """Write a pipeline of `sd` or `sdxl` to a folder."""
    single = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        {"sd": _sd, "sdxl": _sdxl}[family]().save_pretrained(folder)
    finally:
        torch.set_default_dtype(single)


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]))
