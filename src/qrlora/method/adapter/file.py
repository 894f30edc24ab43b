"""Adapter files: safetensors only, three spellings, one strict reader, one atomic writer.

Compact spelling: one tensor `<layer>.delta_r` per layer, (rank, in). A triangular ΔR is packed into one dimension: row
after row, of row i the entries from columns[i] on (the others are zero by definition, see `record.triangular_mask`).

For an adapter on a basis, rank and columns are counted per layer: a layer has those of `qrlora.columns` that are below
the smaller side of its base weight (out, in · kernel), so only a small layer has fewer than all. `qrlora.rank` is the
number of `qrlora.columns`, and the scaling of every layer is s = alpha / `qrlora.rank`.

LoRA spelling: `<denoiser>.<layer>.lora_A.weight` = s · ΔR, (rank, in) or (rank, in, kh, kw), and `.lora_B.weight` = Q's
columns, (out, rank) or (out, rank, 1, 1). alpha equals rank and there are no `.alpha` keys: diffusers reads it as is,
each layer at its own rank.

Kohya spelling: the same pairs under the names of another ecosystem, `<name>.lora_down.weight`, `<name>.lora_up.weight`,
and `<name>.alpha` = the layer's rank. Which name stands for which layer is in the metadata, `qrlora.names` (JSON:
layer -> name).

The metadata of all three describes the tensors of that very file, every field as a string under `qrlora.<field>`; plus
`qrlora.format` (the spelling), `qrlora.layers` (JSON: layer -> [shape of the base weight, its digest, sketch of Q], in
older files without the sketch), `qrlora.recipe_digest` and `qrlora.digest` (see qrlora._tensor_file; older files have
none). Notes for other programs (`NOTES`: modelspec.*, ss_*) may stand beside them; only their hashes are read.
A reader MUST refuse a file with any other key, a missing key, or a tensor that these do not call for.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora._files import write_atomically
from qrlora._tensor_file import check_digest, packed
from qrlora.errors import MismatchError, bounded
from qrlora.method.adapter.container import (
    about,
    check_entries,
    check_finite,
    check_is_file,
    check_keys,
    check_said_hashes,
    note_undigested,
    parse_json,
    read_header,
    read_tensors,
)
from qrlora.method.adapter.metadata import decode_layers, decode_metadata, decode_names, encode_metadata, is_number, own
from qrlora.method.adapter.record import Adapter, AdapterMetadata, require
from qrlora.method.basis import Basis

SPELLINGS = ("compact", "lora", "kohya")
ORTHONORMAL = 0.05  # what rounding Q to bfloat16 leaves of QᵀQ = I, with room; a scaled or foreign Q is far beyond it
DIFFUSERS_KEY = re.compile(r"(transformer|unet)\.(.+)\.lora_([AB])\.weight")


def save_adapter(
    adapter: Adapter,
    path: str | Path,
    spelling: str = "compact",
    basis: Basis | None = None,
    *,
    names: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `adapter` to a .safetensors file, all or nothing: an interrupted write leaves what was there before.

    The LoRA and kohya spellings of an adapter on a basis need that `basis` (or one with more layers) for its Q; the
    kohya spelling needs `names`, layer -> name. `notes` is metadata for other programs, keys as `NOTES` allows; the
    digest of the tensors is added to them. `check` may refuse the written file before it gets its name.
    Raises AdapterFileError (unknown spelling, NaN, other suffix), MismatchError (another basis, none), OutputError
    (says where the file was written instead).
    """
    path = Path(path)
    require(spelling in SPELLINGS, "unknown spelling", expected=" or ".join(SPELLINGS), got=spelling)
    require(path.suffix == ".safetensors", "adapters are safetensors", expected="*.safetensors", got=path.name)
    if spelling == "compact":
        require(
            adapter.metadata.on_basis,
            f"a {adapter.metadata.method} adapter has up matrices of its own, and no compact spelling",
            expected="method qrlora",
            got=adapter.metadata.method,
            remedy='save it with spelling="lora"',
        )
        tensors = compact_tensors(adapter)
    else:
        named = spelling == "lora" or set(names or {}) >= set(adapter.deltas)
        lacking = sorted(set(adapter.deltas) - set(names or {}))
        require(named, "layers without a name in that spelling", expected="a name for each layer", got=lacking)
        adapter = _folded(adapter)
        tensors = _lora_tensors(adapter, basis, names if spelling == "kohya" else None)
    check_finite(tensors)
    metadata = encode_metadata(adapter, spelling, names) | dict(notes or {})
    write_atomically(path, packed(tensors, metadata, for_others=bool(notes)), check=check)


