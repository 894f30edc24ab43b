"""Define a worker: one copy of the base model that trains adapters, samples pictures and scores them.

It raises what the whole catalog has to stop for: files that cannot be written, a base model that cannot be loaded. All
else that goes wrong belongs to one picture or one adapter, and comes back as its outcome.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import torch
from cachetools import LRUCache
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qrlora._files import make_folder, write_atomically
from qrlora.errors import OutputError, PictureError, QrloraError
from qrlora.method.adapter import Adapter
from qrlora.method.composition import Live, project_out
from qrlora.method.composition.parts import on_one_basis
from qrlora.models.exchange import LayerNames, load_any
from qrlora.models.families import load_pipeline
from qrlora.models.generation import Request, generate_jobs, generate_mixed
from qrlora.models.training.loop import train
from qrlora.models.training.pictures import open_picture
from qrlora.operations.catalog.journal import Outcome
from qrlora.operations.catalog.plan import Picture, Settings, Trained, Training, record_of
from qrlora.operations.provenance.canonical import digest_of
from qrlora.quality.images.read import MeasuredPicture, load_picture
from qrlora.quality.metrics.table import METRICS, References, compute_metrics, select_metrics

ADAPTERS = 64
"""Adapters that a worker keeps in memory: all styles, and the products of a few batches."""
RECORD = "qrlora"
"""Keyword of the text in a PNG that says how it was made."""

Sampled = Image.Image | Exception
Made = TypeVar("Made")


class Worker:
    """Trains, samples and scores; one thing at a time."""

    def __init__(self, settings: Settings, name: str = "here") -> None:
        self.settings, self.name = settings, name
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self.pipe, self.family = load_pipeline(settings.model, dtype=getattr(torch, settings.dtype))
        self.denoiser = self.family.denoiser_of(self.pipe)
        self.adapters: LRUCache[str, Adapter] = LRUCache(ADAPTERS)
        self.references: LRUCache[str, MeasuredPicture] = LRUCache(ADAPTERS)
        self.live: Live | None = None
        self.on_live: OrderedDict[str, None] = OrderedDict()

    # Adapters

    def train(self, training: Training) -> Trained:
        """Train one adapter and write its file, unless it is there."""
        started, output = time.perf_counter(), training.recipe.output
        assert output is not None
        self._close_live()
        try:
            if not output.is_file():
                make_folder(output.parent)
                train(training.recipe, pipe=self.pipe, family=self.family, restart=True)
        except OutputError:
            raise
        except Exception as error:
            return Trained(training.name, said(error), time.perf_counter() - started)
        return Trained(training.name, "", time.perf_counter() - started)

    def _adapter(self, path: str) -> Adapter:
        names = LayerNames(self.family, self.denoiser)
        return _kept(self.adapters, path, lambda: load_any(Path(path), names=names))

    # Pictures

    def render(self, pictures: Sequence[Picture]) -> list[Outcome]:
        """Make, write and score these pictures; a whole file that is there already is scored as it is."""
        there = [picture for picture in pictures if self._is_there(picture)]
        missing = [picture for picture in pictures if picture not in there]
        started = time.perf_counter()
        images = self._sample(missing) if missing else []
        seconds = (time.perf_counter() - started) / max(1, len(missing))
        outcomes = {picture.key: Outcome(picture.key, made=False) for picture in there}
        for picture, image in zip(missing, images, strict=True):
            if isinstance(image, Exception):
                final = isinstance(image, PictureError) or (isinstance(image, QrloraError) and len(pictures) == 1)
                outcomes[picture.key] = Outcome(picture.key, said(image), final, seconds=seconds, worker=self.name)
                continue
            path = self.settings.folder / picture.file
            make_folder(path.parent)
            write_atomically(path, self._file_of(picture, image), rescue=False)
            outcomes[picture.key] = Outcome(picture.key, seconds=seconds)
        return [self._finished(picture, outcomes[picture.key]) for picture in pictures]

    def _file_of(self, picture: Picture, image: Image.Image) -> bytes:
        """Return a PNG with a record of how it was made."""
        info = PngInfo()
        info.add_itxt(RECORD, json.dumps(record_of(picture, self.settings), ensure_ascii=False))
        stream = BytesIO()
        image.save(stream, "PNG", pnginfo=info)
        return stream.getvalue()

    def _is_there(self, picture: Picture) -> bool:
        """Return True if a whole file with this key is there, left by a process that was killed before it wrote the
        row."""
        path = self.settings.folder / picture.file
        if not path.is_file():
            return False
        try:
            return bool(json.loads(open_picture(path).record or "{}").get("key") == picture.key)
        except ValueError:  # not whole after all: made anew
            return False

    def _finished(self, picture: Picture, outcome: Outcome) -> Outcome:
        """Return the outcome with the file's digest and its scores."""
        if outcome.error:
            return outcome
        content = (self.settings.folder / picture.file).read_bytes()
        started = time.perf_counter()
        try:
            scores, passes, reasons = self._scores(picture)
        except Exception as error:
            return replace(outcome, error=f"it could not be scored: {said(error)}", worker=self.name)
        return replace(
            outcome,
            digest=digest_of(content),
            size=len(content),
            scoring=time.perf_counter() - started,
            worker=self.name,
            scores=scores,
            passes=passes,
            reasons=reasons,
        )

    def _sample(self, pictures: Sequence[Picture]) -> list[Sampled]:
        """Sample the pictures in one batch; return the error in place of those that failed."""
        try:
            return list(self._batch(pictures))
        except PictureError as error:
            return [error if image is None else image for image in error.images or [None] * len(pictures)]
        except Exception as error:
            self._close_live()
            return [error] * len(pictures)

    def _batch(self, pictures: Sequence[Picture]) -> Sequence[Image.Image]:
        paths = dict.fromkeys(path for picture in pictures for path, _ in picture.parts)
        adapters = {path: self._adapter(path) for path in paths}
        if on_one_basis(list(adapters.values())):
            live = self._live_with(adapters)
            requests = [Request(one.prompt, one.seed, dict(one.parts), one.null_space) for one in pictures]
            options = {**self.settings.sampling, "batch_size": len(pictures)}
            return generate_mixed(self.pipe, self.family, requests, live, **options)
        self._close_live()  # adapters of several bases are attached side by side, a picture at a time
        images: list[Image.Image] = []
        for one in pictures:
            parts = project_out([(adapters[path], weight) for path, weight in one.parts], one.null_space)
            job = [(one.prompt, one.seed)]
            images += generate_jobs(self.pipe, self.family, job, adapters=parts, **self.settings.sampling)
        return images

    def _live_with(self, adapters: Mapping[str, Adapter]) -> Live:
        """Return live compositions of these adapters, and of earlier batches' as far as they are kept."""
        if self.live and not on_one_basis([self.adapters[next(iter(self.on_live))], *adapters.values()]):
            self._close_live()
        if self.live is None:
            self.live = Live(self.denoiser, adapters)
            self.on_live = OrderedDict.fromkeys(adapters)
        for path, adapter in adapters.items():
            if path not in self.on_live:
                self.live.add(path, adapter)
            self.on_live[path] = None
            self.on_live.move_to_end(path)
        while len(self.on_live) > max(ADAPTERS, len(adapters)):
            path, _ = self.on_live.popitem(last=False)
            self.live.remove(path)
        return self.live

    def _close_live(self) -> None:
        if self.live:
            self.live.__exit__(None, None, None)
        self.live = None
        self.on_live.clear()

    # Scores

    def _scores(self, picture: Picture) -> tuple[dict[str, float | None], bool | None, tuple[str, ...]]:
        """Return metrics by name, and the brand sheet's verdict with its reasons."""
        sheet = self.settings.sheet
        shown = replace(load_picture(self.settings.folder / picture.file), prompt=picture.prompt)
        given = {role: [self._reference(path)] for role, path in picture.references.items()}
        palette = list(sheet.palette.colours) if sheet and sheet.palette else []
        references = References(palette=palette, **given)
        wanted = self.settings.metrics
        names = [name for name in METRICS if _computable(name, wanted, shown, references)]
        names += [name for name in (sheet.scores if sheet else ()) if name not in names]
        metrics = select_metrics(names, [shown], references) if names else []
        scores = compute_metrics([shown], references, metrics)[0] if metrics else {}
        if sheet is None:
            return scores, None, ()
        verdict = sheet.check(shown, scores)
        return scores, verdict.passes, verdict.reasons

    def _reference(self, path: str) -> MeasuredPicture:
        return _kept(self.references, path, lambda: load_picture(Path(path)))


def _computable(name: str, wanted: Sequence[str] | None, picture: MeasuredPicture, references: References) -> bool:
    """Return True if a metric is asked for (by default those without a network) and has its inputs for this picture."""
    metric = METRICS[name]
    if name not in wanted if wanted is not None else bool(metric.network):
        return False
    there = {"mask": picture.mask is not None, "prompt": bool(picture.prompt)}
    return all(there[need] if need in there else bool(getattr(references, need)) for need in metric.needs)


def _kept(cache: LRUCache[str, Made], name: str, make: Callable[[], Made]) -> Made:
    """Return the entry of that name, made if it is missing; drop the least recently used ones."""
    if name not in cache:
        cache[name] = make()
    return cache[name]


def said(error: Exception) -> str:
    """Describe an error as one line of a table."""
    if isinstance(error, QrloraError):
        return error.what + (f" ({error.got})" if error.got is not None else "")
    return f"{type(error).__name__}: {error}"
