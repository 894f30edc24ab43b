"""The basis: what makes it unique and orthonormal, what `fast` loses against `exact`, what has none, and the cache."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qrlora._files import write_atomically
from qrlora._tensor_file import packed_entry
from qrlora.errors import BasisError
from qrlora.method.basis import (
    TURNED,
    VERSIONS,
    Basis,
    cache_path,
    cached_layer_basis,
    factor,
    fingerprint,
    layer_basis,
    sketch,
    turned,
    verify,
    version_of,
    weight_digest,
)
from samples import EPS, assert_rounded

PROMISED = 0.999
"""Share of the best possible energy that `fast` has, by its docstring."""

SHAPES = st.tuples(st.integers(4, 40), st.integers(4, 40))


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_spectrum(out: int, inputs: int, values: Tensor) -> Tensor:
    left, right = (
        torch.linalg.qr(gaussian(out, len(values))).Q,
        torch.linalg.qr(gaussian(inputs, len(values), seed=1)).Q,
    )
    return (left * values) @ right.T


def moved_by_rounding(weight: Tensor, rank: int, algorithm: str = "fast") -> float:
    """By how much, as ||Q - Q'||_F, rounding may turn Q.

    What is computed is the basis of a weight that is off by rounding, a share of about eps sqrt(n) of its norm; how far
    that turns Q depends on gaps between singular values and on the rows of R, so it is measured, on noise of that size.
    Ten times the largest of three draws: noise need not point where the rounding of a processor does. And never further
    than where an adapter that was trained on the other Q is refused.
    """
    q, size = layer_basis(weight, rank, algorithm=algorithm).q, torch.linalg.matrix_norm(weight, 2)
    moves = []
    for seed in range(3):
        noise = gaussian(*weight.shape, seed=1000 + seed)
        noise *= EPS * max(weight.shape) ** 0.5 * size / torch.linalg.matrix_norm(noise, 2)
        moves.append(float((layer_basis(weight + noise, rank, algorithm=algorithm).q - q).norm()))
    return min(10 * max(moves), TURNED * rank**0.5)


def assert_orthonormal(q: Tensor) -> None:
    """To what `verify` promises."""
    assert factor.off_orthonormal(q) <= factor._ORTHONORMAL


def best_energy(weight: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(weight.double()).square()
    return float(values[:rank].sum() / values.sum())


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 4), st.integers(0, 5), st.floats(1e-3, 1e3))
def test_q_is_orthonormal_r_triangular_and_their_product_optimal(shape, rank, seed, scale):
    weight = gaussian(*shape, seed=seed) * scale
    found = layer_basis(weight, rank, algorithm="exact")
    assert_orthonormal(found.q)
    assert torch.equal(found.r, found.r.triu())
    assert bool((found.r.diagonal() > 0).all())
    rounding = 4 * sum(shape) * EPS
    assert found.energy == pytest.approx(best_energy(weight, rank), abs=rounding)
    lost = (weight - found.q @ found.r).double().square().sum() / weight.double().square().sum()
    assert float(lost) == pytest.approx(1 - best_energy(weight, rank), abs=rounding)


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
    assert float((found.q - uh[:rank].T @ o * signs).norm()) <= moved_by_rounding(weight, rank, "exact")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_is_read_as_float32(dtype):
    weight = gaussian(24, 20).to(dtype)
    found = layer_basis(weight, 4)
    assert found.q.dtype == found.r.dtype == torch.float32
    assert torch.equal(found.q, layer_basis(weight.float(), 4).q)


def test_a_convolution_is_its_flattened_weight():
    weight = gaussian(12, 3, 3, 3)
    assert torch.equal(layer_basis(weight, 5).q, layer_basis(weight.flatten(1), 5).q)


SPECTRA = {
    "white noise": lambda i: i**0,
    "1 to 0.9": lambda i: 1 - 0.1 * i / len(i),
    "1 to 0.1": lambda i: 1 - 0.9 * i / len(i),
    "i^-0.1": lambda i: i**-0.1,
    "i^-0.3": lambda i: i**-0.3,
    "i^-0.5": lambda i: i**-0.5,
    "i^-1": lambda i: i**-1.0,
    "i^-2": lambda i: i**-2.0,
    "outliers": lambda i: torch.where(i <= 3, 100.0, 1.0) * i**-0.3,
    "a step inside the block": lambda i: torch.where(i <= 18, 2.0, 1.0),
    "a step beyond it": lambda i: torch.where(i <= 40, 2.0, 1.0),
    "halving every fifth": lambda i: 2 ** (-i / 5),
}


def sloping(spectrum: str, shape: tuple[int, int] = (384, 384), seed: int = 0) -> Tensor:
    """A weight whose singular values, or for white noise whose columns, follow a slope of `SPECTRA`."""
    slope = SPECTRA[spectrum](torch.arange(1, min(shape) + 1).float())
    return gaussian(*shape, seed=seed) if spectrum == "white noise" else with_spectrum(*shape, slope)


def sines(q: Tensor, other: Tensor) -> Tensor:
    """Sines of the principal angles between two spans."""
    return torch.linalg.svdvals(q.double() - other.double() @ (other.double().T @ q.double()))


@pytest.mark.parametrize("shape", [(640, 512), (512, 640), (512, 512)])
@pytest.mark.parametrize("spectrum", ["i^-1", "i^-0.5", "i^-0.3"])
def test_fast_agrees_with_exact_where_the_spectrum_decays(shape, spectrum):
    weight = sloping(spectrum, shape)
    exact, fast = layer_basis(weight, 16, algorithm="exact"), layer_basis(weight, 16, algorithm="fast")
    assert_orthonormal(fast.q)
    assert bool((fast.r.diagonal() > 0).all()) and torch.equal(fast.r, fast.r.triu())
    assert float(sines(exact.q, fast.q).square().mean().sqrt()) < 0.02
    assert float((fast.q - exact.q).norm()) / 16**0.5 < TURNED
    assert fast.energy == pytest.approx(exact.energy, rel=1 - PROMISED)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_fast_keeps_the_energy_whatever_the_spectrum(spectrum):
    for seed, rank in enumerate((1, 16, 32)):
        weight = sloping(spectrum, seed=seed)
        found = layer_basis(weight, rank, seed=seed)
        assert found.energy >= PROMISED * best_energy(weight, rank)
        assert_orthonormal(found.q)


@pytest.mark.parametrize("tolerance", [3e-2, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("spectrum", ["white noise", "i^-0.1", "i^-0.5", "i^-1", "outliers"])
def test_the_stopping_rule_bounds_what_is_missing(spectrum, tolerance, monkeypatch):
    """Energy to the tolerance, and angles, where singular values differ, to about its square root."""
    monkeypatch.setattr(factor, "_GAIN", tolerance)
    weight = sloping(spectrum)
    found, best = layer_basis(weight, 16), layer_basis(weight, 16, algorithm="exact")
    assert 1 - found.energy / best.energy <= tolerance
    assert float(sines(best.q, found.q).square().mean()) <= 4 * tolerance


def test_the_number_of_steps_follows_the_residual(monkeypatch):
    extended: list[int] = []
    extend = factor._extend
    monkeypatch.setattr(factor, "_extend", lambda space, *a: extended.append(len(space)) or extend(space, *a))
    calls = []
    for spectrum in ("i^-2", "i^-0.5", "i^-0.1"):
        extended.clear()
        layer_basis(sloping(spectrum), 16)
        calls.append(len(extended))
    assert 4 <= calls[0] < calls[1] < calls[2]


def test_a_slope_too_flat_for_the_iteration_gets_the_full_decomposition(monkeypatch):
    weight = sloping("i^-0.1")
    monkeypatch.setattr(factor, "_GAIN", -1.0)
    fast = layer_basis(weight, 16)
    assert torch.equal(fast.q, layer_basis(weight, 16, algorithm="exact").q)


def test_fast_never_factors_anything_as_large_as_the_weight(monkeypatch):
    factored = []

    def recorded(whole, matrix, *rest, **options):
        factored.append(min(matrix.shape))
        return whole(matrix, *rest, **options)

    for name in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, functools.partial(recorded, getattr(torch.linalg, name)))
    weight = sloping("i^-0.5")
    factored.clear()
    layer_basis(weight, 16)
    assert 16 < max(factored) <= 6 * 24


DENOISER = Path(factor.__file__).parents[2] / "pico/weights/pipeline/transformer/diffusion_pytorch_model.safetensors"


def test_fast_keeps_the_energy_of_a_denoisers_real_weights():
    checked = 0
    with safe_open(DENOISER, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            weight = file.get_tensor(key)
            if weight.ndim == 2 and min(weight.shape) >= 160:
                found, best = layer_basis(weight, 8), layer_basis(weight, 8, algorithm="exact")
                assert found.energy >= PROMISED * best.energy, key
                assert not torch.equal(found.q, best.q), key  # it did iterate
                checked += 1
    assert checked > 80


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if "step" not in name])
def test_another_order_of_summation_moves_q_by_rounding_only(spectrum):
    """As other threads, libraries and devices do: a ΔR trained on this Q has to mean the same on theirs.

    Not where singular values beyond the rank equal those within: nothing then says which vectors are the leading ones.
    """
    weight, order = sloping(spectrum), torch.randperm(384, generator=torch.Generator().manual_seed(1))
    found, moved = layer_basis(weight, 16), layer_basis(weight[order], 16)
    assert float((moved.q - found.q[order]).norm()) <= moved_by_rounding(weight, 16)


def test_the_number_of_threads_moves_q_by_rounding_only():
    weight, threads = sloping("i^-0.3", (512, 700)), torch.get_num_threads()
    try:
        found = [torch.set_num_threads(n) or layer_basis(weight, 16).q for n in (1, 2)]
    finally:
        torch.set_num_threads(threads)
    assert float((found[0] - found[1]).norm()) <= moved_by_rounding(weight, 16)


ELSEWHERE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from qrlora.method.basis import Basis
print(Basis.of(load_file(sys.argv[1]), 16, cache_dir=Path(sys.argv[2])).fingerprint)
"""


