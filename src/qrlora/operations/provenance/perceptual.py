"""Compute perceptual hashes, which are near for pictures that look alike, whatever became of their bytes."""

from __future__ import annotations

import imagehash
from PIL import Image

from qrlora.errors import DataError

BITS = 64
SAME, ALIKE = 4, 10
"""Bits of 64: up to SAME, a copy saved again or resized is likely; up to ALIKE, a picture that looks much like it."""


def phash(image: Image.Image) -> str:
    """Return the 64-bit hash of the picture's low frequencies, as 16 hexadecimal digits."""
    return str(imagehash.phash(image.convert("RGB")))


def distance(first: str, second: str) -> int:
    """Return how many of the 64 bits differ; 32 is what unrelated pictures come to on average."""
    try:
        return (int(first, 16) ^ int(second, 16)).bit_count()
    except ValueError as error:
        raise DataError("no perceptual hash", expected="16 hexadecimal digits", got=[first, second]) from error


def closeness(bits: int) -> str:
    """Return what a distance means, in words that promise no more than it does."""
    if bits <= SAME:
        return "very close: likely the same picture, saved again, resized or recompressed"
    return "close: it looks much alike; it can be another picture of the same subject, so compare them by eye"
