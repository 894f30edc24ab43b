"""Measures of two ΔW against dense decompositions, and chance levels against chance."""

from __future__ import annotations

import math

import pytest
import torch

from qrlora.errors import MismatchError
from qrlora.lab.baselines.adapters import orthonormal
from qrlora.lab.baselines.deltas import Delta, Learned
from qrlora.lab.baselines.file_measures import between
from samples import EPS

SIZES = {"a": (20, 12), "b": (9, 30)}


def drawn(seed: int, rank: int = 3, dense: bool = False) -> Learned:
    """ΔW with random singular vectors and equal singular values."""
    factors = {
        n: (orthonormal(o, rank, f"u{n}{seed}"), orthonormal(i, rank, f"v{n}{seed}")) for n, (o, i) in SIZES.items()
    }
    return {n: Delta(matrix=u @ v.T) if dense else Delta(u, v.T) for n, (u, v) in factors.items()}


def by_svd(a: Learned, b: Learned) -> dict[str, float]:
    """The same measures the long way, for full effective ranks."""
    one, two = ([part[n].dense().double() for n in SIZES] for part in (a, b))
    cross, aa, bb = (
        sum(float((x * y).sum()) for x, y in zip(p, q, strict=True)) for p, q in ((one, two), (one, one), (two, two))
    )
    shared: dict[str, list[float]] = {"rows": [], "columns": []}
    for x, y in zip(one, two, strict=True):
        for name, (p, q) in {"rows": (x.T, y.T), "columns": (x, y)}.items():
            u, v = (torch.linalg.svd(m)[0][:, : int(torch.linalg.matrix_rank(m, rtol=1e-4))] for m in (p, q))
            shared[name].append(float(torch.linalg.svdvals(u.T @ v).square().mean()))
    return {
        "cosine": cross / math.sqrt(aa * bb),
        "energy_a": math.sqrt(aa),
        "energy_b": math.sqrt(bb),
        "energy_of_sum": sum(float((x + y).square().sum()) for x, y in zip(one, two, strict=True)) / (aa + bb),
        "rows_shared": sum(shared["rows"]) / 2,
        "columns_shared": sum(shared["columns"]) / 2,
    }


@pytest.mark.parametrize("dense", [(False, False), (True, False), (True, True)])
def test_measures_are_those_of_the_dense_matrices(dense: tuple[bool, bool]) -> None:
    a, b = (drawn(seed, dense=d) for seed, d in enumerate(dense))
    found, expected = between(a, b), by_svd(a, b)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=64 * EPS, abs=64 * EPS)
    assert found["rank_a"] == found["rank_b"] == 3


def test_a_part_is_wholly_like_itself_and_not_like_what_is_orthogonal() -> None:
    a = drawn(0)
    same = between(a, {name: delta.scaled(-2.0) for name, delta in a.items()})
    assert same["cosine"] == pytest.approx(-1, abs=64 * EPS) == same["layer_cosine_max"]
    assert same["rows_shared"] == pytest.approx(1, abs=64 * EPS) == same["columns_shared"]
    assert same["energy_of_sum"] == pytest.approx(1 / 5, abs=64 * EPS)
    rows = {n: Delta(d.factors[0], torch.eye(d.shape[1])[3:6]) for n, d in a.items() if d.factors}
    other = {n: Delta(d.factors[0], torch.eye(d.shape[1])[:3]) for n, d in a.items() if d.factors}
    apart = between(rows, other)
    assert (apart["cosine"], apart["rows_shared"]) == pytest.approx((0, 0), abs=64 * EPS)
    assert apart["columns_shared"] == pytest.approx(1, abs=64 * EPS) == apart["energy_of_sum"]


def test_chance_levels_are_what_chance_gives() -> None:
    found = [between(drawn(2 * i), drawn(2 * i + 1)) for i in range(150)]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    assert mean([f["rows_shared"] for f in found]) == pytest.approx(found[0]["rows_by_chance"], rel=0.1)
    assert mean([f["columns_shared"] for f in found]) == pytest.approx(found[0]["columns_by_chance"], rel=0.1)
    rms = math.sqrt(mean([f["cosine"] ** 2 for f in found]))
    assert rms == pytest.approx(found[0]["cosine_by_chance"], rel=0.15)


def test_effective_rank_leaves_out_what_is_small() -> None:
    for values, rank in (([1.0, 1.0, 1.0, 0.05, 0.05, 0.0], 3), ([1.0] * 6, 6), ([0.0] * 6, 0)):
        spectrum = {"a": Delta(torch.eye(6) * torch.tensor(values), torch.eye(6))}
        assert between(spectrum, {"a": Delta(matrix=torch.eye(6))})["rank_a"] == rank


def test_layers_of_one_alone_count_for_energy_only() -> None:
    a, b = drawn(0), drawn(1)
    del b["b"]
    found = between(a, b)
    assert found["energy_a"] == pytest.approx(math.sqrt(6)) and found["energy_b"] == pytest.approx(math.sqrt(3))
    zero = between(a, {"a": Delta(torch.zeros(20, 1), torch.zeros(1, 12))})
    assert zero["cosine"] == zero["rows_shared"] == zero["cosine_by_chance"] == 0 and zero["energy_of_sum"] == 1


def test_other_models_are_refused() -> None:
    with pytest.raises(MismatchError):
        between(drawn(0), {"c": drawn(0)["a"]})
    with pytest.raises(MismatchError):
        between(drawn(0), {"a": drawn(0)["b"]})
