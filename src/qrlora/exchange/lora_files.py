"""Anybody's LoRA as an adapter, whatever its keys are called.

Forms, told by the keys alone:
    diffusers   transformer.<layer>.lora_A.weight, and the older <layer>.lora.down.weight and processor.to_q_lora.down
    peft        base_model.model.<layer>.lora_A.weight with an adapter_config.json beside it
    kohya       lora_unet_<layer>.lora_down.weight with .alpha
    published   <layer>.lora.q.weight, see published.py
The adapter's ΔW is the file's, exactly: ranks are filled up with zeros, each layer's strength goes into its down.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft.utils.other import get_pattern_key
from torch import Tensor

from qrlora.adapter import Adapter, AdapterMetadata, load_adapter
from qrlora.adapter.container import about, parse_json
from qrlora.adapter.file import is_adapter_file
from qrlora.adapter.metadata import is_number
from qrlora.adapter.record import require
from qrlora.errors import AdapterFileError, bounded
from qrlora.exchange.names import LAYERS_PER_BLOCK, PREFIX, module_of
from qrlora.exchange.published import as_lora, is_published, is_whole, load_published
from qrlora.exchange.tensors import file_digest, read_tensor_file
from qrlora.reading import parsing

_PAIRS = (
    re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])(\.\w+)?\.weight"),
    re.compile(r"(?P<layer>.+)\.lora\.(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.processor\.(?P<projection>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight"),
    re.compile(rf"(?P<layer>{PREFIX}\w+)\.lora_(?P<side>down|up)\.weight"),
    re.compile(r"(?P<layer>.+)\.(?P<side>alpha)"),
)
_SIDES = {"A": "down", "B": "up"}
_DENOISERS = ("transformer", "unet")
_PEFT = "base_model.model."
_TEXT_ENCODERS = ("lora_te", "text_encoder")
_FLUX_ORIGINAL = (f"{PREFIX}double_blocks_", f"{PREFIX}single_blocks_")

Layers = dict[str, dict[str, Tensor]]


def load_any(
    path: str | Path,
    *,
    alpha: float | None = None,
    layers_per_block: int = LAYERS_PER_BLOCK,
    without_text_encoder: bool = False,
) -> Adapter:
    """An adapter file of ours, a LoRA in any form named above, or a published checkpoint as the LoRA that it equals.

    Args:
        alpha: of a file that does not say; scaling is alpha / rank. Given for one that says, it is refused.
        layers_per_block: of the UNet that a kohya file is for.
        without_text_encoder: leave a LoRA's text encoder layers out, which an adapter has no place for.

    Raises:
        AdapterFileError: a pickle, damage, NaN, or keys of no known form, all of which are listed.
    """
    path = Path(path)
    if is_adapter_file(path):
        with about(path):
            require(alpha is None, "this file says its own alpha", expected="no alpha", got=alpha)
        return load_adapter(path)
    tensors, raw = read_tensor_file(path)
    if is_published(tensors) or is_whole(tensors):
        return as_lora(load_published(path), alpha)
    with about(path):
        kept = _without_text_encoder(tensors, without_text_encoder)
        form = "kohya" if any(key.startswith(PREFIX) for key in kept) else "diffusers"
        if any(key.startswith(_FLUX_ORIGINAL) for key in kept):
            kept = _flux_from_kohya(kept)
        layers = _layers_of(kept, layers_per_block)
        peft = all(layer.startswith(_PEFT) for layer in layers)
        config = _peft_config(path) if peft else _diffusers_config(raw)
        form = "peft" if peft else form
        require(
            not peft or bool(config) or alpha is not None,
            "a PEFT file does not say its alpha",
            expected="adapter_config.json beside it",
            got="none there",
            remedy="copy that file beside it, or give alpha: `qrlora import FILE --alpha ALPHA`",
        )
        adapter = _as_adapter(layers, config, alpha, path.stem)
        adapter.check_strength()
    return _described(adapter, raw, path, form)


def _without_text_encoder(tensors: Mapping[str, Tensor], leave_out: bool) -> dict[str, Tensor]:
    words = sorted(key for key in tensors if key.startswith(_TEXT_ENCODERS))
    require(
        not words or leave_out,
        f"{len(words)} of its {len(tensors)} keys are a text encoder's",
        expected="layers of a denoiser only",
        got=words,
        remedy="leave them out, which changes the pictures: `qrlora import FILE --without-text-encoder`",
    )
    return {key: tensor for key, tensor in tensors.items() if key not in words}


def _flux_from_kohya(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FLUX under its original names, where q, k and v are one layer: diffusers' own conversion splits them."""
    from diffusers import FluxPipeline

    with parsing("diffusers cannot convert this FLUX LoRA", AdapterFileError, expected="kohya's keys"):
        return dict(FluxPipeline.lora_state_dict(dict(tensors)))


