"""What the demo found, as JSON values: report.json."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from qrlora.apps.demo.flow import PARTS, Answer, Outcome
from qrlora.apps.demo.plan import AIM, DEFAULT, GIVING_WAY, METHODS, TUNED, Lesson, weights_of
from qrlora.lab.compare.plan import rate_of

AIMS = {
    "composed": "composed: pictures that show both subject and style",
    "subject_alone": "subject alone: pictures that show it, in the style asked for",
    "style_alone": "style alone: pictures in it, of the subject asked for",
}
"""Set of pictures -> what both parts being right means there."""
PACKAGES = ("qrlora", "torch", "peft", "diffusers", "transformers")


def data(outcome: Outcome) -> dict[str, Any]:
    """Everything a program may want to know of a run. Parameters and file sizes are the subject adapter's."""
    budget, setting, sizes = outcome.setting.budget, outcome.setting, outcome.file_bytes
    parameters = {method: pair[0].parameters().trained for method, pair in outcome.learned.items()}
    return {
        "command": outcome.command,
        "model": setting.model,
        "seed": setting.seed,
        "subject": _lesson(outcome.subject),
        "style": _lesson(outcome.style),
        "budget": {**vars(budget), "weights": list(budget.weights)},
        "methods": {name: fields | _tuned(outcome, name) for name, fields in METHODS.items()},
        "parameters": {**parameters, "ratio": parameters[DEFAULT] / parameters["lora"]},
        "file_bytes": {**sizes, "ratio": sizes["compact"] / sizes["plain_lora"]},
        "scores": {
            method: {**{name: _shares(answer) for name, answer in sets.items()}, "crosstalk": crosstalk(sets)}
            for method, sets in outcome.answers.items()
        },
        "base_model_alone": _shares(outcome.base),
        "aims": {name: _aim(outcome, name) for name in AIMS},
        "interference": outcome.interference,
        "seconds": {name: round(value, 2) for name, value in setting.seconds.items()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of Python and of what decides the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def crosstalk(sets: dict[str, Answer]) -> dict[str, float | None]:
    """What each part loses in company: alone minus composed. "both": mean of the two alone, minus composed."""
    composed = {part: _value(sets["composed"], part) for part in PARTS}
    alone = {part: _value(sets[f"{part}_alone"], part) for part in ("subject", "style")}
    both = [_value(sets[name], "both") for name in ("subject_alone", "style_alone")]
    alone["both"] = None if both[0] is None or both[1] is None else (both[0] + both[1]) / 2
    return {part: _less(alone[part], composed[part]) for part in PARTS}


def _less(alone: float | None, composed: float | None) -> float | None:
    return None if alone is None or composed is None else alone - composed


def _value(answer: Answer, part: str) -> float | None:
    share = answer.share(part)
    return None if share is None else share.value


def _tuned(outcome: Outcome, method: str) -> dict[str, Any]:
    lessons = (outcome.subject, outcome.style)
    weights = zip(lessons, weights_of(method, outcome.subject, outcome.style), strict=True)
    return {
        "learning_rates": {one.role: rate_of(TUNED[method], one.role, one.name) for one in lessons},
        "weights": {one.role: weight for one, weight in weights},
        "giving_way": GIVING_WAY.get(method, 0.0),
    }


def _lesson(lesson: Lesson) -> dict[str, Any]:
    return {"name": lesson.name, "picture": lesson.file.name, "caption": lesson.caption, "shows": lesson.about}


def _shares(answer: Answer) -> dict[str, Any]:
    """Each part's share and that of pictures recognised (None if not known), n, the 95 % intervals, and the likeness to
    the user's own subject."""
    shares = {part: answer.share(part) for part in (*PARTS, "recognised")}
    intervals = {part: list(share.interval) for part, share in shares.items() if share is not None}
    found: dict[str, Any] = {part: _value(answer, part) for part in shares}
    found |= {"n": len(answer.wanted), "interval": intervals}
    return found if answer.likeness is None else {**found, "likeness": answer.likeness}


def _aim(outcome: Outcome, name: str) -> dict[str, Any]:
    value = _value(outcome.answers[DEFAULT][name], "both")
    return {"what": AIMS[name], "target": AIM, "value": value, "reached": None if value is None else value >= AIM}
