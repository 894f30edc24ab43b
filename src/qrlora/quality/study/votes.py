"""Count the votes of a preference study.

    count = count_votes([json.loads(file.read_text()) for file in files], key)
    count.pairs["ours", "theirs"].share      # share of ours among the votes that are not ties

Raters who miss more than `misses` catch trials are excluded and listed. Votes of one rater are not independent, so the
share of raters who prefer each side is reported beside the share of votes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator

from qrlora._reading import parsing
from qrlora._said import joined, said
from qrlora.errors import DataError
from qrlora.quality.metrics.shares import Share, Z
from qrlora.quality.report import Block, Prose, Report, Section, Table

MISSES = 1
"""Catch trials that a rater may miss; one can be a slip."""


class NoVotesError(DataError):
    """No vote is left to count.

    Attributes:
        excluded: rater -> reason.
    """

    excluded: Mapping[str, str] = {}


@dataclass(frozen=True)
class Pair:
    """Votes between two arms, and the numbers of raters with a majority of votes for either."""

    wins: int
    losses: int
    ties: int
    raters_for: int
    raters_against: int

    @property
    def share(self) -> Share | None:
        """Share of the first arm among the votes without ties; None if there are none."""
        return Share(self.wins, self.wins + self.losses) if self.wins + self.losses else None

    @property
    def raters(self) -> Share | None:
        """Share of raters who prefer the first arm among those with a preference; None if there are none."""
        n = self.raters_for + self.raters_against
        return Share(self.raters_for, n) if n else None


@dataclass(frozen=True)
class Strength:
    """Bradley-Terry strength of an arm: log odds against an average arm, with its 95 % interval."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class VoteCount:
    """The outcome of a study.

    Attributes:
        raters: name -> number of votes.
        excluded: name -> reason.
        agreement: name -> share of the other raters' votes on the same trials that agree.
        alpha: Krippendorff's alpha; None if no trial has two votes or all votes are equal.
    """

    arms: tuple[str, ...]
    pairs: Mapping[tuple[str, str], Pair]
    strengths: Mapping[str, Strength]
    raters: Mapping[str, int]
    excluded: Mapping[str, str]
    agreement: Mapping[str, Share]
    alpha: float | None
    question: str

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "question": self.question,
            "arms": list(self.arms),
            "pairs": [
                {
                    "first": a,
                    "second": b,
                    **vars(pair),
                    "share": pair.share and pair.share.to_dict(),
                    "rater_share": pair.raters and pair.raters.to_dict(),
                }
                for (a, b), pair in self.pairs.items()
            ],
            "strengths": {
                arm: {"log_odds": one.value, "interval": list(one.interval)} for arm, one in self.strengths.items()
            },
            "raters": dict(self.raters),
            "excluded": dict(self.excluded),
            "agreement": {rater: share.to_dict() for rater, share in self.agreement.items()},
            "alpha": self.alpha,
        }


@dataclass(frozen=True)
class Vote:
    """One rater's answer to one trial."""

    rater: str
    trial: str
    choice: str


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, coerce_numbers_to_str=True)


class _Shown(_Part):
    arm: str | None
    picture: str = ""


class _Trial(_Part):
    kind: Literal["pair", "same", "spoilt"]
    a: str
    b: str
    right: str | None = None


class _Key(_Part):
    """The fields of a key that counting reads."""

    study: str
    question: str
    arms: list[str] = Field(min_length=2)
    pictures: dict[str, _Shown]
    trials: dict[str, _Trial]

    @model_validator(mode="after")
    def _consistent(self) -> _Key:
        for name, trial in self.trials.items():
            sides = [self.pictures[side].arm if side in self.pictures else "" for side in (trial.a, trial.b)]
            known = [side in self.arms for side in sides]
            if not (all(known) if trial.kind == "pair" else trial.right in (trial.a, trial.b, "tie")):
                raise ValueError(f"trial {name} is between pictures or arms that are none")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError("an arm named twice")
        return self


