"""The learning rates of every method and the weights of every row's compositions: ``qrlora lab compare --tune``.

Every method gets as many rates, tasks, steps and pictures as every other. Taken are the two rates at which its
adapters do best on the mean of three scores, each the mean of SCORED: the subject alone, the style alone,
and their sum at the best of SUMMED. An adapter chosen for what it does alone can be too weak, or too strong, beside
another. Weights are then chosen at those rates, for every row, with the bench's own adapters.

No part is measured at a rate or weights that it helped to choose. Seen parts were found not to do: what pico knows has
only to be called, at a rate at which a new one is not learned. So the reserved subjects and styles are halved, and the
rate for each half comes from one task of the other half; and the weights of a pair come from all reserved pairs that
have neither its subject nor its style.

Only the ladder's place differs where a method is known to want smaller steps: all weights at once, rotations, and what
starts from both factors or large singular values.

Joint training has one rate for both parts, and one weight: for every two halves the rate, of all that its method has on
either ladder, at which their tasks, trained together, are best at the best of EQUAL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from qrlora._files import write_atomically
from qrlora.lab.baselines.adapters import ADAPTERS
from qrlora.lab.baselines.merges import MERGES
from qrlora.lab.compare.identity import Cell, Record, digest_of, weights_digest
from qrlora.lab.compare.plan import ANY, ROWS, Balance, Rates, Scope, key_of, rates_file
from qrlora.lab.compare.run import Say, adapters_of, known_records, missing, rounded, run_stages
from qrlora.pico import world

LADDER = {"subject": (1.5e-3, 3e-3, 6e-3), "style": (5e-4, 1.5e-3, 5e-3)}
FASTER = 3
"""What the ladder is multiplied with for several pictures, from which more can be learned before the base is lost."""
SLOWER = {"lora": 0.3, "pissa": 0.3, "qrlora_trained": 0.3, "oft": 0.3, "q_cayley": 0.3, "full": 0.1}
"""Method -> what its ladder is multiplied with."""
SUMMED = ((1.0, 1.0), (1.0, 0.7), (1.4, 0.7), (1.4, 1.0), (1.4, 1.4))
"""Weights of subject and style in the sums that rates are chosen by."""
WEIGHTS = (*SUMMED, (2.0, 1.0), (2.0, 1.4), (2.0, 2.0))
"""Weights of subject and style to try in a composition."""
EQUAL = tuple(weights for weights in WEIGHTS if weights[0] == weights[1])
"""Weights to try for adapters that were trained together."""
TASKS = {"subject": {"even": "rocket", "odd": "robot"}, "style": {"even": "gold", "odd": "candy"}}
"""Role -> half of the reserved parts -> what is trained to choose for it: nothing of that half."""
HALVES = ("even", "odd")
PICTURES = 4
"""Pictures of every pair, to choose weights by."""
SCORED = ("recognised", "named", "both")
"""Scores that tuning maximises: the same question at three strictnesses, so that weak and good pictures
answer it."""
Weighed = dict[str, dict[str, list[list[float]]]]
"""Row -> pair, as `key_of` has it -> for each of the row's weights the values of SCORED."""
KEPT = (*SCORED, "p_subject", "p_style", "among_subject", "among_style")
"""Scores that TRIED keeps of each measurement; the records in the folder have all."""


def cells_alone(scope: Scope) -> list[Cell]:
    """Cells of each adapter alone, at each of its rates."""
    return [
        Cell("alone", adapter, 0, *((name, "") if role == "subject" else ("", name)), rates=(rate,))
        for adapter in adapters_of(scope)
        for role, tasks in TASKS.items()
        for name in tasks.values()
        for rate in ladder(adapter, role, scope.lessons)
    ]


def cells_summed(scope: Scope) -> list[Cell]:
    """The direct sum of each half's tasks, at every rate of the one with every rate of the other and at each of
    SUMMED."""
    return [
        Cell("pair", name, 0, TASKS["subject"][half], TASKS["style"][half], name, 0, rates, weights)
        for name in adapters_of(scope)
        for half in HALVES
        for rates in product(*(ladder(name, role, scope.lessons) for role in TASKS))
        for weights in SUMMED
    ]


def cells_joint(scope: Scope) -> list[Cell]:
    """Every two tasks trained together, at every rate of either ladder and each of EQUAL; the first weights first."""
    return [
        Cell("pair", ROWS[row].adapter, 0, subject, style, row, rates=(rate,), weights=weights)
        for weights in EQUAL
        for row in scope.rows
        if ROWS[row].joint
        for subject, style in product(*(tasks.values() for tasks in TASKS.values()))
        for rate in sorted({rate for role in LADDER for rate in ladder(ROWS[row].adapter, role, scope.lessons)})
    ]


def cells_weighed(rows: Iterable[str]) -> list[Cell]:
    """Every row's compositions of all reserved pairs, at each of its weights; the first weights first."""
    return [
        Cell("pair", ROWS[row].adapter, 0, *pair, row, weights=weights)
        for row in rows
        for weights in weights_of(row)
        for pair in product(world.RESERVED_SUBJECTS, world.RESERVED_STYLES)
    ]


