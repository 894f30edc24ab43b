"""Brand sheets: what they refuse, and what they say of pictures that are made to keep or to break them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from qrlora._reading import tomllib
from qrlora.errors import BrandError
from qrlora.pico import world
from qrlora.quality.brand import BrandSheet, logo_match
from qrlora.quality.images.read import MeasuredPicture

ROOT = Path(__file__).parents[2]
RED, BLUE, WHITE = (215, 38, 61), (0, 0, 255), (255, 255, 255)


def striped(**shares: tuple[tuple[int, int, int], int]) -> MeasuredPicture:
    """A picture of 100 columns: so many of each colour; the first half is the subject."""
    columns = np.concatenate([np.tile(np.array(colour, np.uint8), (count, 1)) for colour, count in shares.values()])
    mask = np.zeros((20, 100), np.float32)
    mask[:, :50] = 1
    return MeasuredPicture("striped.png", np.tile(columns[None], (20, 1, 1)), mask)


HALF = striped(a=(RED, 50), b=(WHITE, 38), c=(BLUE, 12))


def reasons(
    picture: MeasuredPicture = HALF, measured: dict[str, float | None] | None = None, **fields: Any
) -> list[str]:
    return list(BrandSheet.parse(fields).check(picture, measured or {}).reasons)


# verdicts


def test_a_forbidden_colour_is_named_with_how_much_of_it_there_is() -> None:
    forbidden = {"colour": "#0000ff", "name": "a rival's blue", "tolerance": 5}
    assert reasons(forbidden=[forbidden]) == [
        "12 % of the picture is a rival's blue (#0000ff within ΔE 5), which is forbidden: at most 1 %"
    ]
    assert not reasons(forbidden=[forbidden | {"at_most": 0.12}])
    assert not reasons(forbidden=[forbidden | {"where": "subject"}])


def test_a_tolerance_reaches_as_far_as_it_says() -> None:
    """#d7263d and #c02236 are 5.0 apart."""
    from skimage.color import deltaE_ciede2000, rgb2lab

    away = float(deltaE_ciede2000(*(rgb2lab(np.array([[c]]) / 255.0)[0, 0] for c in (RED, (192, 34, 54)))))
    for tolerance, right in ((away - 0.01, False), (away + 0.01, True)):
        palette = {"colours": ["#c02236"], "tolerance": tolerance, "at_least": 0.5}
        assert (not reasons(palette=palette)) == right


def test_a_palette_has_to_cover_enough() -> None:
    palette = {"colours": ["#d7263d", "#fff"], "tolerance": 2, "at_least": 0.9}
    assert reasons(palette=palette) == ["88 % of the picture is within ΔE 2 of the palette; at least 90 % should be"]
    assert not reasons(palette=palette | {"where": "subject"})


def test_a_colour_may_be_too_much_and_too_little() -> None:
    red = {"colour": "#d7263d", "name": "house red", "tolerance": 3}
    code = "house red (#d7263d within ΔE 3)"
    assert reasons(colour=[red | {"at_least": 0.6}]) == [f"50 % of the picture is {code}; at least 60 % should be"]
    assert reasons(colour=[red | {"at_most": 0.4}]) == [f"50 % of the picture is {code}; at most 40 % should be"]
    assert not reasons(colour=[red | {"at_least": 0.5, "at_most": 0.5}])


def test_a_subject_that_is_not_known_is_not_passed() -> None:
    without = MeasuredPicture("a.png", HALF.pixels)
    found = reasons(without, palette={"colours": ["#d7263d"], "where": "subject"})
    assert len(found) == 1 and "no mask" in found[0]


def test_scores_are_limits_in_the_direction_of_their_measure() -> None:
    scores = {"copied": 0.9, "edges": 0.3}
    assert not reasons(measured={"copied": 0.9, "edges": 0.3}, scores=scores)
    assert reasons(measured={"copied": 0.95, "edges": 0.2}, scores=scores) == [
        "copied is 0.95; at most 0.9 is required",
        "edges is 0.2; at least 0.3 is required",
    ]
    assert "has no value" in reasons(measured={"clip_t": None}, scores={"clip_t": 0.2})[0]


