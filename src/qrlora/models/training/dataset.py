"""Pictures and captions of a training run, and what the frozen encoders make of them. docs/data.md is the user's view.

    one picture           captioned by `mug.txt` or `mug.caption` beside it, else by the recipe
    a folder              all its pictures, each captioned by its own file, else by the recipe
    a folder with         `metadata.jsonl`, one {"file_name": ..., "text": ...} per line, or `metadata.csv` with these
                          columns, for every picture in it; "mask" names a mask
    a folder of folders   `10_mug`, `1_cups`, as sd-scripts has them: the number says how often an epoch shows each

`mug.mask.png` beside a picture is its mask. In every caption `[trigger]` stands for the trigger, and a caption without
the trigger is an error: what it teaches could never be called.

Pictures are read twice, once to check them all and once to encode them, one at a time: a folder need not fit in memory.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from qrlora._reading import inside, parse_json, read_text, visible
from qrlora._tensor_file import packed_entry, read_entry
from qrlora.errors import DataError
from qrlora.models.families import ModelFamily
from qrlora.models.training.pictures import OpenPicture, Size, View, nearest_size, open_picture, views
from qrlora.models.training.recipe import TRIGGER

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = (".txt", ".caption")
MASK = ".mask"
"""What stands between the name of a picture and the suffix of its mask."""

Report = Callable[[str, int, int], None]
"""Told what has been done, how many times, of how many."""


@dataclass(frozen=True)
class Source:
    """A picture file, and what is said of it: nothing is None. `repeats` is how often an epoch shows it."""

    picture: Path
    caption: str | None = None
    mask: Path | None = None
    repeats: int = 1


@dataclass(frozen=True)
class Example:
    """One picture with its caption, checked; its pixels are read again when they are needed.

    Attributes:
        source: where it comes from.
        caption: text with the trigger in place.
        size: width and height in pixels that it is cut to.
        view: whether it is mirrored or moved before it is shown.
        digest: SHA-256 of the pixels the model is shown, and their size.
        mask_digest: the same of its mask; empty if the whole picture counts.
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
    """Latents and conditions: all that training still needs of the pictures. On the CPU, until a batch is made.

    Attributes:
        latents: of each example, (c, h, w) float32; examples of one shape are a bucket.
        masks: weights of its places in the loss, (1, h, w) float32, or None if they are all alike.
        texts: which row of `conditions` is its caption's.
        conditions: tensors with one row for each caption that there is.
        epoch: the examples that an epoch shows, each as often as it is repeated.
        digest: SHA-256 of the pictures, captions, masks and repeats they were made from.
        device: where batches are wanted.
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
        """Latents and conditions of the examples with these indices, which share a bucket."""
        latents = torch.stack([self.latents[i] for i in indices.tolist()])
        rows = self.texts[indices]
        return latents.to(self.device), {key: value[rows].to(self.device) for key, value in self.conditions.items()}

    def mask(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b 1 h w"] | None:
        """Weights of their places in the loss; None if none of them has a mask."""
        chosen = [(self.latents[i], self.masks[i]) for i in indices.tolist()]
        if all(mask is None for _, mask in chosen):
            return None
        whole = [torch.ones_like(latents[:1]) if mask is None else mask for latents, mask in chosen]
        return torch.stack(whole).to(self.device)


def find_pictures(images: Sequence[Path], repeats: Sequence[int] = ()) -> list[Source]:
    """Every picture these paths stand for, in a fixed order, with its own caption and mask if it has them.

    Args:
        images: pictures and folders, as in the recipe.
        repeats: how often an epoch shows those of each path; once if not given.

    Raises:
        DataError: a path that is not there, a folder without pictures, masks without a picture, or metadata that does
            not match its folder.
    """
    found: list[Source] = []
    for path, times in zip(images, repeats or [1] * len(images), strict=True):
        if path.is_dir():
            sources = _folder(path)
        elif not path.is_file():
            raise DataError(f"no such picture or folder: {path}", remedy="check the path")
        elif _is_mask(path):  # as in `--subject *.png`
            _refuse_orphans([path], [other for other in images if other.parent == path.parent])
            sources = []
        else:
            sources = [Source(path, caption_beside(path), _mask_of(path, _masks(visible(path.parent))))]
        found += [replace(source, repeats=source.repeats * times) for source in sources]
    return found


def _folder(folder: Path) -> list[Source]:
    """The pictures of a folder; if it has none, those of its folders `10_name`, as often as they say."""
    folders = [inside(path, folder, DataError) for path in visible(folder) if path.is_dir()]
    counts = {path: re.match(r"([1-9][0-9]{0,8})_", path.name) for path in folders}
    if _files(folder) or not any(counts.values()):
        return _pictures(folder)
    if others := [path.name for path, count in counts.items() if count is None]:
        raise DataError(
            f"{folder} holds folders with and without a number of repeats",
            expected="only folders such as 10_mug",
            got=f"also {', '.join(others)}",
            remedy="rename them, or move them away",
        )
    numbered = [(path, int(count[1])) for path, count in counts.items() if count]
    return [replace(source, repeats=number) for path, number in numbered for source in _pictures(path)]


def _files(folder: Path) -> list[Path]:
    """Pictures and masks that lie directly in a folder."""
    return [inside(path, folder, DataError) for path in visible(folder) if path.suffix.lower() in SUFFIXES]


def _pictures(folder: Path) -> list[Source]:
    """The pictures directly in a folder, with captions and masks by its metadata or by what lies beside them."""
    files = _files(folder)
    if not files:
        raise DataError(
            f"no pictures in {folder}",
            expected="files ending in " + ", ".join(sorted(SUFFIXES)),
            got=f"{sum(1 for _ in folder.iterdir())} other files and folders",
            remedy="give a picture, a folder that directly holds pictures, or one of folders named as 10_mug",
        )
    pictures, masks = [path for path in files if not _is_mask(path)], _masks(files)
    _refuse_orphans([path for path in files if _is_mask(path)], pictures)
    metadata = metadata_of(folder)
    if metadata is None:
        captions = _captions(visible(folder))
        return [Source(path, _caption_of(path, captions), _mask_of(path, masks)) for path in pictures]
    rows = (_table if metadata.suffix == ".csv" else _metadata)(metadata)
    named = {row.mask for row in rows.values()}
    pictures = [path for path in pictures if path not in named]
    names = {path.name for path in pictures}
    if names != set(rows):
        raise DataError(
            f"{metadata} does not match the pictures beside it",
            expected="one line for each picture",
            got=f"no line for {sorted(names - set(rows))}; no picture for {sorted(set(rows) - names)}",
            remedy="correct the file names, or remove the metadata and caption by .txt files",
        )
    return [replace(rows[path.name], mask=rows[path.name].mask or _mask_of(path, masks)) for path in pictures]


def metadata_of(folder: Path) -> Path | None:
    """The file that captions all pictures of a folder, if it has one."""
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"two captions for each picture of {folder}",
            expected="one of " + ", ".join(METADATA),
            got="both",
            remedy="remove one of them",
        )
    return found[0] if found else None


def _table(path: Path) -> dict[str, Source]:
    """Read the caption and mask of each row of a CSV file."""
    rows: dict[str, Source] = {}
    table = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in table:
            name, text, mask = row.get("file_name"), row.get("text"), row.get("mask")
            if not name or text is None or None in row:
                raise _bad_line(path, table.reader.line_num, str(row))
            _refuse_twice(name, rows, path)
            rows[name] = Source(path.parent / name, text, _mask_beside(path, mask))
    except csv.Error as error:
        raise _bad_line(path, table.reader.line_num, str(error)) from error
    return rows


def _mask_beside(metadata: Path, mask: str | None) -> Path | None:
    return inside(metadata.parent / mask, metadata.parent, DataError) if mask else None


def _bad_line(path: Path, number: int, got: str) -> DataError:
    return DataError(
        f"line {number} of {path} cannot be used",
        expected="columns file_name and text, and mask if any, named in the first line",
        got=got[:200],
        remedy="correct the line",
    )


def _refuse_twice(name: str, rows: Mapping[str, Source], path: Path) -> None:
    if name in rows:
        raise DataError(
            f"two captions for {name}", expected=f"one line of {path} for it", got="two", remedy="remove one of them"
        )


def _metadata(path: Path) -> dict[str, Source]:
    """Read the caption and mask of each line of a metadata.jsonl file."""
    rows: dict[str, Source] = {}
    # Not splitlines: JSON may hold what that takes for the end of a line.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        what = f"line {number} of {path}"
        name, text, mask = _row(parse_json(line, what, DataError, expected=_ROW, remedy="correct the line"), what)
        _refuse_twice(name, rows, path)
        rows[name] = Source(path.parent / name, text, _mask_beside(path, mask))
    return rows


_ROW = '{"file_name": "mug.png", "text": "a photo of a [trigger] mug"}, and "mask": a file, if any'


def _row(row: Any, what: str) -> Sequence[str]:
    """Name, caption and mask that a line of the metadata gives; "" without a mask."""
    row = {"mask": ""} | row if isinstance(row, dict) else {}
    fields = ["" if key == "mask" and row.get(key) is None else row.get(key) for key in ("file_name", "text", "mask")]
    if not all(isinstance(field, str) for field in fields):
        raise DataError(f"{what} cannot be used", expected=_ROW, got=str(row)[:200], remedy="correct the line")
    return fields


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.stem.endswith(MASK)


def _masks(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the mask files, by the name of their picture without its suffix."""
    masks: dict[str, list[Path]] = {}
    for path in files:
        if _is_mask(path):
            masks.setdefault(path.stem.removesuffix(MASK), []).append(path)
    return masks


