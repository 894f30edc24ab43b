"""Compositions: adapters with weights λ on one basis, and what can be known about them before a picture is made.

On one basis ΔWᵢ = sᵢ Q[:, Cᵢ] ΔRᵢ with QᵀQ = I. So Σ λᵢ ΔWᵢ = Q[:, ∪Cᵢ] Σ λᵢ sᵢ ΔRᵢ exactly, at the rank of the union
of the column sets; and ⟨ΔWᵢ, ΔWⱼ⟩ = sᵢ sⱼ ⟨ΔRᵢ, ΔRⱼ⟩ over the columns both own, zero if they own none in common.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.method.adapter.record import Adapter, AdapterMetadata
from qrlora.method.basis import fingerprint
from qrlora.method.composition.interference import Interference
from qrlora.method.composition.null_space import check_strength, project_out
from qrlora.method.composition.parts import (
    basis_difference,
    called,
    check_sum,
    check_weights,
    collected,
    joined,
    scaled_down,
    union,
)

ONTO_BASIS = "`qrlora import FILE --like ADAPTER` puts a LoRA file onto the basis of another adapter"
BY_DELTA_WEIGHT = (
    "`qrlora compose --delta-weights RANK` (compose_delta_weights) sums ΔW itself and cuts the sum back to a rank, "
    "reporting what that loses"
)


@dataclass(frozen=True)
class Composition:
    """Adapters of one basis, each with a weight λ: any number, any finite λ, negative and fractional too.

    null_space: strength c, from 0 to 1, of the null-space projection of the parts: ΔRᵢ (I - c V Vᵀ), V the row spaces
    of all others whose λ is not zero. At 0 the composition is the exact sum. The result is on the same basis, since
    only rows change, but no longer triangular.

    Raises MismatchError if a part is no ΔR on a basis (plain LoRA, train_basis), if the bases differ, or if the
    strength is not from 0 to 1.
    """

    parts: Sequence[tuple[Adapter, float]]
    null_space: float = 0.0

    def __post_init__(self) -> None:
        check_weights(self.parts)
        check_strength(self.null_space)
        for adapter, _ in self.parts:
            _check_on_its_basis(adapter)
        for (first, _), (second, _) in itertools.combinations(self.parts, 2):
            ours, theirs = basis_difference(first, second)
            if ours != theirs:
                raise MismatchError(
                    f"{called(first)} and {called(second)} stand on different bases, so their ΔR cannot be added",
                    expected=ours,
                    got=theirs,
                    remedy=f"train both on one base model and basis; {ONTO_BASIS}; {BY_DELTA_WEIGHT}",
                )

    def adapter(self) -> Adapter:
        """Return the weighted sum of the projected parts as one adapter: float32, alpha = rank, role "composition"."""
        return self._filled_by(partial(self._sum, project_out(self.parts, self.null_space)))

    def blank(self) -> Adapter:
        """Return zeros on all layers and columns of the parts."""
        return self._filled_by(lambda _, columns, width: torch.zeros(len(columns), width))

    def _filled_by(self, delta: Callable[[str, tuple[int, ...], int], Tensor]) -> Adapter:
        metas = [adapter.metadata for adapter, _ in self.parts]
        columns = tuple(sorted({column for meta in metas for column in meta.columns}))
        shapes = union(adapter.shapes for adapter, _ in self.parts)
        digests = union(adapter.digests for adapter, _ in self.parts)
        first = metas[0]
        metadata = AdapterMetadata(
            method="qrlora",
            rank=len(columns),
            alpha=float(len(columns)),
            basis_rank=first.basis_rank,
            columns=columns,
            triangular=all(meta.triangular for meta in metas) and not self.null_space,
            algorithm=first.algorithm,
            basis_seed=first.basis_seed,
            basis_fingerprint=fingerprint(digests, first.basis_rank, first.algorithm, first.basis_seed),
            **collected(self.parts, self.null_space),
        )
        deltas = {name: delta(name, metadata.columns_in(shape), math.prod(shape[1:])) for name, shape in shapes.items()}
        name, sketches = (
            joined((a.name for a, _ in self.parts), "+"),
            union(adapter.sketches for adapter, _ in self.parts),
        )
        return Adapter(metadata, deltas, shapes, digests, name=name, sketches=sketches)

    @staticmethod
    def _sum(
        parts: Sequence[tuple[Adapter, float]], layer: str, columns: tuple[int, ...], width: int
    ) -> Float[Tensor, "rank in"]:
        # float64, so that the order of the parts is lost in the rounding to float32.
        total = torch.zeros(len(columns), width, dtype=torch.float64)
        for adapter, weight in parts:
            if layer in adapter.deltas:
                rows = [columns.index(column) for column in adapter.columns(layer)]
                total[rows] += weight * scaled_down(adapter, layer)
        return check_sum(total.float(), parts, layer)

    def energy_kept(self) -> float:
        """Return ‖Σ λᵢ ΔWᵢ‖² after null-space projection, as a share of the plain sum's; 1 at strength 0."""
        sums = [composition.adapter() for composition in (self, Composition(self.parts))]
        kept, whole = (sum(float(d.double().square().sum()) for d in one.deltas.values()) for one in sums)
        return kept / whole if whole else 1.0

    def interference(self) -> Interference:
        """Compute the interference of the parts before null-space projection, from ΔR alone."""
        return Interference.of(self.parts)


def _check_on_its_basis(adapter: Adapter) -> None:
    meta = adapter.metadata
    if not meta.on_basis:
        raise MismatchError(
            f"{called(adapter)} has up matrices of its own, so there is no shared Q to add on",
            expected="method qrlora",
            got=f"method {meta.method}",
            remedy=f"{ONTO_BASIS}; {BY_DELTA_WEIGHT}",
        )
    adapter.check_version()
