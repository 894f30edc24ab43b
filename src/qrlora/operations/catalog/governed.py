"""Apply a registry and a policy to a catalog: refuse cells, and record finished pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qrlora._files import make_folder, write_atomically
from qrlora.models.exchange import load_any
from qrlora.operations.catalog.journal import Outcome
from qrlora.operations.catalog.plan import Cell, Picture, adapter_name
from qrlora.operations.catalog.tables import Item, no_registry
from qrlora.operations.policy.action import Rules, Source, base_in_use, combination_of_files
from qrlora.operations.policy.combination import Combination
from qrlora.operations.provenance.canonical import known_digest
from qrlora.operations.registry import PREFIX, Artifact, Registry
from qrlora.operations.registry.bases import used_base
from qrlora.operations.registry.intake import add_adapter, composition, generated

KEPT = 4096
"""Adapters and compositions that are remembered."""


class Governed:
    """Rules and records of one catalog.

    Args:
        registry: takes adapters, compositions and generated pictures; None records nothing.
        rules: each cell is checked by; None permits all.
    """

    def __init__(self, registry: Registry | None, rules: Rules | None, folder: Path, model: str) -> None:
        self.registry, self.rules, self.folder, self.model = registry, rules, folder, model
        needs_base = registry and rules and rules.approval
        self.base = base_in_use(registry, model) if registry and needs_base else None
        self.source = functools.lru_cache(maxsize=KEPT)(_source)
        self.artifact = functools.lru_cache(maxsize=KEPT)(self._registered)
        self.unapproved: list[Combination] = []
        """Combinations that are refused only because an approval is missing."""
        self.compositions: dict[tuple[tuple[tuple[str, float], ...], float], Artifact] = {}

    def resolve(self, text: str) -> Path | None:
        """Return a copy in the catalog's folder, which all workers see, of what registry:NAME@alias names."""
        if not text.startswith(PREFIX) or self.registry is None:
            return no_registry(text)
        artifact = self.registry.get(text)
        path = self.folder / "adapters" / f"registry-{artifact.digest.removeprefix('sha256:')[:16]}.safetensors"
        if not path.is_file():
            make_folder(path.parent)
            write_atomically(path, self.registry.read(artifact), rescue=False)
        return path

    def register(self, items: Iterable[Item], adapters: Mapping[str, Path]) -> None:
        """Add the adapters of a catalog with their tags, so that policies see these."""
        for item in items:
            path = adapters[adapter_name(item)]
            if self.registry and path.is_file():
                add_adapter(self.registry, path, role=item.role, tags=item.tags)

    def gate(self, cell: Cell, adapters: Mapping[str, Path], use: str) -> str:
        """Return the reason why a cell may not be made; empty if it may."""
        if self.rules is None:
            return ""
        files = [adapters[adapter_name(item)] for item in (cell.product, cell.style.item)]
        parts = [(self.source(file), weight) for file, weight in zip(files, cell.weights, strict=True)]
        style = cell.style
        combination = combination_of_files(self.registry, parts, style.null_space, style.prompts, self.base)
        verdicts = self.rules.verdicts("catalog", replace(combination, use=use or None))
        lines = [finding.line() for verdict in verdicts for finding in verdict.refusals]
        rules = sorted({finding.rule for verdict in verdicts for finding in verdict.refusals})
        if rules == ["approval"]:
            self.unapproved.append(combination)
        if lines and self.registry:
            what = f"{cell.product.name} in {style.item.name}"
            self.registry.audit("refused", "catalog", {"what": what, "rules": rules})
        return "; ".join(dict.fromkeys(lines))

    def composed(self, batch: Sequence[Picture]) -> list[Picture]:
        """Add the compositions of a batch, and return its pictures with these' digests."""
        if self.registry is None:
            return list(batch)
        if len(self.compositions) > KEPT:
            self.compositions.clear()
        keys = dict.fromkeys((one.parts, one.null_space) for one in batch)
        wanted = [key for key in keys if key not in self.compositions]
        base, additions = self.base or used_base(self.registry, self.model), []
        for parts, strength in wanted:
            found = [(self.artifact(path), weight) for path, weight in parts]
            additions.append(composition(base, found, strength))
        self.compositions |= zip(wanted, self.registry.add_many(additions), strict=True)
        return [replace(one, composition=self.compositions[one.parts, one.null_space].digest) for one in batch]

    def record(self, pairs: Sequence[tuple[Picture, Outcome]]) -> None:
        """Add finished pictures in one transaction: digest, perceptual hash, and the composition they were made by."""
        if self.registry is None:
            return
        additions = []
        for picture, _ in pairs:
            made = {"prompt": picture.prompt, "seed": picture.seed, "key": picture.key}
            origin = self.registry.get(picture.composition)
            additions.append(generated(self.folder / picture.file, origin, made))
        self.registry.add_many(additions)

    def _registered(self, path: str) -> Artifact:
        assert self.registry is not None
        return self.registry.get(known_digest(path))


def _source(path: Path) -> Source:
    return Source.of(path, load_any(path))
