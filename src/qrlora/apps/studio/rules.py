"""Tell the licence of a mix and the policy's verdict on it, for a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qrlora._said import said
from qrlora.errors import PolicyError
from qrlora.operations.policy.action import Rules, Source, combination_of_files
from qrlora.operations.policy.check import Verdict
from qrlora.operations.policy.licences import ADVICE, Licence, compute

if TYPE_CHECKING:
    from qrlora.apps.studio.shelf import Card
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
        found["trouble"] = said("%(what)s (%(got)s)", what=error.what, got=error.got)
    return found


def verdict_of(studio: Studio, parts: Mapping[str, float], null_space: float | None) -> Verdict | None:
    """Return the policy's verdict on composing these; None where no policy is in force."""
    rules = Rules.of(studio.registry, None)
    if rules.empty:
        return None
    cards = {key: studio.shelf.cards[key] for key in parts if key in studio.shelf.cards}
    sources = [(_source(card), parts[key]) for key, card in cards.items()]
    [verdict] = rules.verdicts("compose", combination_of_files(studio.registry, sources, null_space or 0.0))
    return verdict


def _source(card: Card) -> Source:
    return Source(card.title, card.digest, "", {name: getattr(card, name) for name in ("role", "trigger", "licence")})
