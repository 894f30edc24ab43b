"""Rasterised parts, and the maps every style draws from.

All maps are at ``SCALE`` times the picture's size and are averaged down at the end: that is the anti-aliasing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from qrlora.pico.world.shapes import TONES, Part

SIZE = 128
"""Width and height of a picture, in pixels."""
SCALE = 3
"""Samples a pixel, in each direction."""
WIDE = SIZE * SCALE
"""Width and height of the maps, in samples."""

_UNIT = 53.0 * SCALE  # samples to one subject unit: a subject 1.8 units tall covers three quarters of the picture
_BITS = 4  # fractional bits of cv2's fixed-point coordinates


@dataclass(frozen=True)
class Pose:
    """Pose of a subject: rotation in degrees, shift in pixels, scale as a factor."""

    angle: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Canvas:
    """A subject on the picture plane: which part, and of what tone, lies at every sample.

    label: 0 for the background, else 1 + the part's index.
    tone: index into ``shapes.TONES`` (undefined on the background).
    """

    label: UInt8[np.ndarray, "h w"]
    tone: UInt8[np.ndarray, "h w"]

    @cached_property
    def mask(self) -> Float[np.ndarray, "h w"]:
        """1 on the subject, 0 on the background."""
        return (self.label > 0).astype(np.float32)

    @cached_property
    def boundary(self) -> UInt8[np.ndarray, "h w"]:
        """1 where the part changes, 0 elsewhere."""
        return (cv2.morphologyEx(self.label, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0).astype(np.uint8)

    def is_tone(self, *names: str) -> Float[np.ndarray, "h w"]:
        """1 where the subject is of one of the tones named."""
        hit = np.isin(self.tone, [TONES.index(n) for n in names])
        return (hit & (self.label > 0)).astype(np.float32)

    def lines(self, width: float) -> Float[np.ndarray, "h w"]:
        """Outlines of all parts, ``width`` pixels wide."""
        k = max(1, round(width * SCALE) - 2)
        kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (k, k))
        return cv2.dilate(self.boundary, kernel).astype(np.float32)

    @cached_property
    def depth(self) -> Float[np.ndarray, "h w"]:
        """Distance to the nearest outline inside the subject, in pixels."""
        inside = ((self.label > 0) & (self.boundary == 0)).astype(np.uint8)
        return cv2.distanceTransform(inside, cv2.DIST_L2, 3) / SCALE


def rasterise(parts: list[Part], pose: Pose) -> Canvas:
    """Draw parts in painter's order into label and tone maps."""
    label = np.zeros((WIDE, WIDE), np.uint8)
    tone = np.zeros((WIDE, WIDE), np.uint8)
    a = np.radians(pose.angle)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) * _UNIT * pose.scale
    centre = WIDE / 2 + np.array([pose.dx, pose.dy]) * SCALE
    for i, part in enumerate(parts):
        points = [np.round((p @ turn + centre) * 2**_BITS).astype(np.int32) for p in (part.points, *part.holes)]
        for image, value in ((label, i + 1), (tone, TONES.index(part.tone))):
            if part.width is None:
                cv2.fillPoly(image, points, value, cv2.LINE_8, _BITS)
            else:
                thickness = max(1, round(part.width * _UNIT * pose.scale))
                cv2.polylines(image, points, part.closed, value, thickness, cv2.LINE_8, _BITS)
    return Canvas(label, tone)


def shrink(image: np.ndarray) -> np.ndarray:
    """Average a map (or a picture) down to the picture's size."""
    return cv2.resize(image, (SIZE, SIZE), interpolation=cv2.INTER_AREA)


def finished(picture: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """A picture in [0, 1] at the size and in the levels that are shown."""
    return (np.clip(shrink(picture), 0, 1) * 255 + 0.5).astype(np.uint8)


@lru_cache(maxsize=64)
def noise(seed: int, period: float) -> np.ndarray:
    """Smooth noise in [-1, 1] with features ``period`` pixels wide: a material, the same in every picture."""
    n = max(2, round(SIZE / period))
    grid = np.random.default_rng(seed).uniform(-1, 1, (n, n)).astype(np.float32)
    return np.clip(cv2.resize(grid, (WIDE, WIDE), interpolation=cv2.INTER_CUBIC), -1, 1)


@lru_cache(maxsize=1)
def grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y of every sample, in pixels."""
    x = (np.arange(WIDE, dtype=np.float32) + 0.5) / SCALE
    return np.broadcast_to(x[None], (WIDE, WIDE)), np.broadcast_to(x[:, None], (WIDE, WIDE))


def warp(image: np.ndarray, dx: np.ndarray | float, dy: np.ndarray | float) -> np.ndarray:
    """Look up ``image`` at positions shifted by (dx, dy) pixels."""
    x, y = grid()
    mx, my = ((x + dx) * SCALE - 0.5).astype(np.float32), ((y + dy) * SCALE - 0.5).astype(np.float32)
    mode = cv2.INTER_NEAREST if image.dtype == np.uint8 else cv2.INTER_LINEAR
    return cv2.remap(image, mx, my, mode, borderMode=cv2.BORDER_REPLICATE)
