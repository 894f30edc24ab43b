"""Merges: each by the property its paper claims, and how a schedule is drawn with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from PIL import Image
from torch import Tensor, nn

from denoisers import build, predict, same, state
from qrlora.errors import MismatchError
from qrlora.lab.baselines.adapters import is_target
from qrlora.lab.baselines.context import Context
from qrlora.lab.baselines.deltas import Delta, Learned, inner
from qrlora.lab.baselines.merges import MERGES, KLora, Schedule, blocks_of, drawing
from qrlora.models.families import load_pipeline
from qrlora.models.generation import one_batch
from qrlora.models.training.recipe import Recipe
from samples import EPS, assert_rounded

NAMES = [f"transformer_blocks.{i}.attn.{part}" for i in range(6) for part in ("to_q", "to_k")]


def drawn(seed: int, rank: int = 3, size: tuple[int, int] = (10, 14), dense: bool = False) -> Learned:
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (torch.randn(size[0], rank, generator=generator), torch.randn(rank, size[1], generator=generator))
        for _ in NAMES
    ]
    return {
        n: Delta(matrix=up @ down) if dense else Delta(up, down) for n, (up, down) in zip(NAMES, pairs, strict=True)
    }


def dense(learned: Any) -> dict[str, Tensor]:
    return {name: delta.dense() for name, delta in learned.items()}


def close(one: Any, other: dict[str, Tensor], terms: int = 256) -> bool:
    """To the rounding of so many float32 terms, of each layer's largest entry."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[n].dense(), other[n], atol=terms * EPS * float(other[n].abs().max()), rtol=0) for n in other
    )


@pytest.fixture(scope="module")
def model(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Learned, Learned]:
    """A context on a tiny base model, and two ΔW of rank 2 on it."""
    folder = tmp_path_factory.mktemp("pictures")
    Image.radial_gradient("L").convert("RGB").save(folder / "mug.png")
    Image.linear_gradient("L").convert("RGB").save(folder / "car.png")
    recipes = [
        Recipe(role="subject", images=folder / "mug.png", noun="mug"),
        Recipe(role="style", images=folder / "car.png", noun="car"),
    ]
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    parts = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        linear = [(n, m) for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)]
        sizes = {n: tuple(m.weight.shape) for n, m in linear if is_target(n, family.targets)}
        draws = {
            n: (torch.randn(o, 2, generator=generator), torch.randn(2, i, generator=generator))
            for n, (o, i) in sizes.items()
        }
        parts.append({n: Delta(0.1 * up, 0.3 * down) for n, (up, down) in draws.items()})
    return Context(pipe, family, recipes, batch_size=2), parts[0], parts[1]


@pytest.mark.parametrize("name", MERGES)
def test_every_merge_covers_every_layer_and_leaves_the_model(
    name: str, model: tuple[Context, Learned, Learned]
) -> None:
    context, subject, style = model
    before = state(context.denoiser)
    options = {"steps": 2} if name == "ziplora" else {}
    merged = MERGES[name]([subject, style], context, **options)
    assert isinstance(merged, Schedule) == (name == "klora")
    shown = merged.at(0.3) if isinstance(merged, Schedule) else merged
    assert list(shown) == list(subject) or set(shown) == set(subject)
    assert all(shown[n].shape == subject[n].shape and bool(shown[n].dense().isfinite().all()) for n in subject)
    assert same(context.denoiser, before)


@pytest.mark.parametrize("name", [name for name, merge in MERGES.items() if merge.several])
def test_merges_of_several_take_three(name: str, model: tuple[Context, Learned, Learned]) -> None:
    context, subject, style = model
    three = Context(context.pipe, context.family, [*context.recipes, context.recipes[0]], batch_size=2)
    options = {"steps": 1} if name == "ziplora" else {}
    assert set(MERGES[name]([subject, style, subject], three, **options)) == set(subject)


@pytest.mark.parametrize("name", [name for name, merge in MERGES.items() if not merge.several])
def test_merges_of_two_refuse_three(name: str) -> None:
    with pytest.raises(MismatchError, match="two parts, subject and style"):
        MERGES[name]([drawn(0), drawn(1), drawn(2)])


def test_sum_is_exact_and_keeps_layers_of_one_alone() -> None:
    parts = [drawn(seed) for seed in range(3)]
    last = parts[2].pop(NAMES[-1])
    merged = MERGES["sum"](parts)
    assert close(merged, {n: sum(p[n].dense() for p in parts if n in p) for n in NAMES})  # type: ignore[misc]
    alone = MERGES["sum"]([{NAMES[0]: last}, {NAMES[1]: last}])
    assert close(alone, {NAMES[0]: last.dense(), NAMES[1]: last.dense()})


