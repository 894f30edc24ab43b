"""Read, write and apply keys of Ed25519, and of ECDSA on P-256 with SHA-256, in PEM files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from qrlora._files import disk_error
from qrlora._said import joined, said, verbatim
from qrlora.errors import SignatureError

FOLDER, PASSPHRASE = "QRLORA_KEYS", "QRLORA_KEY_PASSPHRASE"
PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey
ALGORITHMS = ("ed25519", "ecdsa-p256")
MOST_BYTES = 1 << 16
"""Largest key file."""


def algorithm_of(key: object) -> str | None:
    if isinstance(key, (ed25519.Ed25519PublicKey, ed25519.Ed25519PrivateKey)):
        return "ed25519"
    elliptic = isinstance(key, (ec.EllipticCurvePublicKey, ec.EllipticCurvePrivateKey))
    return "ecdsa-p256" if elliptic and isinstance(key.curve, ec.SECP256R1) else None  # type: ignore[attr-defined]


def read_public(pem: str | bytes) -> PublicKey:
    """Return a public key from PEM. SignatureError unless it is Ed25519 or ECDSA on P-256."""
    data = pem.encode() if isinstance(pem, str) else pem
    try:
        key = serialization.load_pem_public_key(data[:MOST_BYTES])
    except (ValueError, UnsupportedAlgorithm) as error:
        remedy = "give the file NAME.pub that `qrlora keys new` wrote"
        raise SignatureError("no public key", expected="PEM", got=first_line(error), remedy=remedy) from error
    if algorithm_of(key) is None or not isinstance(key, PublicKey):
        raise SignatureError(
            "no key of an algorithm in use here",
            expected=" or ".join(ALGORITHMS),
            got=type(key).__name__,
            remedy="make one with `qrlora keys new NAME`",
        )
    return key


def key_id_of(key: PublicKey) -> str:
    """Return the hexadecimal SHA-256 of the key's DER (SubjectPublicKeyInfo)."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def signature_holds(key: PublicKey, signature: bytes, message: bytes) -> bool:
    """Return True if this key signed the message. The key alone decides the algorithm, never what came with it."""
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
        else:
            key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def public_pem_of(key: PublicKey) -> str:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def private_pem(key: PrivateKey, passphrase: str | None = None) -> bytes:
    """Return a private key as PKCS#8 PEM, encrypted if there is a passphrase."""
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        encryption = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def read_private(path: Path, passphrase: str | None = None) -> PrivateKey:
    """Read a private key's file. SignatureError if it is missing, open to others, damaged or needs a passphrase."""
    passphrase = passphrase or os.environ.get(PASSPHRASE)
    try:
        status = path.stat()
        data = path.read_bytes() if status.st_size <= MOST_BYTES else b""
    except OSError as error:
        remedy = said("`qrlora keys list` shows the keys there are; %(folder)s names their folder", folder=FOLDER)
        raise SignatureError(said("no private key %(path)s", path=path), got=error.strerror, remedy=remedy) from error
    if os.name == "posix" and status.st_mode & 0o077:
        got = said("mode %(mode)s", mode=f"{status.st_mode & 0o777:o}")
        remedy = said("chmod 600 %(path)s; if others had read it, revoke it and make a new one", path=path)
        raise SignatureError(
            said("others can read the private key %(path)s", path=path), expected="mode 600", got=got, remedy=remedy
        )
    try:
        key = _private(data, passphrase)
    except TypeError as error:
        raise SignatureError(
            said("%(path)s needs its passphrase", path=path), remedy=said("set %(variable)s", variable=PASSPHRASE)
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        expected = "a private key in PEM, and its passphrase if it has one"
        raise SignatureError(
            said("%(path)s cannot be read", path=path), expected=expected, got=first_line(error)
        ) from error
    if algorithm_of(key) is None or not isinstance(key, PrivateKey):
        expected = joined(map(verbatim, ALGORITHMS), " or ")
        raise SignatureError(
            said("%(path)s has a key of another kind", path=path), expected=expected, got=type(key).__name__
        )
    return key


def _private(data: bytes, passphrase: str | None) -> object:
    try:
        return serialization.load_pem_private_key(data, passphrase.encode() if passphrase else None)
    except TypeError:  # it is encrypted, and no passphrase is given; or it is not, and the one given is another key's
        if not passphrase:
            raise
        return serialization.load_pem_private_key(data, None)


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that must not be there yet. SignatureError if it is: a key that is overwritten is lost."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError as error:
        remedy = "choose another name; an old key is kept to verify what it signed"
        raise SignatureError(f"{path} is already there", expected="no such file", remedy=remedy) from error
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise disk_error(error, path) from error
