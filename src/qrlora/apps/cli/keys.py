"""`qrlora keys`: own keys and certificates, whom a registry trusts, signatures of files and artifacts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._files import claimed, make_folder, write_atomically
from qrlora.apps.cli.command import Group, Options, command, hold
from qrlora.apps.cli.recorded import open_registry, packages, registry_option
from qrlora.apps.cli.shared import COUNT, PATH, claim, refuse_to_replace
from qrlora.errors import QrloraError, SignatureError

if TYPE_CHECKING:
    from qrlora.operations.provenance.certificates import Certificate
    from qrlora.operations.provenance.keys import SigningKey, Trust
    from qrlora.operations.registry import Registry

signing_option = click.option("--key", required=True, metavar="NAME", help="your private key (`qrlora keys list`)")
public_option = click.option(
    "--key", required=True, metavar="FILE.pub", help="public key: a file, or the name of a key in your folder of keys"
)


def load_trust(registry: Registry) -> Trust:
    """Return whom a registry trusts."""
    from qrlora.operations.registry.signatures import trust_of

    return trust_of(registry)


c2pa_option = click.option(
    "--c2pa",
    metavar="NAME",
    help="mark each picture with a signed C2PA manifest by this certificate (`qrlora keys certificate`)",
)


def load_certificate(name: str | None) -> Certificate | None:
    """Return the certificate of --c2pa, before time is spent; say what its end means where that is near."""
    if not name:
        return None
    with packages():
        from qrlora.operations.provenance import c2pa as _  # noqa: F401
        from qrlora.operations.provenance.certificates import Certificate
    signer = Certificate.load(name)
    if said := signer.check():
        print(said, file=sys.stderr)
    return signer


def load_key(name: str) -> SigningKey:
    """Return a private key of the user's."""
    with packages():
        from qrlora.operations.provenance.keys import SigningKey
    return SigningKey.load(name)


@click.group(cls=Group)
def keys() -> None:
    """Make keys and certificates, say whom a registry trusts, sign and verify (docs/provenance.md)."""


@command("new", "Make a key of your own: NAME.pem stays with you, NAME.pub is for others")
@click.argument("name", help="NAME of the files in your folder of keys")
@click.option(
    "--algorithm",
    type=click.Choice(["ed25519", "ecdsa-p256"]),
    default="ed25519",
    help="signature algorithm (default: ed25519)",
)
@click.option("--passphrase", is_flag=True, help="ask for a passphrase (else $QRLORA_KEY_PASSPHRASE, else none)")
def run_new(options: Options) -> None:
    """Make the key and print where it is."""
    with packages():
        from qrlora.operations.provenance.algorithms import PASSPHRASE
        from qrlora.operations.provenance.keys import SigningKey, default_folder

    secret = os.environ.get(PASSPHRASE)
    if options.passphrase:
        secret = click.prompt("Passphrase", hide_input=True, confirmation_prompt=True, err=True)
    made = SigningKey.create(None, options.name, options.algorithm, secret)
    print(f"{default_folder() / f'{options.name}.pem'}: {made.algorithm}, key {made.key_id[:12]}")
    print(f"give {options.name}.pub to an operator of the registry: qrlora keys trust PERSON --key {options.name}.pub")


@command("list", "Print your keys and certificates, and whom the registry trusts as what")
@registry_option
def run_list(options: Options) -> None:
    """Print all keys in words."""
    with packages():
        from qrlora.operations.provenance.algorithms import algorithm_of, key_id_of, read_public
        from qrlora.operations.provenance.certificates import ending, own_certificates
        from qrlora.operations.provenance.keys import day, default_folder, now
        from qrlora.operations.registry import Registry, default_place
    folder = default_folder()
    for path in sorted(folder.glob("*.pub")):
        public = read_public(path.read_text())
        print(f"{path.stem}: your key {key_id_of(public)[:12]}, {algorithm_of(public)}")
    for name, ends in own_certificates():
        print(f"{name}: your certificate, until {day(ends)}")
        if said := ending(name, ends, now()):
            print(said, file=sys.stderr)
    place = options.registry or default_place()
    if options.registry is None and "://" not in place and not (Path(place) / "registry.db").is_file():
        return  # nobody asked for a registry
    registry = Registry.open(place, create=False)
    hold(contextlib.closing(registry))
    for person in load_trust(registry).people.values():
        print(f"{person.name}: {', '.join(person.roles)}")
        for key in person.keys:
            until = f", until {day(key.valid_until)}" if key.valid_until else ""
            print(f"  {key.key_id[:12]} {key.algorithm}: {key.state(now()) or f'in force{until}'}")


