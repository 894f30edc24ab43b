"""Tiny real denoisers of the three architectures, each with inputs and the layers an adapter goes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
JOINT = [*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "net.0.proj", "net.2"]

Denoiser = tuple[nn.Module, dict[str, Any], list[str]]


def flux() -> Denoiser:
    model = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = {
        "hidden_states": torch.randn(2, 16, 4),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    return model, inputs, JOINT


def sd3() -> Denoiser:
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "pooled_projections": torch.randn(2, 64),
        "timestep": torch.tensor([300.0, 700.0]),
    }
    return model, inputs, JOINT


def unet() -> Denoiser:
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 6, 16),
    }
    return model, inputs, [*ATTENTION, "conv1", "conv2"]


BUILDERS: dict[str, Callable[[], Denoiser]] = {"flux": flux, "sd3": sd3, "unet": unet}


def build(kind: str) -> Denoiser:
    """(model, inputs, target_modules), the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs, targets = BUILDERS[kind]()
        for parameter in model.parameters():  # zero-initialised outputs would hide any difference
            if not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False).eval(), inputs, targets


def predict(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers, for `same`."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    """Return True if they are what they were, bit for bit."""
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
