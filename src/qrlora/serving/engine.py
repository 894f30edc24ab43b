"""One copy of a base model with all adapters of a folder; in its batches every picture has its own composition."""

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

from qrlora.adapter import Adapter
from qrlora.composition import Live
from qrlora.errors import AdapterFileError, MismatchError, QrloraError
from qrlora.exchange import LayerNames, is_ours, left_out_of, load_any
from qrlora.families import EMBEDDED, load_pipeline, size_unit
from qrlora.generation import Request, generate_mixed
from qrlora.serving.names import RESERVED
from qrlora.serving.protocol import Event, Facts, Made, Picture, Refused, Settings, Step

log = logging.getLogger(__name__)


class Stopped(Exception):
    """Nobody waits for this batch any more."""


class Shelf:
    """The adapters of a folder, by the stem of their files; those that cannot be served are left out, with a reason.

    Safe to use from several threads.
    """

    def __init__(self, folder: Path, names: LayerNames):
        self.folder = folder
        self._names = names
        self.adapters: dict[str, Adapter] = {}
        self.left_out: dict[str, str] = {}
        self._stamps: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def scan(self) -> None:
        """Read what came or changed since the last time, and forget what went."""
        with self._lock:
            files = {path.stem: path for path in sorted(self.folder.glob("*.safetensors"))}
            for name in set(self._stamps) - set(files):
                self._forget(name)
            for name, path in files.items():
                try:
                    found = path.stat()
                    stamp = (found.st_mtime_ns, found.st_size)
                    if self._stamps.get(name) == stamp:
                        continue
                    self._forget(name)
                    self._stamps[name] = stamp
                    self.adapters[name] = _read(path, self._names)
                except (QrloraError, OSError) as error:
                    self.leave_out(name, error)

    def leave_out(self, name: str, error: Exception) -> None:
        """Serve this one no more, until its file changes."""
        self.adapters.pop(name, None)
        # Folders are the operator's business: requests see this text too.
        self.left_out[name] = str(error).replace(f"{self.folder}/", "")
        log.warning("adapter %s is not served: %s", name, error)

    def _forget(self, name: str) -> None:
        for known in (self._stamps, self.adapters, self.left_out):
            known.pop(name, None)


def _read(path: Path, names: LayerNames) -> Adapter:
    if set(path.stem) & set(RESERVED):
        raise AdapterFileError(
            f"{path.name}: a name that a request cannot spell",
            expected=f"none of {RESERVED}",
            got=path.stem,
            remedy="rename the file",
        )
    adapter = load_any(path, names=names)
    if not is_ours(path) and left_out_of(adapter):
        log.warning("%s: not read, because they are not the denoiser's: %s", path.name, ", ".join(left_out_of(adapter)))
    return adapter


