"""Run a catalog from its two files to its gallery: train what is missing, check each cell, sample, score, show.

Everything finished is in the journal and the folder, so the same command continues after any end: of a picture, of a
worker, of a machine, of this process.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from qrlora.operations.catalog.engine import Lost, Pool, drain
from qrlora.operations.catalog.journal import Journal, Outcome
from qrlora.operations.catalog.plan import (
    Cell,
    Picture,
    Settings,
    Trained,
    Training,
    adapter_name,
    cells,
    pictures,
    recipe_digest,
)
from qrlora.operations.catalog.tables import Item, Style, StylesFile, recipe_for

if TYPE_CHECKING:
    from qrlora.operations.catalog.marking import Marker
    from qrlora.operations.policy.combination import Combination

MOST_ATTEMPTS = 3
"""Attempts at a picture in one run."""

Progress = Callable[[str, int, int, str, float], None]
"""Arguments: what is counted, how many are done, of how many, a note, the seconds left at the pace so far."""


@runtime_checkable
class Governing(Protocol):
    """The interface of `governed.Governed`, where a registry or a policy is in play."""

    unapproved: list[Combination]

    def register(self, items: Iterable[Item], adapters: Mapping[str, Path]) -> None: ...

    def gate(self, cell: Cell, adapters: Mapping[str, Path], use: str) -> str: ...

    def composed(self, batch: Sequence[Picture]) -> list[Picture]: ...

    def record(self, pairs: Sequence[tuple[Picture, Outcome]]) -> None: ...


STATES = ("done", "failed", "refused", "missing")


@dataclass(frozen=True)
class Row:
    """A row of the table: one picture, or a cell that has none.

    Attributes:
        state: done; failed (reason says why); refused (by the policy, reason says why); missing (not made yet).
        found: its row of the journal.
    """

    cell: Cell
    state: str
    reason: str = ""
    picture: Picture | None = None
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Line:
    """A catalog that runs.

    Attributes:
        batch_size: pictures that a worker makes at once; no more are lost with it.
        governed: refuses cells, and records what was made; None does neither.
    """

    products: Sequence[Item]
    styles: Sequence[Style]
    file: StylesFile
    settings: Settings
    journal: Journal
    batch_size: int = 8
    governed: Governing | None = None
    progress: Progress = lambda *_: None
    adapters: dict[str, Path] = field(default_factory=dict)
    untrained: dict[str, str] = field(default_factory=dict)
    refused: dict[tuple[str, str], str] = field(default_factory=dict)
    tries: Counter[str] = field(default_factory=Counter)

    @functools.cached_property
    def marker(self) -> Marker | None:
        """The signer of finished pictures' C2PA manifests; None if no certificate is named."""
        if self.settings.c2pa is None:
            return None
        from qrlora.operations.catalog.marking import Marker  # torch, which a catalog that is finished does without

        return Marker(self.settings)

    # Adapters

    def train(self, pool: Pool) -> None:
        """Train the adapters that are neither given nor in the folder."""
        missing = []
        for item in self._items():
            name = adapter_name(item)
            if item.adapter:
                self.adapters[name] = item.adapter
                continue
            self.adapters[name] = path = self._trained_path(item)
            if not path.is_file():
                missing.append(Training(name, recipe_for(item, self.file, *self._base(), path)))
        told = self._counter("adapter", len(missing))

        def finish(job: Training, result: Trained | Lost) -> Iterator[Training]:
            error = result.reason if isinstance(result, Lost) else result.error
            self.tries[job.name] += not isinstance(result, Lost) or result.begun
            if isinstance(result, Lost) and self.tries[job.name] < MOST_ATTEMPTS:
                yield job
                return
            if error:
                self.untrained[job.name] = error
            elif not isinstance(result, Lost):
                self.journal.spend("training", result.seconds)
            told(job.name)

        drain(pool, "train", iter(missing), finish)

    def _items(self) -> list[Item]:
        return [*self.products, *(style.item for style in self.styles)]

    def _base(self) -> tuple[str, str]:
        return self.settings.model, self.settings.dtype

    def _trained_path(self, item: Item) -> Path:
        """Return the path of an item's adapter, which holds a digest of its recipe and picture."""
        assert item.picture is not None
        record = recipe_for(item, self.file, *self._base(), None).record()
        digest = recipe_digest(record, item.picture, self.settings.base)
        return self.settings.folder / "adapters" / f"{item.role}-{item.folder}-{digest[:12]}.safetensors"

    # Pictures

    def check(self) -> int:
        """Ask the policy about every cell; returns the number of pictures that are left to make."""
        left = 0
        if self.governed:
            self.governed.register(self._items(), self.adapters)
        for cell in cells(self.products, self.styles):
            if self._held_back(cell):
                continue
            if self.governed and (reason := self.governed.gate(cell, self.adapters, self.file.use)):
                self.refused[_name(cell)] = reason
                continue
            left += sum(1 for _, found in self._pictures(cell) if not found)
        return left

    def _held_back(self, cell: Cell) -> tuple[str, str] | None:
        """Return state and reason of a cell that is not made."""
        for item in (cell.product, cell.style.item):
            if why := self.untrained.get(adapter_name(item)):
                return "failed", f"the adapter of {item.name} could not be trained: {why}"
        if why := self.refused.get(_name(cell)):
            return "refused", why
        return None

    def _pictures(self, cell: Cell) -> Iterator[tuple[Picture, dict[str, Any] | None]]:
        """Yield the pictures of a cell, each with its row if it is finished: its file there, and its scores up to
        date."""
        wanted = list(pictures(cell, self.adapters, self.settings))
        rows = self.journal.rows([picture.key for picture in wanted])
        for picture in wanted:
            row = rows.get(picture.key)
            yield picture, row if row and self._finished(picture, row) else None

    def _finished(self, picture: Picture, row: Mapping[str, Any]) -> bool:
        if row["error"] or row["scored_by"] != picture.scored_by or row["file"] != picture.file:
            return False
        try:
            return (self.settings.folder / picture.file).stat().st_size == int(row["size"])
        except OSError:
            return False

    def render(self, pool: Pool, left: int) -> None:
        """Make and score what is left; `left`: as `check` returned."""
        told = self._counter("picture", left)

        def finish(batch: list[Picture], result: list[Outcome] | Lost) -> Iterator[list[Picture]]:
            if isinstance(result, Lost) and not result.begun:
                yield batch
                return
            lost = result.reason if isinstance(result, Lost) else ""
            outcomes = [Outcome(one.key, lost) for one in batch] if isinstance(result, Lost) else result
            if self.marker:
                outcomes = [self.marker.marked(*pair) for pair in zip(batch, outcomes, strict=True)]
            pairs = list(zip(batch, outcomes, strict=True))
            self.journal.commit(pairs)
            if self.governed:
                self.governed.record([pair for pair in pairs if not pair[1].error])
            for picture, outcome in pairs:
                self.tries[picture.key] += bool(outcome.error)
                if outcome.error and not outcome.final and self.tries[picture.key] < MOST_ATTEMPTS:
                    yield [picture]  # alone, so that no other can be the cause
                    continue
                told()

        drain(pool, "render", self._batches(), finish)

    def _counter(self, what: str, of: int) -> Callable[..., None]:
        """Return a function that counts one more, and reports the time left at the pace since now."""
        numbers, started = itertools.count(1), time.monotonic()

        def told(note: str = "") -> None:
            number, passed = next(numbers), time.monotonic() - started
            self.progress(what, number, of, note or f"{number / passed:.2f} a second", passed / number * (of - number))

        return told

    def _batches(self) -> Iterator[list[Picture]]:
        stream = (
            picture
            for cell in cells(self.products, self.styles)
            if not self._held_back(cell)
            for picture, found in self._pictures(cell)
            if not found
        )
        while batch := list(itertools.islice(stream, self.batch_size)):
            yield self.governed.composed(batch) if self.governed else batch

    # Results

    def rows(self) -> Iterator[Row]:
        """The table as it stands: every picture, and every cell that has none."""
        for cell in cells(self.products, self.styles):
            held = self._held_back(cell)
            if held:
                yield Row(cell, *held)
                continue
            wanted = list(pictures(cell, self.adapters, self.settings))
            rows = self.journal.rows([picture.key for picture in wanted])
            for picture in wanted:
                row = rows.get(picture.key)
                if row and self._finished(picture, row):
                    yield Row(cell, "done", "", picture, row)
                elif row and row["error"]:
                    yield Row(cell, "failed", row["error"], picture, row)
                else:
                    yield Row(cell, "missing", "", picture)


def _name(cell: Cell) -> tuple[str, str]:
    return cell.product.folder, cell.style.item.folder
