"""What every family must do, on a tiny pipeline of its real class: learn, keep the base, paint, be a LoRA too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import build_tiny_flux, build_tiny_sdxl
from qrlora.adapter import Adapter, save_adapter
from qrlora.basis import Basis
from qrlora.errors import DataError, RecipeError
from qrlora.families import family_of, load_pipeline
from qrlora.generation import generate
from qrlora.training.loop import train
from qrlora.training.recipe import Recipe

PROMPT = "a photo of a <c> mug"


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Recipe:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    fields: dict[str, Any] = {"model": str(tiny_model), "role": "subject", "images": tmp_path / "mug.png"}
    return Recipe(**fields, noun="mug", rank=2, resolution=64, steps=2, batch_size=2, learning_rate=0.02)


@pytest.fixture
def loaded(tiny_model: Path) -> tuple[Any, Any]:
    return load_pipeline(tiny_model, device="cpu")


def test_training_lowers_the_loss_and_changes_delta_r_alone(recipe: Recipe, loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    before = {name: tensor.clone() for name, tensor in family.denoiser_of(pipe).state_dict().items()}
    losses: list[float] = []
    long = recipe.replace(steps=80, batch_size=8)
    adapter = train(long, pipe=pipe, family=family, progress=lambda p: losses.append(p.loss))
    assert sum(losses[-20:]) < 0.97 * sum(losses[:20])
    after = family.denoiser_of(pipe).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert adapter.metadata.family == family.name and any(delta.any() for delta in adapter.deltas.values())


def test_prompts_condition_training_as_they_do_generation(loaded: tuple[Any, Any]) -> None:
    """The tensors that the pipeline hands its denoiser are those that training hands it."""
    pipe, family = loaded
    prompts, seen = [PROMPT, "a mug in <s> style"], {}
    hook = family.denoiser_of(pipe).register_forward_pre_hook(lambda *call: seen.update(call[2]), with_kwargs=True)
    options: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "height": 64, "width": 64}
    pipe(prompts, **options, **family.prompt_options(pipe, prompts))
    hook.remove()
    seen |= seen.get("added_cond_kwargs") or {}
    for name, value in family.encode_prompts(pipe, prompts).items():
        assert torch.equal(value, seen[name]), name


def test_stock_diffusers_paints_the_same_picture(recipe: Recipe, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    pipe, family = loaded
    adapter = train(recipe, pipe=pipe, family=family)
    options: dict[str, Any] = {"steps": 2, "guidance": 2.0, "resolution": 64}
    [ours] = generate(pipe, family, [PROMPT], [3], adapters=[(adapter, 1.0)], **options)
    [plain] = generate(pipe, family, [PROMPT], [3], **options)
    save_adapter(adapter, tmp_path / "mug.safetensors", "lora", basis_of(pipe, family, adapter))
    pipe.load_lora_weights(tmp_path / "mug.safetensors")
    [stock] = generate(pipe, family, [PROMPT], [3], **options)
    ours, plain, stock = (np.asarray(picture, np.int16) for picture in (ours, plain, stock))
    assert np.abs(ours - plain).max() > 2
    assert np.abs(ours - stock).max() <= 1


def basis_of(pipe: Any, family: Any, adapter: Adapter) -> Basis:
    weights = {name: family.denoiser_of(pipe).get_parameter(f"{name}.weight") for name in adapter.deltas}
    meta = adapter.metadata
    return Basis.of(weights, meta.basis_rank, algorithm=meta.algorithm, seed=meta.basis_seed)


def test_too_long_a_prompt_is_refused(loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    with pytest.raises(DataError, match="prompt too long"):
        family.encode_prompts(pipe, ["teapot " * 100])


def test_a_size_the_model_cannot_make_is_refused(loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    with pytest.raises(DataError, match="no pictures of that size"):
        generate(pipe, family, [PROMPT], [0], steps=1, resolution=65)


def test_every_target_is_in_the_denoiser(loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    linear = [n for n, m in family.denoiser_of(pipe).named_modules() if isinstance(m, torch.nn.Linear)]
    for target in family.targets:
        assert any(name.endswith("." + target) for name in linear), target


def test_an_option_without_meaning_is_refused(recipe: Recipe, loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    for name in ("min_snr_gamma", "logit_mean"):
        changed = recipe.replace(**{name: 1.0})
        if (name == "min_snr_gamma") == (family.name == "sdxl"):
            train(changed, pipe=pipe, family=family)
        else:
            with pytest.raises(RecipeError, match=name):
                train(changed, pipe=pipe, family=family)


# ---------------------------------------------------------------- formulas of the diffusers examples, computed apart


def drawn(channels: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(3, channels, 8, 8, generator=generator) for _ in range(2))
    return latents, noise, generator


@pytest.mark.parametrize("dev", [True, False], ids=["dev", "schnell"])
def test_flux_loss_is_that_of_the_example(dev: bool) -> None:
    """train_dreambooth_lora_flux.py: unpack the prediction, compare with noise - latents; the published guidance."""
    pipe = build_tiny_flux(dev)
    family, (latents, noise, generator) = family_of(pipe), drawn()
    conditions = family.encode_prompts(pipe, [PROMPT, "a mug in <s> style", ""])
    scheduler = family.training_scheduler(pipe)
    timesteps = family.sample_timesteps(scheduler, 3, generator)
    found = family.loss(pipe.transformer, scheduler, latents, noise, timesteps, conditions)

    sigmas = torch.stack([scheduler.sigmas[scheduler.timesteps == t][0] for t in timesteps])[:, None, None, None]
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    packed = noisy.reshape(3, 4, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(3, 16, 16)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    prediction = pipe.transformer(
        hidden_states=packed,
        timestep=timesteps / 1000,
        guidance=torch.ones(3) if dev else None,
        pooled_projections=conditions["pooled_projections"],
        encoder_hidden_states=conditions["encoder_hidden_states"],
        txt_ids=torch.zeros(512, 3),
        img_ids=torch.stack([torch.zeros(16), rows.flatten(), columns.flatten()], -1),
        return_dict=False,
    )[0]
    prediction = prediction.reshape(3, 4, 4, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(3, 4, 8, 8)
    expected = torch.mean(((prediction - (noise - latents)) ** 2).reshape(3, -1), 1).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_sdxl_loss_is_that_of_the_example(kind: str, gamma: float | None) -> None:
    """train_text_to_image_lora_sdxl.py with --snr_gamma: the noise schedule from the betas, computed apart."""
    pipe = build_tiny_sdxl(kind)
    family, (latents, noise, generator) = family_of(pipe), drawn()
    conditions = family.encode_prompts(pipe, [PROMPT, "a mug in <s> style", ""])
    scheduler = family.training_scheduler(pipe)
    timesteps = family.sample_timesteps(scheduler, 3, generator)
    options = {} if gamma is None else {"min_snr_gamma": gamma}
    found = family.loss(pipe.unet, scheduler, latents, noise, timesteps, conditions, **options)

    betas = torch.linspace(scheduler.config.beta_start, scheduler.config.beta_end, 1000)
    alphas = torch.cumprod(1 - betas, 0)[timesteps.long()]
    signal, spread = alphas.sqrt()[:, None, None, None], (1 - alphas).sqrt()[:, None, None, None]
    prediction = pipe.unet(
        signal * latents + spread * noise,
        timesteps,
        conditions["encoder_hidden_states"],
        added_cond_kwargs={
            "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 3),
            "text_embeds": conditions["text_embeds"],
        },
        return_dict=False,
    )[0]
    target = noise if kind == "epsilon" else signal * noise - spread * latents
    each = ((prediction - target) ** 2).mean((1, 2, 3))
    if gamma is not None:
        snr = alphas / (1 - alphas)
        each = each * torch.stack([snr, torch.full((3,), gamma)], 1).min(1)[0] / (snr if kind == "epsilon" else snr + 1)
    torch.testing.assert_close(found, each.mean(), rtol=1e-5, atol=1e-5)
