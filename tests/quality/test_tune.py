"""The search for weights: on made-up scores whose frontier is known, and on a tiny model from end to end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qrlora.apps.cli import main
from qrlora.apps.cli.tune import default_prompt
from qrlora.errors import DataError, MismatchError, QrloraError
from qrlora.method.adapter import load_adapter
from qrlora.method.basis import Basis
from qrlora.method.composition import Composition, project_out
from qrlora.models.families import load_pipeline
from qrlora.models.generation import generate, weight_sampler
from qrlora.pico import world
from qrlora.pico.judge.objective import judge_objective
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.metrics.table import METRICS, References
from qrlora.quality.search.pictures import PictureCache, metric_objective, split_by_blocks
from qrlora.quality.search.search import Candidate, Scores, SearchResult, Weights, frontier, ranked, search
from samples import SHAPES, make_adapter, make_basis, make_lora

# the search


class World:
    """Scores that are known: the subject wants the first weight at 1, the style the second, and each spoils the other.

    What cannot be had together: subject = 1 - |a - 1| - b², style = 1 - |b - 1| - a², noise on top.
    """

    def __init__(self, noise: float = 0.0) -> None:
        self.noise, self.asked = noise, 0
        self.numbers: list[int] = []

    def true(self, weights: Weights) -> Scores:
        a, b = weights[0], weights[1]
        return 1 - abs(a - 1) - b**2 / 2, 1 - abs(b - 1) - a**2 / 2

    def __call__(self, jobs: Sequence[tuple[Weights, int]]) -> list[Scores]:
        self.asked += len(jobs)
        self.numbers += [number for _, number in jobs]
        found = []
        for weights, number in jobs:
            rng = np.random.default_rng([number, *(int(1000 * weight) for weight in weights)])
            found.append(tuple(np.add(self.true(weights), self.noise * rng.normal(size=2)).tolist()))
        return found


@pytest.mark.parametrize("budget", [24, 49, 120, 300])
def test_the_budget_is_kept_and_nearly_used(budget: int) -> None:
    scores = World()
    found = search(scores, 2, budget)
    assert 0.75 * budget <= scores.asked <= budget
    assert sum(len(one.search_scores) + len(one.confirmation_scores) for one in found.candidates) == scores.asked


def test_what_everyone_tries_first_is_tried_and_nothing_twice() -> None:
    found = search(World(), 2, 120)
    weights = [one.weights for one in found.candidates]
    assert (1.0, 1.0) in weights and len(set(weights)) == len(weights)
    assert all(0 <= weight <= 1.5 for one in weights for weight in one)


def test_the_frontier_found_is_near_the_true_one() -> None:
    """Against the true frontier on a fine grid: every point found is within a little of it, and both ends are there."""
    scores = World()
    grid = [scores.true((a, b)) for a in np.linspace(0, 1.5, 61) for b in np.linspace(0, 1.5, 61)]
    true = np.array([grid[i] for i in frontier(grid)])
    found = search(scores, 2, 240, seed=1)
    for one in found.frontier:
        assert min(np.maximum(true - one.mean, 0).sum(1)) < 0.1
    means = np.array([one.mean for one in found.frontier])
    assert (true.max(0) - means.max(0) < 0.15).all() and len(means) >= 4


def test_the_search_and_the_second_look_use_other_pictures() -> None:
    scores = World(noise=0.3)
    found = search(scores, 2, 120)
    numbers = scores.numbers
    assert set(numbers[: 2 * len(found.candidates)]) == {0, 1} and 0 not in numbers[2 * len(found.candidates) :]


def test_reported_scores_are_not_those_that_were_chosen_by() -> None:
    """Where all is noise, the best guesses look good, and the second look says that they are not."""
    flat = World(noise=1.0)
    flat.true = lambda _: (0.0, 0.0)  # type: ignore[method-assign]
    found = [search(flat, 2, 240, seed=seed) for seed in range(5)]
    guesses = [np.mean([one.search_mean for one in each.confirmed]) for each in found]
    means = [np.mean([one.mean for one in each.confirmed]) for each in found]
    assert np.mean(guesses) > 0.3 > 0.2 > abs(np.mean(means))


def test_a_seed_is_a_search() -> None:
    first, again, other = (search(World(), 2, 60, seed=seed) for seed in (1, 1, 2))
    assert [one.weights for one in first.candidates] == [one.weights for one in again.candidates]
    assert [one.weights for one in first.candidates] != [one.weights for one in other.candidates]


def test_a_budget_that_tells_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="24 pictures"):
        search(World(), 2, 23)


def test_frontier_and_rank_by_hand() -> None:
    points = [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.4, 0.4), (0.5, 0.5), (0.0, 0.0)]
    assert frontier(points) in ([1, 2, 0], [1, 4, 0])
    assert frontier([(1.0, 0.0), (1.0, 1.0)]) == [1]
    order = ranked(points)
    assert sorted(order) == list(range(6)) and set(order[:2]) == {0, 1} and order[-1] == 5


def test_the_balanced_point_gives_up_least_of_either() -> None:
    made = [Candidate((weight,), [mean], [mean]) for weight, mean in enumerate([(1.0, 0.0), (0.8, 0.8), (0.0, 1.0)])]
    found = SearchResult(tuple(made), tuple(made))
    assert found.balanced is made[1] and math.isnan(made[0].error[0])
    spread = Candidate((1.0,), confirmation_scores=[(0.0, 1.0), (2.0, 1.0)])
    assert spread.mean == (1, 1) and spread.error == pytest.approx((1.0, 0.0))


# parts of adapters, and the cache


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory) -> Basis:
    return make_basis(tmp_path_factory.mktemp("basis"))


TWO_BLOCKS = {name: shape for name, shape in SHAPES.items() if name != "proj_out"}


def test_the_parts_of_an_adapter_are_the_adapter(basis: Basis) -> None:
    whole = make_adapter(basis, shapes=TWO_BLOCKS)
    parts = split_by_blocks(whole, 2, ["conv", "blocks.0.attn.to_q", "blocks.0.ff"])
    assert [list(part.deltas) for part in parts] == [["conv"], ["blocks.0.attn.to_q", "blocks.0.ff"]]
    together = Composition([(part, 1.0) for part in parts]).adapter()
    scaled = Composition([(parts[0], 0.5), (parts[1], 1.0)]).adapter()
    for name, delta in Composition([(whole, 1.0)]).adapter().deltas.items():
        assert torch.equal(together.deltas[name], delta)
        assert torch.equal(scaled.deltas[name], delta * (0.5 if name == "conv" else 1.0))


def test_more_parts_than_blocks_and_adapters_without_a_basis_are_refused(basis: Basis) -> None:
    with pytest.raises(MismatchError, match="at most 2 parts"):
        split_by_blocks(make_adapter(basis, shapes=TWO_BLOCKS), 3, [])
    with pytest.raises(MismatchError, match="is not on a basis"):
        split_by_blocks(make_lora(), 1, [])


class Painter:
    """Paints the weights as grey, and counts."""

    def __init__(self) -> None:
        self.painted: list[Any] = []

    def __call__(self, jobs: Sequence[tuple[Weights, str, int]]) -> list[Image.Image]:
        self.painted += jobs
        return [Image.new("RGB", (16, 16), (round(100 * weights[0]), seed, 0)) for weights, _, seed in jobs]


def test_an_album_makes_every_picture_once_and_finds_it_again(tmp_path: Path) -> None:
    paint = Painter()
    cache = PictureCache(paint, tmp_path / "kept", {"model": "tiny"}, ["one", "two"], 5, batch_size=2)
    found = cache.pictures([((1.0,), 0), ((0.5,), 1), ((1.0,), 2), ((1.0,), 0)])
    assert paint.painted == [((1.0,), "one", 5), ((0.5,), "two", 5), ((1.0,), "one", 6)] and cache.made == 3
    assert [one.pixels[0, 0].tolist() for one in found] == [[100, 5, 0], [50, 5, 0], [100, 6, 0], [100, 5, 0]]
    again = PictureCache(paint, tmp_path / "kept", {"model": "tiny"}, ["one", "two"], 5, batch_size=2)
    assert len(again.pictures([((1.0,), 0), ((0.5,), 1)])) == 2 and again.made == 0
    other = PictureCache(paint, tmp_path / "kept", {"model": "another"}, ["one", "two"], 5, batch_size=2)
    other.pictures([((1.0,), 0)])
    assert other.made == 1


def drawn(*subjects: str) -> list[MeasuredPicture]:
    scenes = [world.sample_scene(1, subject=name, style="flat") for name in subjects]
    return [MeasuredPicture("", world.render(scene)[0]) for scene in scenes]


def test_measures_score_by_their_range_and_direction() -> None:
    mug, car = (
        MeasuredPicture("", world.render(world.sample_scene(seed, subject=s))[0])
        for seed, s in ((1, "mug"), (2, "car"))
    )
    rows = [METRICS["edges"], METRICS["structure"]]
    same, other = metric_objective(rows, References(subject=[mug]))([mug, car])
    assert same == pytest.approx(1) and other < 0.8
    assert metric_objective([METRICS["texture"]], References(style=[mug]))([mug])[0] == pytest.approx(1)


def test_the_judge_scores_each_picture() -> None:
    pictures = [
        MeasuredPicture("", world.render(world.sample_scene(1, subject=name, style="flat"))[0])
        for name in ("mug", "car")
    ]
    right, wrong = judge_objective("subject", "mug")(pictures)
    assert right > 0.9 and wrong < 0.1
    assert min(judge_objective("style", "flat")(pictures)) > 0.9


def test_the_prompt_is_read_off_the_adapters(basis: Basis) -> None:
    subject = make_adapter(basis, role="subject", trigger="<c>", recipe={"noun": "mug"})
    style = make_adapter(basis, role="style", trigger="<s>")
    assert default_prompt([style, subject]) == "a <c> mug in <s> style"
    with pytest.raises(QrloraError, match="--prompt"):
        default_prompt([subject])


# from end to end


@pytest.fixture(scope="module")
def taught(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("taught")
    Image.radial_gradient("L").convert("RGB").save(folder / "mug.png")
    common = ["--model", str(tiny_sd3), "--rank", "2", "--steps", "2", "--batch-size", "1", "--noun", "mug"]
    for role in ("subject", "style"):
        arguments = ["train", f"--{role}", str(folder / "mug.png"), *common, "-o", str(folder / f"{role}.safetensors")]
        assert main(arguments) == 0
    plain = ["train", "--subject", str(folder / "mug.png"), *common, "--method", "lora"]
    assert main([*plain, "-o", str(folder / "plain.safetensors")]) == 0
    return folder


def asked(
    taught: Path, model: Path, out: Path, *more: str, adapters: tuple[str, str] = ("subject", "style")
) -> list[str]:
    files = [str(taught / f"{name}.safetensors") for name in adapters]
    picture = str(taught / "mug.png")
    common = ["--model", str(model), "--steps", "1", "--budget", "24", "-o", str(out)]
    return ["tune", *files, "--subject", picture, "--style", picture, *common, *more]


def test_tuning_ends_in_a_frontier_with_commands(
    taught: Path,
    tiny_sd3: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("qrlora.apps.cli.shared.PATIENCE", 0.0)
    arguments = asked(taught, tiny_sd3, tmp_path)
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "(balanced)" in said.out and "picture 24/24" in said.err
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["settings"]["prompts"] == ["a <c> mug in <s> style"] and data["parameters"] == ["subject", "style"]
    assert data["frontier"] and data["frontier"][0]["command"].startswith("qrlora generate --adapter")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "--adapter" in page
    # Started again it makes nothing again, and finds the same.
    assert main([*arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["sampled"] == 0 and again["frontier"] == data["frontier"]


def test_tuning_with_null_space_projection(taught: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    """Pictures of the sum are not taken for theirs, and the commands make them."""
    assert main(asked(taught, tiny_sd3, tmp_path, "--null-space", "0")) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    assert all(" --null-space 0 --prompt" in point["command"] for point in data["frontier"])
    arguments = asked(taught, tiny_sd3, tmp_path, "--null-space", "0.7")
    assert main(arguments) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["sampled"] == 24 and data["settings"]["null_space"] == 0.7
    assert all(" --null-space 0.7 --prompt" in point["command"] for point in data["frontier"])
    assert main([*arguments, "--per-block", "2"]) == 0
    point = load_adapter(tmp_path / "point-1.safetensors")
    assert point.metadata.provenance["null_space"] == 0.7


def test_weights_by_blocks_are_written_as_compositions(taught: Path, tiny_sd3: Path, tmp_path: Path) -> None:
    assert main(asked(taught, tiny_sd3, tmp_path, "--per-block", "2")) == 0
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["parameters"] == ["subject 1/2", "subject 2/2", "style 1/2", "style 2/2"]
    for i, point in enumerate(data["frontier"]):
        file = tmp_path / f"point-{i + 1}.safetensors"
        assert str(file) in point["command"] and load_adapter(file).metadata.role == "composition"


@pytest.mark.parametrize("strength", [0.0, 1.0])
@pytest.mark.parametrize("names", [("subject", "style"), ("plain", "style")])
def test_what_is_painted_is_what_generate_makes(
    names: tuple[str, str], strength: float, taught: Path, tiny_sd3: Path
) -> None:
    """On one basis, and side by side; summed, and projected; the adapters are off the model afterwards."""
    pipe, family = load_pipeline(tiny_sd3)
    adapters = {name: load_adapter(taught / f"{name}.safetensors") for name in names}
    jobs = [((100.0, 50.0), "a mug", 1), ((100.0, 50.0), "a cup", 1), ((0.0, 30.0), "a mug", 1)]
    with weight_sampler(pipe, family, adapters, null_space=strength, batch_size=2, steps=2) as sampler:
        painted = [np.asarray(image).astype(int) for image in sampler(jobs)]
    for (weights, prompt, seed), found in zip(jobs, painted, strict=True):
        weighted = project_out(list(zip(adapters.values(), weights, strict=True)), strength)
        alone = generate(pipe, family, [prompt], [seed], adapters=weighted, steps=2)[0]
        assert np.abs(found - np.asarray(alone)).max() <= 1
    assert np.abs(painted[0] - painted[2]).max() > 1
    assert not getattr(family.denoiser_of(pipe), "peft_config", {})


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--budget", "10"], "24 pictures"),
        (["--subject", "mugg"], "did you mean mug?"),
        (["--highest", "-1"], "--highest above 0"),
        (["--subject-metrics", "texture"], "texture lacks an input"),
        (["--subject-metrics", "dino"], "DINOv2 is not on this machine"),
        (["--per-block", "99"], "cannot be split by blocks"),
    ],
)
def test_what_cannot_be_tuned_is_said(
    more: list[str], words: str, taught: Path, tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(asked(taught, tiny_sd3, tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