def _layers_of(tensors: Mapping[str, Tensor], layers_per_block: int) -> Layers:
    """Layer -> its down, its up and, where the file has one, its alpha; every key has to find its place."""
    layers: Layers = {}
    unknown, twice = [], []
    for key, tensor in sorted(tensors.items()):
        match = next((m for m in (pattern.fullmatch(key) for pattern in _PAIRS) if m), None)
        if match is None:
            unknown.append(key)
            continue
        layer, parts = match["layer"], match.groupdict()
        if layer.startswith(PREFIX):
            layer = "unet." + module_of(layer, layers_per_block)
        projection = parts.get("projection")
        if projection:
            layer += f".{projection}" + (".0" if projection == "to_out" else "")
        side = _SIDES.get(match["side"], match["side"])
        twice += [key] if side in layers.setdefault(layer, {}) else []
        layers[layer][side] = tensor
    half = sorted(layer for layer, parts in layers.items() if not {"down", "up"} <= set(parts))
    require(not twice, "keys that name a layer again", expected="one pair per layer", got=sorted(twice))
    require(
        bool(layers) and not unknown and not half,
        "no LoRA of a form that is known here",
        expected="for every layer a down and an up, in diffusers, PEFT or kohya form",
        got=f"unknown keys: {bounded(sorted(unknown) or 'none')}; layers without one of the two: "
        f"{bounded(half or 'none')}",
        remedy="DoRA, LoHa, LoKr and biases are not read: merge such a file into a checkpoint and use `qrlora extract`",
    )
    return layers


def _peft_config(path: Path) -> dict[str, Any]:
    beside = path.with_name("adapter_config.json")
    return _checked_config(parse_json(beside.read_bytes(), beside.name)) if beside.is_file() else {}


def _diffusers_config(raw: Mapping[str, str]) -> dict[str, Any]:
    """The LoraConfig that diffusers writes into the metadata, one field per key, after the denoiser's name."""
    fields = parse_json(raw.get("lora_adapter_metadata", "{}"), "lora_adapter_metadata")
    require(isinstance(fields, dict), "lora_adapter_metadata is malformed", expected="a JSON object", got=fields)
    return _checked_config(
        {key.removeprefix(f"{d}."): value for key, value in fields.items() for d in _DENOISERS if key.startswith(d)}
    )


def _checked_config(config: Any) -> dict[str, Any]:
    require(isinstance(config, dict), "the LoRA's configuration is no JSON object", expected="{...}", got=config)
    require(not config.get("use_dora"), "a DoRA", expected="use_dora false", got=True, remedy="it is no plain LoRA")
    patterns = config.get("alpha_pattern") or {}
    require(isinstance(patterns, dict), "alpha_pattern is no JSON object", expected="{...}", got=patterns)
    alphas = {"": config.get("lora_alpha", 1)} | patterns
    wrong = {key: value for key, value in alphas.items() if not is_number(value)}
    require(not wrong, "lora_alpha is no number", expected="a finite number", got=wrong)
    return config


