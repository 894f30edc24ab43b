"""Make certificates for marking pictures: an own root, and a long-lived leaf under it.

A C2PA manifest is signed with an X.509 certificate. Whoever trusts the root (NAME.root.crt) knows the pictures signed
under it. Without a timestamp authority nothing proves when a picture was signed, so its signature ends with the leaf.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from qrlora._files import make_folder, write_atomically
from qrlora.errors import SignatureError
from qrlora.operations.provenance.algorithms import PrivateKey, algorithm_of, private_pem, read_private, write_new
from qrlora.operations.provenance.keys import check_key_name, day, default_folder, now

ROOT_YEARS, LEAF_YEARS = 20, 10
NEAR = timedelta(days=60)
"""Time before a certificate's end from which a warning is given."""
_PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Certificate:
    """A leaf with its private key, and the root that stands for the company.

    Attributes:
        chain_pem: the leaf and the root.
        root_pem: what others have to trust.
    """

    name: str
    private: PrivateKey = field(repr=False)
    chain_pem: str = field(repr=False)
    root_pem: str = field(repr=False)

    @classmethod
    def create(
        cls,
        folder: Path | None,
        name: str,
        organisation: str,
        *,
        years: float = LEAF_YEARS,
        passphrase: str | None = None,
    ) -> Certificate:
        """Make root and leaf: NAME.root.key, NAME.root.crt, NAME.leaf.key, NAME.leaf.crt. SignatureError if there."""
        folder = folder or default_folder()
        check_key_name(name)
        _check_organisation(organisation)
        make_folder(folder)
        root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        authority = _root(root, organisation)
        chain = _leaf(leaf, name, organisation, authority, root, years)
        write_new(folder / f"{name}.root.key", private_pem(root, passphrase))
        write_new(folder / f"{name}.leaf.key", private_pem(leaf, passphrase))
        write_new(folder / f"{name}.root.crt", authority.public_bytes(_PEM), 0o644)
        write_new(folder / f"{name}.leaf.crt", chain.encode(), 0o644)
        return cls(name, leaf, chain, authority.public_bytes(_PEM).decode())

    @classmethod
    def load(cls, name: str, folder: Path | None = None, passphrase: str | None = None) -> Certificate:
        """Read a certificate and its key. SignatureError if one is missing, open to others or damaged."""
        folder = folder or default_folder()
        private = read_private(folder / f"{check_key_name(name)}.leaf.key", passphrase)
        chain, root = (read_root(folder / f"{name}.{part}.crt") for part in ("leaf", "root"))
        made = cls(name, private, chain, root)
        if made.leaf.public_key() != private.public_key():
            remedy = f"`qrlora keys certificate {name} --renew` makes one for it"
            raise SignatureError(f"{name}.leaf.crt is not the certificate of {name}.leaf.key", remedy=remedy)
        return made

    @classmethod
    def renew(
        cls, name: str, *, years: float = LEAF_YEARS, folder: Path | None = None, passphrase: str | None = None
    ) -> Certificate:
        """Make a new certificate for the leaf's key under the same root; whoever trusts the root need not change
        anything."""
        folder = folder or default_folder()
        old = cls.load(name, folder, passphrase)
        root = read_private(folder / f"{name}.root.key", passphrase)
        authority = x509.load_pem_x509_certificate(old.root_pem.encode())
        [organisation] = authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
        chain = _leaf(old.private, name, str(organisation.value), authority, root, years)
        write_atomically(folder / f"{name}.leaf.crt", chain.encode(), rescue=False)
        return cls(name, old.private, chain, old.root_pem)

    @property
    def leaf(self) -> x509.Certificate:
        return x509.load_pem_x509_certificates(self.chain_pem.encode())[0]

    @property
    def ends(self) -> datetime:
        """Return when the leaf ends; what it signed counts no longer."""
        return self.leaf.not_valid_after_utc

    def check(self, at: datetime | None = None) -> str:
        """Return a warning where it ends soon, else an empty text. SignatureError where it has ended."""
        said = ending(self.name, self.ends, at or now())
        if (at or now()) >= self.ends:
            raise SignatureError(said, remedy=f"`qrlora keys certificate {self.name} --renew`")
        return said


