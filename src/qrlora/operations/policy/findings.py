"""Apply each rule of a policy to a combination, and describe what it finds."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from typing import Any

from qrlora._said import Said, joined, said, verbatim
from qrlora.errors import PolicyError, QrloraError, bounded
from qrlora.operations.policy.combination import Combination, Part, leaves, reports, sources
from qrlora.operations.policy.licences import ADVICE, compute, licence_of_model
from qrlora.operations.policy.rules import Policy, ScoreRule, Selector, limits
from qrlora.operations.registry import Artifact, Registry
from qrlora.operations.registry.signatures import signatures_of, trust_of


@dataclass(frozen=True)
class Finding:
    """The result of one rule.

    Attributes:
        rule: its section and field, such as combine.owners.
        got, expected: as a person reads them.
        remedy: what to do where it does not hold.
    """

    rule: str
    passed: bool
    got: Said
    expected: Said
    remedy: Said

    def line(self) -> Said:
        """Return it as one line; with the remedy if it does not hold."""
        if self.passed:
            return said("holds    %(rule)s: %(got)s", rule=self.rule, got=self.got)
        return said("refused  %(rule)s: %(got)s; expected %(expected)s. Remedy: %(remedy)s", **vars(self))


@dataclass(frozen=True)
class Case:
    """The action that the rules are applied to; `adapters` are those that were trained, compositions taken apart."""

    policy: Policy
    combination: Combination
    action: str
    registry: Registry | None
    adapters: Sequence[Part]
    at: datetime

    @classmethod
    def of(
        cls, policy: Policy, combination: Combination, action: str, registry: Registry | None, at: datetime | None
    ) -> Case:
        """at: the time of the action; now if None."""
        at = at or datetime.now(timezone.utc)
        return cls(policy, combination, action, registry, leaves(registry, combination.parts), at)


def findings(case: Case) -> list[Finding]:
    """Apply every rule but that of approvals."""
    return [finding for rule in RULES for finding in rule(case)]


def distinct(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Return each artifact once, in their order."""
    return list({one.digest: one for one in artifacts}.values())


def _listed(values: Sequence[str]) -> Said:
    return verbatim(", ".join(values)) if values else said("none")


def _expiry(case: Case) -> Iterator[Finding]:
    if until := case.policy.expires:
        today: date = case.at.date()
        remedy = said("activate a policy that has not expired: `qrlora policy activate`")
        got, expected = said("the policy ends on %(day)s", day=until), said("a policy in force on %(day)s", day=today)
        yield Finding("expires", today <= until, got, expected, remedy)


def _deprecated(case: Case) -> Iterator[Finding]:
    base = [case.combination.base] if case.combination.base else []
    for one in distinct([*base, *(part.artifact for part in (*case.combination.parts, *case.adapters))]):
        if one.deprecated:
            got = said("%(title)s is deprecated: %(reason)s", title=one.title, reason=one.deprecated)
            remedy = said("use the version that replaces it")
            yield Finding("deprecated", False, got, said("nothing deprecated"), remedy)


def _known_parts(case: Case) -> Iterator[Finding]:
    for part in case.adapters:
        if "composition" in (part.artifact.role, part.artifact.facts.get("role")):
            got = said("the parts of %(title)s are not in the registry", title=part.artifact.title)
            remedy = said("register its parts and compose it again with --registry, or name them in its place")
            yield Finding("lineage", False, got, said("a composition whose parts are known"), remedy)


def _licence(case: Case) -> Iterator[Finding]:
    rule = case.policy.licence
    if rule is None:
        return
    asker = rule.asker(case.combination.use)
    told = _licences(case)
    try:
        licence = compute(told.values(), asker)
    except PolicyError as error:
        got, expected = said("%(what)s (%(got)s)", what=error.what, got=error.got), verbatim(error.expected)
        yield Finding("licence.use", False, got, expected, verbatim(error.remedy or ""))
        return
    missing = [name for name, expression in told.items() if not expression]
    shared = case.action == "export" and licence.conflict
    got = licence.reasons.get(asker.use) or (licence.conflict if shared else None) or verbatim(licence.expression)
    got = said("%(why)s: %(titles)s", why=got, titles=_listed(missing)) if missing else got
    remedy = said(
        "leave out or replace what is under it, or state an agreement in [licence.agreements] (%(advice)s)",
        advice=ADVICE,
    )
    passed = asker.use in licence.allows and not shared
    yield Finding("licence.use", passed, got, said("licences that allow %(use)s use", use=asker.use), remedy)


