"""How alike two adapters are: cosines of Q, R, ΔR and ΔW, per layer and in total."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.method.adapter.record import Adapter
from qrlora.method.basis import Basis
from qrlora.method.composition.parts import basis_difference, known_up, products, scaled_down


@dataclass(frozen=True)
class Similarity:
    """Cosines of what two adapters are made of, over the layers both adapt; keys absent where they cannot be known.

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
        """Plain lists and numbers, for JSON."""
        only = {"only_first": list(self.only_first), "only_second": list(self.only_second)}
        return {"total": self.total, "layers": self.layers, **only}


def similarity(a: Adapter, b: Adapter, basis_a: Basis | None = None, basis_b: Basis | None = None) -> Similarity:
    """Cosine similarities of two adapters per layer and in total, as arXiv 2507.04599 reports them for Q, R and ΔR.

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
        total={key: _cosine(torch.stack([layer[key] for layer in found.values()]).sum(0)) for key in sorted(keys)},
        layers={name: {key: _cosine(triple) for key, triple in layer.items()} for name, layer in found.items()},
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


def _cosine(triple: Float[Tensor, " products"]) -> float:
    ab, aa, bb = triple.tolist()
    return ab / math.sqrt(aa * bb) if aa > 0 and bb > 0 else 0.0
