"""A small company for tests: a registry with a base model, a picture and adapters of a few bytes, people and keys."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qrlora.operations.policy.approval import approve, request
from qrlora.operations.policy.combination import Combination, Part
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.canonical import canonical_json
from qrlora.operations.provenance.keys import SigningKey, Trust
from qrlora.operations.registry import Artifact, Link, Registry

OURS = "LicenseRef-Proprietary-Acme"
PEOPLE = {"ada": ["author"], "grace": ["reviewer"], "linus": ["reviewer"], "olga": ["operator"]}

RULES: dict[str, Any] = {
    "name": "acme",
    "version": 3,
    "licence": {"use": "commercial", "ours": ["acme"]},
    "combine": {
        "adapters": [1, 2],
        "roles": [["subject"], ["style"], ["subject", "style"]],
        "owners": ["acme"],
        "required_tags": ["released"],
        "forbidden_tags": ["last-year"],
        "null_space": [0.0, 0.8],
        "never": [{"one": {"name": "teapot"}, "other": {"tag": "loud"}, "why": "the teapot is quiet"}],
    },
    "weight": [{"role": "style", "at_least": 0.0, "at_most": 1.0}],
    "score": [
        {"report": "evaluation", "value": "subject.copied", "at_least": 0.8},
        {"report": "interference", "value": "total.cosine", "at_most": 0.3},
    ],
    "brand": {"sheet": "acme-sheet", "at_least": 0.9},
    "forbidden": {"triggers": ["rivalware"], "words": ["cheap", "Rival Ltd"]},
    "signatures": {"adapters": True},
    "approval": {"approvers": ["grace", "linus"], "needed": 2, "days": 90},
}
"""A policy in which every rule is used."""


class Company:
    """See above. `ada` trained everything; `grace` and `linus` review; `olga` runs it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.registry = Registry.open(folder / "registry", actor="ada")
        self.keys = {name: SigningKey.create(folder / "keys", name) for name in PEOPLE}
        trust = Trust()
        for name, roles in PEOPLE.items():
            trust.add(name, roles, self.keys[name].public_pem)
        trust.save(self.trust_file)
        facts = {"model": "pico", "family": "sd3"}
        self.base = self.registry.add_record({"model": "pico"}, "base", name="pico", licence="Apache-2.0", facts=facts)
        self.picture = self.registry.add(b"a photograph", "picture", name="photo", licence=OURS)
        self.sheet = self.registry.add(b"name = 'acme'", "brand", name="acme-sheet")
        self.teapot = self.adapter("teapot", role="subject")
        self.chalk = self.adapter("chalk", role="style")

    @property
    def trust_file(self) -> Path:
        return self.registry.folder / "trust.json"

    def adapter(self, name: str, *, picture: Artifact | None = None, trigger: str = "", **fields: Any) -> Artifact:
        """An adapter that is as it should be, unless told otherwise."""
        fields = {"owner": "acme", "licence": OURS, "tags": ["released"], **fields}
        facts = {
            "trigger": trigger,
            "basis_fingerprint": "f" * 16,
            "base_model": "pico",
            "role": fields.get("role", ""),
        }
        links = [Link("based_on", self.base.digest), Link("trained_on", (picture or self.picture).digest)]
        return self.registry.add(f"ΔR of {name}".encode(), "adapter", name=name, facts=facts, links=links, **fields)

    def combination(self, *weighted: tuple[Artifact, float], null_space: float = 0.5, **options: Any) -> Combination:
        parts = weighted or ((self.teapot, 0.9), (self.chalk, 0.8))
        return Combination(self.base, tuple(Part(one, weight) for one, weight in parts), null_space, **options)

    def composed(self, combination: Combination) -> Artifact:
        from qrlora.operations.registry.intake import add_composition

        pairs = [(part.artifact, part.weight) for part in combination.parts]
        return add_composition(self.registry, combination.base, pairs, combination.null_space)

    def measured(self, combination: Combination, name: str, record: dict[str, Any]) -> Artifact:
        """A report on a combination."""
        from qrlora.operations.registry.intake import add_report

        return add_report(self.registry, record, [self.composed(combination)], name=name)

    def all_reports(self, combination: Combination) -> None:
        """Reports with which every rule of RULES holds."""
        share = {"digest": self.sheet.digest, "share": 0.95}
        self.measured(combination, "evaluation", {"subject": {"copied": [0.9, 0.85]}, "brand_sheet": share})
        self.measured(combination, "interference", {"total": {"cosine": [[1.0, -0.1], [-0.1, 1.0]]}})

    def policy(self, **changes: Any) -> Policy:
        return Policy.parse({**copy.deepcopy(RULES), **changes})

    def approved(self, combination: Combination, policy: Policy | None, *people: str) -> list[Artifact]:
        """Approvals by these people."""
        asked = request(self.registry, combination, policy)
        return [approve(self.registry, asked.digest, self.keys[name], policy) for name in people]


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any], dict[str, bytes]], None]) -> Path:
    """The bundle with its manifest and objects changed."""
    with tarfile.open(source) as tar:
        objects = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    manifest = json.loads(objects.pop("manifest.json"))
    change(manifest, objects)
    with tarfile.open(target, "w") as tar:
        for name, content in {"manifest.json": canonical_json(manifest), **objects}.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return target