def _licences(case: Case) -> dict[str, str]:
    """Return title -> licence of the base model, the adapters, and all that they were made from."""
    base = [case.combination.base] if case.combination.base else []
    found: dict[str, Artifact] = {}
    ahead = [*base, *(part.artifact for part in case.adapters)]
    while ahead:
        one = ahead.pop(0)
        if one.digest not in found:
            found[one.digest] = one
            ahead += sources(case.registry, one) if case.registry and case.registry.has(one.digest) else []
    told = [one for one in found.values() if one.kind in ("base", "adapter", "picture")]
    licences = {f"{one.title} ({one.digest[7:15]})": one.licence or _of_model(one) for one in told}
    if not any(one.kind == "base" for one in told):
        models = {str(part.artifact.facts.get("base_model") or "") for part in case.adapters} or {""}
        licences |= {f"base model {model or 'unknown'}": licence_of_model(model) for model in models}
    return licences


def _of_model(artifact: Artifact) -> str:
    return licence_of_model(str(artifact.facts.get("model", ""))) if artifact.kind == "base" else ""


def _combine(case: Case) -> Iterator[Finding]:
    rule, adapters = case.policy.combine, [part.artifact for part in case.adapters]
    low, high = rule.adapters
    count, expected = said("%(count)s adapters", count=len(adapters)), _from_to(low, high)
    passed = low <= len(adapters) <= high
    yield Finding("combine.adapters", passed, count, expected, said("add or leave out adapters"))
    if rule.roles:
        roles = sorted(one.role for one in adapters)
        allowed = any(roles == sorted(one) for one in rule.roles)
        expected = joined(map(_together, rule.roles), "; or ")
        yield Finding("combine.roles", allowed, _together(roles), expected, said("combine adapters of other roles"))
    low_strength, high_strength = rule.null_space
    if len(adapters) > 1:
        strength = case.combination.null_space
        yield Finding(
            "combine.null_space",
            low_strength <= strength <= high_strength,
            said("null-space projection %(strength)s", strength=f"{strength:g}"),
            _from_to(low_strength, high_strength),
            said("give --null-space %(limits)s", limits=_from_to(low_strength, high_strength)),
        )
    yield from _never(case)


def _from_to(low: float, high: float) -> Said:
    return said("%(low)s to %(high)s", low=f"{low:g}", high=f"{high:g}")


def _together(roles: Sequence[str]) -> Said:
    return verbatim(" + ".join(one or "none" for one in roles)) if roles else said("no adapter")


def _whose(case: Case) -> Iterator[Finding]:
    rule = case.policy.combine
    for one in distinct([part.artifact for part in case.adapters]):
        if rule.owners:
            owners = joined(map(verbatim, rule.owners), " or ")
            remedy = said("use an adapter of %(owners)s", owners=owners)
            got = said("%(title)s is owned by %(owner)s", title=one.title, owner=one.owner or said("nobody"))
            yield Finding("combine.owners", one.owner in rule.owners, got, owners, remedy)
        if rule.required_tags:
            missing = [tag for tag in rule.required_tags if tag not in one.tags]
            got = said("%(title)s has the tags %(tags)s", title=one.title, tags=_listed(one.tags))
            remedy = said(
                "`qrlora registry tag` it %(tags)s when it has earned that, or use another", tags=_listed(missing)
            )
            yield Finding("combine.required_tags", not missing, got, _listed(rule.required_tags), remedy)
        if forbidden := [tag for tag in rule.forbidden_tags if tag in one.tags]:
            expected = said("none of %(tags)s", tags=_listed(rule.forbidden_tags))
            got = said("%(title)s has the tag %(tags)s", title=one.title, tags=_listed(forbidden))
            yield Finding("combine.forbidden_tags", False, got, expected, said("use another adapter"))


