"""Estimate memory and files of a run before anything heavy is loaded.

The base model is made from its configs on torch's meta device, the adapter is put on it as training does, and one step
is rehearsed there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Any

import psutil
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils._pytree import tree_iter

from qrlora.errors import DataError
from qrlora.method.adapter import AdapterMetadata
from qrlora.method.adapter.file import tensor_shapes
from qrlora.method.basis import clipped_rank
from qrlora.method.tuner import QRLoraConfig, QRLoraLayer, resolve_columns
from qrlora.method.tuner.factors import TrainedColumns
from qrlora.models.families import ModelFamily, default_device, free_memory, load_structure
from qrlora.models.training.attach import ADAPTER_NAME, adapter_on
from qrlora.models.training.batches import family_options
from qrlora.models.training.optimizers import STATE_BYTES
from qrlora.models.training.pictures import views
from qrlora.models.training.placement import module_bytes, stored_bytes
from qrlora.models.training.recipe import Recipe
from qrlora.models.training.rehearsal import Rehearsal
from qrlora.models.training.sources import find_pictures

PLAIN_LORA: dict[str, Any] = {"method": "lora", "train_basis": False, "space": None, "space_remainder": 0.0}
FLOAT = 4
"""Bytes of a float32 number, which is what is trained and written."""


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of training one adapter.

    Attributes:
        layers, parameters: adapted layers, and numbers trained in all of them.
        file_bytes: spelling -> size of the adapter's file.
        memory: part -> bytes on the device while training; together, and with the plan's `program_bytes`, the peak.
        flops: of one optimiser step, multiplications and additions counted apart.
    """

    layers: int
    parameters: int
    file_bytes: dict[str, int]
    memory: dict[str, int]
    flops: int


@dataclass(frozen=True)
class Plan:
    """Estimates of a recipe and of plain LoRA at its rank and targets, by method.

    Attributes:
        family, resolution: of the base model, and of the pictures.
        device, free_bytes: what training will run on, and how much memory it has to give now.
        program_bytes: what Python and the libraries themselves take of the device's memory, if it is the computer's:
            as much as while the plan is made.
        loading_bytes: what is on the device besides while the pictures are encoded: weights, and the largest
            picture's activations in the autoencoder. On a CPU the most that it can be: weights that are stored in
            the recipe's dtype are mapped from their files and come to memory as they are used.
        host_bytes: weights of the whole pipeline, which are loaded to the computer's own memory first.
    """

    recipe: Recipe
    family: str
    resolution: int
    device: str
    free_bytes: int
    program_bytes: int
    loading_bytes: int
    host_bytes: int
    estimates: dict[str, Estimate]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        rows = {name: asdict(estimate) for name, estimate in self.estimates.items()}
        return {**vars(self), "recipe": self.recipe.record(), "estimates": rows}


def plan(recipe: Recipe) -> Plan:
    """Estimate what training by `recipe` will take. Nothing is trained and no weight is read.

    Args:
        recipe: its pictures need not exist; those that do are counted.

    Raises:
        ModelError: the base model's configs cannot be found or read.
        RecipeError, TunerError: no such targets or options, or a rank of which no target has a column.
        DataError: a caption longer than the model reads.
    """
    pipe, family = load_structure(recipe.model, getattr(torch, recipe.dtype))
    device = default_device()
    methods = {recipe.method: recipe, "lora": recipe.replace(**PLAIN_LORA)}
    return Plan(
        recipe=recipe,
        family=family.name,
        resolution=recipe.resolution or family.resolution(pipe),
        device=_name(device),
        free_bytes=free_memory(device),
        program_bytes=psutil.Process().memory_info().rss if device.type == "cpu" else 0,
        loading_bytes=_loading_bytes(recipe, pipe, family, device),
        host_bytes=sum(map(module_bytes, _networks(pipe).values())),
        estimates={name: _estimate(one, pipe, family) for name, one in methods.items()},
    )


