"""The studio's strings: all of them in every language, with the same places for what is put into them."""

from __future__ import annotations

import ast
import html
import io
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po
from PIL import Image

from qrlora import _files, errors
from qrlora._reading import WRONG
from qrlora._said import Said, joined, packed, replaced, said, translated, unpacked, verbatim
from qrlora.apps.samples import SAMPLES
from qrlora.apps.studio.pages import HERE, LANGUAGES, ON_PAGE, translations
from qrlora.apps.studio.projects import project_file
from qrlora.apps.studio.runs import FAILED
from qrlora.apps.studio.state import Studio
from qrlora.errors import QrloraError, TrainingError
from qrlora.operations.pilot import STAGES
from qrlora.operations.policy import findings
from qrlora.operations.policy.check import activate
from qrlora.operations.policy.licences import Asker, compute, table
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.keys import SigningKey
from qrlora.quality import brand
from qrlora.quality.metrics.table import METRICS
from qrlora.quality.study.votes import NoVotesError
from studios import Visitor, made_studio, trust, visiting

METHODS = [("**.py", "python"), ("templates/**.html", "jinja2")]
KEYWORDS: dict[str, Any] = {"_": None, "gettext": None, "ngettext": (1, 2), "N_": None, "said": None}
POLICY = Path(findings.__file__).parent
TEMPLATES = {"templates/**.html": {"extensions": "jinja2.ext.i18n", "newstyle_gettext": "true"}}
OTHERS = [code for code in LANGUAGES if code != "en"]
SOURCE = HERE.parents[1]
REACHABLE: dict[str, str] = {
    "errors.py": "text",
    **{f"apps/studio/{path.name}": "" for path in HERE.glob("*.py")},
    "_files.py": "disk_error check_room",
    "_reading.py": "validated unknown_field required_field wrong_value read_text read_toml plain_float plain_number",
    "apps/serving/dispatch.py": "submit refuse_if_draining _fail",
    "apps/serving/engine.py": "_check",
    "apps/serving/names.py": "_checked _unknown",
    "apps/serving/permission.py": "permit _unknown",
    "method/adapter/record.py": "check_strength",
    "method/composition/batched.py": "check",
    "method/space/record.py": "of check_alike",
    "models/exchange/export.py": "_check_family",
    "models/families/base.py": "",
    "models/generation/__init__.py": "not_finite",
    "models/training/loop.py": "",
    "models/training/pictures.py": "shown mask _reading _too_large _upright _opened _refuse_animation _apply_profile",
    "models/training/recipe.py": "of",
    "operations/pilot/line.py": "",
    "operations/pilot/project.py": "",
    "operations/pilot/whole_line.py": "",
    "operations/pilot/work.py": "",
    "operations/policy/approval.py": "request asked approve",
    "operations/policy/check.py": "_approved enforce in_force _read",
    "operations/policy/combination.py": "",
    "operations/policy/licences.py": "alternatives _few",
    "operations/provenance/algorithms.py": "read_private",
    "operations/provenance/audit.py": "",
    "operations/provenance/dsse.py": "verify",
    "operations/provenance/keys.py": "check_key_name key_path _find person_of",
    "operations/registry/bases.py": "trained_under",
    "operations/registry/database.py": "_session",
    "operations/registry/queries.py": "find",
    "operations/registry/references.py": "",
    "operations/registry/registry.py": "insert path _check_protected",
    "operations/registry/schema.py": "",
    "operations/registry/store.py": "_check",
    "quality/brand.py": "",
    "quality/images/read.py": "hex_colour",
    "quality/study/ballot.py": "",
    "quality/study/votes.py": "count_votes _votes",
}
"""Modules whose errors somebody can reach by the studio's pages, and which functions raise them; none named: all."""
ERRORS = {name for name, one in vars(errors).items() if isinstance(one, type) and issubclass(one, errors.QrloraError)}
ERRORS |= {NoVotesError.__name__}


MAKERS = ("parsing", "validated", "read_toml", "ValueError")
"""Calls that make an error of what they are given, and those of validators."""


