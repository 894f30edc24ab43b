"""Checkpoints: the state of a run as one safetensors file, `<output>.checkpoints/step-000100.safetensors`.

Tensors `parameter.<name>` and `optimizer.<index>.<key>`, with more keys where an optimiser nests its state; metadata
`step`, `run` (the record), `loss_scale` and `optimizer` (the numbers among the optimiser's state and in its parameter
group, where Prodigy and schedule-free keep theirs), all JSON, and a digest of it all. Random numbers need no state:
they follow from seed and step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qrlora._files import write_atomically
from qrlora._reading import parsing
from qrlora._tensor_file import DIGEST, note, packed, parse_json, read
from qrlora.errors import RecipeError, TensorFileError, bounded
from qrlora.models.training.outputs import newest, path_of
from qrlora.models.training.recipe import Recipe

_METADATA = ("step", "run", "loss_scale", "optimizer")

Record = dict[str, Any]
"""Fields that a checkpoint and the run that continues it must agree on, as JSON values."""


def save(
    recipe: Recipe,
    record: Record,
    step: int,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_scale: float = 1.0,
    rescue: bool = False,
) -> Path:
    """Write the state after `step` steps, whole or not at all, then drop the oldest beyond `checkpoints_kept`.

    rescue: where it cannot be written, write it elsewhere; the OutputError says where.
    """
    tensors = {f"parameter.{name}": parameter.data for name, parameter in parameters.items()}
    state = dict(_leaves(optimizer.state_dict()["state"]))
    tensors |= {f"optimizer.{key}": value for key, value in state.items() if isinstance(value, torch.Tensor)}
    numbers = {
        "state": {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)},
        "group": {key: value for key, value in optimizer.param_groups[0].items() if isinstance(value, (int, float))},
    }
    metadata = {"step": step, "run": record, "loss_scale": loss_scale, "optimizer": numbers}
    path = path_of(recipe, step)
    whole = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    words = {key: json.dumps(value) for key, value in metadata.items()}
    write_atomically(path, packed(whole, words), rescue=rescue, make_folder=True)
    others = sorted(set(path.parent.glob("step-*.safetensors")) - {path})
    for old in others[: max(0, len(others) + 1 - recipe.checkpoints_kept)]:
        old.unlink(missing_ok=True)
    return path


def _leaves(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings."""
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def load(
    recipe: Recipe, record: Record, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Put the newest checkpoint's state in place; returns the steps it has behind it, and its loss scale.

    Raises:
        RecipeError: it is damaged, or of another run (lists the fields that differ).
    """
    path = newest(recipe)
    assert path is not None, "held() looked"
    tensors, metadata = _read(path, sum(parameter.nbytes for parameter in parameters.values()))
    step, run, scale, numbers = (metadata[key] for key in _METADATA)
    if type(step) is not int or step < 0 or not isinstance(run, dict) or not 0 < scale < math.inf:
        raise _damaged(path, "step, run or loss_scale are none")
    _same_run(path, run, record)
    _check_shapes(path, parameters, tensors)
    with parsing(f"damaged checkpoint {path}", RecipeError, remedy="delete it, and resume again"):
        _restore(tensors, numbers, parameters, optimizer)
    return step, scale


def _restore(
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, Any],
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Put parameters and the optimiser's state in place; any exception means that the file is damaged."""
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors[f"parameter.{name}"])
    state: dict[int, Any] = {}
    leaves = {name.removeprefix("optimizer."): tensors[name] for name in tensors if name.startswith("optimizer.")}
    for key, value in (leaves | numbers["state"]).items():
        index, *path_within, last = key.split(".")
        nested = state.setdefault(int(index), {})
        for part in path_within:
            nested = nested.setdefault(part, {})
        nested[last] = value
    group = optimizer.state_dict()["param_groups"][0] | numbers["group"]
    optimizer.load_state_dict({"state": state, "param_groups": [group]})


def _read(path: Path, size: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata of a checkpoint of `size` bytes of parameters; RecipeError if it is damaged."""
    try:
        tensors, words = read(path, {}, most_bytes=max(2**30, 64 * size))
        if unknown := sorted(set(words) - {DIGEST, *_METADATA}):  # the digest under a damaged name is no older file
            raise _damaged(path, f"unknown metadata {unknown}")
        if DIGEST not in words:
            note(f"{path}: written by an older version, without a digest: damage to it cannot be found")
        return tensors, {key: parse_json(words[key], key, finite=False) for key in _METADATA}  # Prodigy's growth is inf
    except (OSError, TensorFileError, KeyError) as error:
        raise _damaged(path, getattr(error, "what", error)) from error


def _damaged(path: Path, why: object) -> RecipeError:
    remedy = "delete it, and resume again from the one before it (`checkpoints_kept`), or start without resume"
    return RecipeError(f"damaged checkpoint {path}", expected="the state as it was saved", got=why, remedy=remedy)


def _check_shapes(path: Path, parameters: dict[str, nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    found = {name: getattr(tensors.get(f"parameter.{name}"), "shape", None) for name in parameters}
    wrong = {name: shape for name, shape in found.items() if shape != parameters[name].shape}
    if wrong:
        raise _damaged(path, f"other shapes of {bounded(wrong)}")


def _same_run(path: Path, run: Record, now: Record) -> None:
    differ = sorted(key for key in {*run, *now} if run.get(key) != now.get(key))
    if differ:
        raise RecipeError(
            f"{path} belongs to another run",
            expected={key: run.get(key) for key in differ},
            got={key: now.get(key) for key in differ},
            remedy="resume with the recipe it was started with, or start anew without resume",
        )
