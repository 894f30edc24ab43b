"""Samples for the weight search: what each weight scales, a cache of the pictures, and their scores.

A weight scales a whole adapter, or one of its parts: the layers of some consecutive blocks, which are an adapter on the
same basis by themselves.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qrlora._files import make_folder, write_all
from qrlora.errors import DataError, MismatchError
from qrlora.method.adapter import Adapter
from qrlora.method.basis import fingerprint
from qrlora.models.generation import Sample, Sampler
from qrlora.models.training.pictures import open_picture
from qrlora.quality.images.png import png_bytes
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.metrics.table import Metric, References, compute_metrics
from qrlora.quality.search.search import Scores, Weights

Objective = Callable[[Sequence[MeasuredPicture]], list[float]]
"""A score for each picture; higher is better."""


def split_by_blocks(adapter: Adapter, count: int, order: Sequence[str]) -> list[Adapter]:
    """Split an adapter into `count` adapters of consecutive blocks; their sum is the adapter.

    Args:
        order: names of the model's modules in model order; a block is a layer's name up to its first number.

    Raises:
        MismatchError: the adapter has fewer blocks, or is not on a basis.
    """
    if not adapter.metadata.on_basis:
        remedy = "tune its whole weight, or import it onto a basis: qrlora import FILE --like ADAPTER"
        raise MismatchError(f"{adapter.name} is not on a basis, so its blocks cannot be composed", remedy=remedy)
    adapter.check_version()
    place = {name: i for i, name in enumerate(order)}
    layers = sorted(adapter.deltas, key=lambda name: place.get(name, len(place)))
    blocks: dict[str, list[str]] = {}
    for name in layers:
        start = re.match(r"\D*\d+", name)
        blocks.setdefault(start[0] if start else name, []).append(name)
    if count > len(blocks):
        expected = f"at most {len(blocks)} parts, its number of blocks"
        raise MismatchError(f"{adapter.name} cannot be split by blocks", expected=expected, got=count)
    parts = np.array_split(np.arange(len(blocks)), count)
    listed = list(blocks.values())
    return [_only(adapter, [name for block in part for name in listed[block]]) for part in parts]


def _only(adapter: Adapter, layers: Sequence[str]) -> Adapter:
    """The adapter restricted to these layers."""
    meta = adapter.metadata
    digests = {name: adapter.digests[name] for name in layers}
    version = adapter.basis_version
    mark = fingerprint(digests, meta.basis_rank, meta.algorithm, meta.basis_seed, version)
    return dataclasses.replace(
        adapter,
        metadata=dataclasses.replace(meta, basis_fingerprint=mark),
        deltas={name: adapter.deltas[name] for name in layers},
        shapes={name: adapter.shapes[name] for name in layers},
        digests=digests,
        sketches={name: sketch for name, sketch in adapter.sketches.items() if name in digests},
    )


class PictureCache:
    """Samples cached as files by a digest of all that determines them, so an interrupted search can be resumed.

    Args:
        sampler: makes the missing pictures.
        folder: created if missing.
        settings: everything else that determines a picture (adapters, model, steps), as JSON values.
        prompts: used in turn; after the last one the seed is increased.

    Attributes:
        made: number of pictures sampled so far rather than found in the folder.
        progress: called with the number of pictures completed since the last call.
    """

    def __init__(
        self,
        sampler: Sampler,
        folder: Path,
        settings: Mapping[str, Any],
        prompts: Sequence[str],
        seed: int,
        batch_size: int,
    ) -> None:
        self.sampler, self.folder, self.settings = sampler, folder, dict(settings)
        self.prompts, self.seed, self.batch_size, self.made = tuple(prompts), seed, batch_size, 0
        self.progress: Callable[[int], None] = lambda _: None
        make_folder(folder)

    def sample(self, weights: Weights, number: int) -> Sample:
        """Return the weights with the prompt and the seed of this number."""
        return weights, self.prompts[number % len(self.prompts)], self.seed + number // len(self.prompts)

    def pictures(self, samples: Iterable[tuple[Weights, int]]) -> list[MeasuredPicture]:
        """Return the pictures of these weights and numbers, in order."""
        wanted = [self.sample(*one) for one in samples]
        missing = [one for one in dict.fromkeys(wanted) if not self._file(one).is_file()]
        self.progress(len(wanted) - len(missing))
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            images = zip(batch, self.sampler(batch), strict=True)
            write_all({self._file(one): png_bytes(image) for one, image in images})
            self.made += len(batch)
            self.progress(len(batch))
        return [self._read(one) for one in wanted]

    def _file(self, sample: Sample) -> Path:
        text = json.dumps([self.settings, *sample], sort_keys=True, ensure_ascii=False)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.png"

    def _read(self, sample: Sample) -> MeasuredPicture:
        _, prompt, seed = sample
        return MeasuredPicture(f"seed {seed}", np.asarray(open_picture(self._file(sample)).image), None, prompt)


def cached_scores(
    cache: PictureCache, subject: Objective, style: Objective
) -> Callable[[Sequence[tuple[Weights, int]]], list[Scores]]:
    """Return the `score` argument of `search`: both objectives of cached samples."""

    def score(samples: Sequence[tuple[Weights, int]]) -> list[Scores]:
        pictures = cache.pictures(samples)
        return list(zip(subject(pictures), style(pictures), strict=True))

    return score


def metric_objective(metrics: Sequence[Metric], references: References, networks: Any = None) -> Objective:
    """Return the mean of metrics, each scaled to [0, 1] by its range and inverted if lower is better."""

    def score(pictures: Sequence[MeasuredPicture]) -> list[float]:
        rows = compute_metrics(pictures, references, metrics, networks)
        return [float(np.mean([_scaled(one, row[one.name]) for one in metrics])) for row in rows]

    return score


def _scaled(metric: Metric, value: float | None) -> float:
    if value is None:
        expected = "a metric that applies to every sample"
        raise DataError(f"{metric.name} cannot be an objective", expected=expected, got=f"needs {metric.needs}")
    low, high = metric.bounds
    share = (value - low) / (high - low)
    return share if metric.better == "higher" else 1 - share
