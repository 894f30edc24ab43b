"""Pictures and captions: what is accepted, what is refused, and that encoding happens once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from qrlora.errors import DataError
from qrlora.models.families import load_pipeline
from qrlora.models.training.dataset import encode, load_examples
from qrlora.models.training.overview import overview
from qrlora.models.training.pictures import bucket_sizes, read_picture
from qrlora.models.training.sources import Source, find_pictures
from samples import NETWORK, assert_rounded


def save(
    path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB", colour: object = "red", **options: object
) -> Path:
    path.parent.mkdir(exist_ok=True)
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
    assert find_pictures([tmp_path]) == [Source(tmp_path / "a.png", "one [trigger]")]
    save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"no line for \['b.png'\]"):
        find_pictures([tmp_path])
    metadata.write_text('{"file_name": "a.png"}\n')
    with pytest.raises(DataError, match="line 1"):
        find_pictures([tmp_path])


def test_metadata_csv(tmp_path: Path) -> None:
    """As the imagefolder of datasets has it, with a comma and a line's end in a caption."""
    picture, mask = save(tmp_path / "a.png"), save(tmp_path / "m.png", mode="L", colour=255)
    metadata = tmp_path / "metadata.csv"
    metadata.write_text('\ufefffile_name,text,mask\r\na.png,"one [trigger], ""red""\nand round",m.png\r\n', newline="")
    assert find_pictures([tmp_path]) == [Source(picture, 'one [trigger], "red"\nand round', mask)]
    for text, said in (
        ("file_name,caption\na.png,x\n", "line 2"),
        ("file_name,text\na.png\n", "line 2"),
        ("file_name,text\na.png,x,y,z\n", "line 2"),
        ('file_name,text\na.png,"x\n', "line 2"),
        ("file_name,text\na.png,x\na.png,y\n", "two captions for a.png"),
        ("file_name,text\nb.png,x\n", "does not match"),
        ("", "does not match"),
    ):
        metadata.write_text(text)
        with pytest.raises(DataError, match=said):
            find_pictures([tmp_path])


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.Caption"])
def test_a_caption_file_is_read_as_other_trainers_call_it(tmp_path: Path, name: str) -> None:
    picture = save(tmp_path / "a.png")
    (tmp_path / name).write_text("a [trigger]\n")
    assert find_pictures([tmp_path]) == find_pictures([picture]) == [Source(picture, "a [trigger]")]


def test_two_captions_for_one_picture_are_refused_unless_they_are_the_same(tmp_path: Path) -> None:
    picture = save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a [trigger]")
    (tmp_path / "a.caption").write_text("a [trigger]\n")
    assert find_pictures([tmp_path]) == [Source(picture, "a [trigger]")]
    (tmp_path / "a.caption").write_text("another [trigger]")
    for images in (tmp_path, picture):
        with pytest.raises(DataError, match=r"(?s)two captions for .*a\.png.*a\.caption, a\.txt"):
            find_pictures([images])
    row = json.dumps({"file_name": "a.png", "text": "x"})
    (tmp_path / "metadata.jsonl").write_text(f"{row}\n{row}\n")
    with pytest.raises(DataError, match=r"two captions for a\.png"):
        find_pictures([tmp_path])
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\n")
    with pytest.raises(DataError, match="two captions for each picture"):
        find_pictures([tmp_path])


