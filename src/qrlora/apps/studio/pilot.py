"""Show pilots: from one picture to the line in stages, each with its report and a person's signed decision."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from qrlora._reading import read_json
from qrlora._said import joined, said, verbatim
from qrlora.apps.pilots import open_pilot
from qrlora.apps.samples import SAMPLES
from qrlora.apps.studio import projects
from qrlora.apps.studio.ballots import Booth
from qrlora.apps.studio.forms import Form, fields, renamed, upload
from qrlora.apps.studio.library import reason_and_key
from qrlora.apps.studio.pages import error_page, in_words, language_of, page
from qrlora.apps.studio.runs import PILOTS, RUNNING, STAGE, STUDY, WAITING, Run
from qrlora.apps.studio.state import Studio, person_of, registry_for, studio_of
from qrlora.errors import DataError, QrloraError, RequestError
from qrlora.operations.pilot.line import OURS, STAGES, STUDIED
from qrlora.operations.provenance.keys import key_names

if TYPE_CHECKING:
    from qrlora.operations.pilot import Pilot
    from qrlora.operations.pilot.line import Stage
    from qrlora.operations.pilot.project import Ran
    from qrlora.operations.pilot.report import Words

router = APIRouter()
SHOWN = 24
"""Pictures of a group on the page; the downloaded report has as many."""
ARMS = {OURS: said("With the adapters"), "words": said("The base model, told in words")}
MOST_TEXT = 40_000
"""Characters of a project file."""


@router.get("/pilot")
def show_all(request: Request) -> Response:
    studio = studio_of(request)
    names = projects.projects(studio.place)
    pictures = {name: projects.pictures(projects.project_file(studio.place, name))[:1] for name in names}
    return page(request, "pilots.html", names=names, pictures=pictures, samples=SAMPLES)


@router.post("/pilot")
async def create(request: Request) -> Response:
    """Make a pilot from a sample project or a project file."""
    form, studio = await fields(request), studio_of(request)
    try:
        text = form.text("toml", MOST_TEXT)
        name = await run_in_threadpool(
            projects.create, studio.place, studio.model.name, form.text("sample", default=SAMPLES[0]), text
        )
    except QrloraError as error:
        return error_page(request, error)
    return Response(status_code=204, headers={"HX-Redirect": f"/pilot/{name}"})


@router.get("/pilot/{name}")
def show(request: Request, name: str) -> Response:
    """Show a pilot: where it stands, the stage that is due, and the reports of those that have run."""
    from qrlora.operations.pilot.recording import to_approve

    studio = studio_of(request)
    path = projects.project_file(studio.place, name)
    run, say = _run_of(studio, name), _words(request)
    common: dict[str, Any] = {"name": name, "text": path.read_text(), "pictures": projects.pictures(path), "say": say}
    common |= {"run": run, "stopping": bool(run and studio.runs.stopping(run))}
    try:
        pilot = open_pilot(path, registry_for(request))
    except DataError as error:  # a picture that is gone, a table that was edited: here it can be mended
        trouble = renamed(error, path.parent, ".")
        return page(request, "pilot.html", trouble=trouble, stages=[], due=None, **common)
    stages = [_stage(pilot, stage, say, run, person_of(request)) for stage in STAGES]
    due = next((one for one in stages if one["due"]), None)
    return page(
        request,
        "pilot.html",
        trouble=None,
        line=pilot.line,
        stages=stages,
        due=due,
        to_approve=to_approve(pilot.registry, pilot.line, pilot.policy) if due and due["stage"] != STAGES[0] else [],
        command=f"qrlora pilot decide {path} --go --reason TEXT --key NAME --registry {studio.registry.folder}",
        keys=key_names(),
        shown=SHOWN,
        **common,
    )


def _words(request: Request) -> Words:
    from qrlora.operations.pilot.report import Words

    return Words(language_of(request))  # type: ignore[arg-type]


def _run_of(studio: Studio, name: str) -> Run | None:
    """Return the newest run of a pilot's stages; None if none is known."""
    return next((run for run in studio.runs.all(*PILOTS) if run.name == name), None)