def _as_adapter(layers: Layers, config: Mapping[str, Any], alpha: float | None, name: str) -> Adapter:
    denoiser, bare = _denoiser_of(layers)
    pairs = {layer: _pair(layer, parts) for layer, parts in bare.items()}
    ranks = {layer: down.shape[0] for layer, (down, _) in pairs.items()}
    said = config.get("lora_alpha") is not None or any("alpha" in parts for parts in bare.values())
    require(alpha is None or not said, "this file says its own alpha", expected="no alpha", got=alpha)
    scalings = {
        layer: _scaling(layer, ranks[layer], parts.get("alpha"), config, alpha) for layer, parts in bare.items()
    }
    rank = max(ranks.values())
    deltas, ups, shapes = {}, {}, {}
    for layer, (down, up) in pairs.items():
        shapes[layer] = (up.shape[0], *down.shape[1:])
        deltas[layer], ups[layer] = _filled_up(down.flatten(1), up.flatten(1), scalings[layer], rank)
    return Adapter(AdapterMetadata("lora", rank, float(rank), denoiser=denoiser), deltas, shapes, ups=ups, name=name)


def _denoiser_of(layers: Layers) -> tuple[str, Layers]:
    """Whose layers these are, by prefix or, without one, by the UNet's way of naming; and the bare names."""
    bare = {layer.removeprefix(_PEFT): parts for layer, parts in layers.items()}
    named = {denoiser for layer in bare for denoiser in _DENOISERS if layer.startswith(f"{denoiser}.")}
    if not named:
        unet = all(re.match(r"(down|up)_blocks\.|mid_block\.|conv_(in|out)|(time|add)_embedding\.", n) for n in bare)
        return "unet" if unet else "transformer", bare
    require(len(named) == 1, "a LoRA of two denoisers", expected="transformer or unet", got=sorted(named))
    [denoiser] = named
    odd = sorted(layer for layer in bare if not layer.startswith(f"{denoiser}."))
    require(not odd, "keys of another part of the model", expected=f"{denoiser}.<layer> only", got=odd)
    return denoiser, {layer.removeprefix(f"{denoiser}."): parts for layer, parts in bare.items()}


def _pair(layer: str, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    down, up = parts["down"], parts["up"]
    fits = 2 <= down.ndim <= 5 and up.ndim == down.ndim and up.shape[1] == down.shape[0]
    require(
        fits and all(size == 1 for size in up.shape[2:]) and down.shape[0] > 0,
        f"{layer}: its down and up do not fit each other",
        expected="(rank, in, *kernel) and (out, rank, *1)",
        got=f"{tuple(down.shape)} and {tuple(up.shape)}",
        remedy="take the original file",
    )
    return down, up


def _scaling(layer: str, rank: int, own: Tensor | None, config: Mapping[str, Any], alpha: float | None) -> float:
    """alpha / rank of a layer: its own alpha, else PEFT's configuration by PEFT's rules, else what the caller says."""
    if own is not None:
        require(own.numel() == 1, f"{layer}: alpha is no number", expected="one value", got=tuple(own.shape))
        return float(own) / rank
    if config.get("lora_alpha") is not None:
        patterns: dict[str, Any] = config.get("alpha_pattern") or {}
        with parsing("alpha_pattern does not work", AdapterFileError, expected="regular expressions"):
            found: Any = patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"])
        return float(found) / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return 1.0 if alpha is None else alpha / rank


def _filled_up(
    down: Float[Tensor, "own_rank in"], up: Float[Tensor, "out own_rank"], scaling: float, rank: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The same ΔW as a pair of `rank` at scaling 1; in float32 as soon as a value has to change."""
    if scaling != 1.0 or down.dtype != up.dtype:
        down, up = scaling * down.float(), up.float()
    more = rank - down.shape[0]
    return torch.nn.functional.pad(down, (0, 0, 0, more)), torch.nn.functional.pad(up, (0, more))


def _described(adapter: Adapter, raw: Mapping[str, str], path: Path, form: str) -> Adapter:
    """With what the file says of itself where ModelSpec's fields say it, and where it came from."""
    source = {"file": path.name, "sha256": file_digest(path), "form": form}
    metadata = dataclasses.replace(
        adapter.metadata,
        trigger=raw.get("modelspec.trigger_phrase", ""),
        licence=raw.get("modelspec.license", ""),
        provenance={"imported": source, "title": raw.get("modelspec.title", "")},
    )
    json.dumps(metadata.provenance, allow_nan=False)
    return dataclasses.replace(adapter, metadata=metadata)
