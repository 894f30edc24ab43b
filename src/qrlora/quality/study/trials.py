"""The page of a blind preference study of pictures in pairs, and the key that decodes its votes.

    page, key = make_study({"ours": ours, "theirs": theirs}, "Which one shows the mug better?")

The page is one self-contained file and sends nothing anywhere. It identifies pictures and trials by random tokens; only
the key maps pictures to arms. Order and sides are randomised by the rater's name. Catch trials, which have a right
answer, are mixed in: the same picture twice, or a picture beside a degraded copy of itself.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from qrlora.errors import DataError
from qrlora.quality.images.png import data_uri, png_bytes
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.report import page

SIDE = 768
"""Longest side in pixels of a picture on the page."""
LARGEST_PNG = 256
"""Longest side up to which pictures are embedded losslessly: PNGs of large photographs have megabytes."""
QUESTION = "Which picture do you like better?"

Arms = Mapping[str, Sequence[MeasuredPicture]]


def make_study(arms: Arms, question: str = QUESTION, **options: Any) -> tuple[str, dict[str, Any]]:
    """Make the page (HTML) of a study, and its key (JSON values). options, errors: as `study_data`."""
    data, key = study_data(arms, question, **options)
    return study_page(data), key


def study_page(data: Mapping[str, Any]) -> str:
    """Return the page (HTML) that shows the data of a study."""
    return page("vote.html", question=data["question"], study=data)


def study_data(
    arms: Arms,
    question: str = QUESTION,
    *,
    references: Sequence[MeasuredPicture] = (),
    trials: int | None = None,
    catch: int = 4,
    seed: int = 0,
    by_order: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a page shows (pictures as data URIs by token, trials of two tokens), and the key to its votes.

    Args:
        arms: at least two, by name. All pairs of arms are compared, on pictures with the same file name.
        references: shown above every pair.
        trials: largest number of pairs, sampled evenly over the pairs of arms; None for all.
        catch: number of catch trials, of the two kinds in turn.
        seed: of all random choices here.
        by_order: match pictures by position instead of name.

    Raises:
        DataError: fewer than two arms, or pictures without a counterpart.
    """
    rng = np.random.default_rng(seed)
    pairs = _pairs(arms, by_order)
    if trials is not None and trials < len(pairs):
        pairs = _sampled(pairs, trials, rng)
    builder = _StudyBuilder(rng)
    for first, second in pairs:
        builder.add("pair", first, second)
    everyone = [(arm, picture) for arm, pictures in arms.items() for picture in pictures]
    for number in range(catch):
        builder.catch("spoilt" if number % 2 else "same", *everyone[rng.integers(len(everyone))])
    shown = [builder.picture(None, picture) for picture in references]
    rng.shuffle(builder.trials)
    data = {"pictures": builder.shown(), "references": shown, "trials": builder.trials, "question": question}
    # A digest of all content, so that votes of different studies cannot be mixed up.
    data["id"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    known = {token: {"arm": arm, "picture": name} for token, (arm, name) in builder.known.items()}
    key = {"study": data["id"], "question": question, "seed": seed, "arms": list(arms)}
    return data, key | {"pictures": known, "trials": builder.kinds}


Side = tuple[str | None, MeasuredPicture]
"""A picture and its arm; references and degraded copies have none."""


def _pairs(arms: Arms, by_order: bool) -> list[tuple[Side, Side]]:
    """Return all comparisons: every two arms, picture by picture."""
    if len(arms) < 2:
        raise DataError("nothing to compare", expected="at least two folders of pictures", got=len(arms))
    called = {
        arm: {(str(i) if by_order else Path(one.name).stem): one for i, one in enumerate(pictures)}
        for arm, pictures in arms.items()
    }
    first, *others = called.items()
    for arm, pictures in others:
        unmatched = sorted(set(pictures) ^ set(first[1]))
        if unmatched:
            raise DataError(
                f"{len(unmatched)} pictures of {first[0]} and {arm} have no counterpart",
                expected="the same file names in both, as `qrlora generate` gives them for the same prompts and seeds",
                got=", ".join(unmatched[:10]) + (", ..." if len(unmatched) > 10 else ""),
                remedy="rename them, or `qrlora study --by-order` if both have as many in the same order",
            )
    return [
        ((one, called[one][name]), (other, called[other][name]))
        for name in first[1]
        for one, other in itertools.combinations(called, 2)
    ]


def _sampled(pairs: list[tuple[Side, Side]], count: int, rng: np.random.Generator) -> list[tuple[Side, Side]]:
    """A random sample of pairs, balanced over the pairs of arms."""
    by_arms: dict[tuple[str | None, str | None], list[tuple[Side, Side]]] = {}
    for place in rng.permutation(len(pairs)):
        pair = pairs[place]
        by_arms.setdefault((pair[0][0], pair[1][0]), []).append(pair)
    rounds = itertools.zip_longest(*by_arms.values())
    return [pair for one_each in rounds for pair in one_each if pair is not None][:count]


class _StudyBuilder:
    """Trials and pictures under random tokens, with the key."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.known: dict[str, tuple[str | None, str]] = {}  # (arm, file name)
        self.trials: list[dict[str, str]] = []
        self.kinds: dict[str, dict[str, str]] = {}
        self._tokens: dict[tuple[str | None, MeasuredPicture], str] = {}
        self._sources: dict[str, str] = {}

    def token(self) -> str:
        return self.rng.bytes(5).hex()

    def picture(self, arm: str | None, picture: MeasuredPicture) -> str:
        """Return the token of a picture, the same in all trials."""
        shown = (arm, picture)
        if shown not in self._tokens:
            self._tokens[shown] = token = self.token()
            self.known[token] = (arm, picture.name)
            self._sources[token] = _source(picture.image)
        return self._tokens[shown]

    def add(self, kind: str, first: Side, second: Side) -> tuple[str, str]:
        """Add a trial of two pictures in random order; returns their tokens as given."""
        tokens = self.picture(*first), self.picture(*second)
        a, b = tokens if self.rng.random() < 0.5 else tokens[::-1]
        token = self.token()
        self.trials.append({"id": token, "a": a, "b": b})
        self.kinds[token] = {"kind": kind, "a": a, "b": b}
        return tokens

    def catch(self, kind: str, arm: str, picture: MeasuredPicture) -> None:
        """Add a trial with a right answer."""
        if kind == "same":
            self.add(kind, (arm, picture), (arm, picture))
            right = "tie"
        else:
            degraded = MeasuredPicture(picture.name, degrade(picture.image))
            right, _ = self.add(kind, (arm, picture), (None, degraded))
        self.kinds[self.trials[-1]["id"]]["right"] = right

    def shown(self) -> dict[str, str]:
        """Return token -> data URI in random order, which gives no arm away."""
        tokens = list(self._sources)
        return {tokens[place]: self._sources[tokens[place]] for place in self.rng.permutation(len(tokens))}


def degrade(image: Image.Image) -> np.ndarray:
    """Return a copy that is worse under any question: reduced to 8 x 8 blocks, colours inverted."""
    coarse = ImageOps.invert(image).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(coarse.resize(image.size, Image.Resampling.NEAREST))


def _source(image: Image.Image) -> str:
    """A data URI of the pixels without the metadata of the file, which could give the arm away."""
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if max(shown.size) <= LARGEST_PNG:
        return data_uri(png_bytes(shown))
    stream = io.BytesIO()
    shown.save(stream, "JPEG", quality=95, subsampling=0)
    return data_uri(stream.getvalue(), "jpeg")