def test_a_logo_is_found_at_other_sizes_and_missed_where_it_is_not(tmp_path: Path) -> None:
    drawing, _ = world.render(world.sample_scene(3, subject="watch", style="flat"))
    Image.fromarray(drawing).resize((48, 48)).save(tmp_path / "logo.png")
    scene = np.array(Image.fromarray(world.render(world.sample_scene(4, subject="car"))[0]).resize((256, 256)))
    without = MeasuredPicture("without.png", scene.copy())
    scene[150:220, 20:90] = np.asarray(Image.fromarray(drawing).resize((70, 70)))
    (tmp_path / "sheet.toml").write_text('[[logo]]\npicture = "logo.png"\nname = "the mark"\nwidth = [0.2, 0.4]\n')
    sheet = BrandSheet.load(tmp_path / "sheet.toml")
    assert sheet.check(MeasuredPicture("with.png", scene), {}).passes
    assert "the mark has a best correlation of" in sheet.check(without, {}).reasons[0]


def test_a_logo_that_fits_nowhere_or_meets_a_plain_picture_is_not_found() -> None:
    logo = np.random.default_rng(0).integers(0, 255, (40, 20, 3), np.uint8)
    assert logo_match(np.zeros((64, 64, 3), np.uint8), logo, (0.2, 0.5)) < 0.1
    assert logo_match(np.zeros((20, 200, 3), np.uint8), logo, (0.4, 0.5)) == -1


def test_pictures_pass_together_by_their_share() -> None:
    sheet = BrandSheet.parse({"forbidden": [{"colour": "#0000ff"}], "composition": {"passing": 0.5}})
    good = sheet.check(striped(a=(RED, 100)), {})
    bad = sheet.check(HALF, {})
    share, enough = sheet.passing([good, bad])
    assert (share.right, share.n, enough) == (1, 2, True)
    assert not sheet.passing([good, bad, bad])[1]
    assert json.loads(json.dumps(bad.to_dict()))["checks"][0]["value"] == pytest.approx(0.12)


# the file


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"pallete": {"colours": ["#fff"]}}, "unknown field 'pallete': did you mean 'palette'?"),
        ({"palette": {"colors": ["#fff"]}}, "unknown field 'palette.colors': did you mean 'colours'?"),
        ({"palette": {}}, "'palette.colours' is required: the brand's colours"),
        ({"palette": {"colours": ["red"]}}, "palette.colours.1 = 'red': expected a colour such as"),
        ({"palette": {"colours": []}}, "palette.colours"),
        ({"forbidden": [{"colour": "#fff", "at_most": 2}]}, "forbidden.1.at_most = 2"),
        ({"colour": [{"colour": "#fff", "at_least": 0.5, "at_most": 0.1}]}, "at_least 0.5 is more than at_most 0.1"),
        ({"scores": {"dinos": 0.5}}, "unknown metric 'dinos': did you mean 'dino'?"),
        ({"scores": {"dino": float("nan")}}, "scores.dino"),
        ({"logo": [{"picture": "missing.png"}]}, "no such picture"),
        ({"logo": [{"picture": "plain.png"}]}, "more than one colour"),
        ({"logo": [{"picture": "plain.png", "width": [0.5, 0.1]}]}, "the smaller first"),
        ({}, "has no rules"),
    ],
)
def test_a_wrong_sheet_is_refused_field_by_field(
    fields: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20), "red").save("plain.png")
    with pytest.raises(BrandError) as refused:
        BrandSheet.parse(fields)
    assert words in str(refused.value)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BrandError, match="cannot read"):
        BrandSheet.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("palette = [")
    with pytest.raises(BrandError, match="is not TOML"):
        BrandSheet.load(tmp_path / "bad.toml")


def test_the_sheet_that_ships_keeps_to_its_schema() -> None:
    sheet = BrandSheet.load(ROOT / "brands/brand.toml")
    assert sheet.palette and sheet.forbidden and sheet.scores
    schema = json.loads((ROOT / "brands/brand.schema.json").read_text())
    assert schema == json.loads(json.dumps(BrandSheet.file_schema()))
    jsonschema.validate(tomllib.loads((ROOT / "brands/brand.toml").read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"scores": {"dinos": 1}}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"palette": {"colors": []}}, schema)
