"""Parse names of artifacts: `registry:NAME@alias`, `NAME@v3`, `NAME` (its newest version), `sha256:…` (8 digits or
more)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from qrlora._said import said
from qrlora.errors import RegistryError

PREFIX = "registry:"
_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?(?:/[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?)?")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{8,64}")
_VERSION = re.compile(r"v[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Reference:
    """A reference taken apart: a digest (or its beginning), or a name with a version, an alias or neither."""

    digest: str = ""
    name: str = ""
    version: int | None = None
    alias: str = ""


def check_name(name: str) -> str:
    """Return the name. RegistryError unless it can be a name: it never leaves a folder, whatever it is joined to."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise RegistryError(
            said("%(name)s cannot be a name", name=repr(name[:100])),
            expected="lower-case letters, digits, . _ - and at most one /, such as teapots/classic",
            remedy="choose another",
        )
    return name


def check_alias(alias: str) -> str:
    """Return the alias. RegistryError unless it can be one: v1, v2 and `latest` are taken by the versions."""
    if not _ALIAS.fullmatch(alias) or re.fullmatch("v[0-9]+", alias) or alias == "latest":
        raise RegistryError(
            said("%(alias)s cannot be an alias", alias=repr(alias[:100])),
            expected="a lower-case word such as production; v1, v2, … and latest name versions",
            remedy="choose another",
        )
    return alias


def parse_reference(text: str) -> Reference:
    """Take a reference apart. RegistryError if it has none of the forms."""
    bare = text.removeprefix(PREFIX)
    if _DIGEST.fullmatch(bare):
        return Reference(digest=bare)
    name, at, pointer = bare.partition("@")
    check_name(name)
    if not at or pointer == "latest":
        return Reference(name=name)
    if _VERSION.fullmatch(pointer):
        return Reference(name=name, version=int(pointer[1:]))
    return Reference(name=name, alias=check_alias(pointer))
