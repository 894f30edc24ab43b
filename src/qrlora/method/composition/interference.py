"""Interference: what can be known of adapters from their files, before a picture is made.

Interference   of a composition's parts, which share a basis: cosines of ΔW, shared row spaces, energies
Similarity     of any two adapters: cosines of Q, R, ΔR, ΔW as arXiv 2507.04599 reports them
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.method.adapter.record import Adapter
from qrlora.method.basis import Basis
from qrlora.method.composition.null_space import row_space
from qrlora.method.composition.parts import basis_difference, called, known_up, products, scaled_down, union


def cosine(
    inner: Float[Tensor, "*some"], first: Float[Tensor, "*#some"], second: Float[Tensor, "*#some"]
) -> Float[Tensor, "*some"]:
    """Return ⟨a, b⟩ / (‖a‖ ‖b‖) from ⟨a, b⟩, ‖a‖² and ‖b‖²; 0 where one of them is zero."""
    norms = first.sqrt() * second.sqrt()
    return torch.where(norms > 0, inner / norms.clamp(min=torch.finfo(inner.dtype).tiny), 0.0)


@dataclass(frozen=True)
class LayerInterference:
    """Interference in one layer, or in all of them together; lists are in the order of the parts.

    cosine       of ΔWᵢ and ΔWⱼ, without λ; 0 where one of them is zero
    shared_rows  mean squared cosine of the principal angles between the row spaces of ΔRᵢ and ΔRⱼ: 1 if they read the
                 same input directions, about max(rᵢ, rⱼ) / d_in by chance. Total: mean over the layers both adapt
    energy       ‖λᵢ ΔWᵢ‖²_F
    sum_energy   ‖Σ λᵢ ΔWᵢ‖²_F; more than the energies' sum if the parts reinforce, less if they cancel
    """

    cosine: list[list[float]]
    shared_rows: list[list[float]]
    energy: list[float]
    sum_energy: float

    @classmethod
    def of(
        cls,
        gram: Float[Tensor, "parts parts"],
        shared: Float[Tensor, "parts parts"],
        weights: Float[Tensor, " parts"],
    ) -> LayerInterference:
        """Compute it from ⟨ΔWᵢ, ΔWⱼ⟩, shared row spaces (NaN: not both there, read as 0) and λ; all float64."""
        squares = gram.diagonal()
        energy, total = weights.square() * squares, float(weights @ gram @ weights)
        return cls(
            cosine(gram, squares[:, None], squares[None, :]).tolist(),
            shared.nan_to_num(0.0).tolist(),
            energy.tolist(),
            max(total, 0.0),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Interference:
    """Interference of a composition's parts, per layer and in total."""

    parts: tuple[str, ...]
    weights: tuple[float, ...]
    total: LayerInterference
    layers: Mapping[str, LayerInterference]

    @classmethod
    def of(cls, parts: Sequence[tuple[Adapter, float]]) -> Interference:
        """Compute it for adapters on one basis with their weights λ."""
        found = {}
        for name in union(adapter.shapes for adapter, _ in parts):
            rows = [row_space(adapter.deltas[name]) if name in adapter.deltas else None for adapter, _ in parts]
            found[name] = (_gram(parts, name), _shared_rows(rows))
        weights = torch.tensor([weight for _, weight in parts], dtype=torch.float64)
        gram = torch.stack([gram for gram, _ in found.values()]).sum(0)
        # NaN stands for a layer that one of the two does not adapt: the mean leaves it out.
        shared = torch.stack([shared for _, shared in found.values()]).nanmean(0)
        return cls(
            parts=tuple(called(adapter) for adapter, _ in parts),
            weights=tuple(weights.tolist()),
            total=LayerInterference.of(gram, shared, weights),
            layers={name: LayerInterference.of(gram, shared, weights) for name, (gram, shared) in found.items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        return {
            "parts": list(self.parts),
            "weights": list(self.weights),
            "total": self.total.to_dict(),
            "layers": {name: layer.to_dict() for name, layer in self.layers.items()},
        }


def _gram(parts: Sequence[tuple[Adapter, float]], layer: str) -> Float[Tensor, "parts parts"]:
    """⟨ΔWᵢ, ΔWⱼ⟩ of one layer without λ, float64."""
    gram = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    for i, j in itertools.combinations_with_replacement(range(len(parts)), 2):
        first, second = parts[i][0], parts[j][0]
        if layer in first.deltas and layer in second.deltas:
            gram[i, j] = gram[j, i] = _inner_on_basis(first, second, layer)
    return gram


def _inner_on_basis(a: Adapter, b: Adapter, layer: str) -> Float[Tensor, ""]:
    """⟨ΔWₐ, ΔW_b⟩ on one basis = sₐ s_b ⟨ΔRₐ, ΔR_b⟩, because QᵀQ = I."""
    return products(scaled_down(a, layer), scaled_down(b, layer), a.columns(layer), b.columns(layer))[0]


def _shared_rows(rows: Sequence[Float[Tensor, "_ in"] | None]) -> Float[Tensor, "parts parts"]:
    """Mean squared cosine of the principal angles of each pair of row spaces; NaN where one of the two is absent."""
    shared = torch.full((len(rows), len(rows)), math.nan, dtype=torch.float64)
    for i, j in itertools.product(range(len(rows)), repeat=2):
        first, second = rows[i], rows[j]
        if first is not None and second is not None and len(first) and len(second):
            shared[i, j] = (first @ second.T).square().sum() / min(len(first), len(second))
    return shared


@dataclass(frozen=True)
class Similarity:
    """Cosines of Q, R, ΔR and ΔW of two adapters, over the layers both adapt; keys absent where they cannot be known.

    "q", "r"     the bases' columns, and R + s·ΔR (only if both bases are given)
    "delta_r"    s·ΔR in basis coordinates: rows of columns that only one of them owns meet zeros
    "a", "b"     downs and ups of plain LoRAs of one rank
    "delta_w"    ΔW = s·Q·ΔR; from the files alone on one basis, else only if the bases are given
    """

    total: dict[str, float]
    layers: dict[str, dict[str, float]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        only = {"only_first": list(self.only_first), "only_second": list(self.only_second)}
        return {"total": self.total, "layers": self.layers, **only}


def similarity(a: Adapter, b: Adapter, basis_a: Basis | None = None, basis_b: Basis | None = None) -> Similarity:
    """Return the cosines of two adapters per layer and in total, as arXiv 2507.04599 reports them for Q, R and ΔR.

    Raises MismatchError if they have no layer in common, or a basis is not the one its adapter was trained on.
    """
    for adapter, basis in ((a, basis_a), (b, basis_b)):
        if basis is not None and adapter.metadata.on_basis:
            adapter.check_basis(basis)
    common = sorted(name for name in set(a.shapes) & set(b.shapes) if a.shapes[name] == b.shapes[name])
    if not common:
        raise MismatchError("no layer in common", expected=sorted(a.shapes)[:3], got=sorted(b.shapes)[:3])
    one_basis = a.metadata.on_basis and b.metadata.on_basis and basis_difference(a, b) == ({}, {})
    found = {name: _inner_products(a, b, basis_a, basis_b, name, one_basis) for name in common}
    keys = {key for layer in found.values() for key in layer}
    return Similarity(
        total={
            key: float(cosine(*torch.stack([layer[key] for layer in found.values()]).sum(0))) for key in sorted(keys)
        },
        layers={name: {key: float(cosine(*triple)) for key, triple in layer.items()} for name, layer in found.items()},
        only_first=tuple(sorted(set(a.shapes) - set(common))),
        only_second=tuple(sorted(set(b.shapes) - set(common))),
    )


def _inner_products(
    a: Adapter, b: Adapter, basis_a: Basis | None, basis_b: Basis | None, layer: str, one_basis: bool
) -> dict[str, Float[Tensor, " products"]]:
    """(⟨a, b⟩, ⟨a, a⟩, ⟨b, b⟩) of every quantity that can be known; float64."""
    down_a, down_b = scaled_down(a, layer), scaled_down(b, layer)
    up_a, up_b = known_up(a, basis_a, layer), known_up(b, basis_b, layer)
    found = {}
    if a.metadata.on_basis and b.metadata.on_basis:
        columns = a.columns(layer), b.columns(layer)
        found["delta_r"] = products(down_a, down_b, *columns)
        if one_basis:
            found["delta_w"] = found["delta_r"]
        if basis_a is not None and basis_b is not None and up_a is not None and up_b is not None:
            r_a, r_b = (basis[layer].r.cpu().double() for basis in (basis_a, basis_b))
            found["q"] = products(up_a.T, up_b.T, *columns)
            found["r"] = products(r_a[list(columns[0])] + down_a, r_b[list(columns[1])] + down_b, *columns)
    elif a.ups is not None and b.ups is not None and a.metadata.rank == b.metadata.rank:
        rows = tuple(range(a.metadata.rank))
        found["a"] = products(down_a, down_b, rows, rows)
        found["b"] = products(a.ups[layer].cpu().double().T, b.ups[layer].cpu().double().T, rows, rows)
    if "delta_w" not in found and up_a is not None and up_b is not None:
        pairs = ((up_a, down_a, up_b, down_b), (up_a, down_a, up_a, down_a), (up_b, down_b, up_b, down_b))
        found["delta_w"] = torch.stack([_inner_low_rank(*pair) for pair in pairs])
    return found


def _inner_low_rank(
    up_a: Float[Tensor, "out rank_a"],
    down_a: Float[Tensor, "rank_a width"],
    up_b: Float[Tensor, "out rank_b"],
    down_b: Float[Tensor, "rank_b width"],
) -> Float[Tensor, ""]:
    """⟨Uₐ Dₐ, U_b D_b⟩_F = sum of (Uₐᵀ U_b) ∘ (Dₐ D_bᵀ): without forming either product."""
    return ((up_a.T @ up_b) * (down_a @ down_b.T)).sum()
