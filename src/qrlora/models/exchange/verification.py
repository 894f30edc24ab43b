"""Predict how another program reads a LoRA file, by that program's own key rules.

A loader reports an unknown key in a log line at best, so users notice it in the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from qrlora.errors import bounded
from qrlora.method.adapter import Adapter
from qrlora.method.adapter.container import about
from qrlora.method.adapter.record import require
from qrlora.method.basis import Basis
from qrlora.models.exchange.by_diffusers import converted_by_diffusers
from qrlora.models.exchange.names import flattened
from qrlora.models.exchange.tensors import read_tensor_file
from qrlora.models.families import ModelFamily

_PARTS = {".lora_down.weight": "down", ".lora_up.weight": "up", ".alpha": "alpha"}
_ROUNDING = 16
"""Units in the last place of the file's dtype by which a layer may differ from the adapter's."""

Layers = dict[str, dict[str, Tensor]]


def count_matches(path: str | Path, target: str, family: ModelFamily, denoiser: nn.Module) -> int:
    """Return the number of layers of `denoiser` that such a program changes with this file: all layers in the file.

    target "diffusers": by the state-dict conversion of the pipeline's own `load_lora_weights`. "kohya": by the names
    that ComfyUI, Forge and A1111 hold: for SDXL the original UNet's, counted off its blocks; for SD diffusers'.
    Raises AdapterFileError that lists every key no layer answers to, every half pair and every wrong shape or alpha.
    """
    return len(_layers_by(Path(path), target, family, denoiser))


def check_same(
    path: Path, target: str, family: ModelFamily, denoiser: nn.Module, adapter: Adapter, basis: Basis | None
) -> int:
    """Return `count_matches` of a written adapter, after checking that every layer reads back with the same ΔW.

    ΔW is compared by its product with one random vector. A fused layer may add layers, with a ΔW of zero.
    """
    layers = _layers_by(path, target, family, denoiser)
    generator = torch.Generator().manual_seed(0)
    wrong = {name: "left out" for name in adapter.deltas if name not in layers}
    for name, parts in layers.items():
        down, up = parts["down"].flatten(1).float(), parts["up"].flatten(1).float()
        probe = torch.randn(down.shape[1], generator=generator)
        got, size, expected = up @ (down @ probe), float(up.norm() * (down @ probe).norm()), torch.zeros(len(up))
        if name in adapter.deltas:
            q = basis[name].q.cpu() if basis is not None and adapter.metadata.on_basis else None
            expected = adapter.scaling * (adapter.up(name, q).float() @ (adapter.deltas[name].float().cpu() @ probe))
        error = float((got - expected).norm())
        if not error <= _ROUNDING * torch.finfo(parts["down"].dtype).eps * max(size, float(expected.norm())):
            wrong[name] = f"another ΔW, off by {error:.3g} of {float(expected.norm()):.3g}"
    with about(path):
        require(
            not wrong,
            f"{len(wrong)} layers would not load in {target} as they are",
            expected="the adapter's ΔW in each of its layers, and in no other",
            got=wrong,
            remedy="export it in the diffusers form (--for diffusers)",
        )
    return len(adapter.deltas)


def _layers_by(path: Path, target: str, family: ModelFamily, denoiser: nn.Module) -> Layers:
    tensors, _ = read_tensor_file(path)
    with about(path):
        require(target in ("diffusers", "kohya"), "unknown rules", expected="diffusers or kohya", got=target)
        if target == "diffusers":
            layers, unread = _by_diffusers(tensors, family, denoiser)
        else:
            layers, unread = _by_kohya_names(tensors, family, denoiser)
        wrong = {name: fault for name, parts in layers.items() if (fault := _fault(parts, denoiser, name))}
        require(
            bool(layers) and not unread and not wrong,
            f"{len(unread)} keys and {len(wrong)} layers would not load in {target}",
            expected=f"every key to name a layer of {type(denoiser).__name__}, at strength 1",
            got=f"keys: {bounded(sorted(unread) or 'none')}; layers: {bounded(wrong or 'none')}",
            remedy="export it again for the model that it was trained on; a renamed key cannot be found",
        )
    return layers


def _fault(parts: Mapping[str, Tensor], denoiser: nn.Module, name: str) -> str:
    """Return the reason why a layer would not load, or would load at another strength; empty if it loads."""
    if not {"down", "up"} <= set(parts):
        return f"only {sorted(parts)}"
    down, up = parts["down"], parts["up"]
    weight: Any = denoiser.get_submodule(name).weight
    shape = (up.shape[0], *down.shape[1:])
    if tuple(weight.shape) != shape or up.shape[1] != down.shape[0]:
        return f"{tuple(up.shape)} and {tuple(down.shape)} on a weight of {tuple(weight.shape)}"
    alpha = float(parts["alpha"]) if "alpha" in parts else down.shape[0]
    return "" if alpha == down.shape[0] else f"alpha {alpha} of rank {down.shape[0]}"


def _adaptable(denoiser: nn.Module) -> set[str]:
    """Return the names of the layers that take an adapter; one that carries one already is named as without it."""
    modules = denoiser.named_modules()
    return {name.removesuffix(".base_layer") for name, module in modules if isinstance(module, (nn.Linear, nn.Conv2d))}


def _by_diffusers(tensors: Mapping[str, Tensor], family: ModelFamily, denoiser: nn.Module) -> tuple[Layers, list[str]]:
    """Layers as `load_lora_weights` of the family's pipeline sees them, and the keys of the result that it ignores."""
    converted = converted_by_diffusers(tensors, family, denoiser)
    state, alphas = converted if isinstance(converted, tuple) else (converted, {})
    prefix = family.export_prefix
    unread = [key for key in state if not key.startswith(prefix)]
    state = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    if state and "lora_A" not in next(iter(state)):
        state = convert_unet_state_dict_to_peft(state)
    known = _adaptable(denoiser)
    layers: Layers = {}
    for key, tensor in state.items():
        name, _, side = key.removesuffix(".weight").rpartition(".")
        if name in known and side in ("lora_A", "lora_B"):
            layers.setdefault(name, {})["down" if side == "lora_A" else "up"] = tensor
        else:
            unread.append(prefix + key)
    strengths = {float(alpha) for alpha in (alphas or {}).values()}
    ranks = {float(parts["down"].shape[0]) for parts in layers.values() if "down" in parts}
    require(strengths <= ranks, "diffusers would change its strength", expected=f"alpha {ranks}", got=strengths)
    return layers, unread


