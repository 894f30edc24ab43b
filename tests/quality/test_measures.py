"""Measures of pictures: each is perfect on itself, and falls with the very thing that it is about."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from PIL.PngImagePlugin import PngInfo

from qrlora.errors import DataError
from qrlora.pico import world
from qrlora.quality.images.read import Colours, MeasuredPicture, hex_colour, load_picture, load_pictures
from qrlora.quality.metrics.copies import COPY_THRESHOLD, copy_score
from qrlora.quality.metrics.table import METRICS, NEEDS, References, compute_metrics, select_metrics

FREE = [name for name, row in METRICS.items() if not row.network]


def scene(seed: int = 1, **parts: str) -> MeasuredPicture:
    picture, mask = world.render(world.sample_scene(seed, **parts))
    return MeasuredPicture(f"{seed}.png", picture, mask, "a prompt")


def plain(colour: str, side: int = 32) -> MeasuredPicture:
    return MeasuredPicture(colour, np.asarray(Image.new("RGB", (side, side), colour)))


def value(name: str, picture: MeasuredPicture, **references: object) -> float:
    given = References(**{kind: [one] if isinstance(one, MeasuredPicture) else one for kind, one in references.items()})
    found = compute_metrics([picture], given, [METRICS[name]])[0][name]
    assert found is not None
    return found


# the table


def test_the_table_is_complete_and_its_values_keep_to_its_ranges() -> None:
    mug, other = scene(1, subject="mug", style="flat"), scene(2, subject="car", style="neon")
    given = References([mug], [mug], [mug], ["#d7263d"])
    for picture in (mug, other):
        for name, found in compute_metrics([picture], given, [METRICS[name] for name in FREE])[0].items():
            low, high = METRICS[name].bounds
            assert found is not None and low - 1e-9 <= found <= high + 1e-9, name
    for row in METRICS.values():
        assert set(row.needs) <= set(NEEDS) and row.description and row.source and row.better in ("higher", "lower")


@pytest.mark.parametrize("name", [name for name in FREE if not name.startswith("palette")])
def test_a_picture_agrees_with_itself_and_less_with_another(name: str) -> None:
    mug, other = scene(1, subject="mug", style="flat"), scene(2, subject="car", style="neon")
    kind = METRICS[name].needs[0]
    same, different = value(name, mug, **{kind: mug}), value(name, other, **{kind: mug})
    perfect = 1.0 if METRICS[name].better == "higher" or name == "copied" else 0.0
    assert same == pytest.approx(perfect, abs=1e-6)
    assert abs(different - perfect) > 0.05


def test_the_default_is_what_needs_no_weights_and_has_what_it_needs() -> None:
    mug = scene()
    assert [m.name for m in select_metrics(None, [mug], References(style=[mug]))] == ["colours", "texture", "grain"]
    with_all = {m.name for m in select_metrics(["all"], [mug], References(style=[mug]))}
    assert with_all == {"colours", "texture", "grain", "clip_style", "clip_t", "csd"}
    without_mask = dataclasses.replace(mug, mask=None)
    assert [m.name for m in select_metrics(None, [without_mask], References(palette=["#000000"]))] == ["palette"]


def test_what_cannot_be_measured_is_refused_with_what_is_missing() -> None:
    with pytest.raises(DataError, match="did you mean colours"):
        select_metrics(["colors"], [scene()], References())
    with pytest.raises(DataError, match=r"edges lacks an input(.|\n)*--subject"):
        select_metrics(["edges"], [scene()], References())
    with pytest.raises(DataError, match="--training"):
        select_metrics(None, [scene()], References())


def test_a_picture_without_a_mask_has_no_value_where_one_is_needed() -> None:
    with_mask, without = scene(1), dataclasses.replace(scene(2), mask=None)
    given = References(palette=["#d7263d"])
    rows = compute_metrics(
        [with_mask, without], given, select_metrics(["palette_subject"], [with_mask, without], given)
    )
    assert rows[0]["palette_subject"] is not None and rows[1]["palette_subject"] is None


# colours


def test_ciede2000_is_the_published_one() -> None:
    """Pairs 1 and 25 of Sharma, Wu and Dalal (2005), table 1, through the library that is used."""
    from skimage.color import deltaE_ciede2000

    first = np.array([[50.0, 2.6772, -79.7751], [60.2574, -34.0099, 36.2677]])
    second = np.array([[50.0, 0.0, -82.7485], [60.4626, -34.1751, 39.4387]])
    assert deltaE_ciede2000(first, second) == pytest.approx([2.0425, 1.2644], abs=1e-4)


def test_the_distance_of_pure_red_to_other_colours() -> None:
    """ΔE00 of sRGB colours, red to green 86.6 (a value that is widely quoted), black to white 100."""
    assert value("palette", plain("#ff0000"), palette=["#ff0000"]) == pytest.approx(0, abs=1e-9)
    assert value("palette", plain("#ff0000"), palette=["#00ff00"]) == pytest.approx(86.6, abs=0.1)
    assert value("palette", plain("#000000"), palette=["#ffffff"]) == pytest.approx(100.0, abs=0.01)
    assert value("palette", plain("#ff0000"), palette=["#00ff00", "#ff0000"]) == pytest.approx(0, abs=1e-9)


def test_the_palette_is_weighted_by_area_and_by_the_mask() -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :4] = (255, 255, 255)
    mask = np.zeros((16, 16), np.float32)
    mask[:, :8] = 1
    picture = MeasuredPicture("", pixels, mask)
    assert value("palette", picture, palette=["#000000"]) == pytest.approx(25, abs=0.01)
    assert value("palette_subject", picture, palette=["#000000"]) == pytest.approx(50, abs=0.01)


def test_colours_count_every_pixel_once() -> None:
    found = Colours.of(scene().pixels, None)
    assert found.picture_shares.sum() == pytest.approx(1) and len(np.unique(found.rgb, axis=0)) == len(found.rgb)


def test_colours_of_a_style_do_not_care_where_they_are() -> None:
    mug = scene(1, subject="mug", style="neon")
    shuffled = np.random.default_rng(0).permutation(mug.pixels.reshape(16, 8, 128, 3)).reshape(mug.pixels.shape)
    assert value("colours", MeasuredPicture("", shuffled), style=mug) < 1
    assert value("colours", MeasuredPicture("", 255 - mug.pixels), style=mug) > 10


@pytest.mark.parametrize("text", ["red", "#12345", "#gggggg", ""])
def test_what_is_no_colour_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as #d7263d"):
        hex_colour(text)


def test_colours_may_be_spelt_in_three_ways() -> None:
    assert {hex_colour(text) for text in ("#AABBCC", "aabbcc", "#abc")} == {"#aabbcc"}


# form and texture


def shifted(picture: MeasuredPicture, by: int) -> MeasuredPicture:
    return MeasuredPicture("", np.roll(picture.pixels, by, axis=1))


@pytest.mark.parametrize("name", ["edges", "structure"])
def test_agreement_in_place_falls_with_every_shift(name: str) -> None:
    mug = scene(1, subject="mug", style="flat")
    found = [value(name, shifted(mug, by), subject=mug) for by in (0, 3, 8, 24)]
    assert found[0] == pytest.approx(1) and all(a > b for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("name", ["edges", "structure"])
def test_a_reference_with_a_mask_is_compared_there_alone(name: str) -> None:
    mug = scene(1, subject="mug", style="flat")
    noise = np.random.default_rng(0).integers(0, 255, mug.pixels.shape, np.uint8)
    inside = cv2.dilate((mug.mask > 0).astype(np.uint8), np.ones((9, 9)))[..., None] > 0
    around = MeasuredPicture("", np.where(inside, mug.pixels, noise))
    alone = value(name, around, subject=mug)
    assert alone > 0.95 > 0.85 > value(name, around, subject=dataclasses.replace(mug, mask=None))


@pytest.mark.parametrize("name", ["texture", "grain"])
def test_texture_is_the_style_s_and_not_the_subject_s(name: str) -> None:
    """Another subject in the style is nearer than the same subject in another style."""
    style = scene(1, subject="car", style="halftone", colour="red")
    alike = scene(2, subject="mug", style="halftone", colour="red")
    other = scene(3, subject="car", style="watercolour", colour="red")
    assert value(name, alike, style=style) < 0.7 * value(name, other, style=style)


def test_pictures_of_other_sizes_and_shapes_are_compared() -> None:
    mug = scene(1, subject="mug", style="flat")
    large = MeasuredPicture("", np.asarray(mug.image.resize((256, 256), Image.Resampling.LANCZOS)))
    assert value("structure", large, subject=mug) > 0.9 and value("colours", large, style=mug) < 1
    wide = MeasuredPicture("", np.asarray(mug.image.resize((200, 100))))
    assert 0 <= value("edges", wide, subject=mug) <= 1 and 0 <= value("texture", wide, style=mug) <= 1


def test_pictures_without_edges_agree_on_none() -> None:
    assert value("edges", plain("red"), subject=plain("red")) == 0
    assert value("copied", plain("red"), training=plain("blue")) == 0


# copies


def jpeg(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=50)
    return Image.open(stream).convert("RGB")


def turned(picture: Image.Image, degrees: float = 3, scale: float = 1.06) -> Image.Image:
    warp = cv2.getRotationMatrix2D((64, 64), degrees, scale)
    warp[:, 2] += (4, -3)
    return Image.fromarray(cv2.warpAffine(np.asarray(picture), warp, (128, 128), borderMode=cv2.BORDER_REPLICATE))


WAYS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "itself": lambda picture: picture,
    "mirrored": ImageOps.mirror,
    "recompressed": jpeg,
    "turned": turned,
    "cut": lambda picture: picture.crop((6, 9, 124, 126)),
    "lighter and paler": lambda p: ImageEnhance.Color(ImageEnhance.Brightness(p).enhance(1.12)).enhance(0.7),
    "all of it": lambda picture: jpeg(turned(ImageOps.mirror(picture), -4, 0.97)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("subject", ["teapot", "guitar", "sneaker"])
def test_a_copy_of_the_training_picture_is_one(way: str, subject: str) -> None:
    learned = scene(1, subject=subject, style="flat")
    assert copy_score(np.asarray(WAYS[way](learned.image)), learned.pixels) >= COPY_THRESHOLD


@pytest.mark.parametrize("subject", ["teapot", "guitar", "sneaker"])
def test_another_scene_of_the_subject_is_no_copy(subject: str) -> None:
    learned = scene(1, subject=subject, style="flat")
    for seed, style in enumerate(("watercolour", "ink", "pixel", "neon")):
        assert copy_score(scene(10 + seed, subject=subject, style=style).pixels, learned.pixels) < COPY_THRESHOLD


def test_the_likest_training_picture_counts() -> None:
    pictures = [scene(seed, subject=subject) for seed, subject in enumerate(("mug", "car", "clock"))]
    assert value("copied", pictures[1], training=pictures) == pytest.approx(1)


# files


def save(folder: Path, name: str, picture: MeasuredPicture, **options: object) -> Path:
    picture.image.save(folder / name, **options)
    return folder / name


def test_a_folder_is_read_with_masks_and_words_beside_its_pictures(tmp_path: Path) -> None:
    mug = scene(1)
    save(tmp_path, "b.png", mug)
    save(tmp_path, "a.jpg", mug)
    Image.fromarray((255 * mug.mask).astype(np.uint8)).save(tmp_path / "b.mask.png")
    (tmp_path / "b.txt").write_text("a mug\n")
    first, second = load_pictures([tmp_path])
    assert (first.name, first.mask, first.prompt) == ("a.jpg", None, "")
    assert second.name == "b.png" and second.prompt == "a mug"
    assert second.mask == pytest.approx(mug.mask, abs=1 / 255)


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    cut = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    cut.paste((0, 0, 0, 0), (0, 0, 16, 32))
    cut.save(tmp_path / "cut.png")
    picture = load_picture(tmp_path / "cut.png")
    assert picture.mask is not None and picture.mask.mean() == 0.5
    assert value("palette_subject", picture, palette=["#ff0000"]) == pytest.approx(0, abs=1e-6)
    assert value("palette", picture, palette=["#ff0000"]) > 10


def test_the_prompt_of_a_generated_picture_is_read_from_it(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_itxt("qrlora", '{"prompt": ["a mug", "a <s> lamp"], "seed": [0]}')
    assert load_picture(save(tmp_path, "01-a-s-lamp-seed0.png", scene(), pnginfo=info)).prompt == "a <s> lamp"
    assert load_picture(save(tmp_path, "renamed.png", scene(), pnginfo=info)).prompt == ""


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a picture")
    for make, words in (
        (lambda: tmp_path / "missing.png", "no such picture"),
        (lambda: save(tmp_path, "tiny.png", plain("red", 8)), "too small"),
        (lambda: tmp_path / "notes.txt", "not a picture"),
    ):
        with pytest.raises(DataError, match=words):
            load_pictures([make()])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no pictures in"):
        load_pictures([tmp_path / "empty"])
