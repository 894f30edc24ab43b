"""Files of spaces: `<name>.space.safetensors`.

Tensors: `<layer>.delta_r`, the mean, as in a compact adapter; `<layer>.components`, (k, kept) of a triangular ΔR (the
entries that may be non-zero, row after row) or (k, rank, in); `coordinates`, (n, k). All are float32. Metadata: that of
the mean as an adapter (`qrlora.<field>`, see qrlora.method.adapter.file), and `qrlora.space`, JSON: `members`, a list
of [name, digest], and `variances`, a list of numbers. A reader MUST refuse any other key and any missing one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora._files import write_atomically
from qrlora._tensor_file import check_digest, packed
from qrlora.method.adapter.container import (
    about,
    check_finite,
    check_is_file,
    check_keys,
    note_undigested,
    parse_json,
    read_header,
    read_tensors,
)
from qrlora.method.adapter.file import compact_tensors, plan_ours, tensor_shapes
from qrlora.method.adapter.metadata import encode_metadata, is_number
from qrlora.method.adapter.record import require, triangular_mask
from qrlora.method.space.record import Space

SUFFIX = ".space.safetensors"
KEY = "qrlora.space"
COORDINATES = "coordinates"


def save_space(space: Space, path: str | Path) -> None:
    """Write a space, all or nothing. Raises AdapterFileError for another suffix, OutputError where it fails."""
    path = Path(path)
    require(path.name.endswith(SUFFIX), "a space has a name of its own", expected=f"*{SUFFIX}", got=path.name)
    tensors = compact_tensors(space.mean) | {COORDINATES: space.coordinates.float().contiguous()}
    for layer, parts in space.components.items():
        mask = _mask(space, layer)
        tensors[f"{layer}.components"] = parts.contiguous() if mask is None else parts[:, mask]
    check_finite(tensors)
    said = {"members": [list(member) for member in space.members], "variances": list(space.variances)}
    write_atomically(path, packed(tensors, encode_metadata(space.mean, "compact") | {KEY: json.dumps(said)}))


def load_space(path: str | Path) -> Space:
    """Read a space; AdapterFileError names the file, what was expected, what was found, and the remedy."""
    path = Path(path)
    with about(path):
        check_is_file(path)
        with path.open("rb") as stream:
            header = read_header(stream)
            raw = dict(header.get("__metadata__", {}))
            remedy = "name a file that `qrlora space build` wrote; `qrlora inspect` describes an adapter"
            require(KEY in raw, "no space of adapters", expected=KEY, got=sorted(raw), remedy=remedy)
            members, variances = _said(raw.pop(KEY))
            plan = plan_ours(raw)
            require(plan.spelling == "compact", "no space's format", expected="compact", got=plan.spelling)
            entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
            shape = entries.get(COORDINATES, {}).get("shape")
            count = shape[-1] if isinstance(shape, list) and shape else 0
            shapes = tensor_shapes(plan.metadata, plan.shapes, "compact")
            components = {f"{key.removesuffix('.delta_r')}.components": [count, *shapes[key]] for key in shapes}
            expected = shapes | components | {COORDINATES: [len(members), count]}
            check_keys("tensors", list(expected), entries)
            wrong = {key: entries[key].get("shape") for key in expected if entries[key].get("shape") != expected[key]}
            dtypes = {key: entries[key].get("dtype") for key in expected}
            odd = {key: dtype for key, dtype in dtypes.items() if dtype != "F32"} | wrong
            require(not odd, "tensors of another shape or dtype", expected={k: expected[k] for k in odd}, got=odd)
            tensors, body_digest = read_tensors(stream, header)
        check_digest(header, body_digest)
        check_finite(tensors)
        note_undigested(path, raw)
        mean = plan.adapter(tensors, "mean")
        parts = {layer: _unpacked(tensors[f"{layer}.components"], plan, layer) for layer in mean.deltas}
        return Space(mean, parts, variances, members, tensors[COORDINATES].double())


def _said(text: str) -> tuple[tuple[tuple[str, str], ...], tuple[float, ...]]:
    said = parse_json(text, KEY)
    members, variances = (said.get(name) if isinstance(said, dict) else None for name in ("members", "variances"))
    pairs = isinstance(members, list) and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one) for one in members
    )
    numbers = isinstance(variances, list) and all(map(is_number, variances))
    known = isinstance(said, dict) and set(said) == {"members", "variances"}
    wanted = "members as [name, digest], and variances"
    require(pairs and numbers and known, f"{KEY} is malformed", expected=wanted, got=text[:200])
    return tuple((name, digest) for name, digest in said["members"]), tuple(map(float, said["variances"]))


def _mask(space: Space, layer: str) -> Tensor | None:
    """Return the mask of entries of a triangular ΔR that may be non-zero; None for a dense one."""
    width = space.mean.deltas[layer].shape[1]
    return triangular_mask(space.mean.columns(layer), width) if space.mean.metadata.triangular else None


def _unpacked(stored: Tensor, plan: Any, layer: str) -> Tensor:
    if not plan.metadata.triangular:
        return stored
    width = torch.Size(plan.shapes[layer][1:]).numel()
    columns = plan.metadata.columns_in(plan.shapes[layer])
    whole = stored.new_zeros(len(stored), len(columns), width)
    whole[:, triangular_mask(columns, width)] = stored
    return whole
