"""Choose the demo's learning rates on seen subjects and styles: ``python benchmarks/tune_demo.py``.

Seen subjects and styles of pico's world play the part of something new, called by a trigger that the base model has
never met. Every method gets the same pairs, the same few learning rates for each role, the same steps and the same
pictures; the subject and the style are scored alone and, at every pair of learning rates, composed. What is minimised
is the judge's ``excess``, how far the pictures lie beyond its limits, in the mean over the three sets and over the
pairs. (Shares of what is right are printed too; at this budget they are few, and decide by chance.) Reserved subjects
and styles, which the demo is about, have no part in this.

Every run is one record of the log, with the digest of the base model's weights; runs already in it are not repeated, so
it can be interrupted and widened. The best rates of each method go, by hand, into RATES of src/qrlora/demo/plan.py.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from qrlora import pico
from qrlora.adapter import Adapter
from qrlora.demo.flow import PARTS, SETS, Setting, load
from qrlora.demo.plan import METHODS, Budget, Wanted, lesson, questions
from qrlora.files import write_atomically
from qrlora.pico import world

PAIRS = (("mug", "neon"), ("sneaker", "watercolour"), ("guitar", "embroidery"), ("camera", "blueprint"))
LEARNING_RATES = (1e-3, 3e-3)
BUDGET = ("steps", "rank", "pictures")
Record = dict[str, Any]


def main() -> None:
    """Run what the log lacks, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--log", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--learning-rates", type=_numbers, default=LEARNING_RATES)
    parser.add_argument("--pairs", type=int, default=2, help=f"how many of {PAIRS} (default: 2)")
    parser.add_argument("--steps", type=int, default=Budget().steps)
    parser.add_argument("--rank", type=int, default=Budget().rank)
    parser.add_argument("--pictures", type=int, default=8, help="a score (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    budget = replace(Budget(), **{n: getattr(options, n) for n in BUDGET})
    records: list[Record] = json.loads(options.log.read_text()) if options.log.exists() else []
    todo = list(_missing(records, options))
    if todo:
        setting = load("pico", None, budget, options.seed, None)
        with tempfile.TemporaryDirectory() as folder:
            for key in todo:
                found = _run(setting, key, options.learning_rates, Path(folder))
                records += [{**key, **record} for record in found]
                text = ",\n".join(json.dumps(record) for record in records)
                write_atomically(options.log, f"[\n{text}\n]\n".encode())
    print(summary([record for record in records if record["weights"] == _weights()]))


def _weights() -> str:
    """Digest of the base model's denoiser: what was tuned on one says nothing about another."""
    file = pico.path() / "transformer" / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _missing(records: Sequence[Record], options: argparse.Namespace) -> Iterator[Record]:
    """What identifies each method and pair of which the log lacks a pair of learning rates."""
    common = {name: getattr(options, name) for name in (*BUDGET, "seed")} | {"weights": _weights()}
    wanted = set(itertools.product(options.learning_rates, repeat=2))
    for pair, method in itertools.product(PAIRS[: options.pairs], options.methods.split(",")):
        key = {"method": method, "pair": list(pair), **common}
        if wanted - {tuple(record["rates"]) for record in records if key.items() <= record.items()}:
            yield key


def _run(setting: Setting, key: Record, rates: Sequence[float], folder: Path) -> list[Record]:
    """Teach one pair by one method at every rate; score each adapter alone and every two of them composed."""
    roles = ("subject", "style")
    lessons = [
        lesson(role, name, folder, setting.seed, world.SIZE) for role, name in zip(roles, key["pair"], strict=True)
    ]
    asked = questions(lessons[0], lessons[1], setting.budget, setting.seed)
    taught: dict[str, dict[float, Adapter]] = {}
    alone: dict[str, dict[float, dict[str, float]]] = {}
    for one in lessons:
        with setting.stage("train", f"{key['method']}, {one.called}"):
            taught[one.role] = {rate: setting.teach(one, key["method"], learning_rate=rate) for rate in rates}
        used = asked[f"{one.role}_alone"]
        alone[one.role] = {rate: _score(setting, used, [adapter]) for rate, adapter in taught[one.role].items()}
    found = []
    for chosen in itertools.product(rates, repeat=2):
        pair = [taught[role][rate] for role, rate in zip(roles, chosen, strict=True)]
        scores = {f"{role}_alone": alone[role][rate] for role, rate in zip(roles, chosen, strict=True)}
        scores["composed"] = _score(setting, asked["composed"], pair)
        found.append({"rates": list(chosen), "scores": scores})
    return found


def _score(setting: Setting, wanted: Sequence[Wanted], adapters: Sequence[Adapter]) -> dict[str, float]:
    """The judge's shares, and its mean excess."""
    pictures = setting.draw(wanted, [(adapter, 1.0) for adapter in adapters]).pixels
    subjects, styles, colours = zip(*((w.subject, w.style, w.colour) for w in wanted), strict=True)
    verdict = setting.judge.verdict(pictures, subjects, styles, colours)
    return {
        part: round(share, 4) for part, share in (verdict.rates() | {"excess": verdict.excess.mean().item()}).items()
    }


def summary(records: Sequence[Record]) -> str:
    """Means of every method and pair of rates over the pairs learned; a star at each method's least excess."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        groups[(record["method"], record["steps"], *record["rates"])].append(record["scores"])
    parts = ("excess", *PARTS)
    means = {k: {p: fmean(s[n][p] for s in found for n in SETS) for p in parts} for k, found in groups.items()}
    best = {k[0]: min(v["excess"] for other, v in means.items() if other[0] == k[0]) for k in means}
    head = f"{'method':<18}{'steps':>6}{'subject at':>12}{'style at':>10}{'pairs':>6}"
    lines = [head + "".join(f"{part:>9}" for part in parts)]
    for key, row in sorted(means.items()):
        method, steps, *rates = key
        values = "".join(f"{value:>9.3f}" for value in row.values())
        star = " *" if best[method] == row["excess"] else ""
        lines.append(f"{method:<18}{steps:>6}{rates[0]:>12.1e}{rates[1]:>10.1e}{len(groups[key]):>6}{values}{star}")
    return "\n".join(lines)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    main()
