"""Read pictures and masks as the model gets them: upright, in sRGB, on white where transparent, cut to a size.

    read_picture(path, 512)                        the central square
    open_picture(path).shown(bucket)               the middle of it, in the shape of a bucket

A mask says where a picture counts: white is what is to be learned, black is background, grey is in between.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from qrlora._reading import parsing
from qrlora._said import said
from qrlora.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")
"""Formats that Pillow may read, whatever the file's name. Not among them: formats that are programs (PostScript, which
Pillow hands to Ghostscript) or that nobody keeps pictures in. JPEG includes MPO, which phones write."""
LARGEST_FILE = 2**29
"""Bytes of a picture file: those of the largest picture, uncompressed in 16 bits a channel."""
LARGEST_PICTURE = 2**28 // 3
"""Pixels of a picture, 89 million: 256 MiB in RGB. A file of 21 KB may claim twice as many."""
LARGEST_ENLARGEMENT = 4
"""A picture smaller than what it is trained at by more than this factor would teach the model blur."""
BUCKET_STEPS = 16
"""Sides of buckets differ by at least this part of the resolution: 64 pixels at 1024, as SDXL was trained and as
sd-scripts does. Finer ones would leave nearly every picture alone in its bucket."""
WIDEST = 2
"""The longest side of a bucket, in resolutions: pictures are cut to 4:1 or 1:4 at the utmost."""
WHITE = 128
"""The least grey of a mask that is taken for something rather than for the noise of a black one."""

Size = tuple[int, int]
"""Width and height in pixels, as Pillow counts them."""


@dataclass(frozen=True)
class View:
    """Augmentation of a picture. mirrored: left and right exchanged; then moved by so many pixels to
    the right and down, the edge repeated where nothing is left of it."""

    mirrored: bool = False
    right: int = 0
    down: int = 0


PLAIN = View()


def views(flip: bool, shift: int) -> list[View]:
    """The picture as it is; moved by ``shift`` pixels to each side, unless 0; with ``flip`` the mirror images, too."""
    moves = [(0, 0), *([(shift, 0), (-shift, 0), (0, shift), (0, -shift)] if shift else [])]
    return [View(mirrored, *move) for mirrored in (False, True)[: 1 + flip] for move in moves]


def bucket_sizes(resolution: int, unit: int, largest: int | None = None) -> list[Size]:
    """Return the shapes that pictures of all aspect ratios are cut to: about ``resolution`` squared pixels each.

    None has more pixels than the square, so a run that fits in memory with squares fits with all shapes.

    Args:
        resolution: side of the square one, in pixels.
        unit: what every side is a multiple of.
        largest: the longest side that the model takes, if it has a limit.
    """
    step = math.ceil(resolution / BUCKET_STEPS / unit) * unit
    sizes = {(resolution, resolution)}
    for side in range(math.ceil(resolution / step) * step, WIDEST * resolution + 1, step):
        other = max(unit, resolution**2 // side // step * step)
        sizes |= {(side, other), (other, side)}
    return sorted(size for size in sizes if largest is None or max(size) <= largest)


def nearest_size(size: Size, sizes: Sequence[Size]) -> Size:
    """Return the size whose aspect ratio is nearest to that of ``size``."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda other: (abs(math.log(other[0] / other[1]) - ratio), other))


