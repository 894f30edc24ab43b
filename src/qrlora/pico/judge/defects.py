"""Alterations of pictures for training the judge: mild ones it must accept, and defects it must reject.

All functions take and return float32 pictures (h, w, 3) in [0, 1]; ``rng`` decides how strong.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Picture = np.ndarray
Random = np.random.Generator


def _warp(picture: Picture, rng: Random, amplitude: float, period: int) -> Picture:
    """Move pixels by up to ``amplitude`` pixels along a smooth random field with features ``period`` pixels wide."""
    h, w = picture.shape[:2]
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    fields = rng.uniform(-amplitude, amplitude, (2, h // period + 2, w // period + 2)).astype(np.float32)
    dx, dy = (cv2.resize(f, (w, h), interpolation=cv2.INTER_CUBIC) for f in fields)
    return cv2.remap(picture, x + dx, y + dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _jpeg(picture: Picture, quality: int) -> Picture:
    whole = np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
    _, data = cv2.imencode(".jpg", whole, (cv2.IMWRITE_JPEG_QUALITY, quality))
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.float32) / 255


def mild(picture: Picture, rng: Random) -> Picture:
    """Alter pictures as an autoencoder or a slightly unsure denoiser does: the judge accepts them."""
    shift = np.array([[1, 0, rng.integers(-4, 5)], [0, 1, rng.integers(-4, 5)]], np.float32)
    picture = cv2.warpAffine(picture, shift, picture.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
    if rng.random() < 0.3:
        picture = _warp(picture, rng, rng.uniform(0, 1.2), 16)
    if rng.random() < 0.5:
        picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.2, 0.8))
    if rng.random() < 0.3:
        picture = _jpeg(picture, int(rng.integers(55, 96)))
    if rng.random() < 0.5:
        picture = picture + rng.standard_normal(picture.shape, dtype=np.float32) * np.float32(rng.uniform(0, 0.02))
    tint = rng.uniform(-0.02, 0.02, 3)
    return ((picture - 0.5) * rng.uniform(0.95, 1.05) + 0.5 + rng.uniform(-0.04, 0.04) + tint).astype(np.float32)


# ---------------------------------------------------------------- defects of how it is drawn


def blurred(picture: Picture, rng: Random) -> Picture:
    """Blur the picture."""
    return cv2.GaussianBlur(picture, (0, 0), rng.uniform(1.6, 4.0))


def noisy(picture: Picture, rng: Random) -> Picture:
    """Add grain of one to three pixels."""
    h, w = (n // int(rng.integers(1, 4)) for n in picture.shape[:2])
    grain = rng.standard_normal((h, w, 3), dtype=np.float32) * np.float32(rng.uniform(0.08, 0.3))
    return picture + cv2.resize(grain, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def sharpened(picture: Picture, rng: Random) -> Picture:
    """Sharpen until edges ring."""
    soft = cv2.GaussianBlur(picture, (0, 0), rng.uniform(1, 2.5))
    return picture + (picture - soft) * np.float32(rng.uniform(1.5, 4))


def washed_out(picture: Picture, rng: Random) -> Picture:
    """Fade everything towards one colour, most often a grey."""
    colour = rng.uniform(0, 1, 3) if rng.random() < 0.3 else np.full(3, rng.uniform(0.1, 1))
    return picture + (colour.astype(np.float32) - picture) * np.float32(rng.uniform(0.3, 0.75))


def discoloured(picture: Picture, rng: Random) -> Picture:
    """Turn the hues, and change the saturation."""
    hsv = cv2.cvtColor(np.clip(picture, 0, 1), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + rng.choice([0.0, rng.uniform(40, 320)], p=[0.25, 0.75])) % 360
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.choice([rng.uniform(0, 0.4), 1.0, rng.uniform(1.5, 2.5)]), 0, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def cast(picture: Picture, rng: Random) -> Picture:
    """Weaken or bend the channels, one more than another."""
    bend, gain = rng.uniform(0.6, 1.8, 3).astype(np.float32), rng.uniform(0.55, 1, 3).astype(np.float32)
    return np.clip(picture, 0, 1) ** bend * gain


TEXTURE_DEFECTS: tuple[Callable[[Picture, Random], Picture], ...] = (blurred, noisy, sharpened)
COLOUR_DEFECTS: tuple[Callable[[Picture, Random], Picture], ...] = (washed_out, discoloured, cast)


def faded_ground(picture: Picture, mask: np.ndarray, rng: Random) -> Picture:
    """Fade the background alone towards one colour."""
    return picture + (washed_out(picture, rng) - picture) * (1 - mask[..., None])


# ---------------------------------------------------------------- defects that take two pictures


def blended(one: Picture, other: Picture, rng: Random) -> Picture:
    """Blend two pictures, as if each were transparent."""
    return one + (other - one) * np.float32(rng.uniform(0.35, 0.65))


def halved(one: Picture, other: Picture, rng: Random) -> Picture:
    """Join a half of one picture to the other half of the other."""
    cut = int(rng.uniform(0.4, 0.6) * len(one))
    if rng.random() < 0.5:
        return np.concatenate([one[:cut], other[cut:]], 0)
    return np.concatenate([one[:, :cut], other[:, cut:]], 1)


# ---------------------------------------------------------------- defects of what is drawn


def misshapen(picture: Picture, rng: Random) -> Picture:
    """Distort the shape, or shuffle the quarters so that none is where it was."""
    if rng.random() < 0.5:
        return _warp(picture, rng, rng.uniform(9, 15), 28)
    h, w = picture.shape[0] // 2, picture.shape[1] // 2
    quarters = [picture[:h, :w], picture[:h, w:], picture[h:, :w], picture[h:, w:]]
    a, b, c, d = (quarters[i] for i in [(1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0), (1, 3, 0, 2)][rng.integers(4)])
    return np.vstack([np.hstack([a, b]), np.hstack([c, d])])
