"""Read what comes from outside: files, JSON, TOML and numbers as text, with one kind of error for all of it.

    with parsing(f"{path} is not TOML", RecipeError, remedy="see recipes/ for examples"):
        fields = tomllib.loads(read_text(path, "the recipe", RecipeError))

Parsers and foreign converters raise whatever they like over damaged input (RuntimeError, KeyError, RecursionError,
AssertionError). `parsing` turns all of it into one of our errors that names the file. It belongs around the call of the
parser and the checks of what it returned, never around our own arithmetic, whose faults have to stay visible.
"""

from __future__ import annotations

import difflib
import io
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from qrlora._said import Said, joined, said, verbatim
from qrlora.errors import QrloraError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Model = TypeVar("Model")
"""A pydantic model, which this module does not import."""
MOST_LINES = 100
"""Wrong fields that an error lists."""
LARGEST_TEXT = 2**24
"""Bytes of a text file that is read; a metadata.jsonl of 100 000 long captions has fewer."""
LARGEST_TOML = 2**20
MOST_DOTS = 100
"""On one line of TOML, outside strings: tomllib takes time in the square of the parts of a dotted key."""
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


def validated(
    model: type[Model],
    fields: Mapping[str, Any],
    what: str,
    kind: type[QrloraError],
    *,
    sections: Mapping[str, Any],
    remedy: str,
) -> Model:
    """Validate the fields of a file with sections.

    Args:
        model: a pydantic model.
        what: the file is, for the error.
        sections: the models of its tables, by name.

    Raises:
        kind: naming every unknown (with the nearest known), missing or wrong field.
    """
    from pydantic import ValidationError

    try:
        made: Model = model.model_validate(dict(fields))  # type: ignore[attr-defined]
        return made
    except ValidationError as error:
        wrong = (_wrong_field(item, model, sections) for item in error.errors()[:MOST_LINES])
        lines = joined(dict.fromkeys(wrong), "\n  - ")
        raise kind(said("invalid %(what)s:\n  - %(lines)s", what=verbatim(what), lines=lines), remedy=remedy) from error


def _wrong_field(item: Any, model: Any, sections: Mapping[str, Any]) -> Said:
    place = [str(part + 1) if isinstance(part, int) else str(part) for part in item["loc"]]
    name, known = ".".join(place), (sections.get(place[0], model) if len(place) > 1 else model).model_fields
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place[-1], known, n=1, cutoff=0.5)
        return unknown_field(name, near)
    if item["type"] == "missing":
        field = known.get(place[-1])  # none of one in a list
        return required_field(name, field.description if field else None)
    return wrong_value(name, item)


def unknown_field(name: str, near: Sequence[str]) -> Said:
    """Return the message for an unknown field. near: names of similar fields, most similar first."""
    if not near:
        return said("unknown field %(name)s", name=repr(name))
    return said("unknown field %(name)s: did you mean %(near)s?", name=repr(name), near=repr(near[0]))


def required_field(name: str, about: str | None) -> Said:
    """Return the message for a missing field. about: its description, if it has one."""
    if not about:
        return said("%(name)s is required", name=repr(name))
    return said("%(name)s is required: %(about)s", name=repr(name), about=said(about))


WRONG = {
    "greater_than": "Input should be greater than %(gt)s",
    "greater_than_equal": "Input should be greater than or equal to %(ge)s",
    "less_than": "Input should be less than %(lt)s",
    "less_than_equal": "Input should be less than or equal to %(le)s",
    "string_type": "Input should be a valid string",
    "string_pattern_mismatch": "String should match pattern '%(pattern)s'",
    "float_type": "Input should be a valid number",
    "int_type": "Input should be a valid integer",
    "int_from_float": "Input should be a valid integer, got a number with a fractional part",
    "bool_type": "Input should be a valid boolean",
    "bool_parsing": "Input should be a valid boolean, unable to interpret input",
    "tuple_type": "Input should be a valid tuple",
    "dict_type": "Input should be a valid dictionary",
    "path_type": "Input is not a valid path",
    "finite_number": "Input should be a finite number",
    "float_parsing": "Input should be a valid number, unable to parse string as a number",
    "int_parsing": "Input should be a valid integer, unable to parse string as an integer",
    "model_type": "Input should be a valid dictionary",
    "too_short": "should have at least %(min_length)s item(s), not %(actual_length)s",
    "string_too_short": "String should have at least %(min_length)s character(s)",
    "string_too_long": "String should have at most %(max_length)s character(s)",
    "missing": "Field required",
    "extra_forbidden": "Extra inputs are not permitted",
}
"""Messages of pydantic by the type of its error, with places for its context; others are shown as they are."""


def wrong_value(name: str, item: Any) -> Said:
    """Return the message for one of pydantic's errors. name: the field's; empty if it is about the whole model."""
    context = item.get("ctx", {})
    cause = context.get("error")
    if cause is not None and cause.args:
        message = verbatim(cause.args[0])
    elif item["type"] == "literal_error":
        choices = joined(map(verbatim, re.split(", | or ", context["expected"])), " or ")
        message = said("Input should be %(expected)s", expected=choices)
    elif item["type"] in WRONG:
        message = said(WRONG[item["type"]], **context)
    else:
        message = verbatim(item["msg"])
    if not name:
        return message
    if isinstance(item["input"], Mapping):
        return said("%(name)s: %(message)s", name=name, message=message)
    return said("%(name)s = %(value)s: %(message)s", name=name, value=repr(item["input"]), message=message)


