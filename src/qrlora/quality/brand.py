"""What a brand asks of a picture, in a sheet of TOML, and whether a picture keeps it: yes, or no and why.

    sheet = Sheet.load("brand.toml")
    verdict = sheet.judge(picture, {"copied": 0.97})
    verdict.reasons        # ("12 % of the picture is pure red (#ff0000 within ΔE 5), which is forbidden: at most 1 %",)

What cannot be judged, such as the colours of a subject without a mask, is not passed.
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
    ValidationError,
    field_validator,
    model_validator,
)

from qrlora._reading import plain_number, read_toml
from qrlora.errors import BrandError
from qrlora.models.training.pictures import open_picture
from qrlora.quality.images.read import Exhibit, hex_colour
from qrlora.quality.metrics.shares import Share
from qrlora.quality.metrics.table import MEASURES

LOGO_SIZES = 16
"""Widths at which a logo is looked for, in equal ratios; between two of them the match falls by little."""
MOST_LINES = 100
"""Wrong fields that an error lists."""
LEAST_LOGO = 8  # pixels a side; below, anything matches

Hex = Annotated[str, AfterValidator(hex_colour)]
Portion = Annotated[float, Field(ge=0, le=1)]
Where = Literal["picture", "subject"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, about: Any) -> Any:
        """true is no number, and "1_0" is none."""
        annotation = cls.model_fields[about.field_name].annotation
        return plain_number(value) if {int, float} & {annotation, *get_args(annotation)} else value


class Palette(_Part):
    """The brand's colours, and how much of a picture has to be in them."""

    colours: tuple[Hex, ...] = Field(min_length=1, description="the brand's colours, such as #d7263d")
    tolerance: float = Field(10.0, ge=0, description="CIEDE2000 difference up to which a colour is one of them")
    at_least: Portion = Field(0.0, description="share of the pixels that has to be in them")
    where: Where = Field("picture", description="of the whole picture, or of the subject under its mask")


class Amount(_Part):
    """How much of one colour there has to be."""

    colour: Hex = Field(description="such as #d7263d")
    name: str = Field("", description="what people call it")
    tolerance: float = Field(10.0, ge=0, description="CIEDE2000 difference up to which a colour is this one")
    at_least: Portion = Field(0.0, description="least share of the pixels")
    at_most: Portion = Field(1.0, description="largest share of the pixels")
    where: Where = Field("picture", description="of the whole picture, or of the subject under its mask")

    @model_validator(mode="after")
    def _ordered(self) -> Amount:
        if self.at_least > self.at_most:
            raise ValueError(f"at_least {self.at_least:g} is more than at_most {self.at_most:g}")
        return self

    @property
    def called(self) -> str:
        """Its name and its code, with the tolerance."""
        code = f"{self.colour} within ΔE {self.tolerance:g}"
        return f"{self.name} ({code})" if self.name else code


class Forbidden(Amount):
    """A colour that is not to be there."""

    tolerance: float = Field(5.0, ge=0, description="CIEDE2000 difference up to which a colour is this one")
    at_most: Portion = Field(0.01, description="largest share of the pixels")


class Logo(_Part):
    """A mark that has to be seen, upright, as a crop of a picture that shows it well."""

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
            raise ValueError(f"a logo needs {LEAST_LOGO} pixels a side, and more than one colour")
        return value


class Passing(_Part):
    """When pictures together pass."""

    passing: Portion = Field(default=1.0, description="share of the pictures that has to pass")


SECTIONS: dict[str, type[BaseModel]] = {
    "palette": Palette,
    "colour": Amount,
    "forbidden": Forbidden,
    "logo": Logo,
    "composition": Passing,
}


@dataclass(frozen=True)
class Check:
    """One thing asked, and what was found. `words` say what is the matter, for the case that it does not hold."""

    what: str
    value: float | None
    holds: bool
    words: str


