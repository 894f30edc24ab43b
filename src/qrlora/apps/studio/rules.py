"""Tell the licence of a mix and the policy's verdict on it, for a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qrlora.errors import PolicyError
from qrlora.operations.policy.check import Verdict, check, in_force
from qrlora.operations.policy.combination import Combination, Part, base_of
from qrlora.operations.policy.licences import ADVICE, Licence, compute
from qrlora.operations.registry import Registry

if TYPE_CHECKING:
    from qrlora.apps.studio.state import Studio


def licence_of(studio: Studio, parts: Mapping[str, float]) -> dict[str, Any]:
    """Return the licence of the parts together.

    Returns expression (SPDX), without (titles of parts that name none), computed (a `Licence`, if all do and can be
    read), trouble (why one cannot be read).
    """
    cards = [studio.shelf.cards[key] for key in parts if key in studio.shelf.cards]
    named = sorted({card.licence for card in cards if card.licence})
    found: dict[str, Any] = {"expression": " AND ".join(named), "computed": None, "trouble": "", "advice": ADVICE}
    found["without"] = [card.title for card in cards if not card.licence]
    try:
        computed: Licence = compute([card.licence for card in cards])
        found |= {
            "computed": computed,
            "expression": computed.expression if not found["without"] else found["expression"],
        }
    except PolicyError as error:
        found["trouble"] = f"{error.what}: {error.got}"
    return found


def there_is_one(registry: Registry) -> bool:
    """Return True if a policy is in force in this registry."""
    return in_force(registry) is not None


def verdict_of(studio: Studio, parts: Mapping[str, float], null_space: float | None) -> Verdict | None:
    """Return the policy's verdict on composing these; None without a policy in force, or for adapters that are not
    registered."""
    policy = in_force(studio.registry)
    cards = [studio.shelf.cards[key] for key in parts if key in studio.shelf.cards]
    if policy is None or not cards or any(not card.reference for card in cards):
        return None
    artifacts = [studio.registry.get(card.digest) for card in cards]
    taken = tuple(Part(one, weight) for one, weight in zip(artifacts, parts.values(), strict=True))
    combination = Combination(base_of(studio.registry, artifacts), taken, null_space or 0.0)
    return check(policy, combination, "compose", registry=studio.registry)
