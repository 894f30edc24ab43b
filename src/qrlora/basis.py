"""The basis of a weight: orthonormal columns Q and a triangular R with Q R = the best rank-r approximation.

Every adapter of one base model trains on the same basis (arXiv 2507.04599, section 3.2), so the pair has to be a
function of the weight alone. It is: with ``diag(R) > 0`` the QR factorisation of the rank-r core is unique, whatever
signs and rotations the singular value decomposition chose.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from qrlora.errors import BasisError
from qrlora.files import write_atomically

BASIS_VERSION = 1  # part of every fingerprint and cache name: raise it when the same weight would give another basis
ALGORITHMS = ("exact", "fast")

_OVERSAMPLING = 8  # extra columns of a Krylov block beyond the rank
_DEPTH = 6  # steps per Krylov space: one round reaches _RESIDUAL where singular values fall as 1/sqrt(i) or faster
_ROUNDS = 2  # a restart from the best block so far, needed only where the spectrum hardly decays
_RESIDUAL = 3e-5  # stop when ||W v - s u|| <= this * s_1: a subspace within 2e-4 of the exact one (measured at 3072)
_CACHED = 1e-4  # what a sound cached Q may be off orthonormal by, with room


@dataclass(frozen=True)
class LayerBasis:
    """Basis of one weight W (out, in), convolutions flattened to (out, in * kernel).

    Attributes:
        q: (out, rank) float32, orthonormal columns spanning the first ``rank`` left singular vectors of W.
        r: (rank, in) float32, ``Qᵀ W``: zero below the diagonal, positive on it.
        energy: share of ||W||_F² that ``Q R`` holds, in [0, 1].
    """

    q: Float[Tensor, "out rank"]
    r: Float[Tensor, "rank in"]
    energy: float


def layer_basis(weight: Tensor, rank: int, *, algorithm: str = "fast", seed: int = 0, name: str = "") -> LayerBasis:
    """Basis of one weight: truncated SVD, then ``S_r V_rᵀ = O R`` and ``Q = U_r O`` (arXiv 2507.04599, eq. 3 to 5).

    Only the small factor (rank, in) is factored; the (out, in) core never is.

    Args:
        weight: (out, in) or (out, in, *kernel), any floating dtype; read as float32.
        rank: number of columns, 1 to min(out, in * kernel).
        algorithm: ``exact`` (full SVD) or ``fast`` (block Krylov, arXiv 1504.05477; small weights get the full SVD).
        seed: start of ``fast``, from a generator of its own: the global random state is left alone.
        name: layer name for error messages.

    Raises:
        BasisError: NaN or Inf, all zero, rank above min(shape) or above the numerical rank, unknown algorithm.
    """
    matrix = _checked_matrix(weight, rank, algorithm, name)
    return _with_coordinates(matrix, _orthonormal_columns(matrix, rank, algorithm, seed, name))


def weight_digest(weight: Tensor) -> str:
    """SHA-256 of the shape and of the values as float32, so a half-precision file and its upcast agree."""
    values = weight.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(json.dumps(list(values.shape)).encode())
    digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(digests: Mapping[str, str], rank: int, algorithm: str, seed: int) -> str:
    """Identity of the basis of a base model, from the digests of its weights (layer name -> digest)."""
    identity = [BASIS_VERSION, algorithm, rank, seed, sorted(digests.items())]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def default_cache_dir() -> Path:
    """Folder of cached bases: $QRLORA_CACHE, else ~/.cache/qrlora."""
    return Path(os.environ.get("QRLORA_CACHE") or Path.home() / ".cache" / "qrlora")


class Basis(Mapping[str, LayerBasis]):
    """Q and R of every target weight of one base model at one rank, by layer name.

    Attributes:
        rank, algorithm, seed: what the basis was asked for.
        digests: layer name -> digest of its weight.
        fingerprint: identity of all of it; two bases are the same if and only if their fingerprints are.
    """

    def __init__(
        self, layers: Mapping[str, LayerBasis], digests: Mapping[str, str], rank: int, algorithm: str, seed: int
    ):
        self._layers, self.digests = dict(layers), dict(digests)
        self.rank, self.algorithm, self.seed = rank, algorithm, seed
        self.fingerprint = fingerprint(self.digests, rank, algorithm, seed)

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Tensor],
        rank: int,
        *,
        algorithm: str = "fast",
        seed: int = 0,
        cache_dir: Path | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Basis:
        """Basis of named weights, each taken from the cache on disk or computed and put there.

        Args:
            weights: layer name -> weight as for :func:`layer_basis`.
            cache_dir: where bases are kept; :func:`default_cache_dir` unless given.
            progress: called with (layers done, layers in all, name of the layer just done).

        Raises:
            BasisError: as :func:`layer_basis`, and when the cache cannot be read or written.
        """
        layers, digests = {}, {}
        for done, (name, weight) in enumerate(weights.items(), start=1):
            digests[name] = weight_digest(weight)
            layers[name] = cached_layer_basis(
                weight, digests[name], rank, algorithm=algorithm, seed=seed, name=name, cache_dir=cache_dir
            )
            if progress is not None:
                progress(done, len(weights), name)
        return cls(layers, digests, rank, algorithm, seed)

    def __getitem__(self, name: str) -> LayerBasis:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def cached_layer_basis(
    weight: Tensor,
    digest: str,
    rank: int,
    *,
    algorithm: str = "fast",
    seed: int = 0,
    name: str = "",
    cache_dir: Path | None = None,
) -> LayerBasis:
    """:func:`layer_basis` through the cache on disk. ``digest`` is :func:`weight_digest` of ``weight``."""
    matrix = _checked_matrix(weight, rank, algorithm, name)
    identity = fingerprint({"": digest}, rank, algorithm, seed)
    path = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / f"{identity}.safetensors"
    if path.exists():
        q = _read_columns(path, (matrix.shape[0], rank)).to(matrix.device)
    else:
        q = _orthonormal_columns(matrix, rank, algorithm, seed, name)
        # R is QᵀW and cheap to have again, so the file holds Q alone.
        _cache(path, save({"q": q.cpu()}))
    return _with_coordinates(matrix, q)


def _checked_matrix(weight: Tensor, rank: int, algorithm: str, name: str) -> Float[Tensor, "out in"]:
    """The weight as a float32 matrix, or the error that says why it has no basis of this rank."""
    layer = f"layer {name!r}" if name else "the weight"
    if algorithm not in ALGORITHMS:
        raise BasisError(
            f"{layer}: unknown basis algorithm",
            expected=" or ".join(ALGORITHMS),
            got=repr(algorithm),
            remedy="name one",
        )
    if weight.ndim < 2 or not weight.is_floating_point() or weight.is_meta:
        raise BasisError(
            f"{layer} has no basis",
            expected="a floating-point Linear or convolution weight of 2 or more dimensions, with values",
            got=f"{weight.dtype} of shape {tuple(weight.shape)}{' on the meta device' if weight.is_meta else ''}",
            remedy="dequantise the weight first, or do not target this layer",
        )
    matrix = weight.detach().flatten(1).to(torch.float32)
    largest = min(matrix.shape)
    if not 1 <= rank <= largest:
        raise BasisError(
            f"{layer} has no basis of rank {rank}",
            expected=f"a rank from 1 to {largest}, the smaller side of {tuple(matrix.shape)}",
            got=rank,
            remedy="lower the rank or do not target this layer",
        )
    low, high = (float(value) for value in matrix.aminmax())  # NaN passes through both
    if not math.isfinite(high - low):
        raise BasisError(f"{layer} has no basis", expected="finite values", got="NaN or Inf", remedy="repair the model")
    if low == high == 0:
        raise BasisError(
            f"{layer} has no basis", expected="a non-zero weight", got="all zeros", remedy="do not target this layer"
        )
    return matrix


def _in_range(matrix: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The matrix; times a power of two, which changes no digit, where squares could overflow or vanish in float32."""
    low, high = (abs(float(value)) for value in matrix.aminmax())
    exponent = math.frexp(max(low, high))[1]
    return matrix if -16 < exponent < 16 else matrix * 2.0**-exponent


