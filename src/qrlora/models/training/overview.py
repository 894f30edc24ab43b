"""Describe in one line before training which pictures and captions were found, and which files were not used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from qrlora.errors import printable
from qrlora.models.training.sources import CAPTIONS, Source, find_pictures, metadata_of

NAMED = 5
"""Files that are named; of more the number is said."""


def overview(images: Sequence[Path]) -> str:
    """Describe the pictures found: "3 pictures, 1 captioned by file, 2 by the recipe; not read: b.heic, c.jfif".

    Args:
        images: pictures and folders, as in the recipe.

    Raises:
        DataError: as `find_pictures`.
    """
    sources = find_pictures(images)
    by_file = sum(source.caption is not None for source in sources)
    masks = sum(source.mask is not None for source in sources)
    said = [f"{len(sources)} picture" + "s" * (len(sources) != 1)]
    said += [f"{by_file} captioned by file"] * bool(by_file)
    by_recipe = len(sources) - by_file
    said += [f"{by_recipe} {'' if by_file else 'captioned '}by the recipe"] * bool(by_recipe)
    said += [f"{masks} with a mask"] * bool(masks)
    used = _used(sources)
    unread = [printable(name) for path in dict.fromkeys(images) if path.is_dir() for name in _unread(path, used, path)]
    more = f" and {len(unread) - NAMED} more" if len(unread) > NAMED else ""
    return ", ".join(said) + (f"; not read: {', '.join(unread[:NAMED])}{more}" if unread else "")


def _used(sources: Sequence[Source]) -> set[Path]:
    """Every file that these pictures, their captions and their masks are read from."""
    used = {path for source in sources for path in (source.picture, source.mask) if path}
    metadata = {folder: metadata_of(folder) for folder in {source.picture.parent for source in sources}}
    used |= {path for path in metadata.values() if path}
    captioned = {(one.picture.parent, one.picture.stem) for one in sources if not metadata[one.picture.parent]}
    for folder in {folder for folder, _ in captioned}:
        beside = (path for path in folder.iterdir() if path.suffix.lower() in CAPTIONS)
        used |= {path for path in beside if (folder, path.stem) in captioned}
    return used


def _unread(folder: Path, used: set[Path], top: Path) -> Iterator[str]:
    """List the files of a folder that are not used, hidden ones excepted. A folder without pictures is named itself."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path in used:
            continue
        if path.is_dir() and any(path in one.parents for one in used):
            yield from _unread(path, used, top)
        else:
            yield f"{path.relative_to(top)}{'/' * path.is_dir()}"
