"""What comes from outside is read in one way: which pictures, files and numbers, and what is said of the rest."""

from __future__ import annotations

import ast
import json
import os
import pwd
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors.torch
from PIL import EpsImagePlugin, Image, ImageFile, features
from starlette.requests import Request

import qrlora
from qrlora._files import default_cache_dir
from qrlora._reading import parse_json, parsing, read_text, read_toml, tomllib
from qrlora.apps.cli import main
from qrlora.apps.cli.serve import _api_keys
from qrlora.apps.cli.shared import COUNT, NUMBER, SEED, SHARE, WHOLE, weighted_path, weights
from qrlora.apps.serving.engine import Shelf
from qrlora.apps.serving.names import composition_of
from qrlora.apps.serving.request import authorise
from qrlora.errors import AdapterFileError, BrandError, DataError, OutputError, QrloraError, RecipeError, RequestError
from qrlora.method.adapter import load_adapter, save_adapter
from qrlora.models.exchange.layer_names import LayerNames
from qrlora.models.families import FAMILIES
from qrlora.models.training.dataset import load_examples
from qrlora.models.training.pictures import LARGEST_FILE, LARGEST_PICTURE, open_picture
from qrlora.models.training.recipe import Recipe
from qrlora.models.training.sources import SUFFIXES, Source, find_pictures
from qrlora.quality.brand import BrandSheet
from qrlora.quality.images.read import load_picture, load_pictures
from samples import make_adapter, make_basis

CASES = Path(__file__).parents[1] / "cases/files"
CORPUS = Path(__file__).parents[1] / "corpus"
PICTURES = sorted((CORPUS / "picture").iterdir())
SOURCES = Path(qrlora.__file__).parent
NAMES = LayerNames(FAMILIES["StableDiffusion3Pipeline"])


def drawn(path: Path, size: tuple[int, int] = (24, 24), colour: Any = "red", mode: str = "RGB") -> Path:
    Image.new(mode, size, colour).save(path)
    return path


def picture_readers(folder: Path, path: Path) -> dict[str, Callable[[], object]]:
    """Every way into the package by which a picture comes."""
    whole = drawn(folder / "whole.png")
    mask = folder / f"whole.mask{path.suffix}"

    def as_mask() -> None:
        shutil.copyfile(path, mask)
        try:
            load_examples([whole], "a <c>", "<c>", 16)
        finally:
            mask.unlink()

    return {
        "train": lambda: load_examples([path], "a <c>", "<c>", 16),
        "mask": as_mask,
        "evaluate": lambda: load_picture(path),
        "brand": lambda: BrandSheet.parse({"logo": [{"picture": path}]}),
    }


# pictures


def test_one_module_opens_pictures() -> None:
    """Whoever opens one past `training.pictures` opens every format that Pillow has, and of any size; the speed of the
    server is measured on PNGs of its own."""
    found = set()
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            opener = name in ("Image.open", "PIL.Image.open") or name.endswith(".imread")
            imported = isinstance(node, ast.ImportFrom) and node.module in ("PIL.Image", "imageio", "matplotlib.image")
            if opener or imported:
                found.add(str(path.relative_to(SOURCES)))
    assert found == {"models/training/pictures.py", "lab/speed/serve.py"}


def test_a_program_called_png_is_refused_unopened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands PostScript to Ghostscript, whatever the file is called."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("executed"))
    monkeypatch.setattr(EpsImagePlugin, "EpsImageFile", lambda *_, **__: pytest.fail("opened"))
    Image.init()
    path = tmp_path / "subject.png"
    shutil.copyfile(CASES / "postscript.png", path)
    for name, reader in picture_readers(tmp_path, path).items():
        with pytest.raises(QrloraError, match="unreadable picture") as refused:
            reader()
        assert "PNG, JPEG" in str(refused.value), name


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_every_format_that_is_named_is_read(path: Path) -> None:
    picture = open_picture(path)
    assert picture.image.mode == "RGB" and path.suffix in SUFFIXES
    assert (picture.alpha is not None) == (path.stem in ("00-record-seed1", "palette", "lossless", "deflate"))
    assert bool(picture.record) == (path.stem == "00-record-seed1")


