"""The company's demo: a teapot maker's pilot, from one picture to a signed, approved, marked catalog; then tampering.

Every step is a command that a person would type; each is printed before it runs. `qrlora demo --company`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qrlora.errors import QrloraError
from qrlora.quality.report import Code, Figure, Figures, Gallery, Picture, Prose, Report, Section

Run = Callable[[list[str]], int]
PEOPLE = {"ada": ("author",), "ben": ("reviewer",), "cleo": ("reviewer", "operator")}
MIX = "--adapter registry:teapots/teapot:1.2 --adapter registry:teapots/{style}:{weight} --null-space 0.5"


@dataclass
class Company:
    """The demo's folder and current person, and the commands typed so far with their output.

    run: the command line; takes arguments, returns the exit code.
    """

    folder: Path
    run: Run
    actor: str = "ada"
    typed: list[tuple[str, str, str]] = field(default_factory=list)
    """Person, command and output."""

    def type(self, command: str, expected: tuple[int, ...] = (0,)) -> str:
        """Run a command, print it and its output; QrloraError if it ends otherwise than it has to."""
        print(f"\n[{self.actor}] $ qrlora {command}", flush=True)
        out, err = io.StringIO(), io.StringIO()
        os.environ["QRLORA_ACTOR"] = self.actor
        with contextlib.redirect_stdout(_Both(out, sys.stdout)), contextlib.redirect_stderr(_Both(err, sys.stderr)):
            code = self.run(shlex.split(command))
        said = (out.getvalue() + err.getvalue()).strip()
        self.typed.append((self.actor, f"qrlora {command}", said))
        if code not in expected:
            raise QrloraError(f"the demo stopped at: qrlora {command}", expected=expected, got=f"exit code {code}")
        return said

    @contextlib.contextmanager
    def acting(self, name: str) -> Iterator[None]:
        """Let another person type."""
        before, self.actor = self.actor, name
        try:
            yield
        finally:
            self.actor = before


class _Both(io.TextIOBase):
    """A stream that keeps what is written and passes it on."""

    def __init__(self, kept: io.StringIO, shown: Any) -> None:
        self.kept, self.shown = kept, shown

    def write(self, text: str) -> int:
        self.kept.write(text)
        return int(self.shown.write(text))

    def flush(self) -> None:
        self.shown.flush()


def demonstrate(folder: Path, run: Run, changes: Mapping[str, str] | None = None) -> Path:
    """Run the demo in a folder that is made anew; returns its page.

    Args:
        run: the command line.
        changes: replacements in the project file, for a quicker run.

    Raises:
        QrloraError: a step that has to succeed failed, or one that has to be refused was not.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    places = {"QRLORA_KEYS": str(folder / "keys"), "QRLORA_REGISTRY": str(folder / "registry")}
    before = {name: os.environ.get(name) for name in (*places, "QRLORA_ACTOR")}
    os.environ.update(places)
    try:
        company = Company(folder, run)
        line = _founded(company, changes or {})
        _piloted(company, line)
        refusals = _tampered(company)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return _page(company, refusals, time.perf_counter() - started)


def _founded(company: Company, changes: Mapping[str, str]) -> Path:
    """Make keys, trust, the base model, the policy and the project; return the project file."""
    line = company.folder / "line.toml"
    for name, roles in PEOPLE.items():
        with company.acting(name):
            company.type(f"keys new {name}")
        company.type(f"keys trust {name} --key {name} " + " ".join(f"--role {role}" for role in roles))
    company.type("keys certificate teapots --organisation 'Teapot Ltd'")
    company.type(f"pilot new {line}")
    text = line.read_text()
    for old, new in changes.items():
        text = text.replace(old, new)
    line.write_text(text)
    company.type("registry add pico --kind base --name pico --licence Apache-2.0")
    with company.acting("cleo"):
        company.type(f"policy activate {company.folder / 'policy.toml'} --key cleo --reason 'our first rules'")
    return line


