"""`qrlora audit` and `qrlora who-made`: what was done in a registry, and where a picture comes from."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from qrlora.apps.cli.command import Group, Options, command
from qrlora.apps.cli.keys import load_key, load_trust, signing_option
from qrlora.apps.cli.recorded import open_registry, packages, registry_option
from qrlora.apps.cli.shared import COUNT, PATH, json_option
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.operations.registry.who_made import Origins

heads_option = click.option(
    "--heads",
    multiple=True,
    type=PATH,
    metavar="FILE",
    help="copy of audit-heads.jsonl kept elsewhere; its signed heads count besides the registry's",
)


@click.group(cls=Group)
def audit() -> None:
    """Print, sign and verify the audit log, to which everything that changes a registry is written."""


@command("show", "Print the newest entries of the audit log")
@registry_option
@click.option("--last", type=COUNT, default=20, help="number of entries (default: 20)")
@json_option
def run_show(options: Options) -> None:
    """Print the entries, oldest first."""
    entries = open_registry(options).log()[-options.last :]
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1))
        return
    for entry in entries:
        print(f"{entry.seq:6} {entry.at[:19]} {entry.actor}: {entry.action} {entry.subject} {entry.details}")


@command("sign", "Sign the audit log as it is now, so that cutting it off later is found")
@signing_option
@heads_option
@registry_option
def run_audit_sign(options: Options) -> None:
    """Sign the head and print it."""
    registry, key = open_registry(options), load_key(options.key)
    from qrlora.operations.registry.heads import FILE, sign_head

    seq, head = sign_head(registry, key, load_trust(registry), options.heads)
    print(f"{seq} entries, head {head[:12]}, signed with key {key.key_id[:12]}: {registry.folder / FILE}")
    print("copy that file to a place that those who write to the registry cannot change")


@command("verify", "Find what was changed, dropped, reordered or cut off in the audit log")
@heads_option
@registry_option
def run_audit_verify(options: Options) -> int:
    """Print the faults; 1 if there is one."""
    registry = open_registry(options)
    from qrlora.operations.registry.heads import faults_of, newest_head

    check_heads(options.heads)
    trust, entries = load_trust(registry), registry.log()
    faults = faults_of(registry, trust, options.heads, entries=entries)
    print(*faults, sep="\n", end="\n" if faults else "")
    signed = newest_head(registry, trust, entries, options.heads)
    print(f"{len(entries)} entries, {len(faults)} faults; {signed.words}")
    return 1 if faults else 0


def check_heads(files: Sequence[Path]) -> None:
    """Raise QrloraError unless all files of heads are there."""
    for path in files:
        if not path.is_file():
            raise QrloraError(f"no file {path}", remedy="name a copy of audit-heads.jsonl")


@command("who-made", "Print where a picture comes from: its signed manifest, the registry, what looks like it")
@click.argument("picture", type=PATH)
@registry_option
@click.option(
    "--root", multiple=True, type=PATH, help="root certificate to trust, besides those in your folder of keys"
)
@click.option("--sidecar", type=PATH, help="C2PA manifest beside the picture (default: PICTURE.c2pa if it is there)")
@json_option
def run_who_made(options: Options) -> int:
    """Print what is known; 1 if nothing is."""
    with packages():
        from qrlora.operations.provenance.certificates import own_roots, read_root
        from qrlora.operations.registry import default_place
        from qrlora.operations.registry.who_made import who_made
    if not options.picture.is_file():
        raise QrloraError(f"no picture {options.picture}", remedy="check its name")
    place = options.registry or default_place()
    asked = options.registry or "://" in place or (Path(place) / "registry.db").is_file()
    beside = options.picture.with_name(options.picture.name + ".c2pa")
    sidecar = options.sidecar or (beside if beside.is_file() else None)
    found = who_made(
        options.picture.read_bytes(),
        open_registry(options) if asked else None,
        [*own_roots(), *map(read_root, options.root)],
        sidecar=sidecar.read_bytes() if sidecar else None,
    )
    print(json.dumps(_record(found), indent=1) if options.json else "\n".join(_lines(found, bool(asked))))
    return 0 if found.manifest.state == "valid" or found.exact or found.near else 1


def _record(found: Origins) -> dict[str, object]:
    return {
        "digest": found.digest,
        "c2pa": {**dataclasses.asdict(found.manifest), "words": found.manifest.words},
        "exact": found.exact.title if found.exact else None,
        "near": [{"artifact": one.title, "digest": one.digest, "bits": bits} for one, bits in found.near],
        "text": dict(found.text),
    }


def _lines(found: Origins, registry: bool) -> list[str]:
    from qrlora.operations.provenance.perceptual import closeness

    manifest = found.manifest
    lines = [f"C2PA: {manifest.words}"]
    lines += [f"  {key}: {value}" for key, value in manifest.origin.items()]
    lines += [f"  made with {name} ({digest[:19]})" for name, digest in manifest.ingredients]
    if not registry:
        lines.append("registry: none was asked")
    elif found.exact:
        by = f", added by {found.exact.created_by} on {found.exact.created_at:%Y-%m-%d}"
        lines.append(f"registry: these very bytes are {found.exact.title} ({found.exact.digest[:19]}){by}")
    else:
        lines.append("registry: these bytes are not in it")
    for one, bits in found.near:
        lines.append(f"looks like {one.title} ({one.digest[:19]}): {bits} of 64 bits differ; {closeness(bits)}")
    if registry and not found.near:
        lines.append("looks like: nothing registered, which proves nothing; a cropped or turned copy is not found")
    text = {key: found.text[key] for key in ("prompt", "seed", "adapter") if key in found.text}
    lines.append(f"text in the file: {json.dumps(text)} (anybody can write that)" if text else "text in the file: none")
    return lines


for one in (run_show, run_audit_sign, run_audit_verify):
    audit.add_command(one)
