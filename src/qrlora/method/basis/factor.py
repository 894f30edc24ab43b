"""Factor a weight W into Q and R: orthonormal columns and a triangle, Q R the best rank-r approximation of W.

All adapters of one base model train on the same basis (arXiv 2507.04599, section 3.2), so the pair has to be a
function of the weight alone. It is: with ``diag(R) > 0`` the QR factorisation of the rank-r core is unique, whatever
signs and rotations the singular value decomposition chose. ``exact`` takes the core from the full decomposition.
``fast`` iterates from a seeded start until the core has at least 0.999 of the best possible energy, so its Q is a
function of weight and seed: all machines stop after the same iterations, and their Q differ by rounding only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import BasisError
from qrlora.method.basis.identity import ALGORITHMS

_OVERSAMPLING = 4  # a Krylov block has rank / this columns beyond the rank
_NAMED = 24  # layers named in a message
_LEAST_BLOCKS = 8  # of the smaller side of a weight: below, its full decomposition is as quick
_GAIN = 2e-3  # stop when the leading squared singular values could grow by this share of themselves, on average
_LEFT_OVER = 1e-4  # what may be left of one space in another and still be orthonormal to the square of it
_ORTHONORMAL = 1e-5  # what a computed Q may be off orthonormal by
_WITHIN_REACH = 1e-3  # what share of its energy a power iteration may still add to a computed Q


@dataclass(frozen=True)
class LayerBasis:
    """Basis of one weight W (out, in), convolutions flattened to (out, in * kernel).

    Attributes:
        q: (out, rank) float32, orthonormal columns spanning the first ``rank`` left singular vectors of W; ``rank`` is
            :func:`clipped_rank` of what was asked for.
        r: (rank, in) float32, ``Qᵀ W``: zero below the diagonal, positive on it.
        energy: share of ||W||_F² that ``Q R`` holds, in [0, 1].
    """

    q: Float[Tensor, "out rank"]
    r: Float[Tensor, "rank in"]
    energy: float


def layer_basis(weight: Tensor, rank: int, *, algorithm: str = "fast", seed: int = 0, name: str = "") -> LayerBasis:
    """Compute a weight's basis: truncated SVD, then ``S_r V_rᵀ = O R``, ``Q = U_r O`` (arXiv 2507.04599, eq. 3 to 5).

    Only the small factor (rank, in) is factored; the (out, in) core never is.

    Args:
        weight: (out, in) or (out, in, *kernel), any floating dtype; read as float32.
        rank: number of columns, 1 or more; a weight has no more of them than :func:`clipped_rank` says.
        algorithm: ``exact`` (full SVD) or ``fast`` (block Krylov, arXiv 1504.05477; small weights get the full SVD).
            The columns of ``fast`` hold at least 0.999 of the energy that those of ``exact`` hold; it stops when its
            residuals say so (0.9997 and more on 36 kinds of spectra, flat, sloping, stepped and with outliers).
        seed: start of ``fast``, from a generator of its own: the global random state is left alone.
        name: layer name for error messages.

    Raises:
        BasisError: NaN or Inf, all zero, rank below 1 or above the numerical rank, unknown algorithm.
    """
    matrix, scale = checked_matrix(weight, rank, algorithm, name)
    rank = clipped_rank(matrix.shape, rank)
    with full_precision(matrix.device.type):
        return with_coordinates(matrix, scale, orthonormal_columns(matrix, rank, algorithm, seed, name))


def clipped_rank(shape: Sequence[int], rank: int) -> int:
    """Return how many columns a basis of this rank has in a layer of this weight, (out, in, *kernel): its smaller side
    at most.

    A small layer has the first columns of the basis: column c exists there if c is below this number.
    """
    return min(rank, shape[0], math.prod(shape[1:]))


def clipping(columns: Mapping[str, tuple[int, int]]) -> str:
    """Return a text that names the layers (name -> columns held, columns asked for) with fewer columns than asked for,
    or ""."""
    fewer = [f"{name} ({held} of {asked})" for name, (held, asked) in columns.items() if held < asked]
    more = f" and {len(fewer) - _NAMED} others" if len(fewer) > _NAMED else ""
    listed = ", ".join(fewer[:_NAMED]) + more
    return f"rank clipped to what a layer's smaller side holds, in {len(fewer)} layers: {listed}" if fewer else ""


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify` for one layer.

    Attributes:
        energy: share of ||W||_F² that Q R holds.
        off_orthonormal: largest entry of |QᵀQ - 1|.
        within_reach: relative gain in energy from one more power iteration.
    """

    energy: float
    off_orthonormal: float
    within_reach: float


