"""The basis: what makes it unique and orthonormal, what `fast` loses against `exact`, what has none, and the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from qrlora import basis as basis_module
from qrlora.basis import Basis, cached_layer_basis, fingerprint, layer_basis, weight_digest
from qrlora.errors import BasisError

SHAPES = st.tuples(st.integers(4, 40), st.integers(4, 40))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(out: int, inputs: int, values: Tensor) -> Tensor:
    left, right = (
        torch.linalg.qr(gaussian(out, len(values))).Q,
        torch.linalg.qr(gaussian(inputs, len(values), seed=1)).Q,
    )
    return (left * values) @ right.T


def best_energy(weight: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(weight.double()).square()
    return float(values[:rank].sum() / values.sum())


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(0, 5), st.floats(1e-3, 1e3))
def test_q_is_orthonormal_r_triangular_and_their_product_optimal(shape, rank, seed, scale):
    weight = gaussian(*shape, seed=seed) * scale
    found = layer_basis(weight, rank, algorithm="exact")
    torch.testing.assert_close(found.q.T @ found.q, torch.eye(rank), atol=1e-5, rtol=0)
    assert torch.equal(found.r, found.r.triu())
    assert bool((found.r.diagonal() > 0).all())
    assert found.energy == pytest.approx(best_energy(weight, rank), abs=1e-5)
    lost = (weight - found.q @ found.r).double().square().sum() / weight.double().square().sum()
    assert float(lost) == pytest.approx(1 - best_energy(weight, rank), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(SHAPES, st.integers(1, 3), st.integers(0, 5))
def test_the_pair_is_unique_whatever_signs_the_decomposition_chose(shape, rank, seed):
    values = torch.tensor([4.0, 2.0, 1.0, 0.3])
    weight = with_spectrum(*shape, values) + 1e-3 * gaussian(*shape, seed=seed)
    found = layer_basis(weight, rank, algorithm="exact")
    # The transposed problem gives other signs: recover the left vectors through it and triangulate by hand.
    v, s, uh = torch.linalg.svd(weight.T.double(), full_matrices=False)
    o, r = torch.linalg.qr((v[:, :rank] * s[:rank]).T)
    signs = r.diagonal().sign()
    torch.testing.assert_close(found.q.double(), uh[:rank].T @ o * signs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_is_read_as_float32(dtype):
    weight = gaussian(24, 20).to(dtype)
    found = layer_basis(weight, 4)
    assert found.q.dtype == found.r.dtype == torch.float32
    assert torch.equal(found.q, layer_basis(weight.float(), 4).q)


def test_a_convolution_is_its_flattened_weight():
    weight = gaussian(12, 3, 3, 3)
    assert torch.equal(layer_basis(weight, 5).q, layer_basis(weight.flatten(1), 5).q)


@pytest.mark.parametrize("shape", [(640, 512), (512, 640), (512, 512)])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.3])
def test_fast_agrees_with_exact_where_the_spectrum_decays(shape, decay):
    values = torch.arange(1, 513).float() ** -decay
    weight = with_spectrum(*shape, values)
    exact, fast = layer_basis(weight, 16, algorithm="exact"), layer_basis(weight, 16, algorithm="fast")
    torch.testing.assert_close(fast.q.T @ fast.q, torch.eye(16), atol=1e-5, rtol=0)
    outside = exact.q - fast.q @ (fast.q.T @ exact.q)
    assert float(torch.linalg.matrix_norm(outside, 2)) < 1e-4
    torch.testing.assert_close(fast.q, exact.q, atol=5e-4, rtol=0)
    assert fast.energy == pytest.approx(exact.energy, rel=1e-5)


@pytest.mark.parametrize("slope", [0.9, 0.1])
def test_fast_keeps_the_energy_where_the_spectrum_hardly_decays(slope):
    weight = with_spectrum(600, 600, 1 - slope * torch.arange(600).float() / 600)
    assert layer_basis(weight, 16).energy >= 0.999 * best_energy(weight, 16)


@pytest.mark.parametrize("values", [torch.ones(480), torch.tensor([1.0] * 20 + [0.0] * 460)])
def test_fast_stays_orthonormal_where_a_krylov_space_has_all_there_is(values):
    """Equal singular values, and a low rank, leave nothing for the next block but rounding noise."""
    found = layer_basis(torch.diag(values), 16)
    torch.testing.assert_close(found.q.T @ found.q, torch.eye(16), atol=1e-5, rtol=0)
    assert found.energy == pytest.approx(best_energy(torch.diag(values), 16), rel=1e-3)


@pytest.mark.parametrize("algorithm", ["exact", "fast"])
@pytest.mark.parametrize("size", [24, 480])
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**110])
def test_the_scale_of_a_weight_does_not_matter(algorithm, size, scale):
    """Squares of these overflow or vanish in float32; weight decay makes such weights of layers that learn nothing."""
    weight = gaussian(size, size)
    plain, scaled = (layer_basis(w, 4, algorithm=algorithm) for w in (weight, weight * scale))
    assert torch.equal(plain.q, scaled.q)
    assert scaled.energy == pytest.approx(plain.energy, rel=1e-5)


def test_fast_depends_on_its_seed_alone_and_leaves_the_global_random_state():
    weight = gaussian(480, 480)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = layer_basis(weight, 16, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first.q, layer_basis(weight, 16, seed=3).q)


def test_fast_really_iterates_in_these_tests(monkeypatch):
    calls = []
    krylov = basis_module._block_krylov
    monkeypatch.setattr(basis_module, "_block_krylov", lambda *a: calls.append(a) or krylov(*a))
    layer_basis(gaussian(480, 480), 16)
    assert len(calls) == 1


def test_dead_inputs_are_passed_over_and_the_basis_stays_unique():
    weight = gaussian(20, 20)
    weight[:, 0] = 0
    weight[:, 2] = weight[:, 1]
    found = layer_basis(weight, 4, algorithm="exact")
    mirrored = layer_basis(weight.flip(0), 4, algorithm="exact")  # another SVD of the same inputs
    torch.testing.assert_close(found.q, mirrored.q.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.r, found.q.T @ weight, atol=1e-5, rtol=0)
    pivots = [float(row[row.abs() > 1e-4][0]) for row in found.r]
    assert min(pivots) > 0


@pytest.mark.parametrize("algorithm", ["exact", "fast"])
@pytest.mark.parametrize("size", [24, 480])
@pytest.mark.parametrize("true_rank", [1, 7])
def test_a_rank_deficient_weight_says_its_layer_and_numerical_rank(algorithm, size, true_rank):
    weight = gaussian(size, true_rank) @ gaussian(true_rank, size, seed=1)
    with pytest.raises(BasisError, match=rf"(?s)'blocks\.0\.to_q'.*rank 8 or more.*numerical rank {true_rank}"):
        layer_basis(weight, 8, algorithm=algorithm, name="blocks.0.to_q")
    found = layer_basis(weight, true_rank, algorithm=algorithm)
    torch.testing.assert_close(found.q.T @ found.q, torch.eye(true_rank), atol=1e-5, rtol=0)
    assert found.energy == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("weight", "rank", "algorithm", "message"),
    [
        (torch.full((6, 6), torch.nan), 2, "fast", "NaN or Inf"),
        (torch.full((6, 6), torch.inf), 2, "exact", "NaN or Inf"),
        (torch.zeros(6, 6), 2, "fast", "all zeros"),
        (torch.ones(6, 4), 5, "fast", "from 1 to 4"),
        (torch.ones(6, 4), 0, "fast", "from 1 to 4"),
        (torch.ones(6, 4), 2, "quick", "exact or fast"),
        (torch.ones(6, 4, dtype=torch.int8), 2, "fast", "dequantise"),
        (torch.ones(6), 1, "fast", "2 or more dimensions"),
        (torch.ones(6, 4, device="meta"), 2, "fast", "meta device"),
    ],
)
def test_what_has_no_basis_is_an_error_that_names_the_layer(weight, rank, algorithm, message):
    with pytest.raises(BasisError, match=rf"(?s)'to_v'.*{message}"):
        layer_basis(weight, rank, algorithm=algorithm, name="to_v")


def test_the_digest_is_of_values_and_shape():
    weight = gaussian(8, 6).half()
    assert weight_digest(weight) == weight_digest(weight.float()) == weight_digest(weight.float().T.contiguous().T)
    assert weight_digest(weight) != weight_digest(weight.reshape(6, 8))
    assert weight_digest(weight) != weight_digest(weight + 0.5)


def test_the_fingerprint_needs_no_basis_and_tells_everything_apart():
    digests = {"a": "1", "b": "2"}
    same = fingerprint({"b": "2", "a": "1"}, 4, "fast", 0)
    assert fingerprint(digests, 4, "fast", 0) == same
    others = [({"a": "1"}, 4, "fast", 0), (digests, 5, "fast", 0), (digests, 4, "exact", 0), (digests, 4, "fast", 1)]
    assert len({same, *(fingerprint(*other) for other in others)}) == 5


def test_a_second_basis_of_the_same_model_computes_nothing(private_cache: Path, monkeypatch):
    weights = {"a": gaussian(12, 10), "b": gaussian(8, 3, 3, 3, seed=1)}
    seen = []
    first = Basis.of(weights, 3, progress=lambda *step: seen.append(step))
    assert seen == [(1, 2, "a"), (2, 2, "b")]
    assert list(first) == ["a", "b"]
    assert sorted(path.suffix for path in private_cache.iterdir()) == [".safetensors"] * 2

    def forbidden(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(basis_module, "_orthonormal_columns", forbidden)
    second = Basis.of({name: weight.double() for name, weight in weights.items()}, 3)
    assert second.fingerprint == first.fingerprint
    for name in weights:
        assert torch.equal(first[name].q, second[name].q)
        assert torch.equal(first[name].r, second[name].r)
    with pytest.raises(AssertionError, match="computed again"):
        Basis.of(weights, 4)


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, None])
def test_a_damaged_cache_file_is_an_error_that_says_what_to_delete(private_cache: Path, content):
    weight = gaussian(12, 10)
    cached_layer_basis(weight, weight_digest(weight), 3)
    (path,) = private_cache.iterdir()
    path.write_bytes(path.read_bytes()[:-4] if content is None else content)
    with pytest.raises(BasisError, match=f"(?s)delete .*{path.name}"):
        cached_layer_basis(weight, weight_digest(weight), 3)


@pytest.mark.parametrize("value", [7.0, torch.nan])
def test_a_cache_file_with_altered_values_is_refused(private_cache: Path, value):
    weight = gaussian(12, 10)
    q = cached_layer_basis(weight, weight_digest(weight), 3).q
    (path,) = private_cache.iterdir()
    q[2, 1] = value
    save_file({"q": q}, path)
    with pytest.raises(BasisError, match=f"(?s)damaged.*delete .*{path.name}"):
        cached_layer_basis(weight, weight_digest(weight), 3)


def test_a_cache_file_of_another_shape_is_refused(private_cache: Path):
    weight, other = gaussian(12, 10), gaussian(14, 10)
    cached_layer_basis(weight, weight_digest(weight), 3)
    with pytest.raises(BasisError, match="not what its name says"):
        cached_layer_basis(other, weight_digest(weight), 3)


def test_an_unwritable_cache_names_the_remedy(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(BasisError, match="QRLORA_CACHE"):
        Basis.of({"a": gaussian(12, 10)}, 3, cache_dir=blocked / "cache")
