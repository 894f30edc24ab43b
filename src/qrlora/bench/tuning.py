"""The learning rate of every method and role: ``qrlora bench --tune``.

Every method gets as many rates, lessons, steps and pictures as every other; the rate is taken at which its adapter
alone has the best mean of `named` and `both`. No part is measured at a rate that it helped to choose. Subjects are
tuned on a seen one. For styles that was found not to do: a style that pico knows has only to be called, at a rate at
which a new one is not learned. So the reserved styles are halved, and the rate of each half comes from one of the other
half.

Only the ladder's place differs where a method is known to want smaller steps: all weights at once, rotations, and what
starts from both factors or large singular values.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qrlora.bench.cells import Cell, digest_of, weights_digest
from qrlora.bench.plan import ROWS, Rates, Scope
from qrlora.bench.run import Say, adapters_of, known_records, missing, rounded, run_stages
from qrlora.evaluation.rivals.adapters import ADAPTERS
from qrlora.files import write_atomically

LADDER = {"subject": (5e-4, 1.5e-3, 5e-3), "style": (1.5e-3, 5e-3)}
SLOWER = {"lora": 0.3, "pissa": 0.3, "olora": 0.3, "qrlora_trained": 0.3, "oft": 0.3, "full": 0.1}
SLOWER |= {"q_free_4": 0.3, "q_cayley": 0.3}
"""Method -> what its ladder is multiplied with."""
LESSONS = {
    "subject": {"even": "sneaker", "odd": "sneaker"},
    "style": {"even": "gold", "odd": "candy"},
}
"""Role -> half of the reserved parts -> what is taught to choose its rate: nothing of that half."""
FILE = "rates.json"


def cells_of(scope: Scope) -> list[Cell]:
    """Each adapter alone, at each of its rates."""
    return [
        Cell("alone", adapter, 0, *((name, "") if role == "subject" else ("", name)), rate=rate)
        for adapter in adapters_of(scope)
        for role, halves in LESSONS.items()
        for name in dict.fromkeys(halves.values())
        for rate in ladder(adapter, role)
    ]


def ladder(adapter: str, role: str) -> list[float]:
    """The rates tried."""
    return [float(f"{rate * SLOWER.get(adapter, 1):.2g}") for rate in LADDER[role]]


def tuned(folder: Path, scope: Scope, workers: int, say: Say, command: str) -> Scope:
    """The plan with rates for all its methods: the folder's before the package's, and those that neither has chosen
    now."""
    scope = replace(scope, rates=scope.rates | _kept(folder)["chosen"])
    untuned = [adapter for adapter in adapters_of(scope) if adapter not in scope.rates]
    if not untuned:
        return scope
    say(f"no learning rates yet for {', '.join(untuned)}: chosen first")
    rows = tuple(row for row in ROWS if row in untuned)
    return replace(scope, rates=scope.rates | tune(folder, replace(scope, rows=rows), workers, say, command))


def tune(folder: Path, scope: Scope, workers: int, say: Say, command: str) -> Rates:
    """Choose, and keep in the folder's FILE what was tried and chosen for the rows' methods, beside what was there.

    What is there of another base model or judge is dropped, and of a method that has changed since.
    """
    scope = replace(scope, seeds=(0,))
    cells = cells_of(scope)
    run_stages(folder, scope, [missing(folder, scope, cells)], workers, say)
    known = known_records(folder, scope, cells)
    tried = [known[digest_of(cell, scope)] for cell in cells]
    chosen, old = choose(tried), _kept(folder)
    found = {
        "weights": weights_digest(),
        "command": command,
        "chosen": old["chosen"] | chosen,
        "versions": {adapter: ADAPTERS[adapter].version for adapter in old["chosen"] | chosen},
        "tried": [one for one in old["tried"] if one["adapter"] not in chosen] + tried,
    }
    write_atomically(folder / FILE, (json.dumps(rounded(found)).replace('{"kind"', '\n{"kind"') + "\n").encode())
    return chosen


def _kept(folder: Path) -> dict[str, Any]:
    """What an earlier run chose in this folder, of this base model and judge, for methods as they are now."""
    file = folder / FILE
    old = json.loads(file.read_text()) if file.exists() else {}
    if old.get("weights") != weights_digest():
        return {"chosen": {}, "tried": []}
    versions = old.get("versions", {})  # of files from before there were any, all are 1
    same = {name for name in old["chosen"] if name in ADAPTERS and ADAPTERS[name].version == versions.get(name, 1)}
    chosen = {name: rates for name, rates in old["chosen"].items() if name in same}
    return old | {"chosen": chosen, "tried": [one for one in old["tried"] if one["adapter"] in same]}


def choose(tried: Sequence[dict[str, Any]]) -> Rates:
    """Method -> role -> half -> the rate with the best score on that half's lesson; the lower of two equal ones."""
    scores: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for record in tried:
        measured = record["measured"]
        name = record.get("subject") or record["style"]
        scores[record["adapter"], name][record["rate"]] = (measured["named"] + measured["both"]) / 2
    adapters = dict.fromkeys(adapter for adapter, _ in scores)
    best = {key: max(sorted(rates), key=lambda rate: rates[rate]) for key, rates in scores.items()}
    return {
        adapter: {
            role: {half: best[adapter, name] for half, name in halves.items()} for role, halves in LESSONS.items()
        }
        for adapter in adapters
    }
