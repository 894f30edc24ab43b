"""Sample sheets, trackers, and selection of a step by its pictures.

Nothing here touches the run: ΔR is the same, bit for bit, whether it is watched or not. Sheets lie beside the output,
`<output>.samples/step-000100.png`, and so do TensorBoard's event files, `<output>.logs`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qrlora._files import write_atomically
from qrlora.errors import OutputError, RecipeError, TrainingError
from qrlora.method.adapter import Adapter, load_adapter, save_adapter
from qrlora.models.families import ModelFamily
from qrlora.models.generation import labelled_grid, one_batch, or_black
from qrlora.models.training.optimizers import evaluated
from qrlora.models.training.recipe import TRIGGER, Recipe

log = logging.getLogger(__name__)


@runtime_checkable
class Run(Protocol):
    """The attributes of `loop.Run` that monitoring reads."""

    accelerator: Accelerator
    denoiser: nn.Module
    optimizer: torch.optim.Optimizer
    step: int

    def adapter(self, provenance: dict[str, Any]) -> Adapter:
        """Return the adapter as trained so far."""


Score = Callable[[Sequence[Image.Image]], float]
"""Score of the pictures of a sample sheet, prompt after prompt, every seed of each; higher is better."""
Sampled = Callable[[int, Sequence[Image.Image], Callable[[], Adapter]], None]
"""Told of every sample sheet: its step, its pictures, and a function that returns the adapter of that step."""

TENSORBOARD = "tensorboard"
PROJECT = "qrlora"
LABEL_WIDTH = 28
"""Characters to a line of a sheet's labels."""
_PLAIN = (bool, int, float, str)
_SAMPLE_FIELDS = ("sample_prompts", "sample_seeds", "resolution")


def check(recipe: Recipe, score: Score | None) -> None:
    """Check the monitoring fields of a recipe before the run.

    Raises:
        RecipeError: sample sheets without an output or a score, a score without sample sheets, or patience without a
            score.
    """
    if recipe.sample_every and recipe.output is None and score is None:
        raise RecipeError(
            "sample sheets have nowhere to go",
            expected="a recipe with an output",
            got="none",
            remedy="set output, or leave out sample_every",
        )
    if score and not recipe.sample_every:
        raise RecipeError(
            "no pictures to score",
            expected="sample_every of 1 or more",
            got=recipe.sample_every,
            remedy="say in sample_every how often to make and score them",
        )
    if recipe.patience and score is None:
        raise RecipeError(
            "patience without a score to improve",
            expected="a judge, or score=... in Python",
            got=f"patience = {recipe.patience}",
            remedy="name a judge, or leave out patience",
        )


def trackers(recipe: Recipe) -> dict[str, Any]:
    """Return the arguments of `Accelerator` that say where to log to.

    Raises:
        RecipeError: a tracker that accelerate does not know, whose package is not installed, or that needs an output.
    """
    installed = [str(name) for name in get_available_trackers()]
    if recipe.log_with is None:
        wanted = [TENSORBOARD] if TENSORBOARD in installed and recipe.output else []
    else:
        wanted = [name.strip() for name in recipe.log_with.split(",") if name.strip() not in ("", "none")]
    for name in wanted:
        _check_tracker(name, installed, recipe)
    folder = recipe.output.with_suffix(".logs") if recipe.output else None
    return {"log_with": wanted, "project_dir": folder} if wanted else {}


def _check_tracker(name: str, installed: Sequence[str], recipe: Recipe) -> None:
    known = LOGGER_TYPE_TO_CLASS.get(name)
    if known is None:
        raise RecipeError(
            f"unknown tracker {name!r}",
            expected=", ".join(LOGGER_TYPE_TO_CLASS),
            got=f"log_with = {recipe.log_with!r}",
            remedy="name one of these, or none",
        )
    if known.__module__ == "accelerate.tracking" and name not in installed:
        package = "'qrlora[tensorboard]'" if name == TENSORBOARD else name
        raise RecipeError(
            f"the tracker {name} cannot be used",
            expected=f"its package, {name}",
            got="not installed",
            remedy=f"pip install {package}, or leave out log_with",
        )
    if known.requires_logging_directory and recipe.output is None:
        raise RecipeError(
            f"the tracker {name} writes files, and has nowhere to",
            expected="a recipe with an output",
            got="none",
            remedy="set output, or leave out log_with",
        )


