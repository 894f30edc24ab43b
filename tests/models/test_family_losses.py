"""The loss of every family against the formula of the diffusers example for its model, computed apart.

Same weights, noise and timesteps; what each script does to them is written out in plain torch, names as there. Its text
comes from the pipeline itself, unpadded, and what is compared agrees to 1e-5.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qrlora.models.families import family_of
from samples import EPS, NETWORK, assert_rounded
from tiny_pipelines import (
    build_tiny_flux,
    build_tiny_flux2_klein,
    build_tiny_qwen_image,
    build_tiny_sd,
    build_tiny_sd3,
    build_tiny_sdxl,
    build_tiny_z_image,
)

PROMPTS = ["a photo of a <c> mug", "a mug in <s> style", ""]
SIDE, PATCHES = 8, 4


class Case:
    """Latents, noise and timesteps for three prompts on a pipeline, and what its family makes of them."""

    def __init__(self, pipe: Any, channels: int = 4, **options: float):
        self.family, generator = family_of(pipe), torch.Generator().manual_seed(1)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                component.eval()  # as loaded: T5 has dropout
        self.latents, self.noise = (torch.randn(3, channels, SIDE, SIDE, generator=generator) for _ in range(2))
        self.conditions = self.family.encode_prompts(pipe, PROMPTS)
        self.scheduler = self.family.training_scheduler(pipe)
        self.timesteps = self.family.objective.timesteps(self.scheduler, 3, generator)
        self.mask = torch.rand(3, 1, SIDE, SIDE, generator=generator)
        self.found, self.masked = (
            self.family.loss(
                self.family.denoiser_of(pipe),
                self.scheduler,
                self.latents,
                self.noise,
                self.timesteps,
                self.conditions,
                mask,
                **options,
            )
            for mask in (None, self.mask)
        )

    @property
    def sigmas(self) -> Tensor:
        """The scripts' `get_sigmas`: each timestep's place in the scheduler's table."""
        places = [(self.scheduler.timesteps == t).nonzero().item() for t in self.timesteps]
        return self.scheduler.sigmas[places].view(3, 1, 1, 1)

    @property
    def noisy_model_input(self) -> Tensor:
        return (1.0 - self.sigmas) * self.latents + self.sigmas * self.noise

    def agrees(self, model_pred: Tensor) -> None:
        """The scripts' flow matching loss, and its mean by the mask's weights."""
        target = self.noise - self.latents
        error = (model_pred.float() - target.float()) ** 2
        self.matches(error.reshape(target.shape[0], -1).mean(1), self.by_mask(error))

    def by_mask(self, error: Tensor) -> Tensor:
        """Each example's mean over channels, and over places as they weigh in the mask."""
        return torch.stack([(e.mean(0) * m[0]).sum() / m.sum() for e, m in zip(error, self.mask, strict=True)])

    def matches(self, plain: Tensor, masked: Tensor) -> None:
        assert_rounded(self.found, plain.mean(), terms=NETWORK)
        assert_rounded(self.masked, masked.mean(), terms=NETWORK)
        assert abs(self.masked - self.found) > 2 * NETWORK * EPS * abs(self.found)


def packed(latents: Tensor) -> Tensor:
    """Patches of 2 x 2 as tokens, row by row."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor) -> Tensor:
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).reshape(3, -1, PATCHES, PATCHES), 2)


def grid(side: int) -> tuple[Tensor, Tensor]:
    """Row and column of every token."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return rows.flatten(), columns.flatten()


@pytest.mark.parametrize("medium", [False, True], ids=["3", "3.5-medium"])
def test_sd3_loss_is_that_of_the_example(medium: bool) -> None:
    """train_dreambooth_lora_sd3.py, without --precondition_outputs."""
    pipe = build_tiny_sd3(medium)
    case = Case(pipe)
    prompt_embeds, _, pooled_prompt_embeds, _ = pipe.encode_prompt(PROMPTS, None, None, max_sequence_length=1)
    case.agrees(
        pipe.transformer(
            hidden_states=case.noisy_model_input,
            timestep=case.timesteps,
            encoder_hidden_states=prompt_embeds,
            pooled_projections=pooled_prompt_embeds,
            return_dict=False,
        )[0]
    )


@pytest.mark.parametrize("dev", [True, False], ids=["dev", "schnell"])
def test_flux_loss_is_that_of_the_example(dev: bool) -> None:
    """train_dreambooth_lora_flux.py with the published --guidance_scale 1. Schnell embeds none, reads 256 tokens."""
    pipe, tokens = build_tiny_flux(dev), 512 if dev else 256
    case, (rows, columns) = Case(pipe), grid(PATCHES)
    prompt_embeds, pooled_prompt_embeds, _ = pipe.encode_prompt(PROMPTS, None, max_sequence_length=tokens)
    model_pred = pipe.transformer(
        hidden_states=packed(case.noisy_model_input),
        timestep=case.timesteps / 1000,
        guidance=torch.tensor([1.0]).expand(3) if dev else None,
        pooled_projections=pooled_prompt_embeds,
        encoder_hidden_states=prompt_embeds,
        txt_ids=torch.zeros(tokens, 3),
        img_ids=torch.stack([torch.zeros(PATCHES**2), rows, columns], -1),
        return_dict=False,
    )[0]
    case.agrees(unpacked(model_pred))


