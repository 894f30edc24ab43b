"""The forms that export writes: which program reads which, and the tensors of those that are not adapter files of ours.

    diffusers  transformer.<layer>.lora_A.weight, or unet.
    kohya      lora_unet_<layer, flattened>.lora_down.weight with .alpha: kohya's sd-scripts and musubi-tuner
    original   diffusion_model.<layer>.lora_A.weight: ai-toolkit, and ComfyUI for the newer families

In kohya and original form the FLUX layers have their original names, under which q, k and v are one layer. It takes the
sum of their ranks, each part's columns over its own rows: the same ΔW, with zeros between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.method.adapter import Adapter
from qrlora.method.basis import Basis
from qrlora.models.exchange.originals import ORIGINALS, Original, Shapes

TARGETS = ("diffusers", "kohya", "original")
_UNETS = {"sd": "kohya", "sdxl": "kohya"}
_PREFIXED = {"flux2-klein": "original", "qwen-image": "original", "z-image": "original"}
BEST: dict[str, dict[str, str]] = {
    "comfyui": _UNETS | _PREFIXED,
    "ai-toolkit": _UNETS | _PREFIXED,
    "forge": _UNETS,
    "a1111": _UNETS,
}
"""Program -> family -> the form that it reads best; diffusers' for the families that are not named."""
FAMILIES_OF = {
    "kohya": ("sd", "sdxl", "flux", "flux2-klein", "qwen-image", "z-image"),
    "original": ("flux2-klein", "qwen-image", "z-image"),
}
"""Form -> the families of which diffusers reads it, so that what is written can be checked."""
_FUSED = ("flux", "flux2-klein")
Pairs = dict[str, tuple[Tensor, Tensor]]


def target_of(program: str, family: str) -> str:
    """Return the form that a program reads best; a form's own name stays as it is."""
    return program if program in TARGETS else BEST[program].get(family, "diffusers")


def is_adapter_file(target: str, family: str) -> bool:
    """Return True if the form has a pair for each layer of the adapter under names that its file can record."""
    return target == "diffusers" or (target == "kohya" and family not in _FUSED)


def tensors_of(adapter: Adapter, target: str, family: str, shapes: Shapes, basis: Basis | None) -> dict[str, Tensor]:
    """Return a file's tensors in kohya or original form, alpha folded in. `shapes` are those of the model's layers.

    Raises MismatchError if a layer has no original name.
    """
    pairs = {layer: _pair(adapter, layer, basis) for layer in adapter.deltas}
    if family in _FUSED:
        pairs = _by_original(pairs, ORIGINALS[family], shapes)
    tensors = {}
    for name, (down, up) in pairs.items():
        if target == "original":
            tensors[f"diffusion_model.{name}.lora_A.weight"] = down
            tensors[f"diffusion_model.{name}.lora_B.weight"] = up
        else:
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = down, up
            tensors[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}


def _pair(adapter: Adapter, layer: str, basis: Basis | None) -> tuple[Tensor, Tensor]:
    down = adapter.deltas[layer]
    up = adapter.up(layer, basis[layer].q if basis is not None and adapter.metadata.on_basis else None)
    if adapter.scaling != 1.0:
        down = (adapter.scaling * down.float()).to(down.dtype)
    return down.cpu(), up.to(down.dtype).cpu()


def _by_original(pairs: Pairs, rows: tuple[Original, ...], shapes: Shapes) -> Pairs:
    found: Pairs = {}
    left = set(pairs)
    for row in rows:
        numbers = {row.number_of(layer) for layer in pairs} - {None}
        for number in sorted(map(str, numbers)) if row.written else ():
            layers = [layer.replace("#", number) for layer in row.layers]
            name = row.name.replace("#", number)
            found[name] = _stacked([pairs.get(layer) for layer in layers], [shapes[layer][0] for layer in layers])
            if row.swapped and shapes[layers[0]][0] == 2 * shapes[layers[0]][1]:
                down, up = found[name]
                found[name] = down, up.roll(len(up) // 2, 0)
            left -= set(layers)
    if left:
        raise MismatchError(
            f"{len(left)} of {len(pairs)} layers have no name in the original code",
            expected="layers of the published transformer",
            got=sorted(left),
            remedy="export it in the diffusers form (--for diffusers)",
        )
    return found


def _stacked(parts: list[tuple[Tensor, Tensor] | None], heights: list[int]) -> tuple[Tensor, Tensor]:
    """Stack the pairs of layers that are rows of one layer: all downs, and an up in which each part has its own
    rows."""
    there = [part for part in parts if part is not None]
    down = torch.cat([part[0] for part in there])
    up = down.new_zeros(sum(heights), len(down))
    row = column = 0
    for part, height in zip(parts, heights, strict=True):
        if part is not None:
            up[row : row + height, column : column + part[1].shape[1]] = part[1]
            column += part[1].shape[1]
        row += height
    return down, up
