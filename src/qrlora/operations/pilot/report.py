"""Write a stage's report for people, in English and in Japanese."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qrlora._reading import read_toml
from qrlora.errors import DataError
from qrlora.operations.pilot.costs import GB, Cost, Parameters
from qrlora.operations.pilot.line import Costs, Language, Line
from qrlora.operations.pilot.stages import Check, Group, Result
from qrlora.operations.pilot.work import Scorer
from qrlora.quality.evaluation import thumbnail
from qrlora.quality.metrics.shares import Share
from qrlora.quality.report import Block, Equation, Figure, Figures, Gallery, Prose, Report, Section, Table

SUMS = 4
"""Styles shown as a sum at the top of the page."""
SHOWN = 24
"""Pictures of a group on the page; the others are in the folder."""


@functools.cache
def texts() -> dict[str, Any]:
    """Return the report's texts: key -> language -> text."""
    return read_toml(Path(__file__).with_name("texts.toml"), "texts of the reports", DataError, remedy="install again")


class Words:
    """The texts of one language."""

    def __init__(self, language: Language) -> None:
        self.language = language

    def __call__(self, key: str, **values: Any) -> str:
        found = functools.reduce(lambda table, part: table[part], key.split("."), texts())
        return str(found[self.language]).format(**values)


def report(result: Result, line: Line, scorers: dict[str, Scorer], language: Language, file: str) -> Report:
    """Make the page of a stage.

    Args:
        file: name of the project file, for the command that records the decision.
    """
    say = Words(language)
    title = say("title", name=line.name, stage=say(f"stage.{result.stage}"))
    sections = [_opening(result, line, say), _gate(result, line, say), *_pictures(result, say)]
    sections += [_crosstalk(result, scorers, say)] if result.crosstalk else []
    sections += [_catalog(result, say)] if result.stage == "line" else []
    sections += [_approvals(result, say)] if result.to_approve else []
    sections += [_cost(result, line, say), _limits(result, line, scorers, say)]
    subtitle = say("subtitle.go" if result.passes else "subtitle.no")
    return Report(title, subtitle, sections, result.to_dict(), say("footer", file=file))


def _opening(result: Result, line: Line, say: Words) -> Section:
    figures = []
    for name in ("compliance", "acceptance", "rework"):
        share: Share | None = getattr(result, name)
        if share:
            figures.append(Figure(f"{share.value:.0%}", say(f"kpi.{name}"), str(share)))
    if result.per_picture is not None:
        figures.append(Figure(money(result.per_picture, line.costs.currency), say("kpi.cost_per_picture")))
    learned = [thumbnail(picture, say("heading.learned_from")) for picture in result.learned_from]
    blocks: list[Block] = []
    for number, group in enumerate(result.groups[:SUMS] if result.stage != "line" else ()):
        parts = learned[:1] + learned[number + 1 : number + 2]
        blocks += [Equation(parts, thumbnail(group.pictures[0], group.name))] if parts else []
    return Section("", [*blocks, Figures(figures)])


def _gate(result: Result, line: Line, say: Words) -> Section:
    header = [say(f"table.{name}") for name in ("condition", "found", "limit", "verdict")]
    rows: list[list[str | Share | None]] = []
    for check in result.checks:
        share = getattr(result, check.name, None)
        rows.append(gate_row(check, share if isinstance(share, Share) else None, say))
    blocks: list[Block] = [Table(header, rows)]
    reasons = sorted({reason for group in result.groups for reason in group.reasons})
    if reasons:
        blocks += [Prose([say("heading.reasons")]), Prose(reasons, listed=True)]
    return Section(say("heading.gate"), blocks)


def gate_row(check: Check, share: Share | None, say: Words) -> list[str | Share | None]:
    """Return a condition, what was found, its limit, and the verdict.

    Args:
        share: that the condition is about; None for another number.
    """
    value = None if check.value is None else f"{check.value:.0f}" if check.name == "failed" else f"{check.value:.3f}"
    sign = "≥" if check.name in ("compliance", "acceptance") else "≤"
    return [say(f"kpi.{check.name}"), value, f"{sign} {check.limit:g}", _verdict(check, share, say)]


