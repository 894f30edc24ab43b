"""Project any adapter onto a basis: ΔR = Qᵀ ΔW, the nearest ΔW of the form Q ΔR, and the energy that it keeps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.method.adapter import Adapter, AdapterMetadata
from qrlora.method.adapter.record import triangular_mask
from qrlora.method.basis import Basis, fingerprint, sketch
from qrlora.method.composition.parts import called, known_up, scaled_down

EXACT_UP_TO = 1024  # sides of a matrix whose full decomposition takes a second or so
OVERSAMPLING = 16
ITERATIONS = 8
DESCRIPTION = ("family", "denoiser", "base_model", "base_digest", "role", "trigger", "licence", "provenance")


@dataclass(frozen=True)
class EnergyKept:
    """‖kept ΔW‖² / ‖ΔW‖² per layer and over all layers, 0 to 1; 1 for a layer with ΔW = 0."""

    total: float
    layers: Mapping[str, float]

    @classmethod
    def of(cls, kept: Mapping[str, float], whole: Mapping[str, float]) -> EnergyKept:
        """Compute it from squared norms."""
        return cls(_share(sum(kept.values()), sum(whole.values())), {n: _share(kept[n], whole[n]) for n in whole})

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, for JSON."""
        return {"total": self.total, "layers": dict(self.layers)}


def _share(kept: float, whole: float) -> float:
    return min(kept / whole, 1.0) if whole > 0 else 1.0


def project(
    adapter: Adapter,
    basis: Basis,
    columns: Sequence[int] | None = None,
    *,
    triangular: bool = False,
    own_basis: Basis | None = None,
) -> tuple[Adapter, EnergyKept]:
    """Project the adapter to ΔR on columns of `basis`: ΔR = Q[:, columns]ᵀ ΔW, by least squares because QᵀQ = I.

    Args:
        columns: all of the basis's unless given.
        triangular: drop what lies below the diagonal too, which costs energy of its own.
        own_basis: the basis that `adapter` stands on, if it does.

    Raises:
        MismatchError: a layer is not in the basis or has another shape there, or `own_basis` is missing or another.
    """
    if adapter.metadata.on_basis:
        if own_basis is None:
            raise MismatchError(
                f"{called(adapter)} is ΔR alone and needs its own basis",
                expected=adapter.metadata.basis_fingerprint,
                got="none",
            )
        adapter.check_basis(own_basis)
    _check_layers(adapter, basis)
    whole: dict[str, float] = {}

    def coordinates(layer: str, q: Float[Tensor, "out rank"]) -> Float[Tensor, "rank in"]:
        up, down = known_up(adapter, own_basis, layer), scaled_down(adapter, layer)
        assert up is not None  # check_basis came first
        whole[layer] = float(((up.T @ up) * (down @ down.T)).sum())  # ‖up down‖² without forming it
        return (q.T @ up) @ down

    described = {name: getattr(adapter.metadata, name) for name in DESCRIPTION}
    if adapter.metadata.recipe:  # of another rank and other columns than what comes out
        described["provenance"] = {**adapter.metadata.provenance, "projected_from_recipe": adapter.metadata.recipe}
    projected, kept = on_columns(basis, adapter.shapes, columns, triangular, coordinates, whole, described)
    return dataclasses.replace(projected, name=adapter.name), kept


def on_columns(
    basis: Basis,
    shapes: Mapping[str, tuple[int, ...]],
    columns: Sequence[int] | None,
    triangular: bool,
    coordinates: Callable[[str, Float[Tensor, "out rank"]], Float[Tensor, "rank in"]],
    whole: Mapping[str, float],
    described: Mapping[str, Any],
) -> tuple[Adapter, EnergyKept]:
    """Return an adapter on `columns` of `basis` whose ΔR of a layer is coordinates(layer, Q[:, columns]), in float64.

    `whole`: layer -> ‖ΔW‖², which `coordinates` may fill in as it is called; `described`: fields of `DESCRIPTION`.
    A small layer that has none of the columns keeps nothing and is left out.
    """
    owned = tuple(range(basis.rank)) if columns is None else tuple(columns)
    deltas, kept = {}, {}
    for layer, shape in shapes.items():
        q = basis[layer].q.detach().cpu().double()
        held = [column for column in owned if column < q.shape[1]]
        delta = coordinates(layer, q[:, held])
        if triangular:
            delta = delta * triangular_mask(tuple(held), math.prod(shape[1:]))
        kept[layer] = float(delta.square().sum())
        if held:
            deltas[layer] = delta.float()
    shapes = {layer: shapes[layer] for layer in deltas}
    digests = {layer: basis.digests[layer] for layer in deltas}
    metadata = AdapterMetadata(
        method="qrlora",
        rank=len(owned),
        alpha=float(len(owned)),
        basis_rank=basis.rank,
        columns=owned,
        triangular=triangular,
        algorithm=basis.algorithm,
        basis_seed=basis.seed,
        basis_fingerprint=fingerprint(digests, basis.rank, basis.algorithm, basis.seed),
        **described,
    )
    known = {layer: sketch(basis[layer].q) for layer in deltas}
    return Adapter(metadata, deltas, dict(shapes), digests, sketches=known), EnergyKept.of(kept, whole)


def _check_layers(adapter: Adapter, basis: Basis) -> None:
    differ = {}
    for layer, shape in adapter.shapes.items():
        got = (len(basis[layer].q), basis[layer].r.shape[1]) if layer in basis else "no such layer"
        if got != (shape[0], math.prod(shape[1:])):
            differ[layer] = got
    if differ:
        raise MismatchError(
            f"{len(differ)} of {len(adapter.shapes)} layers do not fit the basis",
            expected={layer: tuple(adapter.shapes[layer]) for layer in differ},
            got=differ,
            remedy="use the model that it was made for",
        )


def truncated(
    delta: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], float]:
    """Return the nearest pair of `rank` to ΔW in float32, filled up with zeros if ΔW has fewer; and ‖up down‖².

    Truncated SVD (Eckart and Young 1936): exact up to 1024, beyond it randomised subspace iteration (Halko et al. 2011,
    arXiv 0909.4061, algorithm 4.4) from a generator of its own. What was kept is measured, not assumed.
    """
    side = min(delta.shape)
    if side <= EXACT_UP_TO:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
    else:
        start = torch.randn(delta.shape[1], min(rank + OVERSAMPLING, side), generator=torch.Generator().manual_seed(0))
        space = torch.linalg.qr(delta @ start.to(delta)).Q
        for _ in range(ITERATIONS):
            space = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ space).Q).Q
        rotation, values, right = torch.linalg.svd(space.T @ delta, full_matrices=False)
        left = space @ rotation
    k = min(rank, len(values))
    up, down = delta.new_zeros(len(delta), rank), delta.new_zeros(rank, delta.shape[1])
    up[:, :k], down[:k] = left[:, :k], values[:k, None] * right[:k]
    return up.float(), down.float(), float(down.double().square().sum())
