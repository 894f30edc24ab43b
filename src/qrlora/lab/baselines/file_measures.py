"""Compare two ΔW before a picture is made: cosines, shared directions, energy, and what chance gives."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.lab.baselines.deltas import Delta, Learned, inner

SHARE = 0.99
"""The effective rank of a ΔW is the fewest singular directions that hold this share of ‖ΔW‖²."""


@dataclass(frozen=True)
class _Layer:
    """Inner products of one layer, and how far its two row spaces and column spaces are shared, with chance levels."""

    products: tuple[float, float, float]
    places: int
    shared: tuple[float, float]
    by_chance: tuple[float, float]
    ranks: tuple[int, int]


def between(a: Learned, b: Learned) -> dict[str, float]:
    """Compare two ΔW. Factors are never multiplied out: QR of each, and small cores.

    cosine               ⟨a, b⟩ / (‖a‖ ‖b‖) over all layers
    cosine_by_chance     root mean square of that cosine if every layer's singular vectors were random: the root of
                         Σ ‖aₗ‖² ‖bₗ‖² / (outₗ inₗ) / (‖a‖² ‖b‖²)
    layer_cosine_mean    mean over the layers both change, and the largest in size, of the layers' cosines
    layer_cosine_max
    rows_shared          mean squared cosine of the principal angles between row spaces at their effective ranks, mean
                         over those layers: 1 if they read the same input directions
    columns_shared       the same of column spaces: 1 if they write the same output directions
    rows_by_chance       what random spaces of these ranks share: max(kₐ, k_b) / in, and / out
    columns_by_chance
    rank_a, rank_b       mean effective ranks (0.99 of the energy)
    energy_a, energy_b   ‖a‖, ‖b‖
    energy_of_sum        ‖a + b‖² / (‖a‖² + ‖b‖²): above 1 where they reinforce each other, below where they cancel

    Raises MismatchError if they have no layer in common, or one of other shapes.
    """
    common = [name for name in a if name in b]
    if not common or any(a[name].shape != b[name].shape for name in common):
        raise MismatchError("two ΔW of different models", expected=sorted(a)[:3], got=sorted(b)[:3])
    layers = [_layer(a[name], b[name]) for name in common]
    both = [layer for layer in layers if layer.products[1] > 0 and layer.products[2] > 0]
    crossed = sum(layer.products[0] for layer in layers)
    energies = [sum(inner(delta, delta) for delta in one.values()) for one in (a, b)]
    expected = sum(layer.products[1] * layer.products[2] / layer.places for layer in layers)
    cosines = [_cosine(*layer.products) for layer in both]
    found = {
        "cosine": _cosine(crossed, *energies),
        "cosine_by_chance": math.sqrt(_ratio(expected, energies[0] * energies[1])),
        "layer_cosine_mean": _mean(cosines),
        "layer_cosine_max": max(cosines, key=abs, default=0.0),
    }
    for side, name in enumerate(("rows", "columns")):
        found[f"{name}_shared"] = _mean([layer.shared[side] for layer in both])
        found[f"{name}_by_chance"] = _mean([layer.by_chance[side] for layer in both])
    for side, name in enumerate("ab"):
        found[f"rank_{name}"] = _mean([float(layer.ranks[side]) for layer in both])
        found[f"energy_{name}"] = math.sqrt(energies[side])
    found["energy_of_sum"] = 1 + _ratio(2 * crossed, sum(energies))
    return found


def _effective(values: Float[Tensor, " k"]) -> int:
    """The fewest singular directions that hold SHARE of ‖ΔW‖²; 0 if it is zero."""
    energy = values.square().cumsum(0)
    return int((energy < SHARE * energy[-1]).sum()) + 1 if len(values) else 0


def _layer(a: Delta, b: Delta) -> _Layer:
    out, width = a.shape
    parts = [delta.decomposed() for delta in (a, b)]
    ranks = [_effective(values) for _, values, _ in parts]
    first, second = (float(values.square().sum()) for _, values, _ in parts)
    products = (inner(a, b), first, second)
    if not all(ranks):
        return _Layer(products, out * width, (0.0, 0.0), (0.0, 0.0), (ranks[0], ranks[1]))
    rows = [right[:k] for (_, _, right), k in zip(parts, ranks, strict=True)]
    columns = [left[:, :k].T for (left, _, _), k in zip(parts, ranks, strict=True)]
    chance = (max(ranks) / width, max(ranks) / out)
    return _Layer(products, out * width, (_shared(*rows), _shared(*columns)), chance, (ranks[0], ranks[1]))


def _shared(a: Float[Tensor, "k size"], b: Float[Tensor, "l size"]) -> float:
    """Mean squared cosine of the principal angles between the spaces of orthonormal rows."""
    return float((a @ b.T).square().sum()) / min(len(a), len(b))


def _cosine(crossed: float, first: float, second: float) -> float:
    return _ratio(crossed, math.sqrt(first * second))


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole > 0 else 0.0


def _mean(values: list[float]) -> float:
    return fmean(values) if values else 0.0
