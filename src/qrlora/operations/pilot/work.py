"""Make a pilot's adapters and pictures, each once; a digest of its inputs finds it again.

What imports torch is imported where it is used: state and decisions of a pilot do without it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrlora._files import make_folder, write_all, write_atomically
from qrlora._reading import read_json
from qrlora._said import said
from qrlora.errors import DataError
from qrlora.models.training.recipe import Recipe
from qrlora.models.training.sources import find_pictures
from qrlora.operations.catalog.plan import base_digest
from qrlora.operations.catalog.tables import Item as Product
from qrlora.operations.catalog.tables import read_products
from qrlora.operations.pilot.costs import Spent
from qrlora.operations.pilot.line import Item, Line
from qrlora.operations.provenance.canonical import canonical_json, digest_of, file_digest
from qrlora.quality.images.png import png_bytes
from qrlora.quality.images.read import MeasuredPicture, load_picture, load_pictures
from qrlora.quality.metrics.table import METRICS, References, compute_metrics, select_metrics

if TYPE_CHECKING:
    from qrlora.method.adapter import Adapter
    from qrlora.models.training.loop import Progress

Show = Callable[[str, int, int], None]
"""Progress: what is being done, how much is done, of how much."""


@dataclass(frozen=True)
class Scorer:
    """A score of how much of a subject, or of a style, is in a picture.

    score: pictures and the pictures it was learned from -> a number for each picture.
    """

    name: str
    score: Callable[[Sequence[MeasuredPicture], Sequence[MeasuredPicture]], list[float]]
    higher_is_better: bool = True


def metric_scorer(role: str, name: str) -> Scorer:
    """Return a metric of `qrlora evaluate` as a scorer. DataError if there is no such metric of this role."""
    if name not in METRICS or METRICS[name].needs != (role,):
        fitting = ", ".join(one.name for one in METRICS.values() if one.needs == (role,))
        raise DataError(
            said("no metric of a %(role)s: %(name)s", role=role, name=repr(name)),
            expected=fitting,
            remedy="mend [scores] in the project file",
        )

    def score(pictures: Sequence[MeasuredPicture], learned_from: Sequence[MeasuredPicture]) -> list[float]:
        given = list(learned_from)
        references = References(subject=given) if role == "subject" else References(style=given)
        rows = compute_metrics(pictures, references, select_metrics([name], pictures, references))
        return [float(row[name] or 0.0) for row in rows]

    return Scorer(name, score, METRICS[name].better == "higher")


@dataclass
class Work:
    """A pilot's folder, its base model, and its ledger of costs.

    folder: adapters/, pictures/ and spent.json, all of which survive a kill and are used again.
    """

    line: Line
    folder: Path
    stage: str
    scorers: Mapping[str, Scorer]
    show: Show = lambda what, done, of: None
    spent: list[Spent] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_folder(self.folder / "adapters")
        make_folder(self.folder / "pictures")
        if self._ledger.is_file():
            self.spent = [Spent(**one) for one in read_json(self._ledger, "ledger of a pilot", DataError)]

    @property
    def _ledger(self) -> Path:
        return self.folder / "spent.json"

    @cached_property
    def model(self) -> tuple[Any, Any]:
        """The base model's pipeline and family, loaded when the first picture or adapter needs it."""
        from qrlora.models.families import load_pipeline

        return load_pipeline(self.line.model)

    @cached_property
    def base(self) -> str:
        """Digest of the base model's files."""
        return base_digest(self.line.model)

    def spend(self, what: str, started: float, amount: int) -> None:
        """Add work to the ledger and write it."""
        self.spent.append(Spent(self.stage, what, time.perf_counter() - started, amount))
        write_atomically(self._ledger, json.dumps([vars(one) for one in self.spent], indent=1).encode())

    def recipe(self, item: Item) -> Recipe:
        """Return the recipe of the subject or of a style."""
        role = "subject" if item == self.line.subject else "style"
        fields: dict[str, Any] = {"role": role, "images": item.picture, "model": self.line.model}
        fields |= {"licence": self.line.licence, **self.line.training, **item.training}
        if item.caption:
            fields["caption"] = item.caption
        return Recipe.of(fields)

    def adapter_file(self, item: Item) -> Path:
        """Return the path of an item's adapter, which holds the digest of its recipe and pictures."""
        return self.folder / "adapters" / f"{item.name}-{self._inputs(item)[7:23]}.safetensors"

    def _inputs(self, item: Item) -> str:
        pictures = [file_digest(source.picture) for source in find_pictures([item.picture])]
        record = {key: value for key, value in self.recipe(item).run_record().items() if key != "images"}
        return digest_of(canonical_json([json.loads(json.dumps(record, default=str)), pictures, self.base]))

    def adapter(self, item: Item) -> Adapter:
        """Return the adapter of an item; train it if it is missing, from a checkpoint if there is one."""
        from qrlora.method.adapter import load_adapter
        from qrlora.models.training import outputs
        from qrlora.models.training.loop import train

        path = self.adapter_file(item)
        if not path.is_file():
            recipe = self.recipe(item).replace(output=path)
            pipe, family = self.model
            started = time.perf_counter()
            begun = outputs.newest(recipe)
            before = int(begun.stem.removeprefix("step-")) if begun else 0

            def progress(at: Progress) -> None:
                self.show(f"train {item.name}", at.step, at.steps)

            train(recipe, pipe=pipe, family=family, resume=bool(begun), progress=progress)
            self.spend("train", started, recipe.steps - before)
        return load_adapter(path)

    def products(self) -> list[Product]:
        """Return the products of stage 3; the subject's name stands for its adapter. Errors: as `read_products`."""
        assert self.line.products is not None
        known = {self.line.subject.name: self.adapter_file(self.line.subject)}
        return read_products(self.line.products, known.get)[0]

    def learned_from(self, item: Item) -> list[MeasuredPicture]:
        """Return the pictures that an item is learned from."""
        return load_pictures([item.picture])

    def pictures(self, prompts: Sequence[str], adapters: Sequence[tuple[Item, float]] = ()) -> list[MeasuredPicture]:
        """Return pictures of these prompts in turn, as many as the project says, each made once.

        Args:
            adapters: with their weights; none for the base model alone.
        """
        from qrlora.method.composition import project_out

        strength = self.strength([item for item, _ in adapters])
        projected = project_out([(self.adapter(item), weight) for item, weight in adapters], strength)
        settings = self.line.sampling
        names = [[self.adapter_file(item).name, weight] for item, weight in adapters]
        options = {name: getattr(settings, name) for name in ("steps", "guidance", "resolution")}
        common = [self.base, names, strength, options]
        jobs = [(text, settings.seed + i) for i, text in enumerate(islice(cycle(prompts), settings.pictures))]
        files = {job: self._picture_file([*common, *job]) for job in jobs}
        missing = [job for job in jobs if not files[job].is_file()]
        for start in range(0, len(missing), settings.batch_size):
            self._generate(missing[start : start + settings.batch_size], files, projected, options)
            self.show("generate", min(start + settings.batch_size, len(missing)), len(missing))
        return [replace(load_picture(files[job]), prompt=job[0]) for job in jobs]

    def pair(self, style: Item) -> list[tuple[Item, float]]:
        """Return the subject and a style with their weights in a composition."""
        return [(item, item.weight) for item in (self.line.subject, style)]

    def strength(self, items: Sequence[Item]) -> float:
        """Return the null-space strength of their composition: the project's, else the default of their roles."""
        from qrlora.method.composition import default_strength

        given = self.line.sampling.null_space if len(items) > 1 else None
        return default_strength([self.adapter(item) for item in items]) if given is None else given

    def _picture_file(self, inputs: Sequence[Any]) -> Path:
        return self.folder / "pictures" / f"{digest_of(canonical_json(list(inputs)))[7:39]}.png"

    def _generate(
        self,
        jobs: Sequence[tuple[str, int]],
        files: Mapping[tuple[str, int], Path],
        adapters: Sequence[tuple[Adapter, float]],
        options: Mapping[str, Any],
    ) -> None:
        from qrlora.models.generation import generate_jobs

        pipe, family = self.model
        started = time.perf_counter()
        images = generate_jobs(pipe, family, jobs, adapters=adapters, batch_size=len(jobs), **options)
        write_all({files[job]: png_bytes(image) for job, image in zip(jobs, images, strict=True)})
        self.spend("generate", started, len(jobs))

    def score(self, role: str, item: Item, pictures: Sequence[MeasuredPicture]) -> float:
        """Return the mean score of pictures for an item, by the scorer of its role."""
        return float(np.mean(self.scorers[role].score(pictures, self.learned_from(item))))

    def stored(self) -> int:
        """Bytes of the adapters and pictures."""
        places = (self.folder / name for name in ("adapters", "pictures"))
        return sum(path.stat().st_size for place in places for path in place.rglob("*") if path.is_file())

    def counts(self, items: Sequence[Item]) -> list[dict[str, int]]:
        """Trained numbers of each adapter, of a LoRA of its rank, and of the adapted weights in full."""
        found = []
        for item in items:
            adapter = self.adapter(item)
            count = adapter.parameters()
            full = sum(int(np.prod(shape)) for shape in adapter.shapes.values())
            found.append({"trained": count.trained, "lora": count.lora_same_rank, "full": full})
        return found
