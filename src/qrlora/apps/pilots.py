"""Open pilots for the command line and the studio: with their scorers, under the rules of a registry."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrlora.operations.catalog.governed import Governed
    from qrlora.operations.pilot import Line, Pilot, Scorer
    from qrlora.operations.registry import Registry


def open_pilot(
    path: Path, registry: Registry, policy: Path | None = None, require_approval: bool = False, c2pa: str | None = None
) -> Pilot:
    """Open a pilot whose stage 3 obeys the rules in force, and records its pictures.

    Args:
        policy: rules besides those of the registry's policy.
        c2pa: name of the certificate that the line's pictures are marked by.
    """
    from qrlora.operations.pilot import Line, Pilot, WholeLine
    from qrlora.operations.policy.action import Rules

    line, rules = Line.load(path), Rules.of(registry, policy, require_approval)

    def governed(folder: Path) -> Governed:
        from qrlora.operations.catalog.governed import Governed  # torch, which status and decisions do without

        return Governed(registry, None if rules.empty else rules, folder, line.model)

    whole_line = WholeLine(governed=governed, c2pa=c2pa)
    return Pilot.open(path, registry, scorers_of(line), whole_line, next(iter(rules.policies), None))


def scorers_of(line: Line) -> dict[str, Scorer]:
    """Return the scorers of subject and style: the named metrics; else on pico its judge's features, elsewhere
    structure and texture."""
    from qrlora.operations.pilot import metric_scorer

    found: dict[str, Scorer] = {}
    for role, default in (("subject", "structure"), ("style", "texture")):
        name = getattr(line.scores, role)
        found[role] = _judged(role) if not name and line.model == "pico" else metric_scorer(role, name or default)
    return found


def _judged(role: str) -> Scorer:
    from qrlora.operations.pilot import Scorer

    def score(pictures: Any, learned_from: Any) -> list[float]:
        import numpy as np

        height, width = pictures[0].pixels.shape[:2]
        references = np.stack([one.fitted(width, height) for one in learned_from])
        return _judge().likeness(role, np.stack([one.pixels for one in pictures]), references)

    return Scorer("the cosine of pico's judge", score)


@functools.cache
def _judge() -> Any:
    """Return pico's judge, loaded when the first picture is scored: most commands score none."""
    from qrlora.pico.judge import Judge

    return Judge.load()
