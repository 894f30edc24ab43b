"""The SDXL UNet's modules by two names: diffusers' `down_blocks.1.attentions.0. ...` and kohya's `lora_unet_ ...`.

Kohya's scripts train SDXL on the original UNet (Stability's `sgm`), whose blocks are flat lists: `input_blocks` holds
conv_in, then each down block's layers and its downsampler; `output_blocks` holds each up block's layers. With n layers
per block, layer j of block b is input 1 + b(n + 1) + j and output b(n + 1) + j. Dots become underscores in the file.
On Stable Diffusion 1 and 2 the scripts call modules as diffusers does, and only flatten the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from qrlora.errors import MismatchError

PREFIX = "lora_unet_"
LAYERS_PER_BLOCK = 2
"""Layers per block of every published SDXL UNet; a loaded denoiser has its own number."""

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BACK = {flat.replace(".", "_"): module for module, flat in _OUTSIDE.items()}
_RESNET_BACK = {flat.replace(".", "_"): module for module, flat in _RESNET.items()}

_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_ATTENDING_UP = re.compile(r"up_blocks\.(\d+)\.attentions\.")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_FLAT_BLOCK = re.compile(r"(input|output)_blocks_(\d+)_(\d+)_(.+)")
_FLAT_MIDDLE = re.compile(r"middle_block_(\d+)_(.+)")
# The names that hold an underscore of their own: every other one was a dot.
_WHOLE = re.compile(
    "(down_blocks|mid_block|up_blocks|transformer_blocks|time_emb_proj|conv_shortcut|conv_in|conv_out|proj_in|proj_out"
    "|to_q|to_k|to_v|to_out|time_embedding|add_embedding|linear_1|linear_2)|_"
)


def kohya_names(
    layers: Iterable[str], modules: Iterable[str], layers_per_block: int = LAYERS_PER_BLOCK
) -> dict[str, str]:
    """Return layer -> its name in a kohya file. `modules`: all of the UNet's, as an upsampler is named by its block.

    Raises MismatchError listing the layers that have no such name.
    """
    attending = {match.group(1) for match in map(_ATTENDING_UP.match, modules) if match}
    original = {name: _original(name, layers_per_block, attending) for name in layers}
    nameless = [name for name, found in original.items() if found is None]
    if nameless:
        raise MismatchError(
            f"{len(nameless)} of {len(original)} layers have no name in the kohya form",
            expected="linear and convolution layers of an SDXL UNet",
            got=nameless,
            remedy="export it in the diffusers form",
        )
    return {name: flattened(str(found)) for name, found in original.items()}


def flattened(module: str) -> str:
    """Return a module's name as a key of a kohya file."""
    return PREFIX + module.replace(".", "_")


def _original(module: str, layers_per_block: int, attending: set[str]) -> str | None:
    """The module's name in the original UNet; None if it has none."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    middle = _MIDDLE.fullmatch(module)
    if middle:
        kind, position, rest = middle.groups()
        return _inside(f"middle_block.{1 if kind == 'attentions' else 2 * int(position)}", kind, rest)
    match = _BLOCK.fullmatch(module)
    if not match:
        return None
    way, block, kind, number, rest = match.groups()
    first = int(block) * (layers_per_block + 1) + (1 if way == "down" else 0)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block}.0.op" if rest == "conv" else None
    if kind == "upsamplers":
        place = 2 if block in attending else 1
        return f"output_blocks.{first + layers_per_block}.{place}.conv" if rest == "conv" else None
    side = "input" if way == "down" else "output"
    return _inside(f"{side}_blocks.{first + int(number)}.{0 if kind == 'resnets' else 1}", kind, rest)


def _inside(place: str, kind: str, rest: str) -> str | None:
    if kind == "attentions":
        return f"{place}.{rest}"
    return f"{place}.{_RESNET[rest]}" if rest in _RESNET else None


def module_of(name: str, layers_per_block: int = LAYERS_PER_BLOCK) -> str:
    """The diffusers module that a kohya name of either kind means: of the original UNet, or diffusers' own flattened.

    For a name that no UNet has, it returns a name that no module has; a check against the model finds that.
    """
    flat = name.removeprefix(PREFIX)
    if flat in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[flat]
    middle = _FLAT_MIDDLE.fullmatch(flat)
    if middle:
        position, rest = int(middle.group(1)), middle.group(2)
        owner = "mid_block.attentions.0" if position == 1 else f"mid_block.resnets.{position // 2}"
        return f"{owner}.{_RESNET_BACK.get(rest, _dotted(rest))}"
    match = _FLAT_BLOCK.fullmatch(flat)
    if not match:
        return _dotted(flat)
    side, index, place, rest = match.group(1), int(match.group(2)), match.group(3), match.group(4)
    block, layer = divmod(index - (1 if side == "input" else 0), layers_per_block + 1)
    owner = f"{'down' if side == 'input' else 'up'}_blocks.{block}"
    if rest == "op":
        return f"{owner}.downsamplers.0.conv"
    if rest == "conv":
        return f"{owner}.upsamplers.0.conv"
    if place == "0":
        return f"{owner}.resnets.{layer}.{_RESNET_BACK.get(rest, _dotted(rest))}"
    return f"{owner}.attentions.{layer}.{_dotted(rest)}"


def _dotted(flat: str) -> str:
    return _WHOLE.sub(lambda match: match.group(1) or ".", flat)
