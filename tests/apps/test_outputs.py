"""Work already paid for: whose an output is, when a disk that fails is found out, and where the result goes then."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qrlora import _files as files
from qrlora._files import check_room, claimed, sweep, write_all, write_atomically
from qrlora.apps.cli import main
from qrlora.errors import OutputError

HOLD = """
import sys, time
from pathlib import Path
from qrlora._files import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""

WRITE = """
import sys, time
from pathlib import Path
from qrlora._files import write_atomically
def content(stream):
    stream.write(b"half")
    stream.flush()
    print("writing", flush=True)
    time.sleep(60)
write_atomically(Path(sys.argv[1]), content)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, where what cannot be written goes; and a folder for the test's outputs, which it is in."""
    monkeypatch.setenv("QRLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    return tmp_path / "cache"


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a script, and returns once it has printed its first line; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str, *arguments: str) -> subprocess.Popen[str]:
        source = {"PYTHONPATH": str(Path(files.__file__).parents[1])}
        command = [sys.executable, "-c", script, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **source})
        started.append(process)
        assert process.stdout and process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def failing(monkeypatch: pytest.MonkeyPatch, number: int, below: Path) -> None:
    """Let every sync below a folder fail."""
    sync = os.fsync

    def fail(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(below):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


# One run an output


def test_an_output_is_one_process_at_a_time_and_free_again_when_that_is_killed(
    child: Callable[..., subprocess.Popen[str]],
) -> None:
    holder = child(HOLD, "mug.safetensors")
    with (
        pytest.raises(OutputError, match=r"another run is writing mug\.safetensors") as error,
        claimed(Path("mug.safetensors")),
    ):
        pass
    assert f"process {holder.pid} on {socket.gethostname()}" in str(error.value) and "remedy" in str(error.value)
    with claimed(Path("chalk.safetensors")):  # another output in the same folder is free
        pass
    holder.kill()
    holder.wait()
    with claimed(Path("mug.safetensors")):
        pass
    assert not list(Path().iterdir())


def test_threads_exclude_one_another_and_a_claim_within_a_claim_is_free() -> None:
    refused = []

    def other() -> None:
        with pytest.raises(OutputError, match="another run"), claimed(Path("a.safetensors")):
            pass
        refused.append(True)

    with claimed(Path("a.safetensors")), claimed(Path("../out/a.safetensors")):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert refused and not list(Path().iterdir())


def test_a_forked_child_does_not_hold_what_its_parent_claimed(child: Callable[..., subprocess.Popen[str]]) -> None:
    script = HOLD.replace(
        "    time.sleep", "    import os\n    os.write(1, b'%d\\n' % os.fork())\n    time.sleep"
    )  # one write a line: two processes write to one pipe
    parent = child(script, "a.safetensors")
    assert parent.stdout
    orphan = max(int(parent.stdout.readline()) for _ in range(2))  # the child's own 0 says that it runs
    parent.kill()
    parent.wait()
    try:
        with claimed(Path("a.safetensors")):
            os.kill(orphan, 0)
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_an_empty_folder_made_for_nothing_goes_again() -> None:
    with claimed(Path("new/folder"), folder=True):
        assert Path("new/folder").is_dir()
    assert not Path("new").exists()
    with claimed(Path("new/folder"), folder=True):
        Path("new/folder/a").touch()
    assert [path.name for path in Path("new/folder").iterdir()] == ["a"]


# Temporaries


def test_the_next_write_removes_what_a_killed_one_left_and_not_what_a_living_one_writes(
    child: Callable[..., subprocess.Popen[str]],
) -> None:
    dead, alive = child(WRITE, "a.png"), child(WRITE, "a.png")
    other = child(WRITE, "b.png")
    dead.kill()
    other.kill()
    dead.wait()
    other.wait()
    assert len(list(Path().glob(".*.tmp"))) == 3
    write_atomically(Path("a.png"), b"whole")
    left = sorted(path.name.split(".")[1] for path in Path().glob(".*.tmp"))
    assert left == ["a", "b"]  # the living one's, and the one of an output that is not this one
    assert alive.poll() is None and Path("a.png").read_bytes() == b"whole"
    Path(".a.png.0123456789abcdef.tmp.mine").touch()
    sweep(Path())
    assert sorted(path.name.split(".")[1] for path in Path().glob(".*")) == ["a", "a"]


# Tried before


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none/a.safetensors", "create the folder"),
        ("a" * 240 + ".safetensors", "shorter name"),
        ("folder", "name a file"),
        ("file/a.safetensors", "folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused_at_once(path: str, said: str) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    with pytest.raises(OutputError, match=said) as error, claimed(Path(path)):
        pass
    assert path in str(error.value)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_folder_that_takes_no_file_is_refused_at_once(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *rest: object) -> object:
        if "x" in mode:
            raise OSError(number, os.strerror(number))
        return opened(path, mode)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OutputError, match=os.strerror(number)) as error, claimed(Path("a.safetensors")):
        pass
    assert "a.safetensors" in str(error.value) and error.value.remedy


def test_a_disk_without_room_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    check_room(Path("a"), usage.free // 2)
    with pytest.raises(OutputError, match=r"(?s)no room for a.*1,000.*free space"):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        check_room(Path("a"), 1001)


def test_a_limit_on_the_size_of_files_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        check_room(Path("a"), 10_000)
        with pytest.raises(OutputError, match="ulimit -f"):
            check_room(Path("a"), 10_001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(Path().iterdir())


NEEDS_NO_TORCH = """
import json, sys
from qrlora.apps.cli import main
for command in json.loads(sys.argv[1]):
    code = main(command)
    print(json.dumps([code, "torch" in sys.modules]), file=sys.stderr)
"""


def test_every_command_refuses_an_output_before_torch_is_loaded(child: Callable[..., subprocess.Popen[str]]) -> None:
    Path("a.png").touch()
    Path("a.safetensors").touch()
    Path("held").mkdir()
    locks = [os.open(name, os.O_CREAT | os.O_RDWR) for name in ("held/.qrlora.lock", ".b.safetensors.lock")]
    for lock in locks:
        fcntl.flock(lock, fcntl.LOCK_EX)
    one, commands = "a.safetensors", []
    for output in ("none/b.safetensors", "b.safetensors"):
        commands += [
            ["compose", one, one, "-o", output],
            ["export", one, "-o", output],
            ["import", one, "-o", output],
            ["extract", "pico", "--base", "pico", "--rank", "2", "-o", output],
        ]
    commands += [
        ["train", "--subject", "a.png", "-o", "b.safetensors"],
        ["train", "--subject", "a.png", "-o", "a.png/b.safetensors"],
        ["similarity", one, one, "--plot", "a.png/b.png"],
    ]
    for output in ("held", "a.png/x"):
        commands += [
            ["generate", "--prompt", "a mug", "-o", output],
            ["evaluate", "a.png", "-o", output],
            ["study", "held", "held", "-o", output],
            ["study", "--tally", "a.json", "-o", output],
            ["tune", one, one, "--subject", "mug", "--style", "chalk", "-o", output],
            ["demo", "--out", output],
        ]
    source = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    script = [sys.executable, "-c", NEEDS_NO_TORCH, json.dumps(commands)]
    said = subprocess.run(script, capture_output=True, text=True, env=source).stderr
    refusals = said.split("[2, false]\n")
    assert len(refusals) == len(commands) + 1 and refusals[-1] == "", said
    for command, text in zip(commands, refusals, strict=False):
        assert text.startswith(f"qrlora {command[0]}: ") and "remedy:" in text, text
    for lock in locks:
        os.close(lock)


# If it fails all the same


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.ENOTDIR]
)
def test_what_cannot_be_written_is_saved_elsewhere_and_the_message_says_where(
    number: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, number, Path.cwd())
    with pytest.raises(OutputError, match=r"cannot write a\.safetensors") as error:
        write_atomically(Path("a.safetensors"), b"an hour's work")
    saved = error.value.saved
    assert saved and saved.is_relative_to(cache) and saved.name == "a.safetensors" and str(saved) in str(error.value)
    assert saved.read_bytes() == b"an hour's work" and os.strerror(number) in str(error.value) and error.value.remedy
    assert not list(Path().iterdir())


def test_without_a_cache_it_is_saved_in_the_temporary_folder_and_without_that_the_error_says_no_place(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    cache.touch()  # no folder, so none can be made in it
    failing(monkeypatch, errno.ENOSPC, Path.cwd())
    with pytest.raises(OutputError) as error:
        write_atomically(Path("a.safetensors"), b"work")
    assert error.value.saved and error.value.saved.is_relative_to(tmp_path / "temporary")
    assert error.value.saved.read_bytes() == b"work"
    failing(monkeypatch, errno.ENOSPC, tmp_path)
    shutil.rmtree(tmp_path / "temporary")
    with pytest.raises(OutputError, match=r"cannot write a\.safetensors") as error:
        write_atomically(Path("a.safetensors"), b"work")
    assert error.value.saved is None and "saved" not in str(error.value)


def test_of_many_files_those_after_the_failure_are_saved_too(monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = itertools.count(), os.fsync

    def fail(descriptor: int) -> None:
        if next(synced) == 2:  # a write syncs the file and the folder
            raise OSError(errno.ENOSPC, "full")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError) as error:
        write_all({Path(f"{name}.png"): name.encode() for name in "abc"})
    assert error.value.saved and [path.name for path in Path().iterdir()] == ["a.png"]
    assert sorted(path.name for path in error.value.saved.parent.iterdir()) == ["b.png", "c.png"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has /dev/full")
def test_a_full_disk_under_the_standard_output_is_said() -> None:
    script = (
        "import sys\nfrom qrlora.apps import cli\nfrom qrlora.apps.cli.inspect import run_inspect\n"
        "run_inspect.callback = lambda **_: print('numbers')\n"
        "sys.exit(cli.main(['inspect', 'a.safetensors']))"
    )
    source = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1]), "PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=source)
    assert done.returncode == 2 and "cannot write the standard output" in done.stderr and "remedy" in done.stderr


def test_any_disk_error_of_a_command_names_file_and_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/a.bin")

    monkeypatch.setattr("qrlora.apps.cli.inspect.run_inspect.callback", fail)
    assert main(["inspect", "a.safetensors"]) == 2
    said = capsys.readouterr().err
    assert "/somewhere/a.bin" in said and "remedy:" in said


WINDOWS = """
import contextlib, errno, fcntl, os, shutil, signal, socket, sys, tempfile, threading, types
from pathlib import Path

def locking(descriptor, mode, count):  # as documented: refused with EACCES, at the place of the descriptor
    assert mode == 3 and os.lseek(descriptor, 0, os.SEEK_CUR) == 1 << 30
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise PermissionError(errno.EACCES, "locked") from None

sys.modules["msvcrt"], sys.modules["fcntl"] = types.SimpleNamespace(locking=locking, LK_NBLCK=3), None
del signal.SIGHUP
del os.register_at_fork
sys.platform = "win32"
from qrlora.errors import OutputError
from qrlora._files import claimed, write_atomically
from qrlora._interrupts import deferred, ended

with claimed(Path("a.png")), deferred() as told:
    write_atomically(Path("a.png"), b"whole")
    signal.raise_signal(signal.SIGTERM)
    assert told()
with open(".b.png.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert ended("test", lambda: claimed(Path("b.png")).__enter__()) == 2
"""


def test_where_there_is_no_flock_and_no_sighup() -> None:
    source = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", WINDOWS], capture_output=True, text=True, env=source)
    assert done.returncode == 0, done.stderr
    assert "another run is writing b.png" in done.stderr and Path("a.png").read_bytes() == b"whole"
