"""Attach an Adapter to the PEFT layers of a denoiser, and read one from them.

Works on bare diffusers denoisers (through their `add_adapter`), on `peft.PeftModel`, and on any other module.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig, PeftModel
from peft.functional import inject_adapter_in_model, set_adapter
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qrlora.errors import MismatchError, TunerError
from qrlora.method.adapter.record import Adapter, AdapterMetadata
from qrlora.method.basis import Basis, fingerprint, weight_digest
from qrlora.method.tuner import (
    QRLoraConfig,
    QRLoraLayer,
    adapter_fingerprint,
    basis_digests,
    basis_sketches,
    resolve_columns,
)
from qrlora.method.tuner.layer import readable_weight


def adapter_from_model(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    family: str = "",
    denoiser: str = "transformer",
    base_model: str = "",
    base_digest: str = "",
    role: str = "",
    trigger: str = "",
    licence: str = "",
    recipe: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Adapter:
    """Copy adapter `adapter_name` out of `model` (a denoiser or PeftModel), to the CPU, in the dtype it has there.

    Rank, alpha, columns and basis are read off the layers; the keywords are the other metadata. A train_basis
    adapter comes out as the LoRA it is equal to: up [Q, ΔQ], down [ΔR; R + ΔR], rank 2r.
    Raises TunerError if there is no such adapter, or its layers differ in rank or scaling, or its PEFT method is not a
    form of LoRA.
    """
    layers = adapted_layers(model, adapter_name)
    config = _config_of(model, adapter_name)
    deltas, ups, described = _tensors(model, layers, adapter_name, config)
    digests = basis_digests(model, adapter_name) if ups is None else {}
    sketches = basis_sketches(model, adapter_name) if ups is None else {}
    # What was asked for: a layer may hold fewer columns. The LoRA of a trained basis has twice as many.
    rank = next(iter(layers.values())).r[adapter_name] * (2 if described["method"] == "qrlora_train_basis" else 1)
    metadata = AdapterMetadata(
        rank=rank,
        alpha=rank * _one_scaling(layers, adapter_name, config),
        family=family,
        denoiser=denoiser,
        base_model=base_model,
        base_digest=base_digest,
        role=role,
        trigger=trigger,
        licence=licence,
        recipe=recipe or {},
        provenance=provenance or {},
        **described,
    )
    return Adapter(metadata, deltas, _base_shapes(layers, adapter_name), digests, ups, sketches=sketches)


def attach(model: nn.Module, adapter: Adapter, adapter_name: str = "default") -> None:
    """Put `adapter` on `model` (a denoiser or PeftModel) under a new name: active alone, at strength 1, frozen.

    An adapter on a basis gets QR-LoRA layers, whose Q comes from the cache or is computed; others get PEFT's own LoRA.
    A model that does not fit is left untouched.

    Raises:
        MismatchError: the model lacks a layer, a weight is not the one that the basis was made of, or the Q computed
            from it is not the one that ΔR was trained on; or the adapter is not finite in the model's dtype.
        TunerError: the name is taken, or a layer carries a stock LoRA already.
        BasisError: a weight has no basis.
    """
    taken = sorted(getattr(model, "peft_config", {}))
    if adapter_name in taken:
        remedy = "choose another name, or delete that adapter first"
        raise TunerError("adapter name in use", expected=f"none of {taken}", got=adapter_name, remedy=remedy)
    adapter.check_strength()
    check_fits(model, adapter)
    config = _config_for(adapter)
    _inject(model, config, adapter_name)
    try:
        if adapter.sketches:
            adapter.check_sketches(basis_sketches(model, adapter_name))
        for name, layer in adapted_layers(model, adapter_name).items():
            _write(layer.lora_A[adapter_name].weight, adapter.deltas[name], name)
            if adapter.ups is not None:
                _write(layer.lora_B[adapter_name].weight, adapter.ups[name], name)
    except MismatchError:
        _take_off(model, adapter_name)
        raise


def remove_adapters(denoiser: Any, names: Sequence[str]) -> None:
    """Remove these adapters from a diffusers denoiser, and PEFT's layers with the last one; absent names are ignored.

    Also cleans up after an `add_adapter` that failed half-way.
    """
    there = [name for name in names if name in getattr(denoiser, "peft_config", {})]
    if there:
        denoiser.delete_adapters(there)
    if not getattr(denoiser, "peft_config", None):
        denoiser.unload_lora()


def _take_off(model: Any, name: str) -> None:
    if isinstance(model, PeftModel):
        with warnings.catch_warnings():
            # PEFT warns that another adapter becomes the active one.
            warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
            model.delete_adapter(name)
    elif hasattr(model, "delete_adapters"):
        remove_adapters(model, [name])
    else:
        for layer in adapted_layers(model, name).values():
            layer.delete_adapter(name)
        model.peft_config.pop(name, None)


@torch.no_grad()
def _write(parameter: nn.Parameter, matrix: Tensor, layer: str) -> None:
    parameter.copy_(matrix.reshape(parameter.shape))
    if not bool(torch.isfinite(parameter).all()):
        raise MismatchError(
            f"{layer}: the adapter has numbers that this model's dtype does not hold",
            expected=f"up to {torch.finfo(parameter.dtype).max:.3g} in {parameter.dtype}",
            got=f"{float(matrix.abs().max()):.3g}",
            remedy="load the model in bfloat16 or float32",
        )
    parameter.requires_grad_(False)  # diffusers makes what it activates trainable


def _inject(model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
    with warnings.catch_warnings():
        # PEFT suspects a mistake in a second adapter on a bare model; here it is what was asked for.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config)
            model.set_adapter(adapter_name)
        elif hasattr(model, "add_adapter"):
            model.add_adapter(config, adapter_name)  # type: ignore[operator]
        else:
            inject_adapter_in_model(config, model, adapter_name)
            set_adapter(model, adapter_name)


def _root(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Return the LoraLayers by their name in the bare model; Any, because their parts are known at run time only."""
    modules = _root(model).named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A}


