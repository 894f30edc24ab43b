"""Write outputs: whole files or none, one run per output, room checked beforehand, and no result lost to a disk error.

    with claimed(path, size):         # refuses a missing, read-only or full folder, and the output of a running process
        write_atomically(path, data)  # what cannot be written there is written to the cache or to the temporary folder

Locks are the operating system's, which end with the process that holds them: `flock`, on Windows `msvcrt.locking`. On a
file system without locks nothing is refused, and the temporary files of killed processes stay.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from qrlora._said import said
from qrlora.errors import OutputError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

Content = bytes | Callable[[BinaryIO], Any]
"""The bytes of a file, or what writes them to the open file it is given."""

Check = Callable[[Path], None]

REMEDIES = {
    errno.ENOSPC: "free space there, or name an output on another disk",
    errno.EDQUOT: "free space there, or name an output on another disk",
    errno.EFBIG: "name an output on a file system, and under a `ulimit -f`, that allows files of this size",
    errno.EROFS: "it is mounted read-only: name an output elsewhere",
    errno.EACCES: "get the right to write there, or name an output elsewhere",
    errno.EPERM: "get the right to write there, or name an output elsewhere",
    errno.ENOENT: "create the folder, or name an output elsewhere",
    errno.ENOTDIR: "name an output inside a folder",
    errno.EEXIST: "name a folder",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "give the output a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
}
ELSE = "check the disk, or name an output on another one"


def default_cache_dir() -> Path:
    """Return the folder of everything cached: $QRLORA_CACHE, else ~/.cache/qrlora.

    A user without a home (a container's number without a passwd entry) has one among the temporary files.
    """
    if named := os.environ.get("QRLORA_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "qrlora"
    except RuntimeError:
        return _temporary_cache_dir()


def _temporary_cache_dir() -> Path:
    """Make a folder in which nobody else can have put anything."""
    folder = Path(tempfile.gettempdir(), f"qrlora-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise OutputError(
            f"{folder} cannot be the cache",
            expected="a folder that this user alone can write to",
            got="one of another user, or open to others",
            remedy="set QRLORA_CACHE to a folder of your own",
        )
    return folder


def disk_error(error: OSError, path: Path | None = None, saved: Path | None = None) -> OutputError:
    """Turn an OSError about a file into an OutputError with a remedy.

    Args:
        path: the file, if `error` does not name it as the user knows it.
        saved: where its content was written instead.
    """
    named = path or error.filename or said("the output")
    what = said("cannot write %(path)s", path=path) if path else said("%(path)s cannot be read or written", path=named)
    remedy = REMEDIES.get(error.errno or 0, ELSE)
    if saved:
        what = said("%(what)s; it was saved as %(saved)s instead", what=what, saved=saved)
        remedy = said(
            "%(remedy)s; the result is not lost: move %(saved)s to where you want it", remedy=said(remedy), saved=saved
        )
    return OutputError(what, got=error.strerror or str(error), remedy=remedy, saved=saved)


def write_atomically(
    path: Path, content: Content, *, rescue: bool = True, make_folder: bool = False, check: Check | None = None
) -> None:
    """Put ``content`` at ``path`` at once: a temporary file beside it, synced, renamed over it, the folder synced.

    Args:
        rescue: if that fails, write it elsewhere. Not for what is computed again at little cost, such as a cache.
        make_folder: make the folder, but none above it, if it is missing.
        check: given the temporary file, raises if it must not become the file.

    Raises:
        OutputError: names the file, the remedy, and where the content was saved instead.
    """
    write_all({path: content}, rescue=rescue, make_folder=make_folder, check=check)


def write_all(
    contents: Mapping[Path, Content], *, rescue: bool = True, make_folder: bool = False, check: Check | None = None
) -> None:
    """Write each file as `write_atomically` does; save the first that fails, and the rest, elsewhere."""
    left = dict(contents)
    for path, content in contents.items():
        try:
            if make_folder:
                path.parent.mkdir(exist_ok=True)
            _put(path, content, check)
        except OSError as error:
            raise disk_error(error, path, _rescued(left, check) if rescue else None) from error
        del left[path]


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they are missing; OutputError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def _put(path: Path, content: Content, check: Check | None = None) -> None:
    sweep(path.parent, path.name)
    temporary, stream = _temporary(path)
    try:
        with stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            if check:
                check(temporary)
            if os.name == "posix":  # while it is locked: another run's `sweep` would take it for a dead process's
                os.replace(temporary, path)
        if os.name != "posix":  # Windows renames no open file, and removes none
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _rescued(contents: Mapping[Path, Content], check: Check | None) -> Path | None:
    """Write these files to the cache, or else to the system's temporary folder; return the path of the first. None if
    neither can be written to."""
    for parent in (lambda: default_cache_dir() / "rescued", lambda: Path(tempfile.gettempdir())):
        with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: nobody's home is known
            parent().mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix="qrlora-", dir=parent()))
            try:
                for path, content in contents.items():
                    _put(folder / path.name, content, check)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return folder / next(iter(contents)).name
    return None


# Temporary files


def _temporary(path: Path) -> tuple[Path, BinaryIO]:
    """Create a file beside `path`, and return it open and locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        stream = temporary.open("xb")
        if _locked(stream.fileno()) is not False and temporary.exists():
            return temporary, stream
        stream.close()  # `sweep` of another run came between the two lines
        temporary.unlink(missing_ok=True)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files that killed processes left in a folder: of the file called `name`, or of any.

    Those of a living process are locked, and stay.
    """
    ours = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[0-9a-f]{{16}}\.tmp", re.DOTALL)
    with contextlib.suppress(OSError):  # no such folder, or not ours to clean
        for entry in [entry for entry in os.scandir(folder) if ours.fullmatch(entry.name)]:
            with contextlib.suppress(OSError), open(entry.path, "rb") as stream:
                if _locked(stream.fileno()):
                    os.unlink(entry.path)


def _locked(descriptor: int) -> bool | None:
    """Lock an open file; False if another process, or another descriptor, holds it; None where there are no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # behind the content, which others may want to read
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK) else None
    finally:
        if sys.platform == "win32":
            os.lseek(descriptor, 0, os.SEEK_SET)
    return True