def test_the_formats_of_the_corpus_are_all_there_are() -> None:
    assert {path.suffix for path in PICTURES} == SUFFIXES - {".jpeg", ".tiff"}
    assert features.check("webp") and features.check("avif")


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.9])
def test_a_truncated_picture_is_refused(path: Path, kept: float, tmp_path: Path) -> None:
    cut = tmp_path / path.name
    cut.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    if path.name == "phone.jpg" and kept > 0.5:  # the small picture behind the photograph is not read
        assert open_picture(cut).image.tobytes() == open_picture(path).image.tobytes()
        return
    with pytest.raises(DataError, match=path.name):
        open_picture(cut)


def png_claiming(path: Path, side: int) -> Path:
    """A PNG of one bit a pixel that is small, and claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"
    rows = zlib.compress(bytes((side // 8 + 2) * side), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("side", [9_500, 13_300, 60_000])
def test_a_picture_of_too_many_pixels_is_refused_before_they_are(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below, above and far above what Pillow itself warns of and refuses. No pixel is decoded: no memory is taken."""
    path = png_claiming(tmp_path / "large.png", min(side, 14_000))
    if side > 14_000:
        data = path.read_bytes()
        header = side.to_bytes(4, "big") * 2 + data[24:29]
        path.write_bytes(data[:16] + header + zlib.crc32(b"IHDR" + header).to_bytes(4, "big") + data[33:])
    assert path.stat().st_size < 30_000
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded") if self.width == side else load(self)
    )
    for name, reader in picture_readers(tmp_path, path).items():
        started = time.process_time()
        with pytest.raises(QrloraError, match="too large") as refused:
            reader()
        assert time.process_time() - started < 1, name
        assert "scale it down" in str(refused.value) and "PNG" not in str(refused.value), name


def test_the_largest_picture_is_one_that_pillow_takes_in_silence() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert LARGEST_PICTURE <= Image.MAX_IMAGE_PIXELS


def test_a_file_of_too_many_bytes_is_not_opened(tmp_path: Path) -> None:
    path = drawn(tmp_path / "a.png")
    with path.open("ab") as stream:
        stream.truncate(LARGEST_FILE + 1)
    with pytest.raises(DataError, match=r"(?s)too large.*scale it down"):
        open_picture(path)