def test_what_was_not_used_is_said(tmp_path: Path) -> None:
    for name in ("a.png", "d.png", "e.png"):
        save(tmp_path / name)
    assert overview([tmp_path]) == "3 pictures, 3 captioned by the recipe"
    (tmp_path / "a.txt").write_text("a [trigger]")
    for name in ("b.heic", "c.jfif", ".hidden", "._a.png.txt"):
        (tmp_path / name).touch()
    assert overview([tmp_path]) == "3 pictures, 1 captioned by file, 2 by the recipe; not read: b.heic, c.jfif"
    save(tmp_path / "a.mask.png", mode="L", colour=255)
    save(tmp_path / "more" / "x.png")
    (tmp_path / "f.txt").write_text("of no picture")
    assert overview([tmp_path, tmp_path]).endswith("2 with a mask; not read: b.heic, c.jfif, f.txt, more/")
    assert overview([tmp_path / "a.png"]) == "1 picture, 1 captioned by file, 1 with a mask"
    rows = [{"file_name": f"{name}.png", "text": "x", "mask": "more/x.png"} for name in "ade"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.mask.png").unlink()
    said = "3 pictures, 3 captioned by file, 3 with a mask; not read: a.txt, b.heic, c.jfif, f.txt"
    assert overview([tmp_path]) == said
    for number in range(4):
        (tmp_path / f"n{number}.heic").touch()
    assert overview([tmp_path]) == said + ", n0.heic and 3 more"


def test_what_was_not_used_in_folders_of_folders_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "10_mug" / "a.png", tmp_path / "2_cups" / "b.png"):
        save(path)
    (tmp_path / "10_mug" / "b.heic").touch()
    (tmp_path / "notes.md").touch()
    assert overview([tmp_path]) == "2 pictures, 2 captioned by the recipe; not read: 10_mug/b.heic, notes.md"


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_captions_that_are_no_text_are_refused_and_a_byte_order_mark_is_none(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a.png")
    text = json.dumps({"file_name": "a.png", "text": "[trigger] ä"}) if name == "metadata.jsonl" else "[trigger] ä"
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert find_pictures([tmp_path]) == [Source(tmp_path / "a.png", "[trigger] ä")]
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


def test_bad_masks_are_named_with_the_bad_pictures(tmp_path: Path) -> None:
    for name in ("good", "small", "black", "torn", "bad", "half"):
        save(tmp_path / f"{name}.png", (60, 20))
    save(tmp_path / "good.mask.png", (60, 20), "L", 255)
    save(tmp_path / "small.mask.png", (30, 10), "L", 255)
    save(tmp_path / "black.mask.png", (60, 20), "L", 9)
    (tmp_path / "torn.mask.png").write_text("not a picture")
    (tmp_path / "bad.png").write_text("not a picture")
    edge = Image.new("L", (60, 20))
    edge.paste(255, (0, 0, 10, 20))  # outside the central square, inside the bucket
    edge.save(tmp_path / "half.mask.png")
    with pytest.raises(DataError, match="5 pictures cannot be used") as error:
        load_examples([tmp_path], "a <c>", "<c>", 16)
    for said in ("another size", "60 x 20, as small", "black.mask.png", "torn.mask.png", "bad.png", "half.mask.png"):
        assert said in str(error.value)
    with pytest.raises(DataError, match="4 pictures cannot be used") as error:
        load_examples([tmp_path], "a <c>", "<c>", 16, sizes=bucket_sizes(16, 4))
    assert "half.mask.png" not in str(error.value)


def test_masks_lie_beside_their_pictures_and_are_none(tmp_path: Path) -> None:
    mug, mask = save(tmp_path / "mug.jpg"), save(tmp_path / "mug.mask.png", mode="L", colour=255)
    cup = save(tmp_path / "cup.png")
    expected = [Source(cup), Source(mug, mask=mask)]
    assert find_pictures([tmp_path]) == expected
    assert find_pictures([cup, mug, mask]) == expected  # as a shell writes out *
    with pytest.raises(DataError, match=r"(?s)without its picture.*mug\.mask\.png"):
        find_pictures([cup, mask])
    other = save(tmp_path / "mug.mask.bmp", mode="L", colour=255)
    with pytest.raises(DataError, match=r"(?s)more than one mask.*mug\.mask\.bmp, mug\.mask\.png"):
        find_pictures([tmp_path])
    mug.unlink()
    with pytest.raises(DataError, match="without its picture"):
        find_pictures([tmp_path])
    assert find_pictures([cup]) == [Source(cup)]
    other.unlink()


def test_metadata_names_masks(tmp_path: Path) -> None:
    mug, mask = save(tmp_path / "mug.png"), save(tmp_path / "shape.png", mode="L", colour=255)
    row = {"file_name": "mug.png", "text": "a [trigger]", "mask": "shape.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert find_pictures([tmp_path]) == [Source(mug, "a [trigger]", mask)]
    mask.unlink()
    with pytest.raises(DataError, match=r"no such picture: .*shape\.png"):
        load_examples([tmp_path], "a <c>", "<c>", 16)


def test_transparency_is_a_mask_when_asked(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (40, 40), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 20, 40))
    picture.save(tmp_path / "a.png")
    [whole] = load_examples([tmp_path], "a <c>", "<c>", 16)
    [masked] = load_examples([tmp_path], "a <c>", "<c>", 16, alpha_mask=True)
    assert whole.mask is None and masked.mask is not None and masked.mask.shape == (1, 16, 16)
    assert masked.mask[0, :, :8].max() == 0 and masked.mask[0, :, 8:].min() == 1
    assert masked.digest == whole.digest
    save(tmp_path / "b.jpg")
    with pytest.raises(DataError, match=r"no transparency to take for a mask in .*b\.jpg"):
        load_examples([tmp_path], "a <c>", "<c>", 16, alpha_mask=True)
    save(tmp_path / "b.mask.png", mode="L", colour=255)
    assert len(load_examples([tmp_path], "a <c>", "<c>", 16, alpha_mask=True)) == 2


def test_repeats_by_folder_and_by_recipe(tmp_path: Path) -> None:
    for folder in ("10_mug", "2_cups", "alone"):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder / "a.png")
    with pytest.raises(DataError, match=r"(?s)with and without a number of repeats.*alone"):
        find_pictures([tmp_path])
    (tmp_path / "alone").rename(tmp_path / ".hidden")
    assert [(s.picture.parent.name, s.repeats) for s in find_pictures([tmp_path])] == [("10_mug", 10), ("2_cups", 2)]
    assert [s.repeats for s in find_pictures([tmp_path, tmp_path / "10_mug"], [3, 4])] == [30, 6, 4]
    (tmp_path / "10_mug" / "a.png").unlink()
    with pytest.raises(DataError, match=r"no pictures in .*10_mug"):
        find_pictures([tmp_path])


