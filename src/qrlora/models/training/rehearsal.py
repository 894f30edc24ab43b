"""Rehearse a computation on torch's meta device: what it would allocate, and how long it would take elsewhere.

    with Rehearsal(what_is_there_already) as rehearsal:
        loss = model(inputs)
        held = rehearsal.live
        loss.backward()
    rehearsal.peak, rehearsal.flops, Pace(torch.device("cpu")).seconds(rehearsal.operations)

On the meta device every operation happens and none computes, so what autograd keeps and what is allocated at the worst
moment is counted, not guessed. The same counts come out on real tensors.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten
from torch.utils.flop_counter import flop_registry

TIMING_SECONDS = 20.0
"""Longest time to time operations for; the rest is estimated at the pace of those."""
ENOUGH_SECONDS = 0.003

_aten: Any = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATTENTION: flop_registry[_aten._scaled_dot_product_flash_attention],
    _ATTENTION_BACKWARD: flop_registry[_aten._scaled_dot_product_flash_attention_backward],
}


@dataclass(frozen=True)
class _Sizes:
    """Shape and dtype that are recorded of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Sizes:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def filled(self, device: torch.device) -> Tensor:
        """Return a tensor of these sizes: random numbers, or zeros where they could be indices."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        storage = torch.zeros(last + 1 if math.prod(self.shape) else 0, dtype=self.dtype, device=device)
        if self.dtype.is_floating_point:
            storage.normal_()
        return storage.as_strided(self.shape, self.stride)


@dataclass
class Operation:
    """One operation on tensors of certain sizes, and how often it is done. flops: of one, 0 where none are counted."""

    function: Any
    leaves: list[Any]
    structure: Any
    flops: int
    elements: int
    count: int = 0

    @property
    def weight(self) -> int:
        """A measure of all its work, to share out time by."""
        return self.count * max(self.flops, self.elements)

    def ready(self, device: torch.device) -> Callable[[], Any]:
        """Return the operation on tensors of its sizes on that device."""
        leaves = [leaf.filled(device) if isinstance(leaf, _Sizes) else leaf for leaf in self.leaves]
        leaves = [device if isinstance(leaf, torch.device) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, self.structure)
        packet = self.function._overloadpacket
        if packet in (_ATTENTION, _ATTENTION_BACKWARD):
            return _attention_there(packet is _ATTENTION_BACKWARD, args, kwargs)
        return lambda: self.function(*args, **kwargs)


def _attention_there(backward: bool, args: Any, kwargs: Any) -> Callable[[], Any]:
    """Attention by the kernel that the device itself prefers, or its derivative."""
    query, key, value = (x.requires_grad_(backward) for x in args[backward : 3 + backward])
    options = {"attn_mask": kwargs.get("attn_mask"), "scale": kwargs.get("scale")}
    if not backward:
        return lambda: F.scaled_dot_product_attention(query, key, value, **options)
    with torch.enable_grad():
        out = F.scaled_dot_product_attention(query, key, value, **options)
    return lambda: torch.autograd.grad(out, (query, key, value), args[0], retain_graph=True)


class Rehearsal(TorchDispatchMode):
    """Counter of the allocations and operations inside a context.

    Attributes:
        live, peak: bytes allocated inside and still there; the most they ever were.
        operations: every distinct one; views, which do nothing, apart.
        calls: operations in all, views included.
    """

    def __init__(self, there: Iterable[Tensor] = ()):
        """there: tensors whose memory is not counted, because it is there before."""
        super().__init__()
        self.live = self.peak = self.calls = 0
        self.known: dict[str, Operation] = {}
        self._storages = {tensor.untyped_storage()._cdata for tensor in there}

    def __enter__(self) -> Rehearsal:
        # in the module itself: a function mode is not there when checkpointed blocks compute again, on the way back
        self._attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _flash_attention
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention = self._attention

    @property
    def operations(self) -> list[Operation]:
        return list(self.known.values())

    @property
    def flops(self) -> int:
        """Multiplications and additions, counted apart, of matrix products, convolutions and attention."""
        return sum(operation.count * operation.flops for operation in self.known.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        self.calls += 1
        there = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = list(_tensors(out))
        for tensor in made:
            self._allocated(tensor.untyped_storage())
        if function._schema.is_mutable or not all(tensor.untyped_storage()._cdata in there for tensor in made):
            self._done(function, args, kwargs, out)
        return out

    def _allocated(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size

    def _done(self, function: Any, args: Any, kwargs: Any, out: Any) -> None:
        leaves, structure = tree_flatten((args, kwargs))
        leaves = [_Sizes.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        key = f"{function}{leaves}{structure}"
        if key not in self.known:
            flops = _FLOPS[function._overloadpacket](*args, **kwargs, out_val=out) if self._counted(function) else 0
            elements = sum(tensor.numel() for tensor in _tensors((args, kwargs, out)))
            self.known[key] = Operation(function, leaves, structure, flops, elements)
        self.known[key].count += 1

    @staticmethod
    def _counted(function: Any) -> bool:
        return function._overloadpacket in _FLOPS


def _tensors(nested: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(nested) if isinstance(leaf, Tensor))


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention as devices do it, which never hold the whole matrix of weights; the meta device by itself would."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
    options = {"attn_mask": attn_mask, "scale": scale}
    return _ATTENTION(query, key, value, dropout_p, is_causal, **options)[0]


class Pace:
    """Measured speed of a device's operations."""

    def __init__(self, device: torch.device):
        self.device = device
        self.overhead = 0.0
        """Seconds that Python and autograd spend on each operation besides, from a chain of operations too small to
        take any time of their own."""
        chain = nn.Sequential(*(nn.Linear(8, 8, device=device) for _ in range(30)))
        inputs = torch.zeros(1, 8, device=device)
        with Rehearsal() as rehearsal:
            chain(inputs).sum().backward()
        whole = self.time(lambda: chain(inputs).sum().backward())
        self.overhead = max(0.0, whole - self.seconds(rehearsal)) / rehearsal.calls

    def seconds(self, rehearsal: Rehearsal) -> float:
        """Estimate the seconds of the recorded computation on an otherwise idle device.

        A GPU does its work while Python prepares what comes next; a CPU does one after the other.
        """
        ordered = sorted(rehearsal.operations, key=lambda operation: operation.weight, reverse=True)
        until, spent, weight = time.perf_counter() + TIMING_SECONDS, 0.0, 0
        for operation in ordered:
            if time.perf_counter() > until:
                break
            spent += operation.count * self.time(operation.ready(self.device))
            weight += operation.weight
        whole = sum(operation.weight for operation in ordered)
        spent *= whole / weight
        prepared = self.overhead * rehearsal.calls
        return spent + prepared if self.device.type == "cpu" else max(spent, prepared)

    def time(self, action: Callable[[], Any], once: bool = False) -> float:
        """Time a few runs and return the shortest, in seconds; or `once`, what takes long and needs no warming up."""
        runs = 1 if once or self.device.type == "cpu" else 10  # launches of a GPU overlap
        if not once:
            action()
        best, until = math.inf, time.perf_counter() + ENOUGH_SECONDS
        for _ in range(5):
            self._wait()
            started = time.perf_counter()
            for _ in range(runs):
                action()
            self._wait()
            ended = time.perf_counter()
            best = min(best, (ended - started) / runs)
            if once or ended > until:
                break
        return best

    def _wait(self) -> None:
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
