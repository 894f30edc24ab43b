"""Rows, tasks and sizes of the comparison: every number it depends on."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from qrlora.errors import DataError
from qrlora.pico import SETTINGS, world

BASELINE = "lora"
"""The row that all others are compared with: plain LoRA, both adapters added."""
DEFAULT = "qrlora"
"""The method that this package trains by default: disjoint columns for subject and style."""
COMPOSED = f"{DEFAULT}+null_space"
"""The row that this package composes by, by default."""


@dataclass(frozen=True)
class Row:
    """A row of the table: a training method (``baselines.adapters.ADAPTERS``) and how two of its adapters are merged
    (``baselines.merges.MERGES``, or "joint": one adapter trained on both). options: of the merge."""

    name: str
    adapter: str
    merge: str = "sum"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def joint(self) -> bool:
        """Return True if subject and style are trained together and nothing is merged."""
        return self.merge == "joint"

    @property
    def rated(self) -> str:
        """The name its learning rates are stored under: joint training has its own."""
        return self.name if self.joint else self.adapter


_ADAPTERS = (
    *("lora", "pissa", "oft", "mica", "full"),
    *(DEFAULT, "qrlora_published", "qrlora_dense", "qrlora_trained", "q_random", "q_activation", "q_cayley"),
)
_MERGES = ("null_space", "ziplora", "klora", "blora", "ties", "joint")
ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        *(Row(name, name) for name in _ADAPTERS),
        *(Row(f"{BASELINE}+{merge}", BASELINE, merge) for merge in _MERGES),
        Row(COMPOSED, DEFAULT, "null_space"),
        Row(f"{BASELINE}+null_space_hard", BASELINE, "null_space", {"strength": 1.0}),
    )
}
"""Name -> row. Adapters alone stand for their direct sum."""


Rates = dict[str, dict[str, dict[str, float]]]
"""Method -> role -> half of the parts -> learning rate; row of joint training -> the subject's half -> the style's ->
learning rate."""
Balance = dict[str, dict[str, tuple[float, float]]]
"""Row -> pair, as `key_of` has it -> weights of subject and style in a composition."""
ANY = "any"
"""The key of all pairs that are not of reserved parts."""


@dataclass(frozen=True)
class Scope:
    """Rows, tasks and sizes of a run. Steps, batch, rank and noise levels are the demo's, the same for all methods.

    lessons: pictures that a part is trained on. pictures: of every composed pair; alone: of every adapter alone.
    grid_weights: of both, in the frontier. rates, balance: as the functions of these names have them.
    """

    rows: tuple[str, ...] = tuple(ROWS)
    subjects: tuple[str, ...] = world.RESERVED_SUBJECTS
    styles: tuple[str, ...] = world.RESERVED_STYLES
    seeds: tuple[int, ...] = (0, 1, 2)
    lessons: int = 1
    steps: int = 240
    batch_size: int = 4
    rank: int = 16
    pictures: int = 8
    alone: int = 11
    denoising_steps: int = SETTINGS["steps"]
    guidance: float = SETTINGS["guidance"]
    grid_rows: tuple[str, ...] = (BASELINE, "qrlora_published", DEFAULT, COMPOSED)
    grid_pairs: int = 4
    grid_weights: tuple[float, ...] = (0.7, 1.0, 1.4, 2.0)
    many_rows: tuple[str, ...] = (
        *(BASELINE, "lora+ties", "lora+null_space"),
        *("qrlora_published", DEFAULT, COMPOSED, "q_random"),
    )
    many: tuple[int, ...] = (2, 4, 8)
    rates: Rates = field(default_factory=lambda: rates())
    balance: Balance = field(default_factory=lambda: balance())

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every subject with every style."""
        return [(subject, style) for subject in self.subjects for style in self.styles]


SMALL: dict[str, Any] = {
    "rows": (BASELINE, "qrlora_published", DEFAULT),
    "subjects": ("teapot", "rocket"),
    "styles": ("chalk", "candy"),
    "seeds": (0,),
    "steps": 60,
    "pictures": 4,
    "alone": 4,
    "grid_pairs": 0,
    "many": (),
}
"""The fields that ``--small`` changes: minutes instead of a night, and too little to say anything about the methods."""


