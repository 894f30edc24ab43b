"""The registry in other commands: what they take by reference, and what they made is recorded.

Nothing of the registry is imported before a command is given `--registry` or a value that begins with `registry:`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import rich_click as click

from qrlora.apps.cli.command import Options, hold
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.operations.registry import Registry

registry_option = click.option(
    "--registry", metavar="PLACE", help="folder or database URL of the registry (default: $QRLORA_REGISTRY)"
)


def open_registry(options: Options, *, create: bool = True) -> Registry:
    """Open the registry that is asked for, until the command ends."""
    try:
        from qrlora.operations.registry import Registry
    except ImportError as error:
        remedy = "pip install 'qrlora[registry]'"
        raise QrloraError("the registry needs more packages", got=f"no {error.name}", remedy=remedy) from error
    opened = Registry.open(options.registry, create=create)
    hold(contextlib.closing(opened))
    return opened
