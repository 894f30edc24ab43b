"""Adapter files: safetensors only, two spellings, one strict reader, one atomic writer.

Compact spelling: one tensor `<layer>.delta_r` per layer, (rank, in). A triangular ΔR is packed into one dimension: row
after row, of row i the entries from columns[i] on (the others are zero by definition, see `record.triangular_mask`).

LoRA spelling: `<denoiser>.<layer>.lora_A.weight` = s · ΔR, (rank, in) or (rank, in, kh, kw), and `.lora_B.weight` = Q's
columns, (out, rank) or (out, rank, 1, 1). alpha equals rank and there are no `.alpha` keys: diffusers reads it as is.

The metadata of both describes the tensors of that very file, every field as a string under `qrlora.<field>`; plus
`qrlora.format` (the spelling), `qrlora.layers` (JSON: layer -> [shape of the base weight, its digest]) and
`qrlora.recipe_digest`.
A reader MUST refuse a file with any other key, a missing key, or a tensor that these do not call for.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.adapter.container import (
    about,
    check_entries,
    check_finite,
    check_is_file,
    check_keys,
    parse_json,
    read_header,
    read_tensors,
)
from qrlora.adapter.metadata import decode_layers, decode_metadata, encode_metadata, is_number
from qrlora.adapter.record import Adapter, AdapterMetadata, require, triangular_mask
from qrlora.basis import Basis
from qrlora.errors import MismatchError
from qrlora.files import write_atomically

SPELLINGS = ("compact", "lora")
ORTHONORMAL = 0.05  # what rounding Q to bfloat16 leaves of QᵀQ = I, with room; a scaled or foreign Q is far beyond it
DIFFUSERS_KEY = re.compile(r"(transformer|unet)\.(.+)\.lora_([AB])\.weight")


def save_adapter(adapter: Adapter, path: str | Path, spelling: str = "compact", basis: Basis | None = None) -> None:
    """Write `adapter` to a .safetensors file, all or nothing: an interrupted write leaves what was there before.

    The LoRA spelling of an adapter on a basis needs that `basis` (or one with more layers) for its Q.
    Raises AdapterFileError (unknown spelling, NaN, no such folder, other suffix), MismatchError (another basis, none).
    """
    path = Path(path)
    require(spelling in SPELLINGS, "unknown spelling", expected=" or ".join(SPELLINGS), got=spelling)
    require(path.suffix == ".safetensors", "adapters are safetensors", expected="*.safetensors", got=path.name)
    require(path.parent.is_dir(), "no such folder", expected="an existing folder", got=path.parent)
    if spelling == "compact":
        require(
            adapter.metadata.on_basis,
            f"a {adapter.metadata.method} adapter carries its own ups and has no compact spelling",
            expected="method qrlora",
            got=adapter.metadata.method,
            remedy='save it with spelling="lora"',
        )
        tensors = _compact_tensors(adapter)
    else:
        adapter = _folded(adapter)
        tensors = _lora_tensors(adapter, basis)
    check_finite(tensors)
    data = safetensors.torch.save(tensors, metadata=encode_metadata(adapter, spelling))
    with about(path):
        write_atomically(path, data)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter of either spelling, or a plain LoRA with diffusers' keys (method "lora"); refuse anything less.

    ΔR keeps the file's dtype. A LoRA-spelled qrlora file gives up its Q again (it belongs to the basis), after a check
    that it is orthonormal. Raises AdapterFileError naming the file, what was expected, what was found, and the remedy.
    """
    path = Path(path)
    with about(path):
        check_is_file(path)
        with path.open("rb") as stream:
            header = read_header(stream)
            raw = header.pop("__metadata__", {})
            check_entries(raw, header)
            ours = any(key.startswith("qrlora.") for key in raw)
            plan = _plan_ours(raw) if ours else _plan_foreign(raw, header)
            plan.check_header(header)
            stream.seek(0)
            tensors = read_tensors(stream.read())
        check_finite(tensors)
        return plan.adapter(tensors, path.stem)


def _folded(adapter: Adapter) -> Adapter:
    """The same adapter with its scaling inside ΔR: alpha = rank."""
    deltas = {name: (adapter.scaling * delta.float()).to(delta.dtype) for name, delta in adapter.deltas.items()}
    metadata = dataclasses.replace(adapter.metadata, alpha=float(adapter.metadata.rank))
    return dataclasses.replace(adapter, metadata=metadata, deltas=deltas)


