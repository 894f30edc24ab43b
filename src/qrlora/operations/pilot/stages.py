"""Run the three stages of a pilot.

one picture      the subject, learned from its picture, alone
several styles   each style alone on other things, and the subject in each style: the matrix of crosstalk
line             every product in every style, by the catalog
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qrlora.operations.pilot.costs import Cost, Parameters, cost_of, parameters_of, projected
from qrlora.operations.pilot.line import OURS, STAGES, Gate, Item, Stage
from qrlora.operations.pilot.work import Work
from qrlora.operations.policy.combination import Combination
from qrlora.quality.brand import BrandSheet
from qrlora.quality.evaluation import evaluate
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.metrics.shares import Share
from qrlora.quality.metrics.table import References, select_metrics


@dataclass(frozen=True)
class Row:
    """One pair in the matrix of crosstalk: scores alone, inside the composition, and the difference.

    lost: the score alone minus the score inside, turned so that positive is worse.
    """

    style: str
    role: str
    alone: float
    composed: float
    lost: float


@dataclass(frozen=True, eq=False)
class Group:
    """Pictures made for one purpose. passing, reasons: by the brand sheet, None and empty without one."""

    name: str
    pictures: Sequence[MeasuredPicture]
    score: float | None = None
    passing: Share | None = None
    reasons: Sequence[str] = ()
    copies: Sequence[str] | None = None
    """Names of those that copy a training picture; None where it was not measured."""
    style: str = ""
    """Name of the style that they are in beside the subject."""


@dataclass(frozen=True)
class Check:
    """One condition of the gate. value None: nothing measured it, and it does not hold."""

    name: str
    value: float | None
    limit: float
    passed: bool
    sure: bool = True
    """False where the interval of a share holds the limit: too few pictures to be sure."""


@dataclass(frozen=True)
class Asked:
    """A composition that waits for its approval: its description, and the digest of the request."""

    title: str
    request: str


@dataclass(frozen=True, eq=False)
class Result:
    """The results of a stage."""

    stage: Stage
    groups: Sequence[Group]
    learned_from: Sequence[MeasuredPicture] = ()
    crosstalk: Sequence[Row] = ()
    interference: Mapping[str, float] = field(default_factory=dict)
    acceptance: Share | None = None
    made: int = 0
    refused: int = 0
    failed: int = 0
    cost: Cost | None = None
    next_cost: Cost | None = None
    parameters: Parameters | None = None
    gate: Gate = field(default_factory=lambda: Gate.model_validate({}))
    unapproved: Sequence[Combination] = ()
    """Combinations that were refused only because an approval was missing."""
    to_approve: Sequence[Asked] = ()

    def group_of(self, style: str) -> Group:
        """Return the pictures of the subject in a style (stages 2 and 3)."""
        return next(group for group in self.groups if group.style == style)

    @property
    def compliance(self) -> Share | None:
        """Pictures that pass the brand sheet, of all that it was applied to."""
        shares = [group.passing for group in self.groups if group.passing]
        return Share(sum(one.right for one in shares), sum(one.n for one in shares)) if shares else None

    @property
    def rework(self) -> Share | None:
        """Pictures that have to be made again, because the sheet refuses them."""
        passing = self.compliance
        return Share(passing.n - passing.right, passing.n) if passing else None

    @property
    def copies(self) -> Share | None:
        """Pictures that score as copies of a training picture, where that was measured."""
        made = sum(len(group.pictures) for group in self.groups if group.copies is not None)
        return Share(sum(len(group.copies or ()) for group in self.groups), made) if made else None

    @property
    def per_picture(self) -> float | None:
        """Money for each picture that passes (for each that was made, without a sheet); None if none does."""
        passing = self.compliance
        usable = passing.right if passing else sum(len(group.pictures) for group in self.groups)
        return self.cost.money / usable if self.cost and usable else None

    @property
    def checks(self) -> list[Check]:
        """The gate's conditions that this stage can measure."""
        found = []
        if self.compliance:
            found.append(_at_least("compliance", self.compliance, self.gate.compliance))
        if self.crosstalk:
            worst = max(row.lost for row in self.crosstalk)
            found.append(Check("crosstalk", worst, self.gate.crosstalk, worst <= self.gate.crosstalk))
        if self.gate.acceptance is not None:
            if self.acceptance:
                found.append(_at_least("acceptance", self.acceptance, self.gate.acceptance))
            else:
                found.append(Check("acceptance", None, self.gate.acceptance, False))
        if self.copies:
            found.append(_at_most("copies", self.copies, self.gate.copies))
        if self.stage == "line":
            found.append(Check("failed", float(self.failed), 0.0, self.failed == 0))
        return found

    @property
    def passes(self) -> bool:
        """Return True if every condition holds: a go is recommended. A person decides."""
        return all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without pictures."""
        return {
            "stage": self.stage,
            "groups": [
                {
                    "name": group.name,
                    "pictures": [picture.name for picture in group.pictures],
                    "score": group.score,
                    "passing": group.passing and group.passing.to_dict(),
                    "reasons": list(group.reasons),
                    "copies": None if group.copies is None else list(group.copies),
                }
                for group in self.groups
            ],
            "crosstalk": [vars(row) for row in self.crosstalk],
            "interference": dict(self.interference),
            "kpis": {
                "compliance": self.compliance and self.compliance.to_dict(),
                "rework": self.rework and self.rework.to_dict(),
                "acceptance": self.acceptance and self.acceptance.to_dict(),
                "cost_per_picture": self.per_picture,
            },
            "checks": [vars(check) for check in self.checks],
            **({"to_approve": [vars(one) for one in self.to_approve]} if self.to_approve else {}),
            "passes": self.passes,
            "made": self.made,
            "refused": self.refused,
            "failed": self.failed,
            "cost": self.cost.to_dict() if self.cost else None,
            "next_cost": self.next_cost.to_dict() if self.next_cost else None,
            "parameters": self.parameters.to_dict() if self.parameters else None,
        }


def _at_most(name: str, share: Share, limit: float) -> Check:
    low, high = share.interval
    return Check(name, share.value, limit, share.value <= limit, not low <= limit <= high)


def _at_least(name: str, share: Share, limit: float) -> Check:
    low, high = share.interval
    return Check(name, share.value, limit, share.value >= limit, not low <= limit <= high)


def one_picture(work: Work) -> Result:
    """Run stage 1: train the subject, generate it alone, measure."""
    line = work.line
    subject = line.subject
    prompts = [text.format(subject=_trigger(work, subject)) for text in line.prompts.subject]
    pictures = work.pictures(prompts, [(subject, 1.0)])
    group = _group(work, subject.name, pictures, "subject", subject)
    several = len(line.styles)
    steps = sum(work.recipe(style).steps for style in line.styles)
    return _result(work, "one_picture", [group], [subject], steps, 2 * several * line.sampling.pictures)


def several_styles(work: Work) -> Result:
    """Run stage 2: train every style, generate each alone and with the subject, measure their crosstalk."""
    from qrlora.method.composition import Composition  # torch, which reading a result does without

    line = work.line
    subject = line.subject
    alone = work.pictures(
        [text.format(subject=_trigger(work, subject)) for text in line.prompts.subject], [(subject, 1)]
    )
    subject_alone = work.score("subject", subject, alone)
    groups, rows, interference = [], [], {}
    for style in line.styles:
        called = {"subject": _trigger(work, subject), "style": _trigger(work, style)}
        own = work.pictures([text.format(**called) for text in line.prompts.style], [(style, 1.0)])
        pair = work.pair(style)
        composed = work.pictures([text.format(**called) for text in line.prompts.composed], pair)
        group = _group(work, f"{subject.name} + {style.name}", composed, "style", style)
        groups.append(replace(group, style=style.name))
        rows.append(_row(work, style.name, "subject", subject_alone, work.score("subject", subject, composed)))
        rows.append(_row(work, style.name, "style", work.score("style", style, own), groups[-1].score or 0.0))
        parts = [(work.adapter(item), weight) for item, weight in pair]
        interference[style.name] = float(Composition(parts).interference().total.cosine[0][1])
    cells = len(work.products()) * len(line.styles) if line.products else 0
    each = len(line.prompts.of_line) * line.sampling.per_product
    result = _result(work, "several_styles", groups, list(line.items), 0, cells * each)
    return replace(result, crosstalk=rows, interference=interference)


def study_arms(work: Work) -> dict[str, list[MeasuredPicture]]:
    """Return the pictures of stage 1 or 2, and the base model's for the same prompts with the names in words."""
    line = work.line
    compared = [(line.prompts.subject, {"subject": line.subject}, [(line.subject, 1.0)])]
    if work.stage == "several_styles":
        pairs = [({"subject": line.subject, "style": style}, work.pair(style)) for style in line.styles]
        compared = [(line.prompts.composed, items, pair) for items, pair in pairs]
    arms: dict[str, list[MeasuredPicture]] = {OURS: [], "words": []}
    for prompts, items, adapters in compared:
        triggers = {role: _trigger(work, item) for role, item in items.items()}
        arms[OURS] += work.pictures([text.format(**triggers) for text in prompts], adapters)
        names = {role: item.name for role, item in items.items()}
        arms["words"] += work.pictures([text.format(**names) for text in prompts])
    return arms


