"""Run stage 3 of a pilot: every product in every style, by the catalog."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qrlora._said import said
from qrlora.errors import DataError
from qrlora.operations.catalog.engine import Here, Pool
from qrlora.operations.catalog.gallery import write
from qrlora.operations.catalog.journal import Journal
from qrlora.operations.catalog.plan import Settings
from qrlora.operations.catalog.run import Governing, Line, Row
from qrlora.operations.catalog.tables import Item, Style, StylesFile, item_of
from qrlora.operations.pilot.costs import cost_of, parameters_of
from qrlora.operations.pilot.line import Item as Learned
from qrlora.operations.pilot.stages import Group, Result
from qrlora.operations.pilot.work import Work
from qrlora.quality.brand import BrandSheet
from qrlora.quality.images.read import load_picture
from qrlora.quality.metrics.shares import Share


@dataclass(frozen=True)
class WholeLine:
    """Settings of stage 3.

    Attributes:
        pool: makes the workers; one in this process if None.
        governed: given the catalog's folder, what refuses combinations by the policy and records pictures in a
            registry; None does neither.
        c2pa: name of the certificate that pictures are marked by; None marks none.
    """

    pool: Callable[[Settings], Pool] | None = None
    governed: Callable[[Path], Governing] | None = None
    c2pa: str | None = None

    def __call__(self, work: Work) -> Result:
        """Make the catalog in the pilot's folder and return what it found."""
        line = work.line
        if line.products is None:
            remedy = 'write `products = "products.csv"` into the project file (docs/catalog.md)'
            raise DataError("stage 3 needs the table of the line's products", got=said("none"), remedy=remedy)
        work.adapter(line.subject)
        products = work.products()
        file, styles = _styles(work)
        settings = Settings(
            model=line.model,
            dtype="float32",
            folder=(work.folder / "catalog").resolve(),
            sheet=BrandSheet.load(line.brand) if line.brand else None,
            c2pa=self.c2pa,
            **file.sampling.model_dump(),
        )
        settings.folder.mkdir(parents=True, exist_ok=True)
        return self._made(work, products, styles, file, settings)

    def _made(
        self, work: Work, products: list[Item], styles: list[Style], file: StylesFile, settings: Settings
    ) -> Result:
        with Journal(settings.folder) as journal:
            governed = self.governed(settings.folder) if self.governed else None
            catalog = Line(products, styles, file, settings, journal, governed=governed)
            catalog.progress = lambda what, done, of, note, left: work.show(what, done, of)
            with contextlib.closing(self.pool(settings) if self.pool else Here(settings)) as pool:
                catalog.train(pool)
                catalog.render(pool, catalog.check())
            write(catalog, work.line.costs.watts, "")
            found = _result(work, list(catalog.rows()), journal.spent(), settings.folder)
            return replace(found, unapproved=governed.unapproved) if governed else found


def _styles(work: Work) -> tuple[StylesFile, list[Style]]:
    """Return the pilot's styles as a catalog's, each with the adapter that stage 2 trained."""
    line = work.line
    prompts = [text.replace("{subject}", "{product}") for text in line.prompts.of_line]
    seeds = range(line.sampling.seed, line.sampling.seed + line.sampling.per_product)
    sampling = {name: getattr(line.sampling, name) for name in ("steps", "guidance", "resolution")}
    training = {key: value for key, value in line.training.items() if key not in ("noun", "trigger")}
    fields: dict[str, Any] = {"prompts": prompts, "seeds": list(seeds), "sampling": sampling, "training": training}
    fields["style"] = [{"name": style.name, "adapter": str(_trained(work, style))} for style in line.styles]
    file = StylesFile.model_validate(fields)
    found = []
    for style, given in zip(line.styles, file.style, strict=True):
        item = item_of(
            "style",
            name=style.name,
            word="",
            folder=style.picture.parent,
            picture=style.picture.name if style.picture.is_file() else "",
            adapter=given.adapter,
            weight=style.weight,
            trigger="",
            tags=(),
            resolve=lambda _: None,
        )
        strength = work.strength([line.subject, style])
        found.append(Style(item, line.subject.weight, strength, file.prompts, file.seeds))
    return file, found


def _trained(work: Work, style: Learned) -> Path:
    work.adapter(style)
    return work.adapter_file(style)


def _result(work: Work, rows: list[Row], spent: dict[str, tuple[int, float]], folder: Path) -> Result:
    made = [row for row in rows if row.state == "done"]
    groups = []
    for style in work.line.styles:
        own = [row for row in made if row.cell.style.item.name == style.name]
        if not own:
            continue
        pictures = [load_picture(folder / row.found["file"]) for row in own]
        verdicts = [row.found["passes"] for row in own if row.found.get("passes") is not None]
        passing = Share.of(verdicts) if verdicts else None
        groups.append(Group(style.name, pictures, work.score("style", style, pictures), passing, style=style.name))
    seconds = sum(one.seconds for one in work.spent) + sum(seconds for _, seconds in spent.values())
    stored = work.stored() + sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Result(
        "line",
        groups,
        learned_from=[work.learned_from(item)[0] for item in work.line.items],
        made=len(made),
        refused=sum(row.state == "refused" for row in rows),
        failed=sum(row.state in ("failed", "missing") for row in rows),
        cost=cost_of(seconds, stored, work.line.costs),
        parameters=parameters_of(work.counts(work.line.items)),
        gate=work.line.gates.line,
    )
