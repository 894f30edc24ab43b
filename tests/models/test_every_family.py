"""What every family must do, on a tiny pipeline of its real class: learn, keep the base, paint, be a LoRA too."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.errors import DataError, RecipeError
from qrlora.method.adapter import Adapter, save_adapter
from qrlora.method.basis import Basis, weight_digest
from qrlora.method.tuner import basis_digests
from qrlora.models.families import load_pipeline
from qrlora.models.generation import attached, generate
from qrlora.models.stored import stored_weights
from qrlora.models.training.attach import peft_config
from qrlora.models.training.dataset import encode, load_examples
from qrlora.models.training.loop import train
from qrlora.models.training.placement import blocks
from qrlora.models.training.recipe import Recipe
from samples import NETWORK, assert_rounded

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
    """The loss at sixteen fixed noises and timesteps, without and with what was trained on others."""
    pipe, family = loaded
    recipe = recipe.replace(steps=20, batch_size=4, learning_rate=0.03, resolution=32)
    before = {name: tensor.clone() for name, tensor in family.denoiser_of(pipe).state_dict().items()}
    untrained = held_out_loss(recipe, pipe, family)
    adapter = train(recipe, pipe=pipe, family=family)
    with attached(pipe, family, [(adapter, 1.0)]):
        assert held_out_loss(recipe, pipe, family) < 0.98 * untrained
    after = family.denoiser_of(pipe).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert adapter.metadata.family == family.name and any(delta.any() for delta in adapter.deltas.values())


def test_gradient_checkpointing_gives_the_same_adapter(recipe: Recipe, loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    kept, again = (
        train(recipe.replace(gradient_checkpointing=value), pipe=pipe, family=family) for value in (False, True)
    )
    assert all(torch.equal(kept.deltas[name], again.deltas[name]) for name in kept.deltas)
    assert any(delta.any() for delta in kept.deltas.values())


def test_all_that_is_adapted_lies_in_blocks_that_can_be_quantised_and_divided(loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    denoiser = family.denoiser_of(pipe)
    inside = {id(module) for block in blocks(denoiser) for module in block.modules()}
    linear = {name: module for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    adapted = [module for name, module in linear.items() if name.endswith(tuple(f".{t}" for t in family.targets))]
    assert adapted and all(id(module) in inside for module in adapted)


@pytest.mark.parametrize(("form", "package"), [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_training_on_a_quantised_base(recipe: Recipe, form: str, package: str) -> None:
    pytest.importorskip(package)
    adapter = train(recipe.replace(quantize=form))
    assert any(delta.any() for delta in adapter.deltas.values())


@torch.no_grad()
def held_out_loss(recipe: Recipe, pipe: Any, family: Any) -> float:
    data = encode(load_examples(recipe.images, recipe.text, recipe.trigger, recipe.resolution or 0), pipe, family)
    generator, scheduler = torch.Generator().manual_seed(1), family.training_scheduler(pipe)
    latents, conditions = data.batch(torch.zeros(16, dtype=torch.long))
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = family.objective.timesteps(scheduler, 16, generator)
    return family.loss(family.denoiser_of(pipe), scheduler, latents, noise, timesteps, conditions).item()


def test_buckets_masks_and_flips(recipe: Recipe, loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """A wide picture with a mask, a tall one without: both are learned from, at their own shapes."""
    pipe, family = loaded
    folder, losses = tmp_path / "both", list[float]()
    folder.mkdir()
    Image.radial_gradient("L").resize((300, 200)).convert("RGB").save(folder / "wide.png")
    Image.linear_gradient("L").resize((300, 200)).save(folder / "wide.mask.png")
    Image.radial_gradient("L").resize((200, 300)).convert("RGB").save(folder / "tall.png")
    recipe = recipe.replace(images=folder, buckets=True, flip=True, resolution=32, batch_size=1, steps=4)
    adapter = train(recipe, pipe=pipe, family=family, progress=lambda p: losses.append(p.loss))
    assert np.isfinite(losses).all() and len(set(losses)) == 4
    deltas = adapter.deltas.values()
    assert all(delta.isfinite().all() for delta in deltas) and any(delta.any() for delta in deltas)


def test_its_files_alone_tell_the_weights_that_an_adapter_targets(tiny_model: Path, loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    stored, found = stored_weights(tiny_model)
    denoiser = family.denoiser_of(pipe)
    denoiser.add_adapter(peft_config(Recipe(role="subject", images="mug.png", rank=1), family), adapter_name="mug")
    digests = basis_digests(denoiser, "mug")
    assert found.name == family.name and set(stored) == set(digests)
    assert all(weight_digest(stored[name]) == digest for name, digest in digests.items())


def test_training_conditions_as_generation_does(loaded: tuple[Any, Any]) -> None:
    """Apart from noisy latents and time, training hands the denoiser what the pipeline hands it: of prompts of unequal
    length, of the guidance embedding, of places and sizes, in a picture that is no square."""
    pipe, family = loaded
    prompts, height, width = [PROMPT, "a mug"], 32, 48
    off: dict[str, Any] = {family.guidance_argument: 0.0 if family.name == "z-image" else 1.0}
    with heard(family.denoiser_of(pipe)) as generation:
        options = {"num_inference_steps": 2, "height": height, "width": width, **off}
        pipe(prompt=list(prompts), **options, **family.prompt_options(pipe, prompts))
    latents = family.encode_images(pipe, torch.zeros(2, 3, height, width))
    scheduler, conditions = family.training_scheduler(pipe), family.encode_prompts(pipe, prompts)
    times = family.objective.timesteps(scheduler, 2, torch.Generator())
    with heard(family.denoiser_of(pipe)) as training, torch.no_grad():
        family.loss(family.denoiser_of(pipe), scheduler, latents, latents, times, conditions)
    assert training.keys() == generation.keys()
    for name, value in training.items():
        assert equal(value, generation[name]), name


@contextlib.contextmanager
def heard(denoiser: Any) -> Iterator[dict[str, Any]]:
    """What the denoiser is called with, by argument name: all but latents, time, and what says nothing."""
    said: dict[str, Any] = {}
    signature = inspect.signature(type(denoiser).forward)

    def hear(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        said.update({name: value for name, value in bound.items() if value is not None and value != {}})
        for name in ("self", "return_dict", "hidden_states", "sample", "x", "timestep", "t"):
            said.pop(name, None)

    hook = denoiser.register_forward_pre_hook(hear, with_kwargs=True)
    yield said
    hook.remove()


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_rows_of_a_batch_do_not_see_each_other(loaded: tuple[Any, Any], one_by_one: bool) -> None:
    """Captions encoded apart, as a dataset does, stack; and a short one beside a long one gives what it gives alone."""
    pipe, family = loaded
    prompts = ["a mug", PROMPT]
    parts = [prompts[:1], prompts[1:]] if one_by_one else [prompts]
    encoded = [family.encode_prompts(pipe, part) for part in parts]
    conditions = {key: torch.cat([part[key] for part in encoded]) for key in encoded[0]}
    scheduler, generator = family.training_scheduler(pipe), torch.Generator().manual_seed(0)
    latents = family.encode_images(pipe, torch.rand(2, 3, 32, 32, generator=generator))
    noise, times = torch.randn(latents.shape, generator=generator), family.objective.timesteps(scheduler, 2, generator)

    def loss(rows: slice) -> torch.Tensor:
        mine = {key: value[rows] for key, value in conditions.items()}
        return family.loss(family.denoiser_of(pipe), scheduler, latents[rows], noise[rows], times[rows], mine)

    with torch.no_grad():
        assert_rounded(loss(slice(None)), (loss(slice(0, 1)) + loss(slice(1, 2))) / 2, terms=NETWORK)


@pytest.mark.parametrize(
    ("targets", "rank"), [(None, 2), ("all-linear", 2), ("all-linear", 12)], ids=["default", "all-linear", "clipped"]
)
def test_stock_diffusers_paints_the_same_picture(
    recipe: Recipe, loaded: tuple[Any, Any], tmp_path: Path, targets: str | None, rank: int
) -> None:
    pipe, family = loaded
    recipe = recipe.replace(targets=targets, rank=rank, alpha=rank, learning_rate=0.3)  # to be seen
    adapter = train(recipe, pipe=pipe, family=family)
    assert set(adapter.deltas) == chosen(family, family.denoiser_of(pipe), targets)
    assert adapter.scaling == 1 and (len({len(delta) for delta in adapter.deltas.values()}) > 1) == (rank == 12)
    options: dict[str, Any] = {"steps": 2, "guidance": 2.0, "resolution": 64}
    [ours] = generate(pipe, family, [PROMPT], [3], adapters=[(adapter, 1.0)], **options)
    [plain] = generate(pipe, family, [PROMPT], [3], **options)
    save_adapter(adapter, tmp_path / "mug.safetensors", "lora", basis_of(pipe, family, adapter))
    pipe.load_lora_weights(tmp_path / "mug.safetensors")
    [stock] = generate(pipe, family, [PROMPT], [3], **options)
    ours, plain, stock = (np.asarray(picture, np.int16) for picture in (ours, plain, stock))
    assert np.abs(ours - plain).max() > 2
    assert np.abs(ours - stock).max() <= 1


def chosen(family: Any, denoiser: torch.nn.Module, targets: str | None) -> set[str]:
    """The linear layers that a recipe's targets stand for."""
    linear = {name for name, module in denoiser.named_modules() if isinstance(module, torch.nn.Linear)}
    return linear if targets else {name for name in linear if name.endswith(tuple("." + t for t in family.targets))}


