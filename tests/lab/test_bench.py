"""The bench: what its tables say of given records, and one small run through the command line."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.apps.cli import main
from qrlora.errors import DataError
from qrlora.lab import tasks, where
from qrlora.lab.baselines.adapters import ADAPTERS
from qrlora.lab.baselines.deltas import Delta, scaled
from qrlora.lab.baselines.merges import MERGES
from qrlora.lab.compare import about, cells, identity, page, plan, run, tables, tuning
from qrlora.lab.compare.identity import Cell, digest_of
from qrlora.lab.compare.plan import BASELINE, DEFAULT, ROWS, SMALL, Scope
from qrlora.lab.compare.plots import freedom
from qrlora.pico import world

EQUAL = dict.fromkeys([*(plan.key_of(*pair) for pair in Scope().pairs), plan.ANY], (1.0, 1.0))
HERE = "teapot in chalk"
BALANCE = plan.balance() | {"lora+ties": EQUAL, "lora+klora": EQUAL}
TINY = replace(
    Scope(**SMALL), steps=2, pictures=2, alone=2, denoising_steps=2, rows=(BASELINE, DEFAULT), balance=BALANCE
)


def pair(row, subject, style, seed=0, **measured):
    return {"kind": "pair", "row": row, "adapter": ROWS[row].adapter, "subject": subject, "style": style,
            "seed": seed, "measured": measured}  # fmt: skip


def alone(adapter, seed=0, measured=None, **part):
    return {"kind": "alone", "adapter": adapter, "seed": seed, **part, "measured": measured}


def test_rows_are_known_methods_and_merges():
    for row in ROWS.values():
        assert row.adapter in ADAPTERS
        assert row.merge == "joint" or row.merge in MERGES
        assert about(row)
    assert set(ADAPTERS) == {row.adapter for row in ROWS.values()}
    assert set(MERGES) <= {row.merge for row in ROWS.values()}, "every merge is a row"
    assert len(ROWS) <= 20


def test_every_reserved_pair_at_three_seeds_is_the_whole():
    assert len(Scope().pairs) >= 24 and len(Scope().seeds) >= 3
    assert set(Scope().subjects) == set(world.RESERVED_SUBJECTS) and set(Scope().styles) == set(world.RESERVED_STYLES)


def test_no_part_is_measured_at_a_rate_it_helped_to_choose():
    for role, names in (("subject", world.RESERVED_SUBJECTS), ("style", world.RESERVED_STYLES)):
        halves = {half: [name for name in names if plan.half_of(role, name) == half] for half in ("even", "odd")}
        assert len(halves["even"]) == len(halves["odd"])
        for half, task in tuning.TASKS[role].items():
            assert task not in halves[half]
    cells = tuning.cells_alone(Scope()) + tuning.cells_summed(Scope())
    assert {(c.subject, c.style) for c in cells if c.kind == "pair"} == {("rocket", "gold"), ("robot", "candy")}
    budget = {adapter: sum(c.adapter == adapter for c in cells) for adapter in ADAPTERS}
    assert len(set(budget.values())) == 1, "the same budget for every method"


def tried(found, row=None):
    """(names, rates[, weights]) -> named, as records of lora."""
    for (names, rates, *weights), named in found.items():
        parts = {"style" if name in world.STYLES else "subject": name for name in names}
        one = alone("lora", measured={"recognised": named, "named": named, "both": named}, **parts) | {
            "rates": list(rates)
        }
        yield one | ({"row": row, "weights": list(weights[0])} if row else {})


def test_the_best_rates_on_the_other_half_are_chosen():
    apart = {((name,), (rate,)): 0.5 for name in ("rocket", "robot") for rate in (1e-3, 2e-3)}
    apart |= {
        (("gold",), (1e-3,)): 0.4,
        (("gold",), (2e-3,)): 0.6,
        (("candy",), (1e-3,)): 0.2,
        (("candy",), (2e-3,)): 0.1,
    }
    each = [(a, b) for a in (1e-3, 2e-3) for b in (1e-3, 2e-3)]
    halves = [("rocket", "gold"), ("robot", "candy")]
    summed = {(names, rates, w): 0.0 for names in halves for rates in each for w in tuning.SUMMED}
    chosen = tuning.choose([*tried(apart), *tried(summed, "lora")])["lora"]
    assert chosen["subject"] == {"even": 1e-3, "odd": 1e-3}, "the lower of two equal ones"
    assert chosen["style"] == {"even": 2e-3, "odd": 1e-3}
    assert plan.half_of("style", "candy") == "even", "so candy, tuned on gold, takes gold's rate"
    summed[("rocket", "gold"), (2e-3, 1e-3), (1.4, 0.7)] = 0.3
    chosen = tuning.choose([*tried(apart), *tried(summed, "lora")])["lora"]
    assert chosen["subject"] == {"even": 2e-3, "odd": 1e-3}, "what is 0.2 worse alone and 0.3 better composed"
    assert chosen["style"] == {"even": 1e-3, "odd": 1e-3}


def test_the_best_weights_on_all_pairs_with_other_parts_are_chosen():
    cells_, last = tuning.cells_weighed(["lora"]), len(tuning.WEIGHTS) - 1
    assert len(cells_) == len(Scope().pairs) * len(tuning.WEIGHTS), "every pair at all weights"
    assert not any(cell.rates for cell in cells_), "with the bench's own adapters"
    assert set(tuning.SUMMED) < set(tuning.WEIGHTS)

    def chosen(best):
        """best: (subject, style) -> the place of the weights that alone get something there."""
        found = []
        for cell in reversed(cells_):
            named = float(tuning.WEIGHTS.index(cell.weights) == best(cell.subject, cell.style))
            scored = {"recognised": named, "named": named, "both": 0.0}
            found.append(pair("lora", cell.subject, cell.style, **scored) | {"weights": list(cell.weights)})
        weighed = tuning.scores(found)
        assert weighed["lora"][HERE][best("teapot", "chalk")] == [1, 1, 0], "in the order of WEIGHTS"
        return {key: tuning.WEIGHTS.index(at) for key, at in tuning.balance(weighed)["lora"].items()}

    here = chosen(lambda subject, style: 1 if subject == "teapot" or style == "chalk" else last)
    assert here.keys() == EQUAL.keys() and len(here) == 25
    assert here[HERE] == last, "what the teapot's and chalk's own pairs say does not count"
    lone = chosen(lambda subject, style: 1 if (subject, style) == ("boot", "gold") else 2)
    assert set(lone.values()) == {2}
    apart = chosen(lambda subject, style: 1 if subject in ("teapot", "boot", "robot") else 2)
    assert {apart[key] for key in apart if key.startswith(("teapot", "boot", "robot"))} == {2}, "three others of five"
    assert {apart[key] for key in apart if not key.startswith(("teapot", "boot", "robot"))} == {1}
    assert apart[plan.ANY] == 1, "the first of equal ones"
    assert set(chosen(lambda *_: 0).values()) == {0}


def test_weights_are_of_a_row_and_a_pair(small):
    folder, scope = small
    cell = Cell("pair", BASELINE, 0, "teapot", "chalk", BASELINE)
    heavier = replace(scope, balance=scope.balance | {BASELINE: EQUAL | {HERE: (1.0, 0.5)}})
    equal = replace(scope, balance=scope.balance | {BASELINE: EQUAL})
    assert digest_of(cell, heavier) != digest_of(cell, equal)
    for other in (replace(cell, style="mosaic"), replace(cell, subject="rocket")):
        assert digest_of(other, heavier) == digest_of(other, equal), "another pair"
    bench = cells.Bench.open(folder, heavier)
    parts = cells.parts_of(bench, cell, "teapot", "chalk")
    for one, share in ((cell, 0.5), (replace(cell, weights=(1.0, 0.25)), 0.25)):
        weights = cells.weights_of(bench, one, "teapot", "chalk")
        assert tuple(weights) == (1.0, share)
        found = cells.merged_of(bench, one, parts, weights, [])
        for name, delta in found.items():
            torch.testing.assert_close(delta.dense(), parts[0][name].dense() + share * parts[1][name].dense())
    with pytest.raises(DataError, match="lora\\+ties has no weights yet"):
        plan.balance_of("lora+ties", "teapot", "chalk", {})
    for strangers in (("teapot", None), (None, "chalk"), ("my mug", "chalk"), ("mug", "neon")):
        assert plan.key_of(*strangers) == plan.ANY


def test_what_a_merge_learns_once_is_summed_at_any_weights(small, monkeypatch):
    """As a row that learns: halves of the subject, doubles of the style."""
    folder, scope = small
    made = []

    def learn(parts, context, *, penalty):
        made.append((len(parts), len(context.recipes), penalty))
        return [scaled(part, weight) for part, weight in zip(parts, (0.5, 2.0), strict=True)]

    row = replace(plan.ROWS["lora+ziplora"], options={"penalty": 7.0})
    monkeypatch.setitem(plan.ROWS, row.name, row)
    monkeypatch.setitem(MERGES, "ziplora", replace(MERGES["ziplora"], once=learn))
    bench = cells.Bench.open(folder, replace(scope, balance=scope.balance | {row.name: EQUAL}))
    tasks = [bench.task("subject", "teapot", 0), bench.task("style", "chalk", 0)]
    base = Cell("pair", BASELINE, 0, "teapot", "chalk", row.name)
    parts = cells.parts_of(bench, base, "teapot", "chalk")
    for weights in ((1.0, 1.0), (1.4, 0.7)):
        found = cells.merged_of(bench, replace(base, weights=weights), parts, weights, tasks)
        for name, delta in found.items():
            expected = 0.5 * weights[0] * parts[0][name].dense() + 2 * weights[1] * parts[1][name].dense()
            torch.testing.assert_close(delta.dense(), expected)
    assert made == [(2, 2, 7.0)]
    monkeypatch.setitem(plan.ROWS, row.name, replace(row, options={"penalty": 8.0}))
    cells.merged_of(bench, base, parts, (1.0, 1.0), tasks)
    assert made[1:] == [(2, 2, 8.0)]


def test_what_was_taught_together_has_one_rate_and_one_weight(small, monkeypatch):
    folder, scope = small
    made = []

    train = cells.train_method

    def train_method(method, recipe, *, beside, **given):
        made.append((method, recipe.learning_rate, recipe.steps, [one.role for one in (recipe, *beside)]))
        return train(method, recipe, beside=beside, **given)

    bench = cells.Bench.open(folder, scope)
    tasks = [bench.task("subject", "teapot", 0), bench.task("style", "chalk", 0)]
    base = Cell("pair", "lora", 0, "teapot", "chalk", "lora+joint", rates=(7e-4,))
    with monkeypatch.context() as patch:
        patch.setattr(cells, "train_method", train_method)
        first, again = (cells.joint(bench, replace(base, weights=(w, w)), tasks) for w in (1.0, 1.4))
    assert made == [("lora", 7e-4, 2 * scope.steps, ["subject", "style"])]
    assert all(torch.equal(first[name].dense(), again[name].dense()) for name in first)
    tried = [cell for cell in tuning.cells_joint(Scope()) if cell.row == "lora+joint"]
    assert {cell.weights for cell in tried} == set(tuning.weights_of("lora+joint")) == {(1, 1), (1.4, 1.4), (2, 2)}
    assert len({cell.rates for cell in tried}) == 5 and len({(cell.subject, cell.style) for cell in tried}) == 4
    found = []
    for cell in tried:  # gold is best at the lowest rate, candy at the highest of the subject's, at another weight each
        right = (1.5e-4, (1.4, 1.4)) if cell.style == "gold" else (1.8e-3, (1.0, 1.0))
        scored = dict.fromkeys(tuning.SCORED, float((*cell.rates, cell.weights) == right))
        found.append(pair(cell.row, cell.subject, cell.style, **scored) | {"rates": list(cell.rates)})
    chosen = tuning.choose(found)["lora+joint"]
    assert chosen == {half: {"even": 1.5e-4, "odd": 1.8e-3} for half in ("even", "odd")}
    assert plan.joint_rate_of("lora+joint", "teapot", "chalk", {"lora+joint": chosen}) == 1.5e-4


def test_what_is_zero_by_construction_foretells_nothing():
    """Crosstalk rises with the cosine of one row; of the other that is rounding alone."""
    parts = [(subject, style) for subject in ("teapot", "boot") for style in ("chalk", "gold")]
    records = []
    for row, unit in ((BASELINE, 1e-2), (DEFAULT, 1e-9)):
        for place, (subject, style) in enumerate(parts):
            found = {"among_subject": 0.8 - 0.1 * place, "among_style": 0.8, "files": {"cosine": unit * place}}
            records.append(pair(row, subject, style, 0, **found))
        for part in ({"subject": "teapot"}, {"subject": "boot"}, {"style": "chalk"}, {"style": "gold"}):
            records.append(alone(row, measured={"among_subject": 0.9, "among_style": 0.9}, **part))
    told = tables.foretold(records, [BASELINE, DEFAULT])["cosine"]
    assert told[BASELINE] == pytest.approx(1) and told[DEFAULT] is None and len(told["points"]) == 8
    assert tables.table(records, [BASELINE])[BASELINE]["cosine"].value == pytest.approx(1.5e-2)


def test_seeds_are_averaged_before_pairs():
    records = [pair(BASELINE, "teapot", "chalk", seed, both=both) for seed, both in enumerate((0.0, 1.0, 0.5))]
    records += [pair(BASELINE, "boot", "gold", 0, both=1.0)]
    assert tables.by_pair(records, BASELINE, "both") == {("teapot", "chalk"): 0.5, ("boot", "gold"): 1.0}
    found = tables.table(records, [BASELINE])[BASELINE]["both"]
    assert found.value == 0.75 and found.pairs == 2
    assert found.low == 0.5 and found.high == 1.0


def test_crosstalk_is_what_is_lost_inside():
    records = [
        pair(BASELINE, "teapot", "chalk", among_subject=0.2, among_style=0.7, p_subject=0.1, p_style=0.1),
        alone(BASELINE, measured={"among_subject": 0.8, "among_style": 0.1, "p_subject": 0.2}, subject="teapot"),
        alone(BASELINE, measured={"among_subject": 0.3, "among_style": 0.9, "p_style": 0.3}, style="chalk"),
    ]
    assert tables.crosstalk(records, BASELINE)["teapot", "chalk"] == pytest.approx(((0.8 - 0.2) + (0.9 - 0.7)) / 2)
    assert tables.crosstalk(records, BASELINE, "p")["teapot", "chalk"] == pytest.approx((0.1 + 0.2) / 2)
    assert tables.crosstalk(records, "lora+joint") == {}


def test_seeds_that_order_rows_alike_agree():
    each = {"lora": (0.1, 0.2, 0.9), "full": (0.2, 0.3, 0.8), "q_random": (0.3, 0.6, 0.7), DEFAULT: (0.5, 0.7, 0.1)}
    records = [
        pair(row, subject, "chalk", seed, recognised=value + more)
        for row, values in each.items()
        for seed, value in enumerate(values)
        for subject, more in (("teapot", 0.1), ("boot", -0.1))
    ]
    assert tables.by_seed(records, "lora", "recognised") == pytest.approx({0: 0.1, 1: 0.2, 2: 0.9})
    assert tables.agreement(records, list(each), "recognised") == pytest.approx(
        {"0 and 1": 1, "0 and 2": -1, "1 and 2": -1}
    )
    records.remove(next(r for r in records if r["seed"] == 2 and r["row"] == "lora"))
    assert set(tables.by_seed(records, "lora", "recognised")) == {0, 1}, "seed 2 is not whole"


def test_a_constant_lead_has_no_uncertainty_when_paired():
    """Pairs of very different difficulty: the difference is certain, though each mean is not."""
    records = []
    for i, (subject, style) in enumerate(Scope().pairs):
        records += [pair(BASELINE, subject, style, both=i / 40), pair(DEFAULT, subject, style, both=i / 40 + 0.25)]
    found = tables.against(records, DEFAULT, BASELINE)
    assert found["both_difference"].low == pytest.approx(0.25) == found["both_difference"].high
    alone_interval = tables.table(records, [DEFAULT])[DEFAULT]["both"]
    assert alone_interval.high - alone_interval.low > 0.1
    assert found["both_ratio"].low < found["both_ratio"].value < found["both_ratio"].high


def test_no_ratio_to_nothing():
    assert tables.ratio([0.5, 0.25], [0.0, 0.0]) is None and tables.ratio([0.5, 0.25], [0.1, -0.2]) is None


def test_bootstrap_covers():
    """Of 200 samples of 24 from a known distribution, about 95 % of the intervals hold its mean."""
    rng = np.random.default_rng(5)
    held = [tables.estimate(list(rng.beta(2, 5, 24))) for _ in range(200)]
    share = np.mean([e.low <= 2 / 7 <= e.high for e in held])
    assert 0.88 <= share <= 0.99


def test_rank_correlation_with_ties():
    scipy_says = 0.7631578947368421  # scipy.stats.spearmanr([1, 2, 2, 3, 5], [1, 3, 2, 2, 9])
    points = [["row", x, y] for x, y in zip((1, 2, 2, 3, 5), (1, 3, 2, 2, 9), strict=True)]
    assert tables.rank_correlation(points) == pytest.approx(scipy_says)
    assert tables.rank_correlation(points[:3]) is None
    assert tables.rank_correlation([["row", 1, y] for y in range(5)]) is None


def test_distance_is_of_form_for_subjects_and_of_drawing_for_styles(monkeypatch):
    monkeypatch.setattr(tables, "SCENES", 1)
    far = tables.distance.__wrapped__
    monkeypatch.setattr(world, "SEEN_STYLES", ("flat", "ink"))
    near = far("style", "gold")
    monkeypatch.setattr(world, "SEEN_STYLES", ("ink",))
    assert 0 < near <= far("style", "gold") < 255, "the nearest of the seen ones"
    here = world.sample_scene(5, subject="teapot", style="flat")
    pose = replace(here.pose, dx=here.pose.dx + 3)
    moved = replace(here, pose=pose)
    assert np.abs(tables.plain(here) - tables.plain(moved)).mean() > 2
    assert np.abs(tables.stretched(here) - tables.stretched(moved)).mean() < 2, "where it stands does not count"


def test_freedom_needs_two_methods_and_shows_every_part(monkeypatch):
    monkeypatch.setattr("qrlora.lab.compare.plots.distance", lambda role, name: float(len(name)))
    records = [
        alone(method, measured={"named": 0.5}, **part)
        for method in ("qrlora_published", "q_cayley")
        for part in ({"subject": "teapot"}, {"subject": "boot"}, {"style": "gold"})
    ]
    assert freedom(records[:3]) is None
    found = freedom(records)
    assert found.name == "freedom" and found.pixels.std() > 0
    assert freedom([r for r in records if "subject" in r]) is None, "no style was measured"


def test_a_worker_ends_with_its_parent(monkeypatch):
    parents, ended = iter([7, 7, 1]), []
    monkeypatch.setattr(run.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(run.os, "_exit", ended.append)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    run._end_with(7)
    assert ended == [1]


def test_a_digest_is_of_everything_that_decides():
    cell = Cell("pair", BASELINE, 0, "teapot", "chalk", BASELINE)
    same = digest_of(cell, TINY)
    assert digest_of(cell, replace(TINY, rows=(BASELINE,), subjects=("boot",), seeds=(3,))) == same
    for other in (replace(cell, seed=1), replace(cell, row="lora+ties"), replace(cell, subject="boot")):
        assert digest_of(other, TINY) != same
    for changed in ({"steps": 3}, {"pictures": 3}, {"rank": 8}, {"guidance": 3.0}):
        assert digest_of(cell, replace(TINY, **changed)) != same
    taught = Cell("train", BASELINE, 0, "teapot")
    assert digest_of(taught, TINY) == digest_of(taught, replace(TINY, pictures=3)), "drawing does not change adapters"


def test_a_changed_method_has_digests_of_its_own(monkeypatch):
    """And one that has not keeps those from before methods had versions."""
    halves = {"even": 1e-3, "odd": 2e-3}
    names = ("lora", "q_cayley")
    rates = {name: {"subject": halves, "style": halves} for name in names}
    scope = replace(TINY, rates=rates | {"lora+joint": {"even": halves, "odd": halves}}, steps=3, guidance=2.0,
                    balance={"lora+ties": EQUAL | {HERE: (1.0, 0.7)}, "lora+joint": EQUAL})  # fmt: skip
    monkeypatch.setattr(cells, "weights_digest", lambda judged=True: "w")
    taught, merged = Cell("train", "lora", 0, "teapot"), Cell("pair", "lora", 0, "teapot", "chalk", "lora+ties")
    changed = Cell("train", "q_cayley", 0, "teapot")
    before = tuple(digest_of(cell, scope, judged=False) for cell in (taught, merged, changed))
    monkeypatch.setitem(ADAPTERS, "q_cayley", replace(ADAPTERS["q_cayley"], version=2))
    assert digest_of(changed, scope) != before[2]
    monkeypatch.setitem(MERGES, "ties", replace(MERGES["ties"], version=2))
    assert digest_of(taught, scope) == before[0] and digest_of(merged, scope, judged=False) != before[1]
    for other in (3, 4):
        monkeypatch.setitem(ADAPTERS, "lora", replace(ADAPTERS["lora"], version=other))
        before += (digest_of(taught, scope),)
    assert len(set(before)) == 5
    together = Cell("pair", "lora", 0, "teapot", "chalk", "lora+joint")
    slower, lighter = ({"even": {"even": 5e-4, "odd": 2e-3}, "odd": halves}, EQUAL | {HERE: (1.4, 1.4)})
    others = [
        replace(scope, rates=scope.rates | {"lora+joint": slower}),
        replace(scope, balance=scope.balance | {"lora+joint": lighter}),
    ]
    assert len({digest_of(together, one) for one in (scope, *others)}) == 3
    assert digest_of(replace(together, style="mosaic"), others[0]) == digest_of(
        replace(together, style="mosaic"), scope
    )
    others_rate = replace(scope, rates=scope.rates | {"lora": {"subject": slower["even"], "style": halves}})
    assert digest_of(together, others_rate) == digest_of(together, scope), "it has a rate of its own"


def test_half_the_numbers_are_trained(small):
    folder, scope = small
    records = run.run(folder, scope, 1, lambda said: None)
    share = tables.trained(records, DEFAULT) / tables.trained(records, BASELINE)
    assert 0.4 < share < 0.5


def test_list(capsys):
    assert main(["lab", "compare", "--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(ROWS)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of every kind of cell, in this process."""
    folder = tmp_path_factory.mktemp("bench")
    scope = replace(TINY, rows=(DEFAULT, "lora", "lora+klora", "lora+joint"), grid_pairs=1, many=(2,),
                    grid_weights=(0.5, 1.0), grid_rows=(BASELINE,), subjects=("teapot",),
                    styles=("chalk",))  # fmt: skip
    bench = cells.Bench.open(folder, scope)
    for stage in run.cells_of(scope):
        for cell in stage:
            cells.KINDS[cell.kind](bench, cell)
    return folder, scope


