"""Check an adapter file as a safetensors container before any number of it is used.

The checks of every LoRA file are here: its kind, dtypes, finite numbers, and the hashes in its metadata. Its sizes
and its digest are checked by qrlora._tensor_file. All complaints are AdapterFileError, of which `about` names the file.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qrlora._tensor_file import DIGEST, is_whole, note, parse_json, read_header, read_tensors
from qrlora.errors import AdapterFileError, MismatchError, TensorFileError, bounded
from qrlora.method.adapter.record import require

__all__ = ["is_whole", "parse_json", "read_header", "read_tensors"]

DTYPES = ("F32", "F16", "BF16")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Prefix the message of an AdapterFileError raised inside the context with the file's name."""
    try:
        yield
    except (AdapterFileError, TensorFileError, MismatchError) as error:
        what = f"{path}: {error.what}"
        raise AdapterFileError(what, expected=error.expected, got=error.got, remedy=error.remedy) from error
    except OSError as error:
        raise AdapterFileError(f"{path}: cannot be read", got=error) from error


def check_is_file(path: Path) -> None:
    """Raise AdapterFileError unless the path is a file, and for pickles and zips, known by suffix or first bytes."""
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


def check_entries(header: Mapping[str, Any]) -> None:
    """Raise AdapterFileError for a tensor without a shape, or with a dtype that adapters do not have.

    header: tensor name -> its safetensors entry (dtype, shape, offsets), without `__metadata__`.
    """
    for key, entry in header.items():
        sizes = entry.get("shape")
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


def check_said_hashes(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], body_digest: str) -> None:
    """Raise AdapterFileError if the tensors differ from `modelspec.hash_sha256`; note it where only kohya's hash does.

    The ModelSpec hash covers all tensor data: the bytes after the header, or one tensor after the other in the order of
    the keys or (kohya's merging scripts) of the model. The file does not record the order of the model, but those
    scripts also write `sshs_model_hash`, the hash of the bytes after the header. Programs that rename keys or convert
    dtypes copy `sshs_model_hash` without updating it, so its mismatch alone proves no damage.
    """
    said = metadata.get("modelspec.hash_sha256", "").lower().removeprefix("0x")
    kohya = metadata.get("sshs_model_hash", "").lower()
    known = body_digest in (said, kohya)
    if said and not known:
        by_key = hashlib.sha256()
        for key in sorted(tensors):
            by_key.update(tensors[key].reshape(-1).view(torch.uint8).numpy().data)
        require(
            by_key.hexdigest() == said,
            "damaged or changed: its tensors are not those that modelspec.hash_sha256 was taken of",
            expected=f"SHA-256 {said}",
            got=f"SHA-256 {body_digest}",
            remedy="download it again; if a program that you trust changed it, remove that field from its metadata",
        )
    if kohya and not known and not said:
        note(f"{path}: changed or damaged since kohya's scripts wrote it, by its sshs_model_hash")


def note_undigested(path: Path, metadata: Mapping[str, str]) -> None:
    """Note that damage to a file of ours without a digest would not be found."""
    if DIGEST not in metadata:
        note(f"{path}: written by an older version, without a digest: damage to it cannot be found")


def check_finite(tensors: Mapping[str, Tensor], remedy: str = "train again at a lower learning rate") -> None:
    """Refuse NaN and Inf, naming every tensor that has one."""
    extremes = {key: tensor.detach().aminmax() for key, tensor in tensors.items() if tensor.numel()}
    bad = sorted(key for key, both in extremes.items() if not all(math.isfinite(value) for value in both))
    require(not bad, "NaN or Inf", expected="finite numbers", got=bad, remedy=remedy)


def check_keys(what: str, expected: Iterable[str], got: Mapping[str, Any]) -> None:
    """Refuse `got` unless its keys are exactly `expected`; list all that are missing and all that are too many."""
    missing, unexpected = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    require(
        not missing and not unexpected,
        f"{what}: keys missing or unknown",
        expected=f"all of the format's keys; missing: {bounded(missing or 'none')}",
        got=f"unexpected: {bounded(unexpected or 'none')}",
        remedy="take the original file; a newer qrlora may also have written it",
    )
