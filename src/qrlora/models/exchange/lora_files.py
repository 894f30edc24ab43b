"""Read any LoRA as an adapter, whatever its keys are called: keys.py reads the keys, layer_names.py finds the layers.

Besides ours a file may be a LoRA in any dialect that docs/exchange.md lists, or a published checkpoint, published.py.
The header alone decides what is read and refused; the tensors are read once, after that. The adapter's ΔW is exactly
the file's: a fused layer is split by the rows of its up, lower ranks are padded with zeros, and each layer's scaling
alpha / rank is folded into its down.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft.utils.other import get_pattern_key
from torch import Tensor

from qrlora._reading import parsing
from qrlora.errors import AdapterFileError
from qrlora.method.adapter import Adapter, AdapterMetadata, load_adapter
from qrlora.method.adapter.container import about, parse_json
from qrlora.method.adapter.file import is_ours as says_ours
from qrlora.method.adapter.metadata import is_number
from qrlora.method.adapter.record import require
from qrlora.models.exchange.by_diffusers import traced
from qrlora.models.exchange.keys import bare, form_of, pairs_of, refuse_other_methods, without_others
from qrlora.models.exchange.layer_names import LayerNames, Located, locate
from qrlora.models.exchange.originals import Piece
from qrlora.models.exchange.published import as_lora, is_published, is_whole, load_published, may_be_whole
from qrlora.models.exchange.tensors import file_digest, read_shapes, read_tensor_file

_DENOISERS = ("transformer", "unet")
_PEFT = "base_model.model."


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Content of a file by its header. pairs: name in the file -> part -> key; names: without what stands before
    them; located: which layers they are; left_out: names of what is no denoiser's."""

    pairs: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str]
    located: Located
    config: Mapping[str, Any]
    left_out: Sequence[str]


def load_any(
    path: str | Path,
    *,
    alpha: float | None = None,
    names: LayerNames | None = None,
) -> Adapter:
    """Return an adapter file of ours, a LoRA in any known form, or a published checkpoint as the LoRA that it equals.

    Keys of text encoders and embeddings are left out; provenance names them, see `left_out_of`.

    Args:
        alpha: of a file that records none (scaling is alpha / rank); an error for a file that records one.
        names: of the layers of the model at hand, which then decide what a layer's name in the file means. Without
            them a file has to be of a known family.

    Raises:
        AdapterFileError: a pickle, damage, NaN, a method whose ΔW is no product of two small matrices, keys of no known
            form, or layers of no known family or not of this one, all of which are listed.
    """
    path = Path(path)
    shapes, raw = read_shapes(path)
    if says_ours(raw):
        with about(path):
            require(alpha is None, "this file says its own alpha", expected="no alpha", got=alpha)
        return load_adapter(path)
    tensors: dict[str, Tensor] = {}
    if is_published(shapes) or may_be_whole(shapes):
        tensors, _ = read_tensor_file(path)
        if is_published(shapes) or is_whole(tensors):
            return as_lora(load_published(path, tensors), alpha)
    with about(path):
        plan = _plan(path, shapes, raw, names, alpha)
        tensors = tensors or read_tensor_file(path)[0]
        adapter = _as_adapter(plan, tensors, alpha, path.stem)
        if names is not None:
            adapter = _kernels_as_in(adapter, names)
        adapter.check_strength()
    return _described(adapter, raw, path, plan)


def is_ours(path: str | Path) -> bool:
    """Return True for an adapter file of this package, in any spelling; errors as `load_any`."""
    return says_ours(read_shapes(Path(path))[1])


def left_out_of(adapter: Adapter) -> list[str]:
    """Return the names in the adapter's file that were left out because they are no layers of the denoiser."""
    imported = adapter.metadata.provenance.get("imported")
    names = imported.get("left_out") if isinstance(imported, Mapping) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def _plan(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    raw: Mapping[str, str],
    layer_names: LayerNames | None,
    alpha: float | None,
) -> _Plan:
    kept, left_out = without_others(shapes)
    refuse_other_methods(kept)
    pairs = pairs_of(kept)
    peft = all(name.startswith(_PEFT) for name in pairs)
    config = _peft_config(path) if peft else _diffusers_config(raw)
    for name, parts in pairs.items():
        _check_pair(name, {side: tuple(shapes[key]) for side, key in parts.items()})
    names = {name: bare(name) for name in pairs}
    sizes = {names[n]: (shapes[parts["up"]][0], math.prod(shapes[parts["down"]][1:])) for n, parts in pairs.items()}
    times = Counter(names.values())
    twice = sorted(name for name in names if times[names[name]] > 1)
    require(not twice, "keys that name a layer again", expected="one pair per layer", got=twice)
    located = locate(sizes, layer_names, lambda ours: _by_diffusers(pairs, names, shapes, ours))
    said = bool(config) or located.original or all("alpha" in parts for parts in pairs.values())
    require(
        not peft or said or alpha is not None,
        "a PEFT file does not say its alpha",
        expected="adapter_config.json beside it",
        got="none there",
        remedy="copy that file beside it, or convert it with `qrlora import FILE --alpha ALPHA`",
    )
    return _Plan(pairs, names, located, config, left_out)


def _by_diffusers(
    pairs: Mapping[str, Mapping[str, str]],
    names: Mapping[str, str],
    shapes: Mapping[str, Sequence[int]],
    ours: LayerNames,
) -> dict[str, tuple[Piece, ...]]:
    if ours.denoiser is None:
        return {}
    found = traced(pairs, shapes, ours.family, ours.denoiser)
    known = {name: all(piece.layer in ours.modules for piece in pieces) for name, pieces in found.items()}
    return {names[name]: pieces for name, pieces in found.items() if known[name]}


