"""Texts that know the template and the values they were made of, so that a page says the same in another language.

got = said("%(title)s is deprecated: %(reason)s", title="chalk@v1", reason="too white")
got             # "chalk@v1 is deprecated: too white", a str like any other
translated(got, gettext)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any


class Said(str):
    """A text made by `said`, whose values may be such texts, too; or `parts` with the template between them."""

    template: str
    values: Mapping[str, object]
    parts: tuple[Said, ...] = ()


def said(template: str, /, **values: object) -> Said:
    """Put values into a template with places such as %(name)s; without values it is the text as it stands. A test looks
    for its translation in every language."""
    text = Said(template % values if values else template)
    text.template, text.values = template, values
    return text


AS_IS = "%(text)s"


def verbatim(text: object) -> Said:
    """Return a name, or somebody's own words, as a text that is the same in every language."""
    return text if isinstance(text, Said) else said(AS_IS, text=text)


def joined(parts: Iterable[Said], between: str = "; ") -> Said:
    """Join texts by what stands between them, which is translated, too."""
    listed = tuple(parts)
    text = Said(between.join(listed))
    text.template, text.values, text.parts = between, {}, listed
    return text


def translated(text: object, gettext: Callable[[str], str]) -> object:
    """Return the text made anew from translated templates; what `said` has not made, as it is."""
    if not isinstance(text, Said) or not text:
        return text
    template = gettext(text.template)
    if text.parts:
        return template.join(str(translated(part, gettext)) for part in text.parts)
    values = {name: translated(value, gettext) for name, value in text.values.items()}
    return template % values if values else template


def replaced(text: Said, old: str, new: str) -> Said:
    """Return the text with other words in place of `old`, wherever that is in its template or a value."""
    if text.parts:
        return joined((replaced(part, old, new) for part in text.parts), text.template)
    found = {
        name: replaced(value, old, new) if isinstance(value, Said) else str(value).replace(old, new)
        for name, value in text.values.items()
    }
    return said(text.template.replace(old, new), **found)


def packed(text: object) -> Any:
    """Return a text as JSON, from which `unpacked` makes it again; what `said` has not made becomes a plain text."""
    if not isinstance(text, Said):
        return str(text)
    values = {name: packed(value) for name, value in text.values.items()}
    return {"template": text.template, "values": values, "parts": [packed(part) for part in text.parts]}


def unpacked(found: Any) -> Said:
    """Undo `packed`."""
    if isinstance(found, str):
        return verbatim(found)
    if found["parts"]:
        return joined(map(unpacked, found["parts"]), found["template"])
    return said(found["template"], **{name: unpacked(value) for name, value in found["values"].items()})