@contextmanager
def parsing(
    what: str, kind: type[QrloraError], *, expected: object = None, remedy: str = "take the original file"
) -> Iterator[None]:
    """Raise ``kind(what, ...)`` for any exception of the parser called inside; our own errors pass.

    what: the sentence that says which file is at fault.
    """
    try:
        yield
    except QrloraError:
        raise
    except BaseException as error:
        # A panic in a Rust extension is no Exception; KeyboardInterrupt and SystemExit are not the parser's.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(what, expected=expected, got=_described(error), remedy=remedy) from error


def _described(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    told = str(error)
    if errors := getattr(error, "errors", None):  # pydantic's, without its links
        told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in errors()[:5])
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def read_text(path: Path, what: str, kind: type[QrloraError], largest: int = LARGEST_TEXT) -> str:
    """Read a file in UTF-8, without the byte order mark that some editors begin it with. what: what it should be."""
    remedy = "check the path; if it is right, save the file again as UTF-8"
    with parsing(
        said("cannot read %(what)s %(path)s", what=verbatim(what), path=path),
        kind,
        expected="a text file in UTF-8",
        remedy=remedy,
    ):
        with path.open("rb") as stream:
            data = stream.read(largest + 1)
        if len(data) > largest:
            raise kind(
                said("cannot read %(what)s %(path)s: too large", what=verbatim(what), path=path),
                expected=said("%(most)s bytes at most", most=largest),
                got=said("more"),
                remedy="name the file that was meant, or divide it",
            )
        return io.StringIO(data.decode("utf-8-sig"), newline=None).read()


def read_json(path: Path, what: str, kind: type[QrloraError]) -> Any:
    """Read any JSON value from a file; errors as `read_text` and `parse_json`."""
    return parse_json(read_text(path, what, kind), str(path), kind)


def parse_json(
    text: str | bytes,
    what: str,
    kind: type[QrloraError],
    *,
    expected: str = "JSON",
    remedy: str = "export it again",
    finite: bool = True,
) -> Any:
    """Return any JSON value. Refused is also what other programs cannot read or write again: keys named twice, NaN and
    infinite numbers (unless `finite` is False: what Python alone reads), halves of surrogate pairs."""
    with parsing(f"{what} is no JSON", kind, expected=expected, remedy=remedy):
        numbers: dict[str, Any] = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
        value = json.loads(text, object_pairs_hook=_each_once, **numbers)
        if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]  # both are of one type
            json.dumps(value, ensure_ascii=False).encode()
        return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = sorted(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    if twice:
        raise ValueError(f"keys named twice: {twice}")
    return dict(pairs)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is larger than any number")
    return value


def read_toml(path: Path, what: str, kind: type[QrloraError], *, remedy: str) -> dict[str, Any]:
    """Read the tables of a TOML file."""
    text = read_text(path, what, kind, LARGEST_TOML)
    with parsing(said("%(path)s is not TOML", path=path), kind, remedy=remedy):
        bare = re.sub(r"\"[^\"\n]*\"|'[^'\n]*'", "", text)
        dots = max((line.count(".") for line in bare.splitlines()), default=0)
        if dots > MOST_DOTS:
            raise ValueError(said("a line with %(dots)s dots outside strings", dots=dots))
        return tomllib.loads(text)


def plain_float(text: str) -> float:
    """Parse a finite number in plain decimal notation. ValueError for what Python reads besides: 1_0, full-width
    digits, blanks, nan, infinity."""
    value = float(text) if NUMBER.fullmatch(text) else math.nan
    if not math.isfinite(value):
        raise ValueError(said("expected a finite number, got %(text)s", text=repr(text[:40])))
    return value


def plain_int(text: str) -> int:
    """Parse a whole number in plain decimal notation; ValueError as `plain_float`."""
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        raise ValueError(f"expected a whole number, got {text[:40]!r}")
    return int(text)


def plain_number(value: Any) -> Any:
    """Return text as a number where it is one in plain notation, and any other value as it is."""
    if isinstance(value, bool):
        raise ValueError(said("expected a number, got %(value)s", value=value))
    if isinstance(value, (list, tuple)):
        return [plain_number(one) for one in value]
    if isinstance(value, dict):
        return {key: plain_number(one) for key, one in value.items()}
    if not isinstance(value, str):
        return value
    return int(value) if re.fullmatch(r"[+-]?[0-9]{1,20}", value) else plain_float(value)


def inside(path: Path, folder: Path, kind: type[QrloraError]) -> Path:
    """Return ``path`` if its file lies in ``folder``, symbolic links followed; raise ``kind`` otherwise.

    For what a folder or a file in it leads to; what a user names lies wherever the user says.
    """
    with parsing(f"{path} leads nowhere", kind, expected=f"a file inside {folder}", remedy="correct the path"):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise kind(
                f"{path} leads out of its folder",
                expected=f"a file inside {folder}",
                got=path.resolve(),
                remedy="copy the file into the folder",
            )
    return path


def visible(folder: Path) -> list[Path]:
    """List a folder in sorted order, without hidden files and macOS's `._*`."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
