"""Resolve the names in a LoRA file to layers of a denoiser.

With a model at hand its modules decide, without one the names and shapes of the known families, all of which are tried.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qrlora.errors import AdapterFileError
from qrlora.method.adapter.record import require
from qrlora.models.exchange.names import LAYERS_PER_BLOCK, PREFIX, module_of
from qrlora.models.exchange.originals import ORIGINALS, Piece, Shapes, template
from qrlora.models.families import FAMILIES, ModelFamily

_UNET = re.compile(
    r"conv_in|conv_out|(time|add)_embedding\.linear_[12]"
    r"|((down|up)_blocks\.\d+|mid_block)\.(resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)"
    r"|(down|up)samplers\.0\.conv|attentions\.\d+\.(proj_in|proj_out"
    r"|transformer_blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))))"
)

_ORIGINAL_UNET = re.compile(r"(input|output)_blocks[._]|middle_block[._]")
_SDXL_WIDTHS = {"down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280, "up_blocks.0": 1280, "up_blocks.1": 640}
_SDXL_PLACE = re.compile(r"((?:down|up)_blocks\.\d+|mid_block)\.(resnets|attentions)\.(\d+)\.(.+)")
_AS_WIDE_AS_ITS_BLOCK = re.compile(r"proj_(in|out)|.*\.to_(q|out\.0)")

Sizes = Mapping[str, tuple[int, int]]
"""Name in the file -> rows of its up, columns of its down."""
Found = dict[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class Located:
    """Layers of each name in a file, their family, and whether the names are those of diffusers."""

    layers: Found
    denoiser: str
    original: bool


class LayerNames:
    """The layers of one family, of one model if it is given, by every name that a file may call them by."""

    def __init__(self, family: ModelFamily, denoiser: nn.Module | None = None):
        self.family, self.denoiser = family, denoiser
        self.rows = ORIGINALS.get(family.name, ())
        self.modules: Shapes = {} if denoiser is None else shapes_of(denoiser)
        self._flat = {name.replace(".", "_"): name for name in self.modules}
        self._templates = [(layer, template(layer)) for row in self.rows for layer in row.layers]
        config: Any = getattr(denoiser, "config", {})
        layers = config.get("layers_per_block")
        self._layers_per_block = layers if isinstance(layers, int) else LAYERS_PER_BLOCK

    def find(self, name: str, height: int, width: int) -> tuple[Piece, ...]:
        """Return the layers that `name` means; empty if it names none, or none of that shape."""
        layer = self.layer(name)
        if layer:
            guessed = not self.modules and bool(_ORIGINAL_UNET.match(name)) and not _fits_sdxl(layer, height, width)
            return () if guessed else (Piece(layer, 0, height),)
        for row in self.rows:
            match = row.pattern.fullmatch(name)
            if match:
                return row.pieces(match[1] if match.groups() else "", height, width, self.modules)
        return ()

    def layer(self, name: str) -> str:
        """Return the layer of this name in diffusers (dots or underscores) or in SDXL's original UNet; "" if there is
        none."""
        flat = name.replace(".", "_")
        if self.modules:
            known = name if name in self.modules else self._flat.get(flat, "")
        else:
            known = self._by_template(name)
        if known or self.family.denoiser != "unet":
            return known
        original = module_of(PREFIX + flat, self._layers_per_block)
        return original if original in self.modules or (not self.modules and _UNET.fullmatch(original)) else ""

    def _by_template(self, name: str) -> str:
        for layer, pattern in self._templates:
            match = pattern.fullmatch(name)
            if match:
                return layer.replace("#", match[1]) if match.groups() else layer
        return name if self.family.denoiser == "unet" and _UNET.fullmatch(name) else ""


def _fits_sdxl(layer: str, height: int, width: int) -> bool:
    """Return False if a layer, found by counting full-size SDXL's blocks, is one that SDXL lacks, or has in another
    width."""
    match = _SDXL_PLACE.fullmatch(layer)
    if not match:
        return True
    block, kind, number, rest = match.groups()
    layers = LAYERS_PER_BLOCK + (0 if block.startswith("down") else 1)
    if block != "mid_block" and int(number) >= layers:
        return False
    if kind == "resnets":
        return True
    return block in _SDXL_WIDTHS and (not _AS_WIDE_AS_ITS_BLOCK.fullmatch(rest) or height == _SDXL_WIDTHS[block])


def shapes_of(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return (out, in, *kernel) of the layers that a LoRA can change, without the adapters that may be on them.

    By the layer's own numbers, because a quantised weight has another shape.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear):
            found[name.removesuffix(".base_layer")] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv2d):
            sizes = (module.out_channels, module.in_channels, *module.kernel_size)
            found[name.removesuffix(".base_layer")] = sizes
    return found


def locate(sizes: Sizes, names: LayerNames | None, ask: Callable[[LayerNames], Found]) -> Located:
    """The layers of all names: of the model whose `names` are given, else of the one family that knows all of them.

    ask: finds layers by diffusers' own conversion, for names that are not found otherwise.
    Raises AdapterFileError: names without a layer, names of no known family, or names of several families.
    """
    tables = [names] if names else [LayerNames(family) for family in FAMILIES.values()]
    found = [{name: table.find(name, *size) for name, size in sizes.items()} for table in tables]
    if names and not all(found[0].values()):
        asked = ask(names)
        found[0] |= {name: asked.get(name, ()) for name, known in found[0].items() if not known}
    whole = [(table, theirs) for table, theirs in zip(tables, found, strict=True) if all(theirs.values())]
    if not whole:
        _refuse(sizes, tables, found)
    (table, layers), *others = whole
    differ = sorted(name for name in sizes for _, other in others if other[name] != layers[name])
    require(
        not differ,
        "names that mean different layers in different families",
        expected="a family that its names or shapes decide",
        got=f"{', '.join(table.family.name for table, _ in whole)} disagree about {differ}",
        remedy="`qrlora import FILE --model MODEL` reads it by the model's own layers",
    )
    _check_once(layers)
    original = any(not table.layer(name) for name in sizes)
    return Located(layers, table.family.denoiser, original)


def _refuse(sizes: Sizes, tables: list[LayerNames], found: list[Found]) -> None:
    """Raise for the family that knows most of the names, and list those that it does not know."""
    unknown = [[name for name in sizes if not layers[name]] for layers in found]
    least = min(range(len(tables)), key=lambda i: len(unknown[i]))
    family, modules = tables[least].family, tables[least].modules
    no_model = "if it is for a model of these, `qrlora import FILE --model MODEL` reads it by the model's own layers"
    raise AdapterFileError(
        f"{len(unknown[least])} of its {len(sizes)} layers are "
        + (f"no layers of this {family.name} model" if modules else "of no known model family"),
        expected="names and shapes of " + (family.name if len(tables) == 1 else _families(tables)),
        got={name: f"({sizes[name][0]}, {sizes[name][1]})" for name in unknown[least]},
        remedy="give the base model that it was trained on" if modules else no_model,
    )


def _families(tables: list[LayerNames]) -> str:
    return ", ".join(table.family.name for table in tables)


def _check_once(layers: Found) -> None:
    named: dict[str, list[str]] = {}
    for name, pieces in layers.items():
        for piece in pieces:
            named.setdefault(piece.layer, []).append(name)
    twice = {layer: names for layer, names in named.items() if len(names) > 1}
    require(not twice, "keys that name a layer again", expected="one pair per layer", got=twice)
