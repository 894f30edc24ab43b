"""Muon: momentum made orthogonal, for the matrices inside the blocks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz iterations (K. Jordan 2024), batched over equal shapes.

    ``torch.optim.Muon`` iterates in bfloat16, which processors without bfloat16 units emulate at eight times the cost
    of the whole backward pass; here the dtype is chosen. Convolution kernels are treated as (out, in * h * w).
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter once."""
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for (rows, columns), params in shapes.items():
                momenta = torch.stack([self._momentum(p, group["momentum"]) for p in params])
                update = orthogonalise(momenta.to(self.dtype)).to(momenta.dtype)
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u.reshape(p.shape), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _momentum(self, p: nn.Parameter, beta: float) -> Tensor:
        state = self.state[p]
        assert p.grad is not None, "every parameter of a block takes part in every step"
        if not state:
            state["momentum"] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        state["momentum"].lerp_(p.grad, 1 - beta)
        return torch.lerp(p.grad, state["momentum"], beta).flatten(1)  # Nesterov


def orthogonalise(m: Float[Tensor, "b rows columns"]) -> Float[Tensor, "b rows columns"]:
    """The nearest matrix with singular values near 1, by the quintic Newton-Schulz iteration of Muon."""
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x