def _never(case: Case) -> Iterator[Finding]:
    for pair in case.policy.combine.never:
        for one, other in itertools.permutations([part.artifact for part in case.adapters], 2):
            if selects(pair.one, one) and selects(pair.other, other):
                got = said("%(one)s with %(other)s", one=one.title, other=other.title)
                expected = verbatim(pair.why) if pair.why else said("not these two together")
                yield Finding("combine.never", False, got, expected, said("leave one of them out"))


def selects(selector: Selector, artifact: Artifact) -> bool:
    """Return True if the artifact has every property that the selector names."""
    names = {name.rpartition("@")[0] for name in artifact.names}
    asked = [
        (selector.role, selector.role == artifact.role),
        (selector.owner, selector.owner == artifact.owner),
        (selector.tag, selector.tag in artifact.tags),
        (selector.name, selector.name in names),
    ]
    return all(holds for wanted, holds in asked if wanted is not None)


def _weights(case: Case) -> Iterator[Finding]:
    for rule, part in itertools.product(case.policy.weight, case.adapters):
        if selects(rule, part.artifact):
            got = said("%(title)s at weight %(weight)s", title=part.artifact.title, weight=f"{part.weight:g}")
            passed, expected = _within(part.weight, rule.at_least, rule.at_most), limits(rule.at_least, rule.at_most)
            yield Finding("weight", passed, got, expected, said("give it a weight within these limits"))


def _within(value: float, at_least: float | None, at_most: float | None) -> bool:
    """Return True if the value is within the limits, up to the rounding of a sum of decimal numbers; NaN never is."""
    low = -math.inf if at_least is None else at_least
    high = math.inf if at_most is None else at_most
    return low - 1e-9 <= value <= high + 1e-9


def _scores(case: Case) -> Iterator[Finding]:
    for rule in case.policy.score:
        if case.action in rule.actions:
            combinations = [case.combination]
            if rule.of == "adapter":
                combinations = [Combination(case.combination.base, (Part(one.artifact),)) for one in case.adapters]
            yield from (_score(case, rule, one) for one in combinations)


def _score(case: Case, rule: ScoreRule, combination: Combination) -> Finding:
    name, expected = f"score {rule.report}:{rule.value}", limits(rule.at_least, rule.at_most)
    remedy = said("measure it, register the report as %(report)s and link it (measured_by)", report=rule.report)
    found = next(_named(case, combination, rule.report), None)
    if found is None:
        got = said("no report %(report)s of %(title)s", report=rule.report, title=combination.title)
        return Finding(name, False, got, expected, remedy)
    try:
        value = _worst(_at_path(_content(case, found), rule.value), rule)
    except (PolicyError, KeyError, TypeError, ValueError, IndexError) as error:
        facts = {"report": found.title, "value": rule.value, "error": type(error).__name__}
        return Finding(
            name, False, said("%(report)s has no number at %(value)s (%(error)s)", **facts), expected, remedy
        )
    remedy = said("train or combine until it is within these limits, and measure again")
    got = said("%(value)s in %(report)s", value=f"{value:.4g}", report=found.title)
    return Finding(name, _within(value, rule.at_least, rule.at_most), got, expected, remedy)


def _named(case: Case, combination: Combination, name: str) -> Iterator[Artifact]:
    """Yield the reports of this name that measured the combination, newest first."""
    if case.registry:
        for report in reports(case.registry, combination):
            if report.kind == "report" and name in {one.rpartition("@")[0] for one in report.names}:
                yield report


def _content(case: Case, report: Artifact) -> Any:
    """Return a report's JSON, from its bytes, hashed again: facts might be changed. Of a page, its facts."""
    data = case.registry.read(report) if case.registry and report.stored else b""
    return json.loads(data) if data[:1] in (b"{", b"[") else dict(report.facts)


def _at_path(value: Any, path: str) -> Any:
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def _worst(value: Any, rule: ScoreRule) -> float:
    """Return the number that is hardest on the rule; of a square table, off its diagonal and by magnitude."""
    if isinstance(value, bool):
        raise TypeError("true is no number")
    if isinstance(value, (int, float)):
        return float(value)
    rows = list(value.values()) if isinstance(value, dict) else list(value)
    if rows and all(isinstance(row, list) and len(row) == len(rows) for row in rows):
        rows = [abs(row[j]) for i, row in enumerate(rows) for j in range(len(row)) if i != j and row[j] is not None]
    numbers = [_worst(row, rule) for row in rows]
    return max(numbers) if rule.at_most is not None else min(numbers)