def load_adapter(path: str | Path) -> Adapter:
    """Read an adapter in any spelling, or a plain LoRA with diffusers' keys (method "lora").

    ΔR keeps the file's dtype. The Q in a LoRA-spelled qrlora file is dropped (it belongs to the basis), after a check
    that it is orthonormal. Raises AdapterFileError naming the file, what was expected, what was found, and the remedy.
    """
    path = Path(path)
    with about(path):
        check_is_file(path)
        with path.open("rb") as stream:
            whole = read_header(stream)
            header = {key: entry for key, entry in whole.items() if key != "__metadata__"}
            raw = whole.get("__metadata__", {})
            check_entries(header)
            ours = is_ours(raw)
            plan = plan_ours(raw) if ours else _plan_foreign(raw, header)
            plan.check_header(header)
            tensors, body_digest = read_tensors(stream, whole)
        check_digest(whole, body_digest)
        check_said_hashes(path, raw, tensors, body_digest)
        check_finite(tensors)
        adapter = plan.adapter(tensors, path.stem)
        adapter.check_strength()
    if ours:
        note_undigested(path, raw)
    return adapter


def _folded(adapter: Adapter) -> Adapter:
    """Return the same adapter with its scaling inside ΔR: alpha = rank."""
    deltas = {name: (adapter.scaling * delta.float()).to(delta.dtype) for name, delta in adapter.deltas.items()}
    metadata = dataclasses.replace(adapter.metadata, alpha=float(adapter.metadata.rank))
    return dataclasses.replace(adapter, metadata=metadata, deltas=deltas)


def compact_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return ΔR of every layer as the compact spelling stores it."""
    meta = adapter.metadata
    tensors = {}
    for name, delta in adapter.deltas.items():
        delta = delta.detach().cpu()
        tensors[f"{name}.delta_r"] = pack(delta, adapter.columns(name)) if meta.triangular else delta.contiguous()
    return tensors


def _pair_keys(layer: str, denoiser: str, names: Mapping[str, str] | None) -> tuple[str, str]:
    """Return the keys of a layer's down and up."""
    if names is None:
        return f"{denoiser}.{layer}.lora_A.weight", f"{denoiser}.{layer}.lora_B.weight"
    return f"{names[layer]}.lora_down.weight", f"{names[layer]}.lora_up.weight"


def _lora_tensors(adapter: Adapter, basis: Basis | None, names: Mapping[str, str] | None) -> dict[str, Tensor]:
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
        down_key, up_key = _pair_keys(name, adapter.metadata.denoiser, names)
        shape = adapter.shapes[name]
        kernel = (1,) * (len(shape) - 2)
        tensors[down_key] = down.detach().cpu().reshape(-1, *shape[1:]).contiguous()
        tensors[up_key] = up.detach().cpu().to(down.dtype).reshape(*up.shape, *kernel).contiguous()
        if names is not None:  # float32, because a half-precision alpha of 129 would be 128
            tensors[f"{names[name]}.alpha"] = torch.tensor(float(len(down)))
    return tensors


def pack(delta: Float[Tensor, "rank in"], columns: tuple[int, ...]) -> Float[Tensor, " kept"]:
    """Return the entries of a triangular ΔR that may be non-zero, row after row, of row i those from columns[i] on."""
    return torch.cat([row[column:] for row, column in zip(delta, columns, strict=True)])


def unpack(packed: Float[Tensor, " kept"], columns: tuple[int, ...], width: int) -> Float[Tensor, "rank in"]:
    """Undo `pack`."""
    delta = packed.new_zeros(len(columns), width)
    kept = torch.split(packed, [width - column for column in columns])
    for row, column, part in zip(delta, columns, kept, strict=True):
        row[column:] = part
    return delta