def scope_of(options: Any) -> Scope:
    """Return the plan that the command line asks for. Raises DataError for a name that the lab does not have."""
    fields: dict[str, Any] = dict(SMALL) if options.small else {}
    known = {"rows": tuple(ROWS), "subjects": world.RESERVED_SUBJECTS, "styles": world.RESERVED_STYLES}
    for name, names in known.items():
        if getattr(options, name) is not None:
            fields[name] = chosen(name.rstrip("s"), getattr(options, name), names)
    fields |= {
        n: getattr(options, n) for n in ("seeds", "lessons", "steps", "pictures") if getattr(options, n) is not None
    }
    if (lessons := fields.get("lessons", 1)) > 1:
        fields |= {"rates": rates(lessons), "balance": balance(lessons)}
    return Scope(**fields)


def chosen(noun: str, wanted: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Return the names asked for, each once. Raises DataError for one that is not known, with the nearest that is."""
    names = tuple(dict.fromkeys(wanted))
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            remedy = f"did you mean {near[0]!r}?" if near else None
            raise DataError(f"no {noun} {name!r} in the lab", expected=", ".join(known), got=name, remedy=remedy)
    if not names:
        raise DataError(f"the lab needs a {noun}", expected=", ".join(known), got="none")
    return names


def rates(lessons: int = 1) -> Rates:
    """The packaged learning rates; ``qrlora lab compare --tune`` chose them on none of the half that they are for."""
    return _packaged(lessons)["chosen"]


def balance(lessons: int = 1) -> Balance:
    """The weights of compositions that the package has, chosen like the rates."""
    return {
        row: {key: (float(a), float(b)) for key, (a, b) in found.items()}
        for row, found in _packaged(lessons)["balance"].items()
    }


def rates_file(lessons: int) -> str:
    """Return the name of the file of rates and weights: one picture and several want others."""
    return "rates.json" if lessons == 1 else f"rates-of-{lessons}.json"


def _packaged(lessons: int) -> dict[str, Any]:
    file = files("qrlora.lab.compare").joinpath(rates_file(lessons))
    nothing: dict[str, Any] = {"chosen": {}, "balance": {}}
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else nothing


def half_of(role: str, name: str | None) -> str:
    """The half of a part: reserved ones are "even" and "odd" in turn; any other name is "even"."""
    names = world.RESERVED_SUBJECTS if role == "subject" else world.RESERVED_STYLES
    return "odd" if name in names and names.index(name) % 2 else "even"


def key_of(subject: str | None, style: str | None) -> str:
    """ "teapot in chalk" of reserved parts, ANY of others."""
    reserved = subject in world.RESERVED_SUBJECTS and style in world.RESERVED_STYLES
    return f"{subject} in {style}" if reserved else ANY


def rate_of(adapter: str, role: str, name: str | None, known: Rates | None = None) -> float:
    """The learning rate for one part, by `known` or as packaged. Raises DataError if the method has not been tuned."""
    return _rates_of(adapter, known)[role][half_of(role, name)]


def joint_rate_of(row: str, subject: str, style: str, known: Rates | None = None) -> float:
    """The learning rate of a row that trains on subject and style together; else as `rate_of`."""
    return _rates_of(row, known)[half_of("subject", subject)][half_of("style", style)]


def _rates_of(name: str, known: Rates | None) -> dict[str, dict[str, float]]:
    known = rates() if known is None else known
    if name not in known:
        remedy = f"qrlora lab compare --tune --rows {name}"
        raise DataError(f"{name} has no learning rate yet", expected=", ".join(known), got=name, remedy=remedy)
    return known[name]


def balance_of(row: str, subject: str | None, style: str | None, known: Balance | None = None) -> tuple[float, float]:
    """Weights of a subject and a style in a row's composition of them. Raises DataError if they were never chosen."""
    known = balance() if known is None else known
    if row not in known:
        remedy = f"qrlora lab compare --tune --rows {row}"
        raise DataError(f"{row} has no weights yet", expected=", ".join(known), got=row, remedy=remedy)
    return known[row][key_of(subject, style)]
