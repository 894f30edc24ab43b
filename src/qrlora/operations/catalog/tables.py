"""Read the two files of a catalog: products as a spreadsheet writes them, styles as TOML.

name;word;picture;adapter;tags           a table: one product a row
teapot classic;teapot;teapot.png;;new

[[style]]                                a file: one style a table
name = "chalk"
picture = "chalk.png"
"""

from __future__ import annotations

import csv
import difflib
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qrlora._reading import plain_float, plain_number, read_text, read_toml
from qrlora.errors import DataError, QrloraError, RecipeError
from qrlora.models.training.pictures import open_picture
from qrlora.models.training.recipe import TRIGGERS, Recipe

COLUMNS = {
    "name": "what it is called; names its folder",
    "word": "what it is, in a word the base model knows",
    "picture": "a picture of it, from which its adapter is trained",
    "adapter": "its adapter, if there is one: a file, or registry:NAME@alias",
    "weight": "of its adapter (default: 1)",
    "trigger": "the word that calls its adapter (default: the adapter's own)",
    "tags": "words that a policy may ask for, separated by blanks",
}
MOST_LISTED = 20
"""Bad rows that an error names."""
PRODUCT, STYLE = "{product}", "{style}"
PROMPT = f"a {PRODUCT} in {STYLE} style"

Resolve = Callable[[str], Path | None]
"""The file that registry:NAME@alias names; None for a path, which counts from the folder of its table."""


def no_registry(text: str) -> Path | None:
    """Refuse references where no registry is in play; a `Resolve`. QrloraError for a reference to one."""
    if text.startswith("registry:"):
        remedy = "name it with --registry PLACE, or QRLORA_REGISTRY"
        raise QrloraError(f"{text} and no registry", expected="a registry", got="none", remedy=remedy)
    return None


@dataclass(frozen=True)
class Item:
    """A product or a style: an adapter that is there, or the picture to train it from; with both, the picture is what
    the results are compared with.

    Attributes:
        folder: its name as a part of paths.
        word: what it is, or what the style's picture shows.
        trigger: empty if its adapter states none.
    """

    name: str
    role: str
    folder: str
    word: str = ""
    picture: Path | None = None
    adapter: Path | None = None
    reference: str = ""
    weight: float = 1.0
    trigger: str = ""
    tags: tuple[str, ...] = ()

    @property
    def called(self) -> str:
        """Its words in a prompt: `<c> teapot`, `<s>`."""
        return self.trigger if self.role == "style" else f"{self.trigger} {self.word}".strip()


class StyleFields(BaseModel):
    """The fields of one [[style]] of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="what it is called; names its folder")
    picture: Path | None = Field(None, description="a picture in it, from which its adapter is trained")
    adapter: str = Field("", description="its adapter, if there is one: a file, or registry:NAME@alias")
    word: str = Field("", description="what its picture shows, in a word the base model knows")
    trigger: str = Field("", description="the word that calls its adapter (default: the adapter's own)")
    weight: float = Field(1.0, description="of its adapter")
    product_weight: float = Field(1.0, description="factor on the weights of the products in it")
    null_space: float = Field(0.5, ge=0, le=1, description="strength of the null-space projection")
    tags: tuple[str, ...] = Field((), description="words that a policy may ask for")
    prompts: tuple[str, ...] = Field((), description="prompts in this style (default: those of the file)")
    seeds: tuple[int, ...] = Field((), description="seeds in this style (default: those of the file)")

    @field_validator("weight", "product_weight", "null_space", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain_number(value)


class Sampling(BaseModel):
    """[sampling]: the family's defaults unless given."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int | None = Field(None, ge=1, description="denoising steps")
    guidance: float | None = Field(None, description="classifier-free guidance scale")
    resolution: int | None = Field(None, ge=8, description="side of the pictures in pixels")