def _piloted(company: Company, line: Path) -> None:
    """Run the three stages, each with its decision, and approve the combinations before the third."""
    said = ""
    for _ in (1, 2):
        said = company.type(f"pilot run {line}", (0, 1))
        with company.acting("ben"):
            company.type(f"pilot decide {line} --go --reason '{_reason(said)}' --key ben")
    for digest in re.findall(r"approval approve (sha256:[0-9a-f]+)", said):
        for name in ("ben", "cleo"):
            with company.acting(name):
                company.type(f"approval approve {digest} --key {name}")
    said = company.type(f"pilot run {line} --c2pa teapots", (0, 1))
    with company.acting("cleo"):
        company.type("audit sign --key cleo")
        company.type(f"pilot decide {line} --go --reason '{_reason(said)}' --key cleo")
    company.type(f"pilot status {line}")
    company.type("registry verify")


def _reason(said: str) -> str:
    """Return the reason for a go, which names a gate that recommended otherwise."""
    recommended = "a go is recommended" in said
    return "the gate holds" if recommended else "against the gate, so that the demo can show the rest"


def _tampered(company: Company) -> list[tuple[str, str]]:
    """Try what has to be refused; returns what was tried, and the refusal."""
    folder, refused = company.folder, []

    def tried(what: str, command: str, codes: tuple[int, ...] = (1, 2)) -> None:
        refused.append((what, company.type(command, codes)))

    generate = f"generate --prompt 'a photo of a teal <c> in <s> style' --require-approval -o {folder / 'out.png'} "
    company.type(generate + MIX.format(style="chalk", weight=1.6))
    tried("One weight is changed from 1.6 to 1.5.", generate + MIX.format(style="chalk", weight=1.5))
    tried(
        "A forbidden word is in the prompt.",
        generate.replace("teal", "cheap teal") + MIX.format(style="gold", weight=1.6),
    )
    picture = _one_picture(folder)
    data = bytearray(picture.read_bytes())
    data[len(data) // 2] ^= 1
    edited = folder / "edited.png"
    edited.write_bytes(data)
    company.type(f"who-made {picture}")
    tried("One bit of a marked picture is changed.", f"who-made {edited}", (0, 1, 2))
    with sqlite3.connect(folder / "registry" / "registry.db") as database:
        database.execute("UPDATE audit SET actor = 'ben' WHERE seq = 5")
    tried("One row of the audit log is edited.", "audit verify")
    stored = max(
        (folder / "registry" / "objects").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    content = bytearray(stored.read_bytes())
    content[-1] ^= 1
    stored.chmod(0o644)
    stored.write_bytes(content)
    tried("One byte of an adapter in the registry is changed.", "registry verify")
    return refused


def _one_picture(folder: Path) -> Path:
    return min((folder / "line.pilot" / "catalog" / "pictures").rglob("*.png"))


def _gates(company: Company) -> str:
    """Say of which stages the gate recommended a no-go: the demo goes on all the same."""
    runs = [said for _, command, said in company.typed if command.startswith("qrlora pilot run")]
    against = [str(stage) for stage, said in enumerate(runs, 1) if "a no-go is recommended" in said]
    told = f"The gate of stage {' and '.join(against)} recommends a no-go; the demo goes on to show the rest."
    return told if against else "All gates hold."


def _page(company: Company, refusals: list[tuple[str, str]], seconds: float) -> Path:
    """Return the page of the demo: the catalog's pictures, the decisions, and the refusals."""
    from qrlora.quality.images.read import load_picture

    pictures = sorted((company.folder / "line.pilot" / "catalog").rglob("*.png"))[:16]
    gallery = [Picture(load_picture(path).pixels, path.parent.name) for path in pictures]
    figures = [
        Figure(f"{seconds / 60:.1f} min", "from one picture to the refusals"),
        Figure(str(len(company.typed)), "commands"),
    ]
    commands = "\n".join(f"[{who}] {command}" for who, command, _ in company.typed)
    sections = [
        Section(
            "",
            [Gallery(gallery), Figures(figures)],
            f"Every picture is marked (C2PA); both combinations are approved by two people. {_gates(company)}",
        ),
        Section("Then somebody tampers", [block for what, said in refusals for block in (Prose([what]), Code(said))]),
        Section("What was typed", [Code(commands)]),
    ]
    data = {
        "commands": [list(one) for one in company.typed],
        "refusals": [list(one) for one in refusals],
        "seconds": seconds,
    }
    title = "Teapot Ltd: from one picture to the line"
    return Report(title, "A pilot on the embedded base model", sections, json.loads(json.dumps(data))).write(
        company.folder
    )
