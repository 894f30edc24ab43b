"""Describe adapters at weights on a base model in one form, however the combination was written down.

combination = Combination(base, (Part(teapot, 0.9), Part(chalk, 1.0)), null_space=0.5)
combination.what        # what an approval is about: digests, and weights in decimal form
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from qrlora._said import said
from qrlora.errors import PolicyError
from qrlora.operations.registry import Artifact, Registry

PLACES = Decimal("0.000001")
"""Weights and strengths that agree up to here are the same: 0.1 + 0.2 is 0.3."""
MADE_FROM = ("trained_on", "based_on", "composed_of")


def decimal(value: float) -> str:
    """Return a weight in its one decimal form: six places, no trailing zeros, no exponent."""
    text = format(Decimal(repr(float(value))).quantize(PLACES).normalize(), "f")
    return "0" if text == "-0" else text


@dataclass(frozen=True)
class Part:
    """An adapter and its weight λ."""

    artifact: Artifact
    weight: float = 1.0


@dataclass(frozen=True)
class Combination:
    """Adapters at weights that are to be composed, generated, served, exported or put into a catalog.

    Attributes:
        base: the base model; None if it is not registered.
        null_space: strength of the null-space projection.
        prompts: that it is used with.
        use: of pictures and models, in place of the policy's own.
    """

    base: Artifact | None
    parts: tuple[Part, ...]
    null_space: float = 0.0
    prompts: tuple[str, ...] = ()
    use: str | None = None

    @property
    def basis(self) -> str:
        """Return the fingerprint of the basis that the adapters stand on."""
        found = {str(part.artifact.facts.get("basis_fingerprint") or "") for part in self.parts}
        return ",".join(sorted(found - {""}))

    @property
    def what(self) -> dict[str, Any]:
        """Return its digests, weights and strength as JSON; the order of the parts makes no difference."""
        parts = sorted((part.artifact.digest, decimal(part.weight)) for part in self.parts)
        return {
            "base": self.base.digest if self.base else None,
            "basis": self.basis,
            "parts": [{"adapter": digest, "weight": weight} for digest, weight in parts],
            "null_space": decimal(self.null_space if len(parts) > 1 else 0.0),
        }

    @property
    def title(self) -> str:
        parts = " + ".join(f"{part.artifact.title} x {decimal(part.weight)}" for part in self.parts)
        strength = f", null-space projection {decimal(self.null_space)}" if self.null_space else ""
        return (parts or "the base model alone") + strength


def base_of(registry: Registry, artifacts: Sequence[Artifact]) -> Artifact | None:
    """Return the registered base model that all of these were trained on; None if there is none, or several."""
    found: dict[str, Artifact] = {}
    for artifact in artifacts:
        bases = [one for one in sources(registry, artifact, ("based_on",)) if one.kind == "base"]
        if len(bases) != 1:
            return None
        found[bases[0].digest] = bases[0]
    return next(iter(found.values())) if len(found) == 1 else None


def sources(registry: Registry, artifact: Artifact, relations: Sequence[str] = MADE_FROM) -> Iterator[Artifact]:
    """Yield what an artifact was made from directly."""
    for edge in registry.edges(artifact.digest):
        if edge.relation in relations:
            yield registry.get(edge.target)


def combination_of(registry: Registry, reference: str, **options: Any) -> Combination:
    """Return the combination that a registered composition or adapter is. PolicyError if it is neither.

    options: prompts, use.
    """
    artifact = registry.get(reference)
    if artifact.kind == "composition":
        record = json.loads(registry.read(artifact))  # the bytes, hashed again: facts and edges might be changed
        parts = tuple(Part(registry.get(one["adapter"]), float(one["weight"])) for one in record["parts"])
        base = registry.get(record["base"]) if record["base"] else None
        return Combination(base, parts, float(record["null_space"]), **options)
    if artifact.kind != "adapter":
        raise PolicyError(
            said("%(title)s is not something that can be combined", title=artifact.title),
            expected="a composition or an adapter",
            got=artifact.kind,
            remedy="`qrlora registry search --kind composition` lists them",
        )
    return unfolded(registry, Combination(base_of(registry, [artifact]), (Part(artifact),), **options))


def composed_of(registry: Registry, artifact: Artifact) -> list[tuple[Part, float]]:
    """Return the parts of an adapter that is a composition, each with the strength of the projection between them."""
    edges = registry.edges(artifact.digest, relation="composed_of")
    return [(Part(registry.get(edge.target), edge.weight or 0.0), edge.null_space or 0.0) for edge in edges]


def unfolded(registry: Registry, combination: Combination) -> Combination:
    """Return the combination of the parts' own parts, where that is the same sum.

    That is the case for a part without null-space projection of its own, and for one that stands alone at weight 1.
    """
    parts: list[Part] = []
    strength = combination.null_space
    for part in combination.parts:
        inner = composed_of(registry, part.artifact)
        projected = any(strength for _, strength in inner)
        if not inner or (projected and (len(combination.parts) > 1 or part.weight != 1)):
            parts.append(part)
            continue
        parts += [Part(one.artifact, one.weight * part.weight) for one, _ in inner]
        strength = inner[0][1] if len(combination.parts) == 1 else strength
    if parts == list(combination.parts):
        return combination
    return unfolded(registry, replace(combination, parts=tuple(parts), null_space=strength))


def leaves(registry: Registry | None, parts: Sequence[Part]) -> list[Part]:
    """Return the trained adapters of nested compositions, each with its total weight."""
    found: list[Part] = []
    for part in parts:
        inner = composed_of(registry, part.artifact) if registry else []
        scaled = [Part(one.artifact, one.weight * part.weight) for one, _ in inner]
        found += leaves(registry, scaled) if inner else [part]
    return found


def same(registry: Registry, combination: Combination) -> Iterator[Artifact]:
    """Yield the registered artifacts that are this combination: compositions, composed adapters, or its only
    adapter."""
    wanted = combination.what
    if len(combination.parts) == 1 and wanted["parts"][0]["weight"] == "1":
        yield combination.parts[0].artifact
    if combination.parts:
        first = combination.parts[0].artifact.digest
        listed = {(part["adapter"], part["weight"]) for part in wanted["parts"]}
        for digest in dict.fromkeys(edge.source for edge in registry.edges(first, into=True, relation="composed_of")):
            edges = registry.edges(digest, relation="composed_of")
            if {(edge.target, decimal(edge.weight or 0.0)) for edge in edges} != listed:
                continue  # before its bytes are read, which is what counts
            found = combination_of(registry, digest)
            if found.what | {"base": None} == wanted | {"base": None}:
                yield registry.get(digest)


def reports(registry: Registry, combination: Combination) -> list[Artifact]:
    """Return the reports that measured this combination, newest first."""
    edges = [edge for one in same(registry, combination) for edge in registry.edges(one.digest, relation="measured_by")]
    found = [registry.get(digest) for digest in dict.fromkeys(edge.target for edge in edges)]
    return sorted(found, key=lambda one: (one.created_at, one.digest), reverse=True)
