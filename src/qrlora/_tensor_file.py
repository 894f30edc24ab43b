"""Safetensors files with a digest: packed with one, and checked against it as they are read, in one pass.

The digest is the SHA-256 of all that decides how a file is used: of its header as canonical JSON (keys, dtypes, shapes,
places, metadata) and of the SHA-256 of every byte after the header. It stands in the metadata, under `qrlora.digest`.
Notes for other programs (`NOTES`) are not in it: these may edit what is theirs.

Sizes are checked before anything is read or parsed: of the file, of its header, of each tensor against its place.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from qrlora._reading import parse_json as any_json
from qrlora.errors import TensorFileError, bounded

DIGEST = "qrlora.digest"
NOTES = ("modelspec.", "ss_", "sshs_")
"""Prefixes and names of the metadata of Stability's ModelSpec, kohya's scripts and A1111."""
MOST_BYTES = 2**33
"""More than any adapter has: one of rank 128 on every matrix of the largest model here takes half of it in float32."""
MOST_HEADER_BYTES = 10_000_000
"""Enough for thousands of tensors and, in the notes, the tags of a large data set."""
MOST_TENSORS = 20_000
BLOCK = 2**23
"""Bytes read at a time, hashed while the next are read."""
AGAIN = "download or copy it again"

log = logging.getLogger(__name__)

_IDENTITY = "qrlora.entry"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Header = dict[str, Any]


def require(ok: bool, what: str, *, expected: object = None, got: object = None, remedy: str | None = None) -> None:
    """Raise TensorFileError with the given parts unless `ok`."""
    if not ok:
        raise TensorFileError(what, expected=expected, got=got, remedy=remedy)


def packed(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, *, for_others: bool = False
) -> Callable[[BinaryIO], None]:
    """Return what writes a safetensors file with its digest to a stream.

    for_others: also under the names that ModelSpec and A1111 look for, the SHA-256 of the bytes after the header.
    """
    data = safetensors.torch.save(dict(tensors), metadata=dict(metadata or {}))
    start = 8 + int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8:start]), memoryview(data)[start:]
    found = hashlib.sha256(body).hexdigest()
    words = header.setdefault("__metadata__", {})
    words |= {"modelspec.hash_sha256": f"0x{found}", "sshs_model_hash": found} if for_others else {}
    words[DIGEST] = digest_of(header, found)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(stream: BinaryIO) -> None:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.write(body)

    return write


def digest_of(header: Mapping[str, Any], body_digest: str) -> str:
    """Return the digest of a file with this header and these bytes after it."""
    words = header.get("__metadata__", {})
    words = {key: value for key, value in words.items() if key != DIGEST and not key.startswith(NOTES)}
    whole = json.dumps([{**header, "__metadata__": words}, body_digest], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(whole.encode()).hexdigest()


def read(path: Path, shapes: Mapping[str, tuple[int, ...]], most_bytes: int) -> tuple[dict[str, Tensor], Header]:
    """Read the tensors and the metadata of a file of ours; the digest stays in the metadata if there is one.

    shapes: of tensors that have to be there, checked before the data is read.

    Raises:
        TensorFileError: the file is not what its header and its digest say, or has other tensors.
        OSError: it cannot be read.
    """
    with path.open("rb") as stream:
        header = read_header(stream, most_bytes)
        got = {key: header[key].get("shape") if key in header else "none" for key in shapes}
        wrong = {key: found for key, found in got.items() if found != list(shapes[key])}
        require(not wrong, "other tensors", expected={key: shapes[key] for key in wrong}, got=wrong, remedy=AGAIN)
        tensors, body_digest = read_tensors(stream, header)
    check_digest(header, body_digest)
    return tensors, header.get("__metadata__", {})


def read_entry(
    path: Path, identity: str, shapes: Mapping[str, tuple[int, ...]] | None = None, most_bytes: int = 2**30
) -> dict[str, Tensor] | None:
    """Read a cache entry that `packed_entry` made; None, with a note, for one that cannot be trusted.

    It is then to be made again: what is cached costs time alone.
    """
    try:
        tensors, words = read(path, shapes or {}, most_bytes)
        require(words.get(_IDENTITY, identity) == identity, "another entry's content", expected=identity, got=words)
    except (TensorFileError, OSError) as error:
        note(f"the cache's {path} is damaged and is made again: {getattr(error, 'what', error)}")
        return None
    if not {DIGEST, _IDENTITY} <= set(words):
        note(f"what is cached in {path.parent} without a digest, by an older version, is made again")
        return None
    return tensors


def packed_entry(tensors: Mapping[str, Tensor], identity: str) -> Callable[[BinaryIO], None]:
    """Return what writes a cache entry. identity: what it was made of and how, as a digest."""
    return packed(tensors, {_IDENTITY: identity})


@functools.cache
def note(text: str) -> None:
    """Print a note to the user once; it is not an error."""
    log.warning(text)


def read_header(stream: BinaryIO, most_bytes: int = MOST_BYTES) -> Header:
    """Read the header of a stream: entries that are objects, and metadata that maps text to text, if there is any."""
    size = os.fstat(stream.fileno()).st_size
    require(size > 0, "empty file", expected="a .safetensors file", got="0 bytes", remedy=AGAIN)
    require(size >= 8, "truncated", expected="8 bytes of header length", got=f"{size} bytes", remedy=AGAIN)
    length = int.from_bytes(stream.read(8), "little")
    require(
        length <= MOST_HEADER_BYTES,
        "oversized header, or no safetensors file",
        expected=f"at most {MOST_HEADER_BYTES} bytes",
        got=length,
        remedy="take the original file; an adapter's header is far smaller",
    )
    require(
        size <= most_bytes,
        "too large",
        expected=f"at most {most_bytes:,} bytes",
        got=f"{size:,} bytes",
        remedy="name an adapter, not a whole model",
    )
    text = stream.read(length)
    require(len(text) == length, "truncated in its header", expected=length, got=len(text), remedy=AGAIN)
    # Counted before it is parsed, which would take the memory that is to be spared.
    parts = {what: text.count(sign) for what, sign in (("objects", b"{"), ("lists", b"["), ("values", b":"))}
    most = {"objects": MOST_TENSORS, "lists": 5 * MOST_TENSORS, "values": 20 * MOST_TENSORS}
    many = {what: number for what, number in parts.items() if number > most[what]}
    require(not many, "too many tensors", expected=f"at most {MOST_TENSORS}", got=many, remedy="name an adapter")
    header = parse_json(text, "the header")
    require(isinstance(header, dict), "the header is not a JSON object", expected="{...}", got=type(header).__name__)
    words = header.get("__metadata__", {})
    strings = isinstance(words, dict) and all(isinstance(value, str) for value in words.values())
    require(strings, "metadata is no map of strings", expected="text for text", got=words)
    odd = {key: entry for key, entry in header.items() if not isinstance(entry, dict)}
    require(not odd, "malformed entries", expected="dtype, shape and data_offsets", got=odd)
    return header


def read_tensors(stream: BinaryIO, header: Header) -> tuple[dict[str, Tensor], str]:
    """Read all tensors of a stream that stands behind its header, and the SHA-256 of what was read.

    Refuses truncated, overlapping or trailing data, before it reads any. All tensors are views of one buffer.
    """
    size = os.fstat(stream.fileno()).st_size - stream.tell()
    entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
    places = check_layout(entries, size)
    whole = torch.empty(size, dtype=torch.uint8)
    into, digest, read = memoryview(whole.numpy()), hashlib.sha256(), 0  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as hasher:  # neither hashing nor reading holds the interpreter: they run side by side
        while size > read and (some := stream.readinto(into[read : read + BLOCK])):  # type: ignore[attr-defined]
            hasher.submit(digest.update, into[read : read + some])
            read += some
    require(read == size, "truncated", expected=f"{size} bytes of tensor data", got=read, remedy=AGAIN)
    tensors = {}
    for key, (begin, end) in places.items():
        dtype = _DTYPES[entries[key]["dtype"]]
        part = whole[begin:end] if begin % dtype.itemsize == 0 else whole[begin:end].clone()
        tensors[key] = part.view(dtype).reshape(entries[key]["shape"])
    return tensors, digest.hexdigest()


def check_layout(entries: Mapping[str, Header], size: int) -> dict[str, tuple[int, int]]:
    """Return key -> (begin, end) in the tensor data; TensorFileError unless they fill `size` bytes without a gap."""
    places = {key: _place(key, entry) for key, entry in entries.items()}
    filled = 0
    for key, (begin, end) in sorted(places.items(), key=lambda item: item[1]):
        require(
            begin == filled,
            "truncated or damaged: tensor data as no writer lays it out",
            expected=f"{key} from byte {filled} of the data on",
            got=f"from {begin} on",
            remedy=AGAIN,
        )
        filled = end
    require(
        filled == size,
        "truncated or damaged",
        expected=f"{filled} bytes of tensor data, as the header describes them",
        got=size,
        remedy=AGAIN,
    )
    return places


def _place(key: str, entry: Header) -> tuple[int, int]:
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    known = isinstance(dtype, str) and dtype in _DTYPES
    counted = all(isinstance(part, list) and all(is_whole(n) and n >= 0 for n in part) for part in (shape, offsets))
    begin, end = offsets if known and counted and len(offsets) == 2 else (0, -1)
    require(
        end - begin == (math.prod(shape) * _DTYPES[dtype].itemsize if end >= begin else None),
        f"truncated or damaged: {bounded(key)} is no tensor",
        expected="a dtype, a shape and as many bytes",
        got=entry,
        remedy=AGAIN,
    )
    return begin, end


def check_digest(header: Header, body_digest: str) -> None:
    """Raise TensorFileError if the header has a digest and it is of something else."""
    said = header.get("__metadata__", {}).get(DIGEST)
    require(
        said is None or said == digest_of(header, body_digest),
        "damaged: it is not what its digest was taken of",
        expected=f"SHA-256 {said}",
        got=f"SHA-256 {digest_of(header, body_digest)}",
        remedy=f"{AGAIN}; if another program changed it, take the original",
    )


def parse_json(text: str | bytes, what: str, *, finite: bool = True) -> Any:
    """Parse any JSON value, as `_reading.parse_json`."""
    return any_json(text, what, TensorFileError, finite=finite)


def is_whole(value: Any) -> bool:
    """Return True for an int that is not a bool."""
    return type(value) is int
