"""Distance between the colour distributions of two pictures."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8

_R = 0.5**0.5
DIRECTIONS = np.array(
    [(1, 0, 0), (0, 1, 0), (0, 0, 1), (_R, _R, 0), (_R, -_R, 0), (_R, 0, _R), (_R, 0, -_R), (0, _R, _R), (0, _R, -_R)],
    np.float32,
)
"""Unit directions in CIE Lab: the axes and the diagonals between them."""
BINS = 16
"""Quantile bins of the pixels in each direction."""

VISIBLE = 2.3 / 2
"""The distance of two palettes below which no difference is visible: a CIE 1976 colour difference of 2.3 is just
noticeable (Mahy et al. 1994, "Evaluation of uniform color differences"), and on average half of a shift in whatever
direction falls along a given one."""


def quantiles(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n 144"]:
    """Return the colours of each picture: ``BINS`` mean values in each of ``DIRECTIONS``, in Lab units less (50, 0, 0).

    The mean absolute difference of two rows is the sliced Wasserstein distance (Bonneel et al. 2015, "Sliced and Radon
    Wasserstein barycenters of measures", first order) of two pictures' colours: the mean CIE 1976 colour difference by
    which pixels would have to move, per direction. Pixels are averaged 2 by 2 first, so that fine grain counts as one
    tone.
    """
    rows = np.empty((len(pictures), BINS * len(DIRECTIONS)), np.float32)
    for row, picture in zip(rows, pictures, strict=True):
        h, w = picture.shape[0] // 2, picture.shape[1] // 2
        small = cv2.resize(picture, (w, h), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).reshape(-1, 3) - np.array([50, 0, 0], np.float32)
        ordered = np.sort(DIRECTIONS @ lab.T, axis=1)
        row[:] = ordered.reshape(len(DIRECTIONS) * BINS, -1).mean(1)
    return rows
