"""Blind votes: a page that gives nothing away, and a count that gets out what raters put in."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qrlora.errors import DataError
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.metrics.shares import Share, least_above
from qrlora.quality.study.ballot import Ballot
from qrlora.quality.study.trials import LARGEST_PNG, make_study, study_data
from qrlora.quality.study.votes import Pair, Vote, bradley_terry, count_votes, krippendorff, lines, report


def picture(name: str, value: int, side: int = 16) -> MeasuredPicture:
    pixels = np.full((side, side, 3), value, np.uint8)
    pixels[: side // 2] //= 2
    return MeasuredPicture(name, pixels)


def arms(*names: str, count: int = 5) -> dict[str, list[MeasuredPicture]]:
    return {
        arm: [picture(f"scene{i}.png", (20 + 60 * a + 9 * i) % 256) for i in range(count)]
        for a, arm in enumerate(names)
    }


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script id="study" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def pixels_of(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"))


# the page


def test_the_page_tells_no_names_and_needs_nothing_else() -> None:
    made = arms("velvet", "gravel")
    page, key = make_study(made, references=[picture("secretsubject.png", 200)])
    assert key["arms"] == ["velvet", "gravel"]
    for word in ("velvet", "gravel", "scene", "secretsubject", '"kind"', "spoilt", 'right": "tie'):
        assert word not in page
    assert not re.search(r"https?://(?!www\.w3\.org)|src=\"(?!data:)", page)
    assert set(data_of(page)["trials"][0]) == {"id", "a", "b"}


def test_what_a_file_says_of_its_making_stays_out(tmp_path: Any) -> None:
    page, _ = make_study(arms("a", "b", count=1))
    for source in data_of(page)["pictures"].values():
        assert not Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).info


def test_the_key_knows_what_is_shown() -> None:
    made = arms("velvet", "gravel")
    page, key = make_study(made, catch=4, seed=3)
    data = data_of(page)
    assert {trial["id"] for trial in data["trials"]} == set(key["trials"]) and key["study"] == data["id"]
    kinds = Counter(trial["kind"] for trial in key["trials"].values())
    assert kinds == {"pair": 5, "same": 2, "spoilt": 2}
    for token, trial in key["trials"].items():
        sides = [key["pictures"][trial[side]] for side in "ab"]
        shown = [pixels_of(data["pictures"][trial[side]]) for side in "ab"]
        assert next(t for t in data["trials"] if t["id"] == token) == {"id": token, "a": trial["a"], "b": trial["b"]}
        if trial["kind"] == "pair":
            assert {side["arm"] for side in sides} == {"velvet", "gravel"} and sides[0]["picture"] == sides[1][
                "picture"
            ]
            for side, pixels in zip(sides, shown, strict=True):
                own = next(one for one in made[side["arm"]] if one.name == side["picture"])
                assert np.array_equal(pixels, own.pixels)
        elif trial["kind"] == "same":
            assert trial["a"] == trial["b"] and trial["right"] == "tie"
        else:
            wrong = next(side for side in "ab" if trial[side] != trial["right"])
            assert key["pictures"][trial[wrong]]["arm"] is None and key["pictures"][trial["right"]]["arm"]
            assert np.abs(shown[0].astype(int) - shown[1]).mean() > 30


def test_arms_lie_on_both_sides_and_in_every_place() -> None:
    _, key = make_study(arms("a", "b", count=60), catch=0)
    first = [key["pictures"][trial["a"]]["arm"] for trial in key["trials"].values()]
    assert 15 < first.count("a") < 45


def test_a_seed_makes_the_page_and_another_another() -> None:
    made = arms("a", "b")
    assert make_study(made, seed=1) == make_study(made, seed=1)
    assert make_study(made, seed=1)[1]["study"] != make_study(made, seed=2)[1]["study"]
    other = {"a": made["a"], "b": [picture(one.name, 240) for one in made["b"]]}
    assert make_study(made, seed=1)[1]["study"] != make_study(other, seed=1)[1]["study"]


def test_a_question_is_text_whatever_it_holds() -> None:
    page, key = make_study(arms("a", "b"), "</script><b>$data & \u201cquotes\u201d</b>")
    assert page.count("</script>") == 2 and "<b>$" not in page and "&lt;b&gt;$data" in page
    assert key["question"].startswith("</script>") and data_of(page)["id"] == key["study"]


def test_pictures_are_paired_by_name_and_never_by_guess() -> None:
    made = arms("a", "b")
    made["b"][0] = picture("other.png", 1)
    with pytest.raises(DataError, match="2 pictures of a and b have no counterpart"):
        make_study(made)
    assert len(make_study(made, by_order=True, catch=0)[1]["trials"]) == 5
    with pytest.raises(DataError, match="no counterpart"):
        make_study({"a": made["a"], "b": made["b"][:3]}, by_order=True)
    with pytest.raises(DataError, match="at least two folders"):
        make_study({"a": made["a"]})


def test_fewer_trials_are_drawn_evenly_from_all_pairs_of_arms() -> None:
    _, key = make_study(arms("a", "b", "c", count=8), trials=9, catch=0)
    between = Counter(
        frozenset(key["pictures"][trial[side]]["arm"] for side in "ab") for trial in key["trials"].values()
    )
    assert list(between.values()) == [3, 3, 3]


def test_large_pictures_are_reduced() -> None:
    wide = MeasuredPicture("a.png", np.zeros((600, 1200, 3), np.uint8))
    page, _ = make_study({"a": [wide], "b": [wide]}, catch=0)
    sources = list(data_of(page)["pictures"].values())
    assert all(pixels_of(source).shape == (384, 768, 3) and "image/jpeg" in source for source in sources)
    assert LARGEST_PNG < 768


# the page's own logic, without a page


@pytest.fixture
def planned() -> Callable[[dict[str, Any], str], list[dict[str, str]]]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("the page's script is run by node, which is not here")
    template = files("qrlora.quality.report").joinpath("templates/vote.html").read_text()
    script = template.split('"use strict";')[1].split("// page")[0]

    def run(study: dict[str, Any], rater: str) -> list[dict[str, str]]:
        asked = f"{script}\nconsole.log(JSON.stringify(plan({json.dumps(study)}, {json.dumps(rater)})));"
        return json.loads(subprocess.run([node, "-e", asked], capture_output=True, text=True, check=True).stdout)

    return run


def test_every_rater_sees_every_trial_in_an_order_and_on_sides_of_their_own(planned: Any) -> None:
    study = {"id": "x", "trials": [{"id": str(i), "a": f"a{i}", "b": f"b{i}"} for i in range(200)]}
    ann, bea = planned(study, "ann"), planned(study, "bea")
    assert ann == planned(study, "ann")
    for seen in (ann, bea):
        assert sorted(int(pair["trial"]) for pair in seen) == list(range(200))
        assert all({pair["left"], pair["right"]} == {"a" + pair["trial"], "b" + pair["trial"]} for pair in seen)
        assert 70 < sum(pair["left"][0] == "a" for pair in seen) < 130
    assert [pair["trial"] for pair in ann] != [pair["trial"] for pair in bea]
    assert 40 < sum(x["left"] == next(y for y in bea if y["trial"] == x["trial"])["left"] for x in ann) < 160


# the count


def voted(key: dict[str, Any], rater: str, choose: Callable[[dict[str, Any]], str]) -> dict[str, Any]:
    """A file of results: `choose` gets the key's trial, and says "a", "b" or "tie"."""
    votes = []
    for i, (token, trial) in enumerate(key["trials"].items()):
        left, right = (trial["a"], trial["b"]) if i % 2 else (trial["b"], trial["a"])
        choice = choose(trial)
        side = choice if choice == "tie" else "left" if trial[choice] == left else "right"
        votes.append({"trial": token, "left": left, "right": right, "choice": side, "milliseconds": 900})
    return {"study": key["study"], "rater": rater, "started": "", "complete": True, "votes": votes}


