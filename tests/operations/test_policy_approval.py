"""An approval is of one combination: whatever is changed makes it void, and so does who gave it, and when."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from company import Company, rewritten
from qrlora.errors import PolicyError, SignatureError
from qrlora.operations.policy.approval import approve, reject, request, revoke
from qrlora.operations.policy.combination import Combination, decimal
from qrlora.operations.policy.decisions import APPROVAL, about, decisions, find, listing
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.canonical import canonical_json, digest_of
from qrlora.operations.provenance.dsse import sign, statement
from qrlora.operations.provenance.keys import SigningKey, Trust
from qrlora.operations.registry import Artifact
from qrlora.operations.registry.bundle import export_bundle, import_bundle
from qrlora.operations.registry.upkeep import verify

ONE = Policy.parse({"name": "one", "version": 1, "approval": {}})
TWO = Policy.parse({"name": "two", "version": 1, "approval": {"needed": 2}})


@pytest.fixture
def company(tmp_path: Path) -> Company:
    return Company(tmp_path)


def holds(company: Company, combination: Combination, policy: Policy | None = ONE, **options: Any) -> bool:
    return find(company.registry, combination, policy, **options).holds


def test_what_was_approved_is(company: Company) -> None:
    combination = company.combination()
    assert not holds(company, combination)
    company.approved(combination, ONE, "grace")
    assert holds(company, combination)
    assert find(company.registry, combination, ONE).people == ("grace",)
    assert any("approve  by grace: " in line and "teapot@v1 x 0.9" in line for line in listing(company.registry))


def test_the_order_of_adapters_and_the_rounding_of_weights_change_nothing(company: Company) -> None:
    company.approved(company.combination((company.teapot, 0.3), (company.chalk, 1.0)), ONE, "grace")
    assert holds(company, company.combination((company.chalk, 1.0), (company.teapot, 0.1 + 0.2)))
    assert not holds(company, company.combination((company.chalk, 1.0), (company.teapot, 0.300001)))
    written = [decimal(value) for value in (0.1 + 0.2, 1.0, -0.0, 1e-9, 1e5, -2.5)]
    assert written == [
        "0.3",
        "1",
        "0",
        "0",
        "100000",
        "-2.5",
    ]


def another_base(c: Company) -> Combination:
    base = c.registry.add_record({"model": "other"}, "base", facts={"model": "other"})
    return Combination(base, c.combination().parts, 0.5)


CHANGED: dict[str, tuple[Callable[[Company], Combination], str]] = {
    "adapter": (lambda c: c.combination((c.teapot, 0.9), (c.adapter("ink"), 0.8)), "adapters are"),
    "one adapter less": (lambda c: c.combination((c.teapot, 0.9)), "adapters are"),
    "one adapter more": (
        lambda c: c.combination((c.teapot, 0.9), (c.chalk, 0.8), (c.adapter("ink"), 0.0)),
        "adapters are",
    ),
    "weight": (lambda c: c.combination((c.teapot, 0.9), (c.chalk, 0.7)), "is 0.7, approved was 0.8"),
    "weights exchanged": (lambda c: c.combination((c.teapot, 0.8), (c.chalk, 0.9)), "weight of"),
    "strength": (lambda c: c.combination(null_space=0.4), "null-space strength is 0.4, approved was 0.5"),
    "base": (another_base, "base is"),
    "no base": (lambda c: Combination(None, c.combination().parts, 0.5), "base is none"),
}


@pytest.mark.parametrize("changed", CHANGED)
def test_whatever_is_changed_is_not_approved(company: Company, changed: str) -> None:
    company.approved(company.combination(), ONE, "grace")
    made, said = CHANGED[changed]
    standing = find(company.registry, made(company), ONE)
    assert not standing.holds and any(said in reason for reason in standing.reasons), standing.reasons


def test_another_policy_is_not_the_one_it_was_approved_under(company: Company) -> None:
    company.approved(company.combination(), ONE, "grace")
    other = Policy.parse({"name": "one", "version": 2, "approval": {}})
    standing = find(company.registry, company.combination(), other)
    assert not standing.holds and "policy is sha256:" in standing.reasons[0]
    assert not holds(company, company.combination(), None)


def test_a_newer_report_voids_it(company: Company) -> None:
    combination = company.combination()
    company.measured(combination, "evaluation", {"score": 0.9})
    company.approved(combination, ONE, "grace")
    assert holds(company, combination)
    company.measured(combination, "evaluation", {"score": 0.1})
    assert "report is" in find(company.registry, combination, ONE).reasons[0]


def test_only_the_prompts_that_were_approved(company: Company) -> None:
    prompts = ("a teapot", "a teapot on a table")
    company.approved(company.combination(prompts=prompts), ONE, "grace")
    for used, good in (((), False), (("a teapot",), True), (prompts[::-1], True), ((*prompts, "a gun"), False)):
        assert holds(company, company.combination(prompts=used)) is good, used


# Forged, replayed, by the wrong people


def put(company: Company, envelope: dict[str, Any]) -> Artifact:
    """An envelope that somebody puts into the registry by hand, with all the edges it could wish for."""
    from qrlora.operations.registry import Link

    added = company.registry.add(canonical_json(envelope), "approval", facts={"type": "approve"})
    for one in (company.composed(company.combination()), company.teapot, company.chalk):
        company.registry.link(one.digest, Link("approved_by", added.digest))
    return added


def forged(company: Company, key: SigningKey, combination: Combination | None = None, **fields: Any) -> dict[str, Any]:
    said = about(company.registry, combination or company.combination(), ONE)
    named = [("base", said["base"]), *(("adapter", one["adapter"]) for one in said["parts"])]
    at = datetime.now(timezone.utc).isoformat()
    return sign(statement(APPROVAL, named, {"decision": "approve", "about": said, "at": at, **fields}), key)


def test_by_hand_it_takes_a_reviewers_key(company: Company) -> None:
    put(company, forged(company, company.keys["grace"]))
    assert holds(company, company.combination())


@pytest.mark.parametrize("who", ["mallory", "ada", "olga"])
def test_a_stranger_an_author_and_an_operator_cannot_forge_one(company: Company, who: str) -> None:
    key = company.keys.get(who) or SigningKey.create(company.folder / "keys", who)
    put(company, forged(company, key))
    assert not holds(company, company.combination())


@pytest.mark.parametrize("field", ["weight", "adapter", "null_space", "policy"])
def test_a_payload_that_was_changed_after_it_was_signed(company: Company, field: str) -> None:
    import base64

    envelope = forged(company, company.keys["grace"], company.combination(null_space=0.1))
    payload = json.loads(base64.b64decode(envelope["payload"]))
    payload["predicate"]["about"] = about(company.registry, company.combination(), ONE)
    payload["predicate"]["note"] = field
    put(company, {**envelope, "payload": base64.b64encode(canonical_json(payload)).decode()})
    standing = find(company.registry, company.combination(), ONE)
    assert not standing.holds and "does not hold" in standing.reasons[0]


def test_one_for_another_combination_is_not_replayed(company: Company) -> None:
    put(company, forged(company, company.keys["grace"], company.combination(null_space=0.1)))
    assert not holds(company, company.combination())


def test_a_statement_of_another_type_is_none(company: Company) -> None:
    said = about(company.registry, company.combination(), ONE)
    predicate = {"decision": "approve", "about": said, "at": datetime.now(timezone.utc).isoformat()}
    named = [("base", said["base"]), *(("adapter", one["adapter"]) for one in said["parts"])]
    put(company, sign(statement("https://example.org/lunch/v1", named, predicate), company.keys["grace"]))
    assert not holds(company, company.combination())


def test_subjects_that_are_not_what_it_is_about(company: Company) -> None:
    said = about(company.registry, company.combination(), ONE)
    predicate = {"decision": "approve", "about": said, "at": datetime.now(timezone.utc).isoformat()}
    put(company, sign(statement(APPROVAL, [("base", said["base"])], predicate), company.keys["grace"]))
    assert not holds(company, company.combination())


@pytest.mark.parametrize("predicate", [{}, {"decision": "approve", "about": 7}, {"decision": "bless", "about": {}}])
def test_no_form_of_ours_is_no_approval_and_no_crash(company: Company, predicate: dict[str, Any]) -> None:
    put(company, sign(statement(APPROVAL, [("base", company.base.digest)], predicate), company.keys["grace"]))
    company.registry.add(b"\xff not JSON", "approval")
    standing = find(company.registry, company.combination(), ONE)
    assert not standing.holds and len(standing.reasons) == 2


def test_bytes_that_were_changed_in_the_store(company: Company) -> None:
    [given] = company.approved(company.combination(), ONE, "grace")
    path = company.registry.path(given)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))
    assert not holds(company, company.combination())


def test_nobody_approves_their_own(company: Company) -> None:
    trust = Trust.load(company.trust_file)
    trust.add("ada", ["author", "reviewer"], SigningKey.create(company.folder / "keys", "ada2").public_pem)
    trust.save(company.trust_file)
    asked = request(company.registry, company.combination(), ONE)
    with pytest.raises(PolicyError, match="nobody approves their own"):
        approve(company.registry, asked.digest, company.keys["ada"], ONE)
    put(company, forged(company, company.keys["ada"]))
    assert "nobody approves their own" in find(company.registry, company.combination(), ONE).reasons[0]


def test_who_asks_does_not_approve(company: Company) -> None:
    company.registry.actor = "Grace"
    asked = request(company.registry, company.combination(), ONE)
    with pytest.raises(PolicyError, match="nobody approves their own"):
        approve(company.registry, asked.digest, company.keys["grace"], ONE)


def test_one_person_with_two_keys_counts_once(company: Company) -> None:
    trust = Trust.load(company.trust_file)
    second = SigningKey.create(company.folder / "keys", "grace2", "ecdsa-p256")
    trust.add("grace", ["reviewer"], second.public_pem)
    trust.save(company.trust_file)
    company.keys["grace again"] = second
    company.approved(company.combination(), TWO, "grace", "grace again")
    standing = find(company.registry, company.combination(), TWO)
    assert standing.people == ("grace",) and not standing.holds
    company.approved(company.combination(), TWO, "linus")
    assert holds(company, company.combination(), TWO)


def test_only_those_whom_the_policy_names(company: Company) -> None:
    policy = Policy.parse({"name": "one", "version": 1, "approval": {"approvers": ["linus"]}})
    asked = request(company.registry, company.combination(), policy)
    with pytest.raises(PolicyError, match="lets linus approve"):
        approve(company.registry, asked.digest, company.keys["grace"], policy)
    approve(company.registry, asked.digest, company.keys["linus"], policy)
    assert holds(company, company.combination(), policy)


# In time


def test_it_ends(company: Company) -> None:
    policy = Policy.parse({"name": "one", "version": 1, "approval": {"days": 10}})
    asked = request(company.registry, company.combination(), policy)
    approve(company.registry, asked.digest, company.keys["grace"], policy, days=3)
    now = datetime.now(timezone.utc)
    assert holds(company, company.combination(), policy, at=now + timedelta(days=2))
    assert not holds(company, company.combination(), policy, at=now + timedelta(days=3, minutes=1))
    # The policy's days count whatever the approval says.
    put(company, forged(company, company.keys["linus"], expires=(now + timedelta(days=999)).isoformat()))
    assert not holds(company, company.combination(), policy, at=now + timedelta(days=11))


def test_one_dated_in_the_future_is_none(company: Company) -> None:
    later = datetime.now(timezone.utc) + timedelta(days=1)
    put(company, forged(company, company.keys["grace"], at=later.isoformat()))
    assert "dated after" in find(company.registry, company.combination(), ONE).reasons[0]


@pytest.mark.parametrize("void_from", ["before", "after", "always"])
def test_a_key_that_was_revoked(company: Company, void_from: str) -> None:
    """One void from a time on: what was signed before counts. Without a time nothing that it signed does."""
    company.approved(company.combination(), ONE, "grace")
    now, trust = datetime.now(timezone.utc), Trust.load(company.trust_file)
    since = {"before": now - timedelta(hours=1), "after": now + timedelta(seconds=1), "always": None}[void_from]
    trust.revoke(company.keys["grace"].key_id, "lost", since=since)
    trust.save(company.trust_file)
    assert holds(company, company.combination()) is (void_from == "after")


@pytest.mark.parametrize(
    "created_at", ["2020-01-01T00:00:00+00:00", "2020-01-01T02:00:00+02:00", "9000-01-01T00:00:00Z"]
)
def test_an_imported_one_counts_as_of_its_import(company: Company, tmp_path: Path, created_at: str) -> None:
    """A bundle says itself when its approvals were made: a thief would say that it was before the key was revoked."""
    theirs, combination = Company(tmp_path / "theirs"), company.combination()
    start, trust = datetime(2019, 1, 1, tzinfo=timezone.utc), Trust.load(company.trust_file)
    stolen = SigningKey.create(company.folder / "keys", "rosa")
    trust.add("rosa", ["reviewer"], stolen.public_pem, valid_from=start)
    trust.revoke(stolen.key_id, "stolen", since=start.replace(year=2021))
    trust.save(company.trust_file)
    put(theirs, envelope := forged(company, stolen, at=start.replace(year=2020).isoformat()))
    digest = digest_of(canonical_json(envelope))
    export_bundle(theirs.registry, [digest], tmp_path / "theirs.tar")

    def dated(manifest: dict[str, Any], _: Any) -> None:
        manifest["artifacts"][0]["created_at"] = created_at

    import_bundle(company.registry, rewritten(tmp_path / "theirs.tar", tmp_path / "bad.tar", dated))
    standing = find(company.registry, combination, ONE)
    assert not standing.holds and "revoked on" in standing.reasons[0]
    assert company.registry.get(digest).created_at <= datetime.now(timezone.utc)
    assert not [fault for fault in verify(company.registry) if "trust.json" not in fault]  # no `qrlora keys` wrote it


def test_a_revoked_approval_and_who_may_revoke(company: Company) -> None:
    [given] = company.approved(company.combination(), ONE, "grace")
    with pytest.raises(PolicyError, match="linus cannot revoke"):
        revoke(company.registry, given.digest, company.keys["linus"], "no")
    with pytest.raises(SignatureError):
        revoke(company.registry, given.digest, SigningKey.create(company.folder, "mallory"), "no")
    revoke(company.registry, given.digest, company.keys["olga"], "withdrawn")
    assert "revoked by olga" in find(company.registry, company.combination(), ONE).reasons[0]
    company.approved(company.combination(), ONE, "grace")  # again
    assert holds(company, company.combination())


def test_a_revocation_by_the_wrong_one_does_not_hide_a_right_one(company: Company) -> None:
    [given] = company.approved(company.combination(), ONE, "grace")
    revoke(company.registry, given.digest, company.keys["grace"], "mine")
    at = datetime.now(timezone.utc).isoformat()
    predicate = {"decision": "revoke", "about": {"approval": given.digest}, "at": at}
    put(company, sign(statement(APPROVAL, [("approval", given.digest)], predicate), company.keys["linus"]))
    assert not holds(company, company.combination())


def test_a_revocation_counts_when_its_key_is_revoked_later(company: Company) -> None:
    [given] = company.approved(company.combination(), ONE, "grace")
    revoke(company.registry, given.digest, company.keys["olga"], "withdrawn")
    trust = Trust.load(company.trust_file)
    trust.revoke(company.keys["olga"].key_id, "left")
    trust.save(company.trust_file)
    assert not holds(company, company.combination())


def test_a_rejection_takes_back_the_own_approval(company: Company) -> None:
    company.approved(company.combination(), ONE, "grace")
    asked = request(company.registry, company.combination(), ONE)
    reject(company.registry, asked.digest, company.keys["grace"], "the handle is wrong")
    assert not holds(company, company.combination())


def test_what_changed_since_it_was_asked_for_is_not_approved(company: Company) -> None:
    asked = request(company.registry, company.combination(), ONE)
    company.measured(company.combination(), "evaluation", {"score": 0.1})
    with pytest.raises(PolicyError, match="not what was asked for"):
        approve(company.registry, asked.digest, company.keys["grace"], ONE)


def test_only_what_is_registered_can_be_approved(company: Company) -> None:
    with pytest.raises(PolicyError, match="no registered base model"):
        request(company.registry, Combination(None, company.combination().parts, 0.5), ONE)


def test_every_decision_is_in_the_audit_log(company: Company) -> None:
    [given] = company.approved(company.combination(), ONE, "grace")
    revoke(company.registry, given.digest, company.keys["grace"], "no")
    actions = [entry.action for entry in company.registry.log()]
    assert [one for one in actions if one in ("approval-request", "approve", "revoke")] == [
        "approval-request",
        "approve",
        "revoke",
    ]
    assert [one.decision for one in decisions(company.registry)] == ["revoke", "approve"]