@dataclass(frozen=True)
class Verdict:
    """All that was asked of one picture."""

    checks: tuple[Check, ...]

    @property
    def passes(self) -> bool:
        """Everything holds."""
        return all(check.holds for check in self.checks)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it does not pass; empty if it does."""
        return tuple(check.words for check in self.checks if not check.holds)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "passes": self.passes,
            "reasons": list(self.reasons),
            "checks": [asdict(check) for check in self.checks],
        }


class Sheet(_Part):
    """A brand sheet. Raises BrandError (by `of` and `load`) that names every unknown, missing or wrong field."""

    name: str = Field("", description="whose sheet it is")
    palette: Palette | None = Field(None, description="the brand's colours")
    colour: tuple[Amount, ...] = Field((), description="how much of single colours there has to be")
    forbidden: tuple[Forbidden, ...] = Field((), description="colours that are not to be there")
    logo: tuple[Logo, ...] = Field((), description="marks that have to be seen")
    scores: dict[str, float] = Field(
        default_factory=dict,
        description="limits of measures by name: the least value where higher is better, else the largest",
    )
    composition: Passing = Field(default_factory=Passing, description="when pictures together pass")

    @field_validator("scores")
    @classmethod
    def _known(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in MEASURES:
                near = difflib.get_close_matches(name, MEASURES, 1, 0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(MEASURES)}"
                raise ValueError(f"unknown measure {name!r}: {hint}")
        return value

    @model_validator(mode="after")
    def _not_empty(self) -> Sheet:
        if not (self.palette or self.colour or self.forbidden or self.logo or self.scores):
            raise ValueError("the sheet asks for nothing: give a palette, colours, logos or scores")
        return self

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Sheet:
        """The sheet with these fields."""
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            lines = "\n".join(f"  - {line}" for line in dict.fromkeys(map(_explain, error.errors()[:MOST_LINES])))
            remedy = "docs/evaluate.md describes every field"
            raise BrandError(f"this brand sheet cannot be used:\n{lines}", remedy=remedy) from error

    @classmethod
    def load(cls, path: str | Path) -> Sheet:
        """Read a sheet. Paths in it count from its own folder."""
        path = Path(path)
        fields = read_toml(path, "the brand sheet", BrandError, remedy="see brands/brand.toml")
        for logo in fields.get("logo", []) if isinstance(fields.get("logo"), list) else []:
            if isinstance(logo, dict) and isinstance(logo.get("picture"), str):
                logo["picture"] = path.parent / logo["picture"]
        return cls.of(fields)

    @classmethod
    def file_schema(cls) -> dict[str, Any]:
        """JSON Schema of a sheet's file: what an editor needs to complete and check it."""
        said = {"title": "qrlora brand sheet", "description": "What a brand asks of pictures; see docs/evaluate.md."}
        schema = cls.model_json_schema()
        schema["properties"]["scores"]["propertyNames"] = {"enum": list(MEASURES)}
        return {"$schema": "http://json-schema.org/draft-07/schema#", **schema, **said}

    def judge(self, picture: Exhibit, measured: Mapping[str, float | None]) -> Verdict:
        """Everything this sheet asks of a picture. measured: by name the measures that `scores` has limits for."""
        checks = [] if self.palette is None else [_in_palette(picture, self.palette)]
        checks += [_amount(picture, wanted) for wanted in (*self.colour, *self.forbidden)]
        checks += [_logo(picture, logo) for logo in self.logo]
        checks += [_score(name, limit, measured.get(name)) for name, limit in self.scores.items()]
        return Verdict(tuple(checks))

    def together(self, verdicts: Sequence[Verdict]) -> tuple[Share, bool]:
        """The share of pictures that pass, and whether that is enough."""
        share = Share.of(verdict.passes for verdict in verdicts)
        return share, share.value >= self.composition.passing


def percent(share: float) -> str:
    """A share in words: 12 %."""
    return f"{100 * share:.3g} %"


def _in_palette(picture: Exhibit, palette: Palette) -> Check:
    share = _share(picture, palette.colours, palette.tolerance, palette.where)
    if share is None:
        return _without_mask("palette")
    found = f"{percent(share)} of the {palette.where} is within ΔE {palette.tolerance:g} of the palette"
    return Check(
        "palette", share, share >= palette.at_least, f"{found}; at least {percent(palette.at_least)} should be"
    )