# What a stage's report holds


def _stage(pilot: Pilot, stage: Stage, say: Words, run: Run | None, person: str) -> dict[str, Any]:
    """Return what the page tells of a stage.

    Args:
        run: of the pilot, the newest.
        person: who looks at the page.
    """
    ran = pilot.ran(stage)
    state = _state(pilot, stage, ran)
    busy = run.state if run and not run.over and (run.kind, run.role) == (STAGE, stage) else ""
    told = {"stage": stage, "title": say(f"stage.{stage}"), "state": state, "due": stage == pilot.next, "ran": ran}
    told |= {"busy": busy, "study": None}
    if ran is None:
        return told
    study = _study(pilot, stage, ran, person) if stage in STUDIED and state != "stale" else None
    return told | {"report": _report(ran.results, pilot, say), "study": study}


def _study(pilot: Pilot, stage: Stage, ran: Ran, person: str) -> dict[str, Any]:
    """Return what the page tells of a stage's blind study: its votes, and those that the gate lacks."""
    from qrlora.quality.metrics.shares import least_above
    from qrlora.quality.study.votes import NoVotesError, VoteCount

    ballot, limit = pilot.ballot(stage), getattr(pilot.line.gates, stage).acceptance
    told: dict[str, Any] = {"made": pilot.study_is_about(stage, ran.results), "other": ballot.made, "limit": limit}
    if not told["made"]:
        return told
    try:
        found: VoteCount | NoVotesError = ballot.count()
    except NoVotesError as error:
        found = error
    except DataError as error:  # a file beside the votes that is none of them
        return told | {"trouble": renamed(error, ballot.votes, "votes")}
    share = next(iter(found.pairs.values())).share if isinstance(found, VoteCount) else None
    votes = share.n if share else 0
    needed = 0 if limit is None else least_above(limit) or 1
    return told | {
        "votes": votes,
        "missing": max(0, needed - votes),
        "people": len(ballot.files()),
        "excluded": list(found.excluded),
        "left": len(ballot.key()["trials"]) - len(ballot.given(person)["votes"]),
        "uncounted": (share and share.to_dict()) != ran.results["kpis"]["acceptance"],
    }


def _state(pilot: Pilot, stage: Stage, ran: Ran | None) -> str:
    if ran is None:
        return "new"
    if ran.inputs != pilot.inputs(stage):
        return "stale"
    return {None: "undecided", True: "go", False: "no-go"}[ran.go]


def _report(record: Mapping[str, Any], pilot: Pilot, say: Words) -> dict[str, Any]:
    """Return a stage's results as the page shows them, by the words and rules of the report."""
    from qrlora.operations.pilot.costs import Cost, Parameters
    from qrlora.operations.pilot.report import cost_rows, gate_row, money
    from qrlora.operations.pilot.stages import Check

    kpis = {name: _share(record["kpis"][name]) for name in ("compliance", "acceptance", "rework")}
    checks = [Check(**one) for one in record["checks"]]
    so_far, later = (Cost(**record[key]) if record[key] else None for key in ("cost", "next_cost"))
    looked_at = [group for group in record["groups"] if group["copies"] is not None]
    found, of = (sum(len(group[key]) for group in looked_at) for key in ("copies", "pictures"))
    shares = kpis | {"copies": _share({"right": found, "n": of} if of else None)}
    counted = {key: value for key, value in (record["parameters"] or {}).items() if key != "of_lora"}
    parameters = Parameters(**counted) if counted else None
    price = record["kpis"]["cost_per_picture"]
    return {
        "passes": record["passes"],
        "kpis": {name: share for name, share in kpis.items() if share},
        "price": None if price is None else money(price, pilot.line.costs.currency),
        "checks": [gate_row(one, shares.get(one.name), say) for one in checks],
        "reasons": sorted({reason for group in record["groups"] for reason in group["reasons"]}),
        "groups": [{**group, "passing": _share(group["passing"])} for group in record["groups"]],
        "crosstalk": record["crosstalk"],
        "costs": cost_rows(so_far, later, parameters, pilot.line.costs, say),
        "refused": say("refused", n=record["refused"]) if record["refused"] else "",
    }


