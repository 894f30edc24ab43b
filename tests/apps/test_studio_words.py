"""The studio's strings: all of them in every language, with the same places for what is put into them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po

from qrlora.apps.studio.pages import HERE, LANGUAGES, translations
from qrlora.quality.metrics.table import METRICS

METHODS = [("**.py", "python"), ("templates/**.html", "jinja2")]
KEYWORDS: dict[str, Any] = {"_": None, "gettext": None, "ngettext": (1, 2), "N_": None}
TEMPLATES = {"templates/**.html": {"extensions": "jinja2.ext.i18n", "newstyle_gettext": "true"}}
OTHERS = [code for code in LANGUAGES if code != "en"]


def strings() -> set[str | tuple[str, ...]]:
    """Every string of pages and modules; metrics describe themselves, and pages show that."""
    found = {message for _, _, message, _, _ in extract_from_dir(HERE, METHODS, TEMPLATES, KEYWORDS)}
    return found | {metric.description for metric in METRICS.values() if not metric.network}


@pytest.mark.parametrize("language", OTHERS)
def test_every_string_is_translated_and_none_is_left_over(language: str) -> None:
    with (HERE / "locale" / language / "studio.po").open("rb") as stream:
        catalogue = read_po(stream, locale=language, abort_invalid=True)
    known = {message.id for message in catalogue if message.id}
    assert known == strings()
    assert not [
        message.id for message in catalogue if message.id and (message.fuzzy or not all(_forms(message.string)))
    ]


@pytest.mark.parametrize("language", OTHERS)
def test_a_translation_has_the_places_of_its_original(language: str) -> None:
    with (HERE / "locale" / language / "studio.po").open("rb") as stream:
        for message in read_po(stream, locale=language):
            wanted = {place for form in _forms(message.id) for place in re.findall(r"%\((\w+)\)s", form)}
            for form in _forms(message.string) if message.id else ():
                assert set(re.findall(r"%\((\w+)\)s", form)) == wanted, message.id


def _forms(text: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else tuple(text)


def test_the_catalogue_is_read_as_it_is() -> None:
    assert translations("ja").gettext("Train") == "学習"
    assert translations("ja").ngettext("%(num)s person", "%(num)s people", 3) == "%(num)s 人"
    assert translations("en").gettext("Train") == "Train"