def ending(name: str, ends: datetime, at: datetime) -> str:
    """Return what follows from a certificate's end, where it is near or past; else an empty text."""
    if at < ends - NEAR:
        return ""
    return (
        f"the certificate {name} {'ended' if at >= ends else 'ends'} on {day(ends)}; pictures that it signed read as "
        f"expired from then on, because no timestamp says when they were signed. `qrlora keys certificate {name} "
        "--renew` makes the next one under the same root; mark again what has to stay valid"
    )


def own_certificates(folder: Path | None = None) -> Iterator[tuple[str, datetime]]:
    """Yield name and end of each certificate in the folder of keys."""
    for path in sorted((folder or default_folder()).glob("*.leaf.crt")):
        chain = x509.load_pem_x509_certificates(read_root(path).encode())
        yield path.name.removesuffix(".leaf.crt"), chain[0].not_valid_after_utc


def own_roots(folder: Path | None = None) -> Iterator[str]:
    """Yield the roots (PEM) in the folder of keys: those of this company, and those put there to be trusted."""
    folder = folder or default_folder()
    for path in sorted(folder.glob("*.root.crt")):
        yield read_root(path)


def read_root(path: Path) -> str:
    """Return the PEM in a file. SignatureError if it is no certificate."""
    try:
        text = path.read_text()
        x509.load_pem_x509_certificates(text.encode())
    except (OSError, ValueError) as error:
        got = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "no certificate in PEM"
        remedy = "`qrlora keys certificate NAME --organisation TEXT` makes one"
        raise SignatureError(f"no certificate {path}", got=got, remedy=remedy) from error
    return text


def _check_organisation(organisation: str) -> None:
    if not organisation.strip() or not organisation.isprintable() or len(organisation) > 64:
        raise SignatureError(
            f"{organisation[:80]!r} cannot be an organisation", expected="1 to 64 printable characters"
        )


def _subject(organisation: str, common: str) -> x509.Name:
    named = {NameOID.ORGANIZATION_NAME: organisation, NameOID.COMMON_NAME: common}
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in named.items()])


def _usage(*used: str) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
    )
    return x509.KeyUsage(**{name: name in used for name in names.split()}, encipher_only=False, decipher_only=False)


def _begun(subject: x509.Name, issuer: x509.Name, key: PrivateKey, years: float) -> x509.CertificateBuilder:
    start = now()
    return (
        x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(start - timedelta(minutes=5))  # the clock of another machine may be late
        .not_valid_after(start + timedelta(days=365.25 * years))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _root(key: ec.EllipticCurvePrivateKey, organisation: str) -> x509.Certificate:
    name = _subject(organisation, f"{organisation} root"[:64])
    begun = _begun(name, name, key, ROOT_YEARS)
    begun = begun.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return begun.add_extension(_usage("key_cert_sign", "crl_sign"), critical=True).sign(key, hashes.SHA256())


def _leaf(
    key: PrivateKey, name: str, organisation: str, authority: x509.Certificate, root: PrivateKey, years: float
) -> str:
    """Return a leaf and its root as PEM. C2PA wants these usages, and no certificate that may sign others."""
    if algorithm_of(key) != "ecdsa-p256" or algorithm_of(root) != "ecdsa-p256":
        raise SignatureError(f"the keys of the certificate {name} are of another kind", expected="ecdsa-p256")
    issuer = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    made = (
        _begun(_subject(organisation, name), authority.subject, key, years)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer), critical=False)
        .sign(root, hashes.SHA256())
    )
    return (made.public_bytes(_PEM) + authority.public_bytes(_PEM)).decode()
