"""What watches a run: that it sees what generation would show, and changes nothing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from qrlora.apps.cli import main
from qrlora.errors import RecipeError, TrainingError
from qrlora.method.adapter import Adapter, load_adapter
from qrlora.models.families import load_pipeline
from qrlora.models.generation import generate
from qrlora.models.training.loop import Progress, TrainingInterrupted, train
from qrlora.models.training.monitor import Sampler
from qrlora.models.training.recipe import Recipe


def recipe_on(model: Path, folder: Path, **fields: Any) -> Recipe:
    Image.radial_gradient("L").convert("RGB").save(folder / "mug.png")
    common: dict[str, Any] = {"model": str(model), "role": "subject", "images": folder / "mug.png", "noun": "mug"}
    common |= {"rank": 2, "batch_size": 2, "learning_rate": 0.1, "output": folder / "mug.safetensors"}
    return Recipe.of(common | {"steps": 3, "sample_every": 2, **fields})


@pytest.fixture
def recipe(tiny_sd3: Path, tmp_path: Path) -> Recipe:
    return recipe_on(tiny_sd3, tmp_path)


def same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(one.deltas[name], other.deltas[name]) for name in one.deltas | other.deltas)


def sheets(recipe: Recipe) -> dict[int, np.ndarray[Any, Any]]:
    """The sample sheets by step."""
    assert recipe.output is not None
    paths = sorted(recipe.output.with_suffix(".samples").iterdir())
    return {int(path.stem.removeprefix("step-")): np.asarray(Image.open(path).convert("RGB")) for path in paths}


def test_sheets_are_what_generation_shows_and_change_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Two prompts of unequal length in one batch, one seed: what `generate` makes, to one level of 255 by rounding."""
    prompts = ("a [trigger] mug", "a lamp")
    recipe = recipe_on(tiny_model, tmp_path, sample_prompts=prompts, sample_seeds=1, resolution=64, steps=2)
    quiet = train(recipe.replace(sample_every=0))
    adapter = train(recipe)
    assert same(adapter, quiet)
    pipe, family = load_pipeline(recipe.model, device="cpu")
    sampler = Sampler(recipe, pipe, family)
    pictures = sheets(recipe)
    assert list(pictures) == [0, 2]
    for step, used in ((0, []), (2, [(adapter, 1.0)])):
        images = generate(pipe, family, ["a <c> mug", "a lamp"], [0], adapters=used, resolution=recipe.resolution)
        expected = np.asarray(sampler.sheet(images, f"{recipe.model}, step {step} of 2"))
        assert np.abs(pictures[step].astype(int) - expected).max() <= 1
    assert not np.array_equal(pictures[0][60:], pictures[2][60:])  # below the title


def test_encoders_leave_memory(tiny_model: Path, tmp_path: Path) -> None:
    pipe, family = load_pipeline(tiny_model, device="cpu")
    sampler = Sampler(recipe_on(tiny_model, tmp_path, resolution=64), pipe, family)
    denoiser = family.denoiser_of(pipe)
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    encoders = [weakref.ref(getattr(pipe, name)) for name in names if getattr(pipe, name) is not None]
    assert encoders
    del pipe
    gc.collect()
    assert all(encoder() is None for encoder in encoders)
    first, again = sampler.paint(denoiser), sampler.paint(denoiser)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]


def scripted(values: Sequence[float], seen: list[int] | None = None) -> Callable[[Sequence[Image.Image]], float]:
    """A judge that has made up its mind."""
    left = iter(values)

    def judge(pictures: Sequence[Image.Image]) -> float:
        if seen is not None:
            seen.append(len(pictures))
        return next(left)

    return judge


def test_the_best_step_is_chosen_and_patience_ends(recipe: Recipe) -> None:
    """Scores of steps 1, 2, ...: the second is best, so the fourth is the last."""
    seen: list[int] = []
    recipe = recipe.replace(steps=10, sample_every=1, patience=2, sample_seeds=3)
    steps: list[int] = []
    chosen = train(recipe, score=scripted([0.2, 0.5, 0.5, 0.1, 9.0], seen), progress=lambda p: steps.append(p.step))
    assert same(chosen, train(recipe.replace(steps=2, sample_every=0, patience=0, output=None)))
    assert steps == [1, 2, 3, 4] and seen == [3] * 4
    assert recipe.output is not None and same(load_adapter(recipe.output), chosen)
    scores = [[1, 0.2], [2, 0.5], [3, 0.5], [4, 0.1]]
    assert chosen.metadata.provenance["selection"] == {"by": "judge", "step": 2, "scores": scores}
    assert chosen.metadata.provenance["pictures"][0]["name"] == "mug.png"