def test_what_a_decoder_raises_is_our_error_in_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "damaged.avif"
    shutil.copyfile(CASES / "damaged.avif", path)
    for name, reader in picture_readers(tmp_path, path).items():
        with pytest.raises(QrloraError, match="unreadable picture"):
            reader()
        assert name
    for command in (["train", "--subject", str(path), "--steps", "1"], ["evaluate", str(path), "--palette", "#fff"]):
        assert main([*command, "-o", str(tmp_path / "out.safetensors")]) == 2
        assert "damaged.avif" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record", ["{", "[]", '{"prompt": 1}', '{"prompt": [1]}', "[" * 5000, '{"prompt": ["\\ud800"]}']
)
def test_a_record_that_is_none_is_said_with_the_picture(record: str, tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("qrlora", record)
    Image.new("RGB", (24, 24)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(DataError, match=r"(?s)record in .*a\.png.*write the prompt into a\.txt"):
        load_picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("\ufeffa mug", encoding="utf-8")
    assert load_picture(tmp_path / "a.png").prompt == "a mug"


# files


def test_parsing_turns_a_parsers_exceptions_into_one_and_nothing_else() -> None:
    for error in (KeyError("a"), RuntimeError(), RecursionError(), AssertionError("b"), MemoryError(), OverflowError()):
        with (
            pytest.raises(DataError, match=r"file\.x cannot be used") as ours,
            parsing("file.x cannot be used", DataError),
        ):
            raise error
        assert type(error).__name__ in str(ours.value) and ours.value.__cause__ is error and ours.value.remedy
    for error in (RecipeError("mine"), KeyboardInterrupt(), SystemExit()):
        with pytest.raises(type(error)) as same, parsing("file.x", DataError):
            raise error
        assert same.value is error
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(DataError, match=r"file\.x"), parsing("file.x", DataError):
        raise panic("a Rust extension gave up")


def test_messages_are_bounded_and_can_be_printed() -> None:
    error = QrloraError("a" * 10**6, expected={str(i): i for i in range(10**5)}, got="\ud800\udcff")
    assert len(str(error)) < 10_000 and "more characters)" in str(error)
    assert str(error).encode().endswith(rb"\ud800\udcff")
    assert str(QrloraError("ä", got=["b" * 1000])) == f"ä\n  got:      {['b' * 1000]}"


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}', '"\\ud800"', "[" * 10**5, "9" * 5000]
)
def test_json_that_others_cannot_read_is_refused(text: str) -> None:
    for form in (text, text.encode()):
        with pytest.raises(DataError, match=r"x\.json is no JSON"):
            parse_json(form, "x.json", DataError)
    assert parse_json('{"a": "\\ud83d\\ude00"}', "x.json", DataError) == {"a": "😀"}


@pytest.mark.parametrize("text", ["a." * 20_000 + "a = 1", "x = " + "[" * 5000, "a = {" * 5000, "\x00", "a = '\ud800'"])
def test_toml_that_takes_too_much_is_refused_soon(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(text.encode("utf-8", "surrogatepass"))
    started = time.process_time()
    with pytest.raises(RecipeError, match=r"a\.toml"):
        Recipe.load(tmp_path / "a.toml")
    assert time.process_time() - started < 1


def test_many_unknown_fields_are_explained_soon_and_briefly(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("\n".join(f"a{i}.b.c = {i}" for i in range(20_000)))
    for load in (Recipe.load, BrandSheet.load):
        started = time.process_time()
        with pytest.raises(QrloraError) as refused:
            load(tmp_path / "a.toml")
        assert time.process_time() - started < 5 and len(str(refused.value)) < 10_000


def test_a_long_list_of_pictures_is_no_long_key(tmp_path: Path) -> None:
    names = [f"folder.a/b.c/{i}.png" for i in range(2000)]
    (tmp_path / "a.toml").write_text(f'role = "style"\nimages = {json.dumps(names)}\nlearning_rate = 1.5e-3\n')
    assert len(Recipe.load(tmp_path / "a.toml").images) == 2000


def test_text_that_never_ends_is_not_read_to_its_end() -> None:
    with pytest.raises(DataError, match="too large"):
        read_text(Path("/dev/zero"), "captions", DataError)


def test_a_list_where_a_word_belongs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(CASES / "role-list.toml")]) == 2
    assert "role = []" in capsys.readouterr().err


@pytest.mark.parametrize("value", [b"NaN", b"1e999", b'"\\ud800"'])
def test_an_adapter_whose_recipe_is_no_json_is_refused(
    value: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(make_adapter(make_basis(tmp_path / "basis"), recipe={"steps": 3}), path)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() | {"qrlora.recipe": f'{{"steps": {value.decode()}}}'}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match=r"a\.safetensors: qrlora\.recipe is no JSON"):
        load_adapter(path)
    assert main(["inspect", str(path)]) == 2
    assert "a.safetensors" in capsys.readouterr().err


def test_a_byte_order_mark_is_no_part_of_any_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn(tmp_path / "a.png")

    def write(name: str, text: str) -> Path:
        Path(name).write_text(text, encoding="utf-8-sig")
        return Path(name)

    assert Recipe.load(write("a.toml", 'role = "style"\nimages = "a.png"\n')).role == "style"
    assert BrandSheet.load(write("b.toml", '[[colour]]\ncolour = "#fff"\n')).colour
    assert _api_keys(write("keys", "sécond\nfirst\n")) == ("sécond", "first")
    write("a.txt", "a [trigger]\n")
    assert find_pictures([tmp_path]) == [Source(tmp_path / "a.png", "a [trigger]")]
    write("metadata.jsonl", '{"file_name": "a.png", "text": "one [trigger]\u2028two"}\n')
    assert find_pictures([tmp_path]) == [Source(tmp_path / "a.png", "one [trigger]\u2028two")]
    for name in ("key/key.json", "votes/ann.json"):
        write(Path(name).name, (CORPUS / name).read_text())
    assert main(["study", "--tally", "ann.json", "--key", "key.json"]) == 0


def test_keys_and_votes_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, votes = CORPUS / "key/key.json", CORPUS / "votes/ann.json"
    good = json.loads(key.read_text())
    for name, content in {
        "no-trial.json": good | {"trials": {"t1": {"kind": "pair"}}},
        "no-picture.json": good | {"pictures": {}},
        "no-arms.json": good | {"arms": ["ours", "others"]},
        "listed.json": [good],
        "number.json": good | {"trials": 3},
    }.items():
        (tmp_path / name).write_text(json.dumps(content))
        assert main(["study", "--tally", str(votes), "--key", str(tmp_path / name)]) == 2
        assert f"{name} is no key of a study" in capsys.readouterr().err
    result = json.loads(votes.read_text())
    for name, content in {"other.json": result | {"study": "x"}, "list.json": result | {"votes": [[]]}}.items():
        (tmp_path / name).write_text(json.dumps(content))
        assert main(["study", "--tally", str(votes), str(tmp_path / name), "--key", str(key)]) == 2
        assert name in capsys.readouterr().err


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    """What macOS leaves on foreign disks has the suffix of the file it belongs to."""
    picture = drawn(tmp_path / "mug.png")
    adapter = make_adapter(make_basis(tmp_path / "basis"))
    save_adapter(adapter, tmp_path / "mug.safetensors")
    for name in ("._mug.png", "._mug.mask.png", ".mug.mask.png", "._mug.txt", ".hidden.jpg", "._mug.safetensors"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / ".Trash").mkdir()
    drawn(tmp_path / ".Trash/old.png")
    assert find_pictures([tmp_path]) == [Source(picture)] == find_pictures([picture])
    assert [one.name for one in load_pictures([tmp_path])] == ["mug.png"]
    shelf = Shelf(tmp_path, NAMES)
    shelf.scan()
    assert set(shelf.adapters) == {"mug"} and not shelf.left_out


def test_what_a_folder_holds_lies_in_it(tmp_path: Path) -> None:
    """Paths in the metadata and symbolic links; what a user names lies where the user says."""
    data, secret = tmp_path / "data", drawn(tmp_path / "secret.png", mode="L", colour=255)
    data.mkdir()
    drawn(data / "a.png")
    drawn(data / "a.grey.png", mode="L", colour=255)
    metadata = data / "metadata.jsonl"
    row = {"file_name": "a.png", "text": "a [trigger]"}
    metadata.write_text(json.dumps(row | {"mask": "a.grey.png"}))
    assert find_pictures([data]) == [Source(data / "a.png", "a [trigger]", data / "a.grey.png")]
    for mask in ("../secret.png", str(secret), "b/../../secret.png", "\x00"):
        metadata.write_text(json.dumps(row | {"mask": mask}))
        with pytest.raises(DataError, match=r"leads (out of its folder|nowhere)"):
            find_pictures([data])
    for name in ("../secret.png", str(secret)):
        metadata.write_text(json.dumps(row | {"file_name": name}))
        with pytest.raises(DataError, match="does not match the pictures"):
            find_pictures([data])
    metadata.unlink()
    (data / "a.grey.png").unlink()
    (tmp_path / "secret.txt").write_text("[trigger] secret")
    for link, target in {
        "b.png": secret,
        "a.txt": tmp_path / "secret.txt",
        "a.mask.png": secret,
        "1_b": tmp_path,
    }.items():
        (data / link).symlink_to(target)
        if link == "1_b":
            (data / "a.png").unlink()
        with pytest.raises(DataError, match=r"leads out of its folder"):
            find_pictures([data])
        (data / link).unlink()
    (data / "link.png").symlink_to(secret)
    (tmp_path / "linked").symlink_to(data)
    with pytest.raises(DataError, match="leads out of its folder"):
        load_pictures([data])
    assert find_pictures([data / "link.png"]) == [Source(data / "link.png")]
    assert [one.name for one in load_pictures([data / "link.png"])] == ["link.png"]
    (data / "link.png").unlink()
    drawn(data / "c.png")
    assert find_pictures([tmp_path / "linked"]) == [Source(tmp_path / "linked/c.png")]


# numbers


NOT_NUMBERS = ["1_0", "１", " 1", "1 ", "0x1", "nan", "infinity", "inf", "1e999", "", "+", ".", "1.2.3", "٣", "1\n"]


@pytest.mark.parametrize("text", NOT_NUMBERS)
def test_what_only_python_takes_for_a_number_is_none(text: str) -> None:
    for kind in (NUMBER, COUNT, WHOLE, SHARE, SEED):
        with pytest.raises(click.BadParameter, match="expected a"):
            kind(text)
    for field in ("rank", "learning_rate", "seed", "basis_rank", "logit_mean", "num_repeats"):
        if field == "num_repeats" and text.strip() == "1":
            continue
        with pytest.raises(RecipeError, match=field):
            Recipe.of({"role": "style", "images": "a", field: text})
    with pytest.raises(BrandError, match="tolerance"):
        BrandSheet.parse({"colour": [{"colour": "#fff", "tolerance": text}]})
    with pytest.raises(RequestError, match="no such model" if text == "+" else "out of bounds"):
        composition_of(f"pico+teapot:{text}", None, "pico", ["teapot"])
    if text:
        with pytest.raises(click.BadParameter, match="expected a finite number"):
            weighted_path(f"mug.safetensors:{text}")


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("+1", 1), ("1.5", 1.5), (".5", 0.5), ("5.", 5), ("-1e-1", -0.1), ("1E2", 100)]
)
def test_plain_numbers_are_numbers(text: str, value: float) -> None:
    assert NUMBER(text) == value
    assert text[0] == "+" or composition_of(f"pico+a:{text}", None, "pico", ["a"]) == {"a": value}
    assert Recipe.of({"role": "style", "images": "a", "logit_mean": text}).logit_mean == value
    assert weighted_path(f"mug.safetensors:{text}") == (Path("mug.safetensors"), value)
    assert weights(f"0, {text},1") == [0, value, 1]


