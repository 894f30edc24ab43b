"""The files of the studio's pilots: PLACE/pilots/NAME with the project file, its pictures, and all that stages make."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qrlora._files import make_folder, write_all, write_atomically
from qrlora._said import joined, said, verbatim
from qrlora.apps.samples import SAMPLES, sample_files
from qrlora.apps.studio.forms import renamed
from qrlora.errors import QrloraError, RequestError
from qrlora.models.training.pictures import open_picture
from qrlora.models.training.recipe import Recipe

if TYPE_CHECKING:
    from qrlora.operations.pilot import Line

FILE = "line.toml"
PICTURE = re.compile(r"[A-Za-z0-9][\w.-]{0,60}\.(png|jpg|jpeg|webp)", re.ASCII | re.IGNORECASE)
OURS = {"model", "log_with"} | {name for name, one in Recipe.model_fields.items() if "Path" in str(one.annotation)}
"""Recipe fields that a page may not set: they name files and services of this machine."""


def project_file(place: Path, name: str) -> Path:
    """Return the project file of a pilot. RequestError (404) if there is none."""
    path = place / "pilots" / name / FILE
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,39}", name) or not path.is_file():
        raise RequestError("no such pilot", status=404, got=name[:40], remedy="the page of pilots lists them all")
    return path


def projects(place: Path) -> list[str]:
    """List the pilots by name."""
    return sorted(path.parent.name for path in (place / "pilots").glob(f"*/{FILE}"))


def create(place: Path, model: str, sample: str, text: str) -> str:
    """Make a pilot from a sample project, with another project file if there is a text; returns its name.

    Raises:
        DataError, RequestError: the project file cannot be used here, or its name is taken.
    """
    if sample not in SAMPLES:
        raise RequestError("no such sample", expected=joined(map(verbatim, SAMPLES), " or "), got=sample[:40])
    make_folder(place / "pilots")
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        contents = sample_files(sample, Path(scratch, FILE))
        write_all(
            {path: text.encode() if text and path.name == FILE else data for path, data in contents.items()},
            make_folder=True,
        )
        line = checked(Path(scratch, FILE), model)
        try:
            shutil.copytree(scratch, place / "pilots" / line.name)
        except FileExistsError as error:
            remedy = 'write another `name = "..."` into the project file'
            raise RequestError("there is a pilot of this name", status=409, got=line.name, remedy=remedy) from error
    return line.name


def change(path: Path, model: str, text: str) -> None:
    """Replace a project file. DataError, RequestError: it cannot be used here; then the old one stays."""
    trial = path.with_name("changed.toml")
    write_atomically(trial, text.encode())
    try:
        name = checked(trial, model).name
        if name != path.parent.name:
            raise RequestError("a pilot keeps its name", expected=verbatim(path.parent.name), got=name)
        trial.replace(path)
    finally:
        trial.unlink(missing_ok=True)


def checked(path: Path, model: str) -> Line:
    """Read a project file from a page: of this studio's base model, and of nothing outside its own folder.

    Raises:
        DataError, RequestError: it is not so.
    """
    from qrlora.operations.pilot import Line

    try:
        line = Line.read(path)
        files = [item.picture for item in line.items] + [one for one in (line.brand, line.products) if one]
        folder = path.parent.resolve()
        if outside := [str(one) for one in files if not (folder / one).resolve().is_relative_to(folder)]:
            remedy = "add pictures on the pilot's page, and name them pictures/NAME"
            raise RequestError("files outside the pilot's folder", expected="pictures/NAME", got=outside, remedy=remedy)
        if named := sorted(OURS & _recipe_fields(line)):
            raise RequestError(
                "recipe fields that the pilot sets itself", got=", ".join(named), remedy="leave them out"
            )
        if line.model != model:
            remedy = said('write `model = "%(model)s"`, which is the one that this studio has loaded', model=model)
            raise RequestError("a pilot of another base model", expected=verbatim(model), got=line.model, remedy=remedy)
        return Line.load(path)
    except QrloraError as error:
        raise renamed(error, path.parent, ".") from error


def _recipe_fields(line: Line) -> set[str]:
    return {name for part in (line.training, *(item.training for item in line.items)) for name in part}


def new_picture(path: Path, name: str) -> Path:
    """Return where a picture of this name goes. RequestError if the name cannot be used, or is taken."""
    if not PICTURE.fullmatch(name):
        raise RequestError(
            "this cannot be a picture's name",
            expected="letters, digits, . _ -, and .png",
            got=name[:80],
            remedy="rename the file",
        )
    target = path.parent / "pictures" / name
    if target.exists():
        raise RequestError("there is a picture of this name", status=409, got=name, remedy="rename the file")
    return target


def take_picture(source: Path, target: Path) -> None:
    """Put an upload into a pilot's folder. DataError if it is no picture."""
    try:
        open_picture(source)
        make_folder(target.parent)
        source.replace(target)
    except QrloraError as error:
        raise renamed(error, source, target.name) from error


def pictures(path: Path) -> list[str]:
    """List the pictures of a pilot that it may learn from."""
    return sorted(one.name for one in (path.parent / "pictures").glob("*") if PICTURE.fullmatch(one.name))


def made(path: Path, name: str) -> Path:
    """Return a picture that a stage made, or one that it learned from. RequestError (404) if there is none."""
    places: Iterator[Path] = (one for place in _places(path) for one in place.rglob(name))
    found = next(places, None) if PICTURE.fullmatch(name) else None
    if found is None:
        raise RequestError("no such picture", status=404, got=name[:60])
    return found


def _places(path: Path) -> tuple[Path, ...]:
    folder = path.with_suffix(".pilot")
    return folder / "pictures", folder / "catalog" / "pictures", path.parent / "pictures"
