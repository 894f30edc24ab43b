"""The optimisers: each resumes with its whole state, and schedule-free AdamW gives its average and goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from PIL import Image
from torch import nn

from qrlora._tensor_file import DIGEST
from qrlora.errors import RecipeError
from qrlora.models.training import checkpoint, outputs
from qrlora.models.training.loop import train
from qrlora.models.training.optimizers import PACKAGES, evaluated, optimizer_for
from qrlora.models.training.recipe import Recipe

OPTIMIZERS = ["adamw", *PACKAGES]


@pytest.fixture(params=OPTIMIZERS)
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> Recipe:
    if request.param in PACKAGES:
        pytest.importorskip(PACKAGES[request.param])
    fields = {"role": "style", "images": "a.png", "output": tmp_path / "a.safetensors", "optimizer": request.param}
    return Recipe.of(fields)


def quadratic(recipe: Recipe, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps towards a fixed matrix. Large enough for 8-bit states, which small ones do not get."""
    target = torch.linspace(-1, 1, parameter.numel()).view_as(parameter)
    for _ in range(steps):
        (parameter - target).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def start(recipe: Recipe) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.zeros(64, 256))
    return parameter, optimizer_for(recipe, [parameter])


def content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and metadata of a checkpoint, to be compared; metadata has no order."""
    with safetensors.safe_open(path, framework="pt") as stream:
        tensors = {key: (stream.get_tensor(key).dtype, stream.get_tensor(key).tolist()) for key in stream.keys()}  # noqa: SIM118
        return tensors, {key: json.loads(value) for key, value in stream.metadata().items() if key != DIGEST}


def test_resuming_restores_the_whole_state(recipe: Recipe) -> None:
    """Tensors, nested ones and numbers: what follows is the same, bit for bit, and so is what is saved then."""
    whole, optimizer = start(recipe)
    quadratic(recipe, whole, optimizer, 5)
    outputs.folder(recipe).parent.mkdir(exist_ok=True)
    checkpoint.save(recipe, {}, 5, {"p": whole}, optimizer, loss_scale=8.0)
    quadratic(recipe, whole, optimizer, 5)
    resumed, other = start(recipe)
    assert checkpoint.load(recipe, {}, {"p": resumed}, other) == (5, 8.0)
    quadratic(recipe, resumed, other, 5)
    assert torch.equal(resumed, whole) and resumed.any()
    saved = [content(checkpoint.save(recipe, {}, 10, {"p": p}, o)) for p, o in [(whole, optimizer), (resumed, other)]]
    assert saved[0] == saved[1]


def test_evaluating_changes_nothing_that_trains(recipe: Recipe) -> None:
    parameter, optimizer = start(recipe)
    quadratic(recipe, parameter, optimizer, 5)
    before = parameter.detach().clone()
    with evaluated(optimizer):
        assert torch.equal(parameter, before) == (recipe.optimizer != "schedulefree")
    assert torch.equal(parameter, before)
    quadratic(recipe, parameter, optimizer, 1)  # and it goes on


def test_a_resumed_run_is_the_uninterrupted_run(recipe: Recipe, tiny_sd3: Path, tmp_path: Path) -> None:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    changes: dict[str, Any] = {"model": str(tiny_sd3), "images": [tmp_path / "mug.png"], "rank": 2, "batch_size": 2}
    recipe = recipe.replace(**changes, steps=6, warmup_steps=2)
    losses: list[float] = []
    whole = train(recipe, progress=lambda p: losses.append(p.loss))
    train(recipe.replace(steps=3, checkpoint_every=3))
    resumed = train(recipe, resume=True)
    assert all(torch.equal(whole.deltas[name], resumed.deltas[name]) for name in whole.deltas)
    assert any(delta.any() for delta in whole.deltas.values()) and all(torch.isfinite(torch.tensor(losses)))


def test_states_are_those_of_the_optimizer(recipe: Recipe) -> None:
    """That each name stands for what it says."""
    parameter, optimizer = start(recipe)
    quadratic(recipe, parameter, optimizer, 10)
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    facts = {
        "adamw": "exp_avg" in state,
        "adamw8bit": "state1" in state and state["state1"].dtype == torch.uint8,
        "prodigy": "s" in state and group["d"] > 10 * group["d0"] and group["lr"] == 1.0,
        "schedulefree": "z" in state and group["weight_sum"] > 0,
    }
    assert facts[recipe.optimizer]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_the_way_to_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(RecipeError, match=f"pip install {PACKAGES[name]}"):
        optimizer_for(
            Recipe.of({"role": "style", "images": "a.png", "optimizer": name}), [nn.Parameter(torch.zeros(1))]
        )
