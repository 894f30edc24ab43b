"""The difference between a fine-tuned and a base checkpoint as an adapter, and what of it an adapter cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.errors import MismatchError
from qrlora.method.adapter import Adapter, AdapterMetadata
from qrlora.method.adapter.record import require
from qrlora.method.basis import Basis
from qrlora.models.exchange.projection import EnergyKept, on_columns, truncated

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Changes:
    """Two models of one architecture, compared.

    layers   linear and convolution layers whose weight differs -> (base weight, tuned weight)
    others   every other parameter that differs -> ‖difference‖²; no adapter of these layers holds it
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    others: Mapping[str, float]


@torch.no_grad()
def changed_layers(base: nn.Module, tuned: nn.Module, targets: Sequence[str] | None = None) -> Changes:
    """Return the layers that differ between two models; with `targets`, only layers whose names end in one of them.

    Raises MismatchError if they are not of one architecture, AdapterFileError if a weight is not finite.
    """
    ours, theirs = dict(base.named_parameters()), dict(tuned.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in ours.items()}
    others = {name: tuple(value.shape) for name, value in theirs.items()}
    if shapes != others:
        odd = sorted(name for name in {*shapes, *others} if shapes.get(name) != others.get(name))
        raise MismatchError(
            f"the checkpoints differ in {len(odd)} parameters' names or shapes",
            expected={name: shapes.get(name, "none") for name in odd[:8]},
            got={name: others.get(name, "none") for name in odd[:8]},
            remedy="compare a fine-tuned model with the base model it began from",
        )
    layers, rest = {}, {}
    adaptable = {name for name, module in base.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    for name, value in ours.items():
        if torch.equal(value, theirs[name]):
            continue
        owner, _, last = name.rpartition(".")
        finite = bool(torch.isfinite(value).all()) and bool(torch.isfinite(theirs[name]).all())
        require(finite, f"{name}: NaN or Inf", expected="finite weights", remedy="repair the checkpoint")
        chosen = targets is None or any(owner == target or owner.endswith(f".{target}") for target in targets)
        if last == "weight" and owner in adaptable and chosen:
            layers[owner] = (value, theirs[name])
        else:
            rest[name] = float((theirs[name].double() - value.double()).square().sum())
    return Changes(layers, rest)


def changed_components(base: Any, tuned: Any, denoiser: str) -> list[str]:
    """The pipelines' other parts (text encoders, autoencoder) whose weights differ; no adapter of ours holds those."""
    found = []
    for name, component in base.components.items():
        if name == denoiser or not isinstance(component, nn.Module):
            continue
        theirs = tuned.components.get(name)
        state = theirs.state_dict() if isinstance(theirs, nn.Module) else {}
        ours = component.state_dict()
        if set(ours) != set(state) or any(not torch.equal(value, state[key]) for key, value in ours.items()):
            found.append(name)
    return found


def extract_lora(
    changes: Changes, rank: int, progress: Progress | None = None, **metadata: Any
) -> tuple[Adapter, EnergyKept]:
    """The changed layers as a plain LoRA of `rank`: truncated SVD of each ΔW. `metadata`: AdapterMetadata's fields."""
    _check_changed(changes)
    require(rank >= 1, "rank below one", expected="a positive integer", got=rank)
    deltas, ups, kept, whole, shapes = {}, {}, {}, {}, {}
    for done, (layer, pair) in enumerate(changes.layers.items(), start=1):
        delta = _difference(*pair)
        shapes[layer] = tuple(pair[0].shape)
        ups[layer], deltas[layer], kept[layer] = truncated(delta, rank)
        whole[layer] = float(delta.double().square().sum())
        if progress:
            progress(done, len(changes.layers), layer)
    described = AdapterMetadata(method="lora", rank=rank, alpha=float(rank), **metadata)
    return Adapter(described, deltas, shapes, ups=ups), EnergyKept.of(kept, whole)


def extract_on_basis(
    changes: Changes, basis: Basis, columns: Sequence[int] | None = None, *, triangular: bool = False, **metadata: Any
) -> tuple[Adapter, EnergyKept]:
    """The changed layers as ΔR = Q[:, columns]ᵀ ΔW on the basis of the base model. `metadata`: as `extract_lora`."""
    _check_changed(changes)
    missing = sorted(set(changes.layers) - set(basis))
    if missing:
        raise MismatchError("layers without a basis", expected=missing, got=f"{len(basis)} layers")
    shapes = {layer: tuple(pair[0].shape) for layer, pair in changes.layers.items()}
    whole: dict[str, float] = {}

    def coordinates(layer: str, q: Float[Tensor, "out rank"]) -> Float[Tensor, "rank in"]:
        delta = _difference(*changes.layers[layer]).double()
        whole[layer] = float(delta.square().sum())
        return q.T @ delta

    return on_columns(basis, shapes, columns, triangular, coordinates, whole, metadata)


def _difference(base: Float[Tensor, "out ..."], tuned: Float[Tensor, "out ..."]) -> Float[Tensor, "out in"]:
    return (tuned.detach().cpu().float() - base.detach().cpu().float()).flatten(1)


def _check_changed(changes: Changes) -> None:
    if not changes.layers:
        raise MismatchError(
            "nothing to extract: no linear or convolution layer that was asked for differs",
            expected="a fine-tuned model and its base",
            got=f"{len(changes.others)} other parameters differ" if changes.others else "equal weights",
            remedy="check which is which, or name other targets",
        )
