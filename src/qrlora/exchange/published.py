"""Checkpoints of the published QR-LoRA code (arXiv 2507.04599), read by their keys and the paper's equations.

Per layer the file holds `lora.q` = Q (out, rank), `lora.base_r` = R and `lora.delta_r` = ΔR (rank, in), with
W = W_res + s·Q·R and W' = W_res + s·Q·(R + ΔR), so ΔW = s·Q·ΔR. Its Q and R are a QR decomposition without a rule for
signs: Q = Q₀ D and s·R = D R₀, where Q₀, R₀ are our basis (diag(R₀) > 0) and D is diagonal with entries ±1. Therefore
ΔR₀ = D ΔR on our basis, at the same s. The file does not say s; with the base weight at hand it follows from QᵀW = s·R.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.adapter import Adapter, AdapterMetadata
from qrlora.adapter.container import about
from qrlora.adapter.record import require, triangular_mask
from qrlora.basis import Basis, fingerprint
from qrlora.errors import MismatchError
from qrlora.exchange.tensors import file_digest, read_tensor_file

_KEY = re.compile(r"(?:(transformer|unet)\.)?(.+)\.lora\.(q|base_r|delta_r)\.weight")
_PARTS = ("q", "base_r", "delta_r")
ROUNDING = 0.05
"""How far bfloat16 may move QᵀQ from 1, or QᵀW from s·R; another base weight or a random Q is far beyond it."""


@dataclass(frozen=True)
class Published:
    """One checkpoint: `layers` maps a layer to (q, base_r, delta_r), all of one `rank`."""

    layers: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    rank: int
    denoiser: str
    name: str
    digest: str


def is_published(tensors: Mapping[str, Tensor]) -> bool:
    """True if any key is one that only the published code writes."""
    return any(key.endswith((".lora.q.weight", ".lora.base_r.weight", ".lora.delta_r.weight")) for key in tensors)


def load_published(path: str | Path) -> Published:
    """Read a checkpoint; AdapterFileError lists unknown and missing keys, wrong shapes, and layers whose Q is no Q.

    Where its decomposition fails the published code goes on with random numbers; such layers are refused.
    """
    path = Path(path)
    tensors, _ = read_tensor_file(path)
    with about(path):
        matches = {key: _KEY.fullmatch(key) for key in tensors}
        unknown = sorted(key for key, match in matches.items() if match is None)
        found: dict[str, dict[str, Tensor]] = {}
        for key, match in sorted(matches.items()):
            if match:
                found.setdefault(match.group(2), {})[match.group(3)] = tensors[key]
        missing = sorted(
            f"{layer}.lora.{part}.weight" for layer, p in found.items() for part in _PARTS if part not in p
        )
        require(
            not unknown and not missing,
            "no complete checkpoint of the published QR-LoRA code",
            expected=f"lora.q, lora.base_r and lora.delta_r of every layer; missing: {missing or 'none'}",
            got=f"unknown: {unknown or 'none'}",
            remedy="take the original file; one with text encoder layers is not read",
        )
        denoisers = sorted({match.group(1) or "transformer" for match in matches.values() if match})
        require(len(denoisers) == 1, "layers of two denoisers", expected="transformer or unet", got=denoisers)
        layers = {layer: (p["q"], p["base_r"], p["delta_r"]) for layer, p in found.items()}
        rank = _one_rank(layers)
        _check_orthonormal(layers)
    return Published(layers, rank, denoisers[0], path.stem, file_digest(path))


def _one_rank(layers: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> int:
    wrong = {
        layer: [tuple(part.shape) for part in parts]
        for layer, parts in layers.items()
        if any(part.ndim != 2 for part in parts)
        or parts[1].shape != parts[2].shape
        or parts[0].shape[1] != parts[2].shape[0]
    }
    require(not wrong, "shapes that do not fit", expected="(out, rank), (rank, in), (rank, in)", got=wrong)
    ranks = sorted({parts[0].shape[1] for parts in layers.values()})
    require(len(ranks) == 1, "layers of different rank", expected="one rank", got=ranks)
    return ranks[0]


def _check_orthonormal(layers: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    errors = {name: _distance_from_identity(q.float().T @ q.float()) for name, (q, _, _) in layers.items()}
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
    """The checkpoint as the plain LoRA that it equals: up = Q, down = ΔR, at alpha / rank (1 unless given)."""
    rank = published.rank
    metadata = AdapterMetadata(
        method="lora",
        rank=rank,
        alpha=float(rank) if alpha is None else float(alpha),
        denoiser=published.denoiser,
        provenance=_provenance(published),
    )
    deltas = {layer: delta.float() for layer, (_, _, delta) in published.layers.items()}
    ups = {layer: q.float() for layer, (q, _, _) in published.layers.items()}
    shapes = {layer: (len(ups[layer]), deltas[layer].shape[1]) for layer in deltas}
    return Adapter(metadata, deltas, shapes, ups=ups, name=published.name)


def _provenance(published: Published) -> dict[str, dict[str, str]]:
    return {"imported": {"file": published.name, "sha256": published.digest, "form": "published"}}


def on_basis(published: Published, weights: Mapping[str, Tensor], basis: Basis, alpha: float | None = None) -> Adapter:
    """The checkpoint as ΔR on our basis: the same ΔW, in a file of ΔR alone that composes with every other.

    `weights` and `basis` are the base model's, at the checkpoint's rank. Raises MismatchError if a layer is missing,
    stands on another weight, or was trained at another scaling than `alpha` says.
    """
    _check_layers(published, weights, basis)
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
            remedy="project it onto a basis of your choice instead (--basis-rank)",
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


def _check_layers(published: Published, weights: Mapping[str, Tensor], basis: Basis) -> None:
    if basis.rank != published.rank:
        raise MismatchError("a basis of another rank", expected=published.rank, got=basis.rank)
    wanted = {layer: (len(q), delta.shape[1]) for layer, (q, _, delta) in published.layers.items()}
    got = {layer: tuple(weights[layer].shape) if layer in weights else "no such layer" for layer in wanted}
    differ = {layer: got[layer] for layer in wanted if got[layer] != wanted[layer] or layer not in basis}
    if differ:
        raise MismatchError(
            f"{len(differ)} of {len(wanted)} layers of the checkpoint are not this model's",
            expected={layer: wanted[layer] for layer in differ},
            got=differ,
            remedy="name the base model it was trained on (--model)",
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
            remedy="name the base model it was trained on (--model)",
        )
    return middle