def careful(key: dict[str, Any], rank: list[str]) -> Callable[[dict[str, Any]], str]:
    """Prefers the arms in this order; right in catch trials."""

    def choose(trial: dict[str, Any]) -> str:
        if trial["kind"] != "pair":
            return "tie" if trial["right"] == "tie" else "a" if trial["a"] == trial["right"] else "b"
        places = {side: rank.index(key["pictures"][trial[side]]["arm"]) for side in "ab"}
        return min(places, key=lambda side: places[side])

    return choose


def test_votes_are_decoded_whatever_side_they_were_on() -> None:
    _, key = make_study(arms("velvet", "gravel"))
    found = count_votes([voted(key, name, careful(key, ["gravel", "velvet"])) for name in ("ann", "bea")], key)
    pair = found.pairs["velvet", "gravel"]
    assert (pair.wins, pair.losses, pair.ties, pair.raters_for, pair.raters_against) == (0, 10, 0, 0, 2)
    assert pair.share is not None and pair.share.interval[0] == 0 and found.alpha == pytest.approx(1)
    assert found.agreement["ann"].value == 1 and not found.excluded and not found.strengths


def test_ties_count_for_nobody() -> None:
    _, key = make_study(arms("a", "b"))
    right = careful(key, ["a", "b"])
    found = count_votes([voted(key, "ann", lambda trial: "tie" if trial["kind"] == "pair" else right(trial))], key)
    pair = found.pairs["a", "b"]
    assert (pair.wins, pair.losses, pair.ties) == (0, 0, 5) and pair.share is None and pair.raters is None
    assert "none of the votes without ties; 5 ties" in "\n".join(lines(found))


def test_careless_raters_are_left_out_and_named() -> None:
    _, key = make_study(arms("a", "b"))
    good = voted(key, "ann", careful(key, ["a", "b"]))
    found = count_votes([good, voted(key, "bob", lambda _: "a")], key)
    assert found.excluded.keys() == {"bob"} and "of 4 catch trials" in found.excluded["bob"]
    assert found.pairs["a", "b"].wins == 5 and list(found.raters) == ["ann"]
    assert not count_votes([good, voted(key, "bob", lambda _: "a")], key, misses=4).excluded
    with pytest.raises(DataError, match="no votes are left"):
        count_votes([voted(key, "bob", lambda _: "a")], key)


