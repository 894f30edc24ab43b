"""Checkpoints: the state of a run as one safetensors file, `<output>.checkpoints/step-000100.safetensors`.

Tensors `parameter.<name>` and `optimizer.<index>.<key>`; metadata `step` and `run` (the record, JSON).
Random numbers need no state: they follow from seed and step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from qrlora.errors import RecipeError
from qrlora.files import write_atomically
from qrlora.training.recipe import Recipe

Record = dict[str, Any]
"""What a checkpoint and the run that continues it must agree on, as JSON values."""


def folder(recipe: Recipe) -> Path:
    """Where the checkpoints of a run with an output lie."""
    assert recipe.output is not None
    return recipe.output.with_suffix(".checkpoints")


def newest(recipe: Recipe) -> Path | None:
    """The checkpoint of the most steps, if there is any."""
    if recipe.output is None:
        return None
    return max(folder(recipe).glob("step-*.safetensors"), default=None, key=lambda path: path.name)


def save(
    recipe: Recipe,
    record: Record,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Path:
    """Write the state after `step` steps, whole or not at all, then drop the oldest beyond `checkpoints_kept`."""
    tensors = {f"parameter.{name}": parameter.data for name, parameter in parameters.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items()}
    metadata = {"step": str(step), "run": json.dumps(record)}
    path = folder(recipe) / f"step-{step:06d}.safetensors"
    path.parent.mkdir(exist_ok=True)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, safetensors.torch.save(whole, metadata=metadata))
    others = sorted(set(path.parent.glob("step-*.safetensors")) - {path})
    for old in others[: max(0, len(others) + 1 - recipe.checkpoints_kept)]:
        old.unlink()
    return path


def load(recipe: Recipe, record: Record, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Put the newest checkpoint's state in place; returns the steps it has behind it.

    Raises:
        RecipeError: no output, no checkpoint, a damaged one, or one of another run (lists the fields that differ).
    """
    path = newest(recipe)
    if path is None:
        raise RecipeError(
            "nothing to resume",
            expected=f"a checkpoint in {folder(recipe)}" if recipe.output else "a recipe with an output",
            got="none",
            remedy="start without resume",
        )
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (no iterator)
        step, run = int(metadata["step"]), json.loads(metadata["run"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RecipeError(f"damaged checkpoint {path}", got=error, remedy="delete it, and resume again") from error
    _same_run(path, run, record)
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"parameter.{name}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def _same_run(path: Path, run: Record, now: Record) -> None:
    differ = sorted(key for key in {*run, *now} if run.get(key) != now.get(key))
    if differ:
        raise RecipeError(
            f"{path} belongs to another run",
            expected={key: run.get(key) for key in differ},
            got={key: now.get(key) for key in differ},
            remedy="resume with the recipe it was started with, or start anew without resume",
        )
