"""Find the layer of each row of an up matrix by diffusers' own conversion of LoRA keys.

The converters of the pipelines rescale in the file's dtype, some support full-size models only, and they drop unknown
keys with a log line at best. So they are run on tracers instead of the file's tensors: LoRAs of rank 1 whose up holds
row numbers and whose down holds the number of the name. The result tells which rows of which name became which layer; a
name whose rows are missing was not understood.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from qrlora.errors import AdapterFileError
from qrlora.models.exchange.keys import bare, pairs_of
from qrlora.models.exchange.originals import Piece
from qrlora.models.families import ModelFamily


def converted_by_diffusers(tensors: Mapping[str, Tensor], family: ModelFamily, denoiser: nn.Module) -> Any:
    """Return the state dict to which the family's pipeline converts these keys, with the alphas where it returns them.

    Raises AdapterFileError for any exception of the converter (AssertionError, KeyError, ValueError and others).
    """
    pipeline = getattr(diffusers, family.pipeline_class)
    options = {"unet_config": denoiser.config} if family.denoiser == "unet" else {}
    try:
        return pipeline.lora_state_dict(dict(tensors), **options)
    except Exception as error:
        raise AdapterFileError(
            "diffusers refuses these keys",
            expected=f"what {family.pipeline_class} reads",
            got=f"{type(error).__name__}: {error}; keys: {sorted(tensors)}",
            remedy="export the adapter in the diffusers form: `qrlora export FILE --for diffusers`",
        ) from error


def traced(
    pairs: Mapping[str, Mapping[str, str]],
    shapes: Mapping[str, Sequence[int]],
    family: ModelFamily,
    denoiser: nn.Module,
) -> dict[str, tuple[Piece, ...]]:
    """Return name in the file -> the layers that diffusers converts it to; names converted only in part are left
    out."""
    names = list(pairs)
    tracers: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        down, up = shapes[pairs[name]["down"]], shapes[pairs[name]["up"]]
        tracers[pairs[name]["down"]] = torch.full([1] * len(down), float(number)).expand(1, *down[1:])
        tracers[pairs[name]["up"]] = torch.arange(float(up[0])).reshape(-1, *[1] * (len(up) - 1))
    try:
        converted = converted_by_diffusers(tracers, family, denoiser)
        state: dict[str, Tensor] = converted[0] if isinstance(converted, tuple) else converted
        layers = pairs_of(sorted(state))
    except AdapterFileError:
        return {}
    found: dict[str, list[Piece]] = {}
    for name, parts in layers.items():
        rows = state[parts["up"]].flatten().tolist()
        start, swapped = min(rows), rows[0] != min(rows)
        straight = [start + (i + len(rows) // 2 * swapped) % len(rows) for i in range(len(rows))]
        if rows == straight and name.startswith(family.export_prefix):
            source = names[int(state[parts["down"]].flatten()[0])]
            piece = Piece(bare(name), int(start), int(start) + len(rows), swapped)
            found.setdefault(source, []).append(piece)
    return {name: tuple(pieces) for name, pieces in found.items() if _whole(pieces, shapes[pairs[name]["up"]][0])}


def _whole(pieces: list[Piece], height: int) -> bool:
    return sorted(row for piece in pieces for row in range(piece.start, piece.stop)) == list(range(height))
