"""Checkpoints of the published QR-LoRA code (arXiv 2507.04599), read by their keys and the paper's equations.

Per layer the file holds `lora.q` = Q (out, rank), `lora.base_r` = R and `lora.delta_r` = ΔR (rank, in), with
W = W_res + s·Q·R and W' = W_res + s·Q·(R + ΔR), so ΔW = s·Q·ΔR. Its Q and R are a QR decomposition without a rule for
signs: Q = Q₀ D and s·R = D R₀, where Q₀, R₀ are our basis (diag(R₀) > 0) and D is diagonal with entries ±1. Therefore
ΔR₀ = D ΔR on our basis, at the same s. The file does not say s; with the base weight at hand it follows from QᵀW = s·R.

The code's other mode trains Q and R both and saves them whole, as `lora.up` = Q' (out, rank) and `lora.down` = R'
(rank, in), with W' = W_res + s·Q'·R'. Such a file holds no difference to the base weight; with the base weight at hand
ΔW = s·Q'·R' - Q₀·R₀.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError, bounded
from qrlora.method.adapter import Adapter, AdapterMetadata
from qrlora.method.adapter.container import about
from qrlora.method.adapter.record import require, triangular_mask
from qrlora.method.basis import Basis, fingerprint
from qrlora.models.exchange.tensors import file_digest, read_tensor_file

_KEY = re.compile(r"(?:(transformer|unet)\.)?(.+?)\.lora\.(\w+)\.weight")
_PARTS = ("q", "base_r", "delta_r")
_WHOLE = ("up", "down")
_TWICE = ".to_out.0.to_out.0"
"""The code that saves Q and R whole writes this layer's name twice; nothing else does."""
ROUNDING = 0.05
"""Most that bfloat16 moves QᵀQ from 1, or QᵀW from s·R; another base weight or a random Q is far beyond it."""
NEAR_ORTHONORMAL = 0.2
"""Largest |QᵀQ - 1| of a Q that was trained a little; the up of a LoRA starts at zero, at distance 1."""
SAME_CORE = 0.2
"""Least cosine of Q' R' and Q₀ R₀: training turns the core; a LoRA's ΔW or another core is at a cosine near 0."""


@dataclass(frozen=True)
class Published:
    """One checkpoint of one `rank`: `layers` maps a layer to (q, base_r, delta_r), or to (up, down) if `whole`."""

    layers: Mapping[str, tuple[Tensor, ...]]
    rank: int
    denoiser: str
    name: str
    digest: str
    whole: bool = False


def is_published(tensors: Iterable[str]) -> bool:
    """Return True if any key is one that only the published code writes for ΔR."""
    return any(key.endswith((".lora.q.weight", ".lora.base_r.weight", ".lora.delta_r.weight")) for key in tensors)


def may_be_whole(keys: Iterable[str]) -> bool:
    """Return False if the keys alone say that `is_whole` is false."""
    return any(_TWICE in key or key.endswith(".lora.up.weight") for key in keys)


def is_whole(tensors: Mapping[str, Tensor]) -> bool:
    """Return True if Q and R were both trained; read as a LoRA, such a file would add the base's core again."""
    ups = [up.flatten(1).float() for key, up in tensors.items() if key.endswith(".lora.up.weight")]
    return any(_TWICE in key for key in tensors) or (
        bool(ups) and all(_distance_from_identity(up.T @ up) <= NEAR_ORTHONORMAL for up in ups)
    )


def load_published(path: str | Path, tensors: Mapping[str, Tensor] | None = None) -> Published:
    """Read a checkpoint of either mode; `tensors` if they were read from it already.

    AdapterFileError lists unknown and missing keys, wrong shapes, and layers whose Q is not orthonormal: where its SVD
    fails, the published code trains on with random numbers.
    """
    path = Path(path)
    tensors = read_tensor_file(path)[0] if tensors is None else tensors
    with about(path):
        parts = _WHOLE if is_whole(tensors) else _PARTS
        layers, denoiser = _layers_of(tensors, parts)
        rank = _one_rank(layers)
        if parts is _PARTS:
            _check_orthonormal(layers)
    return Published(layers, rank, denoiser, path.stem, file_digest(path), whole=parts is _WHOLE)