def test_buckets_hold_the_area_and_the_family_s_multiple() -> None:
    sizes = bucket_sizes(1024, 16)
    published = {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640), (640, 1536), (2048, 512)}  # SDXL's
    assert published <= set(sizes)
    for resolution, unit in ((1024, 16), (512, 16), (768, 32), (128, 16)):
        sizes = bucket_sizes(resolution, unit)
        assert {(height, width) for width, height in sizes} == set(sizes)
        assert all(side % unit == 0 and side <= 2 * resolution for size in sizes for side in size)
        assert all(0.8 <= width * height / resolution**2 <= 1 for width, height in sizes)
    assert bucket_sizes(128, 16, largest=128) == [(128, 128)]


def test_pictures_keep_their_shape_in_buckets(tmp_path: Path) -> None:
    """Of a ramp from left to right nearly all is left, where a square would have kept the middle half."""
    Image.linear_gradient("L").rotate(90).resize((400, 200)).save(tmp_path / "wide.png")
    save(tmp_path / "tall.png", (100, 150))
    save(tmp_path / "square.png", (90, 90))
    save(tmp_path / "very_wide.png", (900, 90))
    examples = load_examples([tmp_path], "a <c>", "<c>", 64, sizes=bucket_sizes(64, 4))
    assert {e.name: e.picture.size for e in examples} == {
        "square.png": (64, 64),
        "tall.png": (52, 76),
        "very_wide.png": (128, 32),
        "wide.png": (88, 44),
    }
    [wide] = [e for e in examples if e.name == "wide.png"]
    assert wide.pixels.shape == (3, 44, 88) and wide.pixels.max() - wide.pixels.min() > 1.9
    [square] = load_examples([tmp_path / "wide.png"], "a <c>", "<c>", 64)
    assert square.pixels.max() - square.pixels.min() < 1.1


