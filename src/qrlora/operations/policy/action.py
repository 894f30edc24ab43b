"""Check an action on adapter files by the policies in force and the approvals of a registry.

rules = Rules.of(registry, policy_file=None, approval=False)
rules.enforce("compose", combination_of_files(registry, parts, null_space=0.5))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrlora.operations.policy.check import Verdict, check, enforce, in_force
from qrlora.operations.policy.combination import Combination, Part, base_of, unfolded
from qrlora.operations.policy.decisions import Given
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.canonical import canonical_json, digest_of, file_digest
from qrlora.operations.provenance.keys import now
from qrlora.operations.registry import Artifact, Registry

if TYPE_CHECKING:
    from qrlora.method.adapter import Adapter

FACTS = ("role", "trigger", "licence", "base_model", "basis_fingerprint")


@dataclass(frozen=True)
class Source:
    """An adapter as it was read.

    Attributes:
        title: what a person calls it.
        digest: of its file.
        content: digest of what is in it, the same in every spelling of the file.
        facts: `FACTS`, of its own metadata.
    """

    title: str
    digest: str
    content: str
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, path: Path, adapter: Adapter) -> Source:
        """Return the adapter that was read from this file."""
        facts = {name: getattr(adapter.metadata, name) for name in FACTS}
        return cls(path.name, file_digest(path), adapter.digest, facts)


@dataclass(frozen=True)
class Rules:
    """Policies, each of which has to permit an action. approval: require an approval even if no policy does."""

    registry: Registry | None
    policies: tuple[Policy, ...]
    approval: bool

    @classmethod
    def of(cls, registry: Registry | None, policy_file: Path | None, approval: bool = False) -> Rules:
        """Return the rules in force: the registry's policy, and that of the file. PolicyError if one cannot be read."""
        active = in_force(registry) if registry else None
        given = Policy.load(policy_file) if policy_file else None
        policies = [one for one in (active, given) if one]
        return cls(registry, tuple({one.digest: one for one in policies}.values()), approval)

    @property
    def empty(self) -> bool:
        """Return True if there is no policy and no approval is required."""
        return not self.policies and not self.approval

    def verdicts(
        self,
        action: str,
        combination: Combination,
        at: datetime | None = None,
        given: Sequence[Given] | None = None,
    ) -> list[Verdict]:
        """Check an action by every policy. Approvals name the registry's policy, else the file's.

        given: as `check`.
        """
        first, *others = self.policies or (None,)
        common: dict[str, Any] = {"registry": self.registry, "at": at, "given": given}
        found = [check(first, combination, action, approval=self.approval, **common)]
        return found + [check(one, combination, action, **common) for one in others]

    def enforce(self, action: str, combination: Combination) -> None:
        """Raise PolicyError, and write it into the audit log, unless the action is permitted."""
        enforce(self.verdicts(action, combination), self.registry)


def artifact_of(registry: Registry | None, source: Source) -> Artifact:
    """Return the registered artifact with the digest of this file or content; else one made of the file's metadata."""
    if registry and registry.has(source.digest):
        return registry.get(source.digest)
    if registry and source.content:
        for found in registry.search(kind="adapter", fact=("content", source.content), deprecated=True)[-1:]:
            return found
    known: dict[str, Any] = {name: str(source.facts.get(name) or "") for name in ("role", "licence")}
    known |= {"owner": "", "created_by": "", "created_at": now(), "facts": dict(source.facts)}
    return Artifact(source.digest, "adapter", 0, source.title, False, **known)


def combination_of_files(
    registry: Registry | None,
    parts: Sequence[tuple[Source, float]],
    null_space: float,
    prompts: Sequence[str] = (),
    base: Artifact | None = None,
) -> Combination:
    """Return the combination of adapters that were read.

    Args:
        base: the model that is used; that on which they were trained if None.
    """
    adapters = tuple(Part(artifact_of(registry, source), weight) for source, weight in parts)
    if registry is None:
        return Combination(None, adapters, null_space, tuple(prompts))
    base = base or base_of(registry, [part.artifact for part in adapters if registry.has(part.artifact.digest)])
    return unfolded(registry, Combination(base, adapters, null_space, tuple(prompts)))


def base_in_use(registry: Registry, model: str) -> Artifact | None:
    """Return the registered base model whose files this model's are, all of them hashed; None if there is none."""
    from qrlora.operations.registry.bases import base_record

    digest = digest_of(canonical_json(base_record(model)))
    return registry.get(digest) if registry.has(digest) else None
