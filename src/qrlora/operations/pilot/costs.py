"""Compute the costs of a pilot so far and of its next stage: time, energy, money, storage, trained parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qrlora.operations.pilot.line import Costs

GB = 1e9


@dataclass(frozen=True)
class Spent:
    """One piece of work: its kind (train, generate, measure), its stage, its seconds, and how many of it."""

    stage: str
    what: str
    seconds: float
    amount: int


@dataclass(frozen=True)
class Cost:
    """seconds of the machine; kwh, an estimate; money in the project's currency; bytes written."""

    seconds: float
    kwh: float
    money: float
    stored: int

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def cost_of(seconds: float, stored: int, costs: Costs) -> Cost:
    """Price some work. Energy is its time times the machine's stated power; storage is priced for a month."""
    kwh = seconds / 3600 * costs.watts / 1000
    money = kwh * costs.per_kwh + seconds / 3600 * costs.per_hour + stored / GB * costs.per_gb_month
    return Cost(seconds, kwh, money, stored)


def pace(spent: Iterable[Spent], what: str) -> float | None:
    """Return the seconds that one of `what` took in the mean (a training step, a picture); None if none was done."""
    done = [one for one in spent if one.what == what and one.amount]
    amount = sum(one.amount for one in done)
    return sum(one.seconds for one in done) / amount if amount else None


@dataclass(frozen=True)
class Parameters:
    """Trained numbers of all adapters, of LoRAs of the same rank, and of fine-tuning the adapted weights in full."""

    trained: int
    lora: int
    full: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"of_lora": self.trained / self.lora if self.lora else None}


def parameters_of(adapters: Sequence[Mapping[str, int]]) -> Parameters:
    """Add up the counts of adapters (`trained`, `lora`, `full` of each)."""
    return Parameters(*(sum(one[name] for one in adapters) for name in ("trained", "lora", "full")))


def projected(training_steps: int, pictures: int, spent: Sequence[Spent], stored: int, costs: Costs) -> Cost | None:
    """Price work that has not been done at the pace of what was: None before anything was measured.

    Args:
        stored: bytes that the pictures and adapters will take.
    """
    step, picture = pace(spent, "train"), pace(spent, "generate")
    if (training_steps and step is None) or (pictures and picture is None):
        return None
    return cost_of(training_steps * (step or 0.0) + pictures * (picture or 0.0), stored, costs)