def _row(work: Work, style: str, role: str, alone: float, composed: float) -> Row:
    lost = alone - composed if work.scorers[role].higher_is_better else composed - alone
    return Row(style, role, alone, composed, lost)


def _trigger(work: Work, item: Item) -> str:
    return work.recipe(item).trigger


def _group(work: Work, name: str, pictures: Sequence[MeasuredPicture], role: str, item: Item) -> Group:
    """Score pictures, apply the brand sheet, and look for copies of what the adapters were trained on."""
    training = work.learned_from(item)
    sheet = BrandSheet.load(work.line.brand) if work.line.brand else None
    palette = list(sheet.palette.colours) if sheet and sheet.palette else []
    subject = work.learned_from(work.line.subject)
    references = References(subject, training if role == "style" else (), training, palette)
    names = list(dict.fromkeys(["copied", *(sheet.scores if sheet else ())]))
    found = evaluate({name: pictures}, references, select_metrics(names, pictures, references), sheet)
    reasons = sorted({reason for one in (found.verdicts or {}).get(name, ()) for reason in one.reasons})
    passing = found.passing(name)
    score = work.score(role, item, pictures)
    return Group(name, pictures, score, passing[0] if passing else None, reasons, found.copies(name))


def _result(
    work: Work, stage: Stage, groups: Sequence[Group], items: Sequence[Item], next_steps: int, next_pictures: int
) -> Result:
    stored, costs = work.stored(), work.line.costs
    files = [path.stat().st_size for path in (work.folder / "pictures").glob("*.png")]
    each = sum(files) / max(1, len(files))
    last = stage == STAGES[-1]
    later = None if last else projected(next_steps, next_pictures, work.spent, int(next_pictures * each), costs)
    return Result(
        stage,
        groups,
        learned_from=[work.learned_from(item)[0] for item in items],
        made=len(files),
        cost=cost_of(sum(one.seconds for one in work.spent), stored, costs),
        next_cost=later,
        parameters=parameters_of(work.counts(items)),
        gate=getattr(work.line.gates, stage),
    )
