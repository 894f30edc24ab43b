"""The two factors of ΔW in one layer: ΔR, which trains, and the columns of Q that it is multiplied by.

``DeltaR`` stands in PEFT's ``lora_A``. ``BasisColumns`` stand in ``lora_B`` and look up columns of a Q that all
adapters of the layer share; it lies in a non-persistent buffer, so no optimiser, checkpoint or hot swap can reach it.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.errors import TunerError
from qrlora.method.basis import LayerBasis, cached_layer_basis, weight_digest

BasisKey = tuple[int, str, int]  # rank, algorithm, seed


class SharedBasis(nn.Module):
    """Q of one layer, the same module object in every adapter of that layer, so that ``.to()`` moves one tensor.

    Attributes:
        q: (out, basis_rank), or as many columns as the layer holds; None while the base weight is on the meta device.
        key: (rank, algorithm, seed).
        name: the layer's name, for errors.
        digest: digest of the base weight Q was computed from.
    """

    q: Tensor | None

    def __init__(self, key: BasisKey, name: str):
        super().__init__()
        self.key, self.name = key, name
        self.digest: str | None = None
        self.register_buffer("q", None, persistent=False)

    def fill(self, weight: Tensor) -> LayerBasis:
        """Take Q from the cache or compute it, in float32. ``weight``: (out, in, *kernel), any dtype."""
        rank, algorithm, seed = self.key
        self.digest = weight_digest(weight)
        basis = cached_layer_basis(weight, self.digest, rank, algorithm=algorithm, seed=seed, name=self.name)
        self.q = basis.q.T.contiguous().T  # column after column: every nth of them can be multiplied without a copy
        return basis


class BasisColumns(nn.Module):
    """An adapter's columns of the shared Q, stored as ``lora_B``; none is trained or saved."""

    def __init__(self, basis: SharedBasis, columns: tuple[int, ...], kernel_dims: int):
        super().__init__()
        self.basis, self.columns, self._kernel_dims = basis, columns, kernel_dims
        steps = {b - a for a, b in itertools.pairwise(columns)} or {1}
        # Evenly spaced columns are a view of Q; only an irregular list has to be gathered.
        even = slice(columns[0], columns[-1] + 1, steps.pop()) if len(steps) == 1 else None
        self._index: slice | list[int] = list(columns) if even is None else even

    @property
    def q(self) -> Float[Tensor, "out rank"]:
        """This adapter's columns of Q."""
        if self.basis.q is None:
            raise TunerError(
                f"layer {self.basis.name!r} has no basis yet",
                expected="a base weight with values",
                got="a weight on the meta device",
                remedy="load the base model's weights first",
            )
        return self.basis.q[:, self._index]

    @property
    def weight(self) -> Tensor:
        """These columns in the shape of a LoRA up weight: (out, rank), or (out, rank, 1, ...) for a convolution."""
        return self._as_convolution(self.q)

    def up(self) -> Float[Tensor, "out inner"]:
        """Return the left factor of ΔW: Q, whose counterpart is :meth:`DeltaR.down`."""
        return self.q

    def forward(self, x: Tensor) -> Tensor:
        weight = self._as_convolution(self.up()).to(x.dtype)
        apply = (F.linear, F.conv1d, F.conv2d, F.conv3d)[self._kernel_dims]
        return apply(x, weight)

    def _as_convolution(self, columns: Float[Tensor, "out inner"]) -> Tensor:
        return columns.reshape(*columns.shape, *(1,) * self._kernel_dims)

    def extra_repr(self) -> str:
        rank, algorithm, seed = self.basis.key
        return f"columns={self._index}, basis_rank={rank}, algorithm={algorithm!r}, basis_seed={seed}"


class TrainedColumns(BasisColumns):
    """Columns of the mode that trains the basis: ``delta_q`` (out, rank) trains, ``ΔW = Q ΔR + ΔQ (R + ΔR)``.

    That is ``(Q + ΔQ)(R + ΔR) - Q R``, written so that it is exactly zero at the start in every dtype.
    """

    def __init__(
        self, basis: SharedBasis, columns: tuple[int, ...], kernel_dims: int, delta_q: Float[Tensor, "out rank"]
    ):
        super().__init__(basis, columns, kernel_dims)
        self.delta_q = nn.Parameter(delta_q)

    def up(self) -> Float[Tensor, "out inner"]:
        """Return the left factor of ΔW: Q beside ΔQ."""
        return torch.cat([self.q.to(self.delta_q.dtype), self.delta_q], dim=1)


class DeltaR(nn.Module):
    """ΔR of one adapter, in ``lora_A``: ``weight`` (rank, in) or (rank, in, *kernel); mixed into Linear and ConvNd.

    The triangle is applied where ΔR is used. So gradients outside it are exactly zero, entries that start at zero stay
    there under any elementwise optimiser, and stray values in a file have no effect.
    """

    weight: Tensor
    outside: Tensor | None  # (rank, last basis column + 1) bool: entries that must be zero; None for a dense ΔR
    r: Tensor | None  # (freed, in): first rows of R, of as many columns as train too; None if no column does

    def prepare(self, columns: tuple[int, ...], triangular: bool) -> None:
        """Set which basis columns the rows belong to; :meth:`fill` follows once the basis is known."""
        self.columns, self.triangular = columns, triangular
        self.register_buffer("outside", None, persistent=False)
        self.register_buffer("r", None, persistent=False)

    @torch.no_grad()
    def fill(self, device: torch.device, r: Float[Tensor, "rank in"] | None) -> None:
        """Store R (None unless it trains), and make the mask that zeroes row k, of basis column c, before entry c."""
        self.r = r
        if self.triangular:
            first = torch.tensor(self.columns, device=device).unsqueeze(1)
            self.outside = torch.arange(self.columns[-1] + 1, device=device) < first
            if not self.weight.is_meta:
                self.weight.copy_(self.delta_r().reshape(self.weight.shape))

    def delta_r(self) -> Float[Tensor, "rank in"]:
        """Return ΔR as a matrix, zero outside the triangle; differentiable."""
        matrix = self.weight.flatten(1)
        if self.outside is None:
            return matrix
        # One copy here and one in the backward pass, which are all that the triangle costs; cutting the matrix in two
        # and joining it again would be eight.
        matrix = matrix.clone()
        matrix[:, : self.outside.shape[1]].masked_fill_(self.outside, 0)
        return matrix

    def down(self) -> Float[Tensor, "inner in"]:
        """Return the right factor of ΔW: ΔR, followed by R + ΔR of the columns that train too."""
        delta = self.delta_r()
        return delta if self.r is None else torch.cat([delta, self.r.to(delta.dtype) + delta[: len(self.r)]])

    def down_weight(self) -> Tensor:
        """Return :meth:`down` in the shape of a LoRA down weight."""
        return self.down().reshape(-1, *self.weight.shape[1:])


class DeltaRLinear(DeltaR, nn.Linear):
    """ΔR of a Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.down_weight())


class DeltaRConv(DeltaR):
    """ΔR of any convolution."""

    groups: int

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self._conv_forward(x, self.down_weight(), None)  # type: ignore[operator]
        return found


class DeltaRConv1d(DeltaRConv, nn.Conv1d):
    """ΔR of a 1-d convolution."""


class DeltaRConv2d(DeltaRConv, nn.Conv2d):
    """ΔR of a 2-d convolution."""


class DeltaRConv3d(DeltaRConv, nn.Conv3d):
    """ΔR of a 3-d convolution."""