def _config_of(model: nn.Module, adapter_name: str) -> LoraConfig:
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, LoraConfig):
        raise TunerError(
            "no such LoRA or QR-LoRA adapter on this model",
            expected=f"one of {sorted(configs)}" if configs else "a model with adapters",
            got=f"{adapter_name} of type {config.peft_type}" if config else adapter_name,
            remedy="add_adapter first, or name one that is there",
        )
    odd = [name for name in ("use_dora", "lora_bias", "modules_to_save") if getattr(config, name)]
    if odd or config.bias != "none":
        raise TunerError(
            "an adapter with DoRA, biases or modules_to_save is not determined by its up and down matrices",
            expected="no DoRA, no biases, no modules_to_save",
            got=odd or f"bias={config.bias!r}",
            remedy="train without these options",
        )
    return config


def _one_scaling(layers: Mapping[str, Any], adapter_name: str, config: LoraConfig) -> float:
    """Return s as trained, not as scaled since: alpha / r, or alpha / sqrt(r) with rslora, equal in all layers."""
    found = {(layer.r[adapter_name], layer.lora_alpha[adapter_name]) for layer in layers.values()}
    if len(found) != 1:
        raise TunerError(
            "layers of different rank or alpha",
            expected="one rank and one alpha",
            got=f"(rank, alpha) {sorted(found)}",
            remedy="train without rank_pattern and alpha_pattern",
        )
    rank, alpha = found.pop()
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _tensors(
    model: nn.Module, layers: Mapping[str, Any], adapter_name: str, config: LoraConfig
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
    """Return ΔR or the downs, the ups if the adapter has its own, and the metadata fields that describe them."""
    downs = {name: layer.lora_A[adapter_name] for name, layer in layers.items()}
    ups = {name: layer.lora_B[adapter_name] for name, layer in layers.items()}
    if not isinstance(config, QRLoraConfig):
        plain = {name: _copy(down.weight) for name, down in downs.items()}
        return plain, {name: _copy(up.weight) for name, up in ups.items()}, {"method": "lora"}
    rank = next(iter(layers.values())).r[adapter_name]
    described: dict[str, Any] = {
        "basis_rank": config.rank_of_basis,
        "columns": resolve_columns(config.columns, rank, config.rank_of_basis),
        "triangular": config.triangular,
    }
    if config.train_basis:
        described["method"] = "qrlora_train_basis"
        whole = {name: _halves(_copy(down.down()), rank) for name, down in downs.items()}
        return whole, {name: _halves(_copy(up.up()).T, rank).T.contiguous() for name, up in ups.items()}, described
    described |= {
        "method": "qrlora",
        "algorithm": config.algorithm,
        "basis_seed": config.basis_seed,
        "basis_fingerprint": adapter_fingerprint(model, adapter_name),
    }
    return {name: _copy(down.delta_r()) for name, down in downs.items()}, None, described


def _halves(rows: Float[Tensor, "held width"], rank: int) -> Float[Tensor, "all width"]:
    """Pad both halves of a trained basis' factor with zeros to `rank` rows each, because a LoRA has one rank in all
    layers; no product changes."""
    return torch.cat([nn.functional.pad(half, (0, 0, 0, rank - len(half))) for half in rows.chunk(2)])


def _copy(matrix: Tensor) -> Tensor:
    return matrix.detach().flatten(1).cpu().clone()


def _base_shapes(layers: Mapping[str, Any], adapter_name: str) -> dict[str, tuple[int, ...]]:
    # Read from the adapter's own weights: a quantised base weight is packed in another shape.
    pairs = {
        name: (layer.lora_B[adapter_name].weight, layer.lora_A[adapter_name].weight) for name, layer in layers.items()
    }
    return {name: (up.shape[0], *down.shape[1:]) for name, (up, down) in pairs.items()}


def _config_for(adapter: Adapter) -> LoraConfig:
    meta = adapter.metadata
    shared: dict[str, Any] = {
        "r": meta.rank,
        # PEFT declares alpha an integer, though it only ever divides it.
        "lora_alpha": int(meta.alpha) if meta.alpha.is_integer() else meta.alpha,
        # A pattern is matched whole; a list would also match layers whose names merely end the same.
        "target_modules": "|".join(re.escape(name) for name in adapter.deltas),
        "inference_mode": True,
    }
    if meta.on_basis:
        shared |= {"columns": list(meta.columns), "triangular": meta.triangular}
        shared |= {"basis_rank": meta.basis_rank, "algorithm": meta.algorithm, "basis_seed": meta.basis_seed}
    return QRLoraConfig(**shared) if meta.on_basis else LoraConfig(**shared)


def base_weights(model: nn.Module, layers: Iterable[str], asked_by: AdapterMetadata | None = None) -> dict[str, Tensor]:
    """Return the base weight of each of these layers; MismatchError lists those that the model lacks."""
    modules = dict(_root(model).named_modules())
    layers = list(layers)
    _check_there(layers, modules, type(_root(model)).__name__, _base_of(asked_by))
    return {name: _base_weight(name, modules[name], False) for name in layers}


def basis_of(denoiser: nn.Module, adapter: Adapter) -> Basis | None:
    """Return the basis of an adapter, from this denoiser's weights (and the cache); None for a plain LoRA.

    Raises MismatchError if the denoiser lacks a layer of the adapter.
    """
    meta = adapter.metadata
    if not meta.on_basis:
        return None
    weights = base_weights(denoiser, adapter.deltas, meta)
    return Basis.of(weights, meta.basis_rank, algorithm=meta.algorithm, seed=meta.basis_seed)


def _base_of(meta: AdapterMetadata | None) -> str:
    """Describe the base model of an adapter."""
    known = f", {meta.base_model or 'not recorded'} ({meta.family or 'family unknown'})" if meta else ""
    return f"its base model{known}"


def _check_there(layers: Collection[str], modules: Mapping[str, Any], model: str, remedy: str) -> None:
    missing = sorted(name for name in layers if name not in modules)
    if missing:
        raise MismatchError(
            f"the model lacks {len(missing)} of the adapter's {len(layers)} layers",
            expected=missing,
            got=model,
            remedy=f"use {remedy}",
        )


def check_fits(model: nn.Module, adapter: Adapter) -> None:
    """Raise MismatchError unless every layer is there with the right shape and, for ΔR on a basis, the right weight."""
    modules = dict(_root(model).named_modules())
    meta = adapter.metadata
    _check_there(adapter.deltas, modules, type(_root(model)).__name__, _base_of(meta))
    shapes, digests = {}, {}
    for name in adapter.deltas:  # one at a time: a quantised weight is unpacked to be read
        weight = _base_weight(name, modules[name], adapter.metadata.on_basis)
        shapes[name] = tuple(weight.shape)
        digests[name] = weight_digest(weight) if adapter.metadata.on_basis else ""
    differ = {name: shape for name, shape in shapes.items() if shape != tuple(adapter.shapes[name])}
    if differ:
        expected = {name: adapter.shapes[name] for name in differ}
        raise MismatchError("base weights of other shapes", expected=expected, got=differ, remedy="use its base model")
    if adapter.metadata.on_basis:
        _check_fingerprint(adapter, digests)


def _base_weight(name: str, module: nn.Module, on_basis: bool) -> Tensor:
    if on_basis and isinstance(module, LoraLayer) and not isinstance(module, QRLoraLayer):
        raise TunerError(
            f"{name} already carries a stock LoRA, which a QR-LoRA layer cannot be put around",
            expected="a base layer or a QR-LoRA layer",
            got=type(module).__name__,
            remedy="attach the QR-LoRA adapter first",
        )
    return readable_weight(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)


def _check_fingerprint(adapter: Adapter, digests: Mapping[str, str]) -> None:
    meta = adapter.metadata
    got = fingerprint(digests, meta.basis_rank, meta.algorithm, meta.basis_seed)
    if got == meta.basis_fingerprint:
        return
    adapter.check_version()
    differ = sorted(name for name, digest in digests.items() if adapter.digests[name] != digest)
    raise MismatchError(
        "the adapter stands on another basis than this model has: "
        f"{len(differ)} of {len(digests)} weights differ, first {differ[0]}",
        expected=f"basis {meta.basis_fingerprint} of {meta.base_model or 'its base model'}",
        got=f"basis {got}",
        remedy="load the base model it was trained on, in a dtype that holds its weights exactly (half precision "
        "rounds those of a float32 file) and with nothing merged; or use its LoRA spelling",
    )
