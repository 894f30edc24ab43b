"""pico, the embedded base model: a real, tiny text-to-image pipeline that ships with the package.

``world`` draws the pictures it was trained on, ``pretraining`` trains it, ``judge`` judges pictures, ``evaluate`` pico.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qrlora.errors import ModelError

WEIGHTS = Path(__file__).parent / "weights"
SETTINGS: dict[str, Any] = {"steps": 20, "guidance": 2.0}
"""Denoising steps and guidance that suit pico better than its family's; the options of ``evaluate`` vary them."""


def path() -> Path:
    """The folder of the shipped pipeline, for the stock ``StableDiffusion3Pipeline.from_pretrained``.

    Raises:
        ModelError: this copy of the package came without its weights.
    """
    folder = WEIGHTS / "pipeline"
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            "the embedded base model is missing",
            expected=f"a pipeline in {folder}",
            got="no model_index.json there",
            remedy="reinstall the package, or train it again: python -m qrlora.pico.pretraining --work DIR",
        )
    return folder
