"""Decide whether a policy permits an action on a combination, and find the policy in force in a registry.

verdict = check(policy, combination, "serve", registry=registry)
verdict.permitted, [finding.line() for finding in verdict.findings]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from qrlora._said import joined, said, verbatim
from qrlora.errors import PolicyError, QrloraError, SignatureError
from qrlora.operations.policy.combination import Combination
from qrlora.operations.policy.decisions import Given, find, type_of
from qrlora.operations.policy.findings import Case, Finding, findings
from qrlora.operations.policy.rules import ACTIONS, Policy
from qrlora.operations.provenance.canonical import canonical_json
from qrlora.operations.provenance.dsse import read_envelope, sign, statement, subjects_of, verify
from qrlora.operations.provenance.keys import SigningKey, now
from qrlora.operations.registry import Artifact, Link, Registry
from qrlora.operations.registry.signatures import trust_of

NAME, ALIAS = "policy", "active"
ACTIVATION = "urn:qrlora:policy-activation:v1"
"""Predicate type of an operator's statement that a policy replaces one of a higher version."""


@dataclass(frozen=True)
class Verdict:
    """The findings of all rules on an action."""

    action: str
    title: str
    findings: tuple[Finding, ...]
    until: datetime | None = None
    """The end of the approval that it rests on."""

    @property
    def permitted(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def refusals(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.passed]


def check(
    policy: Policy | None,
    combination: Combination,
    action: str,
    *,
    registry: Registry | None,
    approval: bool = False,
    at: datetime | None = None,
    given: Sequence[Given] | None = None,
) -> Verdict:
    """Apply a policy to an action: compose, generate, serve, export or catalog.

    Args:
        policy: None if there is none; then only `approval` is checked.
        approval: ask for an approval although the policy does not.
        at: time of the action; now if None.
        given: `decisions(registry)`, if they are at hand.
    """
    if action not in ACTIONS:
        raise PolicyError(f"no such action: {action!r}", expected=" or ".join(ACTIONS))
    found = findings(Case.of(policy, combination, action, registry, at)) if policy else []
    if not approval and not (policy and policy.approval and action in policy.approval.actions):
        return Verdict(action, combination.title, tuple(found))
    approved, until = _approved(policy, combination, registry, at, given)
    return Verdict(action, combination.title, (*found, approved), until)


def _approved(
    policy: Policy | None,
    combination: Combination,
    registry: Registry | None,
    at: datetime | None,
    given: Sequence[Given] | None,
) -> tuple[Finding, datetime | None]:
    """Return the finding on approvals, and when they end."""
    if registry is None:
        got, remedy = said("no registry is in play"), said("name it with --registry")
        return Finding("approval", False, got, said("approvals in a registry"), remedy), None
    try:
        standing = find(registry, combination, policy, at=at, given=given)
        return standing.finding(combination.title), standing.expires
    except QrloraError as error:
        got = said("%(what)s (%(got)s)", what=error.what, got=error.got)
        remedy = verbatim(error.remedy or "`qrlora registry verify`")
        return Finding("approval", False, got, said("approvals that can be read"), remedy), None


def enforce(verdicts: Sequence[Verdict], registry: Registry | None) -> None:
    """Raise PolicyError, and write it into the audit log, unless all verdicts permit the action."""
    refused = [verdict for verdict in verdicts if not verdict.permitted]
    if not refused:
        return
    lines = list(dict.fromkeys(finding.line() for verdict in refused for finding in verdict.refusals))
    first = refused[0]
    if registry:
        rules = sorted({finding.rule for verdict in refused for finding in verdict.refusals})
        registry.audit("refused", first.action, {"what": first.title, "rules": rules})
    what = said("%(action)s is not permitted: %(title)s", action=first.action, title=first.title)
    raise PolicyError(what, got=said("\n    %(findings)s", findings=joined(lines, "\n    ")))


def in_force(registry: Registry) -> Policy | None:
    """Return the policy that is in force in a registry; None if none ever was.

    Raises:
        PolicyError: its alias or artifact was removed; the alias points elsewhere than the audit log says; or it
            replaced a policy of the same or a higher version without an operator's signature.
    """
    moves = [move for move in registry.moves(NAME) if move.alias == ALIAS]
    if not moves:
        return None
    try:
        current = registry.get(f"{NAME}@{ALIAS}")
    except QrloraError as error:
        remedy = "activate one: `qrlora policy activate FILE`"
        raise PolicyError("the policy in force was taken away", got=error.what, remedy=remedy) from error
    if moves[-1].digest != current.digest:
        expected, got = moves[-1].digest[:19], current.digest[:19]
        remedy = "`qrlora registry verify` says what was changed; `qrlora policy activate TOML` brings one into force"
        raise PolicyError(
            said("no command pointed %(name)s@%(alias)s at this policy", name=NAME, alias=ALIAS),
            expected=expected,
            got=got,
            remedy=remedy,
        )
    policy = _read(registry, current)
    for digest in dict.fromkeys(move.digest for move in moves if move.digest not in ("", current.digest)):
        before = _read(registry, registry.get(digest))
        if before.version >= policy.version and not _signed(registry, current.digest, digest):
            raise PolicyError(
                "a policy was replaced by one that is not newer",
                expected=said("a version above %(version)s, or an operator's signature", version=before.version),
                got=policy.title,
                remedy="activate the newer one, or let an operator type `qrlora policy activate TOML --key NAME`",
            )
    return policy


def _read(registry: Registry, artifact: Artifact) -> Policy:
    """Read a policy from its bytes, hashed again."""
    if artifact.kind != "policy":
        raise PolicyError(
            said("%(name)s@%(alias)s is no policy", name=NAME, alias=ALIAS),
            got=artifact.kind,
            remedy="`qrlora policy activate FILE`",
        )
    return Policy.parse(json.loads(registry.read(artifact)))


def activate(registry: Registry, policy: Policy, key: SigningKey | None = None, reason: str = "") -> Artifact:
    """Bring a policy into force. One that is not newer than all before needs the signature of an operator.

    Raises:
        PolicyError: it is not newer, and `key` is None or not an operator's.
    """
    before = {move.digest for move in registry.moves(NAME) if move.alias == ALIAS and move.digest}
    older = [
        digest for digest in before - {policy.digest} if _read(registry, registry.get(digest)).version >= policy.version
    ]
    trust = trust_of(registry)
    if older and (key is None or "operator" not in trust.person_of(key.key_id).roles):
        versions = [_read(registry, registry.get(digest)).version for digest in older]
        raise PolicyError(
            "a policy that is not newer than those before",
            expected=f"a version above {max(versions)}, or the signature of an operator",
            got=policy.title,
            remedy="raise its version, or let an operator do it: `qrlora policy activate TOML --key NAME`",
        )
    added = registry.add_record(policy.record, "policy", name=NAME, filename="policy.json")
    if older and key:
        predicate = {"version": policy.version, "replaces": sorted(older), "reason": reason, "at": now().isoformat()}
        envelope = sign(statement(ACTIVATION, [(policy.title, added.digest)], predicate), key)
        facts = {"type": "activation", "key": key.key_id}
        registry.add(canonical_json(envelope), "approval", facts=facts, links=[Link("governed_by", added.digest)])
    registry.set_alias(NAME, ALIAS, added.digest, reason=reason, protect=True, force=True)
    registry.audit("activate", added.digest, {"policy": policy.title, "digest": policy.digest, "reason": reason})
    return added


def _signed(registry: Registry, policy: str, replaced: str) -> bool:
    """Return True if an operator signed that this policy replaces that one."""
    trust = trust_of(registry)
    for edge in registry.edges(policy, into=True, relation="governed_by"):
        artifact = registry.get(edge.source)
        data = registry.read(artifact)
        if artifact.kind != "approval" or type_of(data) != ACTIVATION:
            continue
        try:
            at = registry.added_at(artifact.digest)
            found, people = verify(read_envelope(data), trust, at=at, predicate_type=ACTIVATION)
        except SignatureError:
            continue
        replaces: Any = found["predicate"].get("replaces")
        operators = [one for one in people if "operator" in one.roles]
        if operators and subjects_of(found) == [policy] and isinstance(replaces, list) and replaced in replaces:
            return True
    return False