def test_a_basis_that_another_processor_cached_is_ours(tmp_path: Path, monkeypatch):
    """One without wide vector registers and fused multiplication. An adapter trained there has to mean the same here:
    its fingerprint and its cache are ours, and its Q is, by the sketches that adapters carry."""
    whole = load_file(DENOISER)
    weights = {key: w for key, w in whole.items() if w.ndim == 2 and min(w.shape) >= 160 and "blocks.2." in key}
    save_file(weights, tmp_path / "weights.safetensors")
    plain = {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "MKL_CBWR": "COMPATIBLE"}
    environment = {**os.environ, **plain, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(DENOISER.parents[5])}
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "weights.safetensors"), str(tmp_path / "there")]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    here = Basis.of(weights, 16, cache_dir=tmp_path / "here")
    monkeypatch.setattr(factor, "orthonormal_columns", lambda *_: pytest.fail("computed again"))
    there = Basis.of(weights, 16, cache_dir=tmp_path / "there")
    assert len(weights) > 8 and said.split()[-1] == here.fingerprint == there.fingerprint
    for name in weights:
        verify(weights[name], there[name], name)
        assert turned(sketch(here[name].q), sketch(there[name].q)) < TURNED / 10, name


def test_the_precision_that_a_caller_allows_its_own_products_does_not_reach_q():
    weight = sloping("i^-0.5")
    plain = layer_basis(weight, 16)
    allowed = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer_basis(weight, 16).q, plain.q)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(allowed)