def test_an_unfinished_file_counts_as_far_as_it_goes() -> None:
    _, key = make_study(arms("a", "b"))
    result = voted(key, "ann", careful(key, ["a", "b"]))
    result["votes"] = [v for v in result["votes"] if key["trials"][v["trial"]]["kind"] == "pair"][:2]
    assert count_votes([result], key).pairs["a", "b"].wins == 2


def test_files_that_are_none_of_this_study_are_refused() -> None:
    _, key = make_study(arms("a", "b"))
    good = voted(key, "ann", careful(key, ["a", "b"]))
    bad: list[tuple[Any, str]] = [
        (good | {"study": "another"}, "votes of another study"),
        ({"study": key["study"], "votes": []}, "not a vote file of this study"),
        (good | {"votes": [good["votes"][0] | {"choice": "both"}]}, "not a vote file of this study"),
        (good | {"votes": [good["votes"][0] | {"left": "?"}]}, "not a vote file of this study"),
        (good | {"votes": [good["votes"][0]] * 2}, "not a vote file of this study"),
        (good | {"votes": 3}, "not a vote file of this study"),
    ]
    for result, words in bad:
        with pytest.raises(DataError, match=words):
            count_votes([result], key)
    with pytest.raises(DataError, match="two files of one rater"):
        count_votes([good, good], key)


def test_a_study_keeps_its_votes_while_another_takes_its_place(tmp_path: Path) -> None:
    """Votes about other pictures are never counted, and none is lost."""
    ballot = Ballot(tmp_path / "study")
    studies = [study_data(arms("a", "b"), seed=seed) for seed in (1, 2)]
    for _ in range(2):
        for data, key in studies:
            ballot.write(data, key)
            assert ballot.data()["id"] == data["id"] == ballot.key()["study"]
            if not ballot.files():
                ballot.add(voted(key, f"ann-{data['id']}", careful(key, ["a", "b"])), "ann.json")
            assert list(ballot.count().raters) == [f"ann-{data['id']}"]


@pytest.mark.parametrize("limit", [0.0, 0.5, 0.8, 0.99])
def test_with_so_many_votes_a_unanimous_share_is_surely_above_the_limit(limit: float) -> None:
    enough = least_above(limit)
    assert enough is not None and Share(enough, enough).interval[0] > limit
    assert enough == 1 or Share(enough - 1, enough - 1).interval[0] <= limit
    assert least_above(1.0) is None


def test_strengths_are_those_that_made_the_votes() -> None:
    """20000 votes for each pair, by the model itself."""
    true = {"a": 0.8, "b": 0.1, "c": -0.9}
    pairs = {}
    for one, other in itertools.combinations(true, 2):
        share = 1 / (1 + math.exp(true[other] - true[one]))
        pairs[one, other] = Pair(round(20000 * share), round(20000 * (1 - share)), 0, 0, 0)
    for arm, found in bradley_terry(list(true), pairs).items():
        assert found.value == pytest.approx(true[arm], abs=0.01)
        assert found.interval[0] < true[arm] < found.interval[1] and found.interval[1] - found.interval[0] < 0.1


def test_an_arm_that_never_won_has_a_finite_strength() -> None:
    won = {pair: Pair(5, 0, 0, 1, 0) for pair in itertools.combinations("abc", 2)}
    found = bradley_terry("abc", won)
    assert found["a"].value > found["b"].value > found["c"].value > -20


def test_alpha_is_the_published_one() -> None:
    """Krippendorff (2011), the example of four observers, nominal: 0.743."""
    table = ("1233214 12...".replace(" ", ""), "123322412 5.3".replace(" ", ""), ".333234 225 1.".replace(" ", ""),
             "123324412 51.".replace(" ", ""))  # fmt: skip
    votes = [Vote(str(r), str(t), value) for r, row in enumerate(table) for t, value in enumerate(row) if value != "."]
    assert krippendorff(votes) == pytest.approx(0.743, abs=0.001)
    assert krippendorff([Vote("ann", "1", "a")]) is None


def test_three_arms_are_put_in_order_and_on_a_page() -> None:
    _, key = make_study(arms("a", "b", "c"))
    found = count_votes([voted(key, name, careful(key, ["c", "a", "b"])) for name in ("ann", "bea")], key)
    assert max(found.strengths, key=lambda arm: found.strengths[arm].value) == "c"
    page = report(found)
    assert "Bradley-Terry" in page.html() and json.loads(json.dumps(page.data))["strengths"]["c"]["log_odds"] > 0


def test_raters_whose_names_begin_alike_have_votes_of_their_own(tmp_path: Path) -> None:
    ballot = Ballot(tmp_path)
    files = {ballot._file("a" * 60 + end) for end in ("", "b", "c")}
    assert len(files) == 3 and all(len(file.name) < 130 for file in files)