def test_truth_is_no_number() -> None:
    for field in ("rank", "learning_rate", "num_repeats", "columns"):
        with pytest.raises(RecipeError, match=field):
            Recipe.of({"role": "style", "images": "a", "rank": 1, field: [True] if field == "columns" else True})
    with pytest.raises(BrandError, match="expected a number, got True"):
        BrandSheet.parse({"scores": {"texture": True}})


def test_full_width_digits_number_no_folder(tmp_path: Path) -> None:
    (tmp_path / "1０_mug").mkdir()
    drawn(tmp_path / "1０_mug/a.png")
    with pytest.raises(DataError, match="no pictures in"):
        find_pictures([tmp_path])


# where it runs


def authorised(token: bytes, *keys: str) -> bool:
    try:
        authorise(Request({"type": "http", "headers": [(b"authorization", b"Bearer " + token)]}), keys)
    except RequestError as refused:
        assert refused.status == 401
        return False
    return True


def test_a_key_that_is_not_ascii_opens_in_the_encodings_that_clients_send() -> None:
    assert authorised("sécond".encode(), "first", "sécond") and authorised("sécond".encode("latin-1"), "sécond")
    assert authorised("鍵".encode(), "鍵") and authorised(b"\xff", os.fsdecode(b"\xff"))
    assert authorised("voilà".encode(), "voilà") and authorised("успех".encode(), "успех")  # end in A0 and in 85
    for wrong in (b"second", b"s?cond", b"?", b"", b"s\xffcond", "sécon".encode(), b"\xe9"):
        assert not authorised(wrong, "sécond", "鍵"), wrong


