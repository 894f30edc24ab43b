"""Read the project file of a pilot: `line.toml`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qrlora._reading import read_toml, wrong_value
from qrlora._said import joined, said
from qrlora.errors import DataError

Stage = Literal["one_picture", "several_styles", "line"]
STAGES: tuple[Stage, ...] = get_args(Stage)
STUDIED: tuple[Stage, ...] = ("one_picture", "several_styles")
"""Stages that a blind study is made of."""
OURS = "adapters"
"""The arm of a study that has the pilot's pictures."""
Language = Literal["en", "ja"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Item(_Part):
    """The subject, or one style: a name, and the picture (or pictures, or folder) it is learned from."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="lower-case letters, digits and -")
    picture: Path = Field(description="picture or folder, from the project file's folder")
    caption: str = Field("", description="what the picture shows, with [trigger] where the trigger goes")
    weight: float = Field(1.0, description="of its adapter in compositions")
    training: dict[str, Any] = Field(default_factory=dict, description="recipe fields of this one alone")


class Prompts(_Part):
    """Prompts of each stage."""

    subject: tuple[str, ...] = Field(("a photo of a {subject}",), min_length=1, description="of the subject alone")
    style: tuple[str, ...] = Field(
        ("a picture of a mug in {style} style", "a picture of a house in {style} style"),
        min_length=1,
        description="of a style alone, on other things",
    )
    composed: tuple[str, ...] = Field(
        ("a photo of a {subject} in {style} style",), min_length=1, description="of the subject in a style"
    )
    line: tuple[str, ...] = Field((), description="of each product in a style (default: as composed)")

    @field_validator("*")
    @classmethod
    def _fields(cls, value: tuple[str, ...], info: Any) -> tuple[str, ...]:
        needed = {"subject": {"subject"}, "style": {"style"}, "composed": {"subject", "style"}}.get(
            info.field_name, {"subject", "style"}
        )
        for text in value:
            missing = [name for name in sorted(needed) if f"{{{name}}}" not in text]
            if missing:
                raise ValueError(said("%(text)s lacks %(field)s", text=repr(text), field=f"{{{missing[0]}}}"))
        return value

    @property
    def of_line(self) -> tuple[str, ...]:
        """The prompts of stage 3."""
        return self.line or self.composed


class Sampling(_Part):
    """Settings and number of the pictures."""

    pictures: int = Field(16, ge=1, le=10_000, description="for each thing that is measured")
    per_product: int = Field(1, ge=1, le=1000, description="for each product, style and prompt, in stage 3")
    seed: int = Field(0, ge=0, lt=2**62, description="of the first picture; the others count up from it")
    steps: int | None = Field(None, ge=1, description="denoising steps (default: the family's)")
    guidance: float | None = Field(None, description="classifier-free guidance scale (default: the family's)")
    resolution: int | None = Field(None, ge=16, description="side in pixels (default: the model's)")
    batch_size: int = Field(8, ge=1)
    null_space: float | None = Field(None, ge=0, le=1, description="strength of null-space projection (default: 0.5)")


class Scores(_Part):
    """Metrics that score subject and style in a picture."""

    subject: str = Field("", description="metric of `qrlora evaluate` (default: the base model's own, else structure)")
    style: str = Field("", description="metric of `qrlora evaluate` (default: the base model's own, else texture)")


class Gate(_Part):
    """Limits that a stage has to reach for a go to be recommended. A person decides."""

    compliance: float = Field(0.8, ge=0, le=1, description="least share of pictures that pass the brand sheet")
    crosstalk: float = Field(0.2, ge=0, description="largest loss of a score inside a composition (stages 2 and 3)")
    copies: float = Field(0.2, ge=0, le=1, description="largest share of pictures that copy a training picture")
    acceptance: float | None = Field(None, ge=0, le=1, description="least share of a blind study's votes (not stage 3)")


class Gates(_Part):
    one_picture: Gate = Gate.model_validate({})
    several_styles: Gate = Gate.model_validate({})
    line: Gate = Gate.model_validate({})

    @field_validator("line")
    @classmethod
    def _measurable(cls, value: Gate) -> Gate:
        if value.acceptance is not None:
            raise ValueError("no blind study is made of stage 3: leave `acceptance` out")
        return value


class Costs(_Part):
    """Prices of the machine; energy is an estimate from the time and its power."""

    watts: float = Field(65.0, ge=0, description="power of the machine under load")
    per_kwh: float = Field(0.30, ge=0, description="price of a kilowatt-hour")
    per_hour: float = Field(0.0, ge=0, description="price of an hour of the machine")
    per_gb_month: float = Field(0.02, ge=0, description="price of a gigabyte stored for a month")
    currency: str = Field("EUR", min_length=1, max_length=8)


class Line(_Part):
    """One product line: a subject, its styles, its products, and what is asked of their pictures."""

    version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$", description="lower-case letters, digits and -")
    owner: str = Field("", description="who owns what is trained")
    licence: str = Field("", description="SPDX expression of the pictures and adapters")
    model: str = Field("pico", description="base model: pico, a folder in the diffusers layout, or a hub id")
    brand: Path | None = Field(None, description="brand sheet (docs/evaluate.md)")
    products: Path | None = Field(None, description="table of the line's products (docs/catalog.md), for stage 3")
    subject: Item
    styles: tuple[Item, ...] = Field(min_length=1)
    training: dict[str, Any] = Field(default_factory=dict, description="recipe fields of all adapters")
    prompts: Prompts = Prompts.model_validate({})
    sampling: Sampling = Sampling.model_validate({})
    scores: Scores = Scores.model_validate({})
    gates: Gates = Gates.model_validate({})
    costs: Costs = Costs.model_validate({})
    languages: tuple[Language, ...] = Field(("en", "ja"), min_length=1)

    @model_validator(mode="after")
    def _names_differ(self) -> Line:
        names = [item.name for item in self.items]
        if len(set(names)) < len(names):
            raise ValueError(said("subject and styles need names of their own"))
        return self

    @property
    def items(self) -> tuple[Item, ...]:
        """The subject, then the styles."""
        return (self.subject, *self.styles)

    @classmethod
    def load(cls, path: Path) -> Line:
        """Read a project file; its paths count from its folder.

        Raises:
            DataError: as `read`, or it names a file that is missing.
        """
        return cls.read(path)._placed(path)

    @classmethod
    def read(cls, path: Path) -> Line:
        """Read a project file without checking the files that it names, and without resolving their paths.

        Raises:
            DataError: it cannot be read, or has unknown, missing or contradictory fields.
        """
        remedy = "`qrlora pilot new line.toml` writes one to begin with"
        fields = read_toml(path, said("project file"), DataError, remedy=remedy)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            wrong = joined(wrong_value(".".join(map(str, one["loc"])), one) for one in error.errors())
            remedy = "`qrlora pilot new --schema` prints what a project file may hold"
            raise DataError(said("%(path)s is no project file", path=path), got=wrong, remedy=remedy) from error

    def _placed(self, path: Path) -> Line:
        folder = path.resolve().parent
        updates: dict[str, Any] = {
            "subject": _at(self.subject, folder),
            "styles": tuple(_at(style, folder) for style in self.styles),
        }
        for name in ("brand", "products"):
            if (value := getattr(self, name)) is not None:
                updates[name] = folder / value
        line = self.model_copy(update=updates)
        files = [("picture", item.picture) for item in line.items]
        files += [(name, value) for name in ("brand", "products") if (value := getattr(line, name))]
        for what, file in files:
            if not file.exists():
                raise DataError(
                    said("%(path)s: %(what)s is missing", path=path, what=what),
                    expected=str(file),
                    got=said("no such file or folder"),
                    remedy=said("put it there, or name another one in the project file"),
                )
        return line

    @classmethod
    def file_schema(cls) -> Mapping[str, Any]:
        """The JSON Schema of project files."""
        return cls.model_json_schema()


def _at(item: Item, folder: Path) -> Item:
    return item.model_copy(update={"picture": folder / item.picture})
