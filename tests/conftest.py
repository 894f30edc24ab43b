"""Shared fixtures: tiny real pipelines of every family, built from configs alone, in seconds and offline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def _tokenizer() -> CLIPTokenizer:
    """Byte-level, no merges: every string tokenises."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def _text_encoder(vocab: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=37,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=vocab - 2,
            eos_token_id=vocab - 1,
            pad_token_id=vocab - 1,
        )
    )


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        sample_size=16,
        shift_factor=0.06,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_tiny_sd3() -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline of some 80 thousand random weights: 16x16 pictures, 8x8 latents, no T5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            caption_projection_dim=32,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=16,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=_text_encoder(len(tokenizer)),
            tokenizer_2=_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )


def build_tiny_flux(guidance_embeds: bool = True) -> FluxPipeline:
    """A FluxPipeline of some 70 thousand random weights: latents of half the side, guidance as in dev."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        letters = [(chr(code), -1.0) for code in range(32, 127)] + [("\u2581", -1.0)]
        t5_tokenizer = T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)
        t5 = T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
        clip = _text_encoder(len(tokenizer)).config
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(),
            text_encoder=CLIPTextModel(clip),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(t5),
            tokenizer_2=t5_tokenizer,
            transformer=FluxTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=guidance_embeds,
            ),
        )


def build_tiny_sdxl(prediction_type: str = "epsilon") -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline of some random weights: 64x64 pictures, 8x8 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        vae = AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=2,
            latent_channels=4,
            sample_size=64,
        )
        return StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(_text_encoder(len(tokenizer)).config),
            text_encoder_2=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=_tokenizer(),
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(2, 4),
                cross_attention_dim=64,
                transformer_layers_per_block=(1, 1),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=32 + 6 * 8,
                norm_num_groups=4,
            ),
            scheduler=EulerDiscreteScheduler(prediction_type=prediction_type, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )


BUILDERS = {"flux": build_tiny_flux, "sd3": build_tiny_sd3, "sdxl": build_tiny_sdxl}


@pytest.fixture(scope="session", params=list(BUILDERS))
def tiny_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny pipeline of each family in turn."""
    folder = tmp_path_factory.mktemp("models") / request.param
    BUILDERS[request.param]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny StableDiffusion3Pipeline; load it with `StableDiffusion3Pipeline.from_pretrained`."""
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    build_tiny_sd3().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("QRLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
