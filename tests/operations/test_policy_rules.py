"""Each rule of a policy has a test that breaks it, and says what was found and what to do."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from datetime import date, datetime, timezone
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from company import RULES, Company
from qrlora.errors import PolicyError, RegistryError
from qrlora.operations.policy.check import Verdict, activate, check, enforce, in_force
from qrlora.operations.policy.combination import Combination, Part, combination_of
from qrlora.operations.policy.rules import Policy
from qrlora.operations.registry.signatures import sign_artifact


@pytest.fixture
def company(tmp_path: Path) -> Company:
    """All that RULES ask for is there."""
    found = Company(tmp_path)
    for adapter in (found.teapot, found.chalk):
        sign_artifact(found.registry, adapter, found.keys["ada"])
    found.all_reports(found.combination())
    return found


def refused(verdict: Verdict) -> set[str]:
    assert all(finding.remedy and finding.got and finding.expected for finding in verdict.refusals)
    return {finding.rule for finding in verdict.refusals}


def test_what_keeps_every_rule_is_permitted(company: Company) -> None:
    policy, combination = company.policy(expires="2999-01-01"), company.combination(prompts=("a teapot, Rivals Ltd",))
    company.approved(company.combination(), policy, "grace", "linus")
    verdict = check(policy, combination, "serve", registry=company.registry)
    assert verdict.permitted, [finding.line() for finding in verdict.refusals]
    assert {"licence.use", "combine.owners", "weight", "brand", "signatures.adapters", "approval"} <= {
        finding.rule for finding in verdict.findings
    }


BROKEN: dict[str, tuple[str, Callable[[Company], Combination]]] = {
    "a third adapter": (
        "combine.adapters",
        lambda c: c.combination((c.teapot, 0.9), (c.chalk, 0.4), (c.adapter("ink", role="style"), 0.4)),
    ),
    "two styles": ("combine.roles", lambda c: c.combination((c.adapter("ink", role="style"), 0.4), (c.chalk, 0.4))),
    "another owner": ("combine.owners", lambda c: c.combination((c.adapter("x", role="style", owner="rival"), 0.4))),
    "no owner": ("combine.owners", lambda c: c.combination((c.adapter("x", role="style", owner=""), 0.4))),
    "not released": ("combine.required_tags", lambda c: c.combination((c.adapter("x", role="style", tags=[]), 0.4))),
    "last year's": (
        "combine.forbidden_tags",
        lambda c: c.combination((c.adapter("x", role="style", tags=["released", "last-year"]), 0.4)),
    ),
    "a strength too large": ("combine.null_space", lambda c: c.combination(null_space=0.9)),
    "a pair that never goes": (
        "combine.never",
        lambda c: c.combination((c.teapot, 0.9), (c.adapter("x", role="style", tags=["released", "loud"]), 0.4)),
    ),
    "a weight too large": ("weight", lambda c: c.combination((c.teapot, 0.9), (c.chalk, 1.2))),
    "a weight below": ("weight", lambda c: c.combination((c.teapot, 0.9), (c.chalk, -0.1))),
    "a licence that forbids it": (
        "licence.use",
        lambda c: c.combination((c.adapter("x", role="style", licence="CC-BY-NC-4.0"), 0.4)),
    ),
    "no licence": ("licence.use", lambda c: c.combination((c.adapter("x", role="style", licence=""), 0.4))),
    "a licence nobody can read": (
        "licence.use",
        lambda c: c.combination((c.adapter("x", role="style", licence="ask Bob AND"), 0.4)),
    ),
    "a picture under a licence that forbids it": (
        "licence.use",
        lambda c: c.combination(
            (c.adapter("x", role="style", picture=c.registry.add(b"?", "picture", licence="CC-BY-NC-4.0")), 0.4)
        ),
    ),
    "a picture without a licence": (
        "licence.use",
        lambda c: c.combination((c.adapter("x", role="style", picture=c.registry.add(b"?", "picture")), 0.4)),
    ),
    "a forbidden trigger": (
        "forbidden.triggers",
        lambda c: c.combination((c.adapter("x", role="style", trigger="RivalWare"), 0.4)),
    ),
    "a forbidden word": ("forbidden.words", lambda c: c.combination(prompts=("a teapot,CHEAP and good",))),
    "a forbidden phrase": ("forbidden.words", lambda c: c.combination(prompts=("by rival,  LTD.",))),
    "a forbidden trigger in a prompt": ("forbidden.words", lambda c: c.combination(prompts=("a rivalware pot",))),
    "not signed": ("signatures.adapters", lambda c: c.combination((c.adapter("x", role="style"), 0.4))),
    "not measured": ("score evaluation:subject.copied", lambda c: c.combination((c.chalk, 0.4))),
    "not evaluated with the sheet": ("brand", lambda c: c.combination((c.chalk, 0.4))),
    "not approved": ("approval", lambda c: c.combination()),
    "a composition of unknown parts": ("lineage", lambda c: c.combination((c.adapter("x", role="composition"), 1.0))),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_each_rule_is_broken_by_what_it_forbids(company: Company, broken: str) -> None:
    rule, made = BROKEN[broken]
    found = check(company.policy(), made(company), "serve", registry=company.registry)
    assert rule in refused(found)


def test_what_is_deprecated_is_refused_by_every_policy(company: Company) -> None:
    company.registry.deprecate(company.teapot.digest, "last year's packaging")
    combination = company.combination((company.registry.get("teapot"), 1.0))
    verdict = check(Policy.parse({"name": "bare", "version": 1}), combination, "generate", registry=company.registry)
    assert refused(verdict) == {"deprecated"} and "last year's packaging" in verdict.refusals[0].got


def test_a_policy_ends(company: Company) -> None:
    policy, noon = Policy.parse({"name": "bare", "version": 1, "expires": "2026-06-30"}), 12
    for day, refusals in ((date(2026, 6, 30), set()), (date(2026, 7, 1), {"expires"})):
        at = datetime(day.year, day.month, day.day, noon, tzinfo=timezone.utc)
        verdict = check(policy, company.combination(), "generate", registry=company.registry, at=at)
        assert refused(verdict) == refusals


@pytest.mark.parametrize(
    ("name", "record", "rule"),
    [
        ("evaluation", {"subject": {"copied": [0.9, 0.79]}}, "score evaluation:subject.copied"),
        ("evaluation", {"subject": {"copied": True}}, "score evaluation:subject.copied"),
        ("evaluation", {"subject": {}}, "score evaluation:subject.copied"),
        ("interference", {"total": {"cosine": [[1.0, -0.31], [-0.31, 1.0]]}}, "score interference:total.cosine"),
        ("evaluation", {"brand_sheet": {"digest": "SHEET", "share": 0.89}}, "brand"),
    ],
)
def test_scores_come_from_the_newest_report_of_this_combination(
    company: Company, name: str, record: dict[str, Any], rule: str
) -> None:
    made = json.loads(json.dumps(record).replace("SHEET", company.sheet.digest))
    company.measured(company.combination(), name, made)
    assert rule in refused(check(company.policy(), company.combination(), "export", registry=company.registry))
    # At other weights nothing was measured.
    other = company.combination((company.teapot, 0.9), (company.chalk, 0.81))
    assert rule in refused(check(company.policy(), other, "export", registry=company.registry))


def test_scores_of_each_adapter(company: Company) -> None:
    from qrlora.operations.registry.intake import add_report

    score = [{"report": "alone", "value": "score", "at_least": 0.5, "of": "adapter"}]
    policy = Policy.parse({"name": "bare", "version": 1, "score": score})
    add_report(company.registry, {"score": 0.6}, [company.teapot], name="alone")
    verdict = check(policy, company.combination(), "serve", registry=company.registry)
    assert [finding.passed for finding in verdict.findings if finding.rule.startswith("score")] == [True, False]


def test_a_report_that_was_changed_is_found(company: Company) -> None:
    report = company.registry.get("evaluation")
    path = company.registry.path(report)
    path.chmod(0o644)
    path.write_text(path.read_text().replace("0.85", "0.99"))
    with pytest.raises(RegistryError, match="not what was registered"):
        check(company.policy(), company.combination(), "serve", registry=company.registry)


def test_a_composition_inside_another_is_taken_apart(company: Company) -> None:
    """A rival's style does not come in by composing it first."""
    from qrlora.operations.registry import Link

    rival = company.adapter("rival", role="style", owner="rival")
    links = [Link("composed_of", rival.digest, 0.5), Link("composed_of", company.chalk.digest, 0.5)]
    mixed = company.registry.add(b"mixed", "adapter", name="mixed", role="composition", owner="acme", links=links)
    verdict = check(company.policy(), company.combination((mixed, 2.0)), "generate", registry=company.registry)
    assert "combine.owners" in refused(verdict)
    weights = [finding.got for finding in verdict.findings if finding.rule == "weight"]
    assert weights == ["rival@v1 at weight 1", "chalk@v1 at weight 1"]


