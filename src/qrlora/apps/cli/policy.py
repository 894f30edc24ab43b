"""`qrlora policy` and `qrlora approval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._reading import read_toml
from qrlora.apps.cli.command import Group, Options, command, together
from qrlora.apps.cli.permission import place_of, policy_option
from qrlora.apps.cli.recorded import open_registry, registry_option
from qrlora.apps.cli.shared import COUNT, PATH, SHARE, json_option, weighted_path
from qrlora.errors import PolicyError, QrloraError

if TYPE_CHECKING:
    from qrlora.operations.policy.check import Verdict
    from qrlora.operations.policy.combination import Combination
    from qrlora.operations.policy.rules import Policy
    from qrlora.operations.registry import Registry

ACTIONS = click.Choice(["compose", "generate", "serve", "export", "catalog"])
key_option = click.option("--key", required=True, metavar="NAME", help="your signing key: `qrlora keys new`")
combination_options = together(
    click.option("--adapter", multiple=True, metavar="FILE[:WEIGHT]", help="adapter file, or registry:NAME[:WEIGHT]"),
    click.option(
        "--composition", metavar="NAME", help="a registered composition, request or approval, in place of --adapter"
    ),
    click.option(
        "--null-space",
        type=SHARE,
        metavar="STRENGTH",
        help="null-space strength that it is used with (default: `generate`'s: 0.5 for a subject with a style)",
    ),
    click.option(
        "--prompt", multiple=True, help="prompt that it is used with; may be given several times (default: any)"
    ),
)
reason_option = click.option("--reason", required=True, metavar="TEXT", help="why; it is signed too")
withdrawal_options = together(registry_option, key_option, reason_option)


@click.group("policy", cls=Group)
def policy() -> None:
    """Check, test and activate a company's rules for what may be combined and used (docs/policy.md)."""


@click.group("approval", cls=Group)
def approval() -> None:
    """Request, sign, verify and revoke approvals of one combination each (docs/approval.md)."""


def _registry(options: Options) -> Registry | None:
    return open_registry(options) if place_of(options) else None


def _key(options: Options) -> Any:
    from qrlora.operations.provenance.keys import SigningKey

    return SigningKey.load(options.key)


def _policy(options: Options, registry: Registry | None) -> Policy:
    """Return the policy of --policy, else that in force. PolicyError if there is neither."""
    found = _policy_or_none(options, registry)
    if found is None:
        remedy = "give --policy TOML, or `qrlora policy activate` one in a registry"
        raise PolicyError("no policy", expected="--policy, or one in force in the registry", got="none", remedy=remedy)
    return found


def _policy_or_none(options: Options, registry: Registry | None) -> Policy | None:
    from qrlora.operations.policy.check import in_force
    from qrlora.operations.policy.rules import Policy

    if options.policy:
        return Policy.load(options.policy)
    return in_force(registry) if registry else None


# qrlora policy


@policy.command("schema", help="Print the JSON Schema of policies, for editors.")
def run_schema() -> None:
    from qrlora.operations.policy.rules import Policy

    print(json.dumps(Policy.file_schema(), indent=2))


@command("explain", "Say in sentences what a policy asks for, and with --licences what each licence allows")
@registry_option
@policy_option
@click.option("--licences", is_flag=True, help="print the table of licences, with sources")
def run_explain(options: Options) -> None:
    """Print the rules, a line each."""
    from qrlora.operations.policy.licences import ADVICE, table

    if options.licences:
        print(f"({ADVICE})")
        for terms in table().values():
            said = {"pictures": terms.commercial_outputs, "the model": terms.commercial_weights}
            allowed = ", ".join(f"commercial use of {what}: {'yes' if yes else 'no'}" for what, yes in said.items())
            print(f"{terms.id}: {terms.name}, {terms.version}\n  {allowed}\n  {terms.source} (read: {terms.read})")
            print("".join(f"  {line}\n" for line in terms.obligations()), end="")
        return
    print(*_policy(options, _registry(options)).lines(), sep="\n")