class Sampler:
    """Sampler of the same pictures at every call, as training goes on.

    The prompts are encoded when it is made, so that of the pipeline only the autoencoder has to stay: what
    `encode_prompt` returned then is what the pipeline is given from then on, the same for every family.
    """

    def __init__(self, recipe: Recipe, pipe: Any, family: ModelFamily):
        """pipe: with its encoders on some device; its denoiser is not called.

        Raises:
            DataError: a prompt longer than the model reads, or a resolution that it does not make.
        """
        prompts = recipe.sample_prompts or (recipe.caption,)
        self.prompts = [prompt.replace(TRIGGER, recipe.trigger) for prompt in prompts]
        self.seeds = [recipe.seed + i for i in range(recipe.sample_seeds)]
        self._recipe, self._family, self._pipe = recipe, family, copy.copy(pipe)
        self._encoded = self._encode()
        asked = [[prompt for prompt, _ in batch] for batch in self._batches]
        options = {tuple(prompts): family.prompt_options(pipe, prompts) for prompts in asked}
        # SD3's depend on which encoders there are, and soon there are none
        self._family = dataclasses.replace(family, prompt_options=lambda _, prompts: options[tuple(prompts)])
        for name in self._pipe.components:
            if name.startswith("text_encoder"):
                vars(self._pipe)[name] = None

    @property
    def _batches(self) -> Iterator[list[tuple[str, int]]]:
        jobs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        for start in range(0, len(jobs), self._recipe.batch_size):
            yield jobs[start : start + self._recipe.batch_size]

    def _encode(self) -> list[Any]:
        """Return what the pipeline's own calls of `encode_prompt` return, up to where it would call the denoiser."""
        encode, returned = self._pipe.encode_prompt, []

        def listen(*args: Any, **kwargs: Any) -> Any:
            returned.append(encode(*args, **kwargs))
            return returned[-1]

        parts = vars(self._pipe)  # setattr would enter what is no component into the pipeline's configuration
        parts |= {self._family.denoiser: _Unready(parts[self._family.denoiser]), "encode_prompt": listen}
        for batch in self._batches:
            with contextlib.suppress(_Encoded):
                self._make(batch)
        return returned

    def _make(self, jobs: list[tuple[str, int]]) -> list[Image.Image]:
        return one_batch(self._pipe, self._family, jobs, resolution=self._recipe.resolution)

    def paint(self, denoiser: nn.Module) -> list[Image.Image]:
        """Sample every seed of the first prompt, then of the second, and so on, with the denoiser as it stands."""
        device = next(denoiser.parameters()).device
        replay = iter(tree_map_only(Tensor, lambda tensor: tensor.to(device), self._encoded))
        for part in self._pipe.components.values():
            if isinstance(part, nn.Module):
                part.to(device)
        vars(self._pipe).update({self._family.denoiser: denoiser, "encode_prompt": lambda *_, **__: next(replay)})
        return [image for batch in self._batches for image in or_black(functools.partial(self._make, batch))]

    def sheet(self, images: Sequence[Image.Image], title: str) -> Image.Image:
        """Arrange the pictures with a row for each prompt and a column for each seed."""
        rows = [images[i : i + len(self.seeds)] for i in range(0, len(images), len(self.seeds))]
        labels = ["\n".join(textwrap.wrap(prompt, LABEL_WIDTH)) for prompt in self.prompts]
        return labelled_grid(rows, labels, [f"seed {seed}" for seed in self.seeds], title)


class _Encoded(Exception):
    """Raised when the pipeline has encoded its prompts and calls the denoiser."""


class _Unready:
    """Stand in for a denoiser: it knows config and dtype, and stops the pipeline that calls it."""

    def __init__(self, denoiser: Any):
        self.config, self.dtype = denoiser.config, denoiser.dtype

    def __getattr__(self, name: str) -> Any:
        raise _Encoded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Encoded


@dataclass
class Selection:
    """Selection of the step whose pictures score best so far.

    Attributes:
        patience: number of scores in a row without a new best after which training stops; 0: never.
        scores: (step, score) of every sheet but that of step 0, which shows the base model.
        best: adapter of the earliest step with the best score.
    """

    score: Score
    patience: int
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: Adapter | None = None

    @property
    def best_step(self) -> int:
        return max(self.scores, key=lambda pair: pair[1], default=(0, 0.0))[0]

    @property
    def exhausted(self) -> bool:
        since = sum(step > self.best_step for step, _ in self.scores)
        return bool(self.patience) and since >= self.patience

    def described(self, provenance: Mapping[str, Any]) -> Adapter:
        """Return the best adapter, with the choice in its provenance."""
        assert self.best is not None
        name = getattr(self.score, "__name__", type(self.score).__name__)
        choice = {"by": name, "step": self.best_step, "scores": [list(pair) for pair in self.scores]}
        metadata = dataclasses.replace(self.best.metadata, provenance={**provenance, "selection": choice})
        return dataclasses.replace(self.best, metadata=metadata)


