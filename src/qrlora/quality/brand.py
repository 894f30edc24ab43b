"""Brand sheets: rules for pictures in TOML, and verdicts that give the reason for every failure.

    sheet = BrandSheet.load("brand.toml")
    verdict = sheet.check(picture, {"copied": 0.97})
    verdict.reasons        # ("12 % of the picture is pure red (#ff0000 within ΔE 5), which is forbidden: at most 1 %",)

A rule that cannot be checked, such as one on the colours of a subject without a mask, fails.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import cv2
import numpy as np
from jaxtyping import UInt8
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from qrlora._reading import plain_number, read_toml, validated
from qrlora._said import said
from qrlora.errors import BrandError
from qrlora.models.training.pictures import open_picture
from qrlora.quality.images.read import MeasuredPicture, hex_colour
from qrlora.quality.metrics.shares import Share
from qrlora.quality.metrics.table import METRICS

LOGO_SIZES = 16
"""Number of widths in geometric progression at which a logo is searched."""
LEAST_LOGO = 8  # pixels a side; smaller ones match everything

Hex = Annotated[str, AfterValidator(hex_colour)]
Portion = Annotated[float, Field(ge=0, le=1)]
Where = Literal["picture", "subject"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, about: Any) -> Any:
        """Read text as a number in plain notation only: no booleans, no "1_0"."""
        annotation = cls.model_fields[about.field_name].annotation
        return plain_number(value) if {int, float} & {annotation, *get_args(annotation)} else value


class Palette(_Part):
    """The brand's colours, and the least share of a picture that they cover."""

    colours: tuple[Hex, ...] = Field(min_length=1, description="the brand's colours, such as #d7263d")
    tolerance: float = Field(10.0, ge=0, description="CIEDE2000 difference up to which a colour is one of them")
    at_least: Portion = Field(0.0, description="share of the pixels that has to be in them")
    where: Where = Field("picture", description="of the whole picture, or of the subject under its mask")


class ColourRule(_Part):
    """Limits on the share of one colour."""

    colour: Hex = Field(description="such as #d7263d")
    name: str = Field("", description="what people call it")
    tolerance: float = Field(10.0, ge=0, description="CIEDE2000 difference up to which a colour is this one")
    at_least: Portion = Field(0.0, description="least share of the pixels")
    at_most: Portion = Field(1.0, description="largest share of the pixels")
    where: Where = Field("picture", description="of the whole picture, or of the subject under its mask")

    @model_validator(mode="after")
    def _ordered(self) -> ColourRule:
        if self.at_least > self.at_most:
            more, less = f"{self.at_least:g}", f"{self.at_most:g}"
            raise ValueError(said("at_least %(more)s is more than at_most %(less)s", more=more, less=less))
        return self

    @property
    def label(self) -> str:
        """The colour's name and code with the tolerance."""
        code = f"{self.colour} within ΔE {self.tolerance:g}"
        return f"{self.name} ({code})" if self.name else code


class ForbiddenColour(ColourRule):
    """A forbidden colour: at most 1 % unless stated."""

    tolerance: float = Field(5.0, ge=0, description="CIEDE2000 difference up to which a colour is this one")
    at_most: Portion = Field(0.01, description="largest share of the pixels")


class Logo(_Part):
    """A logo that has to be visible and upright, given as a crop of a picture."""

    picture: Path = Field(description="the crop, with a little of what is around it; counts from the sheet's folder")
    name: str = Field("", description="what people call it")
    at_least: float = Field(0.7, gt=0, le=1, description="least correlation with the best place of the picture")
    width: tuple[float, float] = Field(
        (0.1, 0.5), description="its least and largest width, as shares of the picture's"
    )

    @field_validator("width")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1] <= 1:
            raise ValueError("two shares of the picture's width, the smaller first")
        return value

    @field_validator("picture")
    @classmethod
    def _readable(cls, value: Path) -> Path:
        pixels = np.asarray(open_picture(value).image)
        if min(pixels.shape[:2]) < LEAST_LOGO or pixels.std(axis=(0, 1)).max() < 1:
            raise ValueError(said("a logo needs %(least)s pixels a side, and more than one colour", least=LEAST_LOGO))
        return value


