"""An objective of the weight search for subjects and styles of pico's world, where the truth is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qrlora.pico.judge import Judge
from qrlora.pico.world import STYLES, SUBJECTS
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.search.pictures import Objective


def judge_objective(part: str, name: str) -> Objective:
    """Mean of the judge's decision for this name and its probability.

    Raises:
        DataError: pictures of another size than pico's.
    """
    judge = Judge.load()
    asked = {"subject": next(iter(SUBJECTS)), "style": next(iter(STYLES)), part: name}

    def score(pictures: Sequence[MeasuredPicture]) -> list[float]:
        verdict = judge.verdict(np.stack([picture.pixels for picture in pictures]), **asked)
        return ((getattr(verdict, part) + getattr(verdict, f"p_{part}")) / 2).tolist()

    return score
