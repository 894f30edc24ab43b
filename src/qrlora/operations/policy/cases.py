"""Test a policy: combinations described in TOML, without any files, and the rules that should refuse them.

[[case]]
name = "a style of somebody else's"
action = "serve"
refused_by = ["combine.owners"]
adapter = [{ name = "chalk", role = "style", owner = "rival", licence = "MIT", weight = 0.8 }]
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qrlora.errors import PolicyError
from qrlora.operations.policy.check import Verdict
from qrlora.operations.policy.combination import Combination, Part
from qrlora.operations.policy.findings import Case, findings
from qrlora.operations.policy.rules import Action, Policy, Use
from qrlora.operations.provenance.canonical import digest_of
from qrlora.operations.registry import Artifact


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Thing(_Described):
    """An adapter or base model as a case describes it."""

    name: str
    role: str = ""
    owner: str = ""
    licence: str = ""
    trigger: str = ""
    tags: tuple[str, ...] = ()
    deprecated: str = ""
    weight: float = 1.0

    def artifact(self, kind: str) -> Artifact:
        """Return it as if it were registered."""
        named = f"{self.name}@v1"
        fields: dict[str, Any] = {"role": self.role, "owner": self.owner, "licence": self.licence}
        fields |= {"tags": self.tags, "names": (named,), "deprecated": self.deprecated}
        facts = {"trigger": self.trigger, "model": self.name if kind == "base" else ""}
        at = datetime.now(timezone.utc)
        digest = digest_of(f"{kind} {self.name}".encode())
        return Artifact(digest, kind, 0, self.name, False, created_at=at, created_by="", facts=facts, **fields)


class Tried(_Described):
    """The result of one case: a combination, and the rules that refuse it; none if it is permitted."""

    name: str
    action: Action = "generate"
    use: Use | None = None
    base: Thing = Thing(name="pico")
    adapter: tuple[Thing, ...] = ()
    null_space: float = Field(0.0, ge=0, le=1)
    prompt: tuple[str, ...] = ()
    refused_by: tuple[str, ...] = ()


class _File(_Described):
    case: tuple[Tried, ...] = Field(min_length=1)


def run_cases(policy: Policy, fields: Mapping[str, Any]) -> list[tuple[str, list[str], Verdict]]:
    """Return name, expected rules and verdict of each case.

    Rules that need a registry refuse as they do where nothing was measured or signed; approvals are not asked for.

    Raises:
        PolicyError: a case with unknown, missing or wrong fields.
    """
    try:
        cases = _File.model_validate(dict(fields)).case
    except ValidationError as error:
        got = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:20]]
        raise PolicyError("invalid cases", got="; ".join(got), remedy="docs/policy.md has an example") from error
    return [(case.name, sorted(set(case.refused_by)), _verdict(policy, case)) for case in cases]


def _verdict(policy: Policy, case: Tried) -> Verdict:
    parts = tuple(Part(one.artifact("adapter"), one.weight) for one in case.adapter)
    combination = Combination(case.base.artifact("base"), parts, case.null_space, case.prompt, case.use)
    found = findings(Case.of(policy, combination, case.action, None, None))
    return Verdict(case.action, combination.title, tuple(found))
