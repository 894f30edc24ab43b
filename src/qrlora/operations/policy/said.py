"""Texts that know the template and the values they were made of, so that a page says the same in another language.

got = said("%(title)s is deprecated: %(reason)s", title="chalk@v1", reason="too white")
got             # "chalk@v1 is deprecated: too white", a str like any other
translated(got, gettext)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping


class Said(str):
    """A text made by `said`, whose values may be such texts, too; or `parts` with the template between them."""

    template: str
    values: Mapping[str, object]
    parts: tuple[Said, ...] = ()


def said(template: str, /, **values: object) -> Said:
    """Put values into a template with places such as %(name)s. A test looks for its translation in every language."""
    text = Said(template % values)
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
    if not isinstance(text, Said):
        return text
    if text.parts:
        return gettext(text.template).join(str(translated(part, gettext)) for part in text.parts)
    return gettext(text.template) % {name: translated(value, gettext) for name, value in text.values.items()}
