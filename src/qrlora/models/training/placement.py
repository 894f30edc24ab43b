"""Place the parts of a base model for training: device, dtype, quantisation.

The encoders are on the device first, alone, and leave; then comes the denoiser: whole, quantised, or divided among the
processes. The adapter is attached before that, so its basis is that of the weights as they were read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from qrlora._files import check_room
from qrlora.models.families import ModelFamily, refuse_if_larger
from qrlora.models.training.optimizers import STATE_BYTES, needed
from qrlora.models.training.recipe import Recipe

BYTES = {"int8": 1.0, "nf4": 0.5 + 1 / 64}
"""Bytes of a weight in each form that `quantize` names, with its share of a scale; int8 has one for a whole row."""


def check_fits(pipe: Any, family: ModelFamily, recipe: Recipe, device: torch.device, processes: int) -> None:
    """Raise ModelError if the weights alone are more than the device has free: of the encoders, then of the denoiser.

    On the CPU there is nothing to check: the pipeline is loaded there already.
    """
    if device.type == "cpu":
        return
    denoiser: Any = family.denoiser_of(pipe).requires_grad_(False)  # only what is frozen will be quantised
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module) and part is not denoiser]
    encoders = 0 if recipe.offload else sum(map(module_bytes, modules))
    own = stored_bytes(denoiser, recipe.quantize) / (processes if recipe.fsdp else 1)
    together = [encoders + own] if recipe.preserve else [encoders, own]
    refuse_if_larger(int(max(together)), device, recipe.model)


def check_disk(recipe: Recipe, shapes: Iterable[tuple[int, ...]]) -> None:
    """Raise OutputError unless there is room for the adapter of layers of these shapes, and for its checkpoints."""
    if recipe.output is None:
        return
    sides = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    rows, pairs = (recipe.rank * sum(numbers) for numbers in ([s[1] for s in sides], [sum(s) for s in sides]))
    alone = recipe.method == "qrlora" and not recipe.train_basis
    adapter = 4 * (rows if alone else 2 * pairs if recipe.train_basis else pairs)  # float32; a trained basis is a pair
    state = int((4 + STATE_BYTES[recipe.optimizer]) * (rows if alone else pairs))
    together = recipe.checkpoints_kept + 1 if recipe.checkpoint_every else 1  # an interrupted run writes one
    check_room(recipe.output, adapter + together * state)


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


@contextlib.contextmanager
def encoders_alone(pipe: Any, family: ModelFamily, device: torch.device | str) -> Iterator[None]:
    """Put text encoders and autoencoder on the device, and take the denoiser out of the pipeline, for the duration.

    The denoiser has to be out because a pipeline reads its device off its first module; encoding needs its config only.
    """
    denoiser: Any = family.denoiser_of(pipe)
    components = vars(pipe)  # setattr would enter the stand-in into the pipeline's configuration
    components[family.denoiser] = SimpleNamespace(config=denoiser.config, dtype=denoiser.dtype)
    try:
        pipe.to(device)
        yield
    finally:
        components[family.denoiser] = denoiser


def settle(denoiser: nn.Module, recipe: Recipe, device: torch.device, trained: Collection[nn.Parameter]) -> None:
    """Bring the denoiser, with its adapter on, to the device in the form that the recipe asks for."""
    if recipe.quantize:
        quantise(denoiser, recipe.quantize, device)
    if recipe.fsdp:
        shard(denoiser, device, set(trained))
    denoiser.to(device)


def quantise(denoiser: nn.Module, form: str, device: torch.device) -> None:
    """Store the frozen Linear weights of the denoiser's blocks in 8 or 4 bits, one by one on their way to the device.

    Layers outside the blocks (embedders, last projection) are small and sensitive, so they keep their precision.

    Args:
        form: `int8`, a scale for each output (torchao), or `nf4`, a scale for each 64 weights, the scales in 8 bits
            themselves (bitsandbytes; Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        RecipeError: the package of that form is not installed.
    """
    package = needed(f"quantize = {form!r}", {"int8": "torchao", "nf4": "bitsandbytes"}[form])
    for block in blocks(denoiser):
        if form == "int8":
            scheme = package.quantization.Int8WeightOnlyConfig()
            package.quantization.quantize_(block, scheme, lambda module, _: _frozen_linear(module), device)
            continue
        for parent in list(block.modules()):
            for name, child in parent.named_children():
                if _frozen_linear(child):
                    setattr(parent, name, _nf4(package, child, device))


def stored_bytes(denoiser: nn.Module, form: str) -> int:
    """Return the bytes of the denoiser's own weights, its Linear weights in that form (as they are if it is empty)."""
    linear = {module for block in blocks(denoiser) for module in block.modules() if _frozen_linear(module)}
    quantised: Any = {module.weight for module in linear} if form else set()
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    return sum(int(x.numel() * BYTES[form]) if x in quantised else x.nbytes for x in tensors)


def _nf4(bitsandbytes: Any, linear: Any, device: torch.device) -> nn.Module:
    weight = linear.weight
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bitsandbytes.nn.Params4bit(weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to(device)  # on arrival it is quantised


def _frozen_linear(module: nn.Module) -> bool:
    """A Linear of the base model: ΔR is a class of its own, and a plain LoRA's factors train."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not module.weight.requires_grad


def shard(denoiser: nn.Module, device: torch.device, trained: set[nn.Parameter]) -> None:
    """Divide the frozen weights among the processes, block by block (FSDP2); each is whole only while its block runs.

    Trained parameters are not divided: they are small, and the loop sums their gradients.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in [*reversed(blocks(denoiser)), denoiser]:  # a block inside another comes first
        fully_shard(block, mesh=mesh, ignored_params=trained)


def blocks(denoiser: Any) -> list[nn.Module]:
    """Return the modules that diffusers declares as units of this model, outer before inner."""
    names = set(denoiser._no_split_modules)
    return [module for module in denoiser.modules() if type(module).__name__ in names]