def _mask_of(picture: Path, masks: Mapping[str, list[Path]]) -> Path | None:
    mine = masks.get(picture.stem, [])
    if len(mine) > 1:
        raise DataError(
            f"more than one mask for {picture}",
            expected=f"one file {picture.stem}{MASK}.*",
            got=", ".join(sorted(path.name for path in mine)),
            remedy="remove the others",
        )
    return mine[0] if mine else None


def _refuse_orphans(masks: Sequence[Path], pictures: Sequence[Path]) -> None:
    orphans = {mask.stem for mask in masks} - {picture.stem + MASK for picture in pictures}
    if orphans:
        raise DataError(
            f"a mask without its picture in {masks[0].parent}",
            expected=f"beside each picture NAME{MASK}.png a picture NAME",
            got=", ".join(sorted(mask.name for mask in masks if mask.stem in orphans)),
            remedy=f"add the picture, or take {MASK} out of the name if it is one",
        )


def caption_beside(picture: Path) -> str | None:
    """The text of the caption file beside a picture, if there is one."""
    return _caption_of(picture, _captions(visible(picture.parent)))


def _captions(files: Iterable[Path]) -> dict[str, list[Path]]:
    """Return the caption files, by the name of their picture without its suffix."""
    captions: dict[str, list[Path]] = {}
    for path in sorted(files):
        if path.suffix.lower() in CAPTIONS and path.is_file():
            captions.setdefault(path.stem, []).append(path)
    return captions