def weights_of(row: str) -> tuple[tuple[float, float], ...]:
    """Return the weights to try for a row."""
    return EQUAL if ROWS[row].joint else WEIGHTS


def ladder(adapter: str, role: str, lessons: int) -> list[float]:
    """Return the rates to try."""
    factor = SLOWER.get(adapter, 1) * (FASTER if lessons > 1 else 1)
    return [float(f"{rate * factor:.2g}") for rate in LADDER[role]]


def tuned(folder: Path, scope: Scope, workers: int, say: Say) -> Scope:
    """Return the plan with rates and weights for all its rows: the folder's, else the package's, else chosen now."""
    kept = _kept(folder, scope.lessons)
    known = replace(scope, rates=scope.rates | kept["chosen"], balance=scope.balance | kept["balance"])
    rows = tuple(row for row in scope.rows if not _is_known(row, known))
    if not rows:
        return known
    say(f"no learning rates or weights yet for {', '.join(rows)}: chosen first")
    rates, weights = tune(folder, replace(known, rows=rows), workers, say)
    return replace(known, rates=known.rates | rates, balance=known.balance | weights)


def _is_known(row: str, scope: Scope) -> bool:
    return ROWS[row].rated in scope.rates and row in scope.balance


def tune(folder: Path, scope: Scope, workers: int, say: Say) -> tuple[Rates, Balance]:
    """Choose rates and weights for the rows and their methods; add them to the folder's files, beside what was
    tried.

    What is there of another base model or judge is dropped, and of a method or merge that has changed since; and the
    weights of rows whose rates are others now.
    """
    scope = replace(scope, seeds=(0,))
    old = _kept(folder, scope.lessons)
    tried = _measured(folder, scope, [cells_alone(scope), [*cells_summed(scope), *cells_joint(scope)]], workers, say)
    chosen = choose(tried)
    rows = dict.fromkeys([*adapters_of(scope), *scope.rows])
    at_rates = replace(scope, rates=scope.rates | chosen, pictures=PICTURES)
    cells = cells_weighed(rows)
    training = dict.fromkeys(
        one
        for cell in cells
        if not ROWS[cell.row].joint
        for one in (cell.training(subject=cell.subject), cell.training(style=cell.style))
    )
    weighed = scores(_measured(folder, at_rates, [list(training), cells], workers, say)[len(training) :])
    weights = balance(weighed)
    stale = {name for name, rates in chosen.items() if old["chosen"].get(name, rates) != rates}
    still = {row: found for row, found in old["balance"].items() if ROWS[row].rated not in stale}
    known = replace(scope, rows=tuple(old["chosen"] | chosen))
    current = {digest_of(cell, known) for of_all in (cells_alone, cells_summed, cells_joint) for cell in of_all(known)}
    kept = [one for one in old["tried"] if one["digest"] in current]
    found = {
        "weights": weights_digest(),
        "chosen": old["chosen"] | chosen,
        "balance": still | weights,
        "weights tried": WEIGHTS,
        "versions": _versions(old["chosen"] | chosen, still | weights),
    }
    source = {
        "weighed": {row: found for row, found in old["weighed"].items() if row in still} | weighed,
        "tried": list({one["digest"]: one for one in kept + [_brief(one) for one in tried]}.values()),
    }
    for name, content in ((tried_file(scope.lessons), source), (rates_file(scope.lessons), found)):
        write_atomically(folder / name, (json.dumps(rounded(content)).replace('{"kind"', '\n{"kind"') + "\n").encode())
    return chosen, weights


def tried_file(lessons: int) -> str:
    """Return the name of the file, beside that of `rates_file`, with what these were chosen from."""
    return rates_file(lessons).replace("rates", "tried")


def summary(rates: Rates, balance: Balance) -> str:
    """The choices, a line for each method and row."""
    lines = []
    for adapter, found in rates.items():
        each = [f"{role} {' or '.join(f'{rate:g}' for rate in halves.values())}" for role, halves in found.items()]
        lines.append(f"{adapter:28} rates: {', '.join(each)}")
    for row, weights in balance.items():
        lines.append(f"{row:28} weights: {' or '.join(f'{a:g}, {b:g}' for a, b in dict.fromkeys(weights.values()))}")
    return "\n".join(lines)


def _brief(record: Record) -> Record:
    return record | {"measured": {name: record["measured"][name] for name in KEPT}}


def _measured(folder: Path, scope: Scope, stages: Sequence[list[Cell]], workers: int, say: Say) -> list[Record]:
    """Return every record of these cells, and measure those that are missing. An adapter that two of them need is
    trained in the stage before."""
    cells = [cell for stage in stages for cell in stage]
    run_stages(folder, scope, [missing(folder, scope, stage) for stage in stages], workers, say)
    known = known_records(folder, scope, cells)
    return [known[digest_of(cell, scope)] for cell in cells]


def _versions(chosen: Iterable[str], rows: Iterable[str]) -> dict[str, int]:
    """Method or row -> version of the method or of the row's merge."""
    rated = {name: ADAPTERS[ROWS[name].adapter].version for name in chosen}
    return rated | {row: MERGES[ROWS[row].merge].version for row in rows if not _is_sum(row)}