def check_resolution(resolution: int, unit: int, largest: int | None) -> None:
    """Raise DataError for a resolution that the model does not support."""
    if resolution % unit or (largest and resolution > largest):
        below = max(unit, min(resolution, largest or resolution) // unit * unit)
        raise DataError(
            "this model takes no pictures of that resolution",
            expected=f"a multiple of {unit} pixels" + (f", {largest} at most" if largest else ""),
            got=resolution,
            remedy=f"resolution = {below}",
        )


@dataclass(frozen=True)
class OpenPicture:
    """A picture file, read: `image` in RGB, its transparency (mode L, white where opaque) if it has any, and the
    record that `qrlora generate` wrote into it (JSON), or ""."""

    path: Path
    image: Image.Image
    alpha: Image.Image | None
    record: str = ""

    def shown(self, size: Size, view: View = PLAIN) -> Image.Image:
        """Return the middle of the picture, in this size.

        Raises:
            DataError: the picture would have to be enlarged too far.
        """
        least = tuple(math.ceil(side / LARGEST_ENLARGEMENT) for side in size)
        if self.image.width < least[0] or self.image.height < least[1]:
            raise DataError(
                said("picture too small: %(path)s", path=self.path),
                expected=said(
                    "at least %(least)s pixels, for training at %(size)s",
                    least=f"{least[0]} x {least[1]}",
                    size=f"{size[0]} x {size[1]}",
                ),
                got=f"{self.image.width} x {self.image.height}",
                remedy="use a larger picture",
            )
        return _cut(self.image, size, Image.Resampling.LANCZOS, view)

    def mask(self, file: Path | None, size: Size, view: View = PLAIN) -> Image.Image:
        """Return the picture's mask (mode L), cut as `shown` cuts the picture: from a file, else its own transparency.

        Raises:
            DataError: an unreadable mask, one of another size, one without white, or no transparency.
        """
        mask = self._own_transparency() if file is None else _read_mask(file)
        path = file or self.path
        if mask.size != self.image.size:
            raise DataError(
                said("mask of another size than its picture: %(path)s", path=path),
                expected=said(
                    "%(size)s, as %(name)s", size=f"{self.image.width} x {self.image.height}", name=self.path.name
                ),
                got=f"{mask.width} x {mask.height}",
                remedy="draw the mask on the picture itself, and save both in the same size",
            )
        mask = _cut(mask, size, Image.Resampling.BOX, view)
        if mask.getextrema()[1] < WHITE:  # type: ignore[operator]  # one band: two numbers
            raise DataError(
                said("nothing left to learn by the mask %(path)s", path=path),
                expected="white where the subject is",
                got=said(
                    "no white in the middle %(shape)s of it, which is what is trained on", shape=f"{size[0]}:{size[1]}"
                ),
                remedy="paint what is to be learned white, or crop picture and mask around it",
            )
        return mask

    def _own_transparency(self) -> Image.Image:
        if self.alpha is None:
            raise DataError(
                f"no transparency to take for a mask in {self.path}",
                expected="an alpha channel, because of alpha_mask, or a mask beside the picture",
                got=f"an opaque {self.path.suffix[1:].upper()}",
                remedy=f"save it with the background transparent, or add {self.path.stem}.mask.png",
            )
        return self.alpha


def read_picture(path: Path, resolution: int) -> Image.Image:
    """Read the central square of a picture file in RGB, `resolution` pixels a side. Errors: as `open_picture`."""
    return open_picture(path).shown((resolution, resolution))


def open_picture(path: Path, content: bytes | None = None) -> OpenPicture:
    """Read a picture file, turned upright (EXIF), in sRGB, on white where transparent.

    Args:
        content: the file's bytes, where they are not at `path`, which then names them in errors.

    Raises:
        DataError: missing, unreadable, too large, animated, or in a format that is not among `FORMATS` or whose
            colours would have to be guessed.
    """
    with _reading(path, content):
        picture = _upright(path, content)
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        record = picture.info.get("qrlora", "")
        return OpenPicture(path, _to_srgb(picture, path), alpha, record if isinstance(record, str) else "")


def _read_mask(path: Path) -> Image.Image:
    """A mask file in mode L; what is transparent in it is black."""
    with _reading(path):
        mask = _upright(path)
        if mask.has_transparency_data:
            mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask.convert("RGBA"))
        return mask.convert("L")


