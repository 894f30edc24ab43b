"""A score for `quality.search` where the truth is known: pico's judge, asked for a name of its world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qrlora.pico.judge import Judge
from qrlora.pico.world import STYLES, SUBJECTS
from qrlora.quality.images.read import Exhibit
from qrlora.quality.search.dials import Objective


def by_judge(part: str, name: str) -> Objective:
    """Pico's judge asked for a name of its world: half for being right, half for the probability of the name.

    Raises:
        DataError: pictures of another size than pico's.
    """
    judge = Judge.load()
    asked = {"subject": next(iter(SUBJECTS)), "style": next(iter(STYLES)), part: name}

    def score(pictures: Sequence[Exhibit]) -> list[float]:
        verdict = judge.verdict(np.stack([picture.pixels for picture in pictures]), **asked)
        return ((getattr(verdict, part) + getattr(verdict, f"p_{part}")) / 2).tolist()

    return score
