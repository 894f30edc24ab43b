"""ZipLoRA (Shah et al. 2023, arXiv 2311.13600): a coefficient for every column of both ΔW, learned.

What each part becomes can be summed at other weights afterwards, as the paper scales what it has merged: so its
coefficients are learned once for all weights.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from qrlora.errors import TrainingError
from qrlora.lab.baselines.context import Context, linear_layers
from qrlora.lab.baselines.deltas import Delta, Learned

Mergers = dict[str, nn.Parameter]
"""Layer -> (in,), one coefficient for each column of its ΔW."""


def zipped(
    parts: Sequence[Learned],
    context: Context,
    *,
    penalty: float = 0.01,
    learning_rate: float = 0.01,
    steps: int = 100,
    report: Callable[[int, float, float], None] | None = None,
) -> list[Learned]:
    """ΔWᵢ diag(mᵢ) of each part, with m from Σᵢ ‖D(merged; xᵢ) - D(part i; xᵢ)‖² + λ Σ |m₁ ∘ m₂|; m starts at one.

    λ, learning rate and steps are the paper's. Adapted: x is the training picture, noised, with its caption; the errors
    are means over the prediction, and |m₁ ∘ m₂| the mean over a layer's columns, then over layers, so that λ means the
    same at every width and depth (the paper's sums would outweigh pico's errors by orders of magnitude). Any number of
    parts: every pair is kept apart.

    Args:
        report: called after every step with its number (from 1), its error and the mean |m₁ ∘ m₂|.

    Raises:
        MismatchError: a layer is no Linear.
        TrainingError: the error is no longer finite.
    """
    mergers = [{n: nn.Parameter(torch.ones(d.shape[1])) for n, d in part.items()} for part in parts]
    optimizer = torch.optim.Adam([m for part in mergers for m in part.values()], lr=learning_rate)
    context.denoiser.requires_grad_(False)
    for step in range(steps):
        errors = [_error(i, step, parts, mergers, context) for i in range(len(parts))]
        error, overlap = torch.stack(errors).sum(), _overlap(mergers)
        optimizer.zero_grad()
        (error + penalty * overlap).backward()
        if not torch.isfinite(error):
            raise TrainingError("ZipLoRA broke down", expected="a finite error", got=error.item())
        optimizer.step()
        if report:
            report(step + 1, error.item(), overlap.item())
    with torch.no_grad():
        return [{n: _columns(d, m[n]) for n, d in part.items()} for part, m in zip(parts, mergers, strict=True)]


def _error(
    i: int, step: int, parts: Sequence[Learned], mergers: Sequence[Mergers], context: Context
) -> Float[Tensor, ""]:
    """The merged denoiser's squared error against part i alone, on what that part was trained on."""
    call = context.call(i, step)
    with torch.no_grad(), _added(context, [(parts[i], None)]):
        target = context.run(call)
    with _added(context, list(zip(parts, mergers, strict=True))):
        return F.mse_loss(context.run(call), target)


def _overlap(mergers: Sequence[Mergers]) -> Float[Tensor, ""]:
    """Mean |m₁ ∘ m₂| over columns, then over layers and pairs."""
    found = [
        (first[name] * second[name]).abs().mean()
        for a, first in enumerate(mergers)
        for second in mergers[a + 1 :]
        for name in first.keys() & second.keys()
    ]
    return torch.stack(found).mean() if found else torch.zeros(())


@contextlib.contextmanager
def _added(context: Context, terms: Sequence[tuple[Learned, Mergers | None]]) -> Iterator[None]:
    """The denoiser with Σ ΔW diag(m) added to what its layers put out, differentiable in m."""
    modules: dict[str, nn.Linear] = {}
    for part, _ in terms:
        modules |= linear_layers(context.denoiser, part)
    own = {n: [(part[n], None if m is None else m[n]) for part, m in terms if n in part] for n in modules}
    hooks = [module.register_forward_hook(functools.partial(_add, own[name])) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add(
    own: Sequence[tuple[Delta, nn.Parameter | None]], _: nn.Module, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A layer's output with what these ΔW diag(m) add to it."""
    for delta, m in own:
        output = output + _through(delta, args[0] if m is None else args[0] * m)
    return output


def _through(delta: Delta, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
    return (
        F.linear(x, delta.whole) if delta.factors is None else F.linear(F.linear(x, delta.factors[1]), delta.factors[0])
    )


def _columns(delta: Delta, merger: Float[Tensor, " in"]) -> Delta:
    """ΔW diag(m)."""
    if delta.factors is None:
        return Delta(matrix=delta.whole * merger)
    return Delta(delta.factors[0], delta.factors[1] * merger)