def raised(module: str) -> list[tuple[str, ast.expr]]:
    """What the errors of a module are given that can be reached: `what`, `expected`, `got` or `remedy`, and the
    expression, followed to where a variable gets its value."""
    tree, names = ast.parse((SOURCE / module).read_text()), REACHABLE[module].split()
    functions = [one for one in ast.walk(tree) if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert set(names) <= {one.name for one in functions}, module
    given: list[tuple[str, ast.expr]] = []
    for function in functions:
        calls = [
            one
            for one in ast.walk(function)
            if isinstance(one, ast.Call) and not (names and function.name not in names)
        ]
        for call in calls:
            if getattr(call.func, "id", "") in {*ERRORS, *MAKERS}:
                parts = [("what", one) for one in call.args[:1]]
                parts += [(one.arg, one.value) for one in call.keywords if one.arg in ("expected", "got", "remedy")]
                given += [(name, leaf) for name, one in parts for leaf in leaves(one, function)]
    return given


def leaves(node: ast.expr, function: ast.AST) -> list[ast.expr]:
    """The expressions that one may have the value of."""
    if isinstance(node, ast.IfExp):
        return leaves(node.body, function) + leaves(node.orelse, function)
    if isinstance(node, ast.BoolOp):
        return [leaf for one in node.values for leaf in leaves(one, function)]
    if isinstance(node, ast.Name):
        return [leaf for one in assigned(node.id, function) for leaf in leaves(one, ast.Module([], []))]
    return [node]


def assigned(name: str, function: ast.AST) -> list[ast.expr]:
    pairs = [(target, one.value) for one in ast.walk(function) if isinstance(one, ast.Assign) for target in one.targets]
    for targets, values in list(pairs):
        if isinstance(targets, ast.Tuple) and isinstance(values, ast.Tuple):
            pairs += zip(targets.elts, values.elts, strict=True)
    return [value for target, value in pairs if getattr(target, "id", "") == name]


def literal(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def texts_of_errors() -> set[str]:
    """Texts of errors that pages can show: constants, and what `said` is given, of which some are in no constructor."""
    found = {literal(one) for module in REACHABLE for name, one in raised(module) if name != "got"}
    for module in REACHABLE:
        for node in ast.walk(ast.parse((SOURCE / module).read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "said":
                found.add(literal(node.args[0]))
    tables = {*WRONG.values(), *_files.REMEDIES.values(), _files.ELSE}
    fields = [field for part in brand.SECTIONS.values() for field in part.model_fields.values()]
    tables |= {field.description for field in fields if field.is_required() and field.description}
    return {text for text in found | tables if re.search("[A-Za-z]", re.sub(r"%\(\w+\)s", "", text))}


def strings() -> set[str | tuple[str, ...]]:
    """Every string that pages show: their own, and those of modules that describe themselves (metrics, findings of
    policies, licences) or raise errors, but for what pages replace."""
    return texts() - set(ON_PAGE)


def texts() -> set[str | tuple[str, ...]]:
    found = {message for _, _, message, _, _ in extract_from_dir(HERE, METHODS, TEMPLATES, KEYWORDS)}
    found |= {message for _, _, message, _, _ in extract_from_dir(POLICY, METHODS, {}, KEYWORDS)}
    found |= {"; ", " or ", "; or ", " and "}  # what `joined` puts between texts
    found |= {terms.pass_on for terms in table().values() if terms.pass_on}
    found |= {metric.description for metric in METRICS.values() if not metric.network}
    return found | texts_of_errors()


def test_every_text_of_an_error_that_can_be_reached_can_be_translated() -> None:
    """What is put together is `said`, and so are words of ours in what an error got; the rest are values."""
    faults = []
    for module in REACHABLE:
        for name, one in raised(module):
            parts = one.values if isinstance(one, ast.JoinedStr) else [one] if name == "got" else []
            loose = isinstance(one, ast.BinOp) or any(re.search("[A-Za-z]{2}", literal(part)) for part in parts)
            if loose and ast.unparse(one) != "'[[logo]]'":
                faults.append(f"{module}:{one.lineno}: {ast.unparse(one)}")
    assert not faults
    assert len(texts_of_errors()) > 250


def test_no_page_names_an_option_of_the_command_line() -> None:
    """Whole commands are named where no page does the same; they are in backticks."""
    bare = [text for text in strings() for one in _forms(text) if re.search(r"--\w", re.sub("`[^`]*`", "", one))]
    assert bare == ["name it with --registry"]  # a studio always has one
    assert set(ON_PAGE) <= texts(), "what the table replaces is there no more"


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
    assert others == {("licences.py", "self.pass_on")}
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


# Errors

ALLOWED = re.compile(
    r"`[^`]*`|'[^']*'|\[\w+\]|[\w.-]+/[\w./-]+|PNG|JPEG|WebP|AVIF|TIFF|BMP|GIF|TOML|PEM|UTF-8|KB|ΔR|\.png|diffusers|operator|go|no-go"
)
"""What stays Latin: commands, what a person wrote, tables of TOML, paths and formats of files, names."""
SHEETS = [
    *("[", "[[logo]]", "name = 'x'", "x = 1", "[palette]\ncolours = ['brown']"),
    *("[palette]\ncolours = []\nat_least = 2", "[palette]\nat_least = 'much'", "[scores]\nbeauty = 1"),
]
"""Brand sheets that are none."""


def said_on(answer: Any) -> dict[str, str]:
    """The texts of an error's page: what, 期待 (expected), 実際 (got), 対処 (remedy)."""
    assert answer.status_code >= 400, answer.text[:500]
    part = answer.text.split('<div class="error"')[1]
    what = re.findall(r"<strong>(.*?)</strong>", part, re.DOTALL)
    rows = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", part, re.DOTALL)
    return {name: html.unescape(text) for name, text in [("what", what[0]), *rows]}


def check_japanese(answer: Any, *names: str) -> str:
    """names: what a person or this test named."""
    told = said_on(answer)
    for name, text in told.items():
        if name != "実際":
            for one in sorted(names, key=len, reverse=True):
                text = text.replace(one, "")
            assert not re.search("[A-Za-z]{2}", ALLOWED.sub("", text)), (name, text)
            assert name != "what" or re.search("[ぁ-んァ-ヶ一-龠]", text), text
    return told["what"]


def picture_of(side: int, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture
def japanese(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Studio, Visitor]]:
    """A studio in Japanese, with a mix `pair` and a pilot `teapots`."""
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    studio = made_studio(tmp_path, monkeypatch)
    with visiting(studio) as visitor:
        visitor.submit("/settings", language="ja")
        assert visitor.submit("/mix/save", c="teapot:1,chalk:1", n="0.5", name="pair").status_code == 200
        assert visitor.submit("/pilot", sample="teapots").status_code == 204
        yield studio, visitor


def test_errors_of_pictures_and_training_are_read_in_japanese(japanese: tuple[Studio, Visitor]) -> None:
    _, visitor = japanese
    moving = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    stream = io.BytesIO()
    moving[0].save(stream, "GIF", save_all=True, append_images=moving[1:])
    told = {
        check_japanese(visitor.submit("/train/pictures?name=a.png", content), "a.png")
        for content in (b"nothing", stream.getvalue(), picture_of(8)[:-20])
    }
    token = re.findall('name="picture" value="([0-9a-f]+)"', visitor.submit("/train/pictures", picture_of(80)).text)[0]
    form = {"picture": token, "name": "mug", "role": "subject", "noun": "mug"}
    for wrong in (
        {"picture": "gone"},
        {"name": "My Mug!"},
        {"name": "m" * 61},
        {"role": "both"},
        {"caption": "a mug"},
        {f"crop-{token}": "1,2"},
        {f"crop-{token}": "0,0,7"},
        {"preset": "space:nowhere"},
    ):
        told.add(check_japanese(visitor.submit("/train", **form | wrong), "mug", "role", "trigger", "x,y,side"))
    told.add(check_japanese(visitor.submit("/train", name="mug", role="subject")))
    for path in ("/train/nowhere", "/train/nowhere/steps/1.png", "/train/pictures/gone.png"):
        told.add(check_japanese(visitor.get(path)))
    assert len(told) >= 12


def test_errors_of_mixes_and_comparisons_are_read_in_japanese(japanese: tuple[Studio, Visitor]) -> None:
    _, visitor = japanese
    told = {
        check_japanese(visitor.get(path), "nowhere", "pico", "teapot", "chalk", "gold", "mosaic")
        for path in (
            "/mix?c=teapot:much",
            "/mix?n=much",
            "/picture.png?c=nowhere:1",
            "/picture.png?c=teapot:1&s=-1",
            "/picture.png?c=teapot:1&n=7",
            "/mix/grid?c=teapot:1",
            "/mix/grid?c=teapot:1,nowhere:1",
            "/thumb/nowhere.png",
            "/nowhere",
            "/explore/save",
            "/prove/nowhere",
        )
    }
    forms = [
        ("/mix/save", {"c": "", "name": "x"}),
        ("/mix/save", {"c": "nowhere:1", "name": "x"}),
        ("/mix/save", {"c": "teapot:1", "name": "No Name"}),
        ("/explore/save", {"z": "1,much", "name": "x"}),
        ("/explore/save", {"role": "subject", "name": "x"}),
        ("/prove", {"prompts": "", "a": "pair", "b": "teapot"}),
        ("/prove", {"prompts": "a mug", "a": "pair", "b": "nowhere"}),
        ("/prove", {"prompts": "a mug", "a": "pair", "b": "pair"}),
        ("/prove", {"prompts": "a mug", "a": "pair", "b": "teapot", "seeds": "9"}),
        *(("/prove", {"prompts": "a mug", "brand": sheet}) for sheet in SHEETS),
    ]
    names = ("palette.colours", "palette.at_least", "scores", *METRICS)
    told |= {check_japanese(visitor.submit(path, **form), *names) for path, form in forms}
    assert len(told) >= 18


def test_errors_of_the_library_are_read_in_japanese(japanese: tuple[Studio, Visitor], tmp_path: Path) -> None:
    studio, visitor = japanese
    registry = studio.registry
    pair = registry.get("pair")
    registry.set_alias("pair", "ours", registry.get("teapot").digest, protect=True)
    stranger = SigningKey.create(None, "stranger", passphrase="x")
    names = (str(tmp_path), stranger.key_id[:12], "QRLORA_KEYS", "pair", "ours", "production", "latest", "stranger")
    address = f"/library/{pair.digest}"
    told = {check_japanese(visitor.get(path)) for path in ("/library/sha256:00000000", f"{address}/picture")}
    told.add(check_japanese(visitor.get(f"{address}/export/paint")))
    acts: list[tuple[str, dict[str, str]]] = [
        ("alias", {"alias": "V1"}),
        ("alias", {"alias": "ours"}),
        ("nothing", {}),
        ("approve", {"reason": "clean", "key": "ada"}),
    ]
    told |= {check_japanese(visitor.submit(f"{address}/{act}", **form), *names) for act, form in acts}
    assert visitor.submit(f"{address}/request", reason="shop").status_code == 204
    for key, passphrase in (("ada", ""), ("no key", ""), ("stranger", ""), ("stranger", "y"), ("stranger", "x")):
        form = {"reason": "clean", "key": key, "passphrase": passphrase}
        told.add(check_japanese(visitor.submit(f"{address}/approve", **form), *names))
    told.add(check_japanese(visitor.submit(f"{address}/approve", key="ada")))
    trust(registry, tmp_path / "keys", "ada")
    told.add(check_japanese(visitor.submit(f"{address}/approve", reason="clean", key="ada"), "ada"))
    path = registry.path(pair)
    path.chmod(0o600)
    path.write_bytes(b"changed")
    told.add(check_japanese(visitor.get(f"{address}/export/diffusers"), str(path), pair.digest))
    assert len(told) >= 14
    faults = visitor.get("/library/verify").text
    assert "異常 1 件" in faults and "登録時の内容と一致しません" in faults


def test_errors_of_a_pilot_are_read_in_japanese(japanese: tuple[Studio, Visitor]) -> None:
    studio, visitor = japanese
    text = project_file(studio.place, "teapots").read_text()
    wrong = {
        "[": text + "\n[",
        "name": text.replace('name = "teapots"', 'name = "others"'),
        "model": 'model = "flux"\n' + re.sub("(?m)^model = .*$", "", text),
        "unknown": "colour = 1\n" + text,
        "outside": re.sub(r'picture = "[^"]*"', 'picture = "/etc/x.png"', text, count=1),
        "missing": re.sub(r'picture = "[^"]*"', 'picture = "pictures/none.png"', text, count=1),
    }
    names = ("teapots", "pico", "line.toml", "changed.toml", "picture", "pictures/none.png")
    told = {check_japanese(visitor.submit("/pilot/teapots/line", toml=one), *names) for one in wrong.values()}
    told |= {
        check_japanese(visitor.submit(f"/pilot/teapots/{act}", **form), *STAGES, "QRLORA_KEYS")
        for act, form in (
            ("run", {"stage": "several_styles"}),
            ("run", {"stage": "fourth"}),
            ("stop", {}),
            ("decide", {"decision": "perhaps"}),
            ("decide", {"decision": "go"}),
            ("decide", {"decision": "go", "reason": "clean", "key": "nobody"}),
            ("sell", {}),
        )
    }
    told.add(check_japanese(visitor.submit("/pilot", sample="teapots")))
    told.add(check_japanese(visitor.submit("/pilot", sample="cups"), *SAMPLES))
    told.add(check_japanese(visitor.submit("/pilot/teapots/pictures?file=a.txt", b"x")))
    told.add(check_japanese(visitor.submit("/pilot/teapots/pictures?file=a.png", b"x"), "a.png"))
    told.add(check_japanese(visitor.get("/pilot/nowhere")))
    told.add(check_japanese(visitor.get("/pilot/teapots/report/line")))
    told.add(check_japanese(visitor.get("/pilot/teapots/pictures/none.png")))
    assert len(told) >= 18


def test_what_a_worker_could_not_do_is_read_in_japanese(japanese: tuple[Studio, Visitor]) -> None:
    """It is kept as what it was made of, since who reads it has not asked yet."""
    studio, visitor = japanese
    error = TrainingError(said("training broke down at step %(step)s", step=3), expected="a finite loss and gradient")
    folder = studio.runs.new_folder()
    run = studio.runs.add(folder, "ada", "mug", {"role": "subject", "steps": 9})
    studio.runs._save(replace(run, state=FAILED, error=json.loads(json.dumps(packed(error.text)))))
    assert str(unpacked(studio.runs.get(run.id).error)) == str(error)
    event = visitor.get(f"/train/{run.id}/events").text
    told = json.loads(event.split("data: ")[1].splitlines()[0])["run"]["error"]
    assert told == "ステップ 3 で学習が続けられなくなりました\n  期待：有限の損失と勾配"


def test_a_text_is_renamed_and_packed_with_all_that_it_is_made_of() -> None:
    text = joined([said("no such picture: %(path)s", path=Path("/x/a")), verbatim("/x/a")])
    assert replaced(text, "/x/a", "mug.png") == "no such picture: mug.png; mug.png"
    assert unpacked(json.loads(json.dumps(packed(replaced(text, "/x/a", "b"))))).parts[0].values == {"path": "b"}
    assert str(QrloraError("no such picture", got="x")) == "no such picture\n  got:      x"


def test_refusals_before_any_page_are_read_in_japanese(japanese: tuple[Studio, Visitor]) -> None:
    _, visitor = japanese
    assert "再読み込み" in visitor.post("/settings").text
    assert "別のサイト" in visitor.get("/mix", headers={"Origin": "http://elsewhere"}).text
    assert (
        "このコンピューターの名前" in visitor.get("/mix", headers={"Host": "elsewhere", "Accept-Language": "ja"}).text
    )
