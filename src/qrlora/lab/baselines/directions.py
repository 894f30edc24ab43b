"""Directions for a frozen Q other than a weight's first singular vectors: those of the training picture's activations.

They are given in the coordinates of the paper's QR (Uᵀ W = O R with diag(R) > 0, Q = U O, which depends on the span of
U alone), so that methods differ in their directions and in nothing else. Such a Q is the adapter's own: two of them are
summed as ΔW, not as ΔR.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.models.training.prepare import Losses

PASSES = 4
"""Forward passes on the training picture that `activation` looks at."""
Directions = Callable[[Mapping[str, Any], int, Losses], dict[str, Tensor]]
"""(adapter layers by name, rank, losses) -> Q by name; layers that the task says nothing of are left out."""


def base_of(layer: Any) -> Float[Tensor, "out in"]:
    """The base weight of an adapter layer in float32, a convolution's flattened."""
    return layer.get_base_layer().weight.detach().float().flatten(1)


@torch.no_grad()
def activation(layers: Mapping[str, Any], rank: int, losses: Losses) -> dict[str, Tensor]:
    """The first left singular vectors of W C^½, C = E x xᵀ over the inputs of the layer on the task.

    They are the first eigenvectors of W C Wᵀ = E y yᵀ, y = W x being what the layer puts out less its bias. CorDA (Yang
    et al. 2024, arXiv 2406.05223) decomposes W C, and EVA (Paischer et al. 2024, arXiv 2410.07170) the inputs, for the
    side that reads; here it is Q, the side that writes, that is chosen.
    """
    moments: dict[str, Tensor] = {}
    with _listening(layers, moments):
        for _ in losses(PASSES):
            pass
    found = {name: torch.linalg.eigh(moment.cpu())[1].flip(1)[:, :rank] for name, moment in moments.items()}
    return {name: _in_qr_coordinates(u, base_of(layers[name]).double().cpu()) for name, u in found.items()}


@contextlib.contextmanager
def _listening(layers: Mapping[str, Any], moments: dict[str, Tensor]) -> Iterator[None]:
    """Σ y yᵀ, float64, of what every base layer puts out meanwhile."""

    def note(name: str, base: Any, _: Any, output: Tensor) -> None:
        put = output if isinstance(base, nn.Linear) else output.movedim(1, -1)
        y = (put if base.bias is None else put - base.bias).flatten(0, -2).double()
        moments[name] = moments.get(name, 0) + y.T @ y

    bases = {name: layer.get_base_layer() for name, layer in layers.items()}
    hooks = [base.register_forward_hook(functools.partial(note, name)) for name, base in bases.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_qr_coordinates(u: Float[Tensor, "out rank"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "out rank"]:
    return (u @ positive_qr(u.T @ weight)).float()


def positive_qr(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows rank"]:
    """Q of the QR decomposition with positive pivots, which is unique; float64."""
    q, r = torch.linalg.qr(matrix)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).double()