class Monitor:
    """Trackers, sample sheets and step selection of one run. All processes sample; the main process alone scores,
    writes and logs."""

    def __init__(self, recipe: Recipe, sampler: Sampler | None, score: Score | None, sampled: Sampled | None = None):
        self.recipe, self.sampler, self.sampled = recipe, sampler, sampled
        self.selection = Selection(score, recipe.patience) if score else None
        self._since = time.perf_counter()

    @property
    def satisfied(self) -> bool:
        """Return True if the last `patience` scores had no new best, so that training stops."""
        return bool(self.selection and self.selection.exhausted)

    @contextlib.contextmanager
    def watching(self, run: Run) -> Iterator[None]:
        """Open the trackers and make the base model's own sheet before the first step; close them after the last."""
        accelerator = run.accelerator
        if accelerator.log_with:
            fields = self.recipe.record().items()
            accelerator.init_trackers(
                PROJECT, {key: value if isinstance(value, _PLAIN) else json.dumps(value) for key, value in fields}
            )
        try:
            if self.sampler and run.step == 0:
                self._sample(run)
            self._since = time.perf_counter()
            yield
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()

    def after_step(self, run: Run, loss: float, norm: float) -> None:
        """Log the step just done, and make its pictures if it is time for them.

        Raises:
            TrainingError: a score that is no finite number.
        """
        values = {"loss": loss, "learning_rate": run.optimizer.param_groups[0]["lr"], "grad_norm": norm}
        run.accelerator.log(values | {"seconds_per_step": time.perf_counter() - self._since}, run.step)
        if self.sampler and (run.step % self.recipe.sample_every == 0 or run.step == self.recipe.steps):
            self._sample(run)
        self._since = time.perf_counter()

    def _sample(self, run: Run) -> None:
        """Sample with ΔR as it is now; write, log and score the pictures."""
        assert self.sampler is not None
        with evaluated(run.optimizer):
            images = self.sampler.paint(run.denoiser)
        if self.selection and run.step:
            self._consider(run, images)
        if not run.accelerator.is_main_process:
            return
        if self.sampled:
            self.sampled(run.step, images, functools.partial(run.adapter, {}))
        for tracker in run.accelerator.trackers:
            if hasattr(tracker, "log_images"):  # not all of accelerate's can
                options = {"dataformats": "NHWC"} if tracker.name == TENSORBOARD else {}
                tracker.log_images({"samples": np.stack([np.asarray(image) for image in images])}, run.step, **options)
        if self.recipe.output:
            sheet = self.sampler.sheet(images, f"{self.recipe.model}, step {run.step} of {self.recipe.steps}")
            path = self.recipe.output.with_suffix(".samples") / f"step-{run.step:06d}.png"
            try:
                write_atomically(path, lambda stream: sheet.save(stream, "PNG"), rescue=False, make_folder=True)
            except OutputError as error:  # no picture of the way is worth the way
                log.warning("%s\ntraining goes on", error)

    def _consider(self, run: Run, images: Sequence[Image.Image]) -> None:
        """Score the pictures, and keep this step's adapter if none was better."""
        selection, accelerator = self.selection, run.accelerator
        assert selection is not None
        value = float(selection.score(images)) if accelerator.is_main_process else 0.0
        if accelerator.num_processes > 1:  # the first one's for all: they choose and stop together
            value = broadcast_object_list([value])[0]
        if not math.isfinite(value):
            raise TrainingError(
                f"the pictures of step {run.step} have no score",
                expected="a finite number",
                got=value,
                remedy="correct the score",
            )
        accelerator.log({"score": value}, run.step)
        selection.scores.append((run.step, value))
        if selection.best_step == run.step:
            selection.best = run.adapter({})

    def chosen(self, run: Run, provenance: dict[str, Any]) -> Adapter:
        """Return the best step's adapter, or the last where nothing is scored."""
        return self.selection.described(provenance) if self.selection else run.adapter(provenance)

    def keep(self, saved: Path) -> None:
        """Write the best adapter so far beside a checkpoint, for resuming; remove those beside older checkpoints."""
        if self.selection and self.selection.best:
            adapter = self.selection.described({})
            save_adapter(adapter, _best_beside(saved), "compact" if adapter.metadata.on_basis else "lora")
        for best in saved.parent.glob("best-*.safetensors"):
            if not best.with_name(best.name.replace("best-", "step-")).exists():
                best.unlink()

    def resume(self, saved: Path) -> None:
        """Restore the scores and the best adapter that belong to this checkpoint.

        Raises:
            RecipeError: its sample sheets had other settings, so scores cannot be compared.
        """
        if not self.selection or not _best_beside(saved).is_file():
            return
        best = load_adapter(_best_beside(saved))
        records = (self.recipe.record(), best.metadata.recipe)
        now, then = ({key: record.get(key) for key in _SAMPLE_FIELDS} for record in records)
        if now != then:
            raise RecipeError(
                "the sheets scored before the interruption had other pictures",
                expected=then,
                got=now,
                remedy="resume with the same samples, or start anew without resume",
            )
        self.selection.best = best
        self.selection.scores = [(step, score) for step, score in best.metadata.provenance["selection"]["scores"]]


def _best_beside(saved: Path) -> Path:
    return saved.with_name(saved.name.replace("step-", "best-"))