def _reserve_basis(layer: QRLoraLayer) -> None:
    """Give Q and R their sizes where the base weight is on the meta device, to count memory by.

    Q has the dtype of the base weight, which is also what ΔR has when it is put on and Q is settled for good.
    """
    weight = layer.base_weight()
    for name, columns in layer.own_adapters().items():
        columns.basis.q = weight.new_empty(weight.shape[0], clipped_rank(weight.shape, columns.basis.key[0]))
        size = len(columns.columns), weight[0].numel()
        trained = isinstance(columns, TrainedColumns)
        layer.delta(name).fill(weight.device, weight.new_empty(size, dtype=torch.float32) if trained else None)
    layer.basis_pending = False  # so that the forward pass is the one that training takes


def _estimate(recipe: Recipe, pipe: Any, family: ModelFamily) -> Estimate:
    """Estimate one method: its adapter on the meta device, and one step there."""
    denoiser: Any = family.denoiser_of(pipe).requires_grad_(False)
    plain, stored = module_bytes(denoiser), stored_bytes(denoiser, recipe.quantize)
    with adapter_on(denoiser, family, recipe) as parameters:
        layers: dict[str, Any] = {
            name: layer for name, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)
        }
        shapes = {name: tuple(layer.get_base_layer().weight.shape) for name, layer in layers.items()}
        metadata = _metadata(recipe, denoiser.peft_config[ADAPTER_NAME])
        for layer in layers.values():
            if isinstance(layer, QRLoraLayer):
                _reserve_basis(layer)
        trained = sum(parameter.nbytes for parameter in parameters.values())
        basis = module_bytes(denoiser) - plain - trained
        step, held = rehearse(recipe, pipe, family)
    unpacked = max(map(math.prod, shapes.values())) * denoiser.dtype.itemsize if recipe.quantize else 0  # one at a time
    waiting = trained if recipe.accumulation > 1 else 0  # gradients of the passes before wait through the last
    return Estimate(
        layers=len(layers),
        parameters=trained // FLOAT
        - (0 if recipe.space and not recipe.space_remainder else _outside(metadata, shapes)),
        file_bytes={
            spelling: _file_bytes(recipe, metadata, shapes, spelling)
            for spelling in ("compact", "lora")
            if metadata.on_basis or spelling == "lora"
        },
        memory={
            "base_weights": stored,
            "trained_parameters": trained,
            "basis": basis,
            "gradients": trained,
            "optimizer_state": int(STATE_BYTES[recipe.optimizer] * trained / FLOAT),
            "activations": held,
            "working_space": max(0, step.peak + waiting - held - trained) + unpacked,
            "pictures": _pictures_bytes(recipe, pipe, family, default_device()),
            "sampling": _sampling_bytes(recipe, pipe, family),
        },
        flops=recipe.accumulation * step.flops,
    )


