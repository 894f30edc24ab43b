"""Change the composition of a running denoiser between two steps, one composition for each picture of a batch.

    with Live(pipe.transformer, {"mug": mug, "chalk": chalk}) as live:
        live.compose([{"mug": 0.9}, {"mug": 1.0, "chalk": 0.5}, {}])
        pipe(["..."] * 3)

On one basis, picture i gets x Wᵀ + (x ΔRᵢᵀ) Qᵀ with ΔRᵢ = Σⱼ λᵢⱼ sⱼ ΔRⱼ. So the ΔR of all adapters lie in one tensor a
layer, (adapters, rank, in); composing is one product with the weights, (pictures, adapters); and the denoiser computes
with (pictures, rank, in) and one Q, however many adapters there are.

Null-space projection changes ΔRᵢ to ΔRᵢ (I - c V Vᵀ) = (1 - c) ΔRᵢ + c ΔRᵢ (I - V Vᵀ). So for adapters that are
composed with it, the hard projection (c = 1) of each is computed once and lies in another tensor like that one; any
strength c mixes the two.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qrlora._said import joined, said, verbatim
from qrlora.errors import MismatchError, TunerError
from qrlora.method.adapter.attach import adapted_layers, attach, remove_adapters
from qrlora.method.adapter.record import Adapter
from qrlora.method.composition.null_space import check_strength, default_strength, project_out
from qrlora.method.composition.parts import check_weights
from qrlora.method.composition.sum import Composition
from qrlora.method.tuner.factors import DeltaR, DeltaRConv, DeltaRConv1d, DeltaRConv2d, DeltaRConv3d, DeltaRLinear

CACHED_SETS = 8
"""Sets of adapters whose hard null-space projections are cached, the last ones used."""
MOST_TURNS = 16
"""A batch has one row for a picture, or two or three where guidance needs them. Far more are no rows but the tokens of
all pictures end to end (as Z-Image's embedders get them), in which compositions cannot be told apart."""


class BatchedDelta(DeltaR):
    """Several ΔR stacked in ``weight``: row i of a batch uses the one numbered i modulo ``several``."""

    several = 1

    @torch.no_grad()
    def hold(self, deltas: Float[Tensor, "several rank in"]) -> None:
        """Replace the stacked ΔR, without gradients. While their number is the same, the tensor keeps address and
        shape."""
        shape = (deltas.shape[0] * deltas.shape[1], *self.weight.shape[1:])
        if self.weight.shape != shape:
            self.weight = nn.Parameter(self.weight.new_empty(shape), requires_grad=False)
        self.weight.copy_(deltas.reshape(shape))
        self.triangular, self.outside, self.several = False, None, len(deltas)

    def down(self) -> Float[Tensor, "inner in"]:
        """Return the right factor; TunerError if there are several ΔR, which have no common ΔW to merge."""
        if self.several > 1:
            raise TunerError(
                "one weight cannot hold several compositions",
                expected="one composition for the whole batch",
                got=self.several,
                remedy="compose one before merging",
            )
        return super().down()

    def turns(self, x: Tensor) -> int:
        """Return how often a batch repeats the ΔR. Raises TunerError unless its rows are a multiple of them."""
        turns, left = divmod(len(x), self.several)
        if left or (x.ndim == 2 and turns > MOST_TURNS):
            raise TunerError(
                f"{self.several} compositions in one batch do not fit what a layer is given",
                expected=f"one row for each composition, at most {MOST_TURNS} times over",
                got=f"input of shape {tuple(x.shape)}",
                remedy="give as many compositions as the batch has pictures, or one for all; a layer that is given "
                "the tokens of all pictures in one row needs a batch for each composition",
            )
        return turns


class BatchedLinear(BatchedDelta, DeltaRLinear):
    """Several ΔR of a Linear layer."""

    def forward(self, x: Tensor) -> Tensor:
        if self.several == 1:
            return super().forward(x)
        each = self.weight.view(self.several, -1, x.shape[-1]).mT
        turns = x.reshape(self.turns(x), self.several, -1, x.shape[-1])
        return torch.cat([torch.bmm(rows, each) for rows in turns]).view(*x.shape[:-1], each.shape[-1])


class _BatchedConv(BatchedDelta, DeltaRConv):
    def forward(self, x: Tensor) -> Tensor:
        if self.several == 1:
            return super().forward(x)
        # The rows of one turn become channels, so that every group of channels meets its own ΔR.
        turns = x.reshape(self.turns(x), -1, *x.shape[2:])
        inner: Tensor = self._conv_forward(turns, self.weight, None)  # type: ignore[operator]
        return inner.reshape(len(x), -1, *inner.shape[2:])

    def hold(self, deltas: Float[Tensor, "several rank in"]) -> None:
        super().hold(deltas)
        self.groups = len(deltas)


class BatchedConv1d(_BatchedConv, DeltaRConv1d):
    """Several ΔR of a 1-d convolution."""


class BatchedConv2d(_BatchedConv, DeltaRConv2d):
    """Several ΔR of a 2-d convolution."""


class BatchedConv3d(_BatchedConv, DeltaRConv3d):
    """Several ΔR of a 3-d convolution."""


_BATCHED: dict[type[DeltaR], type[BatchedDelta]] = {
    DeltaRLinear: BatchedLinear,
    DeltaRConv1d: BatchedConv1d,
    DeltaRConv2d: BatchedConv2d,
    DeltaRConv3d: BatchedConv3d,
}


def batched(delta: DeltaR) -> BatchedDelta:
    """Return a layer's ΔR, with its geometry and columns, as one that holds several."""
    made = copy.copy(delta)
    made.__class__ = _BATCHED[type(delta)]
    return cast(BatchedDelta, made)


class Live:
    """Adapters of one basis, attached once to a denoiser: a composition of its own for each picture of a batch, at the
    computing time of one adapter.

    They are attached when this is constructed and removed when its `with` block ends. Until `compose` is called, the
    denoiser computes what it would without. Memory: 4 bytes per entry of every adapter's ΔR, on the union of the
    adapters' columns, and one ΔR per picture of a batch; as much again for each of the last eight sets of adapters
    composed with null-space projection.

    Args:
        denoiser: a diffusers denoiser that carries no adapters.
        adapters: by the names that compositions call them; may be empty.

    Raises:
        MismatchError: the adapters are not all ΔR on one basis, or that basis is not this denoiser's.
        TunerError: the denoiser carries adapters already.
    """

    def __init__(self, denoiser: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.denoiser: Any = denoiser
        carried = sorted(getattr(denoiser, "peft_config", {}))
        if carried:
            remedy = "take them off, or give them to Live"
            raise TunerError("a denoiser with adapters", expected="a denoiser without", got=carried, remedy=remedy)
        self._adapters: dict[str, Adapter] = {}
        self._rows: list[dict[str, float]] = [{}]
        self._strengths: list[float] = [0.0]
        self._attached: tuple[str, Adapter] | None = None  # the name in the denoiser, and what was attached under it
        self._layers: dict[str, BatchedDelta] = {}
        self._stacks: dict[str, Tensor] = {}  # of a layer: (adapters, rank * in) float32, s · ΔR of each
        self._projected: OrderedDict[tuple[str, ...], dict[str, Tensor]] = OrderedDict()  # the same at strength 1
        if adapters:
            self._take(dict(adapters))

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that a composition may name."""
        return tuple(self._adapters)

    def compose(
        self, rows: Sequence[Mapping[str, float]], null_space: Sequence[float | None] | float | None = 0.0
    ) -> None:
        """Set one composition for every picture of a batch, in their order, from the next step on.

        Args:
            rows: adapters by name with their weights, of any sign; {} is the base model. One row is for all pictures
                of a batch of any size. n rows serve a batch of n, or of a multiple of n in which every n rows have the
                same order, as classifier-free guidance makes them.
            null_space: strength of the null-space projection, as in `Composition`: one for each row, or one for all;
                None is `default_strength` of the row's adapters.

        Raises:
            MismatchError: no rows, or as `check`; or a strength that is not from 0 to 1.
        """
        wanted = [dict(row) for row in rows]
        given = list(null_space) if isinstance(null_space, Sequence) else [null_space] * len(wanted)
        if len(given) != len(wanted):
            raise MismatchError("strengths that do not fit the rows", expected=len(wanted), got=len(given))
        for strength in given:
            check_strength(strength or 0.0)
        if not wanted:
            raise MismatchError("no composition", expected="one for every picture, or one for all", got="none")
        for row in wanted:
            self.check(row)
        self._strengths = [
            default_strength([self._adapters[name] for name in row]) if strength is None else float(strength)
            for row, strength in zip(wanted, given, strict=True)
        ]
        self._rows = wanted
        self._write()

    def check(self, row: Mapping[str, float]) -> None:
        """Check that a composition can be computed. The active compositions do not change.

        Raises:
            MismatchError: an adapter that is not there, a weight that is no finite number, or a sum beyond the numbers
                of this denoiser's dtype.
        """
        unknown = sorted(set(row) - set(self._adapters))
        if unknown:
            raise MismatchError(
                "a composition of adapters that are not there",
                expected=said("some of %(adapters)s", adapters=sorted(self._adapters)),
                got=unknown,
                remedy="add them first",
            )
        if not row:
            return
        check_weights([(self._adapters[name], weight) for name, weight in row.items()])
        most = min(torch.finfo(delta.weight.dtype).max for delta in self._layers.values())
        largest = sum(abs(weight) * self._adapters[name].strength for name, weight in row.items())
        if not largest <= most:
            raise MismatchError(
                said("the sum of %(row)s is not finite at these weights", row=joined(map(verbatim, row), " and ")),
                expected=said("numbers up to %(most)s", most=f"{most:.3g}"),
                got=said("%(row)s, which may make %(largest)s", row=dict(row), largest=f"{largest:.3g}"),
                remedy="lower the weights, or load the model in bfloat16 or float32",
            )

    def add(self, name: str, adapter: Adapter) -> None:
        """Add an adapter, which no picture uses until `compose` names it; the current compositions stay as they are.

        Raises:
            MismatchError: the name is taken, or the adapter is not of the others' basis, or not of this denoiser's.
        """
        if name in self._adapters:
            raise MismatchError(
                "adapter name in use",
                expected=f"none of {sorted(self._adapters)}",
                got=name,
                remedy="choose another name, or remove that adapter first",
            )
        self._take({**self._adapters, name: adapter})

    def remove(self, name: str) -> None:
        """Remove an adapter, also from the current compositions; the others' weights stay.

        Raises:
            MismatchError: no such adapter.
        """
        if name not in self._adapters:
            raise MismatchError("no such adapter", expected=f"one of {sorted(self._adapters)}", got=name)
        self._adapters.pop(name)
        self._rows = [{other: weight for other, weight in row.items() if other != name} for row in self._rows]
        for names in [names for names in self._projected if name in names]:
            del self._projected[names]
        self._stack()
        self._write()

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._attached:
            remove_adapters(self.denoiser, [self._attached[0]])
        self._adapters, self._attached, self._layers, self._stacks = {}, None, {}, {}
        self._projected.clear()

    def _take(self, adapters: dict[str, Adapter]) -> None:
        """Replace the adapters by these; if they are refused, restore those before."""
        blank = Composition([(adapter, 1.0) for adapter in adapters.values()]).blank()
        before = self._attached
        if before is None or not _within(blank, before[1]):
            self._attach(blank)
        self._adapters = adapters
        self._stack()
        self._write()
        if before and before is not self._attached:
            remove_adapters(self.denoiser, [before[0]])

    def _attach(self, blank: Adapter) -> None:
        before = self._attached
        name = "live" if before is None or before[0] != "live" else "live again"
        try:
            attach(self.denoiser, blank, name)
        except BaseException:
            remove_adapters(self.denoiser, [name])
            if before:
                self.denoiser.set_adapter(before[0])
            raise
        self._attached = name, blank
        self._projected.clear()  # lay on the columns of what was attached before
        self._layers = {}
        for layer, found in adapted_layers(self.denoiser, name).items():
            found.lora_A[name] = self._layers[layer] = batched(found.lora_A[name])

    def _stack(self) -> None:
        if self._attached:
            self._stacks = self._stacked(list(self._adapters.values()))

    @torch.no_grad()
    def _stacked(self, adapters: Sequence[Adapter]) -> dict[str, Tensor]:
        """Return s · ΔR of each, float32, (adapters, rank * in) by layer, on the columns of what is attached."""
        assert self._attached
        attached, stacks = self._attached[1], {}
        for layer, delta in self._layers.items():
            columns = attached.columns(layer)
            width = delta.weight[0].numel()
            stack = delta.weight.new_zeros(len(adapters), len(columns), width, dtype=torch.float32)
            for place, adapter in enumerate(adapters):
                if layer in adapter.deltas:
                    rows = [columns.index(column) for column in adapter.columns(layer)]
                    stack[place, rows] = adapter.scaling * adapter.deltas[layer].to(stack)
            stacks[layer] = stack.flatten(1)
        return stacks

    def _hard_projected(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Return `_stacked` of these adapters after null-space projection at strength 1."""
        if names not in self._projected:
            projected = project_out([(self._adapters[name], 1.0) for name in names], 1.0)
            self._projected[names] = self._stacked([adapter for adapter, _ in projected])
            while len(self._projected) > CACHED_SETS:
                self._projected.popitem(last=False)
        self._projected.move_to_end(names)
        return self._projected[names]

    @torch.no_grad()
    def _write(self) -> None:
        hard: list[tuple[int, dict[str, float], dict[str, Tensor]]] = []
        table = torch.tensor([[row.get(name, 0.0) for name in self._adapters] for row in self._rows])
        for place, (row, strength) in enumerate(zip(self._rows, self._strengths, strict=True)):
            names = tuple(name for name in self._adapters if row.get(name))
            if strength and len(names) > 1:
                table[place] *= 1 - strength
                hard.append((place, {name: strength * row[name] for name in names}, self._hard_projected(names)))
        for layer, delta in self._layers.items():
            stack = self._stacks[layer]
            several = table.to(stack) @ stack
            for place, weights, projected in hard:
                several[place] += torch.tensor([*weights.values()]).to(stack) @ projected[layer]
            delta.hold(several.view(len(table), -1, delta.weight[0].numel()))


def _within(part: Adapter, whole: Adapter) -> bool:
    """Return True if an adapter's layers and columns are all in another's, so that its base weights fit."""
    return part.digests.items() <= whole.digests.items() and set(part.metadata.columns) <= set(whole.metadata.columns)
