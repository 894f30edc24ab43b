"""The two training objectives: flow matching for the transformers, noise or v prediction for the UNets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

Latents = Float[Tensor, "n c h w"]
Mask = Float[Tensor, "n 1 h w"]
"""Weights of the places of each example, in the loss: a mask, resized to the latents."""
Timesteps = Float[Tensor, " n"]


def flow_timesteps(
    scheduler: Any, n: int, generator: Generator, logit_mean: float = 0.0, logit_std: float = 1.0
) -> Timesteps:
    """Draw timesteps logit-normally on the scheduler's (shifted) training grid.

    Source: rf/lognorm(m, s), section 3.1 of Esser et al. 2024 (arXiv 2403.03206).
    """
    uniform = torch.sigmoid(logit_mean + logit_std * torch.randn(n, generator=generator))
    total = scheduler.config.num_train_timesteps
    # a time of 1 is noise alone: the grid descends from it, so that large draws come first
    return scheduler.timesteps[((1 - uniform) * total).long().clamp(max=total - 1)].cpu()


def flow_loss(
    predict: Callable[[Latents], Latents],
    scheduler: Any,
    latents: Latents,
    noise: Latents,
    timesteps: Timesteps,
    mask: Mask | None = None,
) -> Float[Tensor, ""]:
    """Return the flow matching loss `E |v(z_t, t) - (noise - latents)|²`, `z_t = (1-σ) latents + σ noise`, `σ = t/T`.

    Latents and noise come in float32; `predict` lets the denoiser compute in its own dtype. mask: as `weighted_mean`.
    """
    sigma = (timesteps / scheduler.config.num_train_timesteps).view(-1, 1, 1, 1)
    predicted = predict((1 - sigma) * latents + sigma * noise)
    error = (predicted.float() - (noise - latents)).pow(2)
    return error.mean() if mask is None else weighted_mean(error, mask).mean()


def weighted_mean(error: Latents, mask: Mask | None) -> Float[Tensor, " n"]:
    """Return the mean of each example, its places weighted: `Σ m e / Σ m`.

    Divided by the weights rather than by the places (as ai-toolkit does, and sd-scripts does not), so that a picture
    counts the same however small its subject is, and a learning rate holds with masks and without.
    """
    return error.mean((1, 2, 3)) if mask is None else (error * mask).mean((1, 2, 3)) / mask.mean((1, 2, 3))


def noise_timesteps(scheduler: Any, n: int, generator: Generator) -> Timesteps:
    """Sample integer timesteps uniformly."""
    return torch.randint(scheduler.config.num_train_timesteps, (n,), generator=generator).float()


def noise_loss(
    predict: Callable[[Latents], Latents],
    scheduler: Any,
    latents: Latents,
    noise: Latents,
    timesteps: Timesteps,
    mask: Mask | None = None,
    min_snr_gamma: float | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared error of the noise, or of v (Salimans & Ho, arXiv 2202.00512), by the scheduler's config.

    mask: as `weighted_mean`.
    min_snr_gamma: weight each example with min(SNR, γ) / SNR for the noise, / (SNR + 1) for v (Hang et al. 2023,
        arXiv 2303.09556).
    """
    steps = timesteps.long()
    predicted = predict(scheduler.add_noise(latents, noise, steps))
    by_velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, steps) if by_velocity else noise
    each = weighted_mean((predicted.float() - target).pow(2), mask)
    if min_snr_gamma is None:
        return each.mean()
    kept = scheduler.alphas_cumprod.to(steps.device)[steps]
    snr = kept / (1 - kept)
    return (each * snr.clamp(max=min_snr_gamma) / (snr + by_velocity)).mean()


@dataclass(frozen=True)
class Objective:
    """Target of a denoiser's prediction, and the noise levels it is trained at.

    Attributes:
        loss: `(predict, scheduler, latents, noise, timesteps, mask, ...) -> scalar` float32; `predict` maps noisy
            latents to the denoiser's prediction.
        timesteps: `(scheduler, n, generator, ...) -> timesteps`, `(n,)` float32 on the CPU, in the scheduler's units.
        loss_options, timestep_options: recipe fields that `loss` and `timesteps` take besides, by name.
        scheduler: diffusers class that adds noise in training; empty if it is the pipeline's own.
    """

    loss: Callable[..., Float[Tensor, ""]]
    timesteps: Callable[..., Timesteps]
    loss_options: frozenset[str] = frozenset()
    timestep_options: frozenset[str] = frozenset()
    scheduler: str = ""


FLOW = Objective(flow_loss, flow_timesteps, timestep_options=frozenset({"logit_mean", "logit_std"}))
NOISE = Objective(noise_loss, noise_timesteps, loss_options=frozenset({"min_snr_gamma"}), scheduler="DDPMScheduler")
