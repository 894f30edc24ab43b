"""Define one form of JSON and one form of digest for all that is signed or named by its content."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from qrlora.errors import RegistryError

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def canonical_json(value: Any) -> bytes:
    """Return JSON with sorted keys, no spaces, UTF-8, finite numbers: equal values give equal bytes.

    Raises:
        RegistryError: a value that JSON has no form for, such as NaN.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return text.encode()
    except (TypeError, ValueError) as error:
        raise RegistryError("no canonical JSON", expected="finite numbers, texts, lists, objects", got=error) from error


def digest_of(content: bytes) -> str:
    """Return `sha256:` and the hexadecimal SHA-256 of these bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def file_digest(path: Path) -> str:
    """Return the digest of a file, read in blocks. RegistryError for a pipe or a device, which has no end."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe or a device"
        raise RegistryError(f"{path} cannot be hashed", expected="a file", got=what, remedy="name a file")
    with path.open("rb") as stream:
        return stream_digest(stream)


def stream_digest(stream: Any) -> str:
    """Return the digest of all that can be read from a binary stream: a file, or one of fsspec, which has no type."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def known_digest(path: str | Path) -> str:
    """Return the digest of a file, hashed once for as long as its time and size stay."""
    found = os.stat(path)
    return _digest_of(str(path), found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4096)
def _digest_of(path: str, _changed: int, _size: int) -> str:
    return file_digest(Path(path))