def _amount(picture: Exhibit, wanted: Amount) -> Check:
    share = _share(picture, (wanted.colour,), wanted.tolerance, wanted.where)
    what = f"colour {wanted.colour}"
    if share is None:
        return _without_mask(what)
    found = f"{percent(share)} of the {wanted.where} is {wanted.called}"
    limit = f"at least {percent(wanted.at_least)} should be"
    if share > wanted.at_most:
        limit = f"at most {percent(wanted.at_most)}" + (" should be" if type(wanted) is Amount else "")
    forbidden = ", which is forbidden: " if isinstance(wanted, Forbidden) and share > wanted.at_most else "; "
    return Check(what, share, wanted.at_least <= share <= wanted.at_most, found + forbidden + limit)


def _share(picture: Exhibit, colours: Sequence[str], tolerance: float, where: Where) -> float | None:
    """How much is within the tolerance of one of the colours; None of a subject that is not known."""
    shares = picture.colours.picture if where == "picture" else picture.colours.subject
    return None if shares is None else float(shares[picture.colours.away(colours).min(axis=1) <= tolerance].sum())


def _without_mask(what: str) -> Check:
    return Check(
        what, None, False, f"{what}: the picture has no mask, so its subject cannot be told from what is around it"
    )


def _logo(picture: Exhibit, logo: Logo) -> Check:
    called = logo.name or logo.picture.name
    found = logo_match(picture.pixels, _crop(logo.picture), logo.width)
    words = f"{called} is matched at {found:.2f} at best; at least {logo.at_least:g} is asked for"
    return Check(f"logo {called}", found, found >= logo.at_least, words)


@lru_cache(maxsize=16)
def _crop(path: Path) -> UInt8[np.ndarray, "h w 3"]:
    return np.asarray(open_picture(path).image)


def logo_match(
    pixels: UInt8[np.ndarray, "h w 3"], logo: UInt8[np.ndarray, "h2 w2 3"], width: tuple[float, float]
) -> float:
    """Largest correlation of a crop with any place of a picture, at any of LOGO_SIZES widths; -1 if it fits nowhere."""
    height, across = pixels.shape[:2]
    best = -1.0
    for wide in np.geomspace(width[0] * across, width[1] * across, LOGO_SIZES):
        size = round(wide), round(wide * logo.shape[0] / logo.shape[1])
        if min(size) < LEAST_LOGO or size[0] > across or size[1] > height:
            continue
        kind = cv2.INTER_AREA if size[0] < logo.shape[1] else cv2.INTER_CUBIC
        found = cv2.matchTemplate(pixels, cv2.resize(logo, size, interpolation=kind), cv2.TM_CCOEFF_NORMED)
        # Where the picture is of one colour there is nothing to correlate with: rounding makes that anything.
        best = max(best, float(np.where(np.abs(found) <= 1.001, found, -1.0).max()))
    return best


def _score(name: str, limit: float, value: float | None) -> Check:
    measure = MEASURES[name]
    if value is None:
        return Check(name, None, False, f"{name} could not be measured: the picture has no mask or prompt for it")
    bound, holds = ("at least", value >= limit) if measure.better == "higher" else ("at most", value <= limit)
    unit = f" {measure.unit}" if measure.unit else ""
    return Check(name, value, holds, f"{name} is {value:.3g}{unit}; {bound} {limit:g} is asked for")


def _explain(item: Any) -> str:
    """One wrong field in words, with the nearest known name."""
    place = [str(part + 1) if isinstance(part, int) else str(part) for part in item["loc"]]
    name = ".".join(place)
    if item["type"] == "extra_forbidden":
        model = SECTIONS.get(place[0], Sheet) if len(place) > 1 else Sheet
        near = difflib.get_close_matches(place[-1], model.model_fields, n=1, cutoff=0.5)
        return f"unknown field {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
    if item["type"] == "missing":
        field = SECTIONS[place[0]].model_fields.get(place[-1])  # None of one in a list
        return f"{name!r} is required" + (f": {field.description}" if field else "")
    said = item["msg"].removeprefix("Value error, ")
    return f"{name} = {item['input']!r}: {said}" if name and name != "scores" else said
