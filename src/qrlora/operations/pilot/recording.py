"""Record a pilot's stage in the registry: adapters, compositions, reports, requests for approvals.

A composition has a report of its own, of nothing but its figures: the same figures are the same report, so that a stage
that is run again leaves the approvals of its compositions as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qrlora.models.training.sources import find_pictures
from qrlora.operations.pilot.line import Item, Line
from qrlora.operations.pilot.stages import Asked, Result
from qrlora.operations.pilot.work import Work
from qrlora.operations.policy.approval import open_request, request
from qrlora.operations.policy.combination import Combination, combination_of
from qrlora.operations.policy.decisions import find
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.canonical import file_digest
from qrlora.operations.registry import Artifact, Link, Registry
from qrlora.operations.registry.intake import add_adapter, add_base, add_composition, add_picture, add_report


def record(registry: Registry, work: Work, result: Result, inputs: str) -> tuple[Artifact, list[Combination]]:
    """Add a stage's adapters and results; return its report, and the combinations that need an approval.

    Args:
        inputs: digest of what the stage depended on.
    """
    line = work.line
    items = [line.subject] if result.stage == "one_picture" else line.items
    base = add_base(registry, line.model)
    adapters = {item.name: _adapter(registry, work, item, base) for item in items}
    name = f"{line.name}/{result.stage.replace('_', '-')}"
    report = add_report(
        registry, {"pilot": line.name, "inputs": inputs, **result.to_dict()}, adapters.values(), name=name
    )
    if result.stage != "several_styles":
        return report, list(result.unapproved)
    sheet = registry.add(line.brand, "brand", name=f"{line.name}/brand") if line.brand else None
    combinations = []
    for style in line.styles:
        parts = [(adapters[item.name], weight) for item, weight in work.pair(style)]
        strength = work.strength([line.subject, style])
        title = composition_name(line, style)
        made = add_composition(registry, base, parts, strength, name=title, owner=line.owner)
        add_report(registry, _figures(result, style, sheet), [made], name=f"{title}-figures")
        combinations.append(combination_of(registry, made.digest))
    return report, combinations


def _adapter(registry: Registry, work: Work, item: Item, base: Artifact) -> Artifact:
    line = work.line
    described: dict[str, Any] = {"owner": line.owner, "licence": line.licence}
    pictures = [_picture(registry, source.picture, described) for source in find_pictures([item.picture])]
    links = [Link("trained_on", picture.digest) for picture in pictures]
    name = f"{line.name}/{item.name}"
    return add_adapter(registry, work.adapter_file(item), name=name, base=base, links=links, **described)


def _picture(registry: Registry, path: Path, described: Mapping[str, Any]) -> Artifact:
    """Add a picture. One that is registered keeps its owner and licence: a project file does not change them."""
    known = registry.has(file_digest(path))
    return add_picture(registry, path, **({} if known else described))


def _figures(result: Result, style: Item, sheet: Artifact | None) -> dict[str, Any]:
    """Return the measurements of the subject in a style in stage 2; `brand_sheet` is what the rule [brand] of a policy
    asks for."""
    group = result.group_of(style.name)
    found: dict[str, Any] = {
        "style": style.name,
        "score": group.score,
        "lost": {row.role: row.lost for row in result.crosstalk if row.style == style.name},
        "interference": result.interference[style.name],
    }
    if sheet and group.passing:
        share = group.passing
        found["brand_sheet"] = {"digest": sheet.digest, "share": share.value, "right": share.right, "n": share.n}
    return found


def ask(registry: Registry, combinations: Iterable[Combination], policy: Policy | None) -> Sequence[Asked]:
    """Ask once for the approval of each combination that has none; return the requests that are open.

    Args:
        policy: the one in force, which approvals name.
    """
    asked, different = [], {}
    for one in combinations:  # a catalog has one for every product, in its own words
        parts = sorted((part.artifact.digest, part.weight) for part in one.parts)
        key = (*parts, one.null_space)
        different[key] = replace(one, prompts=(), use=None)
    for combination in different.values():
        if find(registry, combination, policy).holds:
            continue
        opened = open_request(registry, combination, policy) or request(registry, combination, policy)
        asked.append(Asked(combination.title, opened.digest))
    return asked


def to_approve(registry: Registry, line: Line, policy: Policy | None) -> list[Artifact]:
    """Return the compositions of the subject in a style whose approval was asked for, and is not given yet."""
    known = {name.partition("@")[0]: one for one in reversed(registry.search(kind="composition")) for name in one.names}
    named = [known.get(composition_name(line, style)) for style in line.styles]
    found = [(one, combination_of(registry, one.digest)) for one in named if one]
    return [
        one for one, about in found if not find(registry, about, policy).holds and open_request(registry, about, policy)
    ]


def composition_name(line: Line, style: Item) -> str:
    """Return the name in the registry of the subject in a style."""
    return f"{line.name}/{line.subject.name}-in-{style.name}"