def _is_sum(row: str) -> bool:
    """Return True if the version of its method alone decides a row."""
    return ROWS[row].joint or ROWS[row].merge == "sum"


def _kept(folder: Path, lessons: int) -> dict[str, Any]:
    """Return the choices of earlier runs in this folder that still hold: same model and judge, same versions."""
    nothing: dict[str, Any] = {"chosen": {}, "balance": {}, "weighed": {}, "tried": []}
    old = dict(nothing)
    for file in (folder / rates_file(lessons), folder / tried_file(lessons)):
        old |= json.loads(file.read_text()) if file.exists() else {}
    if old.get("weights") != weights_digest():
        return nothing
    versions = old.get("versions", {})  # what is not in it is of the first
    chosen = {
        name: rates
        for name, rates in old["chosen"].items()
        if name in ROWS and ADAPTERS[ROWS[name].adapter].version == versions.get(name, 1)
    }
    rows = {
        row: {key: (float(a), float(b)) for key, (a, b) in found.items()}
        for row, found in old["balance"].items()
        if row in ROWS
        and old.get("weights tried") == [list(weights) for weights in WEIGHTS]
        and ROWS[row].rated in chosen
        and (_is_sum(row) or MERGES[ROWS[row].merge].version == versions.get(row, 1))
    }
    return old | {"chosen": chosen, "balance": rows}


def choose(tried: Sequence[Record]) -> Rates:
    """Return the best rates on each half's tasks, alone and composed, or trained together; the lower of equal ones."""
    of_two = [record for record in tried if "row" in record]
    alone = {
        (r["adapter"], r.get("subject") or r["style"], *r["rates"]): _mean(r["measured"])
        for r in tried
        if "row" not in r
    }
    composed = _at_best(record for record in of_two if not ROWS[record["row"]].joint)
    chosen: Rates = {adapter: {role: {} for role in TASKS} for adapter in dict.fromkeys(key[0] for key in alone)}
    for adapter, half in product(chosen, HALVES):
        subject, style = (TASKS[role][half] for role in TASKS)
        total = {
            (a, b): alone[adapter, subject, a] + alone[adapter, style, b] + both
            for (name, *parts, a, b), both in composed.items()
            if (name, *parts) == (adapter, subject, style)
        }
        best = max(sorted(total), key=lambda rates: total[rates])
        for role, rate in zip(TASKS, best, strict=True):
            chosen[adapter][role][half] = rate
    jointly = _at_best(record for record in of_two if ROWS[record["row"]].joint)
    for row, half, other in product(dict.fromkeys(key[0] for key in jointly), HALVES, HALVES):
        parts = [TASKS["subject"][half], TASKS["style"][other]]
        at = {key[-1]: both for key, both in jointly.items() if [*key[:-1]] == [row, *parts]}
        chosen.setdefault(row, {}).setdefault(half, {})[other] = max(sorted(at), key=lambda rate: at[rate])
    return chosen


def _at_best(composed: Iterable[Record]) -> dict[tuple[Any, ...], float]:
    """(row, subject, style, *rates) -> the mean of SCORED at the best weights."""
    found: dict[tuple[Any, ...], float] = {}
    for record in composed:
        key = (record["row"], record["subject"], record["style"], *record["rates"])
        found[key] = max(found.get(key, 0.0), _mean(record["measured"]))
    return found


def scores(records: Iterable[Record]) -> Weighed:
    """Scores of each row's compositions, from records of `cells_weighed`."""
    found: dict[tuple[str, str], dict[tuple[float, ...], list[float]]] = {}
    for record in records:
        of_pair = found.setdefault((record["row"], key_of(record["subject"], record["style"])), {})
        of_pair[tuple(record["weights"])] = [record["measured"][name] for name in SCORED]
    weighed: Weighed = {}
    for (row, key), of_pair in found.items():
        weighed.setdefault(row, {})[key] = [of_pair[weights] for weights in weights_of(row)]
    return weighed


def balance(weighed: Weighed) -> Balance:
    """Row -> pair -> the best weights over all pairs with neither its subject nor its style; of ANY, over all."""
    pairs = list(product(world.RESERVED_SUBJECTS, world.RESERVED_STYLES))
    others = {
        key_of(*pair): [key_of(*one) for one in pairs if one[0] != pair[0] and one[1] != pair[1]] for pair in pairs
    }
    others[ANY] = list(others)
    return {
        row: {key: _best(weights_of(row), [of_row[one] for one in those]) for key, those in others.items()}
        for row, of_row in weighed.items()
    }


def _best(weights: Sequence[tuple[float, float]], scored: Sequence[list[list[float]]]) -> tuple[float, float]:
    """Return the best of these weights, by the scores of several pairs at each of them; the first of equal ones."""
    means = [fmean(map(fmean, at)) for at in zip(*scored, strict=True)]
    return weights[means.index(max(means))]


def _mean(scored: Record) -> float:
    return fmean(scored[name] for name in SCORED)