def _compact_tensors(adapter: Adapter) -> dict[str, Tensor]:
    meta = adapter.metadata
    tensors = {}
    for name, delta in adapter.deltas.items():
        delta = delta.detach().cpu()
        tensors[f"{name}.delta_r"] = pack(delta, meta.columns) if meta.triangular else delta.contiguous()
    return tensors


def _lora_tensors(adapter: Adapter, basis: Basis | None) -> dict[str, Tensor]:
    if adapter.metadata.on_basis:
        if basis is None:
            raise MismatchError(
                "the LoRA spelling needs the basis for its Q",
                expected=f"basis {adapter.metadata.basis_fingerprint}",
                got="basis=None",
                remedy="pass basis=Basis.of(weights, ...), or save the compact spelling",
            )
        adapter.check_basis(basis)
    tensors = {}
    for name, down in adapter.deltas.items():
        up = adapter.up(name, basis[name].q if basis is not None and adapter.metadata.on_basis else None)
        shape, prefix = adapter.shapes[name], f"{adapter.metadata.denoiser}.{name}"
        kernel = (1,) * (len(shape) - 2)
        tensors[f"{prefix}.lora_A.weight"] = down.detach().cpu().reshape(-1, *shape[1:]).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = up.detach().cpu().to(down.dtype).reshape(*up.shape, *kernel).contiguous()
    return tensors


def pack(delta: Float[Tensor, "rank in"], columns: tuple[int, ...]) -> Float[Tensor, " kept"]:
    """The entries of a triangular ΔR that may be non-zero, row after row, of row i those from columns[i] on."""
    return delta[triangular_mask(columns, delta.shape[1])]


def unpack(packed: Float[Tensor, " kept"], columns: tuple[int, ...], width: int) -> Float[Tensor, "rank in"]:
    """Inverse of `pack`."""
    delta = packed.new_zeros(len(columns), width)
    delta[triangular_mask(columns, width)] = packed
    return delta


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the metadata calls for: each key's shape is checked before a byte of tensor data is read."""

    spelling: str
    metadata: AdapterMetadata
    shapes: dict[str, tuple[int, ...]]
    digests: dict[str, str]

    def keys(self) -> dict[str, list[int]]:
        meta, keys = self.metadata, {}
        for name, shape in self.shapes.items():
            width = math.prod(shape[1:])
            if self.spelling == "compact":
                kept = sum(max(width - column, 0) for column in meta.columns)
                keys[f"{name}.delta_r"] = [kept] if meta.triangular else [meta.rank, width]
            else:
                prefix, kernel = f"{meta.denoiser}.{name}", [1] * (len(shape) - 2)
                keys[f"{prefix}.lora_A.weight"] = [meta.rank, *shape[1:]]
                keys[f"{prefix}.lora_B.weight"] = [shape[0], meta.rank, *kernel]
        return keys

    def check_header(self, header: Mapping[str, Any]) -> None:
        expected = self.keys()
        check_keys("tensors", list(expected), header)
        wrong = {key: header[key]["shape"] for key, shape in expected.items() if header[key]["shape"] != shape}
        require(
            not wrong,
            f"{len(wrong)} tensors have another shape than rank {self.metadata.rank} and the base weights call for",
            expected={key: expected[key] for key in wrong},
            got=wrong,
            remedy="the file was altered or written for another rank: take the original file",
        )

    def adapter(self, tensors: Mapping[str, Tensor], name: str) -> Adapter:
        meta = self.metadata
        deltas, ups = {}, {}
        for layer, shape in self.shapes.items():
            if self.spelling == "compact":
                stored, width = tensors[f"{layer}.delta_r"], math.prod(shape[1:])
                deltas[layer] = unpack(stored, meta.columns, width) if meta.triangular else stored
            else:
                prefix = f"{meta.denoiser}.{layer}"
                deltas[layer] = tensors[f"{prefix}.lora_A.weight"].flatten(1)
                ups[layer] = tensors[f"{prefix}.lora_B.weight"].flatten(1)
        if meta.on_basis:
            for layer, up in ups.items():
                _check_orthonormal(layer, up)
        return Adapter(meta, deltas, self.shapes, self.digests, None if meta.on_basis else ups, name)


