"""Patterns fixed to the picture plane, as maps in [0, 1], and cells that a picture can be laid of. Cached: all are the
same in every picture."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float

from qrlora.pico.world.canvas import SCALE, SIZE, WIDE, grid, noise

PATTERNS = (
    "striped", "upright striped", "hatched", "cross-hatched", "dotted", "checked", "diamond", "wavy", "zigzag", "brick",
    "honeycomb", "triangle", "scaly", "woven", "speckled", "mottled", "ringed", "ruled", "stitched", "scribbled",
)  # fmt: skip
CELLS = ("hexagon", "brick", "triangle", "diamond", "shard")
"""Shapes of pieces. Square pieces are not among them: they make a style that is kept from the base model."""


@lru_cache(maxsize=160)
def pattern(name: str, period: int, tilt: int = 0) -> Float[np.ndarray, "h w"]:
    """A pattern of features ``period`` pixels apart; ``tilt`` picks one of its directions."""
    x, y = grid()
    w = 2 * np.pi / period
    a, b = ((x, y), (y, x), (x + y, x - y), (x + 0.5 * y, y - 0.5 * x))[tilt % 4]
    u, v = a / period, b / period
    out: Any
    if name in ("striped", "upright striped"):
        out = 0.5 + 0.5 * np.cos((y if name == "striped" else x) * w)
    elif name == "hatched":
        out = (((x + y) if tilt % 2 else (x - y)) % period < 0.35 * period) * 1.0
    elif name == "cross-hatched":
        out = np.maximum((x + y) % period < 0.25 * period, (x - y) % period < 0.25 * period) * 1.0
    elif name == "dotted":
        out = (0.5 + 0.25 * (np.cos(a * w) + np.cos(b * w)) > 0.66) * 1.0
    elif name in ("checked", "diamond"):
        p, q = (x, y) if name == "checked" else (x + y, x - y)
        out = 0.5 + 0.5 * np.sign(np.cos(p * w / 2) * np.cos(q * w / 2))
    elif name == "wavy":
        out = 0.5 + 0.5 * np.cos((a + 2.0 * np.sin(b * w / 2)) * w)
    elif name == "zigzag":
        out = ((a + np.abs(v % 2 - 1) * period) % period < 0.4 * period) * 1.0
    elif name in ("brick", "honeycomb", "triangle"):
        out = 1.0 - cells({"honeycomb": "hexagon"}.get(name, name), period)[2]
    elif name == "scaly":
        out = np.hypot((u + 0.5 * np.floor(v * 2)) % 1 - 0.5, (v * 2) % 1) % 1
    elif name == "woven":
        out = np.where(
            (np.floor(u) + np.floor(v)) % 2 < 1, np.cos((u % 1 - 0.5) * np.pi), np.cos((v % 1 - 0.5) * np.pi)
        )
    elif name == "speckled":
        out = (noise(90 + tilt, max(1.5, period / 4)) > 0.45) * 1.0
    elif name == "mottled":
        out = 0.5 + 0.5 * noise(95 + tilt, float(period))
    elif name == "ringed":
        out = 0.5 + 0.5 * np.cos(np.hypot(x - SIZE * 0.5, y - SIZE * (0.3 + 0.2 * tilt)) * w)
    elif name == "ruled":
        out = np.maximum(x % period < 0.9, y % period < 0.9) * 1.0
    elif name == "stitched":
        out = ((a % period < 0.4 * period) & (b % (2 * period) < 1.3 * period)) * 1.0
    else:  # scribbled
        out = (0.5 + 0.5 * np.cos((a + 0.7 * b + 2.5 * noise(99, 10)) * w)) ** 1.5
    return np.asarray(out, np.float32)


@lru_cache(maxsize=32)
def cells(kind: str, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of the middle of each sample's piece; and the joints between pieces, 1 on a joint."""
    x, y = grid()
    if kind == "brick":
        row = np.floor(y / (size / 2))
        cx, cy = (np.floor(x / size + 0.5 * (row % 2)) + 0.5 - 0.5 * (row % 2)) * size, (row + 0.5) * size / 2
    elif kind == "triangle":
        row, half = np.floor(y / size), size * 0.5
        up = ((np.floor(x / half) + row) % 2 < 1) ^ ((x / half) % 1 > (y / size) % 1)
        cx, cy = (np.floor(x / half) + np.where(up, 0.3, 0.7)) * half, (row + np.where(up, 0.35, 0.65)) * size
    elif kind == "diamond":
        p, q = np.floor((x + y) / size) + 0.5, np.floor((x - y) / size) + 0.5
        cx, cy = (p + q) * size / 2, (p - q) * size / 2
    else:
        cx, cy = _nearest(kind, size, x, y)
    at = [np.clip(np.round(c * SCALE), 0, WIDE - 1).astype(np.intp) for c in (cy, cx)]
    piece = np.round(cx * 7.0) * 4096 + np.round(cy * 7.0)
    edge = np.zeros((WIDE, WIDE), bool)
    for axis in (0, 1):
        for by in (1, 2):
            edge |= np.roll(piece, by, axis) != piece
    return at[0], at[1], edge.astype(np.float32)


def _nearest(kind: str, size: int, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of points in rows, each other row set half a step on; for shards moved at random."""
    rows, columns = round(SIZE / size / 0.866) + 2, round(SIZE / size) + 3
    i, j = np.meshgrid(np.arange(-1, rows), np.arange(-1, columns), indexing="ij")
    points = np.stack([(j + 0.5 * (i % 2)) * size, i * size * 0.866], -1).reshape(-1, 2)
    if kind == "shard":
        points = points + np.random.default_rng(size).uniform(-0.38, 0.38, points.shape) * size
    best, found = np.full(x.shape, np.inf), np.zeros(x.shape, np.intp)
    for n, (px, py) in enumerate(points):
        away = (x - px) ** 2 + (y - py) ** 2
        nearer = away < best
        best[nearer], found[nearer] = away[nearer], n
    return points[found, 0], points[found, 1]