def _orthonormal_columns(
    matrix: Float[Tensor, "out in"], rank: int, algorithm: str, seed: int, name: str
) -> Float[Tensor, "out rank"]:
    """Q of the matrix, computed in float32 with the small factor canonicalised in float64."""
    matrix = _in_range(matrix)  # columns do not depend on the scale
    block = rank + _OVERSAMPLING
    try:
        # A Krylov space nearly as large as the matrix costs more than its full decomposition.
        if algorithm == "exact" or block * (_DEPTH + 1) >= min(matrix.shape):
            u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
            u, core = u[:, :rank], values[:rank, None] * vh[:rank]
        else:
            u, values, core = _block_krylov(matrix, rank, block, seed)
    except torch.linalg.LinAlgError as error:
        raise BasisError(f"layer {name!r} cannot be decomposed", got=error, remedy="repair the weight") from error
    noise = values[0] * torch.finfo(torch.float32).eps * max(matrix.shape) ** 0.5
    found = int((values > noise).sum())
    if found < rank:
        raise BasisError(
            f"layer {name!r} has no basis of rank {rank}: the weight is rank-deficient",
            expected=f"numerical rank {rank} or more",
            got=f"numerical rank {found}",
            remedy="lower the rank or do not target this layer",
        )
    return u @ _triangulating_rotation(core).to(u)


