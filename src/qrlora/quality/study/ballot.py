"""A study on disk, with the votes that come in: from a page of this program, or in the files that its own page saves.

study.json     what voters are shown
key.json       which picture is whose; no voter sees it
vote.html      the study as one page, to send to people
votes/         one file of each rater
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qrlora._files import make_folder, write_all, write_atomically
from qrlora._reading import read_json
from qrlora._said import said
from qrlora.errors import DataError
from qrlora.quality.study.trials import study_page
from qrlora.quality.study.votes import VoteCount, checked_key, count_votes, rater_of

STUDY, KEY, PAGE, VOTES = "study.json", "key.json", "vote.html", "votes"


@dataclass(frozen=True)
class Ballot:
    """The files of one study in a folder."""

    folder: Path

    @property
    def made(self) -> bool:
        return all((self.folder / name).is_file() for name in (STUDY, KEY))

    @property
    def page(self) -> Path:
        """The page to send to people."""
        return self.folder / PAGE

    @property
    def votes(self) -> Path:
        """Folder of the votes."""
        return self.folder / VOTES

    def write(self, data: Mapping[str, Any], key: Mapping[str, Any]) -> None:
        """Write a study as `study_data` returns it.

        A different study in this folder moves, with its votes, into a subfolder named by its id, because its votes are
        about other pictures. Writing it again restores both.
        """
        if (self.folder / KEY).is_file() and (before := self.key()["study"]) != data["id"]:
            _move(self.folder, self.folder / before)
            _move(self.folder / str(data["id"]), self.folder)
        make_folder(self.votes)
        content = {STUDY: json.dumps(data), KEY: json.dumps(key, ensure_ascii=False), PAGE: study_page(data)}
        write_all({self.folder / name: text.encode() for name, text in content.items()})

    def data(self) -> dict[str, Any]:
        """Return the content of study.json, which voters see."""
        found: dict[str, Any] = read_json(self.folder / STUDY, "study", DataError)
        return found

    def key(self) -> dict[str, Any]:
        """Return the checked key."""
        path = self.folder / KEY
        return checked_key(read_json(path, "key of a study", DataError), str(path))

    def shows(self, arm: str) -> set[str]:
        """Return the file names of an arm's pictures."""
        return {one["picture"] for one in self.key()["pictures"].values() if one["arm"] == arm}

    def files(self) -> list[Path]:
        """List the files of votes."""
        return sorted(self.votes.glob("*.json"))

    def given(self, rater: str) -> dict[str, Any]:
        """Return the votes of one rater so far."""
        path = self._file(rater)
        empty = {"study": self.key()["study"], "rater": rater, "votes": []}
        return read_json(path, "votes", DataError) if path.is_file() else empty  # type: ignore[no-any-return]

    def vote(self, rater: str, trial: str, choice: str) -> None:
        """Store one vote; later ones of this rater on this trial are ignored. DataError: unknown trial or choice."""
        shown = next((one for one in self.data()["trials"] if one["id"] == trial), None)
        if shown is None or choice not in ("left", "right", "tie"):
            raise DataError("no such vote", expected="left, right or tie", got=choice[:20], remedy="reload the page")
        given = self.given(rater)
        if trial not in {one["trial"] for one in given["votes"]}:
            given["votes"].append({"trial": trial, "left": shown["a"], "right": shown["b"], "choice": choice})
            write_atomically(self._file(rater), json.dumps(given).encode(), make_folder=True)

    def add(self, result: object, name: str) -> str:
        """Store the votes of a file that the study's page saved; return their rater.

        Args:
            result: the file's JSON.
            name: the file's, for errors.

        Raises:
            DataError: it is not a vote file of this study, or this rater's votes are stored already.
        """
        rater = rater_of(result, self.key(), name)
        if self._file(rater).exists():
            remedy = 'if they are two people, change "rater" in the file'
            raise DataError(said("%(name)s: there are votes of this rater", name=name), got=rater, remedy=remedy)
        write_atomically(self._file(rater), json.dumps(result).encode(), make_folder=True)
        return rater

    def count(self) -> VoteCount:
        """Count the votes. NoVotesError if there are none to count; DataError as `count_votes`."""
        files = self.files()
        cast = [read_json(path, "votes", DataError) for path in files]
        return count_votes(cast, self.key(), names=[str(path) for path in files])

    def _file(self, rater: str) -> Path:
        name = rater.encode(errors="surrogatepass")
        return self.votes / f"{name.hex() if len(name) <= 60 else hashlib.sha256(name).hexdigest()}.json"


def _move(source: Path, target: Path) -> None:
    """Move what there is of a study; the key last, so that a move that was broken off is begun again."""
    make_folder(target)
    for name in (VOTES, PAGE, STUDY, KEY):
        if (source / name).exists():
            (source / name).rename(target / name)
