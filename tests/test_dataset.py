"""Pictures and captions: what is accepted, what is refused, and that encoding happens once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from qrlora.errors import DataError
from qrlora.families import load_pipeline
from qrlora.training.dataset import encode, find_pictures, load_examples, read_picture


def save(
    path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", colour: object = "red", **options: object
) -> Path:
    Image.new(mode, size, colour).save(path, **options)  # type: ignore[arg-type]
    return path


def colour(picture: Image.Image) -> tuple[int, ...]:
    return tuple(np.array(picture)[8, 8].tolist())


def test_square_of_the_resolution(tmp_path: Path) -> None:
    picture = read_picture(save(tmp_path / "a.png"), 16)
    assert picture.size == (16, 16) and picture.mode == "RGB"


def test_exif_turns_the_picture_upright(tmp_path: Path) -> None:
    halves = Image.new("RGB", (40, 40), "red")
    halves.paste("blue", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    halves.save(tmp_path / "a.png", exif=exif)
    upright = np.array(read_picture(tmp_path / "a.png", 16))
    assert upright[2, 8].tolist() == [255, 0, 0] and upright[13, 8].tolist() == [0, 0, 255]


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    assert colour(read_picture(save(tmp_path / "a.png", mode="RGBA", colour=(0, 0, 0, 0)), 16)) == (255, 255, 255)
    assert colour(read_picture(save(tmp_path / "b.png", mode="LA", colour=(0, 0)), 16)) == (255, 255, 255)


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    red, green, blue = colour(read_picture(save(tmp_path / "a.jpg", mode="CMYK", colour=(0, 255, 255, 0)), 16))
    assert red > 230 and green < 30 and blue < 30


def test_embedded_profile_is_applied(tmp_path: Path) -> None:
    """A Lab-built RGB profile cannot be had offline, so: sRGB is left alone, and damage is refused."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = save(tmp_path / "a.png", colour=(10, 200, 90), icc_profile=srgb)
    assert np.allclose(colour(read_picture(path, 16)), (10, 200, 90), atol=1)
    with pytest.raises(DataError, match="colour profile"):
        read_picture(save(tmp_path / "b.png", icc_profile=b"no profile at all"), 16)


def test_grey_and_palette(tmp_path: Path) -> None:
    assert colour(read_picture(save(tmp_path / "a.png", mode="L", colour=77), 16)) == (77, 77, 77)
    assert read_picture(save(tmp_path / "b.gif", mode="P", colour=0), 16).mode == "RGB"


def bad_pictures(folder: Path) -> dict[str, Path]:
    truncated = save(folder / "truncated.jpg", (300, 300))
    truncated.write_bytes(truncated.read_bytes()[:400])
    (folder / "text.png").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    frames = [Image.new("RGB", (40, 40), shade) for shade in ("red", "blue")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    return {
        "unreadable picture": folder / "text.png",
        "unreadable pictur": folder / "empty.png",
        "unreadable": truncated,
        "animated": folder / "animated.gif",
        "too small": save(folder / "dot.png", (1, 1)),
        "no such picture": folder / "missing.png",
        "unknown range": save(folder / "deep.tif", mode="F", colour=0.5),
    }


def test_bad_pictures_are_refused_with_a_remedy(tmp_path: Path) -> None:
    for said, path in bad_pictures(tmp_path).items():
        with pytest.raises(DataError, match=said) as error:
            read_picture(path, 16)
        assert str(path) in str(error.value) and error.value.remedy


def test_folder_with_captions(tmp_path: Path) -> None:
    save(tmp_path / "b.png")
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a [trigger] from the side\n")
    examples = load_examples([tmp_path], "a photo of <c>", "<c>", 16)
    assert [(e.name, e.caption) for e in examples] == [("a.png", "a <c> from the side"), ("b.png", "a photo of <c>")]


def test_metadata_jsonl(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    metadata = tmp_path / "metadata.jsonl"
    metadata.write_text(json.dumps({"file_name": "a.png", "text": "one [trigger]"}) + "\n\n")
    assert find_pictures([tmp_path]) == [(tmp_path / "a.png", "one [trigger]")]
    save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"no line for \['b.png'\]"):
        find_pictures([tmp_path])
    metadata.write_text('{"file_name": "a.png"}\n')
    with pytest.raises(DataError, match="line 1"):
        find_pictures([tmp_path])


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_captions_that_are_no_text_are_refused_and_a_byte_order_mark_is_none(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png")
    text = json.dumps({"file_name": "a.png", "text": "[trigger] ä"}) if name == "metadata.jsonl" else "[trigger] ä"
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert find_pictures([tmp_path]) == [(tmp_path / "a.png", "[trigger] ä")]
    (tmp_path / name).write_text(text.replace("\\u00e4", "ä"), encoding="latin-1")
    with pytest.raises(DataError, match=f"(?s){name}.*UTF-8"):
        find_pictures([tmp_path])


def test_empty_folder_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pictures in"):
        find_pictures([tmp_path])
    with pytest.raises(DataError, match="no such picture or folder"):
        find_pictures([tmp_path / "nowhere"])


def test_all_bad_pictures_are_named_at_once(tmp_path: Path) -> None:
    save(tmp_path / "good.png")
    save(tmp_path / "dot.png", (1, 1))
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match="2 pictures cannot be used") as error:
        load_examples([tmp_path], "a <c>", "<c>", 16)
    assert "dot.png" in str(error.value) and "text.png" in str(error.value)


def test_caption_without_trigger_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a mug")
    with pytest.raises(DataError, match="lacks the trigger"):
        load_examples([tmp_path], "a <c>", "<c>", 16)


def test_encoding_is_cached_by_content(tmp_path: Path, tiny_sd3: Path, private_cache: Path, monkeypatch) -> None:
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    examples = load_examples([save(tmp_path / "a.png")], "a <c>", "<c>", 16)
    first = encode(examples, pipe, family)
    assert first.latents.shape == (1, 4, 8, 8) and len(first) == 1
    assert len(list(private_cache.rglob("encoded/*.safetensors"))) == 2

    monkeypatch.setattr(pipe.vae, "encode", None)  # would fail if called
    monkeypatch.setattr(pipe, "encode_prompt", None)
    again = encode(load_examples([save(tmp_path / "renamed.png")], "a <c>", "<c>", 16), pipe, family)
    assert torch.equal(first.latents, again.latents) and first.digest == again.digest
    assert all(torch.equal(first.conditions[key], again.conditions[key]) for key in first.conditions)
    monkeypatch.undo()

    for path in private_cache.rglob("encoded/*.safetensors"):
        path.write_bytes(b"damaged")
    assert torch.equal(encode(examples, pipe, family).latents, first.latents)

    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(2)
    assert not torch.equal(encode(examples, pipe, family).latents, first.latents)