class GroupRule(_Part):
    """The condition for a group of pictures to pass."""

    passing: Portion = Field(default=1.0, description="share of the pictures that has to pass")


SECTIONS: dict[str, type[BaseModel]] = {
    "palette": Palette,
    "colour": ColourRule,
    "forbidden": ForbiddenColour,
    "logo": Logo,
    "composition": GroupRule,
}


@dataclass(frozen=True)
class Check:
    """The result of one rule on one picture."""

    rule: str
    value: float | None
    passes: bool
    message: str


@dataclass(frozen=True)
class Verdict:
    """The results of all rules on one picture."""

    checks: tuple[Check, ...]

    @property
    def passes(self) -> bool:
        """Return True if every rule passes."""
        return all(check.passes for check in self.checks)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The messages of the rules that fail."""
        return tuple(check.message for check in self.checks if not check.passes)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "passes": self.passes,
            "reasons": list(self.reasons),
            "checks": [asdict(check) for check in self.checks],
        }


class BrandSheet(_Part):
    """A brand sheet; `parse` and `load` raise a BrandError that lists every unknown, missing or invalid field."""

    name: str = Field("", description="name of the brand")
    palette: Palette | None = Field(None, description="the brand's colours")
    colour: tuple[ColourRule, ...] = Field((), description="limits on the share of single colours")
    forbidden: tuple[ForbiddenColour, ...] = Field((), description="forbidden colours")
    logo: tuple[Logo, ...] = Field((), description="logos that have to be visible")
    scores: dict[str, float] = Field(
        default_factory=dict,
        description="limits of metrics: the least value if higher is better, or else the largest",
    )
    composition: GroupRule = Field(default_factory=GroupRule, description="the condition for a group to pass")

    @field_validator("scores")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in METRICS:
                near = difflib.get_close_matches(name, METRICS, 1, 0.5)
                known = said("there are %(names)s", names=", ".join(METRICS))
                hint = said("did you mean %(near)s?", near=repr(near[0])) if near else known
                raise ValueError(said("unknown metric %(name)s: %(hint)s", name=repr(name), hint=hint))
        return value

    @model_validator(mode="after")
    def _not_empty(self) -> BrandSheet:
        if not (self.palette or self.colour or self.forbidden or self.logo or self.scores):
            raise ValueError(said("the sheet has no rules: give a palette, colours, logos or scores"))
        return self

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> BrandSheet:
        """Validate these fields and return the sheet."""
        remedy = "docs/evaluate.md describes every field"
        return validated(cls, fields, said("brand sheet"), BrandError, sections=SECTIONS, remedy=remedy)

    @classmethod
    def load(cls, path: str | Path) -> BrandSheet:
        """Read a file; paths in it are relative to its folder."""
        path = Path(path)
        fields = read_toml(path, "the brand sheet", BrandError, remedy="see brands/brand.toml")
        for logo in fields.get("logo", []) if isinstance(fields.get("logo"), list) else []:
            if isinstance(logo, dict) and isinstance(logo.get("picture"), str):
                logo["picture"] = path.parent / logo["picture"]
        return cls.parse(fields)

    @classmethod
    def file_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of the file, for completion and validation in editors."""
        header = {"title": "qrlora brand sheet", "description": "Rules of a brand for pictures; see docs/evaluate.md."}
        schema = cls.model_json_schema()
        schema["properties"]["scores"]["propertyNames"] = {"enum": list(METRICS)}
        return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, **header}

    def check(self, picture: MeasuredPicture, measured: Mapping[str, float | None]) -> Verdict:
        """Apply all rules to a picture. measured: values by name of the metrics that `scores` limits."""
        checks = [] if self.palette is None else [_palette_check(picture, self.palette)]
        checks += [_colour_check(picture, wanted) for wanted in (*self.colour, *self.forbidden)]
        checks += [_logo_check(picture, logo) for logo in self.logo]
        checks += [_score_check(name, limit, measured.get(name)) for name, limit in self.scores.items()]
        return Verdict(tuple(checks))

    def passing(self, verdicts: Sequence[Verdict]) -> tuple[Share, bool]:
        """Return the share of pictures that pass, and whether it is large enough for the group to pass."""
        share = Share.of(verdict.passes for verdict in verdicts)
        return share, share.value >= self.composition.passing


