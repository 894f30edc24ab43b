"""Bring in the adapters of existing folders with one call, without the damaged ones."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrlora._reading import visible
from qrlora.errors import QrloraError, RegistryError
from qrlora.method.adapter import Adapter
from qrlora.models.exchange import load_any
from qrlora.operations.provenance.canonical import file_digest
from qrlora.operations.registry.intake import add_adapter, add_picture, add_space, kind_of
from qrlora.operations.registry.records import Artifact
from qrlora.operations.registry.registry import Registry

NAMED = 60
"""Characters of a part of a guessed name."""


@dataclass
class Intake:
    """The result of bringing in a folder, file by file, with the reasons for those that were left out."""

    added: dict[Path, Artifact] = field(default_factory=dict)
    skipped: dict[Path, str] = field(default_factory=dict)


def add_folder(
    registry: Registry,
    folder: Path,
    *,
    prefix: str = "",
    progress: Callable[[int, int], None] | None = None,
    **described: Any,
) -> Intake:
    """Add the adapters and spaces in a folder and the folders in it, and the pictures there that they were trained on.

    Names are guessed from the files': `Teapots/Classic v2.safetensors` becomes teapots/classic-v2. Hidden files,
    checkpoints of training runs and files that links lead to from elsewhere are passed over.

    Args:
        prefix: the first part of all names, before the /.
        described: as `add_adapter`, for all of them.

    Raises:
        RegistryError: no folder, or nothing in it to add.
    """
    files = list(_files(folder)) if folder.is_dir() else []
    adapters = [path for path in files if kind_of(path) == "adapter"]
    spaces = [path for path in files if kind_of(path) == "space"]
    if not adapters and not spaces:
        got = "no such files" if folder.is_dir() else "no such folder"
        raise RegistryError(f"nothing to add in {folder}", expected="*.safetensors", got=got, remedy="check the path")
    found = Intake()
    read = _read(adapters, found.skipped)
    trained_on = {f"sha256:{one.get('sha256')}" for adapter in read.values() for one in _pictures(adapter)}
    pictures = [path for path in files if kind_of(path) == "picture" and file_digest(path) in trained_on]
    ordered = sorted(read, key=lambda path: read[path].metadata.role == "composition")  # after their parts
    work: list[tuple[Path, Callable[..., Artifact], dict[str, Any]]] = [
        *((path, add_picture, {}) for path in pictures),
        *((path, add_adapter, described) for path in ordered),
        *((path, add_space, {}) for path in spaces),
    ]
    names = _names(folder, [path for path, _, _ in work], prefix)
    for number, (path, add, options) in enumerate(work, 1):
        try:
            found.added[path] = add(registry, path, name=names[path], **options)
        except (QrloraError, OSError) as error:
            found.skipped[path] = str(error)
        if progress:
            progress(number, len(work))
    return found


def _files(folder: Path) -> Iterator[Path]:
    root = folder.resolve()
    for path in visible(folder):
        if path.is_dir() and not path.is_symlink() and path.suffix != ".checkpoints":
            yield from _files(path)
        elif path.is_file() and path.resolve().is_relative_to(root):
            yield path


def _read(paths: list[Path], skipped: dict[Path, str]) -> dict[Path, Adapter]:
    read = {}
    for path in paths:
        try:
            read[path] = load_any(path)
        except (QrloraError, OSError) as error:
            skipped[path] = str(error)
    return read


def _pictures(adapter: Adapter) -> list[dict[str, Any]]:
    pictures = adapter.metadata.provenance.get("pictures")
    return [one for one in pictures if isinstance(one, dict)] if isinstance(pictures, list) else []


def _names(folder: Path, paths: list[Path], prefix: str) -> dict[Path, str]:
    """Return a name of its own for each file; where two come out alike, the later ones are numbered."""
    names: dict[Path, str] = {}
    for path in paths:
        group = prefix or slug("-".join(path.relative_to(folder).parts[:-1]))
        # A name all in letters that names here do not have is told by its content.
        stem = slug(path.stem.removesuffix(".space")) or f"file-{file_digest(path)[7:19]}"
        stem += "-picture" if kind_of(path) == "picture" else ""
        name = plain = f"{group}/{stem}" if group else stem
        number = 2
        while name in names.values():
            name, number = f"{plain}-{number}", number + 1
        names[path] = name
    return names


def slug(text: str) -> str:
    """Return the part of a name that is nearest to a text; empty if nothing of it can stand in a name."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:NAMED].strip("-")
