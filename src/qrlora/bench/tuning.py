"""The learning rates of every method and the weights of every row's compositions: ``qrlora bench --tune``.

Every method gets as many rates, lessons, steps and pictures as every other. Taken are the two rates at which its
adapters do best on the mean of three scores, each the mean of SCORED: the subject alone, the style alone,
and their sum at the best of WEIGHTS. An adapter chosen for what it does alone can be too weak, or too strong, beside
another. Weights are then chosen at those rates, for every row.

No part is measured at a rate or weights that it helped to choose. Seen parts were found not to do: what pico knows has
only to be called, at a rate at which a new one is not learned. So the reserved subjects and styles are halved, and what
is chosen for each half comes from one of the other half; weights, for the two halves of a pair, from that pair of the
others.

Only the ladder's place differs where a method is known to want smaller steps: all weights at once, rotations, and what
starts from both factors or large singular values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from qrlora.bench.cells import Cell, Record, digest_of, weights_digest
from qrlora.bench.plan import ROWS, Balance, Rates, Scope
from qrlora.bench.run import Say, adapters_of, known_records, missing, rounded, run_stages
from qrlora.evaluation.rivals.adapters import ADAPTERS
from qrlora.evaluation.rivals.merges import MERGES
from qrlora.files import write_atomically

LADDER = {"subject": (1.5e-3, 3e-3, 6e-3), "style": (5e-4, 1.5e-3, 5e-3)}
SLOWER = {"lora": 0.3, "lora_preserve": 0.3, "pissa": 0.3, "olora": 0.3, "qrlora_trained": 0.3, "oft": 0.3, "full": 0.1}
SLOWER |= {"q_free_4": 0.3, "q_cayley": 0.3}
"""Method -> what its ladder is multiplied with."""
WEIGHTS = ((1.0, 1.0), (1.0, 0.7), (0.7, 1.0), (1.4, 0.7), (1.4, 1.0))
"""Of subject and style in a composition."""
LESSONS = {
    "subject": {"even": "rocket", "odd": "robot"},
    "style": {"even": "gold", "odd": "candy"},
}
"""Role -> half of the reserved parts -> what is taught to choose for it: nothing of that half."""
HALVES = ("even", "odd")
FILE = "rates.json"
SCORED = ("recognised", "named", "both")
"""What tuning goes by: the same question at three strictnesses, so that it is answered by weak and by good pictures."""
KEPT = (*SCORED, "p_subject", "p_style", "among_subject", "among_style")
"""What the file keeps of each measurement; the records in the folder have all."""


def cells_alone(scope: Scope) -> list[Cell]:
    """Each adapter alone, at each of its rates."""
    return [
        Cell("alone", adapter, 0, *((name, "") if role == "subject" else ("", name)), rates=(rate,))
        for adapter in adapters_of(scope)
        for role, lessons in LESSONS.items()
        for name in lessons.values()
        for rate in ladder(adapter, role)
    ]


def cells_composed(
    rows: Iterable[str], rates_of: Callable[[str, str, str], Iterable[tuple[float, float]]]
) -> list[Cell]:
    """Each row's composition of the halves' lessons, at each of WEIGHTS. rates_of: (adapter, half of the subject, half
    of the style) -> those tried."""
    return [
        Cell("pair", ROWS[row].adapter, 0, LESSONS["subject"][a], LESSONS["style"][b], row, 0, rates, weights)
        for row in rows
        for a, b in product(HALVES, repeat=2)
        for rates in rates_of(ROWS[row].adapter, a, b)
        for weights in WEIGHTS
    ]


def ladder(adapter: str, role: str) -> list[float]:
    """The rates tried."""
    return [float(f"{rate * SLOWER.get(adapter, 1):.2g}") for rate in LADDER[role]]


def rungs(adapter: str, subject: str, style: str) -> Iterator[tuple[float, float]]:
    """Every rate of a subject with every rate of a style of the same half."""
    yield from product(ladder(adapter, "subject"), ladder(adapter, "style")) if subject == style else ()


def tuned(folder: Path, scope: Scope, workers: int, say: Say, command: str) -> Scope:
    """The plan with rates and weights for all its rows: the folder's before the package's, and those that neither has
    chosen now."""
    kept = _kept(folder)
    known = replace(scope, rates=scope.rates | kept["chosen"], balance=scope.balance | kept["balance"])
    rows = tuple(row for row in scope.rows if not _is_known(row, known))
    if not rows:
        return known
    say(f"no learning rates or weights yet for {', '.join(rows)}: chosen first")
    rates, weights = tune(folder, replace(known, rows=rows), workers, say, command)
    return replace(known, rates=known.rates | rates, balance=known.balance | weights)


def _is_known(row: str, scope: Scope) -> bool:
    return ROWS[row].adapter in scope.rates and (row in scope.balance or ROWS[row].merge == "joint")


def tune(folder: Path, scope: Scope, workers: int, say: Say, command: str) -> tuple[Rates, Balance]:
    """Choose, and keep in the folder's FILE what was tried and chosen for the rows and their methods, beside what was
    there.

    What is there of another base model or judge is dropped, and of a method or merge that has changed since; and the
    weights of rows whose rates are others now.
    """
    scope = replace(scope, seeds=(0,))
    adapters = adapters_of(scope)
    alone, summed = cells_alone(scope), cells_composed(adapters, rungs)
    tried = _measured(folder, scope, [alone, summed], workers, say)
    chosen = choose(tried)
    rows = dict.fromkeys([*adapters, *(row for row in scope.rows if ROWS[row].merge != "joint")])
    others = cells_composed(rows, lambda *of: [rates_of(chosen, *of)])
    tried += _measured(folder, scope, [others], workers, say)
    weights, old = balance(tried, chosen), _kept(folder)
    stale = {adapter for adapter, rates in chosen.items() if old["chosen"].get(adapter, rates) != rates}
    still = {row: found for row, found in old["balance"].items() if ROWS[row].adapter not in stale}
    kept = [one for one in old["tried"] if one["adapter"] not in stale]
    found = {
        "weights": weights_digest(),
        "command": command,
        "chosen": old["chosen"] | chosen,
        "balance": still | weights,
        "versions": _versions(old["chosen"] | chosen, still | weights),
        "tried": list({one["digest"]: one for one in kept + [_brief(one) for one in tried]}.values()),
    }
    write_atomically(folder / FILE, (json.dumps(rounded(found)).replace('{"kind"', '\n{"kind"') + "\n").encode())
    return chosen, weights


def _brief(record: Record) -> Record:
    return record | {"measured": {name: record["measured"][name] for name in KEPT}}


def _measured(folder: Path, scope: Scope, stages: Sequence[list[Cell]], workers: int, say: Say) -> list[Record]:
    """Every record of these cells. An adapter that two of them need is taught in the stage before."""
    cells = [cell for stage in stages for cell in stage]
    run_stages(folder, scope, [missing(folder, scope, stage) for stage in stages], workers, say)
    known = known_records(folder, scope, cells)
    return [known[digest_of(cell, scope)] for cell in cells]


def _versions(chosen: Iterable[str], rows: Iterable[str]) -> dict[str, int]:
    """Method or row -> version of the method or of the row's merge."""
    return {name: ADAPTERS[name].version for name in chosen} | {
        row: MERGES[ROWS[row].merge].version for row in rows if ROWS[row].merge != "sum"
    }