def _brand(case: Case) -> Iterator[Finding]:
    rule = case.policy.brand
    if rule is None or case.action not in rule.actions:
        return
    least = f"{100 * rule.at_least:g}"
    expected = said("%(share)s %% of the pictures pass the sheet %(sheet)s", share=least, sheet=rule.sheet)
    remedy = said("evaluate it with that sheet (`qrlora evaluate --brand`), and register the report")
    try:
        sheet = case.registry.get(rule.sheet).digest if case.registry else rule.sheet
    except QrloraError as error:
        remedy = said("register the sheet as %(sheet)s", sheet=rule.sheet)
        yield Finding("brand", False, verbatim(error.what), expected, remedy)
        return
    for report in reports(case.registry, case.combination) if case.registry else []:
        brand = (_content(case, report) or {}).get("brand_sheet") if report.kind == "report" else None
        if isinstance(brand, dict) and brand.get("digest") == sheet:
            share = float(brand.get("share") or 0.0)
            facts = {"share": f"{100 * share:.3g}", "report": report.title}
            got = said("%(share)s %% of the pictures pass, in %(report)s", **facts)
            passed = _within(share, rule.at_least, None)
            remedy = said("train or combine until enough pass, and evaluate again")
            yield Finding("brand", passed, got, expected, remedy)
            return
    got = said("no report on this sheet of %(title)s", title=case.combination.title)
    yield Finding("brand", False, got, expected, remedy)


def _forbidden(case: Case) -> Iterator[Finding]:
    rule = case.policy.forbidden
    for part in case.adapters:
        trigger = str(part.artifact.facts.get("trigger") or "")
        if trigger.casefold() in {one.casefold() for one in rule.triggers}:
            got = said("%(title)s is called by %(trigger)s", title=part.artifact.title, trigger=repr(trigger))
            remedy = said("use an adapter with another trigger")
            yield Finding("forbidden.triggers", False, got, said("another trigger"), remedy)
    yield from forbidden_words(case.policy, case.combination.prompts)


def forbidden_words(policy: Policy, prompts: Sequence[str]) -> Iterator[Finding]:
    """Yield a finding for every prompt with a forbidden word."""
    for prompt in prompts:
        folded = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in prompt.casefold()).split())} "
        for word in (*policy.forbidden.words, *policy.forbidden.triggers):
            bare = " ".join("".join(c if c.isalnum() else " " for c in word.casefold()).split())
            if f" {bare} " in folded or (not word.isascii() and word.casefold() in prompt.casefold()):
                start = repr(str(bounded(prompt))[:100])
                got = said("the prompt %(prompt)s has %(word)s", prompt=start, word=repr(word))
                expected = said("no %(word)s in a prompt", word=repr(word))
                yield Finding("forbidden.words", False, got, expected, said("write another prompt"))


def _signatures(case: Case) -> Iterator[Finding]:
    if not case.policy.signatures.adapters:
        return
    for one in distinct([part.artifact for part in case.adapters]):
        signers, why = signers_of(case.registry, one)
        remedy = said("its author signs it: `qrlora keys sign registry:NAME --key NAME`")
        got = said("%(title)s: %(why)s", title=one.title, why=why)
        if signers:
            got = said("%(title)s is signed by %(people)s", title=one.title, people=_listed(signers))
        yield Finding("signatures.adapters", bool(signers), got, said("the signature of an author"), remedy)


def signers_of(registry: Registry | None, artifact: Artifact) -> tuple[list[str], Said]:
    """Return the names of the authors who signed an artifact, and why there are none."""
    if registry is None:
        return [], said("signatures are kept in a registry, and none is in play")
    try:
        found, faults = signatures_of(registry, artifact, trust_of(registry))
    except QrloraError as error:  # its own bytes, or the trust file
        found, faults = [], [error]
    names = dict.fromkeys(one.person.name for one in found if "author" in one.person.roles)
    why = [said("%(what)s (%(got)s)", what=fault.what, got=fault.got) for fault in faults]
    return list(names), joined(why) if why else said("not signed by an author")


RULES: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    *(_expiry, _deprecated, _known_parts, _licence, _combine, _whose),
    *(_weights, _scores, _brand, _forbidden, _signatures),
)