def _check_pair(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    down, up, middle = shapes["down"], shapes["up"], shapes.get("mid")
    fits = 2 <= len(down) <= 5 and len(up) == len(down) and min(down) > 0 and all(size == 1 for size in up[2:])
    if middle is None:
        fits = fits and up[1] == down[0]
    else:
        fits = fits and middle[:2] == (up[1], down[0]) and all(size == 1 for size in down[2:])
    require(
        fits,
        f"{name}: its down and up do not fit each other",
        expected="(rank, in, *kernel) and (out, rank, *1)",
        got=" and ".join(map(str, shapes.values())),
        remedy="take the original file",
    )
    alpha = shapes.get("alpha", ())
    require(math.prod(alpha) == 1, f"{name}: alpha is no number", expected="one value", got=alpha)


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
    require(isinstance(config, dict), "the LoRA's configuration is not a JSON object", expected="{...}", got=config)
    require(not config.get("use_dora"), "a DoRA", expected="use_dora false", got=True, remedy="it is no plain LoRA")
    patterns = config.get("alpha_pattern") or {}
    require(isinstance(patterns, dict), "alpha_pattern is not a JSON object", expected="{...}", got=patterns)
    alphas = {"": config.get("lora_alpha", 1)} | patterns
    wrong = {key: value for key, value in alphas.items() if not is_number(value)}
    require(not wrong, "lora_alpha is no number", expected="a finite number", got=wrong)
    return config


def _as_adapter(plan: _Plan, tensors: Mapping[str, Tensor], alpha: float | None, name: str) -> Adapter:
    said = plan.config.get("lora_alpha") is not None or any("alpha" in parts for parts in plan.pairs.values())
    require(alpha is None or not said, "this file says its own alpha", expected="no alpha", got=alpha)
    pairs = {own: _pair({side: tensors[key] for side, key in parts.items()}) for own, parts in plan.pairs.items()}
    rank = max(down.shape[0] for down, _ in pairs.values())
    deltas, ups, shapes = {}, {}, {}
    for own, (down, up) in pairs.items():
        parts, known_as = plan.pairs[own], plan.names[own]
        strength = tensors[parts["alpha"]] if "alpha" in parts else None
        scaling = _scaling(known_as, down.shape[0], strength, plan.config, alpha)
        filled = _filled_up(down.flatten(1), up.flatten(1), scaling, rank)
        for piece in plan.located.layers[known_as]:
            shapes[piece.layer] = (piece.stop - piece.start, *down.shape[1:])
            deltas[piece.layer], ups[piece.layer] = filled[0], _rows(filled[1], piece)
    metadata = AdapterMetadata("lora", rank, float(rank), denoiser=plan.located.denoiser)
    return Adapter(metadata, deltas, shapes, ups=ups, name=name)


def _pair(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """down and up; a middle one, which LyCORIS puts between those of a convolution, is multiplied into the down."""
    down, up = parts["down"], parts["up"]
    if "mid" not in parts:
        return down, up
    return torch.einsum("rs...,si->ri...", parts["mid"].float(), down.flatten(1).float()), up


def _rows(up: Float[Tensor, "out rank"], piece: Piece) -> Float[Tensor, "part rank"]:
    rows = up[piece.start : piece.stop]
    return rows.roll(len(rows) // 2, 0) if piece.swapped else rows.clone()  # a view would hold all rows


def _kernels_as_in(adapter: Adapter, names: LayerNames) -> Adapter:
    """A linear layer's LoRA written as that of a 1 x 1 convolution, or the other way round, in the model's shape."""
    shapes = {}
    for layer, shape in adapter.shapes.items():
        kernel = names.modules[layer][2:]
        shapes[layer] = (*shape[:2], *kernel) if set(kernel) | set(shape[2:]) <= {1} else shape
    return dataclasses.replace(adapter, shapes=shapes)


def _scaling(layer: str, rank: int, own: Tensor | None, config: Mapping[str, Any], alpha: float | None) -> float:
    """alpha / rank of a layer: its own alpha, else PEFT's configuration by PEFT's rules, else what the caller says."""
    if own is not None:
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
    """Return the same ΔW as a pair of `rank` at scaling 1; in float32 as soon as a value has to change."""
    if scaling != 1.0 or down.dtype != up.dtype:
        down, up = scaling * down.float(), up.float()
    more = rank - down.shape[0]
    return torch.nn.functional.pad(down, (0, 0, 0, more)), torch.nn.functional.pad(up, (0, more))


def _described(adapter: Adapter, raw: Mapping[str, str], path: Path, plan: _Plan) -> Adapter:
    """Return the adapter with the facts in the file's ModelSpec fields, and its origin."""
    source: dict[str, Any] = {"file": path.name, "sha256": file_digest(path), "form": form_of(plan.pairs)}
    if plan.left_out:
        source["left_out"] = list(plan.left_out)
    metadata = dataclasses.replace(
        adapter.metadata,
        trigger=raw.get("modelspec.trigger_phrase", ""),
        licence=raw.get("modelspec.license", ""),
        provenance={"imported": source, "title": raw.get("modelspec.title", "")},
    )
    json.dumps(metadata.provenance, allow_nan=False)
    return dataclasses.replace(adapter, metadata=metadata)