# Outputs


_held: dict[tuple[str, int], int] = {}
"""Lock file and thread -> descriptor, of every claim of this process."""


def _forget_claims() -> None:
    """Forget the locks in a forked child, which would hold them if it outlives this process."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_claims)


@contextlib.contextmanager
def claimed(path: Path, size: int = 0, *, folder: bool = False) -> Iterator[None]:
    """Lock an output file or folder for this process during a `with` block. The thread that holds it may lock it again.

    The output is checked before it is locked: that it can be written, and that `size` bytes are free.

    Args:
        path: file to be written, in a folder that is there; or a folder of outputs, which is made.
        size: bytes that will be written.
        folder: what `path` is.

    Raises:
        OutputError: it cannot be written, there is no room, or another process holds it.
    """
    place = path if folder else path.parent
    lock = place / (".qrlora.lock" if folder else f".{path.name}.lock")
    key = (os.path.realpath(lock), threading.get_ident())
    with contextlib.ExitStack() as stack:
        if folder:
            stack.enter_context(_made(path))
        check_room(path, size, folder=folder)
        if key not in _held:
            stack.enter_context(_holding(lock, path, key))
            sweep(place, None if folder else path.name)
        yield


def check_room(path: Path, size: int, *, folder: bool = False) -> None:
    """Raise OutputError unless `path`, or a file in it if it is a folder, can be written with so many bytes."""
    if not folder and path.is_dir():
        raise disk_error(IsADirectoryError(errno.EISDIR, "it is a folder"), path)
    if not folder and not path.parent.is_dir():
        raise disk_error(FileNotFoundError(errno.ENOENT, f"no folder {path.parent}"), path)
    try:
        free = shutil.disk_usage(path if folder else path.parent).free
        if free < size:
            raise OutputError(
                said("no room for %(path)s", path=path),
                expected=said("%(size)s bytes", size=f"{size:,}"),
                got=said("%(free)s free", free=f"{free:,}"),
                remedy=REMEDIES[errno.ENOSPC],
            )
        trial, stream = _temporary(path / "trial" if folder else path)
        try:
            with stream:
                stream.write(b"\0")
                stream.flush()
                stream.truncate(max(size, 1))  # a limit on the size of a file speaks up here
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; at the end remove those that are still empty."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    make_folder(folder)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for one in missing:
                one.rmdir()


@contextlib.contextmanager
def _holding(lock: Path, output: Path, key: tuple[str, int]) -> Iterator[None]:
    """Create and lock the lock file, and write into it who holds it. It is removed at the end; after a kill, by the
    next run."""
    try:
        descriptor = _lock_file(lock, output)
    except OSError as error:
        raise disk_error(error, output) from error
    _held[key] = descriptor
    try:
        yield
    finally:
        if _held.pop(key, None) is not None:  # a forked child gave its parent's claims up
            with contextlib.suppress(OSError):  # the folder may be gone
                if os.name == "posix":
                    lock.unlink()  # while it is locked, so that it is this one
            os.close(descriptor)
            with contextlib.suppress(OSError):
                if os.name != "posix":
                    lock.unlink()


def _lock_file(lock: Path, output: Path) -> int:
    """Return the descriptor of the locked file; raise OutputError if another process holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if _locked(descriptor) is False:
                holder = os.read(descriptor, 200).decode(errors="replace") or "a process that has just begun"
                raise OutputError(
                    f"another run is writing {output}",
                    expected="one run for an output",
                    got=holder,
                    remedy="wait until it has ended, or name another output",
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it after it was opened here
