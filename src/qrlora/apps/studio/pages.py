"""Render pages and errors from templates, in two languages."""

from __future__ import annotations

import gettext
import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from qrlora.apps.studio.guard import csrf_of
from qrlora.errors import QrloraError, RequestError
from qrlora.operations.policy.said import translated

HERE = Path(__file__).parent
LANGUAGES = {"en": "English", "ja": "日本語"}
NAVIGATION = ("mix", "train", "library", "explore", "prove", "pilot")
THEMES = ("auto", "light", "dark")
VERSIONS = {"htmx": "htmx-2.0.11.min.js", "alpine": "alpine-csp-3.17.4.min.js"}


def N_(text: str) -> str:
    """Mark a text for translation where it is written; it is translated where it is shown."""
    return text


@cache
def translations(language: str) -> gettext.NullTranslations:
    """Compile the strings of a language from its catalogue, in memory."""
    source = HERE / "locale" / language / "studio.po"
    if not source.is_file():
        return gettext.NullTranslations()
    compiled = io.BytesIO()
    with source.open("rb") as stream:
        write_mo(compiled, read_po(stream, locale=language))
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)


@cache
def environment(language: str) -> Environment:
    """Return the templates in a language. Everything put into them is escaped."""
    made = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        extensions=["jinja2.ext.i18n"],
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.install_gettext_translations(translations(language), newstyle=True)  # type: ignore[attr-defined]
    made.globals.update(languages=LANGUAGES, navigation=NAVIGATION, vendor=VERSIONS)
    gettext = translations(language).gettext
    made.filters["said"] = lambda text: translated(text, gettext)
    made.filters["percent"] = lambda share: f"{100 * share:.0f} %"
    return made


def language_of(request: Request) -> str:
    """Return the language chosen, else the first of the browser's that there is, else English."""
    chosen = request.session.get("language")
    if chosen in LANGUAGES:
        return str(chosen)
    for part in request.headers.get("accept-language", "").split(","):
        code = part.split(";")[0].strip()[:2].lower()
        if code in LANGUAGES:
            return code
    return "en"


def translator(request: Request) -> Callable[[str], str]:
    """Return gettext in the language of a request."""
    return translations(language_of(request)).gettext


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Render a page or a part of one, in the language and theme of who asks."""
    common = {
        "language": language_of(request),
        "theme": request.session.get("theme", "auto"),
        "csrf": csrf_of(request.session),
        "person": request.session.get("person", ""),
        "path": request.url.path,
        "studio": request.app.state.studio,
    }
    return HTMLResponse(environment(common["language"]).get_template(template).render(common | values), status)


def error_page(request: Request, error: QrloraError, status: int = 400) -> HTMLResponse:
    """Describe an error as a page, or as the note that a script or htmx puts where the work was asked for."""
    status = error.status if isinstance(error, RequestError) else status
    part = "hx-request" in request.headers or request.headers.get("accept", "").startswith(("image/", "application/"))
    return page(request, "part_error.html" if part else "error.html", status, error=error)