def _share(found: Mapping[str, Any] | None) -> Any:
    from qrlora.quality.metrics.shares import Share

    return Share(found["right"], found["n"]) if found else None


# Files


@router.get("/pilot/{name}/pictures/{file}")
def picture(request: Request, name: str, file: str) -> Response:
    path = projects.made(projects.project_file(studio_of(request).place, name), file)
    return FileResponse(path, headers={"Cache-Control": "private, max-age=3600"})


@router.get("/pilot/{name}/report/{stage}")
def report(request: Request, name: str, stage: str) -> Response:
    """Send a stage's report as a file: its styles are in the page, which the content policy here does not allow."""
    studio, language = studio_of(request), language_of(request)
    pilot = open_pilot(projects.project_file(studio.place, name), studio.registry)
    known: Any = stage if stage in pilot.stages else None
    path = pilot.report_folder(known, language) / "report.html" if known else None
    if path is None or not path.is_file():
        raise RequestError("no report of this stage", status=404, got=stage[:40], remedy="run the stage first")
    return FileResponse(path, filename=f"{name}-{stage}-{language}.html", media_type="text/html")


@router.post("/pilot/{name}/pictures")
async def add_picture(request: Request, name: str, file: str = "") -> Response:
    """Take in a picture that the project file may then name: the body is the file."""
    path = projects.project_file(studio_of(request).place, name)
    try:
        target = projects.new_picture(path, file)
        return await _taken_in(request, path, lambda source: projects.take_picture(source, target))
    except QrloraError as error:
        return error_page(request, error)


async def _taken_in(request: Request, path: Path, take: Callable[[Path], object]) -> Response:
    """Give the body of a request to `take` as a file, of which nothing is left."""
    source = path.with_name(f"upload-{secrets.token_hex(8)}")
    try:
        await upload(request, source)
        await run_in_threadpool(take, source)
    finally:
        source.unlink(missing_ok=True)
    return Response(status_code=204)


# The blind study of a stage


def _booth(request: Request, name: str, stage: str) -> Booth:
    """Return the vote of a stage's study. RequestError (404) if there is none."""
    path = projects.project_file(studio_of(request).place, name)
    pilot = open_pilot(path, registry_for(request))
    known = next((one for one in STUDIED if one == stage), None)
    if known is None or not pilot.ballot(known).made:
        raise RequestError("no blind study of this stage", status=404, got=stage[:40], remedy="make it first")
    return Booth(pilot.ballot(known), f"/pilot/{name}/study/{stage}", f"/pilot/{name}", name)


@router.get("/pilot/{name}/study/{stage}/vote")
def vote(request: Request, name: str, stage: str) -> Response:
    return _booth(request, name, stage).next(request)


@router.post("/pilot/{name}/study/{stage}/vote")
async def take_vote(request: Request, name: str, stage: str) -> Response:
    form = await fields(request)
    return await run_in_threadpool(lambda: _booth(request, name, stage).take(request, form))


@router.get("/pilot/{name}/study/{stage}/tally")
def tally(request: Request, name: str, stage: str) -> Response:
    titles = {arm: in_words(request, title) for arm, title in ARMS.items()}
    return _booth(request, name, stage).tally(request, titles)


@router.get("/pilot/{name}/study/{stage}/page")
def study_page(request: Request, name: str, stage: str) -> Response:
    """Send the page on which people vote elsewhere; it saves a file that `votes` takes."""
    path = _booth(request, name, stage).ballot.page
    return FileResponse(path, filename=f"{name}-{stage}-vote.html", media_type="text/html")