class Engine:
    """Makes pictures one batch at a time, in a thread of its own.

    Args:
        model, dtype: as `load_pipeline` takes them.
        folder: of the adapters' .safetensors files. Those that do not stand on the basis of most are left out.
        threads: processor threads of a batch; torch's own choice if None.

    Raises:
        ModelError: as `load_pipeline`.
    """

    def __init__(self, model: str, folder: str | Path, dtype: str = "float32", threads: int | None = None):
        if threads:
            torch.set_num_threads(threads)
        self.model = model if model in EMBEDDED or not Path(model).is_dir() else Path(model).resolve().name
        self.pipe, self.family = load_pipeline(model, dtype=getattr(torch, dtype))
        denoiser = self.family.denoiser_of(self.pipe)
        self.shelf = Shelf(Path(folder), LayerNames(self.family, denoiser))
        self.shelf.scan()
        self._served = dict(self.shelf.adapters)
        try:
            self.live = Live(denoiser, self._served)
        except QrloraError:  # some of them: tried one by one, they say which
            self.live, self._served = Live(denoiser, {}), {}
        self._serve_scanned()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def close(self) -> None:
        """Ends when the running batch has; the adapters come off the pipeline."""
        self._thread.shutdown()
        self.live.__exit__(None, None, None)

    async def facts(self) -> Facts:
        """What is served, new files included, whatever is being made meanwhile."""
        await asyncio.get_running_loop().run_in_executor(None, self.shelf.scan)
        steps, guidance = self.family.sampling(self.pipe)
        adapters = {
            name: {key: getattr(adapter.metadata, key) for key in ("role", "trigger", "licence")}
            for name, adapter in self.shelf.adapters.items()
        }
        return Facts(
            model=self.model,
            side=self.family.resolution(self.pipe),
            unit=size_unit(self.pipe),
            largest_side=self.family.largest_side(self.pipe),
            steps=steps,
            guidance=guidance,
            adapters=adapters,
            left_out=dict(self.shelf.left_out),
        )

    async def run(self, settings: Settings, pictures: Sequence[Picture], progress: bool) -> AsyncIterator[Event]:
        """As `Engines.run`."""
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
        pictures: Sequence[Picture],
        progress: bool,
        tell: Callable[[Event], None],
        stop: threading.Event,
    ) -> None:
        """Runs in the engine's thread."""

        def on_step(done: int, of: int) -> None:
            if stop.is_set():
                raise Stopped
            if progress:
                tell(Step(done, of))

        if stop.is_set():
            return
        self.shelf.scan()
        self._serve_scanned()
        makable: list[int] = []
        for index, picture in enumerate(pictures):
            try:
                self._check(picture)
                makable.append(index)
            except QrloraError as error:
                tell(Refused(index, error))
        made = [pictures[i] for i in makable]
        requests = [Request(one.prompt, one.seed, one.composition, one.giving_way) for one in made]
        options: dict[str, Any] = {"steps": settings.steps, "guidance": settings.guidance, "resolution": settings.side}
        options |= {"batch_size": max(1, len(requests)), "on_step": on_step}
        try:
            images = generate_mixed(self.pipe, self.family, requests, self.live, **options)
        except Stopped:
            return
        except QrloraError as error:  # about what all have in common: the size
            images = []
            for index in makable:
                tell(Refused(index, error))
        for index, image in zip(makable, images, strict=False):
            stream = io.BytesIO()
            image.save(stream, "PNG")
            tell(Made(index, stream.getvalue()))

    def _check(self, picture: Picture) -> None:
        """One request's prompt and adapters, so that what is wrong with them is not the whole batch's fault."""
        self.family.prompt_options(self.pipe, [picture.prompt])
        for name in picture.composition:
            if name not in self._served:
                raise MismatchError(
                    f"adapter {name!r} is served no more",
                    got=self.shelf.left_out.get(name, "its file is gone"),
                    remedy="GET /v1/models lists those that are",
                )

    def _serve_scanned(self) -> None:
        """Put on the denoiser what the shelf has, and take off what it has no more."""
        wanted = dict(self.shelf.adapters)
        for name, adapter in list(self._served.items()):
            if wanted.get(name) is not adapter:
                self.live.remove(name)
                del self._served[name]
        for name in _most_common_basis_first(wanted):
            if name not in self._served:
                try:
                    self.live.add(name, wanted[name])
                    self._served[name] = wanted[name]
                except QrloraError as error:
                    self.shelf.leave_out(name, error)


def _most_common_basis_first(adapters: dict[str, Adapter]) -> list[str]:
    """The names, those first whose basis most stand on: the first to be served decides about the others."""

    def basis(adapter: Adapter) -> tuple[Any, ...]:
        meta = adapter.metadata
        return meta.on_basis, meta.basis_rank, meta.algorithm, meta.basis_seed, adapter.basis_version

    times = Counter(basis(adapter) for adapter in adapters.values())
    return sorted(adapters, key=lambda name: (-times[basis(adapters[name])], name))
