"""The plan: that what it counts without weights is what a run with them does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from qrlora.apps.cli import main
from qrlora.errors import RecipeError
from qrlora.method.adapter import save_adapter
from qrlora.method.basis import Basis
from qrlora.models.families import load_pipeline, load_structure
from qrlora.models.training.attach import adapter_on
from qrlora.models.training.loop import train
from qrlora.models.training.optimizers import STATE_BYTES, optimizer_for
from qrlora.models.training.plan import Plan, plan, rehearse
from qrlora.models.training.recipe import Recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Recipe:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    fields: dict[str, Any] = {"model": str(tiny_model), "role": "subject", "images": tmp_path / "mug.png"}
    return Recipe(**fields, noun="mug", rank=2, resolution=64, steps=1, batch_size=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rehearsal_without_weights_counts_what_happens_with_them(recipe: Recipe, dtype: str) -> None:
    """What is held for the backward pass, the peak, the operations, and what the adapter adds.

    In float32 to the byte, but for the table of the UNets' scheduler, which is on the CPU already; in bfloat16 a CPU
    keeps the means and deviations of a layer norm in half of what the meta device, like a GPU, keeps them in.
    """
    room = {"abs": 4096, "rel": 0} if dtype == "float32" else {"rel": 0.02}
    recipe = recipe.replace(dtype=dtype)
    pipe, family = load_pipeline(recipe.model, getattr(torch, dtype), device="cpu")
    denoiser = family.denoiser_of(pipe)
    for method, estimate in plan(recipe).estimates.items():
        base = sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers()))
        with adapter_on(denoiser, family, recipe.replace(method=method)) as parameters:
            step, held = rehearse(recipe, pipe, family)
            whole = sum(tensor.nbytes for tensor in (*denoiser.parameters(), *denoiser.buffers()))
        memory = estimate.memory
        assert memory["base_weights"] == base
        assert memory["base_weights"] + memory["trained_parameters"] + memory["basis"] == whole
        assert memory["trained_parameters"] == sum(parameter.nbytes for parameter in parameters.values())
        assert estimate.flops == step.flops
        assert memory["activations"] == pytest.approx(held, **room)
        assert sum(memory[part] for part in ("activations", "working_space", "gradients")) == pytest.approx(
            step.peak, **room
        )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "lora"},
        {"train_basis": True, "columns": "first"},
        {"rank": 12, "targets": "all-linear"},  # more columns than some layers hold
        {"rank": 24, "targets": "all-linear", "train_basis": True, "columns": "first"},
    ],
)
def test_parameters_and_files_are_those_of_the_adapter(tiny_sd3: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    fields: dict[str, Any] = {"model": str(tiny_sd3), "role": "subject", "images": tmp_path / "mug.png"}
    recipe = Recipe(**fields, steps=1, batch_size=1, **{"rank": 2, **changes})
    pipe, family = load_pipeline(recipe.model, device="cpu")
    adapter = train(recipe, pipe=pipe, family=family)
    estimate = plan(recipe).estimates[recipe.method]
    trained = sum(bool(delta.any()) for delta in adapter.deltas.values())
    assert estimate.layers == len(adapter.deltas) >= trained
    assert estimate.parameters == adapter.parameters().trained
    basis, meta = None, adapter.metadata
    if meta.on_basis:
        weights = {name: family.denoiser_of(pipe).get_parameter(f"{name}.weight") for name in adapter.deltas}
        basis = Basis.of(weights, meta.basis_rank, algorithm=meta.algorithm, seed=meta.basis_seed)
    assert set(estimate.file_bytes) == ({"compact", "lora"} if meta.on_basis else {"lora"})
    for spelling, expected in estimate.file_bytes.items():
        path = tmp_path / f"{spelling}.safetensors"
        save_adapter(adapter, path, spelling, basis)
        assert path.stat().st_size == pytest.approx(expected, rel=0.2)


def test_no_weight_is_read(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "configs"
    shutil.copytree(tiny_model, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    whole, bare = (plan(recipe.replace(model=str(folder))) for folder in (tiny_model, copy))
    assert bare.estimates.keys() == {"qrlora", "lora"}
    assert strip(bare) == strip(whole)


def strip(plan: Plan) -> dict[str, Any]:
    """A plan without what differs from one moment or folder to the next."""
    facts = plan.to_dict()
    for estimate in facts["estimates"].values():
        estimate.pop("file_bytes")  # the recipe in the header names the model's folder
    return {name: value for name, value in facts.items() if name not in ("free_bytes", "program_bytes", "recipe")}


def test_blank_conditions_are_those_of_the_encoders(recipe: Recipe) -> None:
    """In name, shape and dtype; masks in value too."""
    prompts = [recipe.text, "a mug"]
    real, family = load_pipeline(recipe.model, device="cpu")
    encoded = family.encode_prompts(real, list(prompts))
    blank = (family.blank_conditions or family.encode_prompts)(load_structure(recipe.model)[0], list(prompts))
    assert {name: (x.shape, x.dtype) for name, x in blank.items()} == {
        name: (x.shape, x.dtype) for name, x in encoded.items()
    }
    assert all(torch.equal(x, encoded[name]) for name, x in blank.items() if not x.is_floating_point())


def test_gradients_of_earlier_passes_wait(tiny_sd3: Path) -> None:
    recipe = Recipe(model=str(tiny_sd3), role="subject", images="not there.png", rank=2, batch_size=1)
    one, four = (plan(recipe.replace(accumulation=n)).estimates["qrlora"] for n in (1, 4))
    assert four.flops == 4 * one.flops
    assert sum(four.memory.values()) == sum(one.memory.values()) + one.memory["gradients"]


def test_optimizers_keep_what_is_said_of_them(tiny_sd3: Path) -> None:
    for name, state in STATE_BYTES.items():
        parameter = nn.Parameter(torch.zeros(1024, 1024))  # so that 8-bit Adam's tables of 2 KiB are nothing
        parameter.grad = torch.randn_like(parameter)
        recipe = Recipe(model=str(tiny_sd3), role="subject", images="a.png", rank=2, optimizer=name)
        try:
            optimizer = optimizer_for(recipe, [parameter])
        except RecipeError:  # its package is optional
            continue
        optimizer.step()
        kept = [x for x in optimizer.state[parameter].values() if isinstance(x, torch.Tensor)]
        assert sum(x.nbytes for x in kept) == pytest.approx(state * parameter.numel(), rel=0.01), name


def test_checkpointing_takes_memory_and_gives_time(tiny_sd3: Path) -> None:
    """And its rehearsal, too, is what happens."""
    recipe = Recipe(model=str(tiny_sd3), role="subject", images="a.png", rank=2, batch_size=4)
    plain, less = (plan(recipe.replace(gradient_checkpointing=on)).estimates["qrlora"] for on in (False, True))
    assert less.memory["activations"] < plain.memory["activations"] / 2 and less.flops > plain.flops
    pipe, family = load_pipeline(recipe.model, device="cpu")
    with adapter_on(pipe.transformer, family, recipe.replace(gradient_checkpointing=True)):
        step, held = rehearse(recipe, pipe, family)
    assert (less.memory["activations"], less.flops) == (held, step.flops)
    assert sum(less.memory[part] for part in ("activations", "working_space", "gradients")) == step.peak


def test_quantised_weights_are_smaller(tiny_sd3: Path) -> None:
    recipe = Recipe(model=str(tiny_sd3), role="subject", images="a.png", rank=2, dtype="bfloat16")
    whole, int8, nf4 = (plan(recipe.replace(quantize=form)).estimates["qrlora"].memory for form in ("", "int8", "nf4"))
    blocks = load_structure(tiny_sd3)[0].transformer.transformer_blocks.modules()
    numbers = sum(module.weight.numel() for module in blocks if type(module) is nn.Linear)
    assert whole["base_weights"] - int8["base_weights"] == numbers
    assert whole["base_weights"] - nf4["base_weights"] == pytest.approx((2 - 0.5 - 1 / 64) * numbers, rel=0.01)
    assert int8["working_space"] > whole["working_space"]


def test_samples_and_preserved_prompts_cost_memory(tiny_sd3: Path) -> None:
    recipe = Recipe(model=str(tiny_sd3), role="subject", images="a.png", rank=2, batch_size=2, resolution=16)
    plain, sampled, preserved = (
        plan(recipe.replace(**changes)).estimates["qrlora"].memory
        for changes in ({}, {"sample_every": 1}, {"preserve": "a lamp"})
    )
    autoencoder = load_structure(tiny_sd3)[0].vae
    assert sampled == plain | {"sampling": sum(p.nbytes for p in autoencoder.parameters())}
    assert preserved["activations"] == pytest.approx(2 * plain["activations"], rel=0.01)  # as many rows again


def test_pictures_count(tiny_sd3: Path, tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    recipe = Recipe(model=str(tiny_sd3), role="subject", images=tmp_path, rank=2, batch_size=1)
    three = plan(recipe).estimates["qrlora"].memory["pictures"]
    none = plan(recipe.replace(images="not there.png")).estimates["qrlora"].memory["pictures"]
    # 4 x 8 x 8 latents, and 78 tokens of 64 numbers beside 64 pooled ones, in float32
    assert three == 3 * none == 3 * 4 * (4 * 8 * 8 + 78 * 64 + 64)


def test_command_line(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--subject", str(tmp_path / "later.png"), "--model", str(tiny_sd3), "--rank", "2", "--batch-size", "1"]
    assert main(["plan", *flags]) == 0
    said = capsys.readouterr().out
    for part in (
        "trained parameters",
        "file, compact",
        "activations",
        "memory while training",
        "operations of a step",
        "lora",
    ):
        assert part in said
    assert main(["plan", *flags, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == "sd3"
    lora, ours = (facts["estimates"][name]["parameters"] for name in ("lora", "qrlora"))
    assert ours < lora
    assert main(["plan", "--subject", "a.png", "--model", str(tmp_path)]) == 2
    assert "model_index.json" in capsys.readouterr().err


def test_what_does_not_fit_is_said(
    tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qrlora.models.training.plan.free_memory", lambda device: 1000)
    assert main(["plan", "--subject", "a.png", "--model", str(tiny_sd3), "--rank", "2"]) == 0
    assert "does not fit" in capsys.readouterr().out