@router.post("/pilot/{name}/study/{stage}/votes")
async def add_votes(request: Request, name: str, stage: str, file: str = "") -> Response:
    """Take in the votes that the study's page saved: the body is the file."""
    path = projects.project_file(studio_of(request).place, name)

    def take(source: Path) -> None:
        ballot = _booth(request, name, stage).ballot
        try:
            ballot.add(read_json(source, "votes", DataError), file[:80])
        except DataError as error:
            raise renamed(error, source, file[:80]) from error

    try:
        return await _taken_in(request, path, take)
    except QrloraError as error:
        return error_page(request, error)


# What is done


@router.post("/pilot/{name}/{action}")
async def act(request: Request, name: str, action: str) -> Response:
    """Run or stop a stage, make its study, decide on it, or change the project file."""
    form, studio = await fields(request), studio_of(request)
    known = {"run": _run, "study": _make_study, "stop": _stop, "decide": _decide, "line": _change}
    if action not in known:
        raise RequestError("no such action", status=404, got=action[:40])
    folder = projects.project_file(studio.place, name).parent
    try:
        await run_in_threadpool(known[action], request, name, form)
    except QrloraError as error:
        return error_page(request, renamed(error, folder, "."))
    return Response(status_code=204, headers={"HX-Redirect": f"/pilot/{name}"})


def _resting(studio: Studio, name: str) -> None:
    """Raise RequestError (409) while a stage of the pilot waits or runs."""
    run = _run_of(studio, name)
    if run and not run.over:
        raise RequestError("a stage of this pilot waits or runs", status=409, remedy="wait for its end, or stop it")


def _run(request: Request, name: str, form: Form) -> None:
    pilot, stage = _wanted(request, name, form)
    pilot.check_ready(stage)
    studio_of(request).runs.add_stage(name, stage, person_of(request))


def _make_study(request: Request, name: str, form: Form) -> None:
    pilot, stage = _wanted(request, name, form)
    pilot.check_studied(stage)
    studio_of(request).runs.add_stage(name, stage, person_of(request), STUDY)


def _wanted(request: Request, name: str, form: Form) -> tuple[Pilot, Stage]:
    """Return the resting pilot and the stage that a form names, else the one that is due."""
    studio = studio_of(request)
    _resting(studio, name)
    pilot = open_pilot(projects.project_file(studio.place, name), registry_for(request))
    wanted = form.text("stage", 40) or pilot.next
    stage = next((one for one in STAGES if one == wanted), None)
    if stage is None:
        raise RequestError(
            "no such stage",
            expected=joined(map(verbatim, STAGES), " or "),
            got=wanted or said("all have their go"),
        )
    return pilot, stage


def _stop(request: Request, name: str, form: Form) -> None:
    run = _run_of(studio_of(request), name)
    if run is None or run.state not in (WAITING, RUNNING):
        raise RequestError("nothing runs", status=409, remedy="reload the page")
    studio_of(request).runs.stop(run.id)


def _decide(request: Request, name: str, form: Form) -> None:
    """Sign a go or a no-go with a key of this machine, as `qrlora pilot decide` does."""
    studio, decision = studio_of(request), form.text("decision")
    _resting(studio, name)
    if decision not in ("go", "no-go"):
        raise RequestError("no such decision", expected="go or no-go", got=decision[:20])
    reason, key = reason_and_key(studio, form)
    open_pilot(projects.project_file(studio.place, name), registry_for(request)).decide(decision == "go", reason, key)


def _change(request: Request, name: str, form: Form) -> None:
    studio = studio_of(request)
    _resting(studio, name)
    path = projects.project_file(studio.place, name)
    projects.change(path, studio.model.name, form.text("toml", MOST_TEXT))