def test_a_use_can_be_asked_for_that_the_policy_does_not_name(company: Company) -> None:
    research = company.adapter("x", role="style", licence="CC-BY-NC-4.0")
    combination = company.combination((research, 0.4))
    policy = company.policy()
    assert "licence.use" in refused(check(policy, combination, "compose", registry=company.registry))
    internal = dataclasses.replace(combination, use="internal")
    assert "licence.use" not in refused(check(policy, internal, "compose", registry=company.registry))


def test_scores_and_approvals_are_asked_for_by_what_uses_a_composition(company: Company) -> None:
    fresh = company.combination((company.teapot, 0.5), (company.chalk, 0.5))
    for action, asked in (("compose", False), ("generate", False), ("export", True), ("catalog", True)):
        found = refused(check(company.policy(), fresh, action, registry=company.registry))
        assert ("approval" in found) is ("brand" in found) is asked


def test_a_refusal_is_in_the_audit_log(company: Company) -> None:
    verdict = check(company.policy(), company.combination(null_space=0.9), "compose", registry=company.registry)
    with pytest.raises(PolicyError, match=r"null-space projection 0.9; expected 0 to 0.8. Remedy: give --null-space"):
        enforce([verdict], company.registry)
    entry = company.registry.log()[-1]
    assert (entry.action, entry.subject) == ("refused", "compose") and "combine.null_space" in entry.details