def verify(weight: Tensor, basis: LayerBasis, name: str = "") -> Verification:
    """Check a basis against its weight without a decomposition: one power iteration measures the energy that Q misses.

    Raises:
        BasisError: columns that are not orthonormal to 1e-5, or that a power iteration improves by more than 1e-3.
    """
    matrix, scale = checked_matrix(weight, basis.q.shape[1], "fast", name)
    with full_precision(matrix.device.type):
        better = _orthonormalise((basis.r * scale) @ matrix.T)
        rows = [torch.linalg.vector_norm(part, dim=1).double() for part in (better @ matrix, basis.r * scale)]
        reached, held = (float(norms.square().sum()) for norms in rows)
        found = Verification(basis.energy, off_orthonormal(basis.q), max(reached / held - 1, 0.0))
    if not (found.off_orthonormal <= _ORTHONORMAL and found.within_reach <= _WITHIN_REACH):
        raise BasisError(
            f"layer {name!r}: its basis is unsound",
            expected=f"columns orthonormal to {_ORTHONORMAL}, energy within {_WITHIN_REACH} of the next iteration's",
            got=found,
            remedy="delete the cached basis; if it comes back, report it as a fault of qrlora",
        )
    return found


def off_orthonormal(q: Float[Tensor, "out rank"]) -> float:
    return float((q.T @ q - torch.eye(q.shape[1], device=q.device)).abs().max())


@contextlib.contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Disable autocast and TF32 inside the context, so that Q does not depend on the caller's precision settings."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(allowed)


def checked_matrix(weight: Tensor, rank: int, algorithm: str, name: str) -> tuple[Float[Tensor, "out in"], float]:
    """Return the weight as a float32 matrix and the scale it was multiplied by. Raises BasisError: as `layer_basis`.

    The scale is 1, or a power of two, which changes no digit, where squares could overflow or vanish in float32.
    """
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
    if rank < 1:
        raise BasisError(f"{layer} has no basis", expected="a rank of 1 or more", got=rank, remedy="raise the rank")
    matrix = weight.detach().flatten(1).to(torch.float32)
    low, high = (float(value) for value in matrix.aminmax())  # NaN passes through both
    if not math.isfinite(high - low):
        raise BasisError(f"{layer} has no basis", expected="finite values", got="NaN or Inf", remedy="repair the model")
    if low == high == 0:
        raise BasisError(
            f"{layer} has no basis", expected="a non-zero weight", got="all zeros", remedy="do not target this layer"
        )
    exponent = math.frexp(max(-low, high))[1]
    return (matrix, 1.0) if -16 < exponent < 16 else (matrix * 2.0**-exponent, 2.0**-exponent)


def orthonormal_columns(
    matrix: Float[Tensor, "out in"], rank: int, algorithm: str, seed: int, name: str
) -> Float[Tensor, "out rank"]:
    """Compute Q of the matrix in float32, the small factor canonicalised in float64."""
    try:
        found = _block_krylov(matrix, rank, seed) if algorithm == "fast" else None
        u, values = found or _full_decomposition(matrix, rank)
    except torch.linalg.LinAlgError as error:
        raise BasisError(f"layer {name!r} cannot be decomposed", got=error, remedy="repair the weight") from error
    numerical_rank = int((values > _noise(matrix) * values[0]).sum())
    if numerical_rank < rank:
        raise BasisError(
            f"layer {name!r} has no basis of rank {rank}: the weight is rank-deficient",
            expected=f"numerical rank {rank} or more",
            got=f"numerical rank {numerical_rank}",
            remedy="lower the rank or do not target this layer",
        )
    return u @ _triangulating_rotation(u, matrix, float(values[0])).to(u)


def _noise(matrix: Float[Tensor, "out in"]) -> float:
    """Precision of singular values in float32, as a share of the largest."""
    return torch.finfo(torch.float32).eps * math.sqrt(max(matrix.shape))


