"""Store bytes by their digest, in a folder or on any fsspec file system."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import fsspec

from qrlora._files import default_cache_dir, disk_error, make_folder, sweep, write_atomically
from qrlora._said import said
from qrlora.errors import RegistryError
from qrlora.operations.provenance.canonical import file_digest, stream_digest


@runtime_checkable
class Store(Protocol):
    """The place of the artifacts' bytes. Digests were checked by the caller."""

    def put(self, digest: str, source: Path) -> None:
        """Copy a file in, at once or not at all; nothing happens if it is there."""

    def path(self, digest: str) -> Path:
        """Return a local file with these bytes, fetched if need be. RegistryError if they are missing or changed."""

    def check(self, digest: str) -> None:
        """Hash the stored bytes, and a cached copy if there is one. RegistryError if they are missing or changed."""

    def has(self, digest: str) -> bool: ...

    def delete(self, digest: str) -> None: ...

    def digests(self) -> set[str]:
        """Return all digests that are there."""

    def sweep(self) -> None:
        """Remove the temporary files of processes that were killed."""


def _place(digest: str) -> str:
    hexadecimal = digest.removeprefix("sha256:")
    return f"{hexadecimal[:2]}/{hexadecimal}"


def _checked(path: Path, digest: str, where: object) -> Path:
    _check(path, file_digest(path) if path.is_file() else None, digest, where)
    return path


def _check(path: object, got: str | None, digest: str, where: object) -> None:
    """Raise RegistryError unless the digest is that which was found; None is a file that is not there."""
    if got is None:
        raise RegistryError(
            said("the bytes of %(digest)s are missing", digest=digest[:19]),
            expected=said("a file in %(where)s", where=where),
            remedy="`qrlora registry verify` lists all that is missing; import it again from an export or its source",
        )
    if got != digest:
        raise RegistryError(
            said("%(path)s is not what was registered", path=path),
            expected=digest,
            got=got,
            remedy="it was changed or damaged: restore it from an export or a backup",
        )


class FolderStore:
    """A folder: `ab/abcdef…`, read-only files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, digest: str, source: Path) -> None:
        target = self.folder / _place(digest)
        if target.is_file() and file_digest(target) == digest:  # a damaged one is replaced
            return
        make_folder(target.parent)

        def copy(stream: BinaryIO) -> None:
            with source.open("rb") as opened:
                shutil.copyfileobj(opened, stream)

        def same(written: Path) -> None:
            _checked(written, digest, self.folder)  # the source may have changed since it was hashed

        write_atomically(target, copy, rescue=False, check=same)

    def path(self, digest: str) -> Path:
        return _checked(self.folder / _place(digest), digest, self.folder)

    def check(self, digest: str) -> None:
        self.path(digest)

    def has(self, digest: str) -> bool:
        return (self.folder / _place(digest)).is_file()

    def delete(self, digest: str) -> None:
        try:
            (self.folder / _place(digest)).unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(error) from error

    def digests(self) -> set[str]:
        return {f"sha256:{path.name}" for path in self.folder.glob("??/*") if len(path.name) == 64}

    def sweep(self) -> None:
        for folder in self.folder.glob("??"):
            sweep(folder)


class RemoteStore:
    """Any fsspec file system (`s3://bucket/prefix`, `memory://x`); files are fetched into the cache and checked."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise RegistryError(
                f"no store at {url}", got=error, remedy="install the fsspec package it names"
            ) from error

    def _at(self, digest: str) -> str:
        return f"{self.root}/{_place(digest)}"

    def put(self, digest: str, source: Path) -> None:
        if self.has(digest):
            return
        target = self._at(digest)
        self.fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        temporary = f"{target}.{secrets.token_hex(8)}"
        self.fs.put_file(str(source), temporary)
        self.fs.mv(temporary, target)

    def path(self, digest: str) -> Path:
        local = FolderStore(default_cache_dir() / "registry")
        if not local.has(digest) and self.has(digest):
            make_folder((local.folder / _place(digest)).parent)
            with self.fs.open(self._at(digest), "rb") as stream:
                write_atomically(local.folder / _place(digest), stream.read(), rescue=False)
        try:
            return local.path(digest)
        except RegistryError:
            local.delete(digest)  # or the cache would hold the damaged one for ever
            raise

    def check(self, digest: str) -> None:
        got = None
        if self.has(digest):
            with self.fs.open(self._at(digest), "rb") as stream:
                got = stream_digest(stream)
        _check(self._at(digest), got, digest, self.url)

    def has(self, digest: str) -> bool:
        return bool(self.fs.exists(self._at(digest)))

    def delete(self, digest: str) -> None:
        if self.has(digest):
            self.fs.rm_file(self._at(digest))

    def digests(self) -> set[str]:
        return {f"sha256:{name}" for name in self._names() if len(name) == 64}

    def sweep(self) -> None:
        """Remove temporary files older than a day; no lock there tells whether a younger one's writer still runs."""
        for name in self._names():
            if re.fullmatch(r"[0-9a-f]{64}\.[0-9a-f]{16}", name):
                path = f"{self.root}/{name[:2]}/{name}"
                with contextlib.suppress(NotImplementedError, FileNotFoundError):
                    if datetime.now(timezone.utc) - self.fs.modified(path) > timedelta(days=1):
                        self.fs.rm_file(path)

    def _names(self) -> list[str]:
        return [str(path).rpartition("/")[2] for path in self.fs.find(self.root)]


def store_at(where: str | Path) -> Store:
    """Return the store of a folder or an fsspec URL."""
    return RemoteStore(where) if isinstance(where, str) and "://" in where else FolderStore(Path(where))
