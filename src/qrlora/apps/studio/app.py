"""Build the studio's application: pages in front of the server's parts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException
from starlette.middleware.sessions import SessionMiddleware
from starlette.staticfiles import StaticFiles

from qrlora._said import said
from qrlora.apps.serving.app import create_app as create_api
from qrlora.apps.studio import explore, library, mix, pilot, prove, train
from qrlora.apps.studio.forms import fields
from qrlora.apps.studio.guard import Guard, right_key, secret_in
from qrlora.apps.studio.pages import HERE, LANGUAGES, THEMES, error_page, page
from qrlora.apps.studio.state import Studio, studio_of
from qrlora.errors import QrloraError, RequestError

WEEK = 7 * 24 * 3600


def create_app(studio: Studio, *, local: bool = True) -> FastAPI:
    """Return the application of one studio."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await studio.service.drain()

    app = FastAPI(title="qrlora studio", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.studio = studio
    app.add_middleware(Guard, keys=studio.keys, local=local)
    app.add_middleware(
        SessionMiddleware,
        secret_key=secret_in(studio.place),
        session_cookie="qrlora_studio",
        max_age=WEEK,
        same_site="lax",
    )
    app.add_exception_handler(QrloraError, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _not_here)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, _wrong_address)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _fault)
    for part in (mix, train, library, explore, prove, pilot):
        app.include_router(part.router)
    _add_common(app)
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    app.mount("/api", create_api(studio.service))
    return app


def _add_common(app: FastAPI) -> None:
    @app.get("/")
    def home() -> Response:
        return RedirectResponse("/mix", 303)

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/status")
    def status(request: Request) -> Response:
        response = page(request, "part_status.html")
        if studio_of(request).model.ready:
            response.headers["HX-Trigger"] = "model-ready"
        return response

    @app.post("/settings")
    async def settings(request: Request) -> Response:
        form = await fields(request)
        for name, known in (("language", LANGUAGES), ("theme", THEMES)):
            if form.text(name) in known:
                request.session[name] = form.text(name)
        return Response(status_code=204, headers={"HX-Refresh": "true"})

    @app.get("/login")
    def login_page(request: Request) -> Response:
        return page(request, "login.html", failed=False)

    @app.post("/login")
    async def login(request: Request) -> Response:
        form = await fields(request)
        if not right_key(form.text("key"), studio_of(request).keys) or not form.text("person", 64):
            return page(request, "part_login.html", 401, failed=True)
        request.session["person"] = form.text("person", 64)
        return Response(status_code=204, headers={"HX-Redirect": "/mix"})

    @app.post("/logout")
    def logout(request: Request) -> Response:
        request.session.clear()
        return Response(status_code=204, headers={"HX-Redirect": "/login"})


def _refused(request: Request, error: QrloraError) -> Response:
    return error_page(request, error)


def _fault(request: Request, error: Exception) -> Response:
    """Answer 500; Starlette raises the error again after this, so that it is logged."""
    remedy = "try again; the terminal that runs the studio has the details"
    return error_page(request, RequestError("a fault of the studio", status=500, remedy=remedy))


def _not_here(request: Request, error: HTTPException) -> Response:
    known = {404: said("there is no such page"), 405: said("this page takes no such request")}
    what = known.get(error.status_code, str(error.detail))
    return error_page(request, RequestError(what, status=error.status_code, got=request.url.path[:200]))


def _wrong_address(request: Request, error: RequestValidationError) -> Response:
    first = error.errors()[0]
    what = said("the address has a value that cannot be read: %(name)s", name=first["loc"][-1])
    remedy = "correct the address, or begin on the page itself"
    return error_page(request, RequestError(what, status=422, got=repr(first.get("input"))[:100], remedy=remedy))
