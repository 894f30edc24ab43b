"""The container of adapter files: safetensors, read with suspicion.

Every check that needs no knowledge of adapters is here: kind of file, header, dtypes, completeness, finite numbers.
All complaints are AdapterFileError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from qrlora import reading
from qrlora.adapter.record import require
from qrlora.errors import AdapterFileError

DTYPES = ("F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Put the file's name before any complaint about it."""
    try:
        yield
    except AdapterFileError as error:
        what = f"{path}: {error.what}"
        raise AdapterFileError(what, expected=error.expected, got=error.got, remedy=error.remedy) from error
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read", got=error) from error


def check_is_file(path: Path) -> None:
    """Refuse what is no file, and pickles and zips by name or first bytes."""
    require(
        path.is_file(),
        "not a file",
        expected="a .safetensors file",
        got="a folder" if path.is_dir() else "something else" if path.exists() else "nothing there",
        remedy="name the adapter's .safetensors file itself",
    )
    with path.open("rb") as stream:
        start = stream.read(9)
    # A header of a length that begins with the same bytes as a pickle would still have "{" as its ninth byte.
    pickled = start[:1] == b"\x80" and start[1:2] <= b"\x05" and start[8:9] != b"{"
    require(
        path.suffix not in PICKLE_SUFFIXES and not pickled and not start.startswith(b"PK\x03\x04"),
        "a pickle or zip; it was not opened, because opening a pickle runs the code inside it",
        expected="a .safetensors file",
        got=f"{path.suffix or 'no suffix'}, first bytes {start!r}",
        remedy="ask its author for a .safetensors file",
    )


def read_header(stream: BinaryIO) -> dict[str, Any]:
    """The JSON header of a safetensors stream, a dict of unchecked entries; refuses what is too short or too long."""
    size = os.fstat(stream.fileno()).st_size
    require(size > 0, "empty file", expected="a .safetensors file", got="0 bytes", remedy="download it again")
    require(
        size >= 8, "truncated", expected="8 bytes of header length", got=f"{size} bytes", remedy="download it again"
    )
    length = int.from_bytes(stream.read(8), "little")
    require(
        length <= MAX_HEADER_BYTES,
        "oversized header, or no safetensors file",
        expected=f"at most {MAX_HEADER_BYTES} bytes",
        got=length,
        remedy="take the original file",
    )
    text = stream.read(length)
    require(len(text) == length, "truncated in its header", expected=length, got=len(text), remedy="download it again")
    header = parse_json(text, "the header")
    require(isinstance(header, dict), "the header is no JSON object", expected="{...}", got=type(header).__name__)
    return header


def check_entries(raw: Any, header: Mapping[str, Any]) -> None:
    """Refuse metadata that is no map of strings, and tensors without a shape or of a dtype that is no adapter's."""
    strings = isinstance(raw, dict) and all(isinstance(value, str) for value in raw.values())
    require(strings, "metadata is no map of strings", expected="text for text", got=raw)
    for key, entry in header.items():
        sizes = entry.get("shape") if isinstance(entry, dict) else None
        shaped = isinstance(sizes, list) and all(is_whole(size) and size >= 0 for size in sizes)
        require(shaped, f"{key}: malformed entry", expected="dtype, shape and data_offsets", got=entry)
    wrong = {key: entry.get("dtype") for key, entry in header.items() if str(entry.get("dtype")) not in DTYPES}
    require(
        not wrong,
        f"{len(wrong)} tensors have a wrong dtype",
        expected="F32, F16 or BF16",
        got=wrong,
        remedy="save it in one of these",
    )


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """All tensors of a whole safetensors file in memory; refuses truncated, overlapping or trailing data."""
    what, expected = f"truncated or damaged ({len(data)} bytes)", "tensor data as the header describes it"
    with reading.parsing(what, AdapterFileError, expected=expected, remedy="download or copy it again"):
        return safetensors.torch.load(data)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse NaN and Inf, naming every tensor that has one."""
    bad = sorted(key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all()))
    require(not bad, "NaN or Inf", expected="finite numbers", got=bad, remedy="train again at a lower learning rate")


def check_keys(what: str, expected: Iterable[str], got: Mapping[str, Any]) -> None:
    """Refuse `got` unless its keys are exactly `expected`; list all that are missing and all that are too many."""
    missing, unexpected = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    require(
        not missing and not unexpected,
        f"{what}: keys missing or unknown",
        expected=f"all of the format's keys; missing: {missing or 'none'}",
        got=f"unexpected: {unexpected or 'none'}",
        remedy="take the original file; a newer qrlora may also have written it",
    )


def parse_json(text: str | bytes, what: str) -> Any:
    """Any JSON value, as `reading.parse_json`."""
    return reading.parse_json(text, what, AdapterFileError)


def is_whole(value: Any) -> bool:
    """True for an integer that is no bool."""
    return type(value) is int
