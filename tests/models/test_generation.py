"""Pictures: each depends on its own seed, adapters act and go, grids are labelled."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.errors import DataError, MismatchError
from qrlora.method.adapter import Adapter, adapter_from_model, remove_adapters
from qrlora.method.composition import project_out
from qrlora.models.families import load_pipeline
from qrlora.models.generation import _labels, generate, labelled_grid, weight_grid
from qrlora.models.training.attach import peft_config
from qrlora.models.training.recipe import Recipe
from samples import close

STEPS = {"steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def loaded(tiny_sd3: Path):
    return load_pipeline(tiny_sd3, device="cpu")


def adapter(loaded, role: str, **changes: object) -> Adapter:
    """A random adapter of this role, large enough to be seen."""
    pipe, family = loaded
    recipe = Recipe.of({"role": role, "images": "a.png", "rank": 2, **changes})
    pipe.transformer.add_adapter(peft_config(recipe, family), adapter_name=role)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    made = adapter_from_model(pipe.transformer, role, family="sd3", role=role)
    remove_adapters(pipe.transformer, [role])
    return made


def test_a_picture_depends_on_its_own_seed_not_on_its_batch(loaded) -> None:
    together = generate(*loaded, ["a mug", "a car"], [0, 5, 9], **STEPS)
    assert len(together) == 6 and together[0].size == (16, 16)
    alone = generate(*loaded, ["a car"], [5], batch_size=1, **STEPS)
    assert close(together[4], alone[0]) and not close(together[4], together[5])
    for one, other in zip(
        together, generate(*loaded, ["a mug", "a car"], [0, 5, 9], batch_size=4, **STEPS), strict=True
    ):
        assert close(one, other)


def test_adapters_act_and_leave_no_trace(loaded) -> None:
    pipe, _ = loaded
    keys = list(pipe.transformer.state_dict())
    before = generate(*loaded, ["a mug"], [0], **STEPS)[0]
    with_adapter = generate(*loaded, ["a mug"], [0], adapters=[(adapter(loaded, "subject"), 1.0)], **STEPS)[0]
    assert not close(before, with_adapter)
    assert close(before, generate(*loaded, ["a mug"], [0], **STEPS)[0])
    assert list(pipe.transformer.state_dict()) == keys


@pytest.mark.parametrize("columns", ["first", None])
def test_composition_is_the_sum_of_its_parts(loaded, columns: str | None) -> None:
    """Composed (one adapter) and side by side (the grid's way): the same picture."""
    parts = [adapter(loaded, role, columns=columns) for role in ("subject", "style")]
    one = generate(*loaded, ["a mug"], [3], adapters=list(zip(parts, (0.7, 0.4), strict=True)), **STEPS)[0]
    grid = weight_grid(*loaded, "a mug", *parts, row_weights=[0.7], column_weights=[0.4], seed=3, **STEPS)
    assert close(one, cell(grid))
    assert not close(one, generate(*loaded, ["a mug"], [3], **STEPS)[0])


def test_in_a_grid_adapters_are_projected_where_neither_is_absent(loaded) -> None:
    parts = [adapter(loaded, role, columns="first") for role in ("subject", "style")]
    options: dict[str, Any] = {"row_weights": [1.0], "seed": 3, **STEPS}
    for weight, changed in ((20.0, True), (0.0, False)):
        pairs = list(zip(parts, (1.0, weight), strict=True))
        kept = project_out(pairs, 1.0)
        expected, summed = (generate(*loaded, ["a mug"], [3], adapters=one, **STEPS)[0] for one in (kept, pairs))
        grid = weight_grid(*loaded, "a mug", *parts, column_weights=[weight], null_space=1.0, **options)
        assert close(expected, cell(grid)) and close(expected, summed) != changed


def test_adapters_of_two_kinds_come_in_any_order(loaded) -> None:
    mug, plain = adapter(loaded, "subject"), adapter(loaded, "style", method="lora")
    options: dict[str, Any] = {"row_weights": [0.7], "column_weights": [0.7], "seed": 3, **STEPS}
    for strength in (0.0, 1.0):
        pairs = project_out([(mug, 0.7), (plain, 0.7)], strength)
        first = generate(*loaded, ["a mug"], [3], adapters=pairs, **STEPS)[0]
        assert close(first, generate(*loaded, ["a mug"], [3], adapters=pairs[::-1], **STEPS)[0])
        for parts in ((mug, plain), (plain, mug)):
            assert close(first, cell(weight_grid(*loaded, "a mug", *parts, null_space=strength, **options)))


def cell(grid: Image.Image) -> Image.Image:
    """The one picture of a grid, whose cells are six times the size here."""
    return grid.crop((grid.width - 96 - 4, grid.height - 96 - 4, grid.width - 4, grid.height - 4)).resize((16, 16), 0)


def test_weights_that_are_no_numbers_are_refused_and_nothing_stays(loaded) -> None:
    part, pipe = adapter(loaded, "subject"), loaded[0]
    keys = list(pipe.transformer.state_dict())
    with pytest.raises(MismatchError, match="finite weights"):
        generate(*loaded, ["a mug"], [0], adapters=[(part, float("nan"))], **STEPS)
    with pytest.raises(MismatchError, match="finite weights"):
        weight_grid(*loaded, "a mug", part, part, row_weights=[1.0], column_weights=[float("inf")], **STEPS)
    assert list(pipe.transformer.state_dict()) == keys


def test_a_grid_tells_its_adapters_apart(loaded) -> None:
    named = [dataclasses.replace(adapter(loaded, "subject"), name=name) for name in ("mug", "hat")]
    assert _labels(*named) == ("mug", "hat")
    assert _labels(named[0], adapter(loaded, "style")) == ("subject", "style")
    assert _labels(named[0], named[0]) == ("rows", "columns")


def test_plain_loras_are_added_side_by_side(loaded) -> None:
    parts = [adapter(loaded, role, method="lora") for role in ("subject", "style")]
    both = generate(*loaded, ["a mug"], [0], adapters=[(part, 1.0) for part in parts], **STEPS)[0]
    for part in parts:
        assert not close(both, generate(*loaded, ["a mug"], [0], adapters=[(part, 1.0)], **STEPS)[0])


def test_zero_weight_is_the_base(loaded) -> None:
    base = generate(*loaded, ["a mug"], [0], **STEPS)[0]
    assert close(base, generate(*loaded, ["a mug"], [0], adapters=[(adapter(loaded, "subject"), 0.0)], **STEPS)[0])


def test_adapter_of_another_base_is_refused_and_nothing_stays(loaded, tiny_sd3: Path) -> None:
    foreign = adapter(loaded, "subject")
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_q.weight.add_(0.1)
    keys = list(pipe.transformer.state_dict())
    with pytest.raises(MismatchError):
        generate(pipe, family, ["a mug"], [0], adapters=[(foreign, 1.0)], **STEPS)
    assert list(pipe.transformer.state_dict()) == keys


def test_too_long_a_prompt(loaded) -> None:
    with pytest.raises(DataError, match="prompt too long"):
        generate(*loaded, ["mug " * 100], [0], **STEPS)


def test_progress_counts_pictures(loaded) -> None:
    seen: list[tuple[int, int]] = []
    generate(*loaded, ["a"], range(3), batch_size=2, progress=lambda done, of: seen.append((done, of)), **STEPS)
    assert seen == [(2, 3), (3, 3)]


def test_labels_are_drawn_outside_the_pictures() -> None:
    """A white sheet with black cells: every label leaves dark pixels in its margin, and none in a cell."""
    cells = [[Image.new("RGB", (128, 128), (0, 0, 255))] * 3] * 2
    sheet = np.array(labelled_grid(cells, ["subject 0.5", "subject 1"], ["style 0", "style 0.5", "style 1"], "a title"))
    blue = (sheet == (0, 0, 255)).all(-1)
    assert blue.sum() == 6 * 128 * 128
    rows, columns = np.flatnonzero(blue.any(1)), np.flatnonzero(blue.any(0))
    dark = sheet.sum(-1) < 200
    assert dark[: rows[0], columns[0] :].any() and dark[rows[0] :, : columns[0]].any()
    assert not dark[rows[0] :, columns[0] :].any()