def percent(share: float) -> str:
    """Format a share as text: 12 %."""
    return f"{100 * share:.3g} %"


def _palette_check(picture: MeasuredPicture, palette: Palette) -> Check:
    share = _share(picture, palette.colours, palette.tolerance, palette.where)
    if share is None:
        return _no_mask("palette")
    found = f"{percent(share)} of the {palette.where} is within ΔE {palette.tolerance:g} of the palette"
    return Check(
        "palette", share, share >= palette.at_least, f"{found}; at least {percent(palette.at_least)} should be"
    )


def _colour_check(picture: MeasuredPicture, wanted: ColourRule) -> Check:
    share = _share(picture, (wanted.colour,), wanted.tolerance, wanted.where)
    what = f"colour {wanted.colour}"
    if share is None:
        return _no_mask(what)
    found = f"{percent(share)} of the {wanted.where} is {wanted.label}"
    limit = f"at least {percent(wanted.at_least)} should be"
    if share > wanted.at_most:
        limit = f"at most {percent(wanted.at_most)}" + (" should be" if type(wanted) is ColourRule else "")
    forbidden = ", which is forbidden: " if isinstance(wanted, ForbiddenColour) and share > wanted.at_most else "; "
    return Check(what, share, wanted.at_least <= share <= wanted.at_most, found + forbidden + limit)


def _share(picture: MeasuredPicture, colours: Sequence[str], tolerance: float, where: Where) -> float | None:
    """Return the share within the tolerance of any of the colours; None for a subject without a mask."""
    shares = picture.colours.picture_shares if where == "picture" else picture.colours.subject_shares
    return (
        None if shares is None else float(shares[picture.colours.differences(colours).min(axis=1) <= tolerance].sum())
    )


def _no_mask(what: str) -> Check:
    return Check(what, None, False, f"{what}: the picture has no mask that separates the subject from the background")


def _logo_check(picture: MeasuredPicture, logo: Logo) -> Check:
    name = logo.name or logo.picture.name
    found = logo_match(picture.pixels, _crop(logo.picture), logo.width)
    message = f"{name} has a best correlation of {found:.2f}; at least {logo.at_least:g} is required"
    return Check(f"logo {name}", found, found >= logo.at_least, message)


@lru_cache(maxsize=16)
def _crop(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(open_picture(path).image)


def logo_match(
    pixels: UInt8[np.ndarray, "h w 3"], logo: UInt8[np.ndarray, "h2 w2 3"], width: tuple[float, float]
) -> float:
    """Return the largest correlation of a logo with a picture over all places and LOGO_SIZES; -1 if it does not fit."""
    height, across = pixels.shape[:2]
    best = -1.0
    for wide in np.geomspace(width[0] * across, width[1] * across, LOGO_SIZES):
        size = round(wide), round(wide * logo.shape[0] / logo.shape[1])
        if min(size) < LEAST_LOGO or size[0] > across or size[1] > height:
            continue
        kind = cv2.INTER_AREA if size[0] < logo.shape[1] else cv2.INTER_CUBIC
        found = cv2.matchTemplate(pixels, cv2.resize(logo, size, interpolation=kind), cv2.TM_CCOEFF_NORMED)
        # On areas of one colour the correlation is undefined, and rounding makes it arbitrary.
        best = max(best, float(np.where(np.abs(found) <= 1.001, found, -1.0).max()))
    return best


def _score_check(name: str, limit: float, value: float | None) -> Check:
    metric = METRICS[name]
    if value is None:
        return Check(name, None, False, f"{name} has no value: the picture lacks the mask or prompt for it")
    bound, passes = ("at least", value >= limit) if metric.better == "higher" else ("at most", value <= limit)
    unit = f" {metric.unit}" if metric.unit else ""
    return Check(name, value, passes, f"{name} is {value:.3g}{unit}; {bound} {limit:g} is required")