def basis_of(pipe: Any, family: Any, adapter: Adapter) -> Basis:
    weights = {name: family.denoiser_of(pipe).get_parameter(f"{name}.weight") for name in adapter.deltas}
    meta = adapter.metadata
    return Basis.of(weights, meta.basis_rank, algorithm=meta.algorithm, seed=meta.basis_seed)


def test_too_long_a_prompt_is_refused(loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    with pytest.raises(DataError, match="prompt too long"):
        family.encode_prompts(pipe, ["teapot " * 200])


def test_a_size_the_model_cannot_make_is_refused(recipe: Recipe, loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    with pytest.raises(DataError, match="no pictures of that size"):
        generate(pipe, family, [PROMPT], [0], steps=1, resolution=65)
    with pytest.raises(DataError, match="no pictures of that resolution"):
        train(recipe.replace(resolution=65), pipe=pipe, family=family)


def test_every_target_is_in_the_denoiser(loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    linear = [n for n, m in family.denoiser_of(pipe).named_modules() if isinstance(m, torch.nn.Linear)]
    for target in family.targets:
        assert any(name.endswith("." + target) for name in linear), target


def test_an_option_without_meaning_is_refused(recipe: Recipe, loaded: tuple[Any, Any]) -> None:
    pipe, family = loaded
    for name in ("min_snr_gamma", "logit_mean"):
        changed = recipe.replace(**{name: 1.0})
        if (name == "min_snr_gamma") == (family.name in ("sd", "sdxl")):
            train(changed, pipe=pipe, family=family)
        else:
            with pytest.raises(RecipeError, match=name):
                train(changed, pipe=pipe, family=family)
