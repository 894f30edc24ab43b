"""A blind vote of people between pictures: a page that shows pairs, and a key that tells later what they were.

    page, key = make({"ours": ours, "theirs": theirs}, "Which one shows the mug better?")

The page is one file that needs nothing else and sends nothing anywhere. It knows pictures and trials by numbers without
meaning; which arm a picture is of stands in the key alone. Order and sides differ from rater to rater, and follow from
the rater's name. Catch trials are among the pairs: twice the same picture, or one beside a spoilt copy of itself.
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
from qrlora.quality.images.read import Exhibit
from qrlora.quality.report import page

SIDE = 768
"""Longest side in pixels of a picture on the page."""
LARGEST_PNG = 256
"""Longest side up to which pictures are embedded without loss: PNG of a large photograph is some megabytes."""
QUESTION = "Which picture do you like better?"

Arms = Mapping[str, Sequence[Exhibit]]


def make(
    arms: Arms,
    question: str = QUESTION,
    *,
    references: Sequence[Exhibit] = (),
    trials: int | None = None,
    catch: int = 4,
    seed: int = 0,
    by_order: bool = False,
) -> tuple[str, dict[str, Any]]:
    """The page (HTML) and its key (JSON values).

    Args:
        arms: at least two, by name; pictures of one file name are compared, and all pairs of arms.
        references: shown above every pair.
        trials: at most so many pairs, drawn evenly; all if None.
        catch: how many catch trials are added, of the two kinds in turn.
        seed: of all that is drawn here.
        by_order: compare the first pictures, the second and so on, whatever their names.

    Raises:
        DataError: fewer than two arms, or pictures that have no counterpart.
    """
    rng = np.random.default_rng(seed)
    pairs = _pairs(arms, by_order)
    if trials is not None and trials < len(pairs):
        pairs = _drawn(pairs, trials, rng)
    board = _Board(rng)
    for first, second in pairs:
        board.add("pair", first, second)
    everyone = [(arm, picture) for arm, pictures in arms.items() for picture in pictures]
    for number in range(catch):
        board.catch("spoilt" if number % 2 else "same", *everyone[rng.integers(len(everyone))])
    shown = [board.picture(None, picture) for picture in references]
    rng.shuffle(board.trials)
    data = {"pictures": board.shown(), "references": shown, "trials": board.trials, "question": question}
    # Of all that is shown, so that no two studies pass for one another.
    data["id"] = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]
    known = {token: {"arm": arm, "picture": name} for token, (arm, name) in board.known.items()}
    key = {"study": data["id"], "question": question, "seed": seed, "arms": list(arms)}
    return page("vote.html", question=question, study=data), key | {"pictures": known, "trials": board.kinds}


Side = tuple[str | None, Exhibit]
"""A picture and its arm; references and spoilt copies have none."""


def _pairs(arms: Arms, by_order: bool) -> list[tuple[Side, Side]]:
    """What is compared: every two arms, picture by picture."""
    if len(arms) < 2:
        raise DataError("a vote needs a choice", expected="two folders of pictures or more", got=len(arms))
    called = {
        arm: {(str(i) if by_order else Path(one.name).stem): one for i, one in enumerate(pictures)}
        for arm, pictures in arms.items()
    }
    first, *others = called.items()
    for arm, pictures in others:
        lonely = sorted(set(pictures) ^ set(first[1]))
        if lonely:
            raise DataError(
                f"{len(lonely)} pictures of {first[0]} and {arm} have no counterpart",
                expected="the same file names in both, as `qrlora generate` gives them for the same prompts and seeds",
                got=", ".join(lonely[:10]) + (", ..." if len(lonely) > 10 else ""),
                remedy="rename them, or add --by-order if they are as many and in the same order",
            )
    return [
        ((one, called[one][name]), (other, called[other][name]))
        for name in first[1]
        for one, other in itertools.combinations(called, 2)
    ]


def _drawn(pairs: list[tuple[Side, Side]], count: int, rng: np.random.Generator) -> list[tuple[Side, Side]]:
    """So many pairs by chance, of every two arms as evenly as it goes."""
    by_arms: dict[tuple[str | None, str | None], list[tuple[Side, Side]]] = {}
    for place in rng.permutation(len(pairs)):
        pair = pairs[place]
        by_arms.setdefault((pair[0][0], pair[1][0]), []).append(pair)
    rounds = itertools.zip_longest(*by_arms.values())
    return [pair for one_each in rounds for pair in one_each if pair is not None][:count]


class _Board:
    """Trials and pictures under numbers without meaning, and what they are."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.known: dict[str, tuple[str | None, str]] = {}  # (arm, file name)
        self.trials: list[dict[str, str]] = []
        self.kinds: dict[str, dict[str, str]] = {}
        self._tokens: dict[tuple[str | None, Exhibit], str] = {}
        self._sources: dict[str, str] = {}

    def token(self) -> str:
        return self.rng.bytes(5).hex()

    def picture(self, arm: str | None, picture: Exhibit) -> str:
        """The number of a picture; one shown in several trials has one."""
        mark = (arm, picture)
        if mark not in self._tokens:
            self._tokens[mark] = token = self.token()
            self.known[token] = (arm, picture.name)
            self._sources[token] = _source(picture.image)
        return self._tokens[mark]

    def add(self, kind: str, first: Side, second: Side) -> tuple[str, str]:
        """A trial of two pictures, in an order by chance; their numbers as they were given."""
        numbers = self.picture(*first), self.picture(*second)
        a, b = numbers if self.rng.random() < 0.5 else numbers[::-1]
        token = self.token()
        self.trials.append({"id": token, "a": a, "b": b})
        self.kinds[token] = {"kind": kind, "a": a, "b": b}
        return numbers

    def catch(self, kind: str, arm: str, picture: Exhibit) -> None:
        """A trial with a right answer."""
        if kind == "same":
            self.add(kind, (arm, picture), (arm, picture))
            right = "tie"
        else:
            spoilt = Exhibit(picture.name, spoil(picture.image))
            right, _ = self.add(kind, (arm, picture), (None, spoilt))
        self.kinds[self.trials[-1]["id"]]["right"] = right

    def shown(self) -> dict[str, str]:
        """Number -> data URI, in an order by chance, so that it tells no arm either."""
        tokens = list(self._sources)
        return {tokens[place]: self._sources[tokens[place]] for place in self.rng.permutation(len(tokens))}


def spoil(image: Image.Image) -> np.ndarray:
    """A copy that nobody could prefer, whatever the question: 8 coarse blocks a side, colours inverted."""
    coarse = ImageOps.invert(image).resize((8, 8), Image.Resampling.BOX)
    return np.asarray(coarse.resize(image.size, Image.Resampling.NEAREST))


def _source(image: Image.Image) -> str:
    """A data URI of the pixels alone: what a file says of its making is not carried along."""
    shown = image.copy()
    shown.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    if max(shown.size) <= LARGEST_PNG:
        return data_uri(png_bytes(shown))
    stream = io.BytesIO()
    shown.save(stream, "JPEG", quality=95, subsampling=0)
    return data_uri(stream.getvalue(), "jpeg")
