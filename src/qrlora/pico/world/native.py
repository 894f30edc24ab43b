"""A drawing as its designer coloured it: a style too, and one that nobody here drew."""

from __future__ import annotations

import cv2
import numpy as np

from qrlora.pico.world.canvas import SCALE, WIDE, Pose, grid
from qrlora.pico.world.drawings import Drawing, PaintedPart

_UNIT, _BITS = 53.0, 4


def draw(drawing: Drawing, pose: Pose, stretch: np.ndarray, ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picture (WIDE, WIDE, 3) float32 and mask (WIDE, WIDE) float32: the designer's paint on a plain ground (3,)."""
    a = np.radians(pose.angle)
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) * _UNIT * pose.scale
    centre = WIDE / SCALE / 2 + np.array([pose.dx, pose.dy])

    def place(points: np.ndarray) -> np.ndarray:
        return (points * stretch) @ turn + centre

    out = np.empty((WIDE, WIDE, 3), np.float32)
    out[:] = ground
    whole = np.zeros((WIDE, WIDE), np.uint8)
    for part in drawing.painted:
        mask = np.zeros((WIDE, WIDE), np.uint8)
        contours = [np.round(place(c) * SCALE * 2**_BITS).astype(np.int32) for c in part.contours]
        cv2.fillPoly(mask, contours, 1, cv2.LINE_8, _BITS)
        whole |= mask
        _paint(out, part, mask, None if part.axis is None else place(part.axis))
    return out, whole.astype(np.float32)


def _paint(out: np.ndarray, part: PaintedPart, mask: np.ndarray, axis: np.ndarray | None) -> None:
    """Lay a part's paint over what is there, in place."""
    x0, y0, w, h = cv2.boundingRect(mask)
    box = (slice(y0, y0 + h), slice(x0, x0 + w))
    ends = part.ends.astype(np.float32) / 255
    if axis is None:
        paint = np.broadcast_to(ends[0], (h, w, 4))
    else:
        x, y = (m[box] - o for m, o in zip(grid(), axis[0], strict=True))
        along = axis[1] - axis[0]
        length = max(float(np.hypot(*along)), 1e-6)
        t = np.hypot(x, y) / length if part.radial else (x * along[0] + y * along[1]) / length**2
        paint = ends[0] + (ends[1] - ends[0]) * np.clip(t, 0, 1).astype(np.float32)[..., None]
    cover = paint[..., 3:] * mask[box][..., None]
    out[box] += (paint[..., :3] - out[box]) * cover
