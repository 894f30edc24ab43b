"""The ways to merge several ΔW that the bench compares, and sampling with the result.

    merged = MERGES["null_space"]([subject, style], context, strength=1.0)
    with drawing(denoiser, merged) as on_step:
        one_batch(pipe, family, jobs, on_step=on_step)

A merge takes ΔW of any adapters and gives ΔW, or for K-LoRA a schedule of them. Strengths are the caller's: scale the
parts (`deltas.scaled`) or what comes out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from peft.utils import merge_utils
from torch import nn

from qrlora.errors import MismatchError
from qrlora.lab.baselines.context import Context
from qrlora.lab.baselines.deltas import Delta, Learned, Overlay, total
from qrlora.lab.baselines.ziplora import zipped
from qrlora.method.composition.null_space import DEFAULT_STRENGTH, project_rows, row_space
from qrlora.models.generation import OnStep

DENSITY = 0.5
"""The share of entries that TIES keeps of each part and layer."""
ALPHA, BETA, DEFAULT_K = 1.5, 0.5, 256
"""Constants of K-LoRA, as in its paper; DEFAULT_K entries are compared where a ΔW has no rank to derive it from."""


@runtime_checkable
class Schedule(Protocol):
    """ΔW that changes while a picture is made."""

    def at(self, progress: float) -> Learned:
        """Return the ΔW to use when this share of the denoising steps is done: from 0 (noise alone) to 1."""


Combine = Callable[..., "Learned | Schedule"]
"""(parts, context, **options)"""


@dataclass(frozen=True)
class Merge:
    """A merge of the comparison.

    Attributes:
        several: takes any number of parts; otherwise two, subject and style.
        once: transforms each part, if the same for all weights: the parts are then summed at any weights.
        version: raised whenever the same parts would be merged otherwise than before, as a method's.
    """

    name: str
    about: str
    source: str
    combine: Combine
    several: bool = False
    once: Callable[..., list[Learned]] | None = None
    version: int = 1

    def __call__(self, parts: Sequence[Learned], context: Context | None = None, **options: Any) -> Learned | Schedule:
        """Merge these parts. Raises MismatchError for a number of parts that it does not take."""
        if len(parts) != 2 and not (self.several and parts):
            expected = "one part or more" if self.several else "two parts, subject and style"
            raise MismatchError(f"{self.name} cannot merge these", expected=expected, got=len(parts))
        return self.combine(parts, context, **options)


def direct_sum(parts: Sequence[Learned], context: Context | None = None) -> Learned:
    """Return Σ ΔWᵢ, exact, as loading LoRAs side by side computes it."""
    return _layerwise(parts, total)


def null_space(
    parts: Sequence[Learned], context: Context | None = None, *, strength: float = DEFAULT_STRENGTH
) -> Learned:
    """Null-space projection as the package composes by (`method.composition.null_space`), for ΔW of any method.

    strength: share of each ΔW taken out of the row spaces of the others; 1 is NP-LoRA's hard projection of every part.
    """

    def combine(own: Sequence[Delta]) -> Delta:
        projected = project_rows([delta.rows for delta in own], [row_space(delta.reads) for delta in own], strength)
        return total([delta.with_rows(rows) for delta, rows in zip(own, projected, strict=True)])

    return _layerwise(parts, combine)


def ziplora(parts: Sequence[Learned], context: Context, **options: Any) -> Learned:
    """Return the sum of the parts after `zipped`."""
    return direct_sum(zipped(parts, context, **options))


def ties(parts: Sequence[Learned], context: Context | None = None) -> Learned:
    """TIES (Yadav et al. 2023, arXiv 2306.01708) by PEFT's own function, on ΔW itself rather than on the factors:
    the DENSITY largest entries of each, the sign that has more weight, the mean of those that agree with it.
    """

    def combine(own: Sequence[Delta]) -> Delta:
        return Delta(matrix=merge_utils.ties([delta.dense() for delta in own], torch.ones(len(own)), DENSITY))

    return _layerwise(parts, combine)


def _layerwise(parts: Sequence[Learned], combine: Callable[[Sequence[Delta]], Delta]) -> Learned:
    """Combine what the parts have of each layer."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: combine([part[name] for part in parts if name in part]) for name in names}


@dataclass(frozen=True)
class KLora:
    """K-LoRA's choice in every layer: the subject's ΔW until ALPHA · progress + BETA is more than `ratios[layer]`."""

    subject: Learned
    style: Learned
    ratios: dict[str, float]

    def at(self, progress: float) -> Learned:
        """Return the ΔW at this progress, as `Schedule` asks for it."""
        scale = ALPHA * progress + BETA
        chosen = {name: self.subject if ratio >= scale else self.style for name, ratio in self.ratios.items()}
        return self.subject | self.style | {name: part[name] for name, part in chosen.items()}


