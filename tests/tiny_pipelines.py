"""Tiny real pipelines of every family, built from configs alone, in seconds and offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def byte_tokenizer() -> CLIPTokenizer:
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


HALVING: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "sample_size": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""An autoencoder whose latents have half the side of the picture."""


def _autoencoder() -> AutoencoderKL:
    return AutoencoderKL(**HALVING, shift_factor=0.06, scaling_factor=1.5)


def _autoencoder_of_four() -> AutoencoderKL:
    """An autoencoder whose latents have an eighth of the side of the picture."""
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=64,
    )


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level, no merges, with the marks of a chat."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*marks, *bytes_to_unicode().values()]
    tokenizer = Qwen2Tokenizer({word: i for i, word in enumerate(words)}, [], additional_special_tokens=marks[1:])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    )
    return tokenizer


def _qwen3(vocab: int, layers: int) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def build_tiny_sd3(medium: bool = False) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline of some 80 thousand random weights: 16x16 pictures, 8x8 latents, no T5.

    medium: with the second attention and the normalised queries and keys of 3.5 medium.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
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
            dual_attention_layers=(0,) if medium else (),
            qk_norm="rms_norm" if medium else None,
        )
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_autoencoder(),
            text_encoder=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=_text_encoder(len(tokenizer)),
            tokenizer_2=byte_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )


def build_tiny_flux(guidance_embeds: bool = True) -> FluxPipeline:
    """A FluxPipeline of some 70 thousand random weights: latents of half the side, guidance as in dev."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
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
        tokenizer = byte_tokenizer()
        return StableDiffusionXLPipeline(
            vae=_autoencoder_of_four(),
            text_encoder=CLIPTextModel(_text_encoder(len(tokenizer)).config),
            text_encoder_2=_text_encoder(len(tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=byte_tokenizer(),
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


def build_tiny_sd(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    """A StableDiffusionPipeline of some 100 thousand random weights: 64x64 pictures, 8x8 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        return StableDiffusionPipeline(
            vae=_autoencoder_of_four(),
            text_encoder=CLIPTextModel(_text_encoder(len(tokenizer)).config),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=8,
                block_out_channels=(16, 32),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                attention_head_dim=4,
                cross_attention_dim=32,
                norm_num_groups=4,
            ),
            scheduler=PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type=prediction_type,
                skip_prk_steps=True,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def build_tiny_flux2_klein(is_distilled: bool = False) -> Flux2KleinPipeline:
    """A Flux2KleinPipeline of some 70 thousand random weights: latents a quarter of the side, 27 thin text layers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _qwen_tokenizer()
        vae = AutoencoderKLFlux2(**HALVING)
        torch.nn.init.normal_(vae.bn.running_mean)
        torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
        return Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=_qwen3(len(tokenizer), layers=27),
            tokenizer=tokenizer,
            transformer=Flux2Transformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=3 * 8,
                timestep_guidance_channels=16,
                axes_dims_rope=(4, 4, 4, 4),
                guidance_embeds=False,
            ),
            is_distilled=is_distilled,
        )


def build_tiny_z_image() -> ZImagePipeline:
    """A ZImagePipeline of some 300 thousand random weights (its time embedding is of fixed width)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _qwen_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 64, 64],
        )
        return ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=_autoencoder(),
            text_encoder=_qwen3(len(tokenizer), layers=2),
            tokenizer=tokenizer,
            transformer=transformer,
        )


def _qwen_vl(vocab: int) -> Qwen2_5_VLForConditionalGeneration:
    sizes = {"hidden_size": 16, "intermediate_size": 16}
    text: dict[str, Any] = {
        **sizes,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "bos_token_id": None,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    }
    vision = {**sizes, "depth": 1, "num_heads": 2, "out_hidden_size": 16}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def build_tiny_qwen_image() -> QwenImagePipeline:
    """A QwenImagePipeline of some 170 thousand random weights: latents of half the side."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _qwen_tokenizer()
        return QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True, shift_terminal=0.02),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1],
                num_res_blocks=1,
                temperal_downsample=[False],
                latents_mean=[-0.1, 0.1, 0.2, 0.3],
                latents_std=[0.5, 1.0, 1.5, 2.0],
            ),
            text_encoder=_qwen_vl(len(tokenizer)),
            tokenizer=tokenizer,
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                axes_dims_rope=(4, 6, 6),
            ),
        )


BUILDERS: dict[str, Callable[[], Any]] = {
    "flux": build_tiny_flux,
    "flux2-klein": build_tiny_flux2_klein,
    "qwen-image": build_tiny_qwen_image,
    "sd": build_tiny_sd,
    "sd3": build_tiny_sd3,
    "sdxl": build_tiny_sdxl,
    "z-image": build_tiny_z_image,
}
