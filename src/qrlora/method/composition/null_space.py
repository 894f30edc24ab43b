"""Null-space projection: ΔWᵢ (I - c V Vᵀ), V (in, k) an orthonormal basis of the row spaces of all other ΔW.

Two adapters interfere where they read the same input directions. The projection takes the share c of each that lies in
the row spaces of the others. c = 0 is the plain sum. c = 1 is hard projection, as NP-LoRA (arXiv 2511.11051) applies it
to the content adapter alone; here all parts are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

RANK_TOLERANCE = 1e-10  # of squared singular values, relative: below it a row space has no further dimension


def row_space(rows: Float[Tensor, "rank in"]) -> Float[Tensor, "dims in"]:
    """Orthonormal rows that span the given ones, float64 on the CPU: with A Aᵀ = U Λ Uᵀ they are Λ^(-1/2) Uᵀ A."""
    rows = rows.detach().cpu().double()
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > RANK_TOLERANCE * values.max().clamp(min=torch.finfo(values.dtype).tiny)
    return (vectors[:, kept] / values[kept].sqrt()).T @ rows


def project_rows(
    rows: Sequence[Float[Tensor, "_ in"]], spaces: Sequence[Float[Tensor, "_ in"]], strength: float
) -> list[Float[Tensor, "_ in"]]:
    """The rows of every part in one layer, less `strength` of what lies in the row spaces of the other parts; float32.

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
