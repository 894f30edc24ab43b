"""Training of the judge's network, and its weights as they are stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrlora.pico.judge.network import Network, optimisers
from qrlora.pico.pretraining.run import Run, trapezoid

IGNORE = -100
"""The label of a factor that an example says nothing about (as in `cross_entropy`)."""
Example = Callable[[np.random.Generator], tuple[np.ndarray, int, int]]
"""Draws a picture (128, 128, 3) float32 with the labels of subject and style."""


def train(
    work: Path, name: str, plan: Any, sizes: tuple[int, int], example: Example, stream: int, **run: Any
) -> Network:
    """Train on cross-entropy of both factors, each with one more name: "none of these", the label of its defects.

    plan: its seed, steps, batch, muon_lr and adam_lr. sizes: numbers of subjects and styles. stream: of random numbers.
    """
    torch.manual_seed(plan.seed)
    network = Network(*sizes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    both = optimisers(network, plan.muon_lr, plan.adam_lr)
    training = Run(work, name, {"network": network}, both, plan.steps, trapezoid, **run)
    training.restore()

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((plan.seed, stream, step))
        pictures, *labels = zip(*(example(rng) for _ in range(plan.batch)), strict=True)
        found = network(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1)
        return sum(
            F.cross_entropy(found[factor][1], torch.tensor(each), label_smoothing=0.02)
            for factor, each in zip(("subject", "style"), labels, strict=True)
        )  # type: ignore[return-value]

    training.go(loss_of)
    return network


def halved(network: nn.Module) -> dict[str, Tensor]:
    """Matrices in half precision; vectors (norms, biases) as they are. Batch norm's counters are left out."""
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    return {k: (v.half() if v.ndim > 1 else v).contiguous() for k, v in state.items()}