def test_nothing_is_done_twice(small, monkeypatch):
    folder, scope = small
    monkeypatch.setattr(run, "ProcessPoolExecutor", None)  # a worker would be an error
    records = run.run(folder, scope, 1, lambda said: None)
    assert {record["kind"] for record in records} == {"train", "alone", "pair", "grid", "many"}
    assert all(record["measured"] for record in records)


def test_another_measure_looks_at_the_pictures_that_are_there(small, monkeypatch):
    """Records become others, adapters and pictures stay, and what is seen in them is the same."""
    folder, scope = small
    before = run.run(folder, scope, 1, lambda said: None)
    monkeypatch.setattr(identity, "VERSION", identity.VERSION + 1)
    monkeypatch.setattr("qrlora.lab.compare.cells.train_method", None)
    monkeypatch.setattr(cells.Bench, "draw", None)
    bench = cells.Bench.open(folder, scope)
    todo = [cell for stage in run.cells_of(scope) for cell in run.missing(folder, scope, stage)]
    assert {cell.kind for cell in todo} == {"alone", "pair", "grid", "many"}
    for cell in todo:
        cells.KINDS[cell.kind](bench, cell)
    for old, new in zip(before, run.run(folder, scope, 1, lambda said: None), strict=True):
        assert (old["digest"] == new["digest"]) == (old["kind"] == "train")
        assert run.rounded(old["measured"] | {"merge_seconds": 0}) == run.rounded(
            new["measured"] | {"merge_seconds": 0}
        )


