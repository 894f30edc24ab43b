"""Keep signing keys, which stay with their owners, and the list of people whom a registry trusts.

key = SigningKey.create(default_folder(), "ada")               # ~/.config/qrlora/keys/ada.pem, for its owner alone
trust = Trust.load(registry.folder / "trust.json")
trust.add("ada", ["author"], key.public_pem)
person = trust.person_of(key.key_id)                           # SignatureError: unknown, revoked or expired
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from qrlora._files import claimed, disk_error, make_folder, write_atomically
from qrlora._said import Said, joined, said, verbatim
from qrlora.errors import SignatureError
from qrlora.operations.provenance.algorithms import (
    ALGORITHMS,
    FOLDER,
    PrivateKey,
    PublicKey,
    algorithm_of,
    first_line,
    key_id_of,
    private_pem,
    public_pem_of,
    read_private,
    read_public,
    write_new,
)

Role = Literal["author", "reviewer", "operator"]
ROLES: tuple[Role, ...] = ("author", "reviewer", "operator")
MOST_BYTES = 1 << 20
"""Largest trust file."""
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def check_key_name(name: str) -> str:
    """Return the name. SignatureError unless it can be a file's name."""
    if not _NAME.fullmatch(name) or ".." in name:
        expected = "letters, digits, . _ - (at most 64)"
        raise SignatureError(
            said("%(name)s cannot be a key's name", name=repr(name[:100])), expected=expected, remedy="choose another"
        )
    return name


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(timezone.utc)


def day(at: datetime) -> str:
    """Format a time for people: to the minute, in UTC."""
    return f"{at.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def default_folder() -> Path:
    """Return where private keys are: $QRLORA_KEYS, else `~/.config/qrlora/keys`."""
    named = os.environ.get(FOLDER)
    return Path(named) if named else Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "qrlora/keys")


def key_names() -> list[str]:
    """List the keys in the folder of keys by name."""
    return sorted(path.stem for path in default_folder().glob("*.pub"))


def key_path(name: str) -> Path:
    """Return the file of a private key in the folder of keys; a path is no name. SignatureError if there is none."""
    path = default_folder() / f"{check_key_name(name)}.pem"
    if not path.is_file():
        own = said("a key of your own: `qrlora keys new NAME` makes it")
        expected = joined(map(verbatim, key_names()), " or ") or own
        raise SignatureError("no private key of this name on this machine", expected=expected, got=name)
    return path


@dataclass(frozen=True)
class SigningKey:
    """A private key and its owner's name for it.

    Attributes:
        name: of its file.
        private: never written anywhere but to that file.
    """

    name: str
    private: PrivateKey = field(repr=False)

    @classmethod
    def create(
        cls, folder: Path | None, name: str, algorithm: str = "ed25519", passphrase: str | None = None
    ) -> SigningKey:
        """Make a key: NAME.pem (mode 0600, encrypted if there is a passphrase) and NAME.pub, which others may have.

        Raises:
            SignatureError: there is a key of this name, or no such algorithm.
        """
        folder = folder or default_folder()
        if algorithm not in ALGORITHMS:
            raise SignatureError(f"no algorithm {algorithm[:50]!r}", expected=" or ".join(ALGORITHMS))
        private = ed25519.Ed25519PrivateKey.generate()
        made = cls(check_key_name(name), private if algorithm == "ed25519" else ec.generate_private_key(ec.SECP256R1()))
        make_folder(folder)
        write_new(folder / f"{name}.pem", private_pem(made.private, passphrase))
        write_new(folder / f"{name}.pub", made.public_pem.encode(), 0o644)
        return made

    @classmethod
    def load(cls, name: str | Path, passphrase: str | None = None) -> SigningKey:
        """Read a key by its name in the folder of keys, or by its path.

        Args:
            passphrase: of an encrypted one; $QRLORA_KEY_PASSPHRASE if None.

        Raises:
            SignatureError: it is missing, open to others, damaged, or the passphrase is wrong.
        """
        by_path = isinstance(name, Path) or os.sep in name or name.endswith(".pem")
        path = Path(name) if by_path else key_path(str(name))
        return cls(path.stem, read_private(path, passphrase))

    @property
    def public(self) -> PublicKey:
        return self.private.public_key()

    @property
    def public_pem(self) -> str:
        return public_pem_of(self.public)

    @property
    def key_id(self) -> str:
        return key_id_of(self.public)

    @property
    def algorithm(self) -> str:
        return algorithm_of(self.private) or ""

    def sign(self, message: bytes) -> bytes:
        """Return the signature: 64 bytes (Ed25519), or DER of ECDSA with SHA-256."""
        if isinstance(self.private, ed25519.Ed25519PrivateKey):
            return self.private.sign(message)
        return self.private.sign(message, ec.ECDSA(hashes.SHA256()))


