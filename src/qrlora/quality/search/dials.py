"""What turning the weights of a composition shows: dials, pictures of their positions, and scores of those.

A dial is an adapter's weight, or the weight of some successive blocks of it: an adapter's layers, a part of them at a
time, are adapters on the same basis themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qrlora._files import make_folder, write_all
from qrlora.errors import DataError, MismatchError
from qrlora.method.adapter import Adapter
from qrlora.method.basis import fingerprint
from qrlora.method.composition import Live, project_out
from qrlora.method.composition.parts import on_one_basis
from qrlora.models.families import ModelFamily
from qrlora.models.generation import Request, generate_jobs, generate_mixed
from qrlora.models.training.pictures import open_picture
from qrlora.quality.images.png import png_bytes
from qrlora.quality.images.read import Exhibit
from qrlora.quality.metrics.table import Measure, References, measure
from qrlora.quality.search.search import Scores, Weights

Jobs = Sequence[tuple[Weights, str, int]]
"""Weights, prompt, seed."""
Paint = Callable[[Jobs], list[Image.Image]]
Objective = Callable[[Sequence[Exhibit]], list[float]]
"""A score of each picture; more is better."""


def by_blocks(adapter: Adapter, count: int, order: Sequence[str]) -> list[Adapter]:
    """An adapter as `count` adapters of successive blocks, whose sum it is.

    Args:
        order: the model's modules in its own order; a block is what a layer's name begins with up to its first number.

    Raises:
        MismatchError: fewer blocks than that, or an adapter that stands on no basis.
    """
    if not adapter.metadata.on_basis:
        remedy = "tune its whole weight, or import it onto a basis: qrlora import FILE --like ADAPTER"
        raise MismatchError(f"{adapter.name} stands on no basis, so its blocks cannot be composed", remedy=remedy)
    adapter.check_version()
    place = {name: i for i, name in enumerate(order)}
    layers = sorted(adapter.deltas, key=lambda name: place.get(name, len(place)))
    blocks: dict[str, list[str]] = {}
    for name in layers:
        start = re.match(r"\D*\d+", name)
        blocks.setdefault(start[0] if start else name, []).append(name)
    if count > len(blocks):
        expected = f"at most {len(blocks)} parts, as it has blocks"
        raise MismatchError(f"{adapter.name} cannot be divided so", expected=expected, got=count)
    parts = np.array_split(np.arange(len(blocks)), count)
    listed = list(blocks.values())
    return [_only(adapter, [name for block in part for name in listed[block]]) for part in parts]


def _only(adapter: Adapter, layers: Sequence[str]) -> Adapter:
    """The adapter of these layers alone."""
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


@contextlib.contextmanager
def painting(
    pipe: Any,
    family: ModelFamily,
    dials: Mapping[str, Adapter],
    batch_size: int,
    sampling: Mapping[str, Any],
    null_space: float = 0.0,
) -> Iterator[Paint]:
    """What makes pictures at any weights of these adapters, in the order of the dials, while the block lasts, after
    null-space projection of this strength.

    On one basis a batch holds different weights, and turning them costs nothing (composition.Live); other adapters
    lie side by side, a batch for each position.
    """
    denoiser: Any = family.denoiser_of(pipe)
    if on_one_basis(list(dials.values())):
        with Live(denoiser, dials) as live:

            def mixed(jobs: Jobs) -> list[Image.Image]:
                requests = [Request(p, s, dict(zip(dials, weights, strict=True)), null_space) for weights, p, s in jobs]
                return generate_mixed(pipe, family, requests, live, batch_size=batch_size, **sampling)

            yield mixed
        return

    def alone(jobs: Jobs) -> list[Image.Image]:
        images: list[Image.Image] = []
        for weights, same in itertools.groupby(jobs, key=lambda job: job[0]):
            projected = project_out(list(zip(dials.values(), weights, strict=True)), null_space)
            asked = [(prompt, seed) for _, prompt, seed in same]
            images += generate_jobs(pipe, family, asked, adapters=projected, batch_size=batch_size, **sampling)
        return images

    yield alone


class Album:
    """Pictures by what they are of, made once and kept in a folder: a search that is started again finds them there.

    Args:
        paint: makes pictures.
        folder: made if missing.
        of: whatever else decides a picture (adapters, model, steps), as JSON values.
        prompts: in turn; then the next seed.
    """

    def __init__(
        self, paint: Paint, folder: Path, of: Mapping[str, Any], prompts: Sequence[str], seed: int, batch_size: int
    ) -> None:
        self.paint, self.folder, self.of, self.prompts, self.seed = paint, folder, dict(of), tuple(prompts), seed
        self.batch_size, self.made = batch_size, 0
        self.progress: Callable[[int], None] = lambda _: None
        make_folder(folder)

    def job(self, weights: Weights, number: int) -> tuple[Weights, str, int]:
        """The prompt and seed of this number."""
        return weights, self.prompts[number % len(self.prompts)], self.seed + number // len(self.prompts)

    def pictures(self, jobs: Iterable[tuple[Weights, int]]) -> list[Exhibit]:
        """One for each, in order."""
        wanted = [self.job(*job) for job in jobs]
        missing = [job for job in dict.fromkeys(wanted) if not self._file(job).is_file()]
        self.progress(len(wanted) - len(missing))
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            images = zip(batch, self.paint(batch), strict=True)
            write_all({self._file(job): png_bytes(image) for job, image in images})
            self.made += len(batch)
            self.progress(len(batch))
        return [self._read(job) for job in wanted]

    def _file(self, job: tuple[Weights, str, int]) -> Path:
        said = json.dumps([self.of, *job], sort_keys=True, ensure_ascii=False)
        return self.folder / f"{hashlib.sha256(said.encode()).hexdigest()[:20]}.png"

    def _read(self, job: tuple[Weights, str, int]) -> Exhibit:
        return Exhibit(f"seed {job[2]}", np.asarray(open_picture(self._file(job)).image), None, job[1])


def scored(
    album: Album, subject: Objective, style: Objective
) -> Callable[[Sequence[tuple[Weights, int]]], list[Scores]]:
    """What `tune.search` asks: both scores of the pictures of these weights and numbers."""

    def score(jobs: Sequence[tuple[Weights, int]]) -> list[Scores]:
        pictures = album.pictures(jobs)
        return list(zip(subject(pictures), style(pictures), strict=True))

    return score


def by_measures(measures: Sequence[Measure], references: References, eyes: Any = None) -> Objective:
    """The mean of the measures, each turned so that more is better and brought to [0, 1] by its range."""

    def score(pictures: Sequence[Exhibit]) -> list[float]:
        rows = measure(pictures, references, measures, eyes)
        return [float(np.mean([_share(one, row[one.name]) for one in measures])) for row in rows]

    return score


def _share(one: Measure, value: float | None) -> float:
    if value is None:
        raise DataError(
            f"{one.name} cannot be tuned by", expected="a measure that every picture made has", got=one.needs
        )
    low, high = one.bounds
    share = (value - low) / (high - low)
    return share if one.better == "higher" else 1 - share
