"""Vector parts: what a subject is made of before any style draws it.

Coordinates: x to the right, y down, the subject centred on (0, 0) inside [-1, 1] x [-1, 1].
A subject is a list of parts in painter's order (later parts cover earlier ones).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TONES = ("main", "accent", "dark", "light", "metal", "glass")
"""The tone of a part; a palette gives each tone its colour. "main" is the colour the caption names."""


@dataclass(frozen=True)
class Part:
    """One filled polygon, or one stroke if ``width`` is given.

    points: (n, 2) float array in subject coordinates. tone: one of TONES. width: stroke width in subject units.
    closed: whether a stroke returns to its first point. holes: further contours of a polygon, counted even-odd with it.
    """

    points: np.ndarray
    tone: str = "main"
    width: float | None = None
    closed: bool = False
    holes: tuple[np.ndarray, ...] = ()

    def __post_init__(self) -> None:
        if self.tone not in TONES:
            raise ValueError(f"tone must be one of {TONES}, got {self.tone!r}")


def polygon(*points: tuple[float, float]) -> np.ndarray:
    """A polygon through the points given."""
    return np.array(points, dtype=float)


def rect(x: float, y: float, w: float, h: float, radius: float = 0.0) -> np.ndarray:
    """A rectangle with top left corner (x, y), width w, height h and rounded corners."""
    if radius <= 0:
        return polygon((x, y), (x + w, y), (x + w, y + h), (x, y + h))
    radius = min(radius, w / 2, h / 2)
    corners = [(x + w - radius, y + radius, -90), (x + w - radius, y + h - radius, 0)]
    corners += [(x + radius, y + h - radius, 90), (x + radius, y + radius, 180)]
    return np.concatenate([arc(cx, cy, radius, radius, a, a + 90, 8) for cx, cy, a in corners])


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, n: int = 32) -> np.ndarray:
    """Points on an ellipse from angle start to end, in degrees, clockwise from the positive x axis."""
    t = np.radians(np.linspace(start, end, n))
    return np.stack([cx + rx * np.cos(t), cy + ry * np.sin(t)], 1)


def ellipse(cx: float, cy: float, rx: float, ry: float | None = None, n: int = 48) -> np.ndarray:
    """A whole ellipse, or a circle if ry is left out."""
    return arc(cx, cy, rx, rx if ry is None else ry, 0, 360 - 360 / n, n)


def curve(*points: tuple[float, float], n: int = 12, closed: bool = False) -> np.ndarray:
    """A smooth line through the points (centripetal-free Catmull-Rom, n samples a span)."""
    p = np.array(points, dtype=float)
    p = np.concatenate([p[-1:], p, p[:2]]) if closed else np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
    t = np.linspace(0, 1, n, endpoint=False)[:, None]
    spans = []
    for a, b, c, d in zip(p[:-3], p[1:-2], p[2:-1], p[3:], strict=True):
        spans.append(0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3))
    return np.concatenate(spans if closed else [*spans, p[-2:-1]])


def fit(*parts: Part, size: float = 0.9) -> list[Part]:
    """Move and scale the parts together so that the drawing, strokes included, is centred and fills [-size, size]."""
    low = np.min([p.points.min(0) - (p.width or 0) / 2 for p in parts], axis=0)
    high = np.max([p.points.max(0) + (p.width or 0) / 2 for p in parts], axis=0)
    scale, centre = 2 * size / (high - low).max(), (low + high) / 2
    return [Part((p.points - centre) * scale, p.tone, p.width and p.width * scale, p.closed) for p in parts]


def flip(points: np.ndarray) -> np.ndarray:
    """Return the mirror image in the vertical axis."""
    return points * [-1.0, 1.0]


def mirror(half: np.ndarray) -> np.ndarray:
    """Return a closed symmetric outline from its right half, given from top to bottom."""
    return np.concatenate([half, flip(half)[::-1]])


def hoop(top: float, bottom: float, y0: float, y1: float, sag: float) -> np.ndarray:
    """Return a band round a cylinder seen from slightly above: half widths top and bottom, from y0 to y1."""
    return np.concatenate([arc(0, y0, top, sag, 180, 0), arc(0, y1, bottom, sag, 0, 180)])


def stroke(*points: tuple[float, float], tone: str = "dark", width: float = 0.08) -> Part:
    """Return a stroke through straight segments."""
    return Part(polygon(*points), tone, width)


def pointed_leaf(x: float, y: float, angle: float, length: float, width: float) -> tuple[Part, Part]:
    """Return a pointed leaf that grows from (x, y), angle degrees clockwise from upright, and its midrib."""
    a = np.radians(angle)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    tip = [(0, -length), (width * 0.7, -length * 0.72), (width, -length * 0.45)]
    half = curve(*tip, (width * 0.55, -length * 0.12), (0, 0))
    rib = polygon((0, -0.05), (0, -length * 0.7))
    return Part(mirror(half) @ turn + [x, y], "main"), Part(rib @ turn + [x, y], "light", 0.07)
