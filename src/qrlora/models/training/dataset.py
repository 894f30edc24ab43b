"""Check the pictures and captions of a training run, and encode them with the frozen encoders.

In every caption `[trigger]` stands for the trigger, and a caption without the trigger is an error: no prompt could call
what it trains. Pictures are read twice, once to check them all and once to encode them, one at a time: a folder need
not fit in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from qrlora._files import default_cache_dir, make_folder, write_atomically
from qrlora._tensor_file import packed_entry, read_entry
from qrlora.errors import DataError
from qrlora.models.families import ModelFamily
from qrlora.models.training.pictures import OpenPicture, Size, View, nearest_size, open_picture, views
from qrlora.models.training.recipe import TRIGGER
from qrlora.models.training.sources import Source, find_pictures

Report = Callable[[str, int, int], None]
"""Called with the name of a stage, the number done so far, and the number of all."""


@dataclass(frozen=True)
class Example:
    """One picture with its caption, checked; its pixels are read again when they are needed.

    Attributes:
        source: where it comes from.
        caption: text with the trigger in place.
        size: width and height in pixels that it is cut to.
        view: whether it is mirrored or moved before it is shown.
        digest: SHA-256 of the pixels the model is shown, and their size.
        mask_digest: SHA-256 of its mask's pixels, and their size; empty if it has none.
    """

    source: Source
    caption: str
    size: Size
    view: View
    digest: str
    mask_digest: str

    @property
    def name(self) -> str:
        """File name, for messages and provenance."""
        return self.source.picture.name

    @property
    def picture(self) -> Image.Image:
        """The picture as the model is shown it. Raises DataError if it is no longer what was checked."""
        return self._unchanged(open_picture(self.source.picture).shown(self.size, self.view), self.digest)

    @property
    def pixels(self) -> Float[Tensor, "3 height width"]:
        """The picture as float32 in [-1, 1]."""
        return torch.from_numpy(np.array(self.picture)).permute(2, 0, 1).float() / 127.5 - 1

    @property
    def mask(self) -> Float[Tensor, "1 height width"] | None:
        """Loss weight of each pixel, float32 from 0 (background) to 1; None if all are 1."""
        if not self.mask_digest:
            return None
        mask = open_picture(self.source.picture).mask(self.source.mask, self.size, self.view)
        return torch.from_numpy(np.array(self._unchanged(mask, self.mask_digest)))[None].float() / 255

    def _unchanged(self, image: Image.Image, digest: str) -> Image.Image:
        if _digest(image) != digest:
            raise DataError(f"{self.source.picture} or its mask changed while it was read", remedy="start again")
        return image


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


@dataclass(frozen=True)
class EncodedDataset:
    """Latents and conditions of all examples, on the CPU until a batch is made.

    Attributes:
        latents: of each example, (c, h, w) float32; examples of one shape are a bucket.
        masks: of each example, loss weight of every latent position, (1, h, w) float32; None if all are 1.
        texts: of each example, the row of its caption in `conditions`.
        conditions: tensors by name, with one row for each distinct caption.
        epoch: indices of the examples in one epoch, those with repeats several times.
        digest: SHA-256 of the pictures, captions, masks and repeats they were made from.
        device: to which batches are moved.
    """

    latents: tuple[Tensor, ...]
    masks: tuple[Tensor | None, ...]
    texts: Int[Tensor, " n"]
    conditions: dict[str, Tensor]
    epoch: Int[Tensor, " m"]
    digest: str
    device: torch.device

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def buckets(self) -> list[tuple[int, ...]]:
        """The bucket of every entry of `epoch`, named by the shape of its latents."""
        return [tuple(self.latents[i].shape) for i in self.epoch.tolist()]

    def batch(self, indices: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b c h w"], dict[str, Tensor]]:
        """Return latents and conditions of the examples with these indices, which share a bucket."""
        latents = torch.stack([self.latents[i] for i in indices.tolist()])
        rows = self.texts[indices]
        return latents.to(self.device), {key: value[rows].to(self.device) for key, value in self.conditions.items()}

    def mask(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b 1 h w"] | None:
        """Return the loss weights of these examples' latent positions; None if none of them has a mask."""
        chosen = [(self.latents[i], self.masks[i]) for i in indices.tolist()]
        if all(mask is None for _, mask in chosen):
            return None
        whole = [torch.ones_like(latents[:1]) if mask is None else mask for latents, mask in chosen]
        return torch.stack(whole).to(self.device)


def load_examples(
    images: Sequence[Path],
    caption: str,
    trigger: str,
    resolution: int,
    *,
    sizes: Sequence[Size] = (),
    flip: bool = False,
    shift: int = 0,
    alpha_mask: bool = False,
    repeats: Sequence[int] = (),
    report: Report | None = None,
) -> list[Example]:
    """Read and check every picture and caption, before any time is spent on them.

    Args:
        images: pictures and folders, as in the recipe.
        caption: for pictures without one of their own.
        trigger: what replaces `[trigger]`, and must be in every caption.
        resolution: side in pixels of the squares that pictures are cut to.
        sizes: shapes to cut each picture to the nearest of, instead (`bucket_sizes`).
        flip, shift: its mirror image, and copies moved by so many pixels to each side, are examples too.
        alpha_mask: the alpha channel is the mask of a picture without a mask file.
        repeats: as `find_pictures` takes them.
        report: told of every picture.

    Raises:
        DataError: naming every picture that cannot be used, and why.
    """
    examples: list[Example] = []
    problems: list[DataError] = []
    sources = find_pictures(images, repeats)
    for number, source in enumerate(sources, 1):
        try:
            text = _called(caption, trigger, source)
            opened = open_picture(source.picture)
            size = nearest_size(opened.image.size, sizes or [(resolution, resolution)])
            masked = alpha_mask or source.mask is not None
            examples += [_example(source, text, opened, size, masked, view) for view in views(flip, shift)]
        except DataError as error:
            problems.append(error)
        if report:
            report("pictures read", number, len(sources))
    _raise_all(problems)
    return examples


