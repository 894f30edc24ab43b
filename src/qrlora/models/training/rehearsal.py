"""Rehearse a computation on torch's meta device: what it would allocate and how many operations it would take.

    with Rehearsal(model.parameters()) as rehearsal:
        loss = model(inputs)
        held = rehearsal.live
        loss.backward()
    rehearsal.peak, rehearsal.flops

On the meta device every operation allocates and none computes, so the tensors that autograd saves and the peak of the
allocated memory are counted exactly. The same counts come out on real tensors.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

_aten: Any = torch.ops.aten
_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATTENTION: flop_registry[_aten._scaled_dot_product_flash_attention],
    _ATTENTION_BACKWARD: flop_registry[_aten._scaled_dot_product_flash_attention_backward],
}


class Rehearsal(TorchDispatchMode):
    """Counter of the allocations and operations inside a context.

    Attributes:
        live, peak: bytes allocated inside and still there; the most they ever were.
        flops: multiplications and additions, counted apart, of matrix products, convolutions and attention.
    """

    def __init__(self, there: Iterable[Tensor] = ()):
        """there: tensors allocated before the context, whose memory is not counted."""
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in there}

    def __enter__(self) -> Rehearsal:
        # in the module itself: a function mode is not there when checkpointed blocks compute again, on the way back
        self._attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, _flash_attention
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        F.scaled_dot_product_attention = self._attention

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        for tensor in _tensors(out):
            self._allocated(tensor.untyped_storage())
        if function._overloadpacket in _FLOPS:
            self.flops += _FLOPS[function._overloadpacket](*args, **kwargs, out_val=out)
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
