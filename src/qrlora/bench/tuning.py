"""The learning rate of every method and role, on seen subjects and styles alone: ``qrlora bench --tune``.

Reserved parts, which the bench is about, have no part in this. Every method gets as many rates, lessons, steps and
pictures as every other; for each role the rate is taken at which its adapter alone has the best mean of `named` and
`both`. Only the ladder's place differs where a method is known to want smaller steps: all weights at once, rotations,
and starts from large singular values.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from qrlora.bench.cells import Cell, digest_of, weights_digest
from qrlora.bench.plan import Scope
from qrlora.bench.run import Say, adapters_of, known_records, rounded, run_stages
from qrlora.files import write_atomically

LADDER = (5e-4, 1.5e-3, 5e-3)
LADDERS = {
    "lora": (1.5e-4, 5e-4, 1.5e-3),
    "pissa": (1.5e-4, 5e-4, 1.5e-3),
    "olora": (1.5e-4, 5e-4, 1.5e-3),
    "qrlora_trained": (1.5e-4, 5e-4, 1.5e-3),
    "oft": (1.5e-4, 5e-4, 1.5e-3),
    "full": (5e-5, 1.5e-4, 5e-4),
}
SEEN = {"subject": ("sneaker", "guitar"), "style": ("neon", "watercolour")}
"""What is taught: seen in pretraining, called by a trigger that was not."""
RATES = Path(__file__).with_name("rates.json")


def cells_of(scope: Scope, lessons: int) -> list[Cell]:
    """Each adapter alone, at each of its rates, of the first ``lessons`` of SEEN of each role."""
    return [
        Cell("alone", adapter, 0, *((name, "") if role == "subject" else ("", name)), rate=rate)
        for adapter in adapters_of(scope)
        for role, names in SEEN.items()
        for name in names[:lessons]
        for rate in LADDERS.get(adapter, LADDER)
    ]


def tune(folder: Path, scope: Scope, workers: int, say: Say, command: str, lessons: int = 1) -> dict[str, Any]:
    """Choose, and write RATES: what was chosen, for those adapters that the rows need, beside what was there.

    What is there of another base model or judge is dropped.
    """
    scope = replace(scope, seeds=(0,))
    cells = cells_of(scope, lessons)
    run_stages(folder, scope, [cells], workers, say)
    known = known_records(folder, scope, cells)
    tried = [known[digest_of(cell, scope)] for cell in cells]
    found: dict[str, Any] = {"weights": weights_digest(), "command": command, "chosen": choose(tried), "tried": tried}
    if RATES.exists():
        old = json.loads(RATES.read_text())
        if old.get("weights") == found["weights"]:
            others = [one for one in old["tried"] if one["adapter"] not in found["chosen"]]
            found["tried"], found["chosen"] = others + tried, old["chosen"] | found["chosen"]
    write_atomically(RATES, (json.dumps(rounded(found)).replace('{"kind"', '\n{"kind"') + "\n").encode())
    return found["chosen"]


def choose(tried: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Method -> role -> the rate with the best score, in the mean over lessons; the lower of two equal ones."""
    scores: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in tried:
        role = "subject" if record.get("subject") else "style"
        measured = record["measured"]
        scores[record["adapter"], role][record["rate"]].append((measured["named"] + measured["both"]) / 2)
    chosen: dict[str, dict[str, float]] = defaultdict(dict)
    for (adapter, role), rates in scores.items():
        chosen[adapter][role] = max(sorted(rates), key=lambda rate: fmean(rates[rate]))
    return dict(chosen)