@pytest.mark.parametrize("values", [torch.ones(480), torch.tensor([1.0] * 20 + [0.0] * 460)])
def test_fast_stays_orthonormal_where_a_krylov_space_has_all_there_is(values):
    """Equal singular values, and a low rank, leave nothing for the next block but rounding noise."""
    found = layer_basis(torch.diag(values), 16)
    assert_orthonormal(found.q)
    assert found.energy == pytest.approx(best_energy(torch.diag(values), 16), rel=1 - PROMISED)


@pytest.mark.parametrize("algorithm", ["exact", "fast"])
@pytest.mark.parametrize("size", [24, 480])
@pytest.mark.parametrize("scale", [2.0**-110, 2.0**110])
def test_the_scale_of_a_weight_does_not_matter(algorithm, size, scale):
    """Squares of these overflow or vanish in float32; weight decay makes such weights of layers that learn nothing."""
    weight = gaussian(size, size)
    plain, scaled = (layer_basis(w, 4, algorithm=algorithm) for w in (weight, weight * scale))
    assert torch.equal(plain.q, scaled.q)
    assert scaled.energy == pytest.approx(plain.energy, rel=8 * size * EPS)


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
    krylov = factor._block_krylov
    monkeypatch.setattr(factor, "_block_krylov", lambda *a: calls.append(a) or krylov(*a))
    layer_basis(gaussian(480, 480), 16)
    assert len(calls) == 1


