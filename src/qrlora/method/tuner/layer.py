"""The adapter layer: a frozen base layer, a Q that all its adapters share, and one trained ΔR per adapter.

It is a PEFT LoRA layer in which ``lora_A`` is ΔR and ``lora_B`` looks up columns of Q (see `factors`), so switching,
scaling, mixed batches and saving are PEFT's own.
"""

from __future__ import annotations

import functools
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
from qrlora.method.basis import clipped_rank
from qrlora.method.tuner.config import QRLoraConfig, resolve_columns
from qrlora.method.tuner.factors import (
    BasisColumns,
    BasisKey,
    DeltaR,
    DeltaRConv1d,
    DeltaRConv2d,
    DeltaRConv3d,
    DeltaRLinear,
    SharedBasis,
    TrainedColumns,
)

MERGED_AT_ONCE = 2**19  # numbers of a base weight


class QRLoraLayer(LoraLayer):
    """Behaviour common to all adapter layers; mixed in before the PEFT LoRA layer of the same kind.

    A stock :class:`peft.LoraConfig` may be added to the same layer: it then gets PEFT's own LoRA, side by side.
    """

    # PEFT trains, switches and deletes the modules named here. lora_A holds ΔR of each adapter: all that trains. lora_B
    # holds its columns of Q, which have no parameters (with train_basis they have ΔQ, which trains too). The embedding
    # pair stays empty: stock LoRA beside ours has it.
    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")

    _base_copy: Tensor | None = None  # the base weight while adapters are merged into it: unmerge is bit for bit
    basis_pending = False  # of some adapter, because the base weight was on the meta device

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
        if self.delta(adapter_name).weight.element_size() == 1:
            self.lora_A[adapter_name].float()  # 8-bit floats can store a base weight; nothing can be computed in them
        basis = self._shared_basis(config.basis_key, kwargs.get("target_name", ""))
        self.lora_B[adapter_name] = self._new_columns(basis, columns, adapter_name, config)
        self.basis_pending = True
        self.fill_basis()
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        return None

    def fill_basis(self) -> None:
        """Compute the Q of adapters that have none yet; do nothing while the base weight is on the meta device.

        Raises:
            BasisError, TunerError: the base weight has no such basis, or cannot be read.
        """
        weight = self.base_weight()
        if weight.is_meta:
            return
        for name, columns in self.own_adapters().items():
            delta = self.delta(name)
            needs_r = isinstance(columns, TrainedColumns) and delta.r is None
            if columns.basis.q is None or needs_r:
                basis = columns.basis.fill(weight)
                delta.fill(weight.device, basis.r[list(columns.columns)] if needs_r else None)
            elif delta.triangular and delta.outside is None:
                delta.fill(weight.device, None)
        self.basis_pending = False

    def settle_dtype(self) -> None:
        """Keep Q in the widest dtype of the ΔR that use it: float32 ΔR on a bfloat16 model get a float32 Q."""
        wanted: dict[SharedBasis, torch.dtype] = {}
        for name, columns in self.own_adapters().items():
            dtype = self.delta(name).weight.dtype
            wanted[columns.basis] = torch.promote_types(wanted.get(columns.basis, dtype), dtype)
        for basis, dtype in wanted.items():
            if basis.q is None or basis.q.dtype == dtype:
                continue
            if torch.promote_types(basis.q.dtype, dtype) == dtype:
                basis.fill(self.base_weight())  # Q was narrower: its lost digits come from the weight, not a cast
            basis.q = basis.q.to(dtype)

    def delta_r(self, adapter_name: str) -> Float[Tensor, "rank in"]:
        """Return ΔR of an adapter as a matrix, convolutions flattened, 0 outside the triangle, without the scaling."""
        return self.delta(adapter_name).delta_r()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return ΔW of an adapter, scaling included, in the shape of the base weight and the dtype of ΔR."""
        if adapter not in self.own_adapters():
            return self._stock_delta_weight(adapter)
        return self._delta_weight(adapter).to(self.delta(adapter).weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.basis_pending:
            self.fill_basis()
        result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return result

    def _stock_delta_weight(self, adapter: str) -> Tensor:
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        return delta

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
        own = self.own_adapters()
        products = [
            (own[name].up().to(dtype), self.delta(name).down().to(dtype) * self.scaling[name])
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
        others = [name for name in adapter_names if name in self.lora_variant or self.lora_bias.get(name)]
        if others:
            raise TunerError(
                "merging a stock LoRA variant on a QR-LoRA layer",
                expected="adapters that are QRLoraConfig or plain LoraConfig",
                got=", ".join(others),
                remedy="keep these unmerged, or merge them before attaching QR-LoRA",
            )

    def own_adapters(self) -> dict[str, BasisColumns]:
        """Return the QR-LoRA adapters of this layer, which may carry stock LoRA beside them."""
        return {name: columns for name, columns in self.lora_B.items() if isinstance(columns, BasisColumns)}

    def delta(self, adapter_name: str) -> DeltaR:
        """Return the module of an adapter's ΔR."""
        return self.lora_A[adapter_name]  # type: ignore[return-value]

    def _delta_weight(self, adapter_name: str) -> Tensor:
        """ΔW in float32 (float64 for a float64 adapter), in the shape of the base weight."""
        columns = self.own_adapters().get(adapter_name)
        if columns is None:
            return self._stock_delta_weight(adapter_name).float()
        self.fill_basis()
        factor = self.delta(adapter_name)
        dtype = torch.promote_types(factor.weight.dtype, torch.float32)
        delta: Tensor = columns.up().to(dtype) @ factor.down().to(dtype) * self.scaling[adapter_name]
        weight: Any = self.get_base_layer().weight
        return delta.T if self.fan_in_fan_out else delta.reshape(weight.shape)

    def base_weight(self) -> Tensor:
        """Return the base weight (out, in, *kernel) as it was before merging, dequantised where it is quantised."""
        base = self.get_base_layer()
        weight = readable_weight(base) if self._base_copy is None else self._base_copy
        return weight.detach().T if self.fan_in_fan_out else weight.detach()

    def _shared_basis(self, key: BasisKey, name: str) -> SharedBasis:
        existing = (columns.basis for columns in self.own_adapters().values())
        return next((basis for basis in existing if basis.key == key), None) or SharedBasis(key, name)

    def _new_delta_r(self, columns: tuple[int, ...], config: QRLoraConfig) -> DeltaR:
        base: Any = self.get_base_layer()
        delta: DeltaR
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
        delta_r = self.delta(adapter_name).weight
        kernel_dims = delta_r.ndim - 2
        if not config.train_basis:
            return BasisColumns(basis, columns, kernel_dims)
        return TrainedColumns(basis, columns, kernel_dims, delta_r.new_zeros(int(self.out_features or 0), len(columns)))


