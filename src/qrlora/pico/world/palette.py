"""Colours with names: what a caption can say about them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def rgb(hexcode: str) -> np.ndarray:
    """'#rrggbb' as three float32 in [0, 1]."""
    return np.array([int(hexcode[i : i + 2], 16) for i in (1, 3, 5)], np.float32) / 255


@dataclass(frozen=True)
class Palette:
    """tones: (6, 3) float32, one colour for each of ``shapes.TONES``. background: (3,) float32."""

    tones: np.ndarray
    background: np.ndarray


COLOURS = {  # name: (main, accent)
    "red": ("#d7263d", "#f7b538"),
    "orange": ("#f3722c", "#2d728f"),
    "yellow": ("#f9c22e", "#e15a97"),
    "green": ("#3a9d5d", "#f4d35e"),
    "teal": ("#1b9aaa", "#f78764"),
    "blue": ("#2f6fde", "#ffb703"),
    "purple": ("#7b4bc4", "#58d6a9"),
    "pink": ("#f06ba8", "#4062bb"),
}
BACKGROUNDS = {"white": "#f7f6f2", "cream": "#f4e3c1", "sky": "#cfe6f5", "mint": "#cdebd8", "grey": "#c9ccd1"}


def palette(colour: str, background: str) -> Palette:
    """The palette of a named colour on a named background."""
    main, accent = COLOURS[colour]
    tones = [main, accent, "#2b2d42", "#f8f4e8", "#97a4b3", "#bfe3f0"]
    return Palette(np.array([rgb(t) for t in tones]), rgb(BACKGROUNDS[background]))