def _block_krylov(
    matrix: Float[Tensor, "out in"], rank: int, block: int, seed: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " values"], Float[Tensor, "rank in"]]:
    """(U_r, singular values found, U_rᵀ W) by restarted block Krylov iteration (arXiv 1504.05477, algorithm 2).

    The iteration runs on the shorter side; every block is orthogonalised against all earlier ones, twice, because
    float32 Krylov blocks go parallel otherwise.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    side = matrix.T if tall else matrix
    start = torch.randn(side.shape[1], block, generator=torch.Generator().manual_seed(seed)).to(matrix)
    x = _orthonormalise(side @ start)
    for _ in range(_ROUNDS):
        space, projected = x, side.T @ x
        for _ in range(_DEPTH):
            x = side @ projected[:, -block:]
            x = _orthonormalise(x - space @ (space.T @ x))
            left = space.T @ x
            x = _orthonormalise(x - space @ left)
            if left.norm() > 0.5:
                # The space has all there is (a weight of low rank, equal singular values): x was rounding noise, of
                # which two passes do not rid it.
                x = _orthonormalise(torch.cat([space, x], dim=1))[:, space.shape[1] :]
            space, projected = torch.cat([space, x], dim=1), torch.cat([projected, side.T @ x], dim=1)
        rotation, values, _ = torch.linalg.svd(torch.linalg.qr(projected, mode="r").R.T)
        x = space @ rotation[:, :block]
        # side.T @ u = s v holds exactly for these Ritz vectors, so side @ v - s u is the whole residual.
        right = (projected @ rotation[:, :rank]) / values[:rank]
        residual = (side @ right - x[:, :rank] * values[:rank]).norm(dim=0).max()
        if residual <= _RESIDUAL * values[0]:
            break
    if tall:
        u = _orthonormalise(matrix @ x[:, :rank])
        return u, values, u.T @ matrix
    return x[:, :rank], values, (projected @ rotation[:, :rank]).T


def _orthonormalise(columns: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    return torch.linalg.qr(columns).Q


def _triangulating_rotation(core: Float[Tensor, "rank in"]) -> Float[Tensor, "rank rank"]:
    """The orthogonal O with ``core = O R``, R upper triangular with positive pivots; float64, on the CPU.

    R's pivots are its diagonal unless leading inputs of the layer are dead (zero or repeated columns of the weight).
    Those columns are passed over, which gives R the echelon form in which it is still unique.
    """
    core = core.cpu().double()
    rank = core.shape[0]
    o, r = torch.linalg.qr(core[:, :rank])
    scale = core.norm(dim=0).max() * torch.finfo(torch.float32).eps * core.shape[1] ** 0.5
    if bool((r.diagonal().abs() <= scale).any()):
        o, r = torch.linalg.qr(core[:, _independent_columns(core, float(scale))])
    return o * torch.where(r.diagonal() < 0, -1.0, 1.0).to(o)


def _independent_columns(core: Float[Tensor, "rank in"], tolerance: float) -> list[int]:
    """The first columns, from the left, each independent of those before it; as many as the core has rows."""
    rest, chosen = core.clone(), []
    for _ in range(core.shape[0]):
        pivot = int((rest.norm(dim=0) > tolerance).float().argmax())
        direction = rest[:, pivot] / rest[:, pivot].norm()
        rest -= torch.outer(direction, direction @ rest)
        chosen.append(pivot)
    return chosen


def _with_coordinates(matrix: Float[Tensor, "out in"], q: Float[Tensor, "out rank"]) -> LayerBasis:
    r = torch.triu(q.T @ matrix)
    whole = _in_range(matrix)
    held = r if whole is matrix else torch.triu(q.T @ whole)
    # Row by row and then in float64: one float32 sum over ten million entries is off by 1e-3.
    energies = [float(torch.linalg.vector_norm(part, dim=1).double().square().sum()) for part in (held, whole)]
    energy = energies[0] / energies[1]
    return LayerBasis(q=q, r=r, energy=min(energy, 1.0))


def _read_columns(path: Path, shape: tuple[int, int]) -> Float[Tensor, "out rank"]:
    remedy = f"delete {path}; it will be computed again"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise BasisError("a cached basis cannot be read", expected="safetensors", got=error, remedy=remedy) from error
    q = tensors.get("q")
    if q is None or tuple(q.shape) != shape or q.dtype != torch.float32:
        got = {key: (str(value.dtype), tuple(value.shape)) for key, value in tensors.items()}
        raise BasisError("a cached basis is not what its name says", expected=f"q {shape}", got=got, remedy=remedy)
    off = float((q.T @ q - torch.eye(shape[1])).abs().max())
    if not off <= _CACHED:  # NaN is not
        raise BasisError(
            "a cached basis is damaged", expected="orthonormal columns", got=f"off by {off:.3g}", remedy=remedy
        )
    return q


def _cache(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise BasisError(
            "a basis cannot be cached",
            expected=f"a writable folder {path.parent}",
            got=error,
            remedy="free space there, or point QRLORA_CACHE to another folder",
        ) from error