def test_dead_inputs_are_passed_over_and_the_basis_stays_unique():
    weight = gaussian(20, 20)
    weight[:, 0] = 0
    weight[:, 2] = weight[:, 1]
    found = layer_basis(weight, 4, algorithm="exact")
    mirrored = layer_basis(weight.flip(0), 4, algorithm="exact")  # another SVD of the same inputs
    counted_twice = torch.cat([2**0.5 * weight[:, 1:2], weight[:, 3:]], dim=1)  # has the same Q
    for other in (mirrored.q.flip(0), layer_basis(counted_twice, 4, algorithm="exact").q):
        assert float((found.q - other).norm()) <= moved_by_rounding(counted_twice, 4, "exact")
    assert_rounded(found.r, found.q.T @ weight, terms=40, size=float(weight.norm()))
    pivots = [float(row[row.abs() > 40 * EPS * weight.norm()][0]) for row in found.r]
    assert min(pivots) > 0


@pytest.mark.parametrize("algorithm", ["exact", "fast"])
@pytest.mark.parametrize("size", [24, 480])
@pytest.mark.parametrize("true_rank", [1, 7])
def test_a_rank_deficient_weight_says_its_layer_and_numerical_rank(algorithm, size, true_rank):
    weight = gaussian(size, true_rank) @ gaussian(true_rank, size, seed=1)
    with pytest.raises(BasisError, match=rf"(?s)'blocks\.0\.to_q'.*rank 8 or more.*numerical rank {true_rank}"):
        layer_basis(weight, 8, algorithm=algorithm, name="blocks.0.to_q")
    found = layer_basis(weight, true_rank, algorithm=algorithm)
    assert_orthonormal(found.q)
    assert found.energy == pytest.approx(1, abs=8 * size * EPS)