class _Answer(_Part):
    trial: str
    left: str
    right: str
    choice: Literal["left", "right", "tie"]


class _Result(_Part):
    """The fields of a rater's file that counting reads."""

    study: str
    rater: str
    votes: list[_Answer]


def checked_key(found: object, what: str = "this") -> dict[str, Any]:
    """Validate the key of a study, given as JSON values. what: its file. Raises DataError."""
    with parsing(f"{what} is no key of a study", DataError, expected="key.json as qrlora study wrote it"):
        return _Key.model_validate(found).model_dump()


def count_votes(
    results: Sequence[object], key: Mapping[str, Any], misses: int = MISSES, names: Sequence[str] | None = None
) -> VoteCount:
    """Count the votes of a study, all as JSON values.

    Args:
        results: the files of the raters.
        key: the file written with the page.
        names: paths of the results' files, for errors.

    Raises:
        DataError: results of another study, two of one rater, or malformed results, or a malformed key.
        NoVotesError: there are none, or all raters are excluded.
    """
    key = checked_key(key)
    named = zip(names or [f"file {i + 1}" for i in range(len(results))], results, strict=True)
    each = [_votes(result, key, name) for name, result in named]
    votes = [vote for _, listed in each for vote in listed]
    _check_unique([rater for rater, _ in each])
    excluded = {
        rater: reason
        for rater in dict.fromkeys(v.rater for v in votes)
        if (reason := _reason_to_exclude(rater, votes, key, misses))
    }
    counted = [v for v in votes if v.rater not in excluded and key["trials"][v.trial]["kind"] == "pair"]
    if not counted:
        left_out = joined(said("%(rater)s: %(reason)s", rater=rater, reason=why) for rater, why in excluded.items())
        remedy = "ask more people, or allow more: `qrlora study --misses`" if excluded else "ask people to vote"
        error = NoVotesError("no votes are left to count", got=left_out or said("no votes"), remedy=remedy)
        error.excluded = excluded
        raise error
    arms = tuple(key["arms"])
    pairs = {pair: _pair(pair, counted, key) for pair in itertools.combinations(arms, 2)}
    return VoteCount(
        arms,
        pairs,
        bradley_terry(arms, pairs) if len(arms) > 2 else {},
        dict(Counter(v.rater for v in counted)),
        excluded,
        _agreement(counted),
        krippendorff(counted),
        key["question"],
    )


def rater_of(result: object, key: Mapping[str, Any], name: str) -> str:
    """Return the rater of a vote file. name: the file's, for errors. DataError if it is not of this study."""
    return _votes(result, checked_key(key), name)[0]


def _votes(found: object, key: Mapping[str, Any], name: str) -> tuple[str, list[Vote]]:
    """The rater and the votes of one file, validated against the key and mapped to its sides."""
    expected = "the file that the study's page saved, unchanged"
    what = said("%(name)s: not a vote file of this study", name=name)
    with parsing(what, DataError, expected=expected):
        result = _Result.model_validate(found)
        if result.study != key["study"]:
            remedy = "name the key.json that was written with the page"
            what = said("%(name)s: votes of another study", name=name)
            raise DataError(what, expected=key["study"], got=result.study, remedy=remedy)
        votes: dict[str, Vote] = {}
        for answer in result.votes:
            trial, sides = key["trials"][answer.trial], {"left": answer.left, "right": answer.right}
            if {trial["a"], trial["b"]} != set(sides.values()) or answer.trial in votes:
                raise ValueError(said("trial %(trial)s has other pictures, or two answers", trial=answer.trial))
            side = "tie" if answer.choice == "tie" else "a" if sides[answer.choice] == trial["a"] else "b"
            votes[answer.trial] = Vote(result.rater, answer.trial, side)
    return result.rater, list(votes.values())


