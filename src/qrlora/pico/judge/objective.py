"""An objective of the weight search for subjects and styles of pico's world, where the truth is known."""

from __future__ import annotations

import numpy as np

from qrlora.pico.judge import Judge
from qrlora.quality.search.pictures import Objective


def judge_objective(part: str, name: str) -> Objective:
    """`Judge.objective` of pictures read from files. Raises DataError for pictures of another size than pico's."""
    score = Judge.load().objective(part, name)
    return lambda pictures: score(np.stack([picture.pixels for picture in pictures])).tolist()
