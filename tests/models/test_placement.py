"""Precision and memory: half precision, a quantised base, activations computed twice, encoders apart, no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from torch import nn

from qrlora.errors import ModelError, RecipeError
from qrlora.method.adapter import Adapter, load_adapter
from qrlora.models import families
from qrlora.models.families import load_pipeline
from qrlora.models.generation import generate
from qrlora.models.training import checkpoint, loop, placement, prepare
from qrlora.models.training.loop import Progress, train
from qrlora.models.training.recipe import Recipe

FORMS = {"int8": ("torchao", 0.01), "nf4": ("bitsandbytes", 0.12)}
"""Package of each form, and how far off its weights may be, ‖W - W'‖ / ‖W‖."""


@pytest.fixture
def recipe(tmp_path: Path, tiny_sd3: Path) -> Recipe:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    fields: dict[str, Any] = {"model": str(tiny_sd3), "role": "subject", "images": tmp_path / "mug.png", "noun": "mug"}
    return Recipe.of(
        {**fields, "rank": 2, "steps": 6, "batch_size": 4, "learning_rate": 0.01, "output": tmp_path / "a.safetensors"}
    )


def cosine(one: Adapter, other: Adapter) -> float:
    flat = [torch.cat([delta.flatten() for delta in adapter.deltas.values()]) for adapter in (one, other)]
    return torch.cosine_similarity(*flat, dim=0).item()


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(FORMS[request.param][0])
    return request.param