def test_a_picture_too_small_for_its_bucket_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png", (40, 10))
    with pytest.raises(DataError, match=r"(?s)too small.*32 x 8 pixels, for training at 128 x 32"):
        load_examples([save(tmp_path / "b.png", (30, 7))], "a <c>", "<c>", 64, sizes=bucket_sizes(64, 4))
    assert load_examples([tmp_path / "a.png"], "a <c>", "<c>", 64, sizes=bucket_sizes(64, 4))


def test_caption_without_trigger_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a mug")
    with pytest.raises(DataError, match="lacks the trigger"):
        load_examples([tmp_path], "a <c>", "<c>", 16)


def test_encoding_is_cached_by_content(tmp_path: Path, tiny_sd3: Path, private_cache: Path, monkeypatch) -> None:
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    examples = load_examples([save(tmp_path / "a.png")], "a <c>", "<c>", 16)
    first = encode(examples, pipe, family)
    assert first.latents[0].shape == (4, 8, 8) and len(first) == 1
    assert len(list(private_cache.rglob("encoded/*.safetensors"))) == 2

    monkeypatch.setattr(pipe.vae, "encode", None)  # would fail if called
    monkeypatch.setattr(pipe, "encode_prompt", None)
    again = encode(load_examples([save(tmp_path / "renamed.png")], "a <c>", "<c>", 16), pipe, family)
    assert torch.equal(first.latents[0], again.latents[0]) and first.digest == again.digest
    assert all(torch.equal(first.conditions[key], again.conditions[key]) for key in first.conditions)
    monkeypatch.undo()

    for path in private_cache.rglob("encoded/*.safetensors"):
        path.write_bytes(b"damaged")
    assert_rounded(encode(examples, pipe, family).latents[0], first.latents[0], terms=NETWORK)

    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.mul_(2)
    assert not torch.equal(encode(examples, pipe, family).latents[0], first.latents[0])


def ramp(path: Path) -> Path:
    """Dark on the left, light on the right."""
    Image.linear_gradient("L").rotate(90).convert("RGB").save(path)
    return path


def test_mirror_images_are_examples_of_their_own(tmp_path: Path, tiny_sd3: Path, private_cache: Path) -> None:
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 64, 256))
    mask.save(tmp_path / "a.mask.png")
    plain, mirrored = load_examples([ramp(tmp_path / "a.png")], "a <c>", "<c>", 16, flip=True)
    assert torch.equal(mirrored.pixels, plain.pixels.flip(2)) and plain.digest != mirrored.digest
    data = encode([plain, mirrored], pipe, family)
    assert len(data) == 2 and len(list(private_cache.rglob("encoded/*.safetensors"))) == 3  # two pictures, one text
    assert torch.equal(data.latents[1], family.encode_images(pipe, plain.pixels.flip(2)[None])[0])
    assert torch.equal(data.masks[1], data.masks[0].flip(2))


def test_moved_copies_are_examples_of_their_own(tmp_path: Path) -> None:
    """Each is the picture moved, with its mask, the edge repeated; mirror images are moved, too."""
    mask = Image.new("L", (256, 256))
    mask.paste(255, (0, 0, 128, 256))
    mask.save(tmp_path / "a.mask.png")
    plain, right, left, down, up = load_examples([ramp(tmp_path / "a.png")], "a <c>", "<c>", 16, shift=4)
    for moved, size in ((right, 4), (left, -4)):
        columns = (torch.arange(16) - size).clamp(0, 15)
        assert torch.equal(moved.pixels, plain.pixels[:, :, columns])
        assert torch.equal(moved.mask, plain.mask[:, :, columns])
    assert torch.equal(down.pixels[:, 4:], plain.pixels[:, :-4]) and torch.equal(down.pixels[:, 0], plain.pixels[:, 0])
    assert torch.equal(up.pixels[:, :-4], plain.pixels[:, 4:]) and torch.equal(up.pixels[:, -1], plain.pixels[:, -1])
    both = load_examples([tmp_path / "a.png"], "a <c>", "<c>", 16, shift=4, flip=True)
    assert [example.view.mirrored for example in both] == [False] * 5 + [True] * 5
    assert torch.equal(both[6].pixels[:, :, 4:], plain.pixels.flip(2)[:, :, :-4])


