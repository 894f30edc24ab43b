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
        fault: why it counts for nothing, whatever it is asked for; empty if it may count.
    """

    digest: str
    decision: str
    about: Mapping[str, Any]
    person: Person | None
    at: datetime
    expires: datetime | None
    fault: str = ""


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
    reasons: tuple[str, ...] = field(default=())
    expires: datetime | None = None

    @property
    def holds(self) -> bool:
        return len(self.people) >= self.needed

    def finding(self, title: str) -> Finding:
        """Return it as the finding of a rule."""
        got = f"{title} is approved by {', '.join(self.people) or 'nobody'}"
        got += f" ({'; '.join(self.reasons[:3])})" if self.reasons and not self.holds else ""
        remedy = "`qrlora approval request`, then a reviewer: `qrlora approval approve`"
        return Finding("approval", self.holds, got, f"{self.needed} valid approval(s) by different people", remedy)


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

    The key has to be valid when the audit log has the decision: `created_at` of an imported one is its sender's word.
    """
    try:
        added = registry.added_at(artifact.digest)
        envelope = read_envelope(registry.read(artifact))
        try:
            found, people = verify(envelope, trust, at=added, predicate_type=APPROVAL)
            fault = ""
        except SignatureError as error:
            found, people = verify(envelope, _AnyTime(trust.people.values()), predicate_type=APPROVAL)
            fault = _said(error)
        given = _given(artifact, found["predicate"], people[0])
    except (QrloraError, KeyError, TypeError, ValueError, IndexError) as error:
        why = _said(error) if isinstance(error, QrloraError) else f"it has no form of ours ({type(error).__name__})"
        return Given(artifact.digest, "", {}, None, artifact.created_at, None, why)
    said = given.about
    meant = {said["approval"]} if "approval" in said else {said["base"], *(one["adapter"] for one in said["parts"])}
    faults = [fault]
    faults += ["its subjects are not what it is about"] if set(subjects_of(found)) != meant else []
    faults += ["it is signed by several people: each signs an approval of their own"] if len(people) != 1 else []
    late = given.at > added + CLOCKS
    faults += [f"it is dated after it came into the registry: {given.at.isoformat()}"] if late else []
    faults += [f"deprecated: {artifact.deprecated}"] if artifact.deprecated else []
    return replace(given, fault="; ".join(one for one in faults if one))


def _given(artifact: Artifact, predicate: Mapping[str, Any], person: Person) -> Given:
    """Return the decision in a predicate; raise KeyError, TypeError or ValueError for another form."""
    decision, said = predicate["decision"], predicate["about"]
    if decision == "revoke":
        str(said["approval"])
    elif decision in ("approve", "reject"):
        [(one["adapter"], one["weight"]) for one in said["parts"]]
        str(said["base"])
    else:
        raise ValueError(decision)
    ends = _time(predicate["expires"]) if predicate.get("expires") else None
    return Given(artifact.digest, decision, said, person, _time(predicate["at"]), ends)


def _said(error: QrloraError) -> str:
    return f"{error.what} ({error.got})" if error.got else error.what


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
    return replace(given, fault=given.fault or f"revoked by {allowed[0]}") if allowed else given


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
    current, holding, reasons = about(registry, combination, policy), dict[str, Given](), list[str]()
    rejected: set[str] = set()
    for one in given:  # newest first
        if one.decision == "revoke" or not _concerns(one, current):
            continue
        name = one.person.name if one.person else ""
        why: str | None = one.fault or "; ".join(differences(one.about, current))
        if not why and one.decision == "reject":
            rejected.add(name)
        why = why or _at_fault(registry, one, combination, policy, at, rejected)
        if why:
            reasons.append(f"{one.decision or 'a decision'} {one.digest[7:15]} by {name or 'nobody known'}: {why}")
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
) -> str | None:
    """Return why the decision is no approval that holds now; None if it is one."""
    if one.decision != "approve" or one.person is None:
        return "it is a rejection"
    if one.person.name in rejected:
        return f"{one.person.name} has rejected it since"
    end = _end(one, policy)
    if end and at >= end:
        return f"it ended on {end.date()}"
    return may_not(registry, combination, policy, one.person)


def may_not(
    registry: Registry, combination: Combination, policy: Policy | None, person: Person, asked_by: str = ""
) -> str | None:
    """Return why a person may not approve this; None if they may."""
    allowed = policy.approval.approvers if policy and policy.approval else ()
    if "reviewer" not in person.roles:
        return f"{person.name} is {', '.join(person.roles)}, not a reviewer"
    if allowed and person.name not in allowed:
        return f"the policy lets {', '.join(allowed)} approve, not {person.name}"
    if person.name.casefold() in {name.casefold() for name in (*authors(registry, combination), asked_by)}:
        return f"{person.name} trained, composed, signed or asked for it, and nobody approves their own"
    return None


def authors(registry: Registry, combination: Combination) -> Iterator[str]:
    """Yield who trained or composed it: who registered its adapters and compositions, and who signed them."""
    adapters = [part.artifact for part in (*combination.parts, *leaves(registry, combination.parts))]
    for one in adapters:
        yield one.created_by
        yield from signers_of(registry, one)[0]
    for one in same(registry, combination):
        yield one.created_by


def differences(said: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return what of a combination is not as it was approved, a clause each."""
    found = []
    for name in ("base", "basis", "null_space", "policy", "report"):
        if said.get(name) != current[name]:
            found.append(
                f"{name.replace('null_space', 'null-space strength')} is {_short(current[name])}, approved was "
                f"{_short(said.get(name))}"
            )
    approved, used = (sorted((one["adapter"], one["weight"]) for one in side["parts"]) for side in (said, current))
    if approved != used:
        if [one for one, _ in approved] != [one for one, _ in used]:
            names = [", ".join(_short(one) for one, _ in side) or "none" for side in (used, approved)]
            found.append(f"adapters are {names[0]}, approved were {names[1]}")
        else:
            pairs = zip(used, approved, strict=True)
            changes = [f"{_short(one)} is {got}, approved was {was}" for (one, got), (_, was) in pairs if got != was]
            found.append(f"weight of {'; of '.join(changes)}")
    return found + _other_prompts(said.get("prompts"), current["prompts"])


def _other_prompts(said: Mapping[str, Any] | None, current: Mapping[str, Any] | None) -> list[str]:
    if said is None:
        return []
    if prompts_digest(said["texts"]) != said["digest"]:
        return ["its prompts are not those of their digest"]
    if current is None:
        return ["approved were named prompts alone, and none is named"]
    others = [text for text in current["texts"] if text not in said["texts"]]
    return [f"the prompt {others[0][:100]!r} is none of the {len(said['texts'])} approved"] if others else []


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)[:80] or "none"
    return text[:19] if text.startswith("sha256:") else text


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
