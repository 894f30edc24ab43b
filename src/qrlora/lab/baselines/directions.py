"""Which directions a frozen Q could hold instead of a weight's first singular vectors.

minor        the last left singular vectors of W
activation   the directions in which the layer puts out most on the lesson
gradient     the directions in which the lesson would move the layer most

Each gives Q of every layer, (out, rank) float32, orthonormal, in the coordinates that the paper's QR gives: with
Uᵀ W = O R and diag(R) > 0, Q = U O, which depends on the span of U alone. So methods that differ in their directions
differ in nothing else. A Q that the lesson chose is the adapter's own: two such adapters share none, and are summed as
ΔW, not as ΔR.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.models.training.loop import Losses

PASSES = 4
"""Forward passes on the lesson that `activation` and `gradient` look at."""
Directions = Callable[[Mapping[str, Any], int, Losses], dict[str, Tensor]]
"""(adapter layers by name, rank, losses) -> Q by name; layers that the lesson says nothing of are left out."""


def base_of(layer: Any) -> Float[Tensor, "out in"]:
    """The base weight of an adapter layer in float32, a convolution's flattened."""
    return layer.get_base_layer().weight.detach().float().flatten(1)


def minor(layers: Mapping[str, Any], rank: int, _: Losses) -> dict[str, Tensor]:
    """The last left singular vectors of each W."""
    weights = {name: base_of(layer).double().cpu() for name, layer in layers.items()}
    found = {name: torch.linalg.svd(weight, full_matrices=False)[0][:, -rank:] for name, weight in weights.items()}
    return {name: _in_qr_coordinates(u, weights[name]) for name, u in found.items()}


@torch.no_grad()
def activation(layers: Mapping[str, Any], rank: int, losses: Losses) -> dict[str, Tensor]:
    """The first left singular vectors of W C^½, C = E x xᵀ over the inputs of the layer on the lesson.

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


def gradient(layers: Mapping[str, Any], rank: int, losses: Losses) -> dict[str, Tensor]:
    """The first left singular vectors of G, the mean gradient of the loss on the lesson with respect to each W.

    The gradient of ΔR is s Qᵀ G before the first step: of all Q of this rank this one gives it the greatest norm.
    LoRA-GA (Wang et al. 2024, arXiv 2407.05000) starts B and A at singular vectors of G and trains both; here Q is
    frozen and ΔR starts at zero. A layer whose W has no influence on the loss is left out.
    """
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    sums: dict[str, Tensor] = {}
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for loss in losses(PASSES):
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, part in zip(weights, found, strict=True):
                if part is not None:
                    sums[name] = sums.get(name, 0) + part.flatten(1).double()
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    first = {n: torch.linalg.svd(g.cpu(), full_matrices=False)[0][:, :rank] for n, g in sums.items() if bool(g.any())}
    return {name: _in_qr_coordinates(u, base_of(layers[name]).double().cpu()) for name, u in first.items()}


def _in_qr_coordinates(u: Float[Tensor, "out rank"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "out rank"]:
    o, r = torch.linalg.qr(u.T @ weight)
    return (u @ (o * torch.where(r.diagonal() < 0, -1.0, 1.0).double())).float()