def klora(parts: Sequence[Learned], context: Context | None = None) -> Schedule:
    """K-LoRA (Ouyang et al. 2025, arXiv 2502.18461): in each layer and step one of the two, whose largest entries
    weigh more: S_c, S_s are the sums of the K largest |ΔW|, and the subject is taken if S_c >= γ (α t / T + β) S_s.

    γ = Σ |ΔW_c| / Σ |ΔW_s| over all layers; α, β and K = r_c r_s (as many entries as the product of the ranks) are
    the paper's. Adapted: the paper chooses in attention layers; here every target matrix of both streams
    of an MMDiT, feed-forward too, makes its own choice.
    """
    subject, style = parts
    magnitudes = [sum(float(delta.dense().abs().sum()) for delta in part.values()) for part in (subject, style)]
    gamma = magnitudes[0] / max(magnitudes[1], torch.finfo(torch.float32).tiny)
    ratios = {}
    for name in subject.keys() & style.keys():
        a, b = subject[name], style[name]
        factored = a.factors is not None and b.factors is not None
        count = a.rank * b.rank if factored else DEFAULT_K
        ratios[name] = _largest(a, count) / max(gamma * _largest(b, count), torch.finfo(torch.float32).tiny)
    return KLora(subject, style, ratios)


def _largest(delta: Delta, k: int) -> float:
    entries = delta.dense().abs().flatten()
    return float(entries.topk(min(k, entries.numel())).values.sum())


def blora(parts: Sequence[Learned], context: Context | None = None) -> Learned:
    """B-LoRA (Frenkel et al. 2024, arXiv 2403.14572) and SplitFlux (arXiv 2511.15258): a part only in its own blocks.

    The papers find them by prompting blocks apart: in SDXL's UNet the fourth and fifth for content and style, in FLUX's
    single-stream blocks early ones for content and later ones for style. Adapted to an MMDiT of joint blocks: numbered
    in the order of the network, the subject has the first half and the style the rest. (The papers also train in those
    blocks alone.)
    """
    subject, style = parts
    blocks = blocks_of(subject | style)
    count = max(blocks.values(), default=-1) + 1
    own = {name: subject if block < (count + 1) // 2 else style for name, block in blocks.items()}
    return {name: part[name] for name, part in own.items() if name in part}


def blocks_of(learned: Learned) -> dict[str, int]:
    """Layer -> number of its block: what its name begins with up to the first number, counted as they come."""
    starts = {name: match[0] if (match := re.match(r"\D*\d+", name)) else name for name in learned}
    number = {start: i for i, start in enumerate(dict.fromkeys(starts.values()))}
    return {name: number[start] for name, start in starts.items()}


_ROWS = (
    Merge("sum", "both added", "loading LoRAs side by side", direct_sum, several=True),
    Merge(
        "null_space",
        "each less a share of what lies in the other's row space",
        "after NP-LoRA, arXiv 2511.11051",
        null_space,
        several=True,
    ),
    Merge("ties", "trimmed, one sign elected", "arXiv 2306.01708", ties, several=True),
    Merge(
        "ziplora",
        "a learned coefficient for every column",
        "arXiv 2311.13600",
        ziplora,
        once=zipped,
        several=True,
        version=2,
    ),
    Merge("klora", "one of the two, by layer and step", "arXiv 2502.18461", klora),
    Merge("blora", "the subject in some blocks, the style in the others", "arXiv 2403.14572, arXiv 2511.15258", blora),
)
MERGES: dict[str, Merge] = {row.name: row for row in _ROWS}
"""Name -> merge. Joint training, the ceiling, is `compare.cells.joint`."""


@contextlib.contextmanager
def drawing(denoiser: nn.Module, merged: Learned | Schedule) -> Iterator[OnStep]:
    """Put the merge's result into the denoiser's weights while the block runs; restore them bit for bit.

    Yields what `generation.one_batch` is to call after every step (`on_step`): a schedule changes the weights there,
    and begins anew after the last step, for the next batch.
    """
    overlay = Overlay(denoiser)
    schedule = None if isinstance(merged, dict) else merged

    def on_step(done: int, steps: int) -> None:
        if schedule is not None:
            overlay.show(schedule.at(done / steps if done < steps else 0.0))

    try:
        overlay.show(merged if isinstance(merged, dict) else merged.at(0.0))
        yield on_step
    finally:
        overlay.lift()
