"""Pictures as they are measured: pixels in sRGB, a mask if there is one, the words they were asked for with.

    gather([Path("pictures/")])        # every picture in it: mug.png, with mug.mask.png and mug.txt beside it

Read as the trainer reads them (docs/data.md): upright, in sRGB, on white where transparent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from qrlora._reading import inside, parse_json, visible
from qrlora.errors import DataError
from qrlora.models.training.dataset import MASK, SUFFIXES, caption_beside
from qrlora.models.training.pictures import open_picture

SMALLEST = 16
"""Least side in pixels of a picture that is measured."""


@dataclass(frozen=True, eq=False)
class Exhibit:
    """One picture to measure.

    pixels: (h, w, 3) uint8 in sRGB. mask: (h, w) in [0, 1], 1 where the subject is; None if that is not known.
    prompt: what it was asked for with; empty if that is not known.
    """

    name: str
    pixels: UInt8[np.ndarray, "h w 3"]
    mask: Float[np.ndarray, "h w"] | None = None
    prompt: str = ""

    @property
    def image(self) -> Image.Image:
        """The pixels as Pillow has them."""
        return Image.fromarray(self.pixels)

    def fitted(self, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
        """The middle of the picture in another size, cut as the trainer cuts."""
        return np.asarray(ImageOps.fit(self.image, (width, height), Image.Resampling.LANCZOS))

    def fitted_mask(self, width: int, height: int) -> Float[np.ndarray, "height width"] | None:
        """The mask, cut alike."""
        if self.mask is None:
            return None
        whole = Image.fromarray((255 * self.mask + 0.5).astype(np.uint8))
        mask = np.asarray(ImageOps.fit(whole, (width, height), Image.Resampling.BOX)).astype(np.float32) / 255
        if mask.max() < 0.5:
            raise DataError(
                f"nothing left of the subject of {self.name}",
                expected=f"white in the middle {width}:{height} of its mask, which is what is compared",
                remedy="crop the picture and its mask around the subject",
            )
        return mask

    @cached_property
    def colours(self) -> Colours:
        """Its different colours, and how much of the picture and of the subject each covers."""
        return Colours.of(self.pixels, self.mask)


@dataclass(frozen=True, eq=False)
class Colours:
    """The different colours of a picture. subject: their shares under the mask; None without one."""

    rgb: UInt8[np.ndarray, "k 3"]
    picture: Float[np.ndarray, " k"]
    subject: Float[np.ndarray, " k"] | None

    @classmethod
    def of(cls, pixels: UInt8[np.ndarray, "h w 3"], mask: Float[np.ndarray, "h w"] | None) -> Colours:
        """Count colours one by one: few even in photographs, and so each is converted to Lab but once."""
        packed = pixels.reshape(-1, 3).astype(np.int64) @ np.array([65536, 256, 1], np.int64)
        codes, place, counts = np.unique(packed, return_inverse=True, return_counts=True)
        rgb = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1).astype(np.uint8)
        subject = None
        if mask is not None and mask.sum() > 0:
            subject = np.bincount(place.reshape(-1), mask.reshape(-1).astype(np.float64), len(codes)) / mask.sum()
        return cls(rgb, counts / counts.sum(), subject)

    @cached_property
    def lab(self) -> Float[np.ndarray, "k 3"]:
        """CIE Lab under D65."""
        from skimage.color import rgb2lab

        return rgb2lab(self.rgb[None].astype(np.float64) / 255)[0]

    def away(self, hexes: Sequence[str]) -> Float[np.ndarray, "k targets"]:
        """CIEDE2000 colour difference (CIE 142-2001; Sharma et al. 2005) of each colour to each of these (#rrggbb)."""
        from skimage.color import deltaE_ciede2000, rgb2lab

        targets = rgb2lab(np.array([[_rgb(code) for code in hexes]]) / 255)[0]
        return deltaE_ciede2000(self.lab[:, None], targets[None])


def _rgb(code: str) -> list[float]:
    """'#rrggbb' as three numbers from 0 to 255."""
    return [float(int(code[i : i + 2], 16)) for i in (1, 3, 5)]


def hex_colour(text: str) -> str:
    """A colour as #rrggbb, also from rrggbb and #rgb. Raises ValueError for anything else."""
    digits = text.strip().removeprefix("#").lower()
    if re.fullmatch(r"[0-9a-f]{3}", digits):
        digits = "".join(2 * digit for digit in digits)
    if not re.fullmatch(r"[0-9a-f]{6}", digits):
        raise ValueError(f"expected a colour such as #d7263d, got {text!r}")
    return f"#{digits}"


def gather(paths: Iterable[Path]) -> list[Exhibit]:
    """The pictures of these files and folders; folders in the order of their files' names.

    Raises:
        DataError: a path that is neither, a folder without pictures, or a picture or mask that cannot be used.
    """
    return [read(path) for path in picture_files(paths)]


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """The files that `gather` reads, in its order; masks and grids of several pictures are none of them."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if path.suffix.lower() not in SUFFIXES:
                what = "no picture" if path.exists() else "no such picture or folder"
                remedy = "name a picture or a folder of pictures"
                raise DataError(f"{what}: {path}", expected=sorted(SUFFIXES), got=path.suffix or None, remedy=remedy)
            files.append(path)
            continue
        found = [f for f in visible(path) if f.suffix.lower() in SUFFIXES and not f.stem.endswith(MASK)]
        if not found:
            raise DataError(f"no pictures in {path}", expected=sorted(SUFFIXES), remedy="check the path")
        files += [inside(f, path, DataError) for f in found]
    return files


def read(path: Path) -> Exhibit:
    """One picture file with its mask, from a file beside it or else its own transparency, and its prompt.

    The prompt is that of `mug.txt` beside `mug.png`, else the one that `qrlora generate` wrote into the file.
    """
    picture = open_picture(path)
    if min(picture.image.size) < SMALLEST:
        got = f"{picture.image.width} x {picture.image.height}"
        raise DataError(f"picture too small to measure: {path}", expected=f"{SMALLEST} pixels a side", got=got)
    beside = next((f for s in sorted(SUFFIXES) if (f := path.with_name(path.stem + MASK + s)).is_file()), None)
    transparent = picture.alpha is not None and picture.alpha.getextrema()[0] < 255  # type: ignore[operator]
    mask = None
    if beside or transparent:
        beside = beside and inside(beside, path.parent, DataError)
        mask = np.asarray(picture.mask(beside, picture.image.size)).astype(np.float32) / 255
    return Exhibit(path.name, np.asarray(picture.image), mask, _prompt(path, picture.record))


def _prompt(path: Path, record: str) -> str:
    words = caption_beside(path)
    if words is not None:
        return words
    prompts = _prompts(path, record) if record else []
    if len(prompts) == 1:
        return prompts[0]
    # The record is of the whole run; the file's number says which of its prompts the picture is of.
    number = re.match(r"([0-9]+)-.*-seed[0-9]+$", path.stem)
    return prompts[int(number[1])] if number and int(number[1]) < len(prompts) else ""


def _prompts(path: Path, record: str) -> list[str]:
    """The prompts of a run, out of the record in one of its pictures."""
    expected, remedy = "the record of qrlora generate", f"write the prompt into {path.stem}.txt beside it"
    made = parse_json(record, f"the record in {path}", DataError, expected=expected, remedy=remedy)
    prompts = made.get("prompt", []) if isinstance(made, dict) else None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f"no prompt in the record in {path}", expected=expected, got=record[:200], remedy=remedy)
    return prompts