class QRLoraLinear(QRLoraLayer, lora.Linear):
    """Adapter layer of a Linear, a transformers Conv1D, or a quantised Linear."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute PEFT's forward pass in one product, where PEFT passes over the output three times (up, times s, add).

        Mixed batches, merged or disabled adapters, and layers with a stock LoRA beside are left to PEFT.
        """
        names = [name for name in self.active_adapters if name in self.lora_A]
        ours = all(isinstance(self.lora_B[name], BasisColumns) for name in names)
        if args or kwargs or self.merged or self.disable_adapters or self.basis_pending or not ours:
            return super().forward(x, *args, **kwargs)
        result: Tensor = self.base_layer(x)
        dtype = result.dtype
        for name in names:
            x = self._cast_input_dtype(x, self.delta(name).weight.dtype)
            inner = self.lora_A[name](self.lora_dropout[name](x)) * self.scaling[name]
            result = self._add_up(result, inner, self.own_adapters()[name].up())
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
        # Attributes of PEFT's convolution layers, for stock LoRA beside ours.
        self._kernel_dim = readable_weight(self.get_base_layer()).ndim
        self.conv_fn = (F.conv1d, F.conv2d, F.conv3d)[self._kernel_dim - 3]


class QRLoraConv1d(_QRLoraConv, lora.layer.Conv1d):
    """Adapter layer of a 1-d convolution; the weight is flattened to (out, in * kernel)."""


class QRLoraConv2d(_QRLoraConv, lora.layer.Conv2d):
    """Adapter layer of a 2-d convolution; the weight is flattened to (out, in * kernel)."""


class QRLoraConv3d(_QRLoraConv, lora.layer.Conv3d):
    """Adapter layer of a 3-d convolution; the weight is flattened to (out, in * kernel)."""


def columns_held(layer: nn.Module, config: QRLoraConfig, r: int) -> tuple[int, ...]:
    """Return the adapter's columns that exist in a base layer, by its in and out sizes: packed weights show none."""
    base: Any = layer
    linear = hasattr(base, "in_features") and hasattr(base, "out_features")
    shape = (base.out_features, base.in_features) if linear else tuple(base.weight.shape)
    held = clipped_rank(shape, config.rank_of_basis)
    return tuple(column for column in resolve_columns(config.columns, r, config.rank_of_basis) if column < held)


def is_quantised(layer: nn.Module) -> bool:
    """Return True if a layer's weight is not stored as plain floating-point numbers of 16 bits or more."""
    weight = getattr(layer, "weight", None)
    if type(weight) is not nn.Parameter and type(weight) is not Tensor:
        return True
    return not weight.is_floating_point() or weight.element_size() == 1


def readable_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a layer as floating-point values, dequantised by its own backend where need be.

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
