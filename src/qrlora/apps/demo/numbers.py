"""Write the demo's results as JSON values: report.json."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

from qrlora.apps.demo.flow import PARTS, Answer, Outcome
from qrlora.apps.demo.plan import AIM, DEFAULT, METHODS, Task, null_space_of, weights_of
from qrlora.lab.compare.plan import rate_of
from qrlora.lab.tasks import RECIPES, crosstalk

AIMS = {
    "composed": "composed: pictures that show both subject and style",
    "subject_alone": "subject alone: pictures that show it, in the style asked for",
    "style_alone": "style alone: pictures in it, of the subject asked for",
}
"""Set of pictures -> what both parts being right means there."""
PACKAGES = ("qrlora", "torch", "peft", "diffusers", "transformers")


def data(outcome: Outcome) -> dict[str, Any]:
    """Return the results of a run as JSON values. Parameters and file sizes are the subject adapter's."""
    budget, setting, sizes = outcome.setting.budget, outcome.setting, outcome.file_bytes
    parameters = {method: pair[0].parameters().trained for method, pair in outcome.learned.items()}
    return {
        "command": outcome.command,
        "model": setting.model,
        "seed": setting.seed,
        "subject": _lesson(outcome.subject),
        "style": _lesson(outcome.style),
        "budget": {**vars(budget), "weights": list(budget.weights)},
        "methods": {name: RECIPES[name] | _tuned(outcome, name) for name in METHODS},
        "parameters": {**parameters, "ratio": parameters[DEFAULT] / parameters["lora"]},
        "file_bytes": {**sizes, "ratio": sizes["compact"] / sizes["plain_lora"]},
        "scores": {
            method: {**{name: _shares(answer) for name, answer in sets.items()}, "crosstalk": crosstalk_of(sets)}
            for method, sets in outcome.answers.items()
        },
        "base_model_alone": _shares(outcome.base),
        "aims": {name: _aim(outcome, name) for name in AIMS},
        "interference": outcome.interference,
        "seconds": {name: round(value, 2) for name, value in setting.seconds.items()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def crosstalk_of(sets: dict[str, Answer]) -> dict[str, float | None]:
    """Return `lab.tasks.crosstalk` of one method's pictures."""
    alone = {part: sets[f"{part}_alone"].among.get(part) for part in ("subject", "style")}
    return crosstalk(alone, sets["composed"].among)


def _value(answer: Answer, part: str) -> float | None:
    share = answer.share(part)
    return None if share is None else share.value


def _tuned(outcome: Outcome, method: str) -> dict[str, Any]:
    tasks = (outcome.subject, outcome.style)
    weights = zip(tasks, weights_of(method, outcome.subject, outcome.style), strict=True)
    return {
        "learning_rates": {one.role: rate_of(method, one.role, one.name) for one in tasks},
        "weights": {one.role: weight for one, weight in weights},
        "null_space": null_space_of(method, outcome.learned[method]),
    }


def _lesson(task: Task) -> dict[str, Any]:
    return {"name": task.name, "picture": task.file.name, "caption": task.caption, "shows": task.about}


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