@pytest.mark.parametrize("method", ["qrlora", "lora"])
def test_training_on_a_quantised_base(recipe: Recipe, form: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ΔR on the basis of the weights as they were, so the file fits the model that was not quantised."""
    steps: list[nn.Module] = []
    quantise = placement.quantise
    monkeypatch.setattr(
        placement, "quantise", lambda denoiser, *rest: steps.append(denoiser) or quantise(denoiser, *rest)
    )
    plain = train(recipe.replace(method=method, output=None))
    recipe = recipe.replace(method=method, quantize=form, preserve="a lamp", checkpoint_every=3, checkpoints_kept=2)
    adapter = train(recipe)
    assert len(steps) == 1 and all(delta.dtype == torch.float32 for delta in adapter.deltas.values())
    if method == "qrlora":
        assert adapter.metadata.basis_fingerprint == plain.metadata.basis_fingerprint
        assert cosine(adapter, plain) > 0.5
    pipe, family = load_pipeline(recipe.model, device="cpu")
    assert recipe.output is not None
    with_adapter = generate(pipe, family, ["a <c> mug"], [0], adapters=[(load_adapter(recipe.output), 1.0)], steps=2)
    assert with_adapter[0].size == (16, 16)
    checkpoint.path_of(recipe, 6).unlink()
    resumed = train(recipe, resume=True)
    assert all(torch.equal(resumed.deltas[name], adapter.deltas[name]) for name in adapter.deltas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantising_stores_the_blocks_and_leaves_the_rest(form: str, dtype: torch.dtype) -> None:
    from qrlora.method.tuner.layer import is_quantised, readable_weight

    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        caption_projection_dim=64,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    ).to(dtype)
    model.requires_grad_(False)
    before = {
        name: module.weight.detach().clone() for name, module in model.named_modules() if type(module) is nn.Linear
    }
    placement.quantise(model, form, torch.device("cpu"))
    modules: dict[str, Any] = dict(model.named_modules())
    for name, weight in before.items():
        assert is_quantised(modules[name]) == name.startswith("transformer_blocks.")
        off = (readable_weight(modules[name]) - weight).float().norm() / weight.float().norm()
        assert off <= FORMS[form][1] and (off > 0) == name.startswith("transformer_blocks.")


def test_float16_scales_its_loss_and_takes_an_overflowing_step_again(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.replace(checkpoint_every=6, max_grad_norm=1e6)
    full, moments = train(recipe), first_moments(recipe)
    recipe = recipe.replace(dtype="float16")
    adapters, scales = [], []
    for scale in (2.0**16, 2.0**60):
        monkeypatch.setattr(loop, "LOSS_SCALE", scale)
        adapters.append(train(recipe, restart=True))
        with safetensors.safe_open(checkpoint.path_of(recipe, 6), framework="pt") as stream:
            scales.append(float(stream.metadata()["loss_scale"]))
        assert (first_moments(recipe) - moments).norm() < 0.05 * moments.norm()  # gradients of the size they are
    assert scales[0] == 2.0**16 < scales[1] < 2.0**60
    assert all(cosine(adapter, full) > 0.99 for adapter in adapters)
    assert all(delta.dtype == torch.float32 for delta in adapters[0].deltas.values())


def first_moments(recipe: Recipe) -> torch.Tensor:
    with safetensors.safe_open(checkpoint.path_of(recipe, recipe.steps), framework="pt") as stream:
        return torch.cat([stream.get_tensor(key).flatten() for key in stream.keys() if key.endswith(".exp_avg")])  # noqa: SIM118


def test_gradient_checkpointing_ends_with_the_run(recipe: Recipe) -> None:
    pipe, family = load_pipeline(recipe.model, device="cpu")
    seen: list[bool] = []

    def look(_: Progress) -> None:
        seen.append(pipe.transformer.is_gradient_checkpointing)

    train(recipe.replace(gradient_checkpointing=True), pipe=pipe, family=family, progress=look)
    assert all(seen) and not pipe.transformer.is_gradient_checkpointing


def test_encoders_work_with_the_denoiser_out_of_the_pipeline(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not on their device then. On the CPU one cannot see that, so what they ask of it must not be a module."""
    seen: list[bool] = []
    encode = prepare.encode

    def look(examples: Any, pipe: Any, *rest: Any, **options: Any) -> Any:
        seen.append(isinstance(pipe.transformer, nn.Module))
        return encode(examples, pipe, *rest, **options)

    monkeypatch.setattr(prepare, "encode", look)
    apart = train(recipe)
    pipe, family = load_pipeline(recipe.model, device="cpu")
    together = train(recipe, pipe=pipe, family=family)
    assert seen == [False, True] and isinstance(pipe.transformer, nn.Module)
    assert all(torch.equal(apart.deltas[name], together.deltas[name]) for name in apart.deltas)


def test_too_little_memory_is_said_before_loading(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = load_pipeline(recipe.model, device="cpu")
    weights = sum(p.nbytes for m in pipe.components.values() if isinstance(m, nn.Module) for p in m.parameters())
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, "from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    monkeypatch.setattr(families, "free_memory", lambda device: weights // 2)
    with pytest.raises(ModelError, match="does not fit into the memory of cpu") as error:
        train(recipe)
    assert "GiB" in str(error.value.expected) and "GiB" in str(error.value.got) and "bfloat16" in str(error.value)
    monkeypatch.setattr(families, "free_memory", lambda device: int(weights * 0.9))
    with pytest.raises(ModelError, match="does not fit"):
        load_pipeline(recipe.model, device="cpu")
    with pytest.raises(pytest.fail.Exception, match="loaded"):  # in half it fits
        load_pipeline(recipe.model, dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize(
    ("changes", "linear", "parts"),
    [
        ({}, 4, 1),
        ({"quantize": "nf4"}, 0.5 + 1 / 64, 1),
        ({"fsdp": True}, 4, 4),
    ],
)
def test_what_a_device_must_hold(
    recipe: Recipe, changes: dict[str, Any], linear: float, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoders, then the denoiser, its blocks' Linear weights in their form; with `preserve` both at once."""
    pipe, family = load_pipeline(recipe.model, device="cpu")
    layers = [m for m in pipe.transformer.transformer_blocks.modules() if type(m) is nn.Linear]
    denoiser = (
        placement.module_bytes(pipe.transformer) + sum(int(m.weight.numel() * linear) - m.weight.nbytes for m in layers)
    ) / parts
    encoders = sum(map(placement.module_bytes, (pipe.vae, pipe.text_encoder, pipe.text_encoder_2)))
    asked: list[int] = []
    monkeypatch.setattr(placement, "refuse_if_larger", lambda size, device, model: asked.append(size))
    for more in ({}, {"offload": True}, {"preserve": "a lamp"}):
        placement.check_fits(pipe, family, recipe.replace(**changes, **more), torch.device("cuda"), 4)
    assert asked == [int(max(encoders, denoiser)), int(denoiser), int(encoders + denoiser)]


def test_fields_that_exclude_each_other() -> None:
    for fields in (
        {"optimizer": "schedulefree", "cooldown_steps": 5},
        {"quantize": "nf4", "fsdp": True},
        {"offload": True, "preserve": "a lamp"},
    ):
        with pytest.raises(RecipeError, match=list(fields)[1]):
            Recipe.of({"role": "style", "images": "a.png", **fields})
