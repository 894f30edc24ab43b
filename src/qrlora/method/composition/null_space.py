"""Null-space projection: ΔWᵢ (I - c V Vᵀ), V (in, k) an orthonormal basis of the row spaces of all other ΔW.

Two adapters interfere where they read the same input directions. The projection takes from each the share c, its
strength, of what lies in the row spaces of the others. c = 0 is the plain sum. c = 1 is hard projection, as NP-LoRA
(arXiv 2511.11051) applies it to the content adapter alone; here all parts are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.method.adapter.record import Adapter

DEFAULT_STRENGTH = 0.5
"""Strength for a subject with a style: better than 0 and 1 with disjoint columns (docs/compare.md)."""
RANK_TOLERANCE = 1e-10  # of squared singular values, relative: below it a row space has no further dimension


def default_strength(adapters: Sequence[Adapter]) -> float:
    """Return the strength that commands, server and demo use where none is given: `DEFAULT_STRENGTH` for one subject
    with one style, else 0, because nothing else was measured."""
    return strength_of_roles([adapter.metadata.role for adapter in adapters])


def strength_of_roles(roles: Sequence[str]) -> float:
    """Return the default strength of adapters with these roles."""
    return DEFAULT_STRENGTH if sorted(roles) == ["style", "subject"] else 0.0


def check_strength(strength: float) -> None:
    """Raise MismatchError unless the strength is from 0 to 1."""
    if not 0 <= strength <= 1:
        raise MismatchError("strength of null-space projection out of range", expected="0 to 1", got=strength)


def project_out(parts: Sequence[tuple[Adapter, float]], strength: float) -> list[tuple[Adapter, float]]:
    """Return the parts at their weights, each ΔWᵢ projected: ΔWᵢ (I - strength · V Vᵀ), layer by layer.

    V (in, k) spans the row spaces of all other ΔW whose weight is not zero; of ΔW = Q ΔR that is the one of ΔR, so no
    basis is needed. The result is float32, on the basis of the adapter, and no longer triangular.

    Raises:
        MismatchError: a strength that is not from 0 to 1, or layers of one name with inputs of different width.
    """
    check_strength(strength)
    if not strength:
        return list(parts)
    _check_widths([adapter for adapter, _ in parts])
    deltas: list[dict[str, Tensor]] = [{} for _ in parts]
    for layer in {name: None for adapter, _ in parts for name in adapter.deltas}:
        own = [i for i, (adapter, _) in enumerate(parts) if layer in adapter.deltas]
        rows = [parts[i][0].deltas[layer] for i in own]
        spaces = [
            row_space(_read(adapter, layer)) if weight else row.new_zeros(0, row.shape[1])
            for row, (adapter, weight) in zip(rows, (parts[i] for i in own), strict=True)
        ]
        for i, projected in zip(own, project_rows(rows, spaces, strength), strict=True):
            deltas[i][layer] = projected
    return [
        (replace(adapter, metadata=replace(adapter.metadata, triangular=False), deltas=left), weight)
        for (adapter, weight), left in zip(parts, deltas, strict=True)
    ]


def _check_widths(adapters: Sequence[Adapter]) -> None:
    widths: dict[str, int] = {}
    for adapter in adapters:
        for name, delta in adapter.deltas.items():
            if widths.setdefault(name, delta.shape[1]) != delta.shape[1]:
                raise MismatchError(f"inputs of other width in {name}", expected=widths[name], got=delta.shape[1])


def _read(adapter: Adapter, layer: str) -> Float[Tensor, "rank in"]:
    """Return as many rows as the adapter has, with the row space of its ΔW; float64: R · down where up = Q R."""
    rows = adapter.deltas[layer].detach().cpu().double()
    if adapter.metadata.on_basis:
        return rows
    r: Tensor = torch.linalg.qr(adapter.up(layer, None).detach().cpu().double()).R
    return r @ rows


def row_space(rows: Float[Tensor, "rank in"]) -> Float[Tensor, "dims in"]:
    """Return orthonormal rows with the span of A's, float64 on the CPU: with A Aᵀ = U Λ Uᵀ they are Λ^(-1/2) Uᵀ A."""
    rows = rows.detach().cpu().double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > RANK_TOLERANCE * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    coefficients: Tensor = (vectors[:, kept] / values[kept].sqrt()).T
    return coefficients @ rows


def project_rows(
    rows: Sequence[Float[Tensor, "_ in"]], spaces: Sequence[Float[Tensor, "_ in"]], strength: float
) -> list[Float[Tensor, "_ in"]]:
    """Return the rows of every part in one layer, less `strength` of what lies in the row spaces of the others;
    float32.

    Args:
        rows: down factor of each part, any float dtype.
        spaces: orthonormal rows (`row_space`) that each part reads, with no rows for a part that reads nothing.
        strength: c, from 0 to 1.
    """
    projected = []
    for i, own in enumerate(rows):
        own = own.detach().cpu().double()
        others = [space for j, space in enumerate(spaces) if j != i and len(space)]
        if others:
            space = row_space(torch.cat(others))
            own = own - strength * (own @ space.T) @ space
        projected.append(own.float())
    return projected