@command(
    "check",
    "Check a combination by a policy, rule by rule",
    "Ends with 1 if it is not permitted.",
)
@registry_option
@policy_option
@combination_options
@click.option("--action", type=ACTIONS, default="generate", help="action to check (default: generate)")
@click.option(
    "--use", type=click.Choice(["internal", "outputs", "commercial"]), help="use to check (default: the policy's)"
)
@json_option
def run_check(options: Options) -> int:
    """Print every finding."""
    from qrlora.operations.policy.check import check

    registry = _registry(options)
    found = check(_policy(options, registry), _combination(options, registry), options.action, registry=registry)
    if options.json:
        rows = [vars(finding) for finding in found.findings]
        print(json.dumps({"permitted": found.permitted, "action": found.action, "findings": rows}, indent=2))
    else:
        _say(found)
    return 0 if found.permitted else 1


def _say(verdict: Verdict) -> None:
    print(f"{verdict.action}: {verdict.title}")
    print(*(f"  {finding.line()}" for finding in verdict.findings), sep="\n")
    print("permitted" if verdict.permitted else f"not permitted: {len(verdict.refusals)} rules are broken")


def _combination(options: Options, registry: Registry | None) -> Combination:
    """Return the combination that the options describe."""
    from dataclasses import replace

    from qrlora.method.composition.null_space import strength_of_roles
    from qrlora.operations.policy.action import combination_of_files
    from qrlora.operations.policy.approval import refers

    if options.composition:
        if registry is None:
            raise QrloraError("a composition by name is in a registry", expected="--registry", got="none")
        found = refers(registry, options.composition)
        return replace(found, prompts=tuple(options.prompt), use=getattr(options, "use", None))
    sources = [_source(text, options, registry) for text in options.adapter]
    strength = options.null_space
    if strength is None:
        strength = strength_of_roles([str(source.facts.get("role") or "") for source, _ in sources])
    found = combination_of_files(registry, sources, strength, options.prompt)
    return replace(found, use=getattr(options, "use", None))


def _source(text: str, options: Options, registry: Registry | None) -> tuple[Any, float]:
    """Return an adapter, by its file or its name in the registry, and its weight."""
    from qrlora.models.exchange import load_any
    from qrlora.operations.policy.action import Source
    from qrlora.operations.registry import PREFIX

    path, weight = weighted_path(text)
    if not text.startswith(PREFIX):
        return Source.of(path, load_any(path)), weight
    if registry is None:
        raise QrloraError(f"{text} is in a registry", expected="--registry", got="none")
    found = registry.get(str(path))
    return Source(found.title, found.digest, "", found.facts), weight


@command(
    "test",
    "Check cases, described in TOML without any files, against what a policy should say to them",
    "docs/policy.md shows such a file. Ends with 1 if one comes out otherwise.",
)
@click.argument("cases", type=PATH, metavar="CASES.toml", help="cases and the rules that should refuse them")
@registry_option
@policy_option
def run_test(options: Options) -> int:
    """Print each case and whether it comes out as expected."""
    from qrlora.operations.policy.cases import run_cases

    fields = read_toml(options.cases, "the cases", PolicyError, remedy="docs/policy.md has an example")
    results = run_cases(_policy(options, _registry(options)), fields)
    right = 0
    for name, expected, verdict in results:
        rules = sorted({finding.rule for finding in verdict.refusals})
        line = f"{name}: {_refused_by(rules)}"
        print(f"as expected  {line}" if rules == expected else f"OTHERWISE    {line}, expected {_refused_by(expected)}")
        print("".join(f"    {finding.line()}\n" for finding in verdict.refusals), end="")
        right += rules == expected
    print(f"{right} of {len(results)} cases come out as expected")
    return 0 if right == len(results) else 1


def _refused_by(rules: Sequence[str]) -> str:
    return f"refused by {', '.join(rules)}" if rules else "permitted"


