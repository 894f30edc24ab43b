"""Print a command's errors without a traceback, and treat Ctrl-C, SIGTERM and SIGHUP alike."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from qrlora._files import disk_error
from qrlora.errors import QrloraError

Handler = Callable[[int, FrameType | None], None]

_received: list[int] = []


def ended(name: str, work: Callable[[], int]) -> int:
    """Return the exit code of a command: what `work` returns, 2 after an error, which is printed, or 128 and the
    signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    try:
        with _raised():
            return work()
    except QrloraError as error:
        say_error(f"{name}: {error}")
        return 2
    except OSError as error:  # a full disk, a missing right: about the file, so the user's to mend
        say_error(f"{name}: {disk_error(error)}")
        return 2
    except KeyboardInterrupt as interrupt:
        say(f"\n{name}: {str(interrupt) or 'interrupted'}")
        if getattr(interrupt, "checkpoint", None):
            say("continue with the same command and --resume")
        return 128 + (_received[0] if _received else signal.SIGINT)


def say(text: str) -> None:
    """Print to stderr, if there is one: SIGHUP says that the terminal is gone."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def say_error(text: str) -> None:
    """Print an error like `say`, on a terminal with the first line, which says what is wrong, in red."""
    if not sys.stderr.isatty():
        say(text)
        return
    from rich.console import Console
    from rich.text import Text

    first, line_end, rest = text.partition("\n")
    with contextlib.suppress(OSError):
        Console(stderr=True, highlight=False).print(Text.assemble((first, "bold red"), line_end, rest), soft_wrap=True)


@contextlib.contextmanager
def _raised() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does without this; what follows them finds a process
    that ends already."""

    def handle(number: int, frame: FrameType | None) -> None:
        _received.append(number)
        if len(_received) == 1:
            raise KeyboardInterrupt

    _received.clear()
    with _handling(handle, _others()):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Only note Ctrl-C, SIGTERM and SIGHUP, so that the work inside completes; yield a function that reports them.

    A second Ctrl-C does not wait. The others come in pairs (a terminal that closes, then its shell), and do.
    """
    pressed = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and pressed.is_set():
            raise KeyboardInterrupt
        _received.append(number)
        pressed.set()

    with _handling(handle, [signal.SIGINT, *_others()]):
        yield pressed.is_set


def _others() -> list[signal.Signals]:
    """Return the signals that are not ignored; nohup ignores SIGHUP on purpose."""
    there = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    return [one for one in there if signal.getsignal(one) is not signal.SIG_IGN]


@contextlib.contextmanager
def _handling(handle: Handler, numbers: list[signal.Signals]) -> Iterator[None]:
    """Handle signals in the main thread, the only one that gets them; elsewhere do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