# The file


def test_all_wrong_fields_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(
        'name = "x"\nversion = 0\nowner = "y"\n[combine]\nnull_space = [0.9, 0.1]\n[forbidden]\nword = ["x"]\n'
        '[[weight]]\nat_least = 1\nat_most = 0\n[[score]]\nreport = "r"\nvalue = "v"\n[licence]\nuse = "all"\n'
        '[licence.agreements]\n"MIT AND Apache-2.0" = "why"\n'
    )
    with pytest.raises(PolicyError) as error:
        Policy.load(path)
    said = str(error.value)
    expected = ["version", "'owner'", "did you mean 'words'?", "null_space: the smaller", "at_least 1 is more"]
    for part in [*expected, "at_least or at_most", "licence.use", "is not one licence"]:
        assert part in said, part


def test_the_schema_takes_what_the_policy_takes(company: Company) -> None:
    schema = Policy.file_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(RULES, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**RULES, "colour": "red"}, schema)


def test_the_digest_is_of_what_the_rules_say(tmp_path: Path) -> None:
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text('name = "x"\nversion = 2\n[combine]\nadapters = [1, 2]\nowners = ["a"]\n')
    other.write_text('# ours\nversion = 2\nname = "x"\n[combine]\nowners = ["a"]\nadapters = [1, 2]\n')
    assert Policy.load(one).digest == Policy.load(other).digest
    other.write_text('version = 2\nname = "x"\n[combine]\nowners = ["b"]\nadapters = [1, 2]\n')
    assert Policy.load(one).digest != Policy.load(other).digest


def test_explain_says_every_rule() -> None:
    said = "\n".join(Policy.parse(RULES).lines())
    words = "commercial|1 to 2|subject + style|acme|released|last-year|0 to 0.8|never|at most 1|subject.copied"
    for word in f"{words}|acme-sheet|rivalware|cheap|signed|2 people|90 days".split("|"):
        assert word in said, word


# The policy in force


def versions(*numbers: int) -> list[Policy]:
    return [Policy.parse({"name": "acme", "version": number}) for number in numbers]


def test_a_registry_has_the_policy_that_was_activated(company: Company) -> None:
    assert in_force(company.registry) is None
    first, second = versions(1, 2)
    activate(company.registry, first)
    activate(company.registry, second, reason="new season")
    assert in_force(company.registry) == second
    assert "new season" in company.registry.log()[-1].details


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_not_newer_needs_an_operator(company: Company, version: int) -> None:
    [newer] = versions(2)
    activate(company.registry, newer)
    older = Policy.parse({"name": "lax", "version": version})
    for key in (None, company.keys["grace"]):
        with pytest.raises(PolicyError, match="not newer"):
            activate(company.registry, older, key)
    assert in_force(company.registry) == newer
    activate(company.registry, older, company.keys["olga"])
    assert in_force(company.registry) == older
    activate(company.registry, versions(3)[0])
    assert in_force(company.registry) == versions(3)[0]


def test_a_downgrade_behind_its_back_is_found(company: Company) -> None:
    """Whoever may move aliases puts the old policy back, or takes the new one away."""
    old, new = versions(1, 2)
    added = activate(company.registry, old)
    activate(company.registry, new)
    company.registry.set_alias("policy", "active", added.digest, force=True)
    with pytest.raises(PolicyError, match="not newer"):
        in_force(company.registry)
    company.registry.remove_alias("policy", "active", force=True)
    with pytest.raises(PolicyError, match="taken away"):
        in_force(company.registry)


def test_an_operators_signature_is_for_one_downgrade(company: Company) -> None:
    first, second, third = versions(1, 2, 3)
    added = activate(company.registry, first)
    activate(company.registry, second)
    activate(company.registry, first, company.keys["olga"])
    activate(company.registry, third)
    company.registry.set_alias("policy", "active", added.digest, force=True)
    with pytest.raises(PolicyError, match="not newer"):
        in_force(company.registry)


def test_a_composition_is_read_from_its_bytes(company: Company) -> None:
    combination = company.combination((company.teapot, 0.1 + 0.2), (company.chalk, 1.0))
    found = combination_of(company.registry, company.composed(combination).digest)
    assert found.what == combination.what
    with pytest.raises(PolicyError, match="not something that can be combined"):
        combination_of(company.registry, company.picture.digest)
    alone = combination_of(company.registry, "teapot")
    assert alone.parts == (Part(company.registry.get("teapot"), 1.0),) and alone.base == company.base