# Trust


class Key(BaseModel):
    """A public key of a person, and from when until when its signatures count.

    Attributes:
        revoked_at: when it was revoked.
        void_from: signatures made from then on do not count; the start of its validity unless given, because
            the holder of a stolen key dates a signature as they like.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    key_id: str
    public_pem: str = Field(max_length=2000)
    valid_from: AwareDatetime
    valid_until: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None
    void_from: AwareDatetime | None = None
    reason: str = Field(default="", max_length=1000)

    @model_validator(mode="after")
    def _same(self) -> Key:
        if key_id_of(self.public) != self.key_id:
            raise ValueError(f"key_id {self.key_id[:12]} is not that of its public key")
        if (self.revoked_at is None) != (self.void_from is None):
            raise ValueError("revoked_at and void_from stand together")
        return self

    @property
    def public(self) -> PublicKey:
        return read_public(self.public_pem)

    @property
    def algorithm(self) -> str:
        return algorithm_of(self.public) or ""

    def state(self, at: datetime) -> Said | None:
        """Return why a signature of this time does not count; None if it does."""
        if self.void_from and self.revoked_at and at >= self.void_from:
            return said("revoked on %(day)s: %(reason)s", day=day(self.revoked_at), reason=self.reason)
        if at < self.valid_from:
            return said("not valid before %(day)s", day=day(self.valid_from))
        if self.valid_until and at >= self.valid_until:
            return said("expired on %(day)s", day=day(self.valid_until))
        return None


class Person(BaseModel):
    """Somebody whose signature counts, and the roles in which it does."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1, max_length=100)
    roles: tuple[Role, ...] = Field(min_length=1)
    keys: tuple[Key, ...] = Field(max_length=100)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    version: Literal[1] = 1
    people: list[Person] = Field(default_factory=list, max_length=10_000)