def _kept(folder: Path) -> dict[str, Any]:
    """What an earlier run chose in this folder, of this model and judge, for methods and merges as they are now."""
    nothing: dict[str, Any] = {"chosen": {}, "balance": {}, "tried": []}
    file = folder / FILE
    old = nothing | (json.loads(file.read_text()) if file.exists() else {})
    if old.get("weights") != weights_digest():
        return nothing
    versions = old.get("versions", {})  # what is not in it is of the first
    chosen = {a: r for a, r in old["chosen"].items() if a in ADAPTERS and ADAPTERS[a].version == versions.get(a, 1)}
    rows = {
        row: {halves: (float(a), float(b)) for halves, (a, b) in found.items()}
        for row, found in old["balance"].items()
        if row in ROWS
        and found.keys() == {f"{a}-{b}" for a, b in product(HALVES, repeat=2)}
        and ROWS[row].adapter in chosen
        and (ROWS[row].merge == "sum" or MERGES[ROWS[row].merge].version == versions.get(row, 1))
    }
    same = [one for one in old["tried"] if one["adapter"] in chosen and one.get("row", one["adapter"]) in rows]
    return old | {"chosen": chosen, "balance": rows, "tried": same}


def score(record: Record) -> float:
    """What tuning goes by."""
    return fmean(record["measured"][name] for name in SCORED)


def choose(tried: Sequence[Record]) -> Rates:
    """Method -> role -> half -> the rates best on that half's lessons, alone and composed; the lower of equal ones."""
    alone = {(r["adapter"], r.get("subject") or r["style"], *r["rates"]): score(r) for r in tried if "row" not in r}
    composed: dict[tuple[Any, ...], float] = {}
    for record in tried:
        if "row" in record and ROWS[record["row"]].merge == "sum":
            key = (record["adapter"], record["subject"], record["style"], *record["rates"])
            composed[key] = max(composed.get(key, 0.0), score(record))
    chosen: Rates = {adapter: {role: {} for role in LESSONS} for adapter in dict.fromkeys(key[0] for key in alone)}
    for adapter, half in product(chosen, HALVES):
        subject, style = (LESSONS[role][half] for role in LESSONS)
        total = {
            (a, b): alone[adapter, subject, a] + alone[adapter, style, b] + both
            for (name, *parts, a, b), both in composed.items()
            if (name, *parts) == (adapter, subject, style)
        }
        best = max(sorted(total), key=lambda rates: total[rates])
        for role, rate in zip(LESSONS, best, strict=True):
            chosen[adapter][role][half] = rate
    return chosen


def rates_of(chosen: Rates, adapter: str, subject: str, style: str) -> tuple[float, float]:
    """Of a subject and a style of these halves."""
    return chosen[adapter]["subject"][subject], chosen[adapter]["style"][style]


def balance(tried: Sequence[Record], chosen: Rates) -> Balance:
    """Row -> halves -> the best of WEIGHTS at the chosen rates; the first of equal ones."""
    found: Balance = {}
    for row in dict.fromkeys(record["row"] for record in tried if "row" in record):
        found[row] = {}
        for a, b in product(HALVES, repeat=2):
            rates = rates_of(chosen, ROWS[row].adapter, a, b)
            wanted = (row, LESSONS["subject"][a], LESSONS["style"][b], list(rates))
            scores = {
                tuple(r["weights"]): score(r)
                for r in tried
                if "row" in r and (r["row"], r["subject"], r["style"], list(r["rates"])) == wanted
            }
            found[row][f"{a}-{b}"] = max(WEIGHTS, key=lambda weights: scores[weights])
    return found
