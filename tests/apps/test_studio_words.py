"""The studio's strings: all of them in every language, with the same places for what is put into them."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po

from qrlora.apps.studio.pages import HERE, LANGUAGES, translations
from qrlora.operations.policy import findings
from qrlora.operations.policy.check import activate
from qrlora.operations.policy.licences import Asker, compute, table
from qrlora.operations.policy.rules import Policy
from qrlora.operations.policy.said import Said, said, translated
from qrlora.quality.metrics.table import METRICS
from studios import made_studio, visiting

METHODS = [("**.py", "python"), ("templates/**.html", "jinja2")]
KEYWORDS: dict[str, Any] = {"_": None, "gettext": None, "ngettext": (1, 2), "N_": None, "said": None}
POLICY = Path(findings.__file__).parent
TEMPLATES = {"templates/**.html": {"extensions": "jinja2.ext.i18n", "newstyle_gettext": "true"}}
OTHERS = [code for code in LANGUAGES if code != "en"]


def strings() -> set[str | tuple[str, ...]]:
    """Every string of pages and modules; metrics, findings of policies and licences describe themselves, and pages show
    that."""
    found = {message for _, _, message, _, _ in extract_from_dir(HERE, METHODS, TEMPLATES, KEYWORDS)}
    found |= {message for _, _, message, _, _ in extract_from_dir(POLICY, METHODS, {}, KEYWORDS)}
    found |= {"; ", " or ", "; or ", " and "}  # what `joined` puts between texts
    found |= {terms.pass_on for terms in table().values() if terms.pass_on}
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


# What policies and licences say


def test_every_text_of_policy_and_licences_is_made_from_a_literal_template() -> None:
    """Else nobody would miss its translation: `said` is given a literal everywhere, and findings are given `Said`."""
    given = []
    for path in POLICY.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "said":
                given.append((path.name, ast.unparse(node.args[0]), isinstance(node.args[0], ast.Constant)))
    others = {(name, text) for name, text, literal in given if not literal}
    assert others == {("said.py", "AS_IS"), ("licences.py", "self.pass_on")}
    assert len(given) > 80


NAMES = ("acme", "[licence]", "revenue", "users", "Powered by Stability AI", "Attachment A")


@pytest.mark.parametrize("use", ["outputs", "commercial"])
def test_reasons_and_obligations_are_read_in_japanese(use: str) -> None:
    """Of every licence alone and of every two together: no Latin letters but those of names and fields."""
    gettext = translations("ja").gettext
    ids = [*table(), "", "LicenseRef-Proprietary-acme", "LicenseRef-nobody-knows"]
    for one in ids:
        for other in ids:
            licence = compute([one, other], Asker(use=use))
            for text in (*licence.reasons.values(), *licence.obligations):
                assert isinstance(text, Said)
                shown = str(translated(text, gettext))
                assert re.search("[ぁ-んァ-ヶ一-龠]", shown), text
                for name in sorted({*ids, *NAMES} - {""}, key=len, reverse=True):
                    shown = shown.replace(name, "")
                assert not re.search("[a-z]{3}", shown), shown


def test_a_text_in_a_text_is_translated_too() -> None:
    nested = said("%(what)s (%(got)s)", what=said("nobody"), got="ada")
    assert nested == "nobody (ada)"
    assert "nobody" not in str(translated(nested, translations("ja").gettext))
    assert translated("ada", translations("ja").gettext) == "ada"


def test_a_japanese_page_has_the_policys_findings_in_japanese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the page of the mix, and where a mix that the policy forbids is kept."""
    studio = made_studio(tmp_path, monkeypatch)
    rules = {
        "name": "ours",
        "version": 1,
        "weight": [{"role": "style", "at_most": 1.0}],
        "licence": {"use": "internal"},
    }
    activate(studio.registry, Policy.parse(rules))
    with visiting(studio) as visitor:
        visitor.submit("/settings", language="ja")
        page = visitor.get("/mix/about", params={"c": "teapot:1,chalk:1.5", "n": 0.5}).text
        assert "chalk@v1 の重みが 1.5" in page and "重みをこの範囲にします" in page
        assert "Apache-2.0 の表示を保持する" in page
        refused = visitor.submit("/mix/save", c="teapot:1,chalk:1.5", n="0.5", name="loud").text
        assert "許可されません" in refused and "必要な条件：1 以下" in refused
        for text in (page, refused):
            assert not re.search("at weight|limits|permitted|keep the", text)