def _full_decomposition(
    matrix: Float[Tensor, "out in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]]:
    u, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], values[:rank]


def block_width(rank: int) -> int:
    """Return the number of columns of a Krylov block of ``fast``."""
    return rank + max(8, rank // _OVERSAMPLING)


def _block_krylov(
    matrix: Float[Tensor, "out in"], rank: int, seed: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, " rank"]] | None:
    """(U_r, singular values) by block Golub-Kahan iteration from a random block (arXiv 1504.05477, algorithm 2).

    Orthonormal ``left`` and ``right`` grow by a block a step such that ``left W = core right``, so the singular triples
    of the small core give ``Wᵀ u = s v`` exactly, and ``W v - s u`` lies in the next left block alone. So it costs no
    product to know when to stop (:func:`_relative_gain`); and none is wasted, because with that block v gives the
    better u that is returned.

    None where the spaces would have to be as large as the matrix: then only the full decomposition will do.
    """
    block = block_width(rank)
    limit = min(matrix.shape) // block * block
    if limit < _LEAST_BLOCKS * block:
        return None
    left, right = matrix.new_empty(limit, matrix.shape[0]), matrix.new_empty(limit, matrix.shape[1])
    start = torch.randn(block, matrix.shape[1], generator=torch.Generator().manual_seed(seed)).to(matrix)
    left[:block] = _orthonormalise(start @ matrix.T)
    core = torch.empty(0, 0)  # stays on the CPU, where small decompositions are quickest
    for old in range(0, limit - block, block):
        new = old + block
        inside, right[old:new], corner = _extend(right[:old], left[old:new] @ matrix, block)
        core = torch.block_diag(core, corner.cpu())  # type: ignore[no-untyped-call]
        core[old:, old - block : old] = inside
        _, left[new : new + block], step = _extend(left[:new], right[old:new] @ matrix.T, block)
        step = step.cpu()
        if old == 0:  # what a random block has seen is never enough
            continue
        u, values, vh = torch.linalg.svd(core)
        numerically_zero = values[rank - 1] <= _noise(matrix) * values[0]
        if numerically_zero or _relative_gain(values, vh[:, old:] @ step, rank) <= _GAIN:
            # W v of the best `block` v, in the coordinates of the left space with its newest block.
            better = torch.cat([values[:block, None] * u.T[:block], vh[:block, old:] @ step], dim=1)
            _, values, rotation = torch.linalg.svd(better, full_matrices=False)
            return (rotation[:rank].to(left) @ left[: new + block]).T, values[:rank]
    return None


def _relative_gain(
    values: Float[Tensor, " found"], residuals: Float[Tensor, "found block"], rank: int
) -> Float[Tensor, ""]:
    """Share of themselves by which the leading s² could still grow, on average over the rank.

    With c = s ||W v - s u|| and a gap g between s² and the largest s² outside, the two-by-two matrix
    ``[[s², c], [c, s² - g]]`` has the eigenvalue s² + (sqrt(g² + 4 c²) - g) / 2. Divided by s² here.
    """
    leading = values[:rank]
    c = residuals[:rank].norm(dim=1) / leading
    gap = 1 - (values[rank] / leading).square()
    gain: Tensor = ((gap.square() + 4 * c.square()).sqrt() - gap).mean() / 2
    return gain


def _extend(
    space: Float[Tensor, "old width"], rows: Float[Tensor, "block width"], reach: int
) -> tuple[Float[Tensor, "block reach"], Float[Tensor, "block width"], Float[Tensor, "block block"]]:
    """(inside, block, corner) with ``rows = inside space[-reach:] + corner block``, ``[space; block]`` orthonormal.

    In exact arithmetic Krylov rows have no other part inside the space than in its last block.
    """
    inside = rows @ space[-reach:].T
    outside = torch.addmm(rows, inside, space[-reach:], alpha=-1)
    block = _orthonormalise(outside)
    left_over = block @ space.T  # rounding, which would grow from block to block
    block = torch.addmm(block, left_over, space, alpha=-1)
    size = float(left_over.norm())
    if size > 0.5:
        # The space has all there is (a weight of low rank, equal singular values): the block was rounding noise, of
        # which two passes do not rid it.
        block = _orthonormalise(torch.cat([space, block]))[len(space) :]
    elif size > _LEFT_OVER:  # below, its square is what the rows are off orthonormal by
        block = _orthonormalise(block)
    return inside, block, outside @ block.T


def _orthonormalise(rows: Float[Tensor, "count width"]) -> Float[Tensor, "count width"]:
    q: Tensor = torch.linalg.qr(rows.T).Q
    return q.T


def _triangulating_rotation(
    u: Float[Tensor, "out rank"], matrix: Float[Tensor, "out in"], largest: float
) -> Float[Tensor, "rank rank"]:
    """The orthogonal O with ``uᵀ W = O R``, R upper triangular with positive pivots; float64, on the CPU.

    R's pivots are its diagonal unless leading inputs of the layer are dead (zero or repeated columns of the weight).
    Those columns are passed over, which gives R the echelon form in which it is still unique.
    """
    o, r = torch.linalg.qr((u.T @ matrix[:, : u.shape[1]]).cpu().double())
    tolerance = largest * torch.finfo(torch.float32).eps * matrix.shape[1] ** 0.5
    if bool((r.diagonal().abs() <= tolerance).any()):
        core = (u.T @ matrix).cpu().double()
        o, r = torch.linalg.qr(core[:, _independent_columns(core, tolerance)])
    rotation: Tensor = o * torch.where(r.diagonal() < 0, -1.0, 1.0).to(o)
    return rotation


def _independent_columns(core: Float[Tensor, "rank in"], tolerance: float) -> list[int]:
    """The first columns, from the left, each independent of those before it; as many as the core has rows."""
    rest, chosen = core.clone(), []
    for _ in range(core.shape[0]):
        pivot = int((rest.norm(dim=0) > tolerance).float().argmax())
        direction = rest[:, pivot] / rest[:, pivot].norm()
        rest -= torch.outer(direction, direction @ rest)
        chosen.append(pivot)
    return chosen


def with_coordinates(matrix: Float[Tensor, "out in"], scale: float, q: Float[Tensor, "out rank"]) -> LayerBasis:
    """Return the basis of the weight ``matrix / scale``."""
    r = torch.triu(q.T @ matrix)
    # Row by row and then in float64: one float32 sum over ten million entries is off by 1e-3.
    energies = [float(torch.linalg.vector_norm(part, dim=1).double().square().sum()) for part in (r, matrix)]
    return LayerBasis(q=q, r=r if scale == 1 else r / scale, energy=min(energies[0] / energies[1], 1.0))
