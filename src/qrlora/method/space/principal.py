"""Mean and principal components of matrices that belong together by name, such as the ΔR of several adapters.

The decomposition is that of the Gram matrix of the centred rows (n x n, float64): with G = U Λ Uᵀ the component of unit
variance is Σᵢ Uᵢₖ (aᵢ - mean) / √n, and aᵢ = mean + Σₖ √n Uᵢₖ cₖ. So nothing of the size n x d is decomposed, and one
layer at a time is held in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

TOLERANCE = 1e-10
"""Variances below this share of the largest are rounding."""


@dataclass(frozen=True, eq=False)
class Principal:
    """A decomposition of n rows.

    mean         name -> mean of the rows, float32
    components   name -> (k, ...), orthogonal, scaled to unit variance of their coordinates, the largest first; float32
    variances    of all components, also of those left out
    coordinates  (n, k) of the rows, float64
    """

    mean: dict[str, Tensor]
    components: dict[str, Tensor]
    variances: tuple[float, ...]
    coordinates: Float[Tensor, "n k"]


def principal(rows: Sequence[Mapping[str, Tensor]], keep: int | None = None) -> Principal:
    """Decompose rows of equal names and shapes; keep: components at most (default: all above rounding)."""
    n = len(rows)
    gram = torch.zeros(n, n, dtype=torch.float64)
    for _, _, centred in _centred(rows):
        gram += centred.flatten(1) @ centred.flatten(1).T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    held = int((values > TOLERANCE * values[0].clamp(min=torch.finfo(values.dtype).tiny)).sum())
    vectors = vectors[:, : min(held, keep or held)]
    # An eigenvector's sign is anybody's choice: here its largest entry is positive, on every machine.
    largest = vectors.abs().argmax(0)
    vectors = vectors * vectors[largest, torch.arange(vectors.shape[1])].sign()
    mean, components = {}, {}
    for name, middle, centred in _centred(rows):
        mean[name] = middle.float()
        components[name] = (torch.tensordot(vectors.T, centred, 1) / n**0.5).float()
    return Principal(mean, components, tuple((values[:held] / n).tolist()), vectors * n**0.5)


def _centred(rows: Sequence[Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, mean, and every row less the mean, in float64 on the CPU."""
    for name in rows[0]:
        stacked = torch.stack([row[name].detach().cpu().double() for row in rows])
        mean = stacked.mean(0)
        yield name, mean, stacked - mean
