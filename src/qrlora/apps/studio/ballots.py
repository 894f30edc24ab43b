"""The pages of a blind vote, for comparisons and for pilots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastapi import Response
from starlette.requests import Request

from qrlora.apps.studio.forms import Form
from qrlora.apps.studio.pages import error_page, page
from qrlora.apps.studio.state import person_of
from qrlora.errors import QrloraError
from qrlora.quality.study.ballot import Ballot
from qrlora.quality.study.votes import NoVotesError, VoteCount


@dataclass(frozen=True)
class Booth:
    """One blind vote in the browser.

    Attributes:
        place: address under which `vote` and `tally` are.
        home: address of the page that it belongs to.
        title: of that page.
    """

    ballot: Ballot
    place: str
    home: str
    title: str

    def next(self, request: Request) -> Response:
        """Show the next pair that this person has not seen, or the end."""
        data = self.ballot.data()
        seen = {one["trial"] for one in self.ballot.given(person_of(request))["votes"]}
        trial = next((one for one in data["trials"] if one["id"] not in seen), None)
        return page(
            request,
            "part_vote.html" if "hx-request" in request.headers else "vote.html",
            question=data["question"],
            booth=self,
            trial=trial,
            sources={side: data["pictures"][trial[side]] for side in "ab"} if trial else {},
            done=len(seen),
            of=len(data["trials"]),
        )

    def take(self, request: Request, form: Form) -> Response:
        """Take a vote, and show the next pair."""
        self.ballot.vote(person_of(request), form.text("trial"), form.text("choice"))
        return self.next(request)

    def tally(self, request: Request, titles: Mapping[str, str]) -> Response:
        """Show the count of the votes so far. Whoever is still voting does not see it by accident: it has a page of
        its own.

        Args:
            titles: of the arms.
        """
        try:
            found: VoteCount | NoVotesError = self.ballot.count()
        except NoVotesError as error:
            found = error
        except QrloraError as error:
            return error_page(request, error)
        return page(request, "part_tally.html", found=found, titles=titles)