def _plan_ours(raw: Mapping[str, str]) -> _Plan:
    meta = decode_metadata(raw)
    spelling = raw["qrlora.format"]
    require(spelling in SPELLINGS, "unknown qrlora.format", expected=" or ".join(SPELLINGS), got=spelling)
    shapes, digests = decode_layers(raw["qrlora.layers"])
    if spelling == "lora":
        require(meta.alpha == meta.rank, "alpha is not rank", expected=f"alpha {meta.rank}", got=meta.alpha)
    else:
        require(meta.on_basis, "no compact spelling of this method", expected="qrlora", got=meta.method)
    if meta.on_basis:
        smallest = min(min(shape[0], math.prod(shape[1:])) for shape in shapes.values())
        fits = meta.basis_rank <= smallest
        require(fits, "basis larger than a weight", expected=f"rank at most {smallest}", got=meta.basis_rank)
    return _Plan(spelling, meta, shapes, digests)


def _plan_foreign(raw: Mapping[str, str], header: Mapping[str, Any]) -> _Plan:
    matches = {key: DIFFUSERS_KEY.fullmatch(key) for key in header}
    unexpected = sorted(key for key, match in matches.items() if match is None)
    layers = {match.group(1, 2) for match in matches.values() if match}
    wanted = {f"{denoiser}.{name}.lora_{side}.weight" for denoiser, name in layers for side in "AB"}
    missing = sorted(wanted - set(header))
    require(
        bool(layers) and not unexpected and not missing,
        "neither a qrlora adapter nor a plain LoRA with diffusers' keys",
        expected=f"transformer.<layer>.lora_A/lora_B.weight only; missing: {missing or 'none'}",
        got=f"unexpected: {unexpected or 'none'}",
        remedy="convert it with diffusers (pipe.load_lora_weights, then pipe.save_lora_weights)",
    )
    denoisers = sorted({denoiser for denoiser, _ in layers})
    require(len(denoisers) == 1, "a LoRA of two denoisers", expected="transformer or unet", got=denoisers)
    shapes, ranks = {}, set()
    for _, name in layers:
        down, up = (header[f"{denoisers[0]}.{name}.lora_{side}.weight"]["shape"] for side in "AB")
        require(2 <= len(down) <= 5 and len(up) == len(down), f"{name}: no LoRA pair", got=f"{down} and {up}")
        shapes[name] = (up[0], *down[1:])
        ranks |= {down[0], up[1]}
    require(len(ranks) == 1, "layers of different rank", expected="one rank", got=sorted(ranks))
    rank = ranks.pop()
    meta = AdapterMetadata("lora", rank, _foreign_alpha(raw, denoisers[0], rank), denoiser=denoisers[0])
    return _Plan("lora", meta, shapes, {})


def _foreign_alpha(raw: Mapping[str, str], denoiser: str, rank: int) -> float:
    """alpha of a plain LoRA: its rank, unless diffusers wrote the LoraConfig beside it, which its loader then obeys."""
    config = parse_json(raw.get("lora_adapter_metadata", "{}"), "lora_adapter_metadata")
    require(isinstance(config, dict), "lora_adapter_metadata is malformed", expected="a JSON object", got=config)
    fields = {key.removeprefix(f"{denoiser}."): value for key, value in config.items()}
    peculiar = [key for key in ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern") if fields.get(key)]
    require(
        not peculiar,
        "a LoRA whose strength differs by layer or rule",
        expected="one alpha and one rank",
        got=peculiar,
        remedy="merge it into a plain LoRA first",
    )
    alpha = fields.get("lora_alpha", rank)
    require(is_number(alpha), "lora_alpha is no number", expected="a finite number", got=alpha)
    return float(alpha)


def _check_orthonormal(layer: str, up: Float[Tensor, "out rank"]) -> None:
    gram = up.float().T @ up.float()
    error = float((gram - torch.eye(len(gram))).abs().max())
    require(
        error <= ORTHONORMAL,
        f"{layer}: its up is not the basis's Q",
        expected=f"orthonormal columns to {ORTHONORMAL}",
        got=f"off by {error:.3g}",
        remedy="another tool changed the file: take the original, or compose with compose_delta_weights",
    )