@contextlib.contextmanager
def _changing(options: Options, change: str) -> Iterator[tuple[Trust, dict[str, str]]]:
    """Change the trust file, and write to the audit log how."""
    registry = open_registry(options, create=change == "trust")  # the first thing that a new registry needs
    from qrlora.operations.provenance.keys import changing
    from qrlora.operations.registry.heads import log_trust
    from qrlora.operations.registry.signatures import trust_path

    about, path = {"person": "", "key_id": ""}, trust_path(registry)
    make_folder(path.parent)
    with claimed(path):  # over both: the log's last entry has to be about the file's last state
        with changing(path) as trust:
            yield trust, about
        log_trust(registry, change, about["person"], about["key_id"])


def _public(text: str) -> str:
    """Return the PEM of a public key: a file, or a name in the folder of keys."""
    with packages():
        from qrlora.operations.provenance.keys import check_key_name, default_folder
    path = Path(text) if Path(text).is_file() else default_folder() / f"{check_key_name(text)}.pub"
    if not path.is_file():
        raise SignatureError(f"no public key {text}", expected="a file NAME.pub", remedy="ask its owner for it")
    return path.read_text(errors="replace")


def _key_id(text: str) -> str:
    """Return a key's id, or the beginning of it that was given; of a file, or of a key in one's own folder."""
    if re.fullmatch("[0-9a-f]{8,64}", text):
        return text
    pem = _public(text)
    from qrlora.operations.provenance.algorithms import key_id_of, read_public

    return key_id_of(read_public(pem))


def _utc(at: datetime | None) -> datetime | None:
    return at.replace(tzinfo=timezone.utc) if at else None


DATE = click.DateTime(["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S"])


@command("trust", "Let the registry trust a person's key; the person has exactly these roles from now on")
@click.argument("person", help="name of the person in this registry")
@public_option
@click.option(
    "--role",
    multiple=True,
    required=True,
    type=click.Choice(["author", "reviewer", "operator"]),
    help="may be given several times",
)
@click.option("--until", type=DATE, metavar="YYYY-MM-DD", help="day on which the trust ends (default: never)")
@registry_option
def run_trust(options: Options) -> None:
    """Add the key and print whom the registry trusts as what."""
    public = _public(options.key)
    with _changing(options, "trust") as (trust, about):
        person = trust.add(options.person, options.role, public, valid_until=_utc(options.until))
        about.update(person=person.name, key_id=person.keys[-1].key_id)
    print(f"{person.name}: {', '.join(person.roles)}, with key {person.keys[-1].key_id[:12]}")


@command("rotate", "Trust a person's new key instead of the old ones; what those signed before still counts")
@click.argument("person", help="name of the person in this registry")
@public_option
@registry_option
def run_rotate(options: Options) -> None:
    """Rotate the key."""
    public = _public(options.key)
    with _changing(options, "rotate") as (trust, about):
        person = trust.rotate(options.person, public)
        about.update(person=person.name, key_id=person.keys[-1].key_id)
    print(f"{person.name}: key {person.keys[-1].key_id[:12]} from now on")


@command("revoke", "Invalidate a key's signatures: all it ever made, or those since a day")
@click.argument("key", metavar="KEY_ID|FILE.pub")
@click.option("--reason", required=True, help="why, for the audit log")
@click.option(
    "--since",
    type=DATE,
    metavar="YYYY-MM-DD",
    help="signatures made before it still count; give it only if you are sure of the day",
)
@registry_option
def run_revoke(options: Options) -> None:
    """Revoke the key whose id begins so."""
    wanted = _key_id(options.key)
    with _changing(options, "revoke") as (trust, about):
        found = [key for one in trust.people.values() for key in one.keys if key.key_id.startswith(wanted)]
        if len(found) != 1:
            remedy = "`qrlora keys list` shows the keys; give more digits"
            raise SignatureError(f"no one key {wanted}", expected="one", got=len(found), remedy=remedy)
        person = trust.revoke(found[0].key_id, options.reason, since=_utc(options.since))
        about.update(person=person.name, key_id=found[0].key_id)
    which = f"from {options.since:%Y-%m-%d} on" if options.since else "whenever made"
    print(f"{person.name}: signatures of key {found[0].key_id[:12]} do not count, {which}")