@pytest.mark.parametrize(
    ("weight", "rank", "algorithm", "message"),
    [
        (torch.full((6, 6), torch.nan), 2, "fast", "NaN or Inf"),
        (torch.full((6, 6), torch.inf), 2, "exact", "NaN or Inf"),
        (torch.zeros(6, 6), 2, "fast", "all zeros"),
        (torch.ones(6, 4), 0, "fast", "a rank of 1 or more"),
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


def test_a_fingerprint_tells_the_version_of_the_algorithm_that_made_the_basis():
    digests = {"a": "1", "b": "2"}
    for version in range(1, VERSIONS["fast"] + 1):
        assert version_of(fingerprint(digests, 4, "fast", 0, version), digests, 4, "fast", 0) == version
    assert fingerprint(digests, 4, "fast", 0) == fingerprint(digests, 4, "fast", 0, VERSIONS["fast"])
    assert version_of("0" * 64, digests, 4, "fast", 0) is None
    assert version_of(fingerprint(digests, 4, "quick", 0), digests, 4, "quick", 0) is None


def test_a_basis_that_another_version_cached_is_not_taken(private_cache: Path, monkeypatch):
    weight = gaussian(12, 10)
    cached_layer_basis(weight, weight_digest(weight), 3)
    monkeypatch.setitem(VERSIONS, "fast", VERSIONS["fast"] + 1)
    assert not cache_path(weight_digest(weight), 3).exists()
    cached_layer_basis(weight, weight_digest(weight), 3)
    assert len(list(private_cache.iterdir())) == 2


def test_verification_finds_a_basis_that_is_not_orthonormal_or_not_where_the_energy_is():
    weight = sloping("i^-0.3", (300, 200))
    sound = layer_basis(weight, 8)
    found = verify(weight, sound)
    assert found.energy == sound.energy
    scaled = dataclasses.replace(sound, q=sound.q * 1.001)
    elsewhere = torch.linalg.qr(gaussian(300, 8)).Q
    stray = dataclasses.replace(sound, q=elsewhere, r=elsewhere.T @ weight)
    for unsound in (scaled, stray):
        with pytest.raises(BasisError, match=r"(?s)'to_q'.*unsound"):
            verify(weight, unsound, "to_q")


def test_a_second_basis_of_the_same_model_computes_nothing(private_cache: Path, monkeypatch):
    weights = {"a": gaussian(12, 10), "b": gaussian(8, 3, 3, 3, seed=1)}
    seen = []
    first = Basis.of(weights, 3, progress=lambda *step: seen.append(step))
    assert seen == [(1, 2, "a"), (2, 2, "b")]
    assert list(first) == ["a", "b"]
    assert sorted(path.suffix for path in private_cache.iterdir()) == [".safetensors"] * 2

    def forbidden(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(factor, "orthonormal_columns", forbidden)
    second = Basis.of({name: weight.double() for name, weight in weights.items()}, 3)
    assert second.fingerprint == first.fingerprint
    for name in weights:
        assert torch.equal(first[name].q, second[name].q)
        assert torch.equal(first[name].r, second[name].r)
    with pytest.raises(AssertionError, match="computed again"):
        Basis.of(weights, 4)


def _negated(q: torch.Tensor) -> torch.Tensor:
    return q * torch.tensor([1.0, -1.0, 1.0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path, _: path.write_bytes(b""),
        lambda path, _: path.write_bytes(b"\x00" * 40),
        lambda path, _: path.write_bytes(path.read_bytes()[:-4]),
        lambda path, q: save_file({"q": _negated(q)}, path),
        lambda path, q: save_file({"q": _negated(q)}, path, metadata_of(path)),
        lambda path, _: save_file({"q": layer_basis(gaussian(12, 10, seed=1), 3).q}, path, metadata_of(path)),
        lambda path, q: save_file({"q": q[:-1]}, path, metadata_of(path)),
        lambda path, q: write_atomically(path, packed_entry({"q": q}, "another")),
        lambda path, q: write_atomically(path, packed_entry({"q": q[:-1]}, path.stem)),
    ],
)
def test_a_cache_file_that_is_not_what_was_written_is_made_again_and_said(private_cache: Path, caplog, damage):
    weight = gaussian(12, 10)
    q = cached_layer_basis(weight, weight_digest(weight), 3).q
    (path,) = private_cache.iterdir()
    written = path.read_bytes()
    damage(path, q.clone())
    assert torch.equal(cached_layer_basis(weight, weight_digest(weight), 3).q, q)
    assert path.read_bytes() == written
    assert str(path.parent) in caplog.text and "made again" in caplog.text


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_a_cache_file_of_another_weight_is_refused(private_cache: Path):
    weight = gaussian(120, 100)
    cached_layer_basis(weight, weight_digest(weight), 3)
    (path,) = private_cache.iterdir()
    write_atomically(path, packed_entry({"q": layer_basis(gaussian(120, 100, seed=1), 3).q}, path.stem))
    with pytest.raises(BasisError, match=f"(?s)another weight.*delete .*{path.name}"):
        cached_layer_basis(weight, weight_digest(weight), 3)


def test_an_unwritable_cache_names_the_remedy(tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(BasisError, match="QRLORA_CACHE"):
        Basis.of({"a": gaussian(12, 10)}, 3, cache_dir=blocked / "cache")
