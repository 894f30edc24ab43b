"""Render pages and errors from templates, in two languages."""

from __future__ import annotations

import gettext
import io
import secrets
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from qrlora._files import ELSE, REMEDIES
from qrlora._said import translated, unpacked
from qrlora.errors import QrloraError, RequestError

HERE = Path(__file__).parent
LANGUAGES = {"en": "English", "ja": "日本語"}
NAVIGATION = ("mix", "train", "library", "explore", "prove", "pilot")
THEMES = ("auto", "light", "dark")
VERSIONS = {"htmx": "htmx-2.0.11.min.js", "alpine": "alpine-csp-3.17.4.min.js"}


def N_(text: str) -> str:
    """Mark a text for translation where it is written; it is translated where it is shown."""
    return text


REQUEST = N_("let its page in the library ask for an approval, and a reviewer approve it there")
SEARCH = N_("the library lists what there is")
NOT_HERE = N_("tell who runs this studio: its files cannot be written")
ON_PAGE = {
    "qrlora pilot run %(path)s": N_("run that stage on this page"),
    "qrlora pilot run %(path)s --stage %(stage)s": N_("run stage %(stage)s again on this page"),
    "qrlora pilot decide %(path)s --go --reason TEXT --key NAME": N_("decide on that stage here first"),
    "`qrlora pilot new line.toml` writes one to begin with": N_("begin with a sample, and change its project file"),
    "`qrlora pilot new --schema` prints what a project file may hold": N_(
        "the project files of the samples show the fields and their values"
    ),
    "`qrlora approval request`, then a reviewer: `qrlora approval approve`": REQUEST,
    "ask again: approval request": N_("ask again on its page in the library"),
    "`qrlora approval list` shows the requests": SEARCH,
    "`qrlora registry search` lists what there is": SEARCH,
    "`qrlora registry search --kind composition` lists them": SEARCH,
    "`qrlora registry add` the adapters and their base model": N_(
        "save the mix, or keep the adapter in the library, and ask for that"
    ),
    "if you may: `qrlora registry alias ALIAS REFERENCE --force`": N_("choose another alias, or ask who protected it"),
    "give --null-space %(limits)s": N_("set “Keep them apart” to a value within these limits: %(limits)s"),
    "register its parts and compose it again with --registry, or name them in its place": N_(
        "save its parts in the library, and mix and save them again"
    ),
    "`qrlora train --help` describes every field": N_("correct it in the form, and begin again"),
    "%(remedy)s; then continue from %(saved)s with --resume": N_("%(remedy)s; then resume the run on its page"),
    'write `products = "products.csv"` into the project file (docs/catalog.md)': N_(
        'write `products = "products.csv"` into the project file'
    ),
    "lower learning_rate, or train in float32%(kept)s": N_("begin again with another preset, or with other pictures"),
    "lower the weights, or load the model in bfloat16 or float32": N_("lower the weights"),
    "lower the adapters' weights or the guidance; a model in float16 may need bfloat16 or float32 (dtype)": N_(
        "lower the weights"
    ),
    "GET /v1/models lists those that are": N_("reload the page: it shows those that are"),
    "write the model as %(base)s+NAME:WEIGHT+NAME:WEIGHT; GET /v1/models lists what there is": N_(
        "reload the page: it shows those that there are"
    ),
    "name more adapters, or fewer components": N_("train more of them"),
    "export it in the diffusers form (--for diffusers), which its programs read": N_("export it for diffusers"),
    "ask more people, or allow more: `qrlora study --misses`": N_("let more people vote"),
    "put it there, or name another one in the project file": N_(
        "name a picture that the pilot has; its page takes yours, under this name or another"
    ),
    "name the key.json that was written with the page": N_("take the file that the page of this study saved"),
    "set %(variable)s": N_("type the passphrase into the form"),
    "check the path": N_("upload the picture again"),
    **dict.fromkeys([*REMEDIES.values(), ELSE], NOT_HERE),
}
"""What a page says in place of a text for the command line."""


def csrf_of(session: dict[str, Any]) -> str:
    """Return the session's token, which every request that changes something has to send in a header."""
    token: str = session.setdefault("csrf", secrets.token_urlsafe(24))
    return token


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
    made.filters["said"] = lambda text: translated(text, _words(language))
    made.filters["unpacked"] = unpacked
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


def _words(language: str) -> Callable[[str], str]:
    """Return the gettext of what pages show."""
    gettext = translations(language).gettext
    return lambda text: gettext(ON_PAGE.get(text, text))


def in_words(request: Request, text: object) -> str:
    """Return a text in the language of a request."""
    return str(translated(text, _words(language_of(request))))


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