@command(
    "activate",
    "Bring a policy into force in a registry: from then on it is asked wherever the registry is in play",
    "One that is not newer than those before needs the signature of an operator.",
)
@click.argument("file", type=PATH, metavar="TOML", help="the policy")
@registry_option
@click.option("--key", metavar="NAME", help="an operator's signing key; needed for an older version")
@click.option("--reason", default="", metavar="TEXT", help="why, for the audit log")
def run_activate(options: Options) -> None:
    """Print what is in force now."""
    from qrlora.operations.policy.check import activate
    from qrlora.operations.policy.rules import Policy

    registry, found = open_registry(options), Policy.load(options.file)
    added = activate(registry, found, _key(options) if options.key else None, options.reason)
    print(f"in force: {found.title} ({added.digest[:19]})")


# qrlora approval


@command("request", "Ask for the approval of a combination, as it is now")
@registry_option
@policy_option
@combination_options
@click.option("--note", default="", metavar="TEXT", help="note to the reviewer")
def run_request(options: Options) -> None:
    """Print the digest of the request."""
    from qrlora.operations.policy.approval import request

    registry = open_registry(options)
    combination = _combination(options, registry)
    asked = request(registry, combination, _policy_or_none(options, registry), options.note)
    print(f"{combination.title}\nrequest {asked.digest[:19]}")


@command("approve", "Sign the approval of a request")
@click.argument("request", metavar="REQUEST", help="digest of the request (`approval list`)")
@registry_option
@policy_option
@key_option
@click.option("--days", type=COUNT, help="days after which it ends (default: the policy's)")
def run_approve(options: Options) -> None:
    """Print the digest of the approval, and who has approved by now."""
    from qrlora.operations.policy.approval import approve, refers
    from qrlora.operations.policy.decisions import find

    registry = open_registry(options)
    found = _policy_or_none(options, registry)
    given = approve(registry, options.request, _key(options), found, days=options.days)
    standing = find(registry, refers(registry, options.request), found)
    print(f"approval {given.digest[:19]}")
    print(f"approved by {', '.join(standing.people)}: {len(standing.people)} of {standing.needed}")


@command("reject", "Sign the rejection of a request")
@click.argument("request", metavar="REQUEST", help="digest of the request (`approval list`)")
@withdrawal_options
def run_reject(options: Options) -> None:
    """Print the digest of the rejection."""
    from qrlora.operations.policy.approval import reject

    print(f"rejection {reject(open_registry(options), options.request, _key(options), options.reason).digest[:19]}")


@command("revoke", "Sign the revocation of an approval: by who gave it, or an operator")
@click.argument("given", metavar="APPROVAL", help="digest of the approval (`approval list`)")
@withdrawal_options
def run_revoke(options: Options) -> None:
    """Print the digest of the revocation."""
    from qrlora.operations.policy.approval import revoke

    print(f"revocation {revoke(open_registry(options), options.given, _key(options), options.reason).digest[:19]}")


@command("list", "List requests, approvals, rejections and revocations, newest first")
@registry_option
def run_list(options: Options) -> None:
    """Print a line for each."""
    from qrlora.operations.policy.decisions import listing

    print(*listing(open_registry(options)) or ["none"], sep="\n")


@command(
    "verify",
    "Say whether a combination is approved as it is now, and why approvals do not count",
    "Ends with 1 if it is not.",
)
@registry_option
@policy_option
@combination_options
def run_verify(options: Options) -> int:
    """Print who has approved it, and what is wrong with other approvals."""
    from qrlora.operations.policy.decisions import find

    registry = open_registry(options)
    combination = _combination(options, registry)
    standing = find(registry, combination, _policy_or_none(options, registry))
    until = f", until {standing.expires:%Y-%m-%d}" if standing.expires and standing.expires.year < 9999 else ""
    print(
        f"{combination.title}\napproved by {', '.join(standing.people) or 'nobody'}: "
        f"{len(standing.people)} of {standing.needed}{until}"
    )
    _lines(standing.reasons)
    return 0 if standing.holds else 1


def _lines(reasons: Sequence[str]) -> None:
    for reason in reasons:
        print(f"  {reason}")


for _one in (run_explain, run_check, run_test, run_activate):
    policy.add_command(_one)
for _one in (run_request, run_approve, run_reject, run_revoke, run_list, run_verify):
    approval.add_command(_one)