def _cut(picture: Image.Image, size: Size, resampling: Image.Resampling, view: View) -> Image.Image:
    cut = ImageOps.fit(picture, size, resampling)
    cut = ImageOps.mirror(cut) if view.mirrored else cut
    if not (view.right or view.down):
        return cut
    rows = (np.arange(size[1]) - view.down).clip(0, size[1] - 1)
    columns = (np.arange(size[0]) - view.right).clip(0, size[0] - 1)
    return Image.fromarray(np.asarray(cut)[rows][:, columns])


@contextlib.contextmanager
def _reading(path: Path, content: bytes | None = None) -> Iterator[None]:
    """Turn what Pillow raises about a file into a DataError."""
    with parsing(
        said("unreadable picture: %(path)s", path=path),
        DataError,
        expected="a complete PNG, JPEG, WebP, AVIF, TIFF, BMP or GIF file",
        remedy="open it in an image editor and save it again as PNG, or leave it out",
    ):
        if content is None and not path.is_file():
            raise DataError(said("no such picture: %(path)s", path=path), remedy="check the path")
        size = path.stat().st_size if content is None else len(content)
        if size > LARGEST_FILE:
            raise _too_large(path, said("%(most)s bytes at most", most=LARGEST_FILE), said("%(size)s bytes", size=size))
        yield


def _too_large(path: Path, expected: str, got: str) -> DataError:
    return DataError(
        said("picture too large: %(path)s", path=path),
        expected=expected,
        got=got,
        remedy="scale it down in an image editor",
    )


def _upright(path: Path, content: bytes | None = None) -> Image.Image:
    """Decode the one frame of a file as a whole, turned as the camera was held."""
    with _opened(path, content) as opened:
        opened.verify()  # PNG's checksums up to its end, of which decoding needs neither
    with _opened(path, content) as opened:
        _refuse_animation(opened, path)
        opened.load()
        picture = ImageOps.exif_transpose(opened)
    if picture.mode[0] in "IF":
        raise DataError(
            said("picture of unknown range: %(path)s", path=path),
            expected="8 bits a channel",
            got=said("mode %(mode)s", mode=picture.mode),
            remedy="save it as an 8-bit PNG",
        )
    return picture


def _opened(path: Path, content: bytes | None) -> Image.Image:
    """A picture file with its header read, and no pixel."""
    most = said("%(most)s million pixels at most", most=LARGEST_PICTURE // 10**6)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size is checked below
            opened = Image.open(path if content is None else io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(path, most, str(error)) from error
    if opened.width * opened.height > LARGEST_PICTURE:
        with opened:
            raise _too_large(path, most, f"{opened.width} x {opened.height}")
    return opened


def _refuse_animation(opened: Image.Image, path: Path) -> None:
    """Refuse several frames: the choice is the user's. (MPO is what phones write: a photograph and its previews.)"""
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":
        raise DataError(
            said("animated or many-paged picture: %(path)s", path=path),
            expected="one frame",
            got=said("%(frames)s frames", frames=frames),
            remedy="save the frame that is meant as PNG",
        )


def _to_srgb(picture: Image.Image, path: Path) -> Image.Image:
    """RGB in sRGB, by the embedded colour profile if there is one; transparency on white."""
    profile = picture.info.get("icc_profile")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    elif picture.mode == "P":
        picture = picture.convert("RGB")
    if profile:
        picture = _apply_profile(picture, profile, path)
    return picture.convert("RGB")


def _apply_profile(picture: Image.Image, profile: bytes, path: Path) -> Image.Image:
    """Convert from the embedded profile's colours to sRGB; a profile for another kind of picture is ignored."""
    remedy = "save the picture again as an sRGB PNG"
    with parsing(said("unreadable colour profile in %(path)s", path=path), DataError, remedy=remedy):
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = embedded.profile.xcolor_space.strip()
        if {"RGB": "RGB", "CMYK": "CMYK", "GRAY": "L"}.get(space) != picture.mode:
            return picture
        converted = ImageCms.profileToProfile(picture, embedded, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # None only for in-place conversion
    return converted
