"""Identify one measurement of the comparison by names and numbers, and by the digest of all that decides its record.

The digest covers the weights of base model and judge, the plan's numbers, the learning rates, and the versions of
method and merge: a record of another model is never taken for one of this. Adapters and pictures do not depend on the
judge: another one, or another measure, looks at the pictures that are there.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import qrlora.pico as pico
from qrlora.lab.baselines.adapters import ADAPTERS
from qrlora.lab.baselines.merges import MERGES
from qrlora.lab.compare.plan import ROWS, Scope, balance_of, joint_rate_of, rate_of
from qrlora.pico.judge import WEIGHTS

VERSION = 2
"""Version of what a record means: old records are not taken for new ones, old pictures are."""
MADE = 1
"""Version of how adapters and pictures are made."""
Record = dict[str, Any]
MAKING = ("train", "once")
"""Kinds of cells that make what others look at, and look at nothing."""


@dataclass(frozen=True)
class Cell:
    """One measurement. kind: a key of KINDS. row: of ROWS ("" for an adapter's own cells); adapter: its method.

    rates, weights: instead of the tuned ones, for tuning: of the subject, then of the style, as far as there are both.
    """

    kind: str
    adapter: str
    seed: int
    subject: str = ""
    style: str = ""
    row: str = ""
    many: int = 0
    rates: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()

    @property
    def said(self) -> str:
        """Return its text for a reader: "pair lora+ties teapot chalk seed 0"."""
        parts = (self.kind, self.row or self.adapter, self.subject, self.style, f"{self.many or ''}")
        at = "".join(f" at {', '.join(f'{x:g}' for x in each)}" for each in (self.rates, self.weights) if each)
        return " ".join(part for part in parts if part) + f" seed {self.seed}{at}"

    def rate(self, role: str) -> float | None:
        """Return the learning rate that replaces the tuned one, if any."""
        return self.rates[0 if role == "subject" else -1] if self.rates else None

    def training(self, subject: str = "", style: str = "") -> Cell:
        """Return the cell of an adapter that this one measures."""
        rate = self.rate("subject" if subject else "style")
        return Cell("train", self.adapter, self.seed, subject, style, rates=(rate,) if rate else ())


@functools.cache
def weights_digest(judged: bool = True) -> str:
    """Return the digest of the weights of pico and its judge."""
    digest = hashlib.sha256()
    judges = [WEIGHTS / "judge.safetensors", WEIGHTS / "judge.json"] if judged else []
    for file in sorted(pico.path().rglob("*.safetensors")) + judges:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def digest_of(cell: Cell, scope: Scope, judged: bool = True) -> str:
    """Return the digest of everything that decides the cell's record or, not judged, its adapter or pictures."""
    judged = judged and cell.kind not in MAKING
    version = VERSION if judged else MADE
    decides: dict[str, Any] = {"version": version, "weights": weights_digest(judged), "cell": cell.__dict__}
    decides |= {name: getattr(scope, name) for name in ("steps", "batch_size", "rank")}
    decides |= {"lessons": scope.lessons} if scope.lessons > 1 else {}
    each = cell.many // 2
    parts = {"subject": scope.subjects[:each], "style": scope.styles[:each]}
    names = [(role, name) for role in parts for name in (parts[role] if each else [getattr(cell, role)]) if name]
    decides["rates"] = rates_of(cell, names, scope)
    if cell.kind not in MAKING:
        count = {"alone": "alone", "grid": "grid_weights"}.get(cell.kind, "pictures")
        decides |= {name: getattr(scope, name) for name in ("denoising_steps", "guidance", count)}
    if cell.many:
        decides["among"] = names
    if cell.row:
        decides["options"] = dict(ROWS[cell.row].options)
    if cell.row and cell.kind not in ("grid", *MAKING):
        subjects, styles = ([name for role, name in names if role == one] for one in parts)
        pairs = zip(subjects, styles, strict=True)
        decides["balance"] = [cell.weights or balance_of(cell.row, a, b, scope.balance) for a, b in pairs]
    decides |= _versions(cell)
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:20]


def rates_of(cell: Cell, names: Sequence[tuple[str, str]], scope: Scope) -> Sequence[float]:
    """Return the cell's own learning rates, or those tuned for these (role, name); a joint row has one for both."""
    if cell.rates:
        return cell.rates
    if cell.row and ROWS[cell.row].joint:
        return [joint_rate_of(cell.row, cell.subject, cell.style, scope.rates)]
    return [rate_of(cell.adapter, role, name, scope.rates) for role, name in names]


def _versions(cell: Cell) -> dict[str, int]:
    """Return the versions of the cell's method and merge, where one has changed since it was first measured."""
    versions = {"adapter_version": ADAPTERS[cell.adapter].version}
    if cell.row and not ROWS[cell.row].joint:
        versions["merge_version"] = MERGES[ROWS[cell.row].merge].version
    return {name: version for name, version in versions.items() if version != 1}
