"""The adapter layer: a frozen base layer, a Q that all its adapters share, and one trained ΔR per adapter.

It is a PEFT LoRA layer in which ``lora_A`` is ΔR and ``lora_B`` looks up columns of Q, so switching, scaling, mixed
batches and saving are PEFT's own. Q sits in a non-persistent buffer: no optimiser, checkpoint or hot swap can reach it.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qrlora.errors import TunerError
from qrlora.method.basis import LayerBasis, cached_layer_basis, clipped_rank, weight_digest
from qrlora.method.tuner.config import QRLoraConfig, resolve_columns

BasisKey = tuple[int, str, int]  # rank, algorithm, seed
MERGED_AT_ONCE = 2**19  # numbers of a base weight
MOST_TURNS = 16
"""A batch has one row for a picture, or two or three where guidance needs them. Far more are no rows but the tokens of
all pictures end to end (as Z-Image's embedders get them), in which compositions cannot be told apart."""


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
    """What stands in ``lora_B``: an adapter's columns of the shared Q, nothing to train and nothing to save."""

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
        """Left factor of ΔW: Q, whose counterpart is :meth:`DeltaR.down`."""
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
        """Left factor of ΔW: Q beside ΔQ."""
        return torch.cat([self.q.to(self.delta_q.dtype), self.delta_q], dim=1)


class DeltaR(nn.Module):
    """What stands in ``lora_A``: ``weight`` is ΔR, (rank, in) or (rank, in, *kernel); mixed into Linear and ConvNd.

    The triangle is applied where ΔR is used. So gradients outside it are exactly zero, entries that start at zero stay
    there under any elementwise optimiser, and stray values in a file have no effect.

    After :meth:`hold` it is ``several`` ΔR, one above the other in ``weight``: row i of a batch uses the one numbered
    i modulo ``several``.
    """

    several = 1
    weight: Tensor
    outside: Tensor | None  # (rank, last basis column + 1) bool: entries that must be zero; None for a dense ΔR
    r: Tensor | None  # (freed, in): first rows of R, of as many columns as train too; None if no column does

    def prepare(self, columns: tuple[int, ...], triangular: bool) -> None:
        """Say which basis columns the rows belong to; :meth:`fill` follows once the basis is known."""
        self.columns, self.triangular = columns, triangular
        self.register_buffer("outside", None, persistent=False)
        self.register_buffer("r", None, persistent=False)

    @torch.no_grad()
    def fill(self, device: torch.device, r: Float[Tensor, "rank in"] | None) -> None:
        """Set what waits for the base weight. Row k, of basis column c, is zero in entries j < c."""
        self.r = r
        if self.triangular:
            first = torch.tensor(self.columns, device=device).unsqueeze(1)
            self.outside = torch.arange(self.columns[-1] + 1, device=device) < first
            if not self.weight.is_meta:
                self.weight.copy_(self.delta_r().reshape(self.weight.shape))

    @torch.no_grad()
    def hold(self, deltas: Float[Tensor, "several rank in"]) -> None:
        """Use these ΔR from now on, frozen and as they are; as long as their number stays, so do address and shape."""
        shape = (deltas.shape[0] * deltas.shape[1], *self.weight.shape[1:])
        if self.weight.shape != shape:
            self.weight = nn.Parameter(self.weight.new_empty(shape), requires_grad=False)
        self.weight.copy_(deltas.reshape(shape))
        self.triangular, self.outside, self.several = False, None, len(deltas)

    def _turns(self, x: Tensor) -> int:
        """How often a batch goes through the ΔR. TunerError if it cannot be told which of its rows use which."""
        turns, left = divmod(len(x), self.several)
        if left or (x.ndim == 2 and turns > MOST_TURNS):
            raise TunerError(
                f"{self.several} compositions in one batch do not fit what a layer is given",
                expected=f"one row for each composition, at most {MOST_TURNS} times over",
                got=f"input of shape {tuple(x.shape)}",
                remedy="give as many compositions as the batch has pictures, or one for all; a layer that is given "
                "the tokens of all pictures in one row needs a batch for each composition",
            )
        return turns

    def delta_r(self) -> Float[Tensor, "rank in"]:
        """ΔR as a matrix, zero outside the triangle; differentiable."""
        matrix = self.weight.flatten(1)
        if self.outside is None:
            return matrix
        # One copy here and one in the backward pass, which are all that the triangle costs; cutting the matrix in two
        # and joining it again would be eight.
        matrix = matrix.clone()
        matrix[:, : self.outside.shape[1]].masked_fill_(self.outside, 0)
        return matrix

    def down(self) -> Float[Tensor, "inner in"]:
        """Right factor of ΔW: ΔR, followed by R + ΔR of the columns that train too."""
        delta = self.delta_r()
        return delta if self.r is None else torch.cat([delta, self.r.to(delta.dtype) + delta[: len(self.r)]])

    def _down_weight(self) -> Tensor:
        return self.down().reshape(-1, *self.weight.shape[1:])


class DeltaRLinear(DeltaR, nn.Linear):
    """ΔR of a Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        down = self._down_weight()
        if self.several == 1:
            return F.linear(x, down)
        each = down.view(self.several, -1, x.shape[-1]).mT
        turns = x.reshape(self._turns(x), self.several, -1, x.shape[-1])
        return torch.cat([torch.bmm(rows, each) for rows in turns]).view(*x.shape[:-1], each.shape[-1])


class _DeltaRConv(DeltaR):
    groups: int

    def forward(self, x: Tensor) -> Tensor:
        if self.several == 1:
            return self._conv_forward(x, self._down_weight(), None)  # type: ignore[operator]
        # The rows of one turn become channels, so that every group of channels meets its own ΔR.
        turns = x.reshape(self._turns(x), -1, *x.shape[2:])
        inner = self._conv_forward(turns, self._down_weight(), None)  # type: ignore[operator]
        return inner.reshape(len(x), -1, *inner.shape[2:])

    def hold(self, deltas: Float[Tensor, "several rank in"]) -> None:
        super().hold(deltas)
        self.groups = len(deltas)


class DeltaRConv1d(_DeltaRConv, nn.Conv1d):
    """ΔR of a 1-d convolution."""


class DeltaRConv2d(_DeltaRConv, nn.Conv2d):
    """ΔR of a 2-d convolution."""


class DeltaRConv3d(_DeltaRConv, nn.Conv3d):
    """ΔR of a 3-d convolution."""


class QRLoraLayer(LoraLayer):
    """Behaviour common to all adapter layers; mixed in before the PEFT LoRA layer of the same kind.

    A stock :class:`peft.LoraConfig` may be added to the same layer: it then gets PEFT's own LoRA, side by side.
    """

    _base_copy: Tensor | None = None  # the base weight while adapters are merged into it: unmerge is bit for bit
    _unfilled = False  # some adapter waits for a base weight that was on the meta device

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: QRLoraConfig, **kwargs: Any) -> None:
        nn.Module.__init__(self)  # type: ignore[arg-type]
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.fan_in_fan_out = isinstance(self.get_base_layer(), Conv1D)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter to this layer (PEFT calls this once per adapter)."""
        if not isinstance(config, QRLoraConfig):
            return super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        columns = columns_held(self.get_base_layer(), config, r)
        # r stays what was asked for, also where the layer holds fewer columns: PEFT divides alpha by it.
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.use_rslora[adapter_name], self.use_dora[adapter_name] = config.use_rslora, False
        self.lora_bias[adapter_name] = False
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self.lora_A[adapter_name] = self._new_delta_r(columns, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)  # before Q is there: Q stays float32 for now
        if self._delta(adapter_name).weight.element_size() == 1:
            self.lora_A[adapter_name].float()  # 8-bit floats can store a base weight; nothing can be computed in them
        basis = self._shared_basis(config.basis_key, kwargs.get("target_name", ""))
        self.lora_B[adapter_name] = self._new_columns(basis, columns, adapter_name, config)
        self._unfilled = True
        self.fill_basis()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        return None

    def fill_basis(self) -> None:
        """Compute what adapters still lack, unless the base weight itself has no values yet.

        Raises:
            BasisError, TunerError: the base weight has no such basis, or cannot be read.
        """
        weight = self._base_weight()
        if weight.is_meta:
            return
        for name, columns in self._own_adapters().items():
            delta = self._delta(name)
            needs_r = isinstance(columns, TrainedColumns) and delta.r is None
            if columns.basis.q is None or needs_r:
                basis = columns.basis.fill(weight)
                delta.fill(weight.device, basis.r[list(columns.columns)] if needs_r else None)
            elif delta.triangular and delta.outside is None:
                delta.fill(weight.device, None)
        self._unfilled = False

    def reserve_basis(self) -> None:
        """Where the base weight is on the meta device, give Q and its kin their sizes there, to count memory by.

        Q has the dtype of the base weight, which is also what ΔR has when it is put on and Q is settled for good.
        """
        weight = self._base_weight()
        for name, columns in self._own_adapters().items():
            rank, delta = clipped_rank(weight.shape, columns.basis.key[0]), self._delta(name)
            columns.basis.q = weight.new_empty(weight.shape[0], rank)
            trained = isinstance(columns, TrainedColumns)
            r = weight.new_empty(len(columns.columns), weight[0].numel(), dtype=torch.float32) if trained else None
            delta.fill(weight.device, r)
        self._unfilled = False  # so that the forward pass is the one that training takes

    def settle_dtype(self) -> None:
        """Keep Q in the widest dtype of the ΔR that use it: float32 ΔR on a bfloat16 model get a float32 Q."""
        wanted: dict[SharedBasis, torch.dtype] = {}
        for name, columns in self._own_adapters().items():
            dtype = self._delta(name).weight.dtype
            wanted[columns.basis] = torch.promote_types(wanted.get(columns.basis, dtype), dtype)
        for basis, dtype in wanted.items():
            if basis.q is None or basis.q.dtype == dtype:
                continue
            if torch.promote_types(basis.q.dtype, dtype) == dtype:
                basis.fill(self._base_weight())  # Q was narrower: its lost digits come from the weight, not a cast
            basis.q = basis.q.to(dtype)

    def delta_r(self, adapter_name: str) -> Float[Tensor, "rank in"]:
        """ΔR of an adapter as a matrix, convolutions flattened, zero outside the triangle; without the scaling."""
        return self._delta(adapter_name).delta_r()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW of an adapter, scaling included, in the shape of the base weight and the dtype of ΔR."""
        if adapter not in self._own_adapters():
            return super().get_delta_weight(adapter)  # type: ignore[misc]
        return self._delta_weight(adapter).to(self._delta(adapter).weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._unfilled:
            self.fill_basis()
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write ΔW of adapters into the base weight, summed in float32 from a copy that :meth:`unmerge` restores.

        Args:
            safe_merge: of no effect here: a sum with NaN or Inf is never left in the weight.
            adapter_names: the active adapters unless given.

        Raises:
            TunerError: a quantised base, a stock LoRA variant without a plain ΔW, or values that are not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not names:
            return
        self.check_mergeable(names)
        weight: Any = self.get_base_layer().weight
        original: Tensor = weight.detach().clone() if self._base_copy is None else self._base_copy
        both = [*self.merged_adapters, *names]
        if not self._write_sum(original, both):
            self._write_sum(original, self.merged_adapters)
            raise TunerError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken",
                expected="finite values",
                got="NaN or Inf",
                remedy="train it again with a lower learning rate, or leave it out",
            )
        self._base_copy = original
        self.merged_adapters.extend(names)

    def _write_sum(self, original: Tensor, names: list[str]) -> bool:
        """Make the base weight what `_sums` gives; False as soon as that is not finite."""
        weight: Any = self.get_base_layer().weight
        target = weight.data.T if self.fan_in_fan_out else weight.data
        for rows, block in self._sums(original, names):
            if not all(math.isfinite(value) for value in target[rows].copy_(block).float().aminmax()):
                return False
        return True

    def _sums(self, original: Tensor, names: list[str]) -> Iterator[tuple[slice, Tensor]]:
        """The base weight plus ΔW of adapters, some rows (out, in, *kernel) at a time, in at least float32.

        So much at a time as the processor's cache holds: a sum of the whole would go through memory once for each term.
        """
        base = original.T if self.fan_in_fan_out else original
        used: list[Any] = [self.lora_A[name].weight.dtype for name in names]
        dtype = functools.reduce(torch.promote_types, [original.dtype, *used], torch.float32)
        own = self._own_adapters()
        products = [
            (own[name].up().to(dtype), self._delta(name).down().to(dtype) * self.scaling[name])
            for name in names
            if name in own
        ]
        others = [self._delta_weight(name) for name in names if name not in own]
        step = max(1, MERGED_AT_ONCE // base[0].numel())
        for start in range(0, len(base), step):
            rows = slice(start, start + step)
            block = base[rows].to(dtype, copy=True, memory_format=torch.contiguous_format)
            for up, down in products:
                block.view(len(block), -1).addmm_(up[rows], down)
            for delta in others:
                block += (delta.T if self.fan_in_fan_out else delta)[rows]
            yield rows, block

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back, bit for bit."""
        if self._base_copy is None:
            return
        weight: Any = self.get_base_layer().weight
        weight.data.copy_(self._base_copy)
        self._base_copy = None
        self.merged_adapters.clear()

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raise TunerError where merging would not give what the unmerged layer computes."""
        if is_quantised(self.get_base_layer()):
            raise TunerError(
                f"merging into a quantised {type(self.get_base_layer()).__name__}",
                expected="a base weight in a plain floating-point dtype",
                got=_describe_weight(self.get_base_layer()),
                remedy="keep the adapter unmerged, or merge into the unquantised model and quantise that",
            )
        several = [name for name in adapter_names if getattr(self.lora_A[name], "several", 1) > 1]
        if several:
            raise TunerError(
                "one weight cannot hold several compositions",
                expected="one composition for the whole batch",
                got=f"{self._delta(several[0]).several} in {several[0]}",
                remedy="compose one before merging",
            )
        others = [name for name in adapter_names if name in self.lora_variant or self.lora_bias.get(name)]
        if others:
            raise TunerError(
                "merging a stock LoRA variant on a QR-LoRA layer",
                expected="adapters that are QRLoraConfig or plain LoraConfig",
                got=", ".join(others),
                remedy="keep these unmerged, or merge them before attaching QR-LoRA",
            )

    def _own_adapters(self) -> dict[str, BasisColumns]:
        return {name: columns for name, columns in self.lora_B.items() if isinstance(columns, BasisColumns)}

    def _delta(self, adapter_name: str) -> DeltaR:
        return self.lora_A[adapter_name]  # type: ignore[return-value]

    def _delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in float32 (float64 for a float64 adapter), in the shape of the base weight."""
        columns = self._own_adapters().get(adapter_name)
        if columns is None:
            return super().get_delta_weight(adapter_name).float()  # type: ignore[misc]
        self.fill_basis()
        factor = self._delta(adapter_name)
        dtype = torch.promote_types(factor.weight.dtype, torch.float32)
        delta = columns.up().to(dtype) @ factor.down().to(dtype) * self.scaling[adapter_name]
        return delta.T if self.fan_in_fan_out else delta.reshape(self.get_base_layer().weight.shape)

    def _base_weight(self) -> Tensor:
        """The base weight (out, in, *kernel) as it was before merging, dequantised where it is quantised."""
        base = self.get_base_layer()
        weight = readable_weight(base) if self._base_copy is None else self._base_copy
        return weight.detach().T if self.fan_in_fan_out else weight.detach()

    def _shared_basis(self, key: BasisKey, name: str) -> SharedBasis:
        existing = (columns.basis for columns in self._own_adapters().values())
        return next((basis for basis in existing if basis.key == key), None) or SharedBasis(key, name)

    def _new_delta_r(self, columns: tuple[int, ...], config: QRLoraConfig) -> DeltaR:
        base: Any = self.get_base_layer()
        delta: Any  # a DeltaR that is also a Linear or a convolution
        if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            kind: Any = (DeltaRConv1d, DeltaRConv2d, DeltaRConv3d)[base.weight.ndim - 3]
            geometry = (base.kernel_size, base.stride, base.padding, base.dilation)
            delta = kind(base.in_channels, len(columns), *geometry, bias=False, padding_mode=base.padding_mode)
        else:
            delta = DeltaRLinear(self.in_features, len(columns), bias=False)  # type: ignore[arg-type]
        if config.init_lora_weights:
            nn.init.zeros_(delta.weight)
        delta.prepare(columns, config.triangular)
        return delta

    def _new_columns(
        self, basis: SharedBasis, columns: tuple[int, ...], adapter_name: str, config: QRLoraConfig
    ) -> BasisColumns:
        delta_r = self._delta(adapter_name).weight
        kernel_dims = delta_r.ndim - 2
        if not config.train_basis:
            return BasisColumns(basis, columns, kernel_dims)
        return TrainedColumns(basis, columns, kernel_dims, delta_r.new_zeros(int(self.out_features or 0), len(columns)))


class QRLoraLinear(QRLoraLayer, lora.Linear):
    """Adapter layer of a Linear, a transformers Conv1D, or a quantised Linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT, with its three passes over the whole output (up, times s, added) made one product.

        What is not the usual case (mixed batches, merged or disabled adapters, a stock LoRA beside) is left to PEFT.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        ours = all(isinstance(self.lora_B[name], BasisColumns) for name in names)
        if args or kwargs or self.merged or self.disable_adapters or self._unfilled or not ours:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        dtype = result.dtype
        for name in names:
            x = self._cast_input_dtype(x, self._delta(name).weight.dtype)
            inner = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
            result = self._add_up(result, inner, self._own_adapters()[name].up())
        return result.to(dtype)

    @staticmethod
    def _add_up(
        result: Float[Tensor, "*batch out"], inner: Float[Tensor, "*batch inner"], up: Float[Tensor, "out inner"]
    ) -> Float[Tensor, "*batch out"]:
        if result.dtype != inner.dtype:  # a base in half precision, or autocast: the sum is in the wider one
            return result + F.linear(inner, up.to(inner.dtype))
        rows, factors = result.reshape(-1, len(up)), (inner.reshape(-1, up.shape[1]), up.to(inner.dtype).T)
        # Where nothing is to be differentiated, the base's output is not copied to be added to.
        rows = rows.addmm(*factors) if torch.is_grad_enabled() else rows.addmm_(*factors)
        return rows.view(result.shape)


class _QRLoraConv(QRLoraLayer):
    def __init__(self, base_layer: nn.Module, adapter_name: str, config: QRLoraConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config, **kwargs)
        # What PEFT's convolution layers keep, for stock LoRA beside ours.
        self._kernel_dim = readable_weight(self.get_base_layer()).ndim
        self.conv_fn = (F.conv1d, F.conv2d, F.conv3d)[self._kernel_dim - 3]


class QRLoraConv1d(_QRLoraConv, lora.layer.Conv1d):
    """Adapter layer of a 1-d convolution; the weight is flattened to (out, in * kernel)."""


class QRLoraConv2d(_QRLoraConv, lora.layer.Conv2d):
    """Adapter layer of a 2-d convolution; the weight is flattened to (out, in * kernel)."""


class QRLoraConv3d(_QRLoraConv, lora.layer.Conv3d):
    """Adapter layer of a 3-d convolution; the weight is flattened to (out, in * kernel)."""


def columns_held(layer: nn.Module, config: QRLoraConfig, r: int) -> tuple[int, ...]:
    """The adapter's columns that a base layer has; its sides tell, which its weight may be packed too tightly to do."""
    base: Any = layer
    linear = hasattr(base, "in_features") and hasattr(base, "out_features")
    shape = (base.out_features, base.in_features) if linear else tuple(base.weight.shape)
    held = clipped_rank(shape, config.rank_of_basis)
    return tuple(column for column in resolve_columns(config.columns, r, config.rank_of_basis) if column < held)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer's weight is stored other than as plain floating-point numbers of 16 bits or more."""
    weight = getattr(layer, "weight", None)
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return True
    return not weight.is_floating_point() or weight.element_size() == 1


def readable_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as floating-point values, dequantised by its own backend where need be.

    Raises:
        TunerError: the backend cannot give the weight back, so there is nothing to take a basis from.
    """
    known = type(getattr(layer, "weight", None))
    if hasattr(layer, "W_q") or known.__name__ in ("Params4bit", "Int8Params") or "torchao." in known.__module__:
        return dequantize_module_weight(layer)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TunerError(
            f"a {type(layer).__name__} whose weight cannot be read",
            expected="a floating-point weight, or one quantised by bitsandbytes, HQQ or torchao",
            got=_describe_weight(layer),
            remedy="attach QR-LoRA to the unquantised model, or do not target this layer",
        )
    return weight


def _describe_weight(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    return f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else "no weight attribute"
