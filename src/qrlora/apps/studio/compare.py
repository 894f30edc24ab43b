"""Measure two mixes by pictures: metrics, crosstalk, a brand sheet; build and count their blind vote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qrlora._reading import parsing, tomllib
from qrlora.apps.studio.pages import N_
from qrlora.errors import BrandError
from qrlora.models.training.pictures import open_picture
from qrlora.quality.brand import BrandSheet
from qrlora.quality.evaluation import evaluate
from qrlora.quality.images.read import MeasuredPicture, load_pictures
from qrlora.quality.metrics.table import METRICS, References, select_metrics
from qrlora.quality.study.ballot import Ballot
from qrlora.quality.study.trials import study_data

if TYPE_CHECKING:
    from qrlora.apps.studio.state import Studio
    from qrlora.operations.registry import Registry

QUESTION = N_("Which picture do you like better?")
CROSSTALK = {"subject": ("edges", "structure"), "style": ("colours", "texture", "grain")}
"""Metrics of likeness to the picture that an adapter of this role was trained on."""


def brand_of(text: str) -> BrandSheet | None:
    """Return the brand sheet in a TOML text; None if there is none. BrandError if it is not one."""
    if not text.strip():
        return None
    remedy = "correct the text of the sheet"
    with parsing("this is no brand sheet", BrandError, expected="TOML as brands/brand.toml", remedy=remedy):
        fields = tomllib.loads(text)
    if "logo" in fields:  # names a file, and files of this machine are not for whoever writes to it
        remedy = "leave [[logo]] out here; `qrlora evaluate --brand FILE` checks it"
        raise BrandError("a logo is a file beside its sheet", got="[[logo]]", remedy=remedy)
    return BrandSheet.parse(fields)


def measure(studio: Studio, registry: Registry, folder: Path, proof: Mapping[str, Any]) -> dict[str, Any]:
    """Score both sides, and add the scores to the registry as a report about them."""
    from qrlora.operations.registry.intake import add_report

    groups = {arm: load_pictures([folder / arm]) for arm in proof["arms"]}
    everything = [one for pictures in groups.values() for one in pictures]
    sheet = brand_of(proof["brand"])
    palette = sheet.palette.colours if sheet and sheet.palette else ()
    references = _references(studio, registry, {key for arm in proof["arms"].values() for key in arm["parts"]}, palette)
    known = references.subject or references.style or references.palette
    metrics = select_metrics(None, everything, references) if known else []
    found = evaluate(groups, references, metrics, sheet)
    content = {
        "metrics": [_row(metric, found) for metric in metrics],
        "crosstalk": {arm: _crosstalk(studio, registry, folder, arm, side) for arm, side in proof["arms"].items()},
        "brand": _brand(found),
        "prompts": proof["prompts"],
        "pictures": len(everything),
    }
    about = [registry.get(side["digest"]) for side in proof["arms"].values()]
    report = add_report(registry, content | {"arms": {arm: dict(side) for arm, side in proof["arms"].items()}}, about)
    return content | {"report": report.digest}


def _row(metric: Any, found: Any) -> dict[str, Any]:
    values = {arm: found.summary(arm, metric.name) for arm in found.groups}
    told = {arm: [one.mean, one.lowest, one.highest] if one else None for arm, one in values.items()}
    return {"name": metric.name, "description": metric.description, "better": metric.better, **told}


def _brand(found: Any) -> dict[str, Any] | None:
    """Return for each side the pictures that pass, all pictures, whether that is enough, and the reasons of the
    others."""
    if found.sheet is None:
        return None
    told = {}
    for arm in found.groups:
        share, enough = found.passing(arm)
        reasons = list(dict.fromkeys(reason for verdict in found.verdicts[arm] for reason in verdict.reasons))
        told[arm] = {"right": share.right, "n": share.n, "enough": enough, "reasons": reasons[:6]}
    return told


def _trained_on(studio: Studio, registry: Registry, key: str) -> list[MeasuredPicture]:
    """Return the picture that an adapter was trained on, if the registry has it."""
    card = studio.shelf.cards[key]
    if not card.picture:
        return []
    image = open_picture(Path(card.title), registry.read(card.picture)).image
    return [MeasuredPicture(card.title, np.asarray(image))]


def _references(studio: Studio, registry: Registry, keys: set[str], palette: Sequence[str]) -> References:
    by_role: dict[str, list[MeasuredPicture]] = {"subject": [], "style": []}
    for key in sorted(keys):
        by_role.get(studio.shelf.cards[key].role, []).extend(_trained_on(studio, registry, key))
    return References(subject=by_role["subject"], style=by_role["style"], palette=palette)


def _crosstalk(
    studio: Studio, registry: Registry, folder: Path, arm: str, side: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return for every part and metric its score alone, its score inside the mix, and the difference."""
    if len(side["parts"]) < 2:
        return []
    rows = []
    for key in side["parts"]:
        role = studio.shelf.cards[key].role
        pictures = _trained_on(studio, registry, key)
        if not pictures:
            continue
        groups = {"alone": load_pictures([folder / f"alone {key}"]), "inside": load_pictures([folder / arm])}
        metrics = [METRICS[name] for name in CROSSTALK.get(role, ())]
        by_role: dict[str, Any] = {role: pictures}
        found = evaluate(groups, References(**by_role), metrics)
        rows += [_lost(studio.shelf.cards[key].title, metric, found) for metric in metrics]
    return rows


def _lost(title: str, metric: Any, found: Any) -> dict[str, Any]:
    alone, inside = (found.summary(group, metric.name).mean for group in ("alone", "inside"))
    lost = alone - inside if metric.better == "higher" else inside - alone
    return {"part": title, "metric": metric.name, "alone": alone, "inside": inside, "lost": lost}


# The blind vote


def ballot_of(folder: Path, arms: Iterable[str]) -> Ballot:
    """Return the blind vote of a comparison, made when it is asked for first."""
    ballot = Ballot(folder)
    if not ballot.made:
        ballot.write(*study_data({arm: load_pictures([folder / arm]) for arm in arms}, QUESTION))
    return ballot