def _caption_of(picture: Path, captions: Mapping[str, list[Path]]) -> str | None:
    mine = captions.get(picture.stem, [])
    texts = {_text(path).strip() for path in mine}
    if len(texts) > 1:
        raise DataError(
            f"two captions for {picture}",
            expected="one file " + " or ".join(picture.stem + suffix for suffix in CAPTIONS),
            got=", ".join(path.name for path in mine),
            remedy="remove the others, or write the same into all of them",
        )
    return texts.pop() if texts else None


def _text(path: Path) -> str:
    return read_text(inside(path, path.parent, DataError), "captions", DataError)


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
    """Read and check everything before any time is spent.

    Args:
        images: pictures and folders, as in the recipe.
        caption: for pictures without one of their own.
        trigger: what replaces `[trigger]`, and must be in every caption.
        resolution: side in pixels of the squares that pictures are cut to.
        sizes: shapes to cut each picture to the nearest of, instead (`bucket_sizes`).
        flip: each picture's mirror image is an example too, after it.
        shift: so are copies moved by this many pixels to each side, the edge repeated; 0: none.
        alpha_mask: pictures without a mask beside them have it in their transparency.
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
    """One error for all of them, if there are any."""
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
    """Latents and text embeddings of the examples, from the disk cache where they have been made before.

    The cache is keyed by the pixels shown or the text, and by the encoders, so it never has to be cleared for
    correctness.

    Args:
        mask_min_value: weight of what masks leave out, from 0 to 1, where they have no effect.
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
