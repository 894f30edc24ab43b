"""Pictures and captions of a training run, and what the frozen encoders make of them.

    one picture           captioned by `mug.txt` beside it, else by the recipe
    a folder              all its pictures, each captioned by its own .txt, else by the recipe
    a folder with         `metadata.jsonl`, one {"file_name": ..., "text": ...} per line, for every picture in it

In every caption `[trigger]` stands for the trigger, and a caption without the trigger is an error: what it teaches
could never be called. Pictures are turned upright (EXIF), brought to sRGB, laid on white where transparent, cropped to
their central square and resized.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float, Int
from PIL import Image, ImageCms, ImageOps
from safetensors import SafetensorError
from torch import Tensor, nn

from qrlora.basis import default_cache_dir
from qrlora.errors import DataError
from qrlora.families import ModelFamily
from qrlora.files import write_atomically
from qrlora.training.recipe import TRIGGER

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
METADATA = "metadata.jsonl"
LARGEST_ENLARGEMENT = 4
"""A picture smaller than the training resolution by more than this factor would teach the model blur."""

_PICTURE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Example:
    """One picture with its caption.

    Attributes:
        name: file name, for messages and provenance.
        caption: text with the trigger in place.
        picture: square RGB picture at the training resolution.
    """

    name: str
    caption: str
    picture: Image.Image

    @property
    def digest(self) -> str:
        """SHA-256 of the pixels the model is shown, and their size."""
        return hashlib.sha256(f"{self.picture.size}".encode() + self.picture.tobytes()).hexdigest()

    @property
    def pixels(self) -> Float[Tensor, "3 side side"]:
        """The picture as float32 in [-1, 1]."""
        return torch.from_numpy(np.array(self.picture)).permute(2, 0, 1).float() / 127.5 - 1


@dataclass(frozen=True)
class EncodedDataset:
    """Latents `(n, c, h, w)` float32 and conditions with n rows each: all that training still needs of the pictures.

    `digest` is a SHA-256 of the pictures and captions they were made from.
    """

    latents: Float[Tensor, "n c h w"]
    conditions: dict[str, Tensor]
    digest: str

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b c h w"], dict[str, Tensor]]:
        """The examples with these indices."""
        indices = indices.to(self.latents.device)
        return self.latents[indices], {key: value[indices] for key, value in self.conditions.items()}


def read_picture(path: Path, resolution: int) -> Image.Image:
    """One file as a square RGB picture, `resolution` pixels a side.

    Raises:
        DataError: missing, unreadable, animated, too small, or in a format whose colours would have to be guessed.
    """
    if not path.is_file():
        raise DataError(f"no such picture: {path}", remedy="check the path")
    try:
        with Image.open(path) as opened:
            _refuse_animation(opened, path)
            opened.load()
            picture = _to_srgb(ImageOps.exif_transpose(opened), path)
    except DataError:
        raise
    except _PICTURE_ERRORS as error:
        raise DataError(
            f"unreadable picture: {path}",
            expected="a complete PNG, JPEG, WebP, TIFF, BMP, GIF or AVIF file",
            got=f"{type(error).__name__}: {error}",
            remedy="open it in an image editor and save it again as PNG, or leave it out",
        ) from error
    least = -(-resolution // LARGEST_ENLARGEMENT)
    if min(picture.size) < least:
        raise DataError(
            f"picture too small: {path}",
            expected=f"at least {least} pixels on the shorter side, for training at {resolution}",
            got=f"{picture.width} x {picture.height}",
            remedy="use a larger picture",
        )
    return ImageOps.fit(picture, (resolution, resolution), Image.Resampling.LANCZOS)


def _refuse_animation(opened: Image.Image, path: Path) -> None:
    """More than one frame is a choice that is the user's. (MPO is what phones write: a photograph and its previews.)"""
    frames = getattr(opened, "n_frames", 1)
    if frames > 1 and opened.format != "MPO":
        raise DataError(
            f"animated or many-paged picture: {path}",
            expected="one frame",
            got=f"{frames} frames",
            remedy="save the frame that is meant as PNG",
        )


def _to_srgb(picture: Image.Image, path: Path) -> Image.Image:
    """RGB in sRGB, by the embedded colour profile if there is one; transparency on white."""
    profile = picture.info.get("icc_profile")
    if picture.mode[0] in "IF":
        raise DataError(
            f"picture of unknown range: {path}",
            expected="8 bits a channel",
            got=f"mode {picture.mode}",
            remedy="save it as an 8-bit PNG",
        )
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
    """From the embedded profile's colours to sRGB; a profile for another kind of picture does not apply."""
    try:
        embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = embedded.profile.xcolor_space.strip()
        if {"RGB": "RGB", "CMYK": "CMYK", "GRAY": "L"}.get(space) != picture.mode:
            return picture
        converted = ImageCms.profileToProfile(picture, embedded, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError) as error:
        raise DataError(
            f"unreadable colour profile in {path}",
            got=f"{type(error).__name__}: {error}",
            remedy="save the picture again as an sRGB PNG",
        ) from error
    assert converted is not None  # None only for in-place conversion
    return converted


