"""Pictures to be measured: pixels in sRGB, an optional mask, and the prompt.

    load_pictures([Path("pictures/")])        # mug.png with mug.mask.png and mug.txt, and so on

They are read as for training (docs/data.md): upright, in sRGB, on white where transparent.
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
from qrlora._said import said
from qrlora.errors import DataError
from qrlora.models.training.pictures import open_picture
from qrlora.models.training.sources import MASK, SUFFIXES, caption_beside

SMALLEST = 16
"""Least side in pixels."""


@dataclass(frozen=True, eq=False)
class MeasuredPicture:
    """One picture to measure.

    Attributes:
        pixels: in sRGB.
        mask: 1 inside the subject; None if unknown.
        prompt: empty if unknown.
    """

    name: str
    pixels: UInt8[np.ndarray, "h w 3"]
    mask: Float[np.ndarray, "h w"] | None = None
    prompt: str = ""

    @property
    def image(self) -> Image.Image:
        """The pixels as a Pillow image."""
        return Image.fromarray(self.pixels)

    def fitted(self, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
        """Return the centre crop at another size, as for training."""
        return np.asarray(ImageOps.fit(self.image, (width, height), Image.Resampling.LANCZOS))

    def fitted_mask(self, width: int, height: int) -> Float[np.ndarray, "height width"] | None:
        """Return the mask, cropped in the same way."""
        if self.mask is None:
            return None
        whole = Image.fromarray((255 * self.mask + 0.5).astype(np.uint8))
        mask = np.asarray(ImageOps.fit(whole, (width, height), Image.Resampling.BOX)).astype(np.float32) / 255
        if mask.max() < 0.5:
            raise DataError(
                f"the subject of {self.name} is outside the crop",
                expected=f"white in the central {width}:{height} of its mask, the part that is compared",
                remedy="crop the picture and its mask around the subject",
            )
        return mask

    @cached_property
    def colours(self) -> Colours:
        """The distinct colours, with the share of the picture and of the subject that each covers."""
        return Colours.of(self.pixels, self.mask)


@dataclass(frozen=True, eq=False)
class Colours:
    """The distinct colours of a picture with their shares of the pixels. subject_shares: inside the mask, or None."""

    rgb: UInt8[np.ndarray, "k 3"]
    picture_shares: Float[np.ndarray, " k"]
    subject_shares: Float[np.ndarray, " k"] | None

    @classmethod
    def of(cls, pixels: UInt8[np.ndarray, "h w 3"], mask: Float[np.ndarray, "h w"] | None) -> Colours:
        """Count distinct colours, so that each is converted to Lab only once."""
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

    def differences(self, hexes: Sequence[str]) -> Float[np.ndarray, "k targets"]:
        """Return CIEDE2000 (CIE 142-2001; Sharma et al. 2005) between these colours and `hexes` (#rrggbb)."""
        from skimage.color import deltaE_ciede2000, rgb2lab

        targets = rgb2lab(np.array([[_rgb(code) for code in hexes]]) / 255)[0]
        return deltaE_ciede2000(self.lab[:, None], targets[None])


def _rgb(code: str) -> list[float]:
    """'#rrggbb' as three numbers from 0 to 255."""
    return [float(int(code[i : i + 2], 16)) for i in (1, 3, 5)]


def hex_colour(text: str) -> str:
    """Return a colour as #rrggbb, also from rrggbb and #rgb. Raises ValueError for anything else."""
    digits = text.strip().removeprefix("#").lower()
    if re.fullmatch(r"[0-9a-f]{3}", digits):
        digits = "".join(2 * digit for digit in digits)
    if not re.fullmatch(r"[0-9a-f]{6}", digits):
        raise ValueError(said("expected a colour such as #d7263d, got %(text)s", text=repr(text)))
    return f"#{digits}"


def load_pictures(paths: Iterable[Path]) -> list[MeasuredPicture]:
    """Load the pictures in these files and folders; those of a folder in the order of their names.

    Raises:
        DataError: a path that is neither, a folder without pictures, or an unusable picture or mask.
    """
    return [load_picture(path) for path in picture_files(paths)]


def picture_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files that `load_pictures` reads, in order; masks are left out."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if path.suffix.lower() not in SUFFIXES:
                what = "not a picture" if path.exists() else "no such picture or folder"
                remedy = "name a picture or a folder of pictures"
                raise DataError(f"{what}: {path}", expected=sorted(SUFFIXES), got=path.suffix or None, remedy=remedy)
            files.append(path)
            continue
        found = [f for f in visible(path) if f.suffix.lower() in SUFFIXES and not f.stem.endswith(MASK)]
        if not found:
            raise DataError(f"no pictures in {path}", expected=sorted(SUFFIXES), remedy="check the path")
        files += [inside(f, path, DataError) for f in found]
    return files


def load_picture(path: Path) -> MeasuredPicture:
    """Load a picture with its mask and prompt.

    The mask is `mug.mask.png` beside `mug.png`, or else the transparency. The prompt is the content of `mug.txt`, or
    else the one that `qrlora generate` stored in the file.
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
    return MeasuredPicture(path.name, np.asarray(picture.image), mask, _prompt(path, picture.record))


def _prompt(path: Path, record: str) -> str:
    words = caption_beside(path)
    if words is not None:
        return words
    prompts = _prompts(path, record) if record else []
    if len(prompts) == 1:
        return prompts[0]
    # The metadata hold all prompts of the run; the number in the file name is the index of the prompt.
    number = re.match(r"([0-9]+)-.*-seed[0-9]+$", path.stem)
    return prompts[int(number[1])] if number and int(number[1]) < len(prompts) else ""


def _prompts(path: Path, record: str) -> list[str]:
    """Read the prompts of a run from the record in one of its pictures."""
    expected, remedy = "the record of qrlora generate", f"write the prompt into {path.stem}.txt beside it"
    made = parse_json(record, f"the record in {path}", DataError, expected=expected, remedy=remedy)
    prompts = made.get("prompt", []) if isinstance(made, dict) else None
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f"no prompt in the record in {path}", expected=expected, got=record[:200], remedy=remedy)
    return prompts
