"""The first losses of every recipe in recipes/, in single precision on a tiny model of its family.

    python tests/first_losses.py        # writes first_losses.json, which test_first_losses.py compares with

Run it when losses are meant to change, and say in the commit why they do.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
STORED = HERE / "first_losses.json"
RECIPES = sorted((HERE.parent / "recipes").glob("*.toml"))
STEPS = 3
FAMILY = {"sd1.5-subject": "sd", "sd3.5-subject": "sd3"}
"""Of recipes that are called by a model's version."""


def first_losses(path: Path, folder: Path, **changes: object) -> list[float]:
    """The losses of a recipe's first steps, on one picture of 64 pixels.

    A rate of 0.03 and no warmup let the second and third loss depend on the steps before; ranks that tiny layers have.

    Args:
        path: of the recipe.
        folder: to save picture and model in.
        changes: to the recipe, besides those that make it small.
    """
    from qrlora.models.training.loop import train
    from qrlora.models.training.recipe import Recipe
    from tiny_pipelines import BUILDERS

    picture = folder / "mug.png"
    Image.linear_gradient("L").rotate(30).convert("RGB").save(picture)
    small = {"images": picture, "dtype": "float32", "rank": 4, "alpha": 4, "resolution": 64, "steps": STEPS}
    alone = {"output": None, "checkpoint_every": 0, "log_with": "none", "learning_rate": 0.03, "cooldown_steps": 0}
    recipe = Recipe.load(path, small | alone | changes)
    if recipe.model != "pico":
        BUILDERS[FAMILY.get(path.stem, path.stem.rsplit("-", 1)[0])]().save_pretrained(folder / "model")
        recipe = recipe.replace(model=str(folder / "model"))
    losses: list[float] = []
    train(recipe, progress=lambda step: losses.append(step.loss))
    return losses


def main() -> None:
    """Write them all."""
    sys.path.insert(0, str(HERE))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["QRLORA_CACHE"] = folder
        losses = {path.name: first_losses(path, Path(folder)) for path in RECIPES}
    STORED.write_text(json.dumps(losses, indent=1) + "\n")


if __name__ == "__main__":
    main()
