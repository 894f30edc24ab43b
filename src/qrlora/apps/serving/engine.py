"""Run one copy of a base model with all adapters of a folder, in batches with a composition for each picture."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from qrlora._reading import visible
from qrlora._said import said
from qrlora.apps.serving.names import check_spelling
from qrlora.apps.serving.protocol import Event, Facts, Made, Refused, Settings, Step
from qrlora.errors import AdapterFileError, MismatchError, PictureError, QrloraError, printable
from qrlora.method.adapter import Adapter
from qrlora.method.composition import Live
from qrlora.models.exchange import LayerNames, is_ours, left_out_of, load_any
from qrlora.models.families import EMBEDDED, load_pipeline, size_unit
from qrlora.models.generation import generate_mixed, not_finite
from qrlora.models.request import Request
from qrlora.operations.provenance.canonical import file_digest

log = logging.getLogger(__name__)


REASON_CHARACTERS = 2000
"""Most of the text that says why a file is left out: errors quote what a damaged file holds."""


class Stopped(Exception):
    """Raised in a batch that nobody waits for any more."""


class Shelf:
    """The adapters of a folder, by the stem of their files; those that cannot be read are left out, with a reason.

    Safe to use from several threads.
    """

    def __init__(self, folder: Path, names: LayerNames):
        self.folder = folder
        self._names = names
        self.adapters: dict[str, Adapter] = {}
        self.left_out: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        self._stamps: dict[str, tuple[int, int] | None] = {}
        self._lock = threading.Lock()

    def scan(self) -> None:
        """Read files that are new or changed since the last time, and forget those that are gone."""
        with self._lock:
            files = {printable(path.stem): path for path in visible(self.folder) if path.suffix == ".safetensors"}
            for name in set(self._stamps) - set(files):
                self._forget(name)
            for name, path in files.items():
                stamp = _stamp(path)
                if name in self._stamps and self._stamps[name] == stamp:
                    continue
                self._forget(name)
                self._stamps[name] = stamp
                try:
                    digest = file_digest(path) if path.is_file() else ""  # a pipe is refused by its reader
                    adapter = _read(path, self._names)
                    if file_digest(path) != digest:
                        raise AdapterFileError(f"{path.name} changed while it was read", remedy="it is read again")
                    self.adapters[name], self.digests[name] = adapter, digest
                except Exception as error:  # whatever one file makes a reader raise: the others are served
                    self.left_out[name] = self.reason(name, error)

    def snapshot(self) -> tuple[dict[str, Adapter], dict[str, str]]:
        """Return the adapters, and the digests of the files that they were read from."""
        with self._lock:
            return dict(self.adapters), dict(self.digests)

    def reason(self, name: str, error: Exception) -> str:
        """Return the reason why an adapter is not served, for responses and for the log."""
        known = isinstance(error, (QrloraError, OSError))
        said = printable(str(error))
        if len(said) > REASON_CHARACTERS:  # the remedy stands last
            said = f"{said[: REASON_CHARACTERS // 2]} ... {said[-REASON_CHARACTERS // 2 :]}"
        log.warning("adapter %s is not served: %s", name, said, exc_info=not known)
        # Folders are the operator's business: requests see this text too.
        said = said.replace(f"{printable(str(self.folder))}/", "")
        return said if known else f"its file cannot be read ({type(error).__name__})"

    def _forget(self, name: str) -> None:
        for known in (self._stamps, self.adapters, self.digests, self.left_out):
            known.pop(name, None)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return a value that changes when the file does; None while the file cannot be read."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _read(path: Path, names: LayerNames) -> Adapter:
    check_spelling(path.stem)
    adapter = load_any(path, names=names)
    if not is_ours(path) and left_out_of(adapter):
        log.warning("%s: not read, because they are not the denoiser's: %s", path.name, ", ".join(left_out_of(adapter)))
    return adapter


class Engine:
    """One base model that makes pictures one batch at a time, in a thread of its own.

    Args:
        model, dtype: as `load_pipeline` takes them.
        folder: of the adapters' .safetensors files. Adapters on another basis than the majority are left out.
        threads: processor threads of a batch; torch's own choice if None.

    Raises:
        ModelError: as `load_pipeline`.
    """

    def __init__(self, model: str, folder: str | Path, dtype: str = "float32", threads: int | None = None):
        if threads:
            torch.set_num_threads(threads)
        self.model = model if model in EMBEDDED or not Path(model).is_dir() else printable(Path(model).resolve().name)
        self.pipe, self.family = load_pipeline(model, dtype=getattr(torch, dtype))
        denoiser = self.family.denoiser_of(self.pipe)
        self.shelf = Shelf(Path(folder), LayerNames(self.family, denoiser))
        self.shelf.scan()
        self._served, self._digests = self.shelf.snapshot()
        self._refused: dict[str, tuple[Adapter, str]] = {}
        try:
            self.live = Live(denoiser, self._served)
        except Exception:  # some of them: tried one by one, they say which
            self.live, self._served = Live(denoiser, {}), {}
        self._serve_scanned()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def close(self) -> None:
        """End once the running batch has, and take the adapters off the pipeline."""
        self._thread.shutdown()
        self.live.__exit__(None, None, None)

    async def facts(self) -> Facts:
        """Return the served adapters, new files included, while a batch may be running."""
        await asyncio.get_running_loop().run_in_executor(None, self.shelf.scan)
        steps, guidance = self.family.sampling(self.pipe)
        (read, digests), left_out = self.shelf.snapshot(), self._left_out()
        adapters = {
            name: {key: _told(getattr(adapter.metadata, key)) for key in ("role", "trigger", "licence")}
            for name, adapter in read.items()
            if name not in left_out
        }
        return Facts(
            model=self.model,
            side=self.family.resolution(self.pipe),
            unit=size_unit(self.pipe),
            largest_side=self.family.largest_side(self.pipe),
            steps=steps,
            guidance=guidance,
            adapters=adapters,
            left_out=left_out,
            digests={name: digests[name] for name in adapters},
        )

    async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
        """Make a batch, as `Engines.run` says."""
        loop, stop = asyncio.get_running_loop(), threading.Event()
        events: asyncio.Queue[Event | None] = asyncio.Queue()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        def ended(work: asyncio.Future[None]) -> None:
            events.put_nowait(None)
            if not work.cancelled():
                work.exception()  # seen here, so that it is not called lost where nobody waits for it

        work = loop.run_in_executor(self._thread, self._make, settings, pictures, progress, tell, stop)
        work.add_done_callback(ended)
        try:
            while (event := await events.get()) is not None:
                yield event
            await work
        finally:
            stop.set()

    def _make(
        self,
        settings: Settings,
        pictures: Sequence[Request],
        progress: bool,
        tell: Callable[[Event], None],
        stop: threading.Event,
    ) -> None:
        """Make a batch, in the engine's thread."""

        def on_step(done: int, of: int) -> None:
            if stop.is_set():
                raise Stopped
            if progress:
                tell(Step(done, of))

        if stop.is_set():
            return
        self.shelf.scan()
        self._serve_scanned()
        makable = self._makable(pictures, tell)
        requests = [pictures[i] for i in makable]
        options: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance, "resolution": settings.side}
        options |= {"batch_size": max(1, len(requests)), "on_step": on_step}
        try:
            images: list[Any] = generate_mixed(self.pipe, self.family, requests, self.live, **options)
        except Stopped:
            return
        except PictureError as error:
            images = error.images
        except QrloraError as error:  # about what all have in common: the size
            images = []
            for index in makable:
                tell(Refused(index, error))
        for index, image in zip(makable, images, strict=False):
            if image is None:  # said without the other requests' prompts
                tell(Refused(index, not_finite([(pictures[index].prompt, pictures[index].seed)])))
                continue
            stream = io.BytesIO()
            image.save(stream, "PNG")
            tell(Made(index, stream.getvalue()))

    def _makable(self, pictures: Sequence[Request], tell: Callable[[Event], None]) -> list[int]:
        """Return the indices of the pictures whose prompt and adapters are in order; send a refusal for the others."""
        makable: list[int] = []
        for index, picture in enumerate(pictures):
            try:
                self._check(picture)
                makable.append(index)
            except QrloraError as error:
                tell(Refused(index, error))
        return makable

    def _check(self, picture: Request) -> None:
        """Check one request's prompt and adapters, so that its fault does not fail the whole batch."""
        self.family.prompt_options(self.pipe, [picture.prompt])
        for name in picture.composition:
            if name not in self._served:
                raise MismatchError(
                    said("adapter %(name)s is no longer served", name=repr(name)),
                    got=self._left_out().get(name, said("its file is gone")),
                    remedy="GET /v1/models lists those that are",
                )
            if picture.digests is not None and picture.digests.get(name) != self._digests[name]:
                raise MismatchError(
                    said("the file of adapter %(name)s was replaced after its use was permitted", name=repr(name)),
                    remedy="ask again",
                )
        self.live.check(picture.composition)

    def _left_out(self) -> dict[str, str]:
        """Return the files that are not served, and why: unreadable, or read and refused, and not changed since."""
        read, refused = dict(self.shelf.adapters), dict(self._refused)
        there = {name: reason for name, (adapter, reason) in refused.items() if read.get(name) is adapter}
        return {**self.shelf.left_out, **there}

    def _serve_scanned(self) -> None:
        """Put new adapters of the shelf on the denoiser, and take off those that are gone."""
        wanted, self._digests = self.shelf.snapshot()
        for name, adapter in list(self._served.items()):
            if wanted.get(name) is not adapter:
                self.live.remove(name)
                del self._served[name]
                self._refused.clear()  # those of another basis than this one's may be served now
        for name in _most_common_basis_first(wanted):
            refused = self._refused.get(name, (None, ""))[0]
            if name in self._served or refused is wanted[name]:
                continue
            try:
                self.live.add(name, wanted[name])
                self._served[name] = wanted[name]
            except Exception as error:
                self._refused[name] = wanted[name], self.shelf.reason(name, error)


def _told(value: str | None) -> str | None:
    return None if value is None else printable(value)


def _most_common_basis_first(adapters: dict[str, Adapter]) -> list[str]:
    """Sort the names by how many adapters share their basis, because the first to be served decides the basis."""

    def basis(adapter: Adapter) -> tuple[Any, ...]:
        meta = adapter.metadata
        return meta.on_basis, meta.basis_rank, meta.algorithm, meta.basis_seed, adapter.basis_version

    times = Counter(basis(adapter) for adapter in adapters.values())
    return sorted(adapters, key=lambda name: (-times[basis(adapters[name])], name))
