"""Mark finished pictures by C2PA, in the process that gives out the work: the key never leaves its machine."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

from qrlora._files import write_atomically
from qrlora.models.exchange import load_any
from qrlora.operations.catalog.journal import Outcome
from qrlora.operations.catalog.plan import Picture, Settings
from qrlora.operations.provenance.c2pa import Origin, mark, read
from qrlora.operations.provenance.canonical import digest_of, known_digest
from qrlora.operations.provenance.certificates import Certificate, own_roots

KEPT = 4096
"""Adapters whose metadata is remembered."""


class Marker:
    """Signs pictures by the certificate that the settings name. SignatureError if there is none."""

    def __init__(self, settings: Settings) -> None:
        assert settings.c2pa is not None
        self.settings, self.signer, self.roots = settings, Certificate.load(settings.c2pa), list(own_roots())
        self.metadata = functools.lru_cache(maxsize=KEPT)(lambda path: load_any(Path(path)).metadata)

    def marked(self, picture: Picture, outcome: Outcome) -> Outcome:
        """Mark the file of a picture that was made, and return its outcome with the marked file's digest and size.

        A file that was marked by us keeps its mark: a process that was killed may not have written its row.
        """
        if outcome.error:
            return outcome
        path = self.settings.folder / picture.file
        content = path.read_bytes()
        if read(content, self.roots).state != "valid":
            parts = [(Path(part).name, known_digest(part), self.metadata(part)) for part, _ in picture.parts]
            what = (self.settings.model, picture.prompt, picture.seed, picture.composition)
            content = mark(content, Origin.of(parts, *what, title=path.name), self.signer)
            write_atomically(path, content, rescue=False)
        return replace(outcome, digest=digest_of(content), size=len(content))