def test_records_of_an_earlier_run_stand_in(small, tmp_path, monkeypatch):
    folder, scope = small
    monkeypatch.setattr(run, "ProcessPoolExecutor", None)
    records = run.run(folder, scope, 1, lambda said: None)
    run.write_records(tmp_path / "records.jsonl", records)
    given = run.read_records(tmp_path / "records.jsonl")
    assert run.run(tmp_path / "elsewhere", scope, 1, lambda said: None, given) == given
    assert page.write(tmp_path / "elsewhere", scope, given, "qrlora bench").exists(), "without pictures, too"


def test_the_report_says_what_the_records_say(small):
    folder, scope = small
    records = run.run(folder, scope, 1, lambda said: None)
    html = page.write(folder, scope, records, "qrlora bench").read_text()
    data = json.loads((folder / "report.json").read_text())
    assert set(data["table"]) == set(scope.rows)
    drawn = next(r for r in records if r["kind"] == "pair" and r["row"] == "lora")
    assert data["table"]["lora"]["energy"][0] == pytest.approx(drawn["measured"]["energy"], abs=1e-3)
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert {row["row"] for row in rows} == set(scope.rows)
    lines = (folder / "table.md").read_text().splitlines()
    assert len(lines) == 2 + len(scope.rows) + 1 + 2 + len(scope.rows) - 1, "every row, and every other beside lora"
    assert any(re.fullmatch(r"\| qrlora \| .* \| 0\.4\d \|", line) for line in lines), "numbers trained"
    assert "The aim is not met" in html, "two steps teach nothing"
    assert {file.stem for file in (folder / "plots").iterdir()} >= {"subject-against-style", "crosstalk", "many"}