def test_a_key_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b"s\xe9cond\n")
    with pytest.raises(QrloraError, match=r"(?s)keys.*UTF-8"):
        _api_keys(tmp_path / "keys")


def test_without_a_home_the_cache_is_a_folder_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a container's numbered user has neither HOME nor an entry in passwd."""

    def unknown(_: int) -> Any:
        raise KeyError("no such user")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("QRLORA_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = default_cache_dir()
    assert folder.parent == tmp_path and stat.S_IMODE(folder.stat().st_mode) == 0o700 and default_cache_dir() == folder
    folder.chmod(0o777)
    with pytest.raises(OutputError, match="QRLORA_CACHE"):
        default_cache_dir()
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(OutputError, match="QRLORA_CACHE"):
        default_cache_dir()
    monkeypatch.setenv("QRLORA_CACHE", "elsewhere")
    assert default_cache_dir() == Path("elsewhere")


def test_a_file_name_that_is_no_text_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"m\xffg")
    save_adapter(make_adapter(make_basis(tmp_path / "basis")), tmp_path / f"{name}.safetensors")
    shelf = Shelf(tmp_path, NAMES)
    shelf.scan()
    assert not shelf.adapters and "UTF-8" in json.dumps(shelf.left_out, ensure_ascii=False).encode().decode()
    (tmp_path / f"{name}.safetensors").unlink()
    shelf.scan()
    assert not shelf.left_out
    assert main(["inspect", str(tmp_path / f"{name}.safetensors")]) == 2
    assert r"m\udcffg" in capsys.readouterr().err


def test_toml_is_read_as_tomllib_reads_it(tmp_path: Path) -> None:
    for path in sorted(CORPUS.rglob("*.toml")):
        text = path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode().replace("\r\n", "\n")
        assert read_toml(path, "it", DataError, remedy="none") == tomllib.loads(text)
