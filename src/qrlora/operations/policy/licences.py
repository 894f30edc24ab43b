"""Compute the licence of what is made from several things: the strictest of theirs, by the table in licences.toml.

A reading for planning, no legal advice: the licences' own texts decide, and a lawyer about them.

licence = compute(["Apache-2.0", "CC-BY-NC-4.0"], Asker(use="commercial"))
licence.allows      # frozenset({"internal"})
licence.reasons     # {"outputs": "CC-BY-NC-4.0 forbids the commercial use of pictures", ...}
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from license_expression import AND, OR, ExpressionError, LicenseSymbol, LicenseWithExceptionSymbol, Licensing
from license_expression import ParseError as WordsError

from qrlora._reading import read_toml
from qrlora._said import Said, joined, said
from qrlora.errors import PolicyError

USES = ("internal", "outputs", "commercial")
"""internal: research and trials; outputs: commercial use of pictures; commercial: running the model for it too."""
PROPRIETARY = re.compile(r"LicenseRef-Proprietary-([A-Za-z0-9.-]+)", re.IGNORECASE)
MOST_CHOICES = 256
"""Alternatives that the ORs of all licences together may give."""
ADVICE = said("a reading by qrlora's table, no legal advice: the licences' own texts decide")


@dataclass(frozen=True)
class Terms:
    """One row of the table: what a licence allows. The fields are explained in licences.toml."""

    id: str
    name: str
    source: str
    version: str
    read: str
    commercial_outputs: bool
    commercial_weights: bool
    derivatives: bool
    share_alike: bool = False
    attribution: bool = False
    revenue_limit: int | None = None
    users_limit: int | None = None
    pass_on: str = ""
    aliases: tuple[str, ...] = ()

    def obligations(self) -> list[Said]:
        """Return what a user of the licence has to do."""
        done = [said("keep the notice of %(id)s", id=self.id)] if self.attribution else []
        if self.pass_on:
            done.append(said("pass on, by %(id)s: %(what)s", id=self.id, what=said(self.pass_on)))
        return done + ([said("share what is made from it under %(id)s", id=self.id)] if self.share_alike else [])


@dataclass(frozen=True)
class Asker:
    """The company that asks, and the use that it asks for.

    Attributes:
        use: one of USES.
        ours: owners whose proprietary licences are ours.
        revenue, users: of the company, in US dollars a year and users a month; None if not stated.
        agreements: licence -> why we may do all that it forbids (a contract, a lawyer's reading of an unknown one).
    """

    use: str = "commercial"
    ours: Sequence[str] = ()
    revenue: float | None = None
    users: float | None = None
    agreements: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Licence:
    """The licence of a composition.

    Attributes:
        expression: the licences that it is under, of every OR the chosen one.
        allows: of USES.
        conflict: why its licences cannot be met together when it is shared; None if they can.
        reasons: use -> why it is not allowed, for those that are not.
        obligations: what has to be done by who uses it.
    """

    expression: str
    allows: frozenset[str]
    conflict: Said | None
    reasons: Mapping[str, Said]
    obligations: tuple[Said, ...]


@functools.cache
def _file() -> dict[str, Any]:
    return read_toml(
        Path(__file__).with_name("licences.toml"), "the table of licences", PolicyError, remedy="reinstall"
    )


@functools.cache
def table() -> Mapping[str, Terms]:
    """Return the rows of the table by their ids."""
    rows = [Terms(**{**row, "aliases": tuple(row.get("aliases", ()))}) for row in _file()["licence"]]
    return {terms.id: terms for terms in rows}


def licence_of_model(model: str) -> str:
    """Return the licence of a known base model, as SPDX expression; "" if it is unknown."""
    known = {name.lower(): expression for name, expression in _file()["models"].items()}
    return str(known.get(model.lower(), ""))


@functools.cache
def _licensing() -> Licensing:
    symbols = [LicenseSymbol(terms.id, aliases=terms.aliases) for terms in table().values()]
    return Licensing(symbols)


def compute(expressions: Iterable[str], asker: Asker | None = None) -> Licence:
    """Return the licence of what is made from things under these licences: all of them at once.

    Args:
        expressions: SPDX expressions; "" for a thing whose licence is not known, which permits nothing.
        asker: where an OR leaves a choice, the one that allows its use is taken, else the one that allows most.

    Raises:
        PolicyError: no SPDX expression, or one with more than MOST_CHOICES alternatives.
    """
    asker = asker or Asker()
    choices = [frozenset[str]()]
    for expression in dict.fromkeys(expressions):
        choices = _product([choices, alternatives(expression)])
    return max((_of(sorted(choice), asker) for choice in choices), key=lambda one: _rank(one, asker.use))


def _rank(licence: Licence, use: str) -> tuple[bool, bool, int, int]:
    return use in licence.allows, licence.conflict is None, len(licence.allows), -len(licence.obligations)


def alternatives(expression: str) -> list[frozenset[str]]:
    """Return the alternatives of an SPDX expression (OR), each a set of licences. PolicyError if it is not one."""
    if not expression.strip():
        return [frozenset({""})]
    try:
        return _walk(_licensing().parse(expression, validate=False))
    except (ExpressionError, WordsError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, PolicyError):
            raise
        raise PolicyError(
            said("no licence expression: %(text)s", text=repr(expression[:200])),
            expected=said("SPDX, such as Apache-2.0, or CC-BY-4.0 AND LicenseRef-Proprietary-acme"),
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            remedy=said("https://spdx.org/licenses lists the ids; docs/policy.md those of model licences"),
        ) from error


def _walk(node: Any) -> list[frozenset[str]]:
    if isinstance(node, AND):
        return _product([_walk(part) for part in node.args])
    if isinstance(node, OR):
        return _few([choice for part in node.args for choice in _walk(part)])
    if isinstance(node, LicenseWithExceptionSymbol):  # an exception only permits more
        return [frozenset({node.license_symbol.key})]
    return [frozenset({_spelt(node.key)})]


def _spelt(key: str) -> str:
    owned = PROPRIETARY.fullmatch(key)
    return f"LicenseRef-Proprietary-{owned[1].lower()}" if owned else key


def _product(parts: Sequence[list[frozenset[str]]]) -> list[frozenset[str]]:
    found = [frozenset[str]()]
    for part in parts:
        found = _few([one | other for one, other in itertools.product(found, part)])
    return found


def _few(choices: Iterable[frozenset[str]]) -> list[frozenset[str]]:
    found = list(dict.fromkeys(choices))
    if len(found) > MOST_CHOICES:
        raise PolicyError(
            said("too many alternatives in the licences"),
            expected=said("at most %(high)s", high=MOST_CHOICES),
            got=len(found),
            remedy=said("name the licence that was chosen in place of an OR"),
        )
    return found


def _of(ids: Sequence[str], asker: Asker) -> Licence:
    reasons: dict[str, Said] = {}
    conflict = _conflict(ids, asker)
    for use in USES:
        against = [reason for one in ids if (reason := _forbids(one, use, asker))]
        if use != "internal" and conflict:
            against.append(conflict)
        if against:
            reasons[use] = joined(dict.fromkeys(against))
    known = [table()[one] for one in ids if one in table()]
    return Licence(
        expression=" AND ".join(one or "NONE" for one in ids),
        allows=frozenset(USES).difference(reasons),
        conflict=conflict,
        reasons=reasons,
        obligations=tuple(line for terms in known for line in terms.obligations()),
    )


def _forbids(one: str, use: str, asker: Asker) -> Said | None:
    """Return why a licence does not allow a use; None if it does."""
    if not one:
        return said("something of it has no licence, and unknown is no permission")
    if one in asker.agreements:
        return None
    if owned := PROPRIETARY.fullmatch(one):
        ours = owned[1].lower() in {owner.lower() for owner in asker.ours}
        theirs = said("%(id)s belongs to %(owner)s, with whom no agreement is stated", id=one, owner=owned[1])
        return None if ours else theirs
    terms = table().get(one)
    if terms is None:
        return said("%(id)s is not in the table of licences, and unknown is no permission", id=one)
    if use == "internal":
        return None
    if not terms.commercial_outputs:
        return said("%(id)s forbids the commercial use of pictures", id=one)
    if use == "commercial" and not terms.commercial_weights:
        return said("%(id)s forbids the commercial use of the model", id=one)
    limits = [("revenue", terms.revenue_limit, asker.revenue, said("US dollars a year"))]
    limits += [("users", terms.users_limit, asker.users, said("users a month"))]
    for what, limit, got, unit in limits:
        if limit is not None and (got is None or got > limit):
            stated = said("not stated (%(field)s of [licence])", field=what) if got is None else f"{got:,.0f}"
            facts = {"id": one, "limit": f"{limit:,}", "unit": unit, "ours": stated}
            return said("%(id)s ends above %(limit)s %(unit)s, and ours are %(ours)s", **facts)
    return None


def _conflict(ids: Sequence[str], asker: Asker) -> Said | None:
    """Return why these licences cannot be met together by what is shared; None if they can."""
    rows = [table()[one] for one in ids if one in table() and one not in asker.agreements]
    for terms in rows:
        if not terms.derivatives:
            return said("%(id)s lets nothing be shared that is made from it", id=terms.id)
    for terms in (one for one in rows if one.share_alike):
        for other in ids:
            if other not in (terms.id, "") and other not in asker.agreements and (why := _adds(other, terms)):
                facts = {"id": terms.id, "other": other, "why": why}
                return said("%(id)s asks for the same licence on what is made from it, and %(other)s %(why)s", **facts)
    return None


def _adds(other: str, alike: Terms) -> Said | None:
    """Return the restriction that a licence adds to a share-alike one; None if it adds none."""
    if PROPRIETARY.fullmatch(other):
        return said("is proprietary")
    terms = table().get(other)
    if terms is None:
        return said("is unknown")
    if terms.share_alike:
        return said("asks for itself")
    if alike.commercial_weights and not terms.commercial_weights:
        return said("forbids commercial use")
    if terms.pass_on or terms.revenue_limit or terms.users_limit:
        return said("adds restrictions")
    return None