def find_pictures(images: Sequence[Path]) -> list[tuple[Path, str | None]]:
    """Every picture these paths stand for, in a fixed order, with its own caption if it has one.

    Raises:
        DataError: a path that is not there, a folder without pictures, or metadata that does not match its folder.
    """
    found: list[tuple[Path, str | None]] = []
    for path in images:
        if path.is_dir():
            found += _folder(path)
        elif path.is_file():
            found.append((path, _sidecar(path)))
        else:
            raise DataError(f"no such picture or folder: {path}", remedy="check the path")
    return found


def _folder(folder: Path) -> list[tuple[Path, str | None]]:
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise DataError(
            f"no pictures in {folder}",
            expected="files ending in " + ", ".join(sorted(SUFFIXES)),
            got=f"{sum(1 for _ in folder.iterdir())} other files",
            remedy="give a picture, or a folder that directly holds pictures",
        )
    if not (folder / METADATA).is_file():
        return [(path, _sidecar(path)) for path in pictures]
    captions = _metadata(folder / METADATA)
    names = {path.name for path in pictures}
    if names != set(captions):
        raise DataError(
            f"{folder / METADATA} does not match the pictures beside it",
            expected="one line for each picture",
            got=f"no line for {sorted(names - set(captions))}; no picture for {sorted(set(captions) - names)}",
            remedy="correct the file names, or remove the metadata and caption by .txt files",
        )
    return [(path, captions[path.name]) for path in pictures]


def _metadata(path: Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} of {path} cannot be used",
                expected='{"file_name": "mug.png", "text": "a photo of a [trigger] mug"}',
                got=line[:200],
                remedy="correct the line",
            ) from error
        captions[str(name)] = str(text)
    return captions


def _sidecar(picture: Path) -> str | None:
    text = picture.with_suffix(".txt")
    return _text(text).strip() if text.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(
            f"captions that are no text: {path}", expected="UTF-8", got=error, remedy="save the file again as UTF-8"
        ) from error


def load_examples(images: Sequence[Path], caption: str, trigger: str, resolution: int) -> list[Example]:
    """Read and check everything before any time is spent.

    Args:
        images: pictures and folders, as in the recipe.
        caption: for pictures without one of their own.
        trigger: what replaces `[trigger]`, and must be in every caption.
        resolution: side in pixels.

    Raises:
        DataError: naming every picture that cannot be used, and why.
    """
    examples, problems = [], []
    for path, own in find_pictures(images):
        text = (caption if own is None else own).replace(TRIGGER, trigger)
        try:
            if trigger not in text:
                raise DataError(
                    f"caption of {path} lacks the trigger",
                    expected=f"{trigger!r} or {TRIGGER} somewhere in it",
                    got=repr(text),
                    remedy=f"write {TRIGGER} where the name of what is learned belongs",
                )
            examples.append(Example(path.name, text, read_picture(path, resolution)))
        except DataError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError(f"{len(problems)} pictures cannot be used:\n" + "\n".join(map(str, problems)))
    return examples


def encode(examples: Sequence[Example], pipe: Any, family: ModelFamily) -> EncodedDataset:
    """Latents and text embeddings of the examples, from the disk cache where they have been made before.

    The cache is keyed by pixels or text and by the encoders, so it never has to be cleared for correctness.
    """
    encoders = _encoders_digest(pipe, family)

    def latents(example: Example) -> dict[str, Tensor]:
        return {"latents": family.encode_images(pipe, example.pixels[None])[0].cpu()}

    def conditions(caption: str) -> dict[str, Tensor]:
        return {key: value[0].cpu() for key, value in family.encode_prompts(pipe, [caption]).items()}

    encoded = [_cached(f"picture {e.digest} {encoders}", partial(latents, e)) for e in examples]
    captions = sorted({example.caption for example in examples})
    texts = {caption: _cached(f"text {caption} {encoders}", partial(conditions, caption)) for caption in captions}
    device = pipe.device
    rows = [texts[example.caption] for example in examples]
    return EncodedDataset(
        latents=torch.stack([item["latents"] for item in encoded]).float().to(device),
        conditions={key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]},
        digest=hashlib.sha256(json.dumps([[e.digest, e.caption] for e in examples]).encode()).hexdigest(),
    )


def _encoders_digest(pipe: Any, family: ModelFamily) -> str:
    """What distinguishes the encoders of one model from those of another: a strided sample of every weight.

    All of them would be surer, but reading a T5-XXL through SHA-256 takes longer than encoding the captions.
    """
    digest = hashlib.sha256(family.name.encode())
    for name, module in sorted(pipe.components.items()):
        if not isinstance(module, nn.Module) or name == family.denoiser:
            continue
        for key, weight in module.state_dict().items():
            flat = weight.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().contiguous()
            digest.update(f"{name}.{key} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _cached(key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors kept under this key, or computed and kept now. A damaged entry is made anew."""
    path = default_cache_dir() / "encoded" / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if path.is_file():
        try:
            return safetensors.torch.load(path.read_bytes())
        except SafetensorError:
            path.unlink()
    tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.torch.save(tensors))
    return tensors
