"""Parametrise weights as points of a span: the coefficients of mean and components train, optionally a remainder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize


class Span(nn.Module):
    """weight = (1 + z₀) · mean + Σₖ zₖ · componentₖ + share · own, as a parametrisation of one module's weight.

    All Spans of a model share one parameter `coefficients`, z, which starts at zero: at the mean. As components are
    scaled to unit variance, weight decay of z penalises a direction by the inverse of its variance, and weight decay of
    z₀ pulls to the mean. `source`: name and digest of the space.
    """

    source: Mapping[str, str] = {}

    mean: Tensor
    components: Tensor

    def __init__(self, coefficients: nn.Parameter, mean: Tensor, components: Float[Tensor, "k ..."], share: float):
        super().__init__()
        self.coefficients, self.share = coefficients, share
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("components", components, persistent=False)

    def forward(self, own: Tensor) -> Tensor:
        z = self.coefficients
        point = (1 + z[0]) * self.mean + (z[1:] @ self.components.flatten(1)).view_as(self.mean)
        return (point + self.share * own if self.share else point).view_as(own)


def place(
    modules: Mapping[str, nn.Module], mean: Mapping[str, Tensor], components: Mapping[str, Tensor], share: float
) -> nn.Parameter:
    """Put the weight of every named module on the span; returns z. The modules' own weights train if share is not 0.

    The model's parameters then include z, once, and the modules' own weights if share is not 0.
    """
    count = 1 + len(next(iter(components.values())))
    z: nn.Parameter | None = None
    for name, module in modules.items():
        own: Any = module.weight
        own.requires_grad_(bool(share))
        z = nn.Parameter(torch.zeros(count, device=own.device)) if z is None else z
        span = Span(z, mean[name].to(own.device), components[name].to(own.device), share)
        parametrize.register_parametrization(module, "weight", span, unsafe=True)
    assert z is not None, "a span of nothing"
    return z
