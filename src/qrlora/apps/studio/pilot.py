"""Show pilots: from one picture to the line in stages, each with its report and a person's signed decision."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from qrlora._said import joined, said, verbatim
from qrlora.apps.pilots import open_pilot
from qrlora.apps.samples import SAMPLES
from qrlora.apps.studio import projects
from qrlora.apps.studio.forms import Form, fields, upload
from qrlora.apps.studio.library import reason_and_key
from qrlora.apps.studio.pages import error_page, language_of, page
from qrlora.apps.studio.runs import PILOT, RUNNING, WAITING, Run
from qrlora.apps.studio.state import Studio, person_of, registry_for, studio_of
from qrlora.errors import QrloraError, RequestError

if TYPE_CHECKING:
    from qrlora.operations.pilot import Pilot
    from qrlora.operations.pilot.line import Stage
    from qrlora.operations.pilot.project import Ran
    from qrlora.operations.pilot.report import Words

router = APIRouter()
SHOWN = 24
"""Pictures of a group on the page; the downloaded report has as many."""
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
    studio = studio_of(request)
    path = projects.project_file(studio.place, name)
    pilot, say = open_pilot(path, registry_for(request)), _words(request)
    stages = [_stage(pilot, stage, say) for stage in _all_stages()]
    return page(
        request,
        "pilot.html",
        name=name,
        line=pilot.line,
        stages=stages,
        due=next((one for one in stages if one["due"]), None),
        run=_run_of(studio, name),
        command=f"qrlora pilot decide {path} --go --reason TEXT --key NAME --registry {studio.registry.folder}",
        text=path.read_text(),
        pictures=projects.pictures(path),
        shown=SHOWN,
        say=say,
    )


def _words(request: Request) -> Words:
    from qrlora.operations.pilot.report import Words

    return Words(language_of(request))  # type: ignore[arg-type]


def _all_stages() -> tuple[Stage, ...]:
    from qrlora.operations.pilot import STAGES

    return STAGES


def _run_of(studio: Studio, name: str) -> Run | None:
    """Return the newest run of a pilot's stages; None if none is known."""
    return next((run for run in studio.runs.all(PILOT) if run.name == name), None)


# What a stage's report holds


def _stage(pilot: Pilot, stage: Stage, say: Words) -> dict[str, Any]:
    """Return what the page tells of a stage."""
    ran = pilot.ran(stage)
    state = _state(pilot, stage, ran)
    told = {"stage": stage, "title": say(f"stage.{stage}"), "state": state, "due": stage == pilot.next, "ran": ran}
    return told if ran is None else told | {"report": _report(ran.results, pilot, say)}


def _state(pilot: Pilot, stage: Stage, ran: Ran | None) -> str:
    if ran is None:
        return "new"
    if ran.inputs != pilot.inputs(stage):
        return "stale"
    return {None: "undecided", True: "go", False: "no-go"}[ran.go]


def _report(record: Mapping[str, Any], pilot: Pilot, say: Words) -> dict[str, Any]:
    """Return a stage's results as the page shows them, by the words and rules of the report."""
    from qrlora.operations.pilot.costs import Cost, Parameters
    from qrlora.operations.pilot.report import cost_rows, gate_row
    from qrlora.operations.pilot.stages import Check

    kpis = {name: _share(record["kpis"][name]) for name in ("compliance", "acceptance", "rework")}
    checks = [Check(**one) for one in record["checks"]]
    so_far, later = (Cost(**record[key]) if record[key] else None for key in ("cost", "next_cost"))
    looked_at = [group for group in record["groups"] if group["copies"] is not None]
    found, of = (sum(len(group[key]) for group in looked_at) for key in ("copies", "pictures"))
    shares = kpis | {"copies": _share({"right": found, "n": of} if of else None)}
    counted = {key: value for key, value in (record["parameters"] or {}).items() if key != "of_lora"}
    parameters = Parameters(**counted) if counted else None
    return {
        "passes": record["passes"],
        "kpis": {name: share for name, share in kpis.items() if share},
        "price": record["kpis"]["cost_per_picture"],
        "checks": [gate_row(one, shares.get(one.name), say) for one in checks],
        "reasons": sorted({reason for group in record["groups"] for reason in group["reasons"]}),
        "groups": [{**group, "passing": _share(group["passing"])} for group in record["groups"]],
        "crosstalk": record["crosstalk"],
        "costs": cost_rows(so_far, later, parameters, pilot.line.costs, say),
        "to_approve": record.get("to_approve", []),
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
    studio = studio_of(request)
    path = projects.project_file(studio.place, name)
    source = path.with_name(f"upload-{secrets.token_hex(8)}")
    try:
        target = projects.new_picture(path, file)
        await upload(request, source)
        await run_in_threadpool(projects.take_picture, source, target)
    except QrloraError as error:
        return error_page(request, error)
    return Response(status_code=204)


# What is done


@router.post("/pilot/{name}/{action}")
async def act(request: Request, name: str, action: str) -> Response:
    """Run or stop a stage, decide on it, or change the project file."""
    form, studio = await fields(request), studio_of(request)
    known = {"run": _run, "stop": _stop, "decide": _decide, "line": _change}
    try:
        if action not in known:
            raise RequestError("no such action", status=404, got=action[:40])
        projects.project_file(studio.place, name)
        await run_in_threadpool(known[action], request, name, form)
    except QrloraError as error:
        return error_page(request, error)
    return Response(status_code=204, headers={"HX-Redirect": f"/pilot/{name}"})


def _resting(studio: Studio, name: str) -> None:
    """Raise RequestError (409) while a stage of the pilot waits or runs."""
    run = _run_of(studio, name)
    if run and not run.over:
        raise RequestError("a stage of this pilot waits or runs", status=409, remedy="wait for its end, or stop it")


def _run(request: Request, name: str, form: Form) -> None:
    studio = studio_of(request)
    _resting(studio, name)
    pilot = open_pilot(projects.project_file(studio.place, name), registry_for(request))
    wanted = form.text("stage", 40) or pilot.next
    stage = next((one for one in _all_stages() if one == wanted), None)
    if stage is None:
        raise RequestError(
            "no such stage",
            expected=joined(map(verbatim, _all_stages()), " or "),
            got=wanted or said("all have their go"),
        )
    pilot.check_ready(stage)
    studio.runs.add_stage(name, stage, person_of(request))


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
