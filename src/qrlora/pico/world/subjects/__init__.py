"""The subjects of the pico world: 28 things a company sells, each drawn as vector parts.

Every function takes a random generator and returns one drawing: the same thing each time, in slightly other
proportions. Drawings are deterministic given the generator and fill [-0.9, 0.9] in their larger dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qrlora.pico.world.shapes import Part
from qrlora.pico.world.subjects import home, made, worn

SEEN_SUBJECTS = (
    *("mug", "bottle", "lamp", "sneaker", "chair", "watch", "backpack", "headphones", "camera", "guitar", "book"),
    *("umbrella", "hat", "phone", "sofa", "handbag", "candle", "plant", "clock", "glasses", "car", "shirt"),
)
"""The subjects the pico base model is trained on."""
RESERVED_SUBJECTS = ("teapot", "rocket", "robot", "boot", "cupcake", "trophy")
"""The subjects kept from the pico base model, for adapters to learn."""

_DRAWINGS = {**vars(home), **vars(made), **vars(worn)}
SUBJECTS: dict[str, Callable[[np.random.Generator], list[Part]]] = {
    name: _DRAWINGS[name] for name in (*SEEN_SUBJECTS, *RESERVED_SUBJECTS)
}
"""Every subject by its name in captions, the seen ones first."""
