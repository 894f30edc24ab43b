"""Ask for approvals, and give, reject and revoke them.

asked = request(registry, combination, policy)
given = approve(registry, asked.digest, SigningKey.load("grace"), policy)
find(registry, combination, policy).holds       # qrlora.operations.policy.decisions
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from qrlora._said import joined, said
from qrlora.errors import PolicyError
from qrlora.operations.policy.combination import Combination, Part, combination_of, same, unfolded
from qrlora.operations.policy.decisions import APPROVAL, REQUEST, about, differences, may_not, read
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.canonical import canonical_json
from qrlora.operations.provenance.dsse import sign, statement
from qrlora.operations.provenance.keys import SigningKey, now
from qrlora.operations.registry import Artifact, Link, Registry
from qrlora.operations.registry.signatures import trust_of


def request(registry: Registry, combination: Combination, policy: Policy | None, note: str = "") -> Artifact:
    """Ask for the approval of a combination; it is registered as a composition if it is none yet.

    Raises:
        PolicyError: its base model or an adapter is not registered.
    """
    from qrlora.operations.registry.intake import add_composition

    combination = unfolded(registry, combination)
    missing = [part.artifact.title for part in combination.parts if not registry.has(part.artifact.digest)]
    if missing or combination.base is None or not registry.has(combination.base.digest):
        raise PolicyError(
            "only what is registered can be approved",
            expected="registered adapters, trained on one registered base model",
            got=said("not registered: %(missing)s", missing=", ".join(missing))
            if missing
            else said("no registered base model"),
            remedy="`qrlora registry add` the adapters and their base model",
        )
    if len(combination.parts) > 1:
        pairs = [(part.artifact, part.weight) for part in combination.parts]
        add_composition(registry, combination.base, pairs, combination.null_space)
    asked = {"type": REQUEST, "by": registry.actor, "note": note, "at": now().isoformat()}
    record = asked | {"about": about(registry, combination, policy)}
    added = registry.add_record(record, "approval", facts={**asked, "title": combination.title})
    registry.audit("approval-request", added.digest, {"title": combination.title, "note": note})
    return added


def open_request(registry: Registry, combination: Combination, policy: Policy | None) -> Artifact | None:
    """Return the newest request for the approval of this very thing, if it was asked for."""
    wanted = about(registry, combination, policy)
    for one in registry.search(kind="approval", fact=("type", REQUEST)):
        if asked(registry, one.digest)["about"] == wanted:
            return one
    return None


def asked(registry: Registry, reference: str) -> dict[str, Any]:
    """Return the record of a request, from its bytes. PolicyError if it is none."""
    artifact = registry.get(reference)
    record = json.loads(registry.read(artifact)) if artifact.kind == "approval" else {}
    if record.get("type") != REQUEST:
        remedy = "`qrlora approval list` shows the requests"
        raise PolicyError(
            said("%(digest)s asks for no approval", digest=artifact.digest[:19]), got=artifact.kind, remedy=remedy
        )
    return record


def combination_asked(registry: Registry, content: Mapping[str, Any]) -> Combination:
    """Return the combination that a request or an approval is about."""
    parts = tuple(Part(registry.get(one["adapter"]), float(one["weight"])) for one in content["parts"])
    prompts = tuple(content["prompts"]["texts"]) if content["prompts"] else ()
    return Combination(registry.get(content["base"]), parts, float(content["null_space"]), prompts)


def approve(
    registry: Registry, reference: str, key: SigningKey, policy: Policy | None, *, days: int | None = None
) -> Artifact:
    """Sign the approval of a request.

    Args:
        policy: that is in force.
        days: after which it ends; never later than the policy says.

    Raises:
        PolicyError: the signer may not approve it, or what was asked for has changed since.
        SignatureError: the key is nobody's whom the registry trusts.
    """
    record = asked(registry, reference)
    combination = combination_asked(registry, record["about"])
    person = trust_of(registry).person_of(key.key_id)
    if why := may_not(registry, combination, policy, person, record["by"]):
        raise PolicyError(
            said("%(name)s cannot approve this", name=person.name), got=why, remedy="ask another reviewer"
        )
    if changes := differences(record["about"], about(registry, combination, policy)):
        raise PolicyError("it is not what was asked for", got=joined(changes), remedy="ask again: approval request")
    rule = policy.approval if policy else None
    allowed = [one for one in (days, rule.days if rule else None) if one]
    until = (now() + timedelta(days=min(allowed))).isoformat() if allowed else None
    return _decide(registry, "approve", record["about"], key, {"expires": until, "asked_by": record["by"]})


def reject(registry: Registry, reference: str, key: SigningKey, reason: str) -> Artifact:
    """Sign the rejection of a request."""
    record = asked(registry, reference)
    trust_of(registry).person_of(key.key_id)
    return _decide(registry, "reject", record["about"], key, {"reason": reason})


def revoke(registry: Registry, reference: str, key: SigningKey, reason: str) -> Artifact:
    """Sign the revocation of an approval: by who gave it, or by an operator."""
    artifact, trust = registry.get(reference), trust_of(registry)
    given, person = read(registry, artifact, trust), trust.person_of(key.key_id)
    if given.decision != "approve":
        raise PolicyError(f"{artifact.digest[:19]} is no approval", got=given.fault or given.decision)
    if "operator" not in person.roles and (given.person is None or given.person.name != person.name):
        expected = f"an operator, or {given.person.name if given.person else 'who gave it'}"
        raise PolicyError(f"{person.name} cannot revoke it", expected=expected, got=", ".join(person.roles))
    return _decide(registry, "revoke", {"approval": artifact.digest}, key, {"reason": reason})


def _decide(
    registry: Registry, decision: str, content: Mapping[str, Any], key: SigningKey, more: Mapping[str, Any]
) -> Artifact:
    predicate = {"decision": decision, "about": dict(content), "at": now().isoformat(), **more}
    named = [("approval", content["approval"])] if decision == "revoke" else [("base", content["base"])]
    named += [("adapter", one["adapter"]) for one in content.get("parts", ())]
    envelope = sign(statement(APPROVAL, named, predicate), key)
    facts = {"type": decision, "key": key.key_id, "about": dict(content), **more}
    links = (
        [Link("governed_by", content["policy"])] if content.get("policy") and registry.has(content["policy"]) else []
    )
    added = registry.add(canonical_json(envelope), "approval", filename="approval.json", facts=facts, links=links)
    if decision == "approve":
        for one in same(registry, combination_asked(registry, content)):
            registry.link(one.digest, Link("approved_by", added.digest))
    registry.audit(decision, content.get("approval") or added.digest, {"approval": added.digest, "key": key.key_id})
    return added


def refers(registry: Registry, reference: str) -> Combination:
    """Return the combination of a request, an approval, a composition or an adapter."""
    artifact = registry.get(reference)
    if artifact.kind != "approval":
        return combination_of(registry, artifact.digest)
    if artifact.facts.get("type") == REQUEST:
        return combination_asked(registry, asked(registry, reference)["about"])
    given = read(registry, artifact, trust_of(registry))
    if "parts" not in given.about:
        raise PolicyError(f"{artifact.digest[:19]} is about no combination", got=given.fault or given.decision)
    return combination_asked(registry, given.about)
