"""Choose the demo's learning rates on seen subjects and styles: ``python benchmarks/tune_demo.py``.

Seen subjects and styles of pico's world play the part of something new, called by a trigger that the base model has
never met. Every method gets the same pairs, the same few learning rates, the same steps and the same pictures. What is
maximised is the mean of the shares with the subject, the style and both right, over the subject alone, the style alone
and the two composed, and over the pairs. ("Both" by itself is next to nothing at this budget and decides by chance.)
Reserved subjects and styles, which the demo is about, have no part in this.

Every run is one record of the log; runs already in it are not repeated, so it can be interrupted and widened. The best
learning rate of each method goes, by hand, into METHODS of src/qrlora/demo/plan.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from qrlora.adapter import Adapter
from qrlora.demo.flow import PARTS, SETS, Setting, load
from qrlora.demo.plan import METHODS, Budget, Lesson, lesson, questions
from qrlora.files import write_atomically
from qrlora.pico import world

PAIRS = (("mug", "neon"), ("sneaker", "watercolour"), ("guitar", "embroidery"), ("camera", "blueprint"))
VARIANTS: dict[str, dict[str, Any]] = {
    **METHODS,
    "qrlora_dense": {"method": "qrlora", "triangular": False},
    "qrlora_published_dense": {"method": "qrlora", "triangular": False, "columns": "first"},
}
"""What may become the default, beside the methods of the demo."""
LEARNING_RATES = (1e-3, 3e-3)
BUDGET = ("steps", "rank", "pictures")


def main() -> None:
    """Run what the log lacks, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--log", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(VARIANTS)} (default: %(default)s)")
    parser.add_argument("--learning-rates", type=_numbers, default=LEARNING_RATES)
    parser.add_argument("--pairs", type=int, default=2, help=f"how many of {PAIRS} (default: 2)")
    parser.add_argument("--steps", type=int, default=Budget().steps)
    parser.add_argument("--rank", type=int, default=Budget().rank)
    parser.add_argument("--pictures", type=int, default=8, help="a score (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="pico")
    options = parser.parse_args()
    budget = replace(Budget(), **{n: getattr(options, n) for n in BUDGET})
    records: list[dict[str, Any]] = json.loads(options.log.read_text()) if options.log.exists() else []
    todo = list(_missing(records, options))
    if todo:
        setting = load(options.model, None, budget, options.seed, None)
        with tempfile.TemporaryDirectory() as folder:
            for key in todo:
                records.append({**key, **_run(setting, key, Path(folder))})
                text = ",\n".join(json.dumps(record) for record in records)
                write_atomically(options.log, f"[\n{text}\n]\n".encode())
    print(summary(records))


def _missing(records: Sequence[dict[str, Any]], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What identifies each run that is asked for and not in the log."""
    grid = itertools.product(PAIRS[: options.pairs], options.methods.split(","), options.learning_rates)
    common = {name: getattr(options, name) for name in (*BUDGET, "seed", "model")}
    for pair, method, rate in grid:
        key = {"method": method, "learning_rate": rate, "pair": list(pair), **common}
        if not any(key.items() <= record.items() for record in records):
            yield key


def _run(setting: Setting, key: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Teach, generate and judge one pair by one method at one learning rate."""
    setting.seconds.clear()
    fields = {**VARIANTS[key["method"]], "learning_rate": key["learning_rate"]}
    lessons = [
        lesson(role, name, folder, setting.seed, world.SIZE)
        for role, name in zip(("subject", "style"), key["pair"], strict=True)
    ]
    with setting.stage("train", f"{key['method']} at {key['learning_rate']:g}: {', '.join(key['pair'])}"):
        subject, style = (setting.teach(one, fields, one.role) for one in lessons)
    with setting.stage("score"):
        scores = _scores(setting, lessons, subject, style)
    seconds = {name: round(value, 1) for name, value in setting.seconds.items()}
    setting.say("  ".join(f"{name} {scores[name]['both']:.2f}" for name in SETS))
    return {"scores": scores, "seconds": seconds}


def _scores(setting: Setting, lessons: Sequence[Lesson], subject: Adapter, style: Adapter) -> dict[str, Any]:
    used = {
        "subject_alone": [(subject, 1.0)],
        "style_alone": [(style, 1.0)],
        "composed": [(subject, 1.0), (style, 1.0)],
    }
    asked = questions(lessons[0], lessons[1], setting.budget, setting.seed)
    scores = {}
    for name in SETS:
        answer = setting.judged(setting.draw(asked[name], used[name]))
        shares = {part: answer.share(part) for part in PARTS}
        scores[name] = {part: round(share.value, 4) for part, share in shares.items() if share is not None}
    return scores


def summary(records: Sequence[dict[str, Any]]) -> str:
    """Mean shares of every method and setting, over pairs; a star at each method's best."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        key = tuple(record[name] for name in ("method", "steps", "learning_rate"))
        groups[key].append(record["scores"])
    means = {
        key: {part: fmean(scores[name][part] for scores in found for name in SETS) for part in PARTS}
        for key, found in groups.items()
    }
    best = {key[0]: max((fmean(row.values()), k) for k, row in means.items() if k[0] == key[0])[1] for key in means}
    lines = [f"{'method':<24}{'steps':>6}{'rate':>9}{'pairs':>6}" + "".join(f"{p:>9}" for p in PARTS)]
    for key, row in sorted(means.items()):
        method, steps, rate = key
        values = "".join(f"{value:>9.3f}" for value in row.values())
        star = " *" if best[method] == key else ""
        lines.append(f"{method:<24}{steps:>6}{rate:>9.1e}{len(groups[key]):>6}{values}{star}")
    return "\n".join(lines)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    main()
