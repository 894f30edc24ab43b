"""Define the PEFT tuner: which layers get adapter layers, and which adapters may be combined."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from qrlora.errors import TunerError
from qrlora.method.basis import clipping, fingerprint, sketch
from qrlora.method.tuner.config import QRLoraConfig, resolve_columns
from qrlora.method.tuner.factors import BasisColumns
from qrlora.method.tuner.layer import (
    QRLoraConv1d,
    QRLoraConv2d,
    QRLoraConv3d,
    QRLoraLayer,
    QRLoraLinear,
    columns_held,
)

log = logging.getLogger(__name__)

_CONVOLUTIONS: dict[type[Any], type[Any]] = {nn.Conv1d: QRLoraConv1d, nn.Conv2d: QRLoraConv2d, nn.Conv3d: QRLoraConv3d}


class QRLoraModel(LoraModel):
    """Puts :class:`QRLoraLayer` into a model; made by ``get_peft_model`` or diffusers' ``add_adapter``."""

    tuner_layer_cls = QRLoraLayer  # type: ignore[assignment]

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str
    ) -> None:
        if isinstance(target, LoraLayer) and not isinstance(target, QRLoraLayer):
            raise TunerError(
                f"layer {current_key!r} already carries a stock LoRA adapter",
                expected="a base layer, or a layer with QR-LoRA adapters",
                got=type(target).__name__,
                remedy="attach QR-LoRA first and the stock LoRA after it",
            )
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(lora_config, QRLoraConfig) and _layer_for(base):
            pattern: dict[str, int] = lora_config.rank_pattern or {}
            rank = pattern.get(get_pattern_key(list(pattern), current_key), lora_config.r)
            held = columns_held(base, lora_config, rank)
            self._columns[current_key] = (len(held), rank)
            if not held:
                return
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key)

    @staticmethod
    def _create_new_module(lora_config: QRLoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        layer = _layer_for(base)
        if layer is not None:
            made: nn.Module = layer(target, adapter_name, lora_config, **kwargs)
            return made
        raise TunerError(
            f"layer {kwargs.get('target_name')!r} cannot carry a QR-LoRA adapter",
            expected="a Linear layer or a convolution without groups",
            got=f"{type(base).__name__}, groups={getattr(base, 'groups', None)}",
            remedy="remove it from target_modules",
        )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter layers of ``peft_config[adapter_name]`` (PEFT and diffusers call this).

        A log message names the layers that have fewer columns than the adapter, unless the same one was logged before.

        Raises:
            BasisError, TunerError: a layer that cannot carry the adapter, or ``target_modules`` that match none, or
                none that has a column of the adapter's.
        """
        config: Any = self.peft_config[adapter_name]
        self._columns: dict[str, tuple[int, int]] = {}  # of each target: columns held, columns asked for
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except (NoMatchingPeftModuleError, re.error) as error:
            raise TunerError(
                "target_modules match no layer of the model",
                expected="a list of module names such as to_q, or one regular expression for whole names",
                got=f"{config.target_modules!r} ({error})",
                remedy="see the model's named_modules() for the names it has",
            ) from error
        if self._columns and not any(held for held, _ in self._columns.values()):
            raise TunerError(
                "no target has a column that the adapter owns",
                expected=f"columns {config.columns!r} below the smaller side of a target",
                got=clipping(self._columns),
                remedy="lower the rank, or target larger layers",
            )
        if not config.inference_mode and (clipped := clipping(self._columns)):
            log.warning(clipped)
        for layer in _layers(model).values():
            layer.settle_dtype()

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in _layers(self.model).values():
            layer.settle_dtype()

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        # Before the first layer is written, so that a refusal leaves no half-merged model.
        for layer in _layers(self.model).values():
            layer.check_mergeable([name for name in layer.active_adapters if name in layer.lora_A])

    def add_weighted_adapter(  # type: ignore[override]
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear", **_: Any
    ) -> None:
        """Add the adapter ``Σ weightᵢ scalingᵢ ΔRᵢ``: exact, of rank r, on the union of the parts' columns.

        PEFT's other ways to combine LoRA files act on both factors and are wrong for a shared Q.

        Args:
            adapters: names of attached adapters on one basis.
            weights: one factor each, of any sign.
            adapter_name: name of the sum.
            combination_type: ``linear``.

        Raises:
            TunerError: parts of different bases, parts that train their basis, another combination type, a name in use.
        """
        if combination_type != "linear":
            raise TunerError(
                "adapters on a shared basis are summed in ΔR",
                expected="combination_type='linear', which is exact",
                got=combination_type,
                remedy="leave combination_type out",
            )
        if adapter_name in self.peft_config:
            raise TunerError(
                "adapter name in use",
                expected=f"none of {sorted(self.peft_config)}",
                got=adapter_name,
                remedy="choose another name, or delete that adapter first",
            )
        # "cat" makes PEFT check names and targets without asking for equal ranks; the union of columns settles those.
        targets = self._check_add_weighted_adapter(adapters, "cat", None)[2]
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        combined: Any = replace(_union_config(adapters, configs), target_modules=targets)
        self.peft_config[adapter_name] = combined
        self.inject_adapter(self.model, adapter_name)
        for layer in _layers(self.model).values():
            if adapter_name in layer.lora_A:
                _write_sum(layer, dict(zip(adapters, weights, strict=True)), adapter_name)


def basis_digests(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Digest of the base weight of every layer an adapter sits on, by layer name in the bare model.

    Raises:
        TunerError: no such QR-LoRA adapter, or a base without values.
    """
    digests = {}
    for name, columns in _columns_of(model, adapter_name):
        if columns.basis.digest is None:
            columns.q  # noqa: B018  raises the error that says the base has no values
        digests[name] = str(columns.basis.digest)
    return digests


def basis_sketches(model: nn.Module, adapter_name: str) -> dict[str, tuple[float, ...]]:
    """Return the :func:`qrlora.method.basis.sketch` of every adapted layer's Q. Errors: as `basis_digests`."""
    found: dict[str, tuple[float, ...]] = {}
    for name, columns in _columns_of(model, adapter_name):
        columns.q  # noqa: B018  raises the error that says the base has no values
        found[name] = sketch(columns.basis.q)  # type: ignore[arg-type]
    return found


def adapter_fingerprint(model: nn.Module, adapter_name: str) -> str:
    """Return the fingerprint of the basis of an attached adapter, see :func:`qrlora.method.basis.fingerprint`."""
    digests = basis_digests(model, adapter_name)
    rank, algorithm, seed = next(columns for _, columns in _columns_of(model, adapter_name)).basis.key
    return fingerprint(digests, rank, algorithm, seed)


def _layer_for(base: nn.Module) -> type[Any] | None:
    """The kind of adapter layer that goes around a base layer; None if none does."""
    for kind, layer in _CONVOLUTIONS.items():
        if isinstance(base, kind) and base.groups == 1:
            return layer
    # Quantised layers of some backends are no nn.Linear, but have its two sizes.
    linear_like = hasattr(base, "in_features") and hasattr(base, "out_features")
    return QRLoraLinear if linear_like or isinstance(base, Conv1D) else None


def _layers(model: nn.Module) -> dict[str, QRLoraLayer]:
    """Adapter layers by their name in the bare model."""
    wrappers = ("base_model.model.", "_orig_mod.")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QRLoraLayer):
            for wrapper in wrappers:
                name = name.removeprefix(wrapper)
            found[name] = module
    return found