def test_flux2_klein_loss_is_that_of_the_example() -> None:
    """train_dreambooth_lora_flux2_klein.py, on the text layers that the pipeline reads; latents come in as patches."""
    pipe = build_tiny_flux2_klein()
    case, (rows, columns) = Case(pipe, channels=16), grid(SIDE)
    prompt_embeds, _ = pipe.encode_prompt(PROMPTS)
    nothing, words = torch.zeros(SIDE**2, dtype=torch.long), torch.zeros(3, 512, 4)
    words[..., 3] = torch.arange(512)
    model_pred = pipe.transformer(
        hidden_states=case.noisy_model_input.flatten(2).transpose(1, 2),
        timestep=case.timesteps / 1000,
        guidance=None,
        encoder_hidden_states=prompt_embeds,
        txt_ids=words,
        img_ids=torch.stack([nothing, rows, columns, nothing], -1).expand(3, -1, -1),
        return_dict=False,
    )[0]
    case.agrees(model_pred.transpose(1, 2).reshape(3, 16, SIDE, SIDE))


def test_qwen_image_loss_is_that_of_the_example() -> None:
    """train_dreambooth_lora_qwen_image.py: the mask goes with prompts of unequal length."""
    pipe = build_tiny_qwen_image()
    case = Case(pipe)
    prompt_embeds, prompt_embeds_mask = pipe.encode_prompt(PROMPTS)
    assert prompt_embeds_mask is not None and prompt_embeds.shape[1] < 512
    model_pred = pipe.transformer(
        hidden_states=packed(case.noisy_model_input),
        encoder_hidden_states=prompt_embeds,
        encoder_hidden_states_mask=prompt_embeds_mask,
        timestep=case.timesteps / 1000,
        img_shapes=[(1, PATCHES, PATCHES)] * 3,
        return_dict=False,
    )[0]
    case.agrees(unpacked(model_pred))


def test_z_image_loss_is_that_of_the_example() -> None:
    """train_dreambooth_lora_z_image.py: time runs the other way, and so does the prediction."""
    pipe = build_tiny_z_image()
    case = Case(pipe)
    prompt_embeds, _ = pipe.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    assert len({len(caption) for caption in prompt_embeds}) == 3
    frames = list(case.noisy_model_input.unsqueeze(2).unbind(0))
    model_pred = pipe.transformer(frames, (1000 - case.timesteps) / 1000, prompt_embeds, return_dict=False)[0]
    case.agrees(-torch.stack(model_pred).squeeze(2))


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("build", [build_tiny_sd, build_tiny_sdxl], ids=["sd", "sdxl"])
def test_unet_loss_is_that_of_the_example(build: Any, kind: str, gamma: float | None) -> None:
    """train_text_to_image_lora.py and train_text_to_image_lora_sdxl.py with --snr_gamma; noise from the betas."""
    pipe = build(kind)
    case = Case(pipe, **({} if gamma is None else {"min_snr_gamma": gamma}))
    if build is build_tiny_sd:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        prompt_embeds, _ = pipe.encode_prompt(PROMPTS, "cpu", 1, False)
        added = None
    else:
        betas = torch.linspace(0.0001, 0.02, 1000)
        prompt_embeds, _, pooled, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
        added = {"time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 3), "text_embeds": pooled}
    alphas = torch.cumprod(1 - betas, 0)[case.timesteps.long()]
    signal, spread = alphas.sqrt().view(3, 1, 1, 1), (1 - alphas).sqrt().view(3, 1, 1, 1)
    noisy = signal * case.latents + spread * case.noise
    model_pred = pipe.unet(noisy, case.timesteps, prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]
    target = case.noise if kind == "epsilon" else signal * case.noise - spread * case.latents
    error, weights = (model_pred - target) ** 2, torch.ones(3)
    if gamma is not None:
        snr = alphas / (1 - alphas)
        weights = torch.stack([snr, torch.full((3,), gamma)], 1).min(1)[0] / (snr if kind == "epsilon" else snr + 1)
    case.matches(error.mean((1, 2, 3)) * weights, case.by_mask(error) * weights)


# ------------------------------------------------------------------------------- latents, as the scripts scale them


def test_klein_latents_are_patches_normalised_by_the_running_statistics() -> None:
    pipe, images = build_tiny_flux2_klein(), torch.rand(2, 3, 16, 16) * 2 - 1
    model_input = torch.nn.functional.pixel_unshuffle(pipe.vae.encode(images).latent_dist.mode(), 2)
    batch_norm = torch.nn.BatchNorm2d(16, eps=pipe.vae.config.batch_norm_eps, affine=False).eval()
    batch_norm.load_state_dict(pipe.vae.bn.state_dict())
    assert_rounded(family_of(pipe).encode_images(pipe, images), batch_norm(model_input), terms=64)


def test_qwen_latents_are_one_frame_normalised_by_channel() -> None:
    pipe, images = build_tiny_qwen_image(), torch.rand(2, 3, 16, 16) * 2 - 1
    latents = family_of(pipe).encode_images(pipe, images)
    mean, std = (torch.tensor(pipe.vae.config[f"latents_{x}"]).view(1, 4, 1, 1, 1) for x in ("mean", "std"))
    assert latents.shape == (2, 4, 8, 8)
    expected = pipe.vae.encode(images[:, :, None]).latent_dist.mode()
    assert_rounded(latents[:, :, None] * std + mean, expected, terms=64)


@pytest.mark.parametrize("build", [build_tiny_sd, build_tiny_z_image], ids=["sd", "z-image"])
def test_other_latents_are_shifted_and_scaled(build: Any) -> None:
    pipe, images = build(), torch.rand(2, 3, 16, 16) * 2 - 1
    mean, config = pipe.vae.encode(images).latent_dist.mode(), pipe.vae.config
    expected = (mean - (config.shift_factor or 0.0)) * config.scaling_factor
    assert_rounded(family_of(pipe).encode_images(pipe, images), expected, terms=64)