def _layers_of(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> tuple[dict[str, tuple[Tensor, ...]], str]:
    """Layer -> its tensors in the order of `parts`, and the denoiser they belong to."""
    matches = {key: _KEY.fullmatch(key.replace(_TWICE, _TWICE[: len(_TWICE) // 2])) for key in tensors}
    matches = {key: match if match and match.group(3) in parts else None for key, match in matches.items()}
    unknown = sorted(key for key, match in matches.items() if match is None)
    found: dict[str, dict[str, Tensor]] = {}
    for key, match in sorted(matches.items()):
        if match:
            found.setdefault(match.group(2), {})[match.group(3)] = tensors[key]
    missing = sorted(f"{layer}.lora.{part}.weight" for layer, p in found.items() for part in parts if part not in p)
    require(
        not unknown and not missing,
        "no complete checkpoint of the published QR-LoRA code",
        expected=f"{', '.join(f'lora.{part}' for part in parts)} of every layer; missing: {bounded(missing or 'none')}",
        got=f"unknown: {bounded(unknown or 'none')}",
        remedy="take the original file; one with text encoder layers is not read",
    )
    denoisers = sorted({match.group(1) or "transformer" for match in matches.values() if match})
    require(len(denoisers) == 1, "layers of two denoisers", expected="transformer or unet", got=denoisers)
    return {layer: tuple(p[part] for part in parts) for layer, p in found.items()}, denoisers[0]


def _one_rank(layers: Mapping[str, tuple[Tensor, ...]]) -> int:
    wrong = {
        layer: [tuple(part.shape) for part in parts]
        for layer, parts in layers.items()
        if any(part.ndim != 2 for part in parts)
        or any(part.shape != (parts[0].shape[1], parts[-1].shape[1]) for part in parts[1:])
    }
    require(not wrong, "shapes that do not fit", expected="(out, rank), then (rank, in)", got=wrong)
    ranks = sorted({parts[0].shape[1] for parts in layers.values()})
    require(len(ranks) == 1, "layers of different rank", expected="one rank", got=ranks)
    return ranks[0]


def _check_orthonormal(layers: Mapping[str, tuple[Tensor, ...]]) -> None:
    errors = {name: _distance_from_identity(q.float().T @ q.float()) for name, (q, *_) in layers.items()}
    bad = {name: round(error, 3) for name, error in errors.items() if error > ROUNDING}
    require(
        not bad,
        f"{len(bad)} of {len(layers)} layers have a random Q, as the published code leaves it if a decomposition fails",
        expected=f"orthonormal columns to {ROUNDING}",
        got=bad,
        remedy="train again; such a run did not train on its base model's weights",
    )


def _distance_from_identity(gram: Float[Tensor, "rank rank"]) -> float:
    return float((gram - torch.eye(len(gram))).abs().max())


def as_lora(published: Published, alpha: float | None = None) -> Adapter:
    """Return the checkpoint as the plain LoRA that it equals: up = Q, down = ΔR, at alpha / rank (1 unless given)."""
    require(
        not published.whole,
        "a basis that was trained and saved whole, Q as lora.up and R as lora.down: no difference to the base weight",
        expected="the base model too, or a LoRA",
        got="no base model",
        remedy="name the base model that it was trained on, for the difference: `qrlora import FILE --model MODEL`",
    )
    ups = {layer: q.float() for layer, (q, *_) in published.layers.items()}
    downs = {layer: parts[-1].float() for layer, parts in published.layers.items()}
    return _lora(published, "lora", ups, downs, 1.0 if alpha is None else alpha / published.rank)


def as_difference(published: Published, basis: Basis, alpha: float | None = None) -> Adapter:
    """A checkpoint whose Q and R were saved whole, as the LoRA of twice its rank that ΔW = s Q' R' - Q₀ R₀ equals.

    Written s (Q₀ ΔR + ΔQ (R₀ / s + ΔR)) with ΔQ = Q' D - Q₀ and ΔR = D R' - R₀ / s, so that no digit is lost to taking
    a small difference of large products. `basis` is the base model's, at the checkpoint's rank; s = alpha / rank, which
    that code sets to 1. Raises MismatchError if a layer is missing or stands on another weight.
    """
    _check_layers(published, {name: (len(basis[name].q), basis[name].r.shape[1]) for name in basis}, basis)
    scaling = 1.0 if alpha is None else alpha / published.rank
    ups: dict[str, torch.Tensor] = {}
    downs: dict[str, torch.Tensor] = {}
    strangers: dict[str, float] = {}
    for layer, (q, r) in published.layers.items():
        q0, r0 = basis[layer].q.cpu().float(), basis[layer].r.cpu().float() / scaling
        signs = torch.where((q0 * q.float()).sum(0) < 0, -1.0, 1.0)
        q, r = q.float() * signs, signs[:, None] * r.float()
        ups[layer], downs[layer] = torch.cat([q0, q - q0], 1), torch.cat([r - r0, r])
        cosine = float(((q0.T @ q @ r) * r0).sum() / (q @ r).norm() / r0.norm())
        strangers |= {} if cosine > SAME_CORE else {layer: round(cosine, 3)}
    if strangers:
        raise MismatchError(
            f"{len(strangers)} of {len(ups)} layers of the checkpoint stand on another base weight",
            expected=f"Q R at a cosine above {SAME_CORE} to the base weight's own, which training turns but a little",
            got=strangers,
            remedy="name the base model it was trained on: `qrlora import FILE --model MODEL`",
        )
    return _lora(published, "qrlora_train_basis", ups, downs, scaling)


def _lora(
    published: Published, method: str, ups: dict[str, Tensor], downs: dict[str, Tensor], scaling: float
) -> Adapter:
    rank = len(next(iter(downs.values())))
    metadata = AdapterMetadata(
        method=method,
        rank=rank,
        alpha=rank * scaling,
        denoiser=published.denoiser,
        provenance=_provenance(published),
    )
    shapes = {layer: (len(ups[layer]), downs[layer].shape[1]) for layer in downs}
    return Adapter(metadata, downs, shapes, ups=ups, name=published.name)


def _provenance(published: Published) -> dict[str, dict[str, str]]:
    return {"imported": {"file": published.name, "sha256": published.digest, "form": "published"}}


def on_basis(published: Published, weights: Mapping[str, Tensor], basis: Basis, alpha: float | None = None) -> Adapter:
    """Return the checkpoint as ΔR on our basis: the same ΔW, in a file of ΔR alone that composes with every other.

    `weights` and `basis` are the base model's, at the checkpoint's rank. Raises MismatchError if a layer is missing,
    stands on another weight, or was trained at another scaling than `alpha` says.
    """
    _check_layers(published, {name: tuple(weight.shape) for name, weight in weights.items()}, basis)
    scaling = _scaling(published, weights)
    if alpha is not None and abs(alpha / published.rank - scaling) > ROUNDING * scaling:
        got = f"{scaling * published.rank:g}, by Qᵀ W = s R in its layers"
        raise MismatchError("another alpha than the checkpoint was trained at", expected=alpha, got=got)
    exact = published.rank if abs(scaling - 1) < ROUNDING else round(scaling * published.rank, 3)
    deltas: dict[str, Tensor] = {}
    strangers: dict[str, float] = {}
    for layer, (q, _, delta) in published.layers.items():
        overlap = basis[layer].q.cpu().float().T @ q.float()
        signs = overlap.diagonal().sign()
        deltas[layer] = signs[:, None] * delta.float()
        error = _distance_from_identity(overlap * signs)
        strangers |= {layer: round(error, 3)} if error > ROUNDING else {}
    if strangers:
        raise MismatchError(
            f"{len(strangers)} of {len(deltas)} layers have another Q than the basis of these weights",
            expected=f"equal up to signs, to {ROUNDING}",
            got=strangers,
            remedy="project it onto another basis: `qrlora import FILE --model MODEL --basis-rank RANK`",
        )
    return Adapter(
        _metadata(published, deltas, basis, float(alpha if alpha is not None else exact)),
        deltas,
        {layer: tuple(weights[layer].shape) for layer in deltas},
        {layer: basis.digests[layer] for layer in deltas},
        name=published.name,
    )


def _metadata(published: Published, deltas: Mapping[str, Tensor], basis: Basis, alpha: float) -> AdapterMetadata:
    rank = published.rank
    columns = tuple(range(rank))
    dense = any(bool(d[~triangular_mask(columns, d.shape[1])].any()) for d in deltas.values())
    return AdapterMetadata(
        method="qrlora",
        rank=rank,
        alpha=alpha,
        basis_rank=rank,
        columns=columns,
        triangular=not dense,
        algorithm=basis.algorithm,
        basis_seed=basis.seed,
        basis_fingerprint=fingerprint(
            {layer: basis.digests[layer] for layer in deltas}, rank, basis.algorithm, basis.seed
        ),
        denoiser=published.denoiser,
        provenance=_provenance(published),
    )


def _check_layers(published: Published, shapes: Mapping[str, tuple[int, ...]], basis: Basis) -> None:
    if basis.rank != published.rank:
        raise MismatchError("a basis of another rank", expected=published.rank, got=basis.rank)
    wanted = {layer: (len(parts[0]), parts[-1].shape[1]) for layer, parts in published.layers.items()}
    got = {layer: shapes.get(layer, "no such layer") for layer in wanted}
    differ = {layer: got[layer] for layer in wanted if got[layer] != wanted[layer] or layer not in basis}
    if differ:
        raise MismatchError(
            f"{len(differ)} of {len(wanted)} layers of the checkpoint are not this model's",
            expected={layer: wanted[layer] for layer in differ},
            got=differ,
            remedy="name the base model it was trained on: `qrlora import FILE --model MODEL`",
        )


def _scaling(published: Published, weights: Mapping[str, Tensor]) -> float:
    """s by least squares from Qᵀ W = s R; MismatchError lists the layers whose R does not follow from their weight."""
    projected = {
        layer: q.float().T @ weights[layer].detach().cpu().float() for layer, (q, _, _) in published.layers.items()
    }
    found = {
        layer: float((projected[layer] * r.float()).sum() / r.float().square().sum().clamp(min=1e-30))
        for layer, (_, r, _) in published.layers.items()
    }
    middle = sorted(found.values())[len(found) // 2]
    off = {}
    for layer, (_, r, _) in published.layers.items():
        error = float((projected[layer] - middle * r.float()).norm() / projected[layer].norm().clamp(min=1e-30))
        if error > ROUNDING or middle <= 0:
            off[layer] = round(error, 3)
    if off:
        raise MismatchError(
            f"{len(off)} of {len(found)} layers of the checkpoint stand on another base weight",
            expected=f"Qᵀ W = s R to {ROUNDING}",
            got=off,
            remedy="name the base model it was trained on: `qrlora import FILE --model MODEL`",
        )
    return middle