@pytest.mark.parametrize("changes", [{}, {"method": "lora"}])
def test_a_resumed_choice_is_the_uninterrupted_one(recipe: Recipe, changes: dict[str, Any]) -> None:
    recipe = recipe.replace(steps=6, sample_every=1, patience=3, **changes)
    scores = [0.1, 0.7, 0.3, 0.2, 0.6, 0.9]
    whole = train(recipe.replace(output=None), score=scripted(scores))

    def press(progress: Progress) -> None:
        if progress.step == 3:
            raise_interrupt()

    with pytest.raises(TrainingInterrupted):
        train(recipe, score=scripted(scores), progress=press)
    resumed = train(recipe, score=scripted(scores[3:]), resume=True)
    assert same(resumed, whole)
    assert resumed.metadata.provenance["selection"] == whole.metadata.provenance["selection"]
    assert resumed.metadata.provenance["selection"]["scores"][-1] == [5, pytest.approx(0.6)]
    with pytest.raises(RecipeError, match="other pictures"):
        train(recipe.replace(sample_seeds=1), score=scripted(scores), resume=True)


def raise_interrupt() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGINT)


def test_a_score_that_is_no_number(recipe: Recipe) -> None:
    with pytest.raises(TrainingError, match="step 2 have no score"):
        train(recipe, score=scripted([float("nan")]))


@pytest.mark.parametrize(
    ("changes", "score", "said"),
    [
        ({"output": None}, None, "nowhere to go"),
        ({"sample_every": 0}, scripted([]), "no pictures to score"),
        ({"patience": 1}, None, "patience without a score"),
        ({"log_with": "chalkboard"}, None, "unknown tracker 'chalkboard'"),
        ({"log_with": "aim"}, None, "pip install aim"),
    ],
)
def test_what_cannot_be_watched_is_said_before_anything_is_loaded(
    recipe: Recipe, changes: dict[str, Any], score: Any, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        train(recipe.replace(model="no/such", **changes), score=score)


class Notebook(GeneralTracker):
    """A tracker that remembers."""

    name = "notebook"
    requires_logging_directory = False
    pages: list[Any] = []  # noqa: RUF012

    def __init__(self, run_name: str):
        super().__init__()
        self.pages.append(run_name)

    @property
    def tracker(self) -> list[Any]:
        return self.pages

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.pages.append(("recipe", values["rank"]))

    def log(self, values: dict[str, Any], step: int | None, **_: Any) -> None:
        self.pages.append((step, values))

    def log_images(self, values: dict[str, Any], step: int | None, **_: Any) -> None:
        self.pages.append((step, values["samples"].shape))

    def finish(self) -> None:
        self.pages.append("end")


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    Notebook.pages.clear()
    return Notebook.pages


def test_trackers_of_accelerate_hear_everything(recipe: Recipe, notebook: list[Any]) -> None:
    train(recipe.replace(log_with="notebook", warmup_steps=2), score=scripted([0.5, 0.25]))
    assert notebook[:2] == ["qrlora", ("recipe", 2)] and notebook[-1] == "end"
    logged = {step: values for step, values in notebook[2:-1] if "loss" in values}
    assert list(logged) == [1, 2, 3]
    assert [values["learning_rate"] for values in logged.values()] == [0.05, 0.1, 0.1]
    assert all(values["grad_norm"] > 0 and values["seconds_per_step"] > 0 for values in logged.values())
    assert [(step, v) for step, v in notebook[2:-1] if isinstance(v, tuple)] == [(s, (2, 16, 16, 3)) for s in (0, 2, 3)]
    assert [(step, v["score"]) for step, v in notebook[2:-1] if "score" in v] == [(2, 0.5), (3, 0.25)]


def test_trackers_end_with_a_run_that_fails(recipe: Recipe, notebook: list[Any]) -> None:
    with pytest.raises(TrainingError):
        train(recipe.replace(log_with="notebook"), score=scripted([float("inf")]))
    assert notebook[-1] == "end"


def test_command_line(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["train", "--subject", str(recipe.images[0]), "--model", recipe.model, "--rank", "2", "--steps", "1"]
    flags += ["-o", str(recipe.output)]
    assert main([*flags, "--sample-every", "1", "--sample-prompts", "a <c> mug; a lamp", "--sample-seeds", "1"]) == 0
    assert list(sheets(recipe)) == [0, 1]
    assert main([*flags, "--judge", "mug"]) == 2
    assert "--model pico" in capsys.readouterr().err
    assert main([*flags, "--patience", "2"]) == 2
    assert "patience without a score" in capsys.readouterr().err