def test_ties_is_pefts_function() -> None:
    parts = [drawn(seed) for seed in range(3)]
    expected = {n: merge_utils.ties([p[n].dense() for p in parts], torch.ones(3), 0.5) for n in NAMES}
    assert close(MERGES["ties"](parts), expected, 0.0)
    kept = {n: merge_utils.magnitude_based_pruning(parts[0][n].dense(), 0.5) for n in NAMES}
    assert close(MERGES["ties"]([parts[0], parts[0]]), kept)


@pytest.mark.parametrize("factored", [True, False])
def test_hard_null_space_projection_leaves_nothing_in_the_others_rows(factored: bool) -> None:
    """And at half strength, half of it; either way what the other does not read is left alone."""
    parts = [drawn(0, dense=not factored), drawn(1)]
    spaces = [{n: torch.linalg.svd(d.dense())[2][:3].T for n, d in part.items()} for part in parts]
    for strength in (1.0, 0.5):
        merged = dense(MERGES["null_space"](parts, strength=strength))
        for name in NAMES:
            one, two = parts[0][name].dense(), parts[1][name].dense()
            v, w = spaces[0][name], spaces[1][name]
            expected = one - strength * (one @ w) @ w.T + two - strength * (two @ v) @ v.T
            assert_rounded(merged[name], expected, terms=1024, size=float(one.norm() + two.norm()))


def test_disjoint_row_spaces_survive_projection() -> None:
    left, right = torch.eye(14)[:3], torch.eye(14)[5:8]
    parts = [{n: Delta(d.factors[0], rows) for n, d in drawn(seed).items()} for seed, rows in ((0, left), (1, right))]
    assert close(MERGES["null_space"](parts, strength=1.0), dense(MERGES["sum"](parts)))


def test_klora_takes_the_subject_early_and_the_style_late() -> None:
    merged = MERGES["klora"]([drawn(0), drawn(0)])  # equal: the ratio is 1, reached at a third
    assert isinstance(merged, KLora) and list(merged.ratios.values()) == pytest.approx(
        [1.0] * len(NAMES), rel=256 * EPS
    )
    assert merged.at(0.3) == merged.subject and merged.at(0.4) == merged.style


def test_klora_chooses_by_the_largest_entries_and_balances_the_sums() -> None:
    """Spread evenly or in one entry: sums alike over all layers, so γ is 1; the peak wins where it is."""
    even, peak = torch.full((4, 1), 1.0), torch.zeros(4, 1)
    peak[0] = 4.0
    one = torch.ones(1, 1)  # of rank 1, so one entry counts
    subject = {"a": Delta(peak, one), "b": Delta(even, one)}
    style = {"a": Delta(even, one), "b": Delta(peak, one)}
    for strength in (1.0, 5.0):  # γ takes out how strong the two are
        louder = {name: delta.scaled(strength) for name, delta in style.items()}
        merged = MERGES["klora"]([subject, louder])
        assert isinstance(merged, KLora) and merged.ratios == pytest.approx({"a": 4.0, "b": 1 / 4})
        assert all(merged.at(t)["a"] is subject["a"] and merged.at(t)["b"] is louder["b"] for t in (0.0, 0.5, 1.0))
    default = MERGES["klora"]([drawn(0, rank=1), drawn(1, rank=2)])
    assert isinstance(default, KLora)
    largest = [float(p[NAMES[0]].dense().abs().flatten().topk(2).values.sum()) for p in (drawn(0, 1), drawn(1, 2))]
    sums = [sum(float(d.dense().abs().sum()) for d in p.values()) for p in (drawn(0, 1), drawn(1, 2))]
    assert default.ratios[NAMES[0]] == pytest.approx(largest[0] / largest[1] * sums[1] / sums[0], rel=256 * EPS)


def test_blocks_are_shared_out_once() -> None:
    subject, style = drawn(0), drawn(1)
    merged = MERGES["blora"]([subject, style])
    assert isinstance(merged, dict) and set(merged) == set(NAMES)
    own = {n: "subject" if merged[n] is subject[n] else "style" for n in NAMES}
    assert [own[f"transformer_blocks.{i}.attn.to_q"] for i in range(6)] == ["subject"] * 3 + ["style"] * 3


def test_blocks_of_two_kinds_are_numbered_through() -> None:
    names = ["transformer_blocks.0.a", "transformer_blocks.1.a", "single_transformer_blocks.0.a", "head"]
    assert list(blocks_of(dict.fromkeys(names, drawn(0)[NAMES[0]])).values()) == [0, 1, 2, 3]


