"""Put a fresh adapter on a denoiser as a point of a space, and read where training took it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qrlora.errors import MismatchError
from qrlora.method.adapter.attach import adapted_layers, adapter_from_model
from qrlora.method.space.record import Space, check_alike
from qrlora.method.space.span import Span, place

REMEDY = "train with the rank, alpha, columns, targets and base model of the space: `qrlora space show FILE` names them"


def place_adapter(
    model: nn.Module,
    adapter_name: str,
    space: Space,
    *,
    role: str,
    base_model: str = "",
    remainder: float = 0.0,
    name: str = "",
) -> None:
    """Make an adapter that is on a model a point of a space: ΔR = (1 + z₀) mean + Σ zₖ cₖ + remainder · X.

    z trains and starts at zero; X, the adapter's own weights, trains if `remainder` is not 0. On a model without values
    (meta device) names and shapes alone are compared. Raises MismatchError if the adapter is not of the space.
    """
    layers = adapted_layers(model, adapter_name)
    weights = {layer: module.lora_A[adapter_name] for layer, module in layers.items()}
    if next(iter(weights.values())).weight.is_meta:
        shapes = {layer: tuple(part.weight.flatten(1).shape) for layer, part in weights.items()}
        expected = {layer: tuple(delta.shape) for layer, delta in space.mean.deltas.items()}
        if shapes != expected:
            raise MismatchError("the space is of other layers", expected=expected, got=shapes, remedy=REMEDY)
    else:
        fresh = adapter_from_model(model, adapter_name, role=role, base_model=base_model)
        check_alike(
            dataclasses.replace(space.mean, name="the space"), dataclasses.replace(fresh, name="the recipe"), REMEDY
        )
    for part in weights.values():
        part.weight.data = part.weight.data.float()
    place(weights, space.mean.deltas, space.components, remainder)
    _span(_placed(model)[0]).source = {"name": name, "digest": space.digest}


def coefficients_on(model: nn.Module) -> dict[str, Any]:
    """Return the point of a model's adapter in its space, as JSON values: name and digest of the space, m, z, and the
    share of ‖ΔR‖² that is the remainder's. Empty if there is no space."""
    placed = _placed(model)
    if not placed:
        return {}
    first, *z = _span(placed[0]).coefficients.detach().cpu().tolist()
    whole = sum(float(one().detach().double().square().sum()) for one in placed)
    free = sum(float((_span(one).share * one.original).detach().double().square().sum()) for one in placed)
    return {
        **_span(placed[0]).source,
        "mean": round(1 + first, 6),
        "coordinates": [round(value, 6) for value in z],
        "remainder": round(free / whole, 6) if whole else 0.0,
    }


def unexplained(model: nn.Module, losses: Callable[[], Iterator[Tensor]]) -> float:
    """Return the share of ‖∂loss/∂ΔR‖² (mean gradient of all losses) outside the span of mean and components.

    Before training, at the mean of the space, it measures how new a picture is. For a random gradient it is
    1 - (1 + k) / d, with k components and d entries of ΔR.
    """
    placed = _placed(model)
    before = [(_span(one).share, one.original.requires_grad) for one in placed]
    try:
        for one in placed:  # the remainder, still zero, takes the gradient of ΔR
            _span(one).share = 1.0
            one.original.requires_grad_(True)
        own = [one.original for one in placed]
        gradients = [torch.zeros_like(x, dtype=torch.float64) for x in own]
        for loss in losses():
            for total, found in zip(gradients, torch.autograd.grad(loss, own, allow_unused=True), strict=True):
                total += 0 if found is None else found
    finally:
        for one, (share, trains) in zip(placed, before, strict=True):
            _span(one).share = share
            one.original.requires_grad_(trains)
    spans = [torch.cat([_span(one).mean[None], _span(one).components]).double().flatten(1) for one in placed]
    gram = torch.stack([span @ span.T for span in spans]).sum(0)
    parts = zip(spans, gradients, strict=True)
    against = torch.stack([span @ gradient.flatten() for span, gradient in parts]).sum(0)
    whole = sum(float(gradient.square().sum()) for gradient in gradients)
    inside = float(against @ torch.linalg.pinv(gram, hermitian=True) @ against)
    return 1 - inside / whole if whole else 0.0


def _placed(model: nn.Module) -> list[Any]:
    """The parametrisations of all weights that are on a span: lists of one Span, with the module's own weight."""
    modules: list[Any] = [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]
    owners = [module.parametrizations["weight"] for module in modules]
    return [owner for owner in owners if isinstance(owner[0], Span)]


def _span(placed: Any) -> Span:
    span: Span = placed[0]
    return span
