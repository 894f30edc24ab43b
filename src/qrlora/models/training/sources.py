"""Find the pictures of a training run with their captions and masks. docs/data.md is the user's view.

    one picture           captioned by `mug.txt` or `mug.caption` beside it, else by the recipe
    a folder              all its pictures, each captioned by its own file, else by the recipe
    a folder with         `metadata.jsonl`, one {"file_name": ..., "text": ...} per line, or `metadata.csv` with these
                          columns, for every picture in it; "mask" names a mask
    a folder of folders   `10_mug`, `1_cups`, as sd-scripts has them: the number says how often an epoch shows each

`mug.mask.png` beside a picture is its mask.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qrlora._reading import inside, parse_json, read_text, visible
from qrlora.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"})
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTIONS = (".txt", ".caption")
MASK = ".mask"
"""Text between the name of a picture and the suffix of its mask."""


@dataclass(frozen=True)
class Source:
    """A picture file with its own caption and mask, or None. `repeats` is how often an epoch shows it."""

    picture: Path
    caption: str | None = None
    mask: Path | None = None
    repeats: int = 1


def find_pictures(images: Sequence[Path], repeats: Sequence[int] = ()) -> list[Source]:
    """Find every picture of these paths, in a fixed order, with its own caption and mask if it has them.

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
    """Find the pictures of a folder; if it has none, those of its folders `10_name`, as often as they say."""
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
    """List the pictures and masks that lie directly in a folder."""
    return [inside(path, folder, DataError) for path in visible(folder) if path.suffix.lower() in SUFFIXES]


def _pictures(folder: Path) -> list[Source]:
    """Find the pictures directly in a folder, with captions and masks by its metadata or by the files beside them."""
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
    """Return the file that captions all pictures of a folder, if it has one."""
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
    """Return name, caption and mask of one line of the metadata; "" without a mask."""
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
    """Read the caption file beside a picture, if there is one."""
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