def _by_kohya_names(
    tensors: Mapping[str, Tensor], family: ModelFamily, denoiser: nn.Module
) -> tuple[Layers, list[str]]:
    names = ((m, m) for m in _adaptable(denoiser)) if family.name == "sd" else original_names(denoiser)
    known = {flattened(name): module for module, name in names}
    layers: Layers = {}
    unread = []
    for key, tensor in tensors.items():
        ending = next((part for part in _PARTS if key.endswith(part)), "")
        module = known.get(key.removesuffix(ending))
        if not ending or module is None:
            unread.append(key)
        else:
            layers.setdefault(module, {})[_PARTS[ending]] = tensor
    return layers, unread


def original_names(unet: Any) -> Iterator[tuple[str, str]]:
    """Yield (diffusers name, original name) of every linear and convolution layer, by walking the blocks and counting.

    Made without the arithmetic of names.py, so that each checks the other.
    """
    blocks: list[tuple[str, str]] = [("conv_in", "input_blocks.0.0"), ("conv_out", "out.2")]
    for ours, theirs in (("time_embedding", "time_embed"), ("add_embedding", "label_emb.0")):
        blocks += [(f"{ours}.linear_1", f"{theirs}.0"), (f"{ours}.linear_2", f"{theirs}.2")]
    place = 1
    for b, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            blocks += _layer(block, f"down_blocks.{b}", j, f"input_blocks.{place}")
            place += 1
        if getattr(block, "downsamplers", None):
            blocks.append((f"down_blocks.{b}.downsamplers.0.conv", f"input_blocks.{place}.0.op"))
            place += 1
    blocks += [("mid_block.resnets.0", "middle_block.0"), ("mid_block.attentions.0", "middle_block.1")]
    blocks += [("mid_block.resnets.1", "middle_block.2")]
    place = 0
    for b, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            blocks += _layer(block, f"up_blocks.{b}", j, f"output_blocks.{place}")
            place += 1
        if getattr(block, "upsamplers", None):
            last = 2 if getattr(block, "attentions", None) else 1
            blocks.append((f"up_blocks.{b}.upsamplers.0.conv", f"output_blocks.{place - 1}.{last}.conv"))
    owners = dict(blocks)
    for name in _adaptable(unet):
        owner = next((prefix for prefix in owners if name == prefix or name.startswith(f"{prefix}.")), None)
        if owner is not None:
            yield name, owners[owner] + _rest(name.removeprefix(owner))


def _layer(block: Any, ours: str, j: int, theirs: str) -> list[tuple[str, str]]:
    attending = getattr(block, "attentions", None)
    found = [(f"{ours}.resnets.{j}", f"{theirs}.0")]
    return found + ([(f"{ours}.attentions.{j}", f"{theirs}.1")] if attending else [])


def _rest(rest: str) -> str:
    """Inside a residual layer the original counts positions; everything else is called the same."""
    positions = {
        ".conv1": ".in_layers.2",
        ".conv2": ".out_layers.3",
        ".time_emb_proj": ".emb_layers.1",
        ".conv_shortcut": ".skip_connection",
    }
    return positions.get(rest, rest)