class StylesFile(BaseModel):
    """styles.toml."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    use: Literal["", "internal", "outputs", "commercial"] = Field("", description="in place of the policy's own")
    prompts: tuple[str, ...] = Field((PROMPT,), min_length=1, description=f"{PRODUCT} and {STYLE} stand for triggers")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="one picture of each prompt for each of them")
    sampling: Sampling = Field(
        default_factory=lambda: Sampling.model_validate({}), description="steps, guidance, resolution"
    )
    training: Mapping[str, Any] = Field(default_factory=dict, description="fields of a recipe, for what is trained")
    style: tuple[StyleFields, ...] = Field(min_length=1, description="the styles")

    @model_validator(mode="after")
    def _shown(self) -> StylesFile:
        for prompt in (*self.prompts, *(prompt for style in self.style for prompt in style.prompts)):
            if PRODUCT not in prompt:
                raise ValueError(f"the prompt {prompt!r} does not name the product: put {PRODUCT} into it")
        for seed in (*self.seeds, *(seed for style in self.style for seed in style.seeds)):
            if not 0 <= seed < 2**63:
                raise ValueError(f"a seed is a whole number from 0, below 2^63, got {seed}")
        return self


@dataclass(frozen=True)
class Style:
    """A style with its prompts, seeds and strength."""

    item: Item
    product_weight: float
    null_space: float
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]


def read_products(path: Path, resolve: Resolve) -> tuple[list[Item], list[str]]:
    """Return the products, and the columns that mean nothing here.

    Raises:
        DataError: no table, or rows that cannot be used: all of them, with their line numbers.
    """
    header, rows = _table(path)
    unknown = [name for name in header if name not in COLUMNS]
    _check_header(path, header, unknown)
    products: list[Item] = []
    problems: list[str] = []
    taken: dict[str, int] = {}
    for line, cells in rows:
        try:
            if len(cells) > len(header):
                raise ValueError(f"{len(cells)} cells under {len(header)} columns")
            fields = {name: cell.strip() for name, cell in zip(header, cells, strict=False) if name in COLUMNS}
            product = _product(fields, path.parent, resolve)
            if (first := taken.setdefault(product.folder.casefold(), line)) != line:
                raise ValueError(f"the same name as in line {first}, or one that differs by signs alone")
            products.append(product)
        except (ValueError, OSError) as error:
            problems.append(f"line {line}: {_said(error)}")
    if problems or not products:
        more = f"\n  and {len(problems) - MOST_LISTED} more" if len(problems) > MOST_LISTED else ""
        listed = "\n".join(f"  - {one}" for one in problems[:MOST_LISTED]) or "  - it has no rows"
        remedy = "correct them in the spreadsheet; nothing was started. docs/catalog.md describes the columns"
        raise DataError(f"rows of {path} cannot be used:\n{listed}{more}", remedy=remedy)
    return products, unknown


def _table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header in lower case, and every row that is not empty with the number of its first line."""
    lines = read_text(path, "the table of products", DataError).splitlines(keepends=True)
    first = 0
    delimiter = ""
    if lines and (told := re.fullmatch(r"sep=(.)\s*", lines[0])):  # Excel's own way to say it
        first, delimiter = 1, told[1]
    heading = lines[first] if len(lines) > first else ""
    delimiter = delimiter or max(",;\t", key=heading.count)
    reader = csv.reader(lines[first:], delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        before = 0
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((first + before + 1, cells))
            before = reader.line_num
    except csv.Error as error:
        line = first + reader.line_num
        raise DataError(f"{path}, line {line}: no table", got=error, remedy="export it again as CSV UTF-8") from error
    if not rows:
        raise DataError(
            f"{path} is empty", expected=f"a first row with {', '.join(COLUMNS)}", remedy="see docs/catalog.md"
        )
    return [cell.strip().lower() for cell in rows[0][1]], rows[1:]


def _check_header(path: Path, header: Sequence[str], unknown: Sequence[str]) -> None:
    twice = sorted({name for name in header if name and header.count(name) > 1})
    near = {name: close[0] for name in unknown if (close := difflib.get_close_matches(name, COLUMNS, 1, 0.75))}
    if twice or "name" not in header or near or not {"picture", "adapter"} & set(header):
        wrong = [f"{name!r} twice" for name in twice] + [f"{a!r}: did you mean {b!r}?" for a, b in near.items()]
        raise DataError(
            f"the first row of {path} does not name the columns",
            expected="name, and picture or adapter; may have " + ", ".join(COLUMNS),
            got="; ".join(wrong) or ", ".join(header),
            remedy="write the names into its first row, as docs/catalog.md shows",
        )


def _product(fields: Mapping[str, str], folder: Path, resolve: Resolve) -> Item:
    weight = fields.get("weight", "")
    return item_of(
        "subject",
        name=fields.get("name", ""),
        word=fields.get("word", ""),
        folder=folder,
        picture=fields.get("picture", ""),
        adapter=fields.get("adapter", ""),
        weight=plain_float(weight.replace(",", ".")) if weight else 1.0,  # 0,9 is how half of Europe writes it
        trigger=fields.get("trigger", ""),
        tags=tuple(fields.get("tags", "").split()),
        resolve=resolve,
    )


def item_of(
    role: str,
    *,
    name: str,
    word: str,
    folder: Path,
    picture: str,
    adapter: str,
    weight: float,
    trigger: str,
    tags: tuple[str, ...],
    resolve: Resolve,
) -> Item:
    """Return a product or style after checking its files. ValueError or one of our errors says what is wrong with
    it."""
    if not name:
        raise ValueError("it has no name")
    if not picture and not adapter:
        raise ValueError("neither a picture nor an adapter")
    shown = folder / picture if picture else None
    if shown is not None:
        open_picture(shown)
    path = (resolve(adapter) or folder / adapter) if adapter else None
    if path is None:
        trigger = trigger or TRIGGERS[role]
    else:
        its_role, its_trigger = _read_adapter(path)
        if its_role in TRIGGERS and its_role != role:
            raise ValueError(f"{adapter} is the adapter of a {its_role}, and a {role}'s is needed here")
        trigger = trigger or its_trigger
    return Item(name, role, folder_name(name), word, shown, path, adapter, weight, trigger, tags)


def _read_adapter(path: Path) -> tuple[str, str]:
    """Read role and trigger from a file's metadata; empty where it states none."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"no adapter {path}: a .safetensors file is needed")
    from qrlora._tensor_file import read_header  # torch, which tables without adapters do without

    with path.open("rb") as stream:
        metadata = read_header(stream).get("__metadata__", {})
    return metadata.get("qrlora.role", ""), metadata.get("qrlora.trigger", "")


def folder_name(name: str) -> str:
    """A name as a part of a path: letters and digits of any script, . _ -. ValueError if nothing is left of it."""
    plain = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", name)).strip("-._")[:60]
    if not plain:
        raise ValueError(f"the name {name[:40]!r} has no letter or digit")
    return plain


def read_styles(path: Path, resolve: Resolve) -> tuple[StylesFile, list[Style]]:
    """Return the file, and its styles with their defaults filled in.

    Raises:
        RecipeError: not TOML, or unknown, missing or wrong fields: all of them.
    """
    fields = read_toml(path, "the styles", RecipeError, remedy="see docs/catalog.md")
    try:
        file = StylesFile.model_validate(fields)
    except ValidationError as error:
        raise _refused(path, list(_explained(error))) from error
    styles: list[Style] = []
    problems: list[str] = []
    taken: set[str] = set()
    for number, given in enumerate(file.style, 1):
        try:
            item = _style_item(given, path.parent, resolve)
            if item.folder.casefold() in taken:
                raise ValueError("another style has this name, or one that differs by signs alone")
            taken.add(item.folder.casefold())
            prompts, seeds = given.prompts or file.prompts, given.seeds or file.seeds
            styles.append(Style(item, given.product_weight, given.null_space, prompts, tuple(dict.fromkeys(seeds))))
        except (ValueError, OSError) as error:
            problems.append(f"style {number} ({given.name}): {_said(error)}")
    if problems:
        raise _refused(path, problems)
    recipe_for(styles[0].item, file, "pico", "float32", None)  # so that a wrong field of [training] is told at once
    return file, styles


def _style_item(given: StyleFields, folder: Path, resolve: Resolve) -> Item:
    return item_of(
        "style",
        name=given.name,
        word=given.word,
        folder=folder,
        picture=str(given.picture or ""),
        adapter=given.adapter,
        weight=given.weight,
        trigger=given.trigger,
        tags=given.tags,
        resolve=resolve,
    )


def recipe_for(item: Item, file: StylesFile, model: str, dtype: str, output: Path | None) -> Recipe:
    """Return the recipe that trains the adapter of a product or style from its picture. RecipeError: a wrong
    [training]."""
    fixed = {"role", "images", "noun", "trigger", "output", "model", "dtype"} & set(file.training)
    if fixed:
        raise RecipeError(
            f"[training] sets {', '.join(sorted(fixed))}",
            expected="fields such as steps, rank, learning_rate",
            remedy="leave them out: the tables and the model that is in use say them",
        )
    images = item.picture or Path("unused.png")
    own = {"role": item.role, "images": images, "noun": item.word, "trigger": item.trigger or TRIGGERS[item.role]}
    return Recipe.of({"log_with": "none", **file.training, **own, "model": model, "dtype": dtype, "output": output})


def _refused(path: Path, lines: Sequence[str]) -> RecipeError:
    listed = "\n".join(f"  - {line}" for line in lines[:MOST_LISTED])
    return RecipeError(f"{path} cannot be used:\n{listed}", remedy="correct it; docs/catalog.md describes every field")


def _explained(error: ValidationError) -> Iterator[str]:
    known = {*StylesFile.model_fields, *StyleFields.model_fields, *Sampling.model_fields}
    for item in error.errors():
        place = ".".join(str(part + 1) if isinstance(part, int) else str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), known, 1, 0.5)
            yield f"unknown field {place!r}" + (f": did you mean {near[0]!r}?" if near else "")
        elif item["type"] == "missing":
            yield f"{place!r} is required"
        else:
            yield f"{place} {item['msg'].removeprefix('Value error, ')}".strip()


def _said(error: Exception) -> str:
    if isinstance(error, QrloraError):
        return error.what + (f" ({error.got})" if error.got is not None else "")
    return str(error)