def _raise_all(problems: Sequence[DataError]) -> None:
    """Raise one error for all of them, if there are any."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError(f"{len(problems)} pictures cannot be used:\n" + "\n".join(map(str, problems)))


def _called(caption: str, trigger: str, source: Source) -> str:
    """The caption of a picture with the trigger in place."""
    text = (caption if source.caption is None else source.caption).replace(TRIGGER, trigger)
    if trigger not in text:
        raise DataError(
            f"caption of {source.picture} lacks the trigger",
            expected=f"{trigger!r} or {TRIGGER} somewhere in it",
            got=repr(text),
            remedy=f"write {TRIGGER} where the name of what is learned belongs",
        )
    return text


def _example(source: Source, text: str, opened: OpenPicture, size: Size, masked: bool, view: View) -> Example:
    mask = _digest(opened.mask(source.mask, size, view)) if masked else ""
    return Example(source, text, size, view, _digest(opened.shown(size, view)), mask)


def encode(
    examples: Sequence[Example],
    pipe: Any,
    family: ModelFamily,
    *,
    mask_min_value: float = 0.0,
    report: Report | None = None,
) -> EncodedDataset:
    """Encode the examples to latents and text embeddings, from the disk cache where they have been made before.

    The cache is keyed by the pixels shown or the text, and by the encoders, so it never has to be cleared for
    correctness.

    Args:
        mask_min_value: loss weight of what masks exclude, from 0 to 1; at 1 masks have no effect.
        report: told of every picture.

    Raises:
        DataError: a weight of the background without any mask, or a picture that changed since it was checked.
    """
    _check_background(examples, mask_min_value)
    encoders = _encoders_digest(pipe, family)
    latents: list[Tensor] = []
    for number, example in enumerate(examples, 1):
        made = _cached(f"picture {example.digest} {encoders}", partial(_latents, example, pipe, family))
        latents.append(made["latents"].float())
        if report:
            report("pictures encoded", number, len(examples))
    captions = {text: row for row, text in enumerate(sorted({example.caption for example in examples}))}
    rows = [_cached(f"text {caption} {encoders}", partial(_conditions, caption, pipe, family)) for caption in captions]
    times = torch.tensor([example.source.repeats for example in examples])
    return EncodedDataset(
        latents=tuple(latents),
        masks=tuple(_weights(e, x.shape[-2:], mask_min_value) for e, x in zip(examples, latents, strict=True)),
        texts=torch.tensor([captions[example.caption] for example in examples]),
        conditions={key: torch.stack([row[key] for row in rows]) for key in rows[0]},
        epoch=torch.arange(len(examples)).repeat_interleave(times),
        digest=_data_digest(examples),
        device=pipe.device,
    )


def _check_background(examples: Sequence[Example], least: float) -> None:
    if 0 < least < 1 and not any(example.mask_digest for example in examples):
        raise DataError(
            "no picture has a mask",
            expected="a mask, because of mask_min_value",
            got=f"{len(examples)} pictures without",
            remedy="add NAME.mask.png beside a picture, set alpha_mask, or leave mask_min_value out",
        )


def _latents(example: Example, pipe: Any, family: ModelFamily) -> dict[str, Tensor]:
    return {"latents": family.encode_images(pipe, example.pixels[None])[0].cpu()}


def _conditions(caption: str, pipe: Any, family: ModelFamily) -> dict[str, Tensor]:
    return {key: value[0].cpu() for key, value in family.encode_prompts(pipe, [caption]).items()}


def _weights(example: Example, grid: Sequence[int], least: float) -> Float[Tensor, "1 h w"] | None:
    """The example's mask on the grid of its latents, from ``least`` to 1: of each place the part that is white."""
    mask = example.mask if least < 1 else None
    return None if mask is None else least + (1 - least) * adaptive_avg_pool2d(mask, (grid[0], grid[1]))


def _data_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of all that the examples are; masks and repeats are in it where there are any."""
    rows = []
    for example in examples:
        more = {"mask": example.mask_digest, "repeats": example.source.repeats}
        rows.append([example.digest, example.caption, *([more] if more != {"mask": "", "repeats": 1} else [])])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _encoders_digest(pipe: Any, family: ModelFamily) -> str:
    """Digest the encoders of a model by a strided sample of every weight.

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
    """The tensors kept under this key, or computed and kept now. A damaged entry is made anew, with a note."""
    identity = hashlib.sha256(key.encode()).hexdigest()
    path = default_cache_dir() / "encoded" / f"{identity}.safetensors"
    kept = read_entry(path, identity) if path.is_file() else None
    if kept is not None:
        return kept
    tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
    make_folder(path.parent)
    write_atomically(path, packed_entry(tensors, identity), rescue=False)
    return tensors