def _check_unique(raters: Sequence[str]) -> None:
    twice = [rater for rater, count in Counter(raters).items() if count > 1]
    if twice:
        remedy = 'leave one out, or, if they are two people, change "rater" in one of the files'
        raise DataError("two files of one rater", expected="one of each", got=", ".join(twice), remedy=remedy)


def _reason_to_exclude(rater: str, votes: Sequence[Vote], key: Mapping[str, Any], misses: int) -> str:
    """Return the reason why a rater's votes are excluded; "" if they are counted."""
    shown = missed = 0
    for vote in votes:
        trial = key["trials"][vote.trial]
        if vote.rater == rater and trial["kind"] != "pair":
            shown += 1
            missed += (vote.choice if vote.choice == "tie" else trial[vote.choice]) != trial["right"]
    return f"missed {missed} of {shown} catch trials" if missed > misses else ""


def _arm(vote: Vote, key: Mapping[str, Any]) -> tuple[str | None, frozenset[str]]:
    """The arm that a vote chose (None for a tie), and the two arms of the trial."""
    trial = key["trials"][vote.trial]
    arms = {side: key["pictures"][trial[side]]["arm"] for side in "ab"}
    return arms.get(vote.choice), frozenset(arms.values())


def _pair(pair: tuple[str, str], votes: Sequence[Vote], key: Mapping[str, Any]) -> Pair:
    chosen = [(vote.rater, arm) for vote in votes for arm, between in [_arm(vote, key)] if between == frozenset(pair)]
    balance: Counter[str] = Counter()
    for rater, arm in chosen:
        balance[rater] += (arm == pair[0]) - (arm == pair[1])
    counts = Counter(arm for _, arm in chosen)
    leaning = [value for value in balance.values() if value]
    ahead = sum(value > 0 for value in leaning)
    return Pair(counts[pair[0]], counts[pair[1]], counts[None], ahead, len(leaning) - ahead)


def bradley_terry(
    arms: Sequence[str], pairs: Mapping[tuple[str, str], Pair], rounds: int = 2000
) -> dict[str, Strength]:
    """Compute Bradley-Terry strengths with mean zero by the MM algorithm (Hunter 2004); a tie is half a vote for each.

    One tie is added to every pair, so that an arm which wins or loses every vote stays finite. The intervals come from
    the information matrix and take votes as independent.
    """
    place = {arm: i for i, arm in enumerate(arms)}
    wins = np.full((len(arms), len(arms)), 0.5)
    np.fill_diagonal(wins, 0)
    for (a, b), pair in pairs.items():
        wins[place[a], place[b]] += pair.wins + pair.ties / 2
        wins[place[b], place[a]] += pair.losses + pair.ties / 2
    played, strength = wins + wins.T, np.ones(len(arms))
    for _ in range(rounds):
        strength = wins.sum(1) / (played / (strength[:, None] + strength[None])).sum(1)
        strength /= np.exp(np.log(strength).mean())
    likely = strength[:, None] / (strength[:, None] + strength[None])
    weight = played * likely * (1 - likely)
    spread = np.sqrt(np.diag(np.linalg.pinv(np.diag(weight.sum(1)) - weight)))
    logs: Float[np.ndarray, " arms"] = np.log(strength)
    return {
        arm: Strength(float(v), (float(v - Z * s), float(v + Z * s)))
        for arm, v, s in zip(arms, logs, spread, strict=True)
    }


def _by_trial(votes: Sequence[Vote]) -> dict[str, list[Vote]]:
    found: dict[str, list[Vote]] = {}
    for vote in votes:
        found.setdefault(vote.trial, []).append(vote)
    return found


def _agreement(votes: Sequence[Vote]) -> dict[str, Share]:
    """Return for each rater the share of other raters' votes on the same trials that agree."""
    same: dict[str, list[bool]] = {}
    for together in _by_trial(votes).values():
        for one, other in itertools.permutations(together, 2):
            same.setdefault(one.rater, []).append(one.choice == other.choice)
    return {rater: Share.of(listed) for rater, listed in same.items()}