def _verdict(check: Check, share: Share | None, say: Words) -> str:
    if check.value is None:
        return say("verdict.unmeasured")
    verdict = say("verdict.holds" if check.passed else "verdict.fails")
    return verdict if check.sure or share is None else say("verdict.unsure", verdict=verdict, n=share.n)


def _pictures(result: Result, say: Words) -> list[Section]:
    return [Section(group.name, [Gallery(_shown(group))], _lead(group, say)) for group in result.groups]


def _shown(group: Group) -> Sequence[Any]:
    return [thumbnail(picture, picture.prompt) for picture in group.pictures[:SHOWN]]


def _lead(group: Group, say: Words) -> str:
    parts = [say("score", score=group.score)] if group.score is not None else []
    parts += [f"{say('kpi.compliance')}: {group.passing}"] if group.passing else []
    return "; ".join(parts)


def _catalog(result: Result, say: Words) -> Section:
    said = [say("refused", n=result.refused)] if result.refused else []
    return Section(say("heading.catalog"), [Prose([*said, say("catalog", place="catalog/index.html")])])


def _crosstalk(result: Result, scorers: dict[str, Scorer], say: Words) -> Section:
    names = ("style", "score", "alone", "composed", "lost", "interference")
    rows: list[list[str | Share | None]] = []
    for row in result.crosstalk:
        role = say(f"role.{row.role}", metric=scorers[row.role].name)
        cosine = f"{result.interference[row.style]:+.4f}" if row.style in result.interference else None
        rows.append([row.style, role, f"{row.alone:.3f}", f"{row.composed:.3f}", f"{row.lost:+.3f}", cosine])
    return Section(say("heading.crosstalk"), [Table([say(f"table.{name}") for name in names], rows)])


def _approvals(result: Result, say: Words) -> Section:
    rows: list[list[str | Share | None]] = [
        [one.title, f"qrlora approval approve {one.request} --key NAME"] for one in result.to_approve
    ]
    header = [say("table.composition"), say("table.command")]
    return Section(say("heading.approvals"), [Table(header, rows)], say("approvals"))


def _cost(result: Result, line: Line, say: Words) -> Section:
    header = [say(f"cost.{name}") for name in ("what", "so_far", "next")]
    rows = cost_rows(result.cost, result.next_cost, result.parameters, line.costs, say)
    return Section(say("heading.cost"), [Table(header, rows)])


def cost_rows(
    so_far: Cost | None, later: Cost | None, parameters: Parameters | None, costs: Costs, say: Words
) -> list[list[str | Share | None]]:
    """Return what was spent, what the next stage will take, and the trained parameters beside those of others."""

    def row(key: str, form: Any, **values: Any) -> list[str | Share | None]:
        return [say(key, **values), *(form(cost) if cost else None for cost in (so_far, later))]

    rows = [
        row("cost.time", lambda cost: _duration(cost.seconds)),
        row("cost.energy", lambda cost: f"{cost.kwh:.4f} kWh", watts=costs.watts),
        row("cost.money", lambda cost: money(cost.money, costs.currency)),
        row("cost.storage", lambda cost: f"{cost.stored / GB * 1000:.2f} MB"),
    ]
    if parameters:
        for key, name in (("parameters", "trained"), ("lora", "lora"), ("full", "full")):
            rows.append([say(f"cost.{key}"), f"{getattr(parameters, name):,}", None])
    return rows


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def money(amount: float, currency: str) -> str:
    """Return a sum as it is told: what is not free is not told as 0.0000."""
    return f"{amount:.4f} {currency}" if amount >= 0.0001 or not amount else f"< 0.0001 {currency}"


def _limits(result: Result, line: Line, scorers: dict[str, Scorer], say: Words) -> Section:
    prompts = {"one_picture": line.prompts.subject, "several_styles": line.prompts.composed}
    said = [say("limits.metric", subject=scorers["subject"].name, style=scorers["style"].name)]
    said.append(say("limits.few", n=line.sampling.pictures))
    said += [say("limits.no_brand")] if line.brand is None else []
    said += [say("limits.no_study")] if result.acceptance is None else []
    if result.stage in prompts:
        said.append(say("limits.other_prompts", prompts="; ".join(prompts[result.stage])))
    said.append(say("limits.energy"))
    return Section(say("heading.limits"), [Prose(said, listed=True)])
