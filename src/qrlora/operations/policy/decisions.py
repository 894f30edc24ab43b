"""Read decisions about a combination, approvals, rejections and revocations, from their signed bytes.

An approval is about one combination, its prompts, the policy and the report. Change one, and it is void.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Any

from qrlora._said import Said, joined, said, verbatim
from qrlora.errors import QrloraError, RegistryError, SignatureError
from qrlora.operations.policy.combination import Combination, leaves, reports, same, unfolded
from qrlora.operations.policy.findings import Finding, signers_of
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.canonical import canonical_json, digest_of
from qrlora.operations.provenance.dsse import read_envelope, subjects_of, verify
from qrlora.operations.provenance.keys import Person, Trust, now
from qrlora.operations.registry import Artifact, Registry
from qrlora.operations.registry.signatures import trust_of

APPROVAL = "urn:qrlora:approval:v1"
"""Predicate type of what is decided about a combination, and of the revocation of an approval."""
REQUEST = "approval-request"
NEVER = datetime.max.replace(tzinfo=timezone.utc)
CLOCKS = timedelta(minutes=5)
"""Time that a signer's clock may be ahead of the registry's."""


class _AnyTime(Trust):
    """Keys in any state: a revocation still counts when the key that signed it is revoked later."""

    def person_of(self, key_id: str, at: datetime | None = None) -> Person:
        key = self.key(key_id)
        return next(person for person in self.people.values() if key in person.keys)


@dataclass(frozen=True)
class Given:
    """An approval, rejection or revocation as it was signed.

    Attributes:
        digest: of its artifact.
        decision: approve, reject or revoke; "" if its signature does not hold.
        about: what it is about: digests, weights, strength, prompts, policy, report; of a revocation, the approval.
        person: who signed it.
        at, expires: when it was given, and when it ends.
        fault: why it counts for nothing, whatever it is asked for; None if it may count.
    """

    digest: str
    decision: str
    about: Mapping[str, Any]
    person: Person | None
    at: datetime
    expires: datetime | None
    fault: Said | None = None


@dataclass(frozen=True)
class Standing:
    """The approvals of a combination.

    Attributes:
        people: each once, whose approval holds.
        needed: how many the policy asks for.
        given: the approvals that hold.
        reasons: why others do not, a sentence each.
        expires: when fewer than are needed will be left; None if never.
    """

    people: tuple[str, ...]
    needed: int
    given: tuple[Given, ...] = ()
    reasons: tuple[Said, ...] = field(default=())
    expires: datetime | None = None

    @property
    def holds(self) -> bool:
        return len(self.people) >= self.needed

    def finding(self, title: str) -> Finding:
        """Return it as the finding of a rule."""
        got = said("%(title)s is approved by %(people)s", title=title, people=", ".join(self.people) or said("nobody"))
        if self.reasons and not self.holds:
            got = said("%(what)s (%(got)s)", what=got, got=joined(self.reasons[:3]))
        expected = said("%(count)s valid approval(s) by different people", count=self.needed)
        remedy = said("`qrlora approval request`, then a reviewer: `qrlora approval approve`")
        return Finding("approval", self.holds, got, expected, remedy)


def prompts_digest(prompts: Sequence[str]) -> str:
    """Return the digest of a set of prompts."""
    return digest_of(canonical_json(sorted(set(prompts))))


def about(registry: Registry, combination: Combination, policy: Policy | None) -> dict[str, Any]:
    """Return what an approval of this combination is about, as things are now; its prompts are None if it has none."""
    combination = unfolded(registry, combination)
    newest = next(iter(reports(registry, combination)), None)
    if newest and newest.stored:
        registry.path(newest)  # hashed again: RegistryError if the report was changed
    texts = sorted(set(combination.prompts))
    return {
        **combination.what,
        "prompts": {"digest": prompts_digest(texts), "texts": texts} if texts else None,
        "policy": policy.digest if policy else None,
        "report": newest.digest if newest else None,
    }


def read(registry: Registry, artifact: Artifact, trust: Trust) -> Given:
    """Return a decision from its bytes, hashed again, its signature verified. What is wrong stands in `fault`.

    The key has to be valid at the time that the audit log has: `created_at` of an imported decision is only a claim.
    """
    try:
        added = registry.added_at(artifact.digest)
        envelope = read_envelope(registry.read(artifact))
        try:
            found, people = verify(envelope, trust, at=added, predicate_type=APPROVAL)
            faults = list[Said]()
        except SignatureError as error:
            found, people = verify(envelope, _AnyTime(trust.people.values()), predicate_type=APPROVAL)
            faults = [_told(error)]
        given = _given(artifact, found["predicate"], people[0])
    except (QrloraError, KeyError, TypeError, ValueError, IndexError) as error:
        form = said("it has no form of ours (%(error)s)", error=type(error).__name__)
        why = _told(error) if isinstance(error, QrloraError) else form
        return Given(artifact.digest, "", {}, None, artifact.created_at, None, why)
    named = given.about
    meant = {named["approval"]} if "approval" in named else {named["base"], *(one["adapter"] for one in named["parts"])}
    if set(subjects_of(found)) != meant:
        faults.append(said("its subjects are not what it is about"))
    if len(people) != 1:
        faults.append(said("it is signed by several people: each signs an approval of their own"))
    if given.at > added + CLOCKS:
        faults.append(said("it is dated after it came into the registry: %(at)s", at=given.at.isoformat()))
    if artifact.deprecated:
        faults.append(said("deprecated: %(reason)s", reason=artifact.deprecated))
    return replace(given, fault=joined(faults) if faults else None)


def _given(artifact: Artifact, predicate: Mapping[str, Any], person: Person) -> Given:
    """Return the decision in a predicate; raise KeyError, TypeError or ValueError for another form."""
    decision, content = predicate["decision"], predicate["about"]
    if decision == "revoke":
        str(content["approval"])
    elif decision in ("approve", "reject"):
        [(one["adapter"], one["weight"]) for one in content["parts"]]
        str(content["base"])
    else:
        raise ValueError(decision)
    ends = _time(predicate["expires"]) if predicate.get("expires") else None
    return Given(artifact.digest, decision, content, person, _time(predicate["at"]), ends)


def _told(error: QrloraError) -> Said:
    return said("%(what)s (%(got)s)", what=error.what, got=error.got) if error.got else verbatim(error.what)


def type_of(data: bytes) -> str:
    """Return what an artifact of the kind approval is by its bytes: a request, or the predicate type that is signed."""
    try:
        record = json.loads(data)
        if "payload" not in record:
            return str(record["type"])
        return str(json.loads(base64.b64decode(record["payload"]))["predicateType"])
    except (KeyError, TypeError, ValueError, binascii.Error):
        return ""


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError("a time without a zone")
    return found


def decisions(registry: Registry) -> list[Given]:
    """Return every approval, rejection and revocation, those signed last first; a revoked one has that as its fault.

    All of the kind are read, by their bytes: facts and edges might be changed.
    """
    trust, given = trust_of(registry), list[Given]()
    for one in registry.search(kind="approval", deprecated=True, limit=1_000_000):
        try:
            kind = type_of(registry.read(one))
        except RegistryError:  # damaged: `read` says so
            kind = ""
        if kind in (APPROVAL, ""):
            given.append(read(registry, one, trust))
    by: dict[str, list[Person]] = {}
    for each in given:
        if each.decision == "revoke" and each.person:
            by.setdefault(str(each.about["approval"]), []).append(each.person)
    found = [_revoked(each, by.get(each.digest, ())) for each in given]
    return sorted(found, key=lambda each: each.at, reverse=True)


def _revoked(given: Given, by: Sequence[Person]) -> Given:
    own = given.person.name if given.person else ""
    allowed = [person.name for person in by if person.name == own or "operator" in person.roles]
    return replace(given, fault=given.fault or said("revoked by %(name)s", name=allowed[0])) if allowed else given


def find(
    registry: Registry,
    combination: Combination,
    policy: Policy | None,
    *,
    at: datetime | None = None,
    given: Sequence[Given] | None = None,
) -> Standing:
    """Return who has approved a combination as it is now.

    Args:
        given: `decisions(registry)`, if they are at hand.
    """
    combination, at = unfolded(registry, combination), at or now()
    given = decisions(registry) if given is None else given
    current, holding, reasons = about(registry, combination, policy), dict[str, Given](), list[Said]()
    rejected: set[str] = set()
    for one in given:  # newest first
        if one.decision == "revoke" or not _concerns(one, current):
            continue
        name = one.person.name if one.person else ""
        others = () if one.fault else differences(one.about, current)
        why = one.fault or (joined(others) if others else None)
        if not why and one.decision == "reject":
            rejected.add(name)
        why = why or _at_fault(registry, one, combination, policy, at, rejected)
        if why:
            facts = {"what": one.decision or said("a decision"), "name": name or said("nobody known"), "why": why}
            reasons.append(said("%(what)s %(digest)s by %(name)s: %(why)s", digest=one.digest[7:15], **facts))
        elif name not in holding or (_end(one, policy) or NEVER) > (_end(holding[name], policy) or NEVER):
            holding[name] = one
    needed = policy.approval.needed if policy and policy.approval else 1
    ends = sorted((_end(one, policy) or NEVER for one in holding.values()), reverse=True)
    until = ends[needed - 1] if len(holding) >= needed else None
    return Standing(tuple(holding), needed, tuple(holding.values()), tuple(reasons), until)


def _concerns(one: Given, current: Mapping[str, Any]) -> bool:
    """Return True for a decision about any of these adapters, and for one that cannot be read."""
    if not one.decision:
        return True
    mine = {part["adapter"] for part in current["parts"]}
    theirs = {part["adapter"] for part in one.about["parts"]}
    return bool(mine & theirs) or mine == theirs


def _end(one: Given, policy: Policy | None) -> datetime | None:
    days = policy.approval.days if policy and policy.approval else None
    ends = [end for end in (one.expires, one.at + timedelta(days=days) if days else None) if end]
    return min(ends, default=None)


def _at_fault(
    registry: Registry, one: Given, combination: Combination, policy: Policy | None, at: datetime, rejected: set[str]
) -> Said | None:
    """Return why the decision is no approval that holds now; None if it is one."""
    if one.decision != "approve" or one.person is None:
        return said("it is a rejection")
    if one.person.name in rejected:
        return said("%(name)s has rejected it since", name=one.person.name)
    end = _end(one, policy)
    if end and at >= end:
        return said("it ended on %(day)s", day=end.date())
    return may_not(registry, combination, policy, one.person)


def may_not(
    registry: Registry, combination: Combination, policy: Policy | None, person: Person, asked_by: str = ""
) -> Said | None:
    """Return why a person may not approve this; None if they may."""
    allowed = policy.approval.approvers if policy and policy.approval else ()
    if "reviewer" not in person.roles:
        return said("%(name)s is %(roles)s, not a reviewer", name=person.name, roles=", ".join(person.roles))
    if allowed and person.name not in allowed:
        return said("the policy lets %(people)s approve, not %(name)s", people=", ".join(allowed), name=person.name)
    if person.name.casefold() in {name.casefold() for name in (*authors(registry, combination), asked_by)}:
        return said(
            "%(name)s trained, composed, signed or asked for it, and nobody approves their own", name=person.name
        )
    return None


def authors(registry: Registry, combination: Combination) -> Iterator[str]:
    """Yield who trained or composed it: who registered its adapters and compositions, and who signed them."""
    adapters = [part.artifact for part in (*combination.parts, *leaves(registry, combination.parts))]
    for one in adapters:
        yield one.created_by
        yield from signers_of(registry, one)[0]
    for one in same(registry, combination):
        yield one.created_by


def differences(approved: Mapping[str, Any], current: Mapping[str, Any]) -> list[Said]:
    """Return what of a combination is not as it was approved, a clause each."""
    titles = {
        "base": said("base"),
        "basis": said("basis"),
        "null_space": said("null-space strength"),
        "policy": said("policy"),
        "report": said("report"),
    }
    found = [
        _changed(what, current[name], approved.get(name))
        for name, what in titles.items()
        if approved.get(name) != current[name]
    ]
    then, used = (sorted((one["adapter"], one["weight"]) for one in side["parts"]) for side in (approved, current))
    if [one for one, _ in then] != [one for one, _ in used]:
        named = [", ".join(_short(one) for one, _ in side) or said("none") for side in (used, then)]
        found.append(said("adapters are %(now)s, approved were %(was)s", now=named[0], was=named[1]))
    else:
        pairs = zip(used, then, strict=True)
        found += [
            _changed(said("weight of %(adapter)s", adapter=_short(one)), got, was)
            for (one, got), (_, was) in pairs
            if got != was
        ]
    return found + _other_prompts(approved.get("prompts"), current["prompts"])


def _changed(what: Said, current: Any, approved: Any) -> Said:
    facts = {"what": what, "now": _short(current), "was": _short(approved)}
    return said("%(what)s is %(now)s, approved was %(was)s", **facts)


def _other_prompts(approved: Mapping[str, Any] | None, current: Mapping[str, Any] | None) -> list[Said]:
    if approved is None:
        return []
    if prompts_digest(approved["texts"]) != approved["digest"]:
        return [said("its prompts are not those of their digest")]
    if current is None:
        return [said("approved were named prompts alone, and none is named")]
    others = [text for text in current["texts"] if text not in approved["texts"]]
    facts = {"prompt": repr(others[0][:100]), "count": len(approved["texts"])} if others else {}
    return [said("the prompt %(prompt)s is none of the %(count)s approved", **facts)] if others else []


def _short(value: Any) -> Said:
    text = "" if value is None else str(value)[:80]
    return verbatim(text[:19] if text.startswith("sha256:") else text) if text else said("none")


def listing(registry: Registry) -> list[str]:
    """Return a line for every request and decision, newest first."""
    lines = [(one.at, _line(registry, one)) for one in decisions(registry)]
    for one in registry.search(kind="approval", deprecated=True, limit=1_000_000):
        if type_of(registry.read(one)) == REQUEST:
            lines.append((one.created_at, f"{one.digest[:19]}  request  by {one.facts['by']}: {one.facts['title']}"))
    return [line for _, line in sorted(lines, key=lambda each: each[0], reverse=True)]


def _line(registry: Registry, one: Given) -> str:
    parts = one.about.get("parts", ())
    known = [each for each in parts if registry.has(each["adapter"])]
    titles = [f"{registry.get(each['adapter']).title} x {each['weight']}" for each in known]
    what = " + ".join(titles) or str(one.about.get("approval", ""))[:19]
    who = one.person.name if one.person else "nobody known"
    return f"{one.digest[:19]}  {one.decision or '?'}  by {who}: {what}" + (f" ({one.fault})" if one.fault else "")