def test_parts_make_up_the_whole():
    ends = ("attn.to_q", "attn.to_out.0", "attn.add_k_proj", "attn.to_add_out", "ff.net.2", "ff_context.net.0.proj")
    learned = {f"transformer_blocks.{i}.{end}": Delta(matrix=torch.ones(1, 1)) for i in range(2) for end in ends}
    for kind, count in (("blocks", 2), ("groups", 4)):
        parts = list(where.KINDS[kind](learned))
        assert len(parts) == count and sum(len(part.only) for part in parts) == len(learned)
        assert all(part.only | part.without == learned and not part.only.keys() & part.without for part in parts)
    found = {part.name: {name.split(".", 2)[2] for name in part.only} for part in where.groups(learned)}
    assert found["attention, text"] == {"attn.add_k_proj", "attn.to_add_out"}
    assert found["feed-forward, picture"] == {"ff.net.2"} and found["feed-forward, text"] == {"ff_context.net.0.proj"}
    thirds = list(where.steps(learned))
    for done in range(7):
        inside = [bool(part.only.at(done / 7)) for part in thirds]
        assert sum(inside) == 1 and inside.index(True) == 3 * done // 7
        assert [bool(part.without.at(done / 7)) for part in thirds] == [not one for one in inside]


def test_where_scores_every_part(tmp_path, capsys):
    asked = ["--tasks", "chalk", "--pictures", "1", "--steps", "2", "--denoising-steps", "3", "--only", "groups,steps"]
    assert main(["lab", "where", *asked, "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "where.json").read_text())
    (found,) = data["found"]
    names = [row["part"] for row in found["parts"]]
    assert names[0] == "all of it" and len(names) == 1 + 4 + 3 and data["machine"]["torch"]
    scores = [row[way][name] for row in found["parts"] for way in ("only", "without") for name in where.SCORES]
    assert all(0 <= score <= 1 for score in scores) and len(set(scores)) > len(names)
    assert min(np.asarray(Image.open(tmp_path / "where.png")).shape[:2]) > 200
    said = capsys.readouterr().out
    assert all(name in said for name in names) and f"{found['parts'][0]['only']['among_style']:.2f}" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "lora,qrlora_publisht"], "did you mean 'qrlora_published'"),
        (["--subjects", "mug"], "no subject 'mug' in the lab"),
        (["--records", "missing.jsonl"], "holds no records"),
        (["--seeds", "1,x"], "--seeds"),
        (["--seeds=-1"], "a whole number from 0"),
    ],
)
def test_what_it_cannot_do_it_says(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["lab", "compare", "--small", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_method_without_a_rate_is_refused():
    with pytest.raises(DataError, match="has no learning rate yet"):
        plan.rate_of("no such method", "subject", "teapot")


def test_rates_of_the_folder_win_and_missing_ones_are_chosen_first(tmp_path, monkeypatch):
    halves = {"even": 7e-3, "odd": 8e-3}
    equal = {key: list(weights) for key, weights in EQUAL.items()}
    kept = {"weights": tuning.weights_digest(), "chosen": {"lora": {"subject": halves, "style": halves}}, "tried": []}
    kept["balance"] = {"lora": equal, "lora+ties": equal | {HERE: [1, 0.5]}}
    kept["weights tried"] = tuning.WEIGHTS
    kept["weighed"] = {row: {} for row in kept["balance"]}
    (tmp_path / plan.rates_file(1)).write_text(json.dumps(kept))
    asked = []

    def tune(folder, scope, *_):
        asked.append(scope.rows)
        return {"oft": kept["chosen"]["lora"]}, {"oft": equal, "lora+blora": equal}

    monkeypatch.setattr(tuning, "tune", tune)
    wanted = ("lora", "lora+ties", "lora+blora", "lora+joint", "oft")
    bare = {name: plan.rates()[name] for name in ("lora", DEFAULT)}
    scope = replace(TINY, rows=wanted, rates=bare, balance={})
    scope = tuning.tuned(tmp_path, scope, 1, lambda said: None)
    assert asked == [("lora+blora", "lora+joint", "oft")], "only what neither has"
    assert plan.balance_of("lora+ties", "teapot", "chalk", scope.balance) == (1, 0.5) and "lora+blora" in scope.balance
    assert plan.rate_of("lora", "subject", "teapot", scope.rates) == 7e-3
    assert plan.rate_of("lora", "subject", "rocket", scope.rates) == 8e-3
    assert "oft" in scope.rates and DEFAULT in scope.rates
    monkeypatch.setitem(ADAPTERS, "lora", replace(ADAPTERS["lora"], version=2))
    scope = tuning.tuned(tmp_path, replace(TINY, rows=("lora",)), 1, lambda said: None)
    assert plan.rate_of("lora", "subject", "teapot", scope.rates) != 7e-3, "that was chosen for another lora"
    kept["versions"] = {"lora": 2}
    (tmp_path / plan.rates_file(1)).write_text(json.dumps(kept))
    scope = tuning.tuned(tmp_path, replace(TINY, rows=("lora",)), 1, lambda said: None)
    assert plan.rate_of("lora", "subject", "teapot", scope.rates) == 7e-3
    kept["weights"] = "another base model"
    (tmp_path / plan.rates_file(1)).write_text(json.dumps(kept))
    scope = tuning.tuned(tmp_path, replace(TINY, rows=("lora",)), 1, lambda said: None)
    assert plan.rate_of("lora", "subject", "teapot", scope.rates) == plan.rate_of("lora", "subject", "teapot")


def test_what_was_chosen_and_from_what_is_kept_beside_earlier_runs(tmp_path, monkeypatch):
    def measured(folder, scope, stages, *_):
        """Every cell as good as its digest says."""
        for cell in (cell for stage in stages for cell in stage):
            digest = digest_of(cell, scope)
            whole = {
                key: list(value) if isinstance(value, tuple) else value for key, value in vars(cell).items() if value
            }
            yield whole | {"digest": digest, "measured": dict.fromkeys(tuning.KEPT, int(digest[:4], 16) / 16**4)}

    monkeypatch.setattr(tuning, "_measured", lambda *given: list(measured(*given)))

    def read():
        return [json.loads((tmp_path / name).read_text()) for name in (plan.rates_file(1), tuning.tried_file(1))]

    tuning.tune(tmp_path, replace(TINY, rows=("lora", "lora+ties")), 1, print)
    chosen, tried = read()
    assert set(chosen["balance"]) == set(tried["weighed"]) == {"lora", "lora+ties"}
    assert tuning.choose(tried["tried"]) == chosen["chosen"] and "tried" not in chosen
    gone = tried["tried"][0] | {"digest": "of another plan"}
    (tmp_path / tuning.tried_file(1)).write_text(json.dumps(tried | {"tried": [*tried["tried"], gone]}))
    rates, weights = tuning.tune(tmp_path, replace(TINY, rows=("oft",)), 1, print)
    both, more = read()
    assert both["chosen"] == chosen["chosen"] | rates and set(both["balance"]) == {"lora", "lora+ties", *weights}
    assert {one["adapter"] for one in more["tried"]} == {"lora", "oft"} and gone not in more["tried"]
    assert tuning.choose(more["tried"]) == both["chosen"]
    assert all(one in more["tried"] for one in tried["tried"])
    (tmp_path / tuning.tried_file(1)).unlink()
    tuning.tune(tmp_path, replace(TINY, rows=("oft",)), 1, print)
    assert read()[0] == both, "what is known of lora does not rest on that"


def test_packaged_rates_are_of_methods_as_they_are():
    kept = json.loads(files("qrlora.lab.compare").joinpath("rates.json").read_text())
    versions = kept.get("versions", {})
    assert all(ADAPTERS[ROWS[name].adapter].version == versions.get(name, 1) for name in kept["chosen"])


@pytest.mark.parametrize(("count", "blocks"), [(3, 1), (page.BLOCK, 1), (page.BLOCK + 1, 2), (2 * page.BLOCK + 1, 3)])
def test_a_sheet_shows_every_row_in_blocks_of_one_height(tmp_path, count, blocks):
    colours = [(200, 2 * i, 50) for i in range(count)]
    files = {f"row {i:02}": tmp_path / f"{i}.png" for i in range(count)}
    for file, colour in zip(files.values(), colours, strict=True):
        Image.new("RGB", (64 * page.SHOWN, 64), colour).save(file)
    seen = page._sheet([], files)
    assert {tuple(pixel) for pixel in seen.reshape(-1, 3)} >= set(colours)
    one, two = (page._sheet([], dict(list(files.items())[:rows])) for rows in (1, 2))
    assert seen.shape[1] == blocks * one.shape[1]
    assert len(seen) == len(one) + (-(-count // blocks) - 1) * (len(two) - len(one))


def test_a_sheet_keeps_the_colours_of_its_smallest_pictures():
    green = np.random.default_rng(0).integers((60, 80, 0), (200, 220, 90), (600, 600, 3), dtype=np.uint8)
    green[100:140, 100:140] = teal = (20, 150, 170)
    seen = np.asarray(Image.open(io.BytesIO(page._jpeg(green))))[108:132, 108:132]
    assert np.abs(seen.astype(int) - teal).max() <= 4


def test_several_lessons_leave_two_thirds_to_measure_on_and_have_rates_of_their_own(tmp_path: Path) -> None:
    scope = plan.scope_of(
        SimpleNamespace(
            small=False, **dict.fromkeys(("rows", "subjects", "styles", "seeds", "steps", "pictures")), lessons=8
        )
    )
    assert scope.lessons == 8 and plan.rates_file(8) != plan.rates_file(1)
    for role, name, others in (("subject", "teapot", world.SEEN_STYLES), ("style", "chalk", world.SEEN_SUBJECTS)):
        scenes = tasks.training_scenes(role, name, 0, 8)
        beside = {scene.style if role == "subject" else scene.subject for scene in scenes}
        assert len(scenes) == 8 and beside == set(tasks.shown_with(role, 8)) and len(beside) <= len(others) / 3
        task = tasks.task_of_world(role, name, tmp_path / f"{role}.png", 0, "<t>", 8)
        captions = [file.read_text() for file in sorted(task.file.glob("*.txt"))]
        assert len(captions) == len(list(task.file.glob("*.png"))) == 8 and all("<t>" in one for one in captions)
        assert not any(name in one for one in captions)
