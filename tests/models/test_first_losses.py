"""The first losses of every recipe in recipes/ are those of first_losses.json, whatever the processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from first_losses import RECIPES, STEPS, STORED, first_losses
from samples import EPS, NETWORK

LOSSES = json.loads(STORED.read_text())
PASSES = [3 * step + 1 for step in range(STEPS)]
"""Passes through the network that a loss comes from: its own forward, and of each step before it three times the
arithmetic, forward and backward. Two things amplify rounding, and both stay below it. AdamW makes a whole step of a
gradient that is nothing but rounding; the loss moves by that gradient times the step. Q is off by rounding times the
condition of its columns over the gap of the singular values: 4e-4 in the median layer and 2e-2 in the worst, of which
each has a fifteenth or less of the change that training made to the loss."""


def off(losses: list[float], path: Path) -> list[float]:
    """Differences from the pinned losses, in multiples of what rounding explains (`samples.assert_rounded`)."""
    pinned = LOSSES[path.name]
    return [abs(a - b) / (b * n * NETWORK * EPS) for a, b, n in zip(losses, pinned, PASSES, strict=True)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_first_losses_are_as_pinned_and_depend_on_the_steps_before(path: Path, tmp_path: Path) -> None:
    assert max(off(first_losses(path, tmp_path), path)) <= 1
    slower = off(first_losses(path, tmp_path, learning_rate=0.01), path)
    assert slower[0] <= 1 < max(slower[1:])  # the bound is tight enough to see another optimiser


def test_every_recipe_is_pinned_and_nothing_else() -> None:
    assert set(LOSSES) == {path.name for path in RECIPES}