def test_ziploras_error_and_overlap_fall(model: tuple[Context, Learned, Learned]) -> None:
    context, subject, style = model
    seen: list[tuple[int, float, float]] = []
    learnt = {"steps": 12, "learning_rate": 0.1, "report": lambda *step: seen.append(step)}
    merged = MERGES["ziplora"]([subject, style], context, penalty=0.0, **learnt)
    assert sum(e for _, e, _ in seen[-4:]) < 0.9 * sum(e for _, e, _ in seen[:4])
    assert isinstance(merged, dict) and not close(merged, dense(MERGES["sum"]([subject, style])), 8192)
    MERGES["ziplora"]([subject, style], context, penalty=10.0, **learnt)
    assert seen[12][2] == pytest.approx(1) and seen[-1][2] < 0.2


def test_ziplora_scales_columns(model: tuple[Context, Learned, Learned]) -> None:
    """Each part's share is ΔW diag(m): the other part has no rows or columns in common here."""
    context, subject, _ = model
    name = "transformer_blocks.0.attn.to_q"
    rows = torch.eye(32)
    one, other = Delta(rows[:, :2], rows[:2]), Delta(rows[:, 2:4], rows[2:4])
    merged = MERGES["ziplora"]([{name: one}, {name: other}], context, steps=5, penalty=1.0)
    assert isinstance(merged, dict)
    diagonal = merged[name].dense().diagonal()
    assert torch.equal(merged[name].dense(), torch.diag(diagonal)) and bool((diagonal[:4] < 1).all())
    assert not diagonal[4:].any() and subject


def test_what_ziplora_makes_of_each_part_sums_to_its_merge(model: tuple[Context, Learned, Learned]) -> None:
    context, subject, style = model
    make = MERGES["ziplora"].once
    assert make is not None
    parts = make([subject, style], context, steps=3, learning_rate=0.1)
    merged = MERGES["ziplora"]([subject, style], context, steps=3, learning_rate=0.1)
    assert isinstance(merged, dict) and close(merged, dense(MERGES["sum"](parts)), 1e-6)


class Halves:
    """A schedule of two ΔW."""

    def __init__(self, first: Learned, second: Learned):
        self.first, self.second, self.asked = first, second, list[float]()

    def at(self, progress: float) -> Learned:
        self.asked.append(progress)
        return self.first if progress < 0.5 else self.second


def test_a_schedule_changes_weights_between_steps(model: tuple[Context, Learned, Learned]) -> None:
    context, subject, style = model
    assert context.family is not None
    before = state(context.denoiser)
    jobs, halves = [("a mug", 0), ("a car", 1)], Halves(subject, style)

    def pictures(merged: Learned | Schedule) -> np.ndarray:
        with drawing(context.denoiser, merged) as on_step:
            made = [one_batch(context.pipe, context.family, jobs, 4, 2.0, on_step=on_step) for _ in range(2)]
        assert same(context.denoiser, before)
        first, second = (np.stack([np.asarray(image) for image in images]) for images in made)
        assert (first == second).all()  # the next batch begins with the first ΔW again
        return first

    switched = pictures(halves)
    assert halves.asked == [0.0, 0.25, 0.5, 0.75, 0.0, 0.25, 0.5, 0.75, 0.0]
    assert (pictures(Halves(subject, subject)) == pictures(subject)).all()
    assert (switched != pictures(subject)).any() and (switched != pictures(style)).any()


def test_drawing_with_a_schedule_rewrites_what_changed() -> None:
    """K-LoRA on a bare denoiser: the weights are base + the chosen part at every step."""
    model, inputs, _ = build("sd3")
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "attn" in n]
    parts = [{n: Delta(matrix=torch.randn_like(model.get_submodule(n).weight)) for n in layers} for _ in range(2)]
    merged = MERGES["klora"]([parts[0], parts[1]])
    assert isinstance(merged, KLora)
    base = predict(model, inputs)
    original = {n: model.get_submodule(n).weight.detach().clone() for n in layers}
    with drawing(model, merged) as on_step:
        for done in range(5):
            expected = merged.at(done / 5)
            assert all(torch.equal(model.get_submodule(n).weight, original[n] + expected[n].dense()) for n in layers)
            on_step(done + 1, 5)
    assert torch.equal(predict(model, inputs), base)
    assert {len({id(merged.at(t)[n]) for t in (0.0, 1.0)}) for n in layers} == {2}
    assert inner(parts[0][layers[0]], parts[0][layers[0]]) > 0
