"""Composition of adapters that share no basis: ΔW itself is summed, and the sum truncated to a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.method.adapter.record import Adapter, AdapterMetadata
from qrlora.method.basis import Basis
from qrlora.method.composition.null_space import project_out
from qrlora.method.composition.parts import (
    called,
    check_sum,
    check_weights,
    collected,
    joined,
    known_up,
    scaled_down,
    union,
)


@dataclass(frozen=True)
class TruncationLoss:
    """Share of ‖Σ λᵢ ΔWᵢ‖²_F that truncation to a rank lost, per layer and in total (0 to 1).

    `energy_kept` is the share of ‖Σ λᵢ ΔWᵢ‖²_F that null-space projection left before the cut, 1 at strength 0.
    `other_weights` lists the layers whose base weights differ between the parts: the ΔW summed there belong to
    different matrices, so only pictures show whether the sum is of use.
    """

    rank: int
    total: float
    layers: Mapping[str, float]
    other_weights: tuple[str, ...]
    energy_kept: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers, for JSON."""
        return {
            "rank": self.rank,
            "total": self.total,
            "layers": dict(self.layers),
            "other_weights": list(self.other_weights),
            "energy_kept": self.energy_kept,
        }


def compose_delta_weights(
    parts: Sequence[tuple[Adapter, float]], bases: Sequence[Basis | None], rank: int, null_space: float = 0.0
) -> tuple[Adapter, TruncationLoss]:
    """Sum ΔW of any adapters; the sum as the nearest plain LoRA of `rank` (truncated SVD: Eckart and Young, 1936).

    For adapters on different bases, and for plain LoRA. `bases` has one entry per part: the basis of an adapter that
    stands on one, None for one that carries its own ups. ΔW is never formed: QR of the stacked factors, SVD of a core.
    null_space: strength of the null-space projection of the ΔWᵢ, 0 to 1, as in `Composition`.
    Raises MismatchError if families or weight shapes differ, a basis is missing or another one, or the strength is not
    from 0 to 1.
    """
    check_weights(parts)
    if rank < 1 or len(bases) != len(parts):
        got = f"rank {rank}, {len(bases)} bases"
        raise MismatchError("cannot compose", expected=f"rank from 1, {len(parts)} bases (or None)", got=got)
    for (adapter, _), basis in zip(parts, bases, strict=True):
        if adapter.metadata.on_basis:
            _check_has_basis(adapter, basis)
    _check_same_model(parts)
    shapes = union(adapter.shapes for adapter, _ in parts)
    projected = project_out(parts, null_space)
    deltas, ups, kept, lost, uncut = {}, {}, {}, {}, 0.0
    for name in shapes:
        up, down = _stacked(projected, bases, name)
        ups[name], deltas[name], kept[name], lost[name] = _truncated(up, check_sum(down, parts, name), rank)
        check_sum(deltas[name], parts, name)
        uncut += _energy(*_stacked(parts, bases, name)) if null_space else 0.0
    metadata = AdapterMetadata(method="lora", rank=rank, alpha=float(rank), **collected(parts, null_space))
    cut = {name: lost[name] / max(kept[name] + lost[name], 1e-300) for name in shapes}
    whole = sum(kept.values()) + sum(lost.values())
    left = whole / uncut if uncut else 1.0
    loss = TruncationLoss(rank, sum(lost.values()) / max(whole, 1e-300), cut, _other_weights(parts), left)
    return Adapter(metadata, deltas, shapes, ups=ups, name=joined((a.name for a, _ in parts), "+")), loss


def _stacked(
    parts: Sequence[tuple[Adapter, float]], bases: Sequence[Basis | None], layer: str
) -> tuple[Float[Tensor, "out stacked"], Float[Tensor, "stacked in"]]:
    """Factors of Σ λᵢ ΔWᵢ: the ups side by side, the weighted downs one above the other; float64."""
    ups, downs = [], []
    for (adapter, weight), basis in zip(parts, bases, strict=True):
        if layer in adapter.deltas:
            up = known_up(adapter, basis, layer)
            assert up is not None  # _check_has_basis came first
            ups.append(up)
            downs.append(weight * scaled_down(adapter, layer))
    return torch.cat(ups, dim=1), torch.cat(downs)


def _energy(up: Float[Tensor, "out rank"], down: Float[Tensor, "rank in"]) -> float:
    """‖up @ down‖²_F."""
    return float(((up.T @ up) * (down @ down.T)).sum())


def _truncated(
    up: Float[Tensor, "out stacked"], down: Float[Tensor, "stacked in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"], float, float]:
    """The nearest pair of `rank` to up @ down in float32, padded with zeros if that has fewer; kept and lost energy."""
    left, core_left = torch.linalg.qr(up)
    right, core_right = torch.linalg.qr(down.T)
    u, values, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
    k = min(rank, len(values))
    new_up, new_down = up.new_zeros(len(up), rank), down.new_zeros(rank, down.shape[1])
    new_up[:, :k] = left @ u[:, :k]
    new_down[:k] = values[:k, None] * (vh[:k] @ right.T)
    energy = values.square()
    return new_up.float(), new_down.float(), float(energy[:k].sum()), float(energy[k:].sum())


def _check_has_basis(adapter: Adapter, basis: Basis | None) -> None:
    if basis is None:
        raise MismatchError(
            f"{called(adapter)} is ΔR alone and needs its basis",
            expected=f"basis {adapter.metadata.basis_fingerprint}",
            got="None",
            remedy="Basis.of(base weights, rank, algorithm=..., seed=...) as its metadata says",
        )
    adapter.check_basis(basis)


def _check_same_model(parts: Sequence[tuple[Adapter, float]]) -> None:
    first = parts[0][0]
    for adapter, _ in parts[1:]:
        ours, theirs = ((a.metadata.family, a.metadata.denoiser) for a in (first, adapter))
        # A foreign LoRA does not know its family; the shapes still have to agree.
        if ours != theirs and all(ours) and all(theirs):
            raise MismatchError("adapters of different families", expected=ours, got=theirs)
        common = set(first.shapes) & set(adapter.shapes)
        differ = sorted(name for name in common if first.shapes[name] != adapter.shapes[name])
        if differ or not common:
            raise MismatchError(
                f"{called(first)} and {called(adapter)} are not of one architecture",
                expected={name: first.shapes[name] for name in differ} or sorted(first.shapes)[:3],
                got={name: adapter.shapes[name] for name in differ} or sorted(adapter.shapes)[:3],
            )


def _other_weights(parts: Sequence[tuple[Adapter, float]]) -> tuple[str, ...]:
    seen: dict[str, set[str]] = {}
    for adapter, _ in parts:
        for name, digest in adapter.digests.items():
            seen.setdefault(name, set()).add(digest)
    return tuple(sorted(name for name, digests in seen.items() if len(digests) > 1))
