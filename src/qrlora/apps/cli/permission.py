"""Ask the rules before a command acts: --policy, --require-approval, and the policy of the registry in play."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora.apps.cli.command import Options, together
from qrlora.apps.cli.recorded import open_registry, packages, place_here, recorder_here
from qrlora.apps.cli.shared import PATH

if TYPE_CHECKING:
    from qrlora.method.adapter import Adapter
PLACE = "QRLORA_REGISTRY"

policy_option = click.option(
    "--policy",
    type=PATH,
    metavar="TOML",
    help="policy file, which holds besides the registry's policy (docs/policy.md)",
)
approval_option = click.option(
    "--require-approval",
    is_flag=True,
    help="refuse combinations without an approval in the registry (docs/approval.md)",
)
permission_options = together(policy_option, approval_option)
"""For commands that are `referable`, which have --registry."""


def place_of(options: Options) -> str | None:
    """Return where the registry in play is; None if none is."""
    return getattr(options, "registry", None) or place_here() or os.environ.get(PLACE)


def rules_of(options: Options) -> Any:
    """Return the rules that hold for a command; None if no registry, policy or approval is in play."""
    place, approval = place_of(options), getattr(options, "require_approval", False)
    if not place and not options.policy and not approval:
        return None
    recorder = recorder_here()
    registry = recorder.registry if recorder else None
    if registry is None and (place or approval):
        registry = open_registry(Options(registry=place))
    with packages():
        from qrlora.operations.policy.action import Rules
    rules = Rules.of(registry, options.policy, approval)
    return None if rules.empty else rules


def permit(
    options: Options,
    action: str,
    paths: Sequence[Path],
    parts: Sequence[tuple[Adapter, float]],
    null_space: float = 0.0,
    prompts: Sequence[str] = (),
    model: str | None = None,
) -> None:
    """Raise PolicyError unless the rules in play permit an action; nothing is imported where there are none.

    Args:
        paths, parts: the adapters' files, and what was read from them with its weight.
        model: whose files are hashed where an approval is needed; None where no base model is used.
    """
    rules = rules_of(options)
    if rules is None:
        return
    from qrlora.operations.policy.action import Source, base_in_use, combination_of_files

    sources = [(Source.of(path, adapter), weight) for path, (adapter, weight) in zip(paths, parts, strict=True)]
    base = base_in_use(rules.registry, model) if model and rules.approval else None
    rules.enforce(action, combination_of_files(rules.registry, sources, null_space, prompts, base))