class Trust:
    """The list of people who may sign, with roles and keys. It lies in the registry's folder, and never comes in with
    an import.

    Raises (all methods): SignatureError.
    """

    def __init__(self, people: Iterable[Person] = ()) -> None:
        self.people = {person.name: person for person in people}

    @classmethod
    def load(cls, path: Path) -> Trust:
        """Read the file; nobody is trusted where there is none."""
        try:
            if not path.exists():
                return cls()
            if path.stat().st_size > MOST_BYTES:
                raise SignatureError(f"{path} is too large", expected=f"{MOST_BYTES:,} bytes at most")
            found = _File.model_validate_json(path.read_bytes())
        except OSError as error:
            raise disk_error(error, path) from error
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
            remedy = "restore it from a backup; change it by `qrlora keys` alone"
            raise SignatureError(f"{path} is no list of trusted people", got=faults, remedy=remedy) from error
        trust = cls(found.people)
        trust._check_unique(len(found.people))
        return trust

    def _check_unique(self, people: int) -> None:
        keys = [key.key_id for _, key in self._keys()]
        if len(self.people) != people or len(set(keys)) != len(keys):
            raise SignatureError("a person or a key is in the trust file twice", remedy="restore it from a backup")

    def save(self, path: Path) -> None:
        """Write the file at once."""
        written = _File(people=list(self.people.values())).model_dump_json(indent=2, exclude_none=True)
        write_atomically(path, written.encode() + b"\n", rescue=False)

    def _keys(self) -> Iterator[tuple[Person, Key]]:
        return ((person, key) for person in self.people.values() for key in person.keys)

    def key(self, key_id: str) -> Key:
        """Return a trusted key, whatever its state."""
        return self._find(key_id)[1]

    def _find(self, key_id: str) -> tuple[Person, Key]:
        for person, key in self._keys():
            if key.key_id == key_id:
                return person, key
        raise SignatureError(
            said("the key %(key_id)s is nobody's whom this registry trusts", key_id=key_id[:12]),
            expected="a key that `qrlora keys list` shows",
            remedy="if it is a colleague's, an operator trusts it: `qrlora keys trust NAME --key FILE.pub --role ROLE`",
        )

    def person_of(self, key_id: str, at: datetime | None = None) -> Person:
        """Return whose key it is. SignatureError if it is unknown, or was not valid then (now if None)."""
        person, key = self._find(key_id)
        if state := key.state(at or now()):
            remedy = said(
                "ask %(name)s to sign again with a key in force (`qrlora keys list` shows them)", name=person.name
            )
            raise SignatureError(
                said("the key %(key_id)s of %(name)s does not count", key_id=key_id[:12], name=person.name),
                got=state,
                remedy=remedy,
            )
        return person

    def add(
        self,
        name: str,
        roles: Iterable[str],
        public_pem: str,
        *,
        valid_from: datetime | None = None,
        valid_until: datetime | None = None,
    ) -> Person:
        """Trust a key of a person, who has exactly these roles from now on."""
        public = read_public(public_pem)
        key_id = key_id_of(public)
        if any(key.key_id == key_id for _, key in self._keys()):
            owner = self._find(key_id)[0].name
            raise SignatureError(f"the key {key_id[:12]} is {owner}'s already", expected="one person for a key")
        start = valid_from or now()
        if valid_until and valid_until <= start:
            raise SignatureError("a key that is never valid", expected=f"an end after {day(start)}", got=valid_until)
        key = Key(key_id=key_id, public_pem=public_pem_of(public), valid_from=start, valid_until=valid_until)
        there = self.people.get(name)
        return self._put(name, roles, [*(there.keys if there else ()), key])

    def _put(self, name: str, roles: Iterable[str], keys: Iterable[Key]) -> Person:
        if not name.isprintable() or name != name.strip():
            raise SignatureError(f"{name[:100]!r} cannot be a person's name", expected="printable characters")
        try:
            found = {"name": name, "roles": tuple(dict.fromkeys(roles)), "keys": tuple(keys)}
            person = Person.model_validate(found)
        except ValidationError as error:
            expected = f"a name, and roles out of {', '.join(ROLES)}"
            raise SignatureError("nobody to trust", expected=expected, got=first_line(error)) from error
        self.people[name] = person
        return person

    def rotate(self, name: str, public_pem: str, *, at: datetime | None = None) -> Person:
        """Trust a person's new key instead of those they have, whose signatures from before still count as of then."""
        person = self.people.get(name)
        if person is None:
            raise SignatureError(f"{name[:100]!r} is nobody trusted", expected=sorted(self.people))
        at = at or now()
        self.add(name, person.roles, public_pem, valid_from=at)
        *old, new = self.people[name].keys
        ended = [
            key if key.valid_until and key.valid_until <= at else key.model_copy(update={"valid_until": at})
            for key in old
        ]
        return self._put(name, person.roles, [*ended, new])

    def revoke(self, key_id: str, reason: str, *, since: datetime | None = None) -> Person:
        """Let a key's signatures count no more: all of them, or those made from `since` on."""
        person, key = self._find(key_id)
        if not reason.strip():
            raise SignatureError("a revocation needs a reason", remedy="say why: a lost laptop, a person who left")
        void = min(since or key.valid_from, key.void_from or now())
        gone = key.model_copy(update={"revoked_at": key.revoked_at or now(), "void_from": void, "reason": reason})
        return self._put(person.name, person.roles, [gone if one == key else one for one in person.keys])


@contextlib.contextmanager
def changing(path: Path) -> Iterator[Trust]:
    """Read the trust file, and save what was changed in it; one process at a time."""
    make_folder(path.parent)
    with claimed(path):
        trust = Trust.load(path)
        yield trust
        trust.save(path)