def rehearse(recipe: Recipe, pipe: Any, family: ModelFamily) -> tuple[Rehearsal, int]:
    """Do one forward and backward pass of training, on a pipeline without weights or with them; return its record, and
    the bytes that are held between the two."""
    denoiser, scheduler = family.denoiser_of(pipe), family.training_scheduler(pipe)
    options = family_options(recipe, family)[0]
    batches = [_batch(recipe, pipe, family, recipe.batch_size, recipe.resolution)]
    if recipe.preserve:  # at its largest: guidance makes two rows of a prompt
        rows = 2 * min(len(recipe.preserve), max(1, recipe.batch_size // 2))
        batches.append(_batch(recipe, pipe, family, rows, None))
    there = [*denoiser.parameters(), *denoiser.buffers(), *tree_iter(batches)]
    with Rehearsal(there) as rehearsal:
        loss = reduce(add, [family.loss(denoiser, scheduler, *batch, **options) for batch in batches])
        held = rehearsal.live
        loss.backward()
    denoiser.zero_grad()
    return rehearsal, held


def _batch(recipe: Recipe, pipe: Any, family: ModelFamily, rows: int, side: int | None) -> tuple[Any, ...]:
    """Latents, noise, timesteps and conditions of one forward pass; side: the model's own if None."""
    side = side or family.resolution(pipe)
    latents = family.encode_images(pipe, torch.zeros(rows, 3, side, side, device=pipe.device)).float()
    encode = family.blank_conditions if pipe.device.type == "meta" else None
    conditions = (encode or family.encode_prompts)(pipe, [recipe.text] * rows)
    timesteps = family.objective.timesteps(family.training_scheduler(pipe), rows, torch.Generator())
    return latents, torch.zeros_like(latents), timesteps.to(pipe.device), dict(conditions)


def _metadata(recipe: Recipe, config: Any) -> AdapterMetadata:
    """Return the metadata, without its texts, that the adapter will have."""
    if not isinstance(config, QRLoraConfig):
        return AdapterMetadata("lora", recipe.rank, recipe.rank)
    columns = resolve_columns(config.columns, config.r, config.rank_of_basis)
    fields: dict[str, Any] = {"basis_rank": config.rank_of_basis, "columns": columns, "triangular": config.triangular}
    if config.train_basis:  # written as the LoRA of twice the rank that it is equal to
        return AdapterMetadata("qrlora_train_basis", 2 * recipe.rank, recipe.rank, **fields)
    return AdapterMetadata("qrlora", recipe.rank, recipe.rank, **fields)


def _outside(metadata: AdapterMetadata, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the entries of all ΔR that are kept at zero."""
    if not metadata.triangular:
        return 0
    return sum(column for shape in shapes.values() for column in metadata.columns_in(shape))


def _file_bytes(recipe: Recipe, metadata: AdapterMetadata, shapes: Mapping[str, tuple[int, ...]], spelling: str) -> int:
    """Size of a file: its numbers, and a header that names every tensor, layer with digest, and recipe field."""
    tensors = tensor_shapes(metadata, shapes, spelling)
    numbers = FLOAT * sum(map(math.prod, tensors.values()))
    entries = {key: {"dtype": "F32", "shape": shape, "data_offsets": [numbers] * 2} for key, shape in tensors.items()}
    layers = {name: [shape, "0" * 64 if metadata.on_basis else ""] for name, shape in shapes.items()}
    return numbers + len(json.dumps([entries, layers, recipe.record()], separators=(",", ":")))


def _pictures_bytes(recipe: Recipe, pipe: Any, family: ModelFamily, device: torch.device) -> int:
    """Return the bytes of latents and conditions: of all pictures in main memory, where they wait; on a GPU of a
    batch."""
    try:
        shown = len(find_pictures(recipe.images)) * len(views(recipe.flip, recipe.shift))
        count = shown if device.type == "cpu" else recipe.batch_size
    except DataError:  # they may be added later
        count = 1
    latents, _, _, conditions = _batch(recipe, pipe, family, 1, recipe.resolution)
    return count * sum(tensor.nbytes for tensor in (latents, *conditions.values()))


def _networks(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _loading_bytes(recipe: Recipe, pipe: Any, family: ModelFamily, device: torch.device) -> int:
    """Return the bytes on the device before the encoders leave it; a GPU gets the denoiser after that, if it can."""
    networks = _networks(pipe)
    denoiser = module_bytes(networks.pop(family.denoiser))
    there = denoiser if recipe.preserve or device.type == "cpu" else 0
    if not (recipe.offload and device.type != "cpu"):
        side = recipe.resolution or family.resolution(pipe)
        picture = torch.zeros(1, 3, side, side, device=pipe.device)
        with torch.no_grad(), Rehearsal([picture]) as encoding:
            family.encode_images(pipe, picture)
        there += sum(map(module_bytes, networks.values())) + encoding.peak
    return there


def _sampling_bytes(recipe: Recipe, pipe: Any, family: ModelFamily) -> int:
    """Return the bytes that stay for sample sheets: the autoencoder, and whatever else is no text encoder."""
    if not recipe.sample_every:
        return 0
    others = {name: part for name, part in _networks(pipe).items() if not name.startswith("text_encoder")}
    return sum(module_bytes(part) for name, part in others.items() if name != family.denoiser)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
