"""Read another program's safetensors file, with the checks of our own."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from qrlora._tensor_file import check_digest
from qrlora.method.adapter.container import (
    about,
    check_entries,
    check_finite,
    check_is_file,
    check_said_hashes,
    read_header,
    read_tensors,
)


def read_shapes(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Read the shape of every tensor, and the metadata, from the header alone; errors as `read_tensor_file`."""
    with about(path):
        check_is_file(path)
        with path.open("rb") as stream:
            header = read_header(stream)
        metadata = header.pop("__metadata__", {})
        check_entries(header)
    return {key: entry["shape"] for key, entry in header.items()}, metadata


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors and the metadata; AdapterFileError for pickles, damage, foreign dtypes and NaN."""
    with about(path):
        check_is_file(path)
        with path.open("rb") as stream:
            header = read_header(stream)
            metadata = header.get("__metadata__", {})
            check_entries({key: entry for key, entry in header.items() if key != "__metadata__"})
            tensors, body_digest = read_tensors(stream, header)
        check_digest(header, body_digest)
        check_said_hashes(path, metadata, tensors, body_digest)
        check_finite(tensors)
    return tensors, metadata


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the whole file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