def test_masks_become_weights_on_the_grid_of_the_latents(tmp_path: Path, tiny_sd3: Path) -> None:
    """White counts 1, black the recipe's weight, and a place that is half white what is between them."""
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    mask = Image.new("L", (32, 16))
    mask.paste(255, (0, 0, 6, 8))  # of 4-pixel places: one and a half in width, two in height
    mask.save(tmp_path / "a.mask.png")
    save(tmp_path / "a.png", (32, 16))
    save(tmp_path / "b.png", (32, 16))
    examples = load_examples([tmp_path], "a <c>", "<c>", 16, sizes=[(16, 8)])
    data = encode(examples, pipe, family, mask_min_value=0.2)
    assert [tuple(x.shape) for x in data.latents] == [(4, 4, 8)] * 2 and data.masks[1] is None
    expected = torch.full((1, 4, 8), 0.2)
    expected[0, :2, 0], expected[0, :2, 1] = 1.0, 0.6
    torch.testing.assert_close(data.masks[0], expected)
    batch = data.mask(torch.tensor([1, 0]))
    assert batch is not None and torch.equal(batch[0], torch.ones(1, 4, 8)) and torch.equal(batch[1], data.masks[0])
    assert data.mask(torch.tensor([1, 1])) is None
    assert encode(examples, pipe, family, mask_min_value=1.0).masks == (None, None)
    with pytest.raises(DataError, match="no picture has a mask"):
        encode(examples[1:], pipe, family, mask_min_value=0.2)


def test_digest_tells_masks_and_repeats_apart_and_knows_old_data(tmp_path: Path, tiny_sd3: Path) -> None:
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    path = save(tmp_path / "a.png")
    [plain] = load_examples([path], "a <c>", "<c>", 16)
    [often] = load_examples([path], "a <c>", "<c>", 16, repeats=[3])
    save(tmp_path / "a.mask.png", mode="L", colour=255)
    [masked] = load_examples([path], "a <c>", "<c>", 16)
    digests = [encode([example], pipe, family).digest for example in (plain, often, masked)]
    assert len(set(digests)) == 3
    assert digests[0] == hashlib.sha256(json.dumps([[plain.digest, "a <c>"]]).encode()).hexdigest()
    assert encode([often], pipe, family).epoch.tolist() == [0, 0, 0]


def test_a_picture_that_changes_under_way_is_refused(tmp_path: Path, tiny_sd3: Path) -> None:
    """Pixels are not kept between check and encoding, so what is encoded has to be what was checked."""
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    examples = load_examples([save(tmp_path / "a.png")], "a <c>", "<c>", 16)
    save(tmp_path / "a.png", colour="blue")
    with pytest.raises(DataError, match="changed while it was read"):
        encode(examples, pipe, family)


def test_every_picture_is_reported(tmp_path: Path, tiny_sd3: Path) -> None:
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    said: list[tuple[str, int, int]] = []
    paths = [save(tmp_path / "a.png"), ramp(tmp_path / "b.png")]
    examples = load_examples(paths, "a <c>", "<c>", 16, report=lambda *told: said.append(told))
    encode(examples, pipe, family, report=lambda *told: said.append(told))
    assert said == [(what, n, 2) for what in ("pictures read", "pictures encoded") for n in (1, 2)]
