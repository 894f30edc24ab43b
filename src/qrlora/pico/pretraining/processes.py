"""Data-parallel pretraining under ``torchrun``: every process takes its part of each batch, gradients are averaged."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

RANK, COUNT = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes, if ``torchrun`` has started several."""
    if COUNT == 1:
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    except KeyboardInterrupt:
        dist.barrier()  # all end after the same step
        raise
    else:
        dist.barrier()  # a process that leaves while others still read from it aborts them
    finally:
        dist.destroy_process_group()


def own(batch: Any) -> Any:
    """Return this process's part of a batch: every ``COUNT``-th row from its rank on."""
    return batch[RANK::COUNT]


def averaged(parameters: Iterable[nn.Parameter], loss: Tensor, ending: bool) -> tuple[float, bool]:
    """Replace each gradient by its mean over the processes; return the mean loss, and whether any process is ending.

    All travel in one tensor, so the processes end after the same step.
    """
    if COUNT == 1:
        return loss.item(), ending
    held = [p.grad for p in parameters if p.grad is not None]
    facts = loss.new_tensor([loss.item(), float(ending)])
    flat = torch.cat([facts, *(grad.flatten() for grad in held)])
    dist.all_reduce(flat)
    flat /= COUNT
    means = flat[2:].split([grad.numel() for grad in held])
    torch._foreach_copy_(held, [mean.view_as(grad) for mean, grad in zip(means, held, strict=True)])
    return flat[0].item(), bool(flat[1] > 0)