def _columns_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, BasisColumns]]:
    layers = _layers(model)
    found = [name for name, layer in layers.items() if adapter_name in layer.own_adapters()]
    if not found:
        names = sorted({name for layer in layers.values() for name in layer.own_adapters()})
        raise TunerError(
            f"no QR-LoRA adapter {adapter_name!r} on this model",
            expected=f"one of {names}",
            got=adapter_name,
            remedy="attach it first",
        )
    for name in found:
        yield name, layers[name].own_adapters()[adapter_name]


def _union_config(adapters: list[str], configs: list[QRLoraConfig]) -> QRLoraConfig:
    """Configuration of a sum: the union of the parts' columns on their common basis, scaling folded into ΔR."""
    keys = {name: config.basis_key for name, config in zip(adapters, configs, strict=True)}
    trained = [name for name, config in zip(adapters, configs, strict=True) if config.train_basis]
    if len(set(keys.values())) > 1 or trained:
        raise TunerError(
            "adapters that do not share one basis cannot be summed in ΔR",
            expected="equal (basis_rank, algorithm, basis_seed), and train_basis=False",
            got=", ".join(f"{name}: {key}{' trained' if name in trained else ''}" for name, key in keys.items()),
            remedy="train them on one basis, or activate them side by side with set_adapter",
        )
    first = configs[0]
    columns, rank = first.columns, first.r
    if any((c.columns, c.r, c.rank_pattern) != (first.columns, first.r, first.rank_pattern) for c in configs):
        if any(config.rank_pattern for config in configs):
            raise TunerError(
                "adapters with rank_pattern and different columns",
                expected="one set of columns per adapter",
                got={name: config.rank_pattern for name, config in zip(adapters, configs, strict=True)},
                remedy="train them without rank_pattern",
            )
        owned = [resolve_columns(config.columns, config.r, config.rank_of_basis) for config in configs]
        columns = sorted(set().union(*owned))
        rank = len(columns)
    return replace(
        first,
        columns=columns,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        alpha_pattern=dict(first.rank_pattern or {}),
        basis_rank=first.rank_of_basis,
        triangular=all(config.triangular for config in configs),
    )


@torch.no_grad()
def _write_sum(layer: QRLoraLayer, weights: dict[str, float], adapter_name: str) -> None:
    """ΔR of the sum, whose own scaling is 1: each part's rows, times weight and scaling, in the rows of its columns."""
    target = layer.delta(adapter_name)
    row_of = {column: row for row, column in enumerate(target.columns)}
    total = torch.zeros_like(target.delta_r())
    for name, weight in weights.items():
        if name in layer.lora_A:
            rows = [row_of[column] for column in layer.delta(name).columns]
            total[rows] += (weight * layer.scaling[name]) * layer.delta_r(name).to(total)
    target.weight.copy_(total.reshape(target.weight.shape))
