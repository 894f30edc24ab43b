"""The files of a training run on disk, and the lock on them. Needs no torch, so that a refusal is quick."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from qrlora._files import claimed, disk_error, sweep
from qrlora.errors import RecipeError
from qrlora.models.training.recipe import Recipe


def folder(recipe: Recipe) -> Path:
    """Return the folder of a run's checkpoints."""
    assert recipe.output is not None
    return recipe.output.with_suffix(".checkpoints")


def newest(recipe: Recipe) -> Path | None:
    """Return the checkpoint of the most steps, if there is any."""
    if recipe.output is None:
        return None
    return max(folder(recipe).glob("step-*.safetensors"), default=None, key=lambda path: path.name)


def path_of(recipe: Recipe, step: int) -> Path:
    """Return the file of the checkpoint after `step` steps."""
    return folder(recipe) / f"step-{step:06d}.safetensors"


@contextlib.contextmanager
def held(recipe: Recipe, resume: bool, restart: bool) -> Iterator[None]:
    """Lock the output of a run, if it has one, and remove unfinished files beside it.

    Raises:
        OutputError: it cannot be written, or another process holds it.
        RecipeError: as `_check_earlier`, or nowhere to write.
    """
    if recipe.output is None:
        _check_earlier(recipe, resume, restart)
        yield
        return
    if not recipe.output.parent.is_dir():
        raise RecipeError(
            f"nowhere to write {recipe.output}",
            expected="an existing folder",
            got=recipe.output.parent,
            remedy="create it",
        )
    with claimed(recipe.output):
        _check_earlier(recipe, resume, restart)
        for beside in (".checkpoints", ".samples"):
            sweep(recipe.output.with_suffix(beside))
        yield


def _check_earlier(recipe: Recipe, resume: bool, restart: bool) -> None:
    """Raise RecipeError where the checkpoints that are there, or are not, do not go with what was asked for."""
    there = newest(recipe)
    if resume and there is None:
        raise RecipeError(
            "nothing to resume",
            expected=f"a checkpoint in {folder(recipe)}" if recipe.output else "a recipe with an output",
            got="none",
            remedy="start without resume",
        )
    if resume and there and path_of(recipe, recipe.steps).name < there.name:
        raise RecipeError(
            f"{there} has more steps behind it than are asked for",
            expected=f"at least the steps of {there.name}",
            got=recipe.steps,
            remedy="ask for more steps, or train anew to another output",
        )
    if there and not resume and not restart:
        raise RecipeError(
            "the checkpoints of an earlier run are there",
            expected=f"none in {folder(recipe)}",
            got=there.name,
            remedy="continue it (`qrlora train RECIPE --resume`), start over (`qrlora train RECIPE --restart`), "
            "or name another output",
        )


def give_up(recipe: Recipe) -> None:
    """Remove the checkpoints of an earlier run, and the adapters that it chose; nothing else."""
    if recipe.output is None:
        return
    try:
        for name in ("step", "best"):
            for path in folder(recipe).glob(f"{name}-*.safetensors"):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error) from error