def krippendorff(votes: Sequence[Vote]) -> float | None:
    """Compute Krippendorff's alpha of nominal values (2011, "Computing Krippendorff's alpha-reliability"): 1 is perfect
    agreement, 0 is chance. None if no trial has two votes, or all votes are equal."""
    units = [Counter(v.choice for v in together) for together in _by_trial(votes).values() if len(together) > 1]
    total: Counter[str] = sum(units, Counter())
    n = total.total()
    expected = sum(total[a] * total[b] for a, b in itertools.permutations(total, 2)) / max(n - 1, 1)
    if not expected:
        return None
    observed = sum(unit[a] * unit[b] / (unit.total() - 1) for unit in units for a, b in itertools.permutations(unit, 2))
    return 1 - observed / expected


def lines(found: VoteCount) -> list[str]:
    """Return the outcome as lines of text for a terminal."""
    text = [found.question, f"{len(found.raters)} raters, {sum(found.raters.values())} votes"]
    for (a, b), pair in found.pairs.items():
        text.append(f"{a} against {b}: {_share_text(pair.share)} of the votes without ties; {pair.ties} ties")
        text.append(f"  raters who prefer {a}: {_share_text(pair.raters)}")
    for arm, one in sorted(found.strengths.items(), key=lambda item: -item[1].value):
        odds = 1 / (1 + math.exp(-one.value))
        low, high = one.interval
        text.append(
            f"{arm}: strength {one.value:+.2f} ({low:+.2f} to {high:+.2f}), preferred to an average arm by {odds:.0%}"
        )
    text += [f"excluded: {rater}: {reason}" for rater, reason in found.excluded.items()]
    text += [f"agreement of {rater} with others: {_share_text(share)}" for rater, share in found.agreement.items()]
    if found.alpha is not None:
        text.append(f"Krippendorff's alpha: {found.alpha:.2f} (1: perfect agreement, 0: chance)")
    return text


def _share_text(share: Share | None) -> str:
    return f"{share.value:.0%} ({share})" if share else "none"


def report(found: VoteCount) -> Report:
    """Make the report of a study."""
    rows: list[list[str | Share | None]] = [
        [f"{a} against {b}", pair.share, str(pair.ties), pair.raters] for (a, b), pair in found.pairs.items()
    ]
    note = (
        "Shares are of the votes without ties. The first interval takes votes as independent, but votes of one rater "
        "are not: it is too narrow, the more so the fewer the raters. The last column counts raters."
    )
    blocks: list[Block] = [Table(["", "votes for the first", "ties", "raters who prefer the first"], rows, note)]
    if found.strengths:
        order = sorted(found.strengths.items(), key=lambda item: -item[1].value)
        cells = [[arm, f"{s.value:+.2f}", f"{s.interval[0]:+.2f} to {s.interval[1]:+.2f}"] for arm, s in order]
        blocks.append(Table(["Bradley-Terry strength", "log odds", "95% interval"], cells))
    rows = [[rater, str(count), found.agreement.get(rater)] for rater, count in found.raters.items()]
    people: list[Block] = [Table(["rater", "votes", "agreement with others on the same pairs"], rows)]
    if found.alpha is not None:
        people.append(Prose([f"Krippendorff's alpha is {found.alpha:.2f}: 1 is perfect agreement, 0 is chance."]))
    if found.excluded:
        listed = [f"{rater}: {reason}" for rater, reason in found.excluded.items()]
        people += [Prose(["Excluded:"]), Prose(listed, "bad", listed=True)]
    return Report(
        title=found.question,
        subtitle=f"A blind study: {len(found.raters)} raters, {sum(found.raters.values())} votes between "
        f"{len(found.arms)} sets of pictures.",
        sections=[Section("Preferences", blocks), Section("Raters", people)],
        data=found.to_dict(),
        footer="Written by qrlora study --tally.",
    )