def tensor_shapes(
    meta: AdapterMetadata,
    layers: Mapping[str, tuple[int, ...]],
    spelling: str,
    names: Mapping[str, str] | None = None,
) -> dict[str, list[int]]:
    """Return key -> shape of a file's tensors; `layers` are the shapes of the base weights, `names` as in saving."""
    keys: dict[str, list[int]] = {}
    for name, shape in layers.items():
        width, rank = math.prod(shape[1:]), meta.rank_in(shape)
        if spelling == "compact":
            kept = sum(width - column for column in meta.columns_in(shape))
            keys[f"{name}.delta_r"] = [kept] if meta.triangular else [rank, width]
        else:
            down, up = _pair_keys(name, meta.denoiser, names)
            keys[down] = [rank, *shape[1:]]
            keys[up] = [shape[0], rank, *[1] * (len(shape) - 2)]
            keys |= {f"{names[name]}.alpha": []} if names is not None else {}
    return keys


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The tensors that the metadata asks for: each key's shape is checked before a byte of tensor data is read."""

    spelling: str
    metadata: AdapterMetadata
    shapes: dict[str, tuple[int, ...]]
    digests: dict[str, str]
    sketches: dict[str, tuple[float, ...]]
    names: Mapping[str, str] | None = None

    def check_header(self, header: Mapping[str, Any]) -> None:
        expected = tensor_shapes(self.metadata, self.shapes, self.spelling, self.names)
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
                deltas[layer] = unpack(stored, meta.columns_in(shape), width) if meta.triangular else stored
            else:
                keys = _pair_keys(layer, meta.denoiser, self.names)
                deltas[layer], ups[layer] = (tensors[key].flatten(1) for key in keys)
                if self.names is not None:
                    alpha = float(tensors[f"{self.names[layer]}.alpha"])
                    rank = meta.rank_in(shape)
                    require(alpha == rank, f"{layer}: alpha is not rank", expected=rank, got=alpha)
        if meta.on_basis:
            for layer, up in ups.items():
                _check_orthonormal(layer, up)
        return Adapter(meta, deltas, self.shapes, self.digests, None if meta.on_basis else ups, name, self.sketches)


def is_ours(raw: Mapping[str, str]) -> bool:
    """Return True for the metadata of a file that `save_adapter` wrote."""
    return any(key.startswith("qrlora.") for key in raw)


def plan_ours(raw: Mapping[str, str]) -> _Plan:
    """Return the tensors that a file's metadata calls for. Raises AdapterFileError for metadata of another form."""
    raw = own(raw)
    remedy = "`qrlora space show FILE` describes it, `qrlora train --space FILE` trains in it"
    require("qrlora.space" not in raw, "a space of adapters, no adapter", expected="an adapter", remedy=remedy)
    meta = decode_metadata(raw)
    spelling = raw["qrlora.format"]
    require(spelling in SPELLINGS, "unknown qrlora.format", expected=" or ".join(SPELLINGS), got=spelling)
    shapes, digests, sketches = decode_layers(raw["qrlora.layers"])
    if spelling != "compact":
        require(meta.alpha == meta.rank, "alpha is not rank", expected=f"alpha {meta.rank}", got=meta.alpha)
    else:
        require(meta.on_basis, "no compact spelling of this method", expected="qrlora", got=meta.method)
    names = decode_names(raw["qrlora.names"], shapes) if spelling == "kohya" else None
    return _Plan(spelling, meta, shapes, digests, sketches, names)


def _plan_foreign(raw: Mapping[str, str], header: Mapping[str, Any]) -> _Plan:
    matches = {key: DIFFUSERS_KEY.fullmatch(key) for key in header}
    unexpected = sorted(key for key, match in matches.items() if match is None)
    layers = {match.group(1, 2) for match in matches.values() if match}
    wanted = {f"{denoiser}.{name}.lora_{side}.weight" for denoiser, name in layers for side in "AB"}
    missing = sorted(wanted - set(header))
    require(
        bool(layers) and not unexpected and not missing,
        "neither a qrlora adapter nor a plain LoRA with diffusers' keys",
        expected=f"transformer.<layer>.lora_A/lora_B.weight only; missing: {bounded(missing or 'none')}",
        got=f"unexpected: {bounded(unexpected or 'none')}",
        remedy="read it with qrlora.models.exchange.load_any, or convert it once: qrlora import FILE",
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
    return _Plan("lora", meta, shapes, {}, {})


def _foreign_alpha(raw: Mapping[str, str], denoiser: str, rank: int) -> float:
    """Return alpha of a plain LoRA: its rank, unless diffusers wrote the LoraConfig beside it, which its loader then
    obeys."""
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