@command("certificate", "Make a root and a certificate under it, to mark pictures with (C2PA)")
@click.argument("name", help="NAME of the files in your folder of keys")
@click.option("--organisation", help="the signer's name, as readers of a picture will see it")
@click.option("--years", type=COUNT, default=10, help="years for which the certificate is valid (default: 10)")
@click.option("--renew", is_flag=True, help="a new certificate for NAME under the same root")
def run_certificate(options: Options) -> None:
    """Make the files and print what each is for."""
    with packages():
        from qrlora.operations.provenance.certificates import Certificate
        from qrlora.operations.provenance.keys import day, default_folder
    if options.renew == bool(options.organisation):
        raise click.UsageError("give --organisation TEXT for a new certificate, or --renew for one that is there.")
    if options.renew:
        made = Certificate.renew(options.name, years=options.years)
    else:
        made = Certificate.create(None, options.name, options.organisation, years=options.years)
    print(f"{default_folder() / options.name}.root.crt: give it to those who shall know your pictures")
    print(f"it marks pictures until {day(made.ends)}: qrlora generate --c2pa {options.name} ...")
    print(f"keep {options.name}.root.key away from this machine; --renew alone needs it")


@command("sign", "Sign a registered artifact, or a file, with your key")
@click.argument("what", metavar="registry:NAME|FILE")
@signing_option
@click.option("--note", default="", help="what you looked at; it is signed too")
@click.option("--bundle", is_flag=True, help="for a file: write a sigstore bundle, FILE.sigstore.json")
@registry_option
def run_sign(options: Options) -> None:
    """Sign and print where the signature is."""
    key = load_key(options.key)
    if options.what.startswith("registry:"):
        registry = open_registry(options)
        from qrlora.operations.registry.signatures import sign_artifact

        artifact = registry.get(options.what)
        load_trust(registry).person_of(key.key_id)
        added = sign_artifact(registry, artifact, key, options.note)
        print(f"{artifact.title} ({artifact.digest[:19]}) signed with key {key.key_id[:12]}: {added.digest[:19]}")
        return
    from qrlora.operations.provenance import dsse
    from qrlora.operations.provenance.canonical import file_digest
    from qrlora.operations.registry.signatures import SIGNATURE

    path = _there(options.what)
    made = dsse.statement(SIGNATURE, [(path.name, file_digest(path))], {"kind": "file", "note": options.note})
    envelope: dict[str, Any] = dsse.sign(made, key)
    target = path.with_name(path.name + (".sigstore.json" if options.bundle else ".dsse.json"))
    refuse_to_replace(target, "keep it, or move it away first")
    claim(target)
    content = dsse.to_bundles(envelope)[0] if options.bundle else envelope
    write_atomically(target, json.dumps(content, indent=1).encode() + b"\n")
    print(f"{target}: {path.name} signed with key {key.key_id[:12]}")


@command("verify", "Print who signed a registered artifact, or a file with its signature beside it")
@click.argument("what", metavar="registry:NAME|FILE")
@click.option(
    "--signature", type=PATH, help="signature of a file: FILE.dsse.json or FILE.sigstore.json (default: beside it)"
)
@registry_option
def run_verify(options: Options) -> int:
    """Print each signature; 1 if nobody signed."""
    registry = open_registry(options)
    from qrlora.operations.provenance.keys import day
    from qrlora.operations.registry.signatures import verify_artifact

    trust = load_trust(registry)
    if not options.what.startswith("registry:"):
        return _verify_file(options, trust)
    found = verify_artifact(registry, registry.get(options.what), trust)
    for one in found:
        note = f": {one.note}" if one.note else ""
        print(f"signed by {one.person.name} ({', '.join(one.person.roles)}), registered {day(one.at)}{note}")
    if not found:
        print("nobody has signed it")
    return 0 if found else 1


def _verify_file(options: Options, trust: Trust) -> int:
    from qrlora.operations.provenance import dsse
    from qrlora.operations.provenance.canonical import file_digest
    from qrlora.operations.registry.signatures import SIGNATURE

    path = _there(options.what)
    beside = [path.with_name(path.name + ending) for ending in (".dsse.json", ".sigstore.json")]
    signature = options.signature or next((one for one in beside if one.is_file()), None)
    if signature is None:
        print("nobody has signed it: no .dsse.json or .sigstore.json beside it")
        return 1
    envelope = dsse.read_envelope(_there(signature).read_bytes())
    envelope = dsse.from_bundle(envelope) if "mediaType" in envelope else envelope
    statement, people = dsse.verify(envelope, trust, predicate_type=SIGNATURE)
    if dsse.subjects_of(statement) != [file_digest(path)]:
        expected, got = dsse.subjects_of(statement), file_digest(path)
        raise SignatureError(f"{signature} is no signature of {path}", expected=expected, got=got)
    for person in people:
        print(f"signed by {person.name} ({', '.join(person.roles)})")
    return 0


def _there(path: str | Path) -> Path:
    if not (found := Path(path)).is_file():
        raise QrloraError(f"no file {path}", remedy="check its name; an artifact is named registry:NAME")
    return found


for one in (run_new, run_list, run_trust, run_rotate, run_revoke, run_certificate, run_sign, run_verify):
    keys.add_command(one)
