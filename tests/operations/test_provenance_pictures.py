"""C2PA manifests, certificates, and finding a picture's origin after its marks are gone."""

from __future__ import annotations

import io
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from qrlora.apps.cli import cli, main
from qrlora.errors import DataError, SignatureError
from qrlora.operations.provenance.c2pa import Origin, mark, read, sidecar
from qrlora.operations.provenance.certificates import Certificate, ending, own_certificates, own_roots
from qrlora.operations.provenance.perceptual import ALIKE, SAME, distance, phash
from qrlora.operations.registry import Registry
from qrlora.operations.registry.who_made import who_made

DIGEST = "sha256:" + "ab" * 32
ORIGIN = Origin("teapot.png", "a teapot, é", 3, "0.1.0", (("teapot.safetensors", DIGEST, "adapter"),), "MIT")


def scene(seed: int, size: int = 128) -> Image.Image:
    """A picture with large forms, as of a product."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray((rng.random((6, 6, 3)) * 255).astype("uint8"))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    info, stream = PngInfo(), io.BytesIO()
    info.add_itxt("qrlora", '{"prompt": ["a teapot"], "seed": [3]}')
    image.save(stream, "PNG", pnginfo=info)
    return stream.getvalue()


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate.create(tmp_path_factory.mktemp("keys"), "acme", "ACME Teapots")


@pytest.fixture(scope="module")
def marked(acme: Certificate) -> bytes:
    return mark(png(scene(0)), ORIGIN, acme)


def test_a_marked_picture_says_what_made_it(acme: Certificate, marked: bytes):
    found = read(marked, [acme.root_pem])
    assert (found.state, found.title, found.signer) == ("valid", "teapot.png", "ACME Teapots / acme")
    assert found.ingredients == (("teapot.safetensors", DIGEST),)
    assert dict(found.origin) == {"prompt": "a teapot, é", "seed": 3, "licence": "MIT"}
    with Image.open(io.BytesIO(marked)) as image:
        assert "a teapot" in image.text["qrlora"]
        assert np.array_equal(np.asarray(image), np.asarray(scene(0)))
    assert b"trainedAlgorithmicMedia" in marked
    assert len(marked) - len(png(scene(0))) < 20_000


def test_somebody_else_may_sign_but_not_as_us(acme: Certificate, tmp_path: Path):
    same_name = Certificate.create(tmp_path, "acme", "ACME Teapots")
    forged = mark(png(scene(0)), ORIGIN, same_name)
    assert read(forged, [acme.root_pem]).state == "unknown"
    assert "somebody unknown here, who calls themselves ACME" in read(forged, [acme.root_pem]).words
    assert read(forged).state == "unknown" and read(forged, [same_name.root_pem, acme.root_pem]).state == "valid"


def test_each_changed_place_is_found(acme: Certificate, marked: bytes):
    """Whatever byte is changed: no pixel, text, ingredient, prompt or signer reads otherwise and yet as valid.

    Within the manifest some bytes are nobody's: 10 kB of padding behind the signature, and names of boxes.
    """
    whole, begin = read(marked, [acme.root_pem]), marked.index(b"caBX") - 4
    end = begin + int.from_bytes(marked[begin : begin + 4], "big") + 12
    unheeded = []
    for place in range(8, len(marked), len(marked) // 300):
        changed = bytes((*marked[:place], marked[place] ^ 1, *marked[place + 1 :]))
        if (found := read(changed, [acme.root_pem])).state == "valid":
            assert found == whole
            unheeded.append(place)
    assert all(begin <= place < end for place in unheeded) and len(unheeded) < 150
    cut = {read(marked[:length], [acme.root_pem]).state for length in range(100, len(marked), 2999)}
    assert cut <= {"invalid", "changed", "absent"} and cut


def test_saved_again_is_absent(acme: Certificate, marked: bytes):
    with Image.open(io.BytesIO(marked)) as image:
        assert read(saved(image, "PNG"), [acme.root_pem]).state == "absent"
        assert read(saved(image, "JPEG"), [acme.root_pem]).state == "absent"
    assert "stripped" in read(png(scene(0))).words
    with pytest.raises(SignatureError, match="no picture"):
        read(b"GIF89a")


def test_a_manifest_moved_to_another_picture(acme: Certificate, marked: bytes):
    chunk = marked[marked.index(b"caBX") - 4 :]
    length = int.from_bytes(chunk[:4], "big") + 12
    other = png(scene(1))
    header = 33  # signature and IHDR
    assert read(other[:header] + chunk[:length] + other[header:], [acme.root_pem]).state == "changed"
    # and a sidecar of another picture
    beside = sidecar(png(scene(0)), ORIGIN, acme)
    assert read(png(scene(0)), [acme.root_pem], manifest=beside).state == "valid"
    assert read(other, [acme.root_pem], manifest=beside).state == "changed"
    assert read(png(scene(0)), [acme.root_pem], manifest=beside[:-50]).state in ("invalid", "changed")


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats(acme: Certificate, kind: str):
    found = read(mark(saved(scene(0), kind), ORIGIN, acme), [acme.root_pem])
    assert found.state == "valid"


def test_a_certificate_ends(tmp_path: Path):
    short = Certificate.create(tmp_path, "short", "ACME", years=3 / 31_557_600)
    picture = mark(png(scene(0)), ORIGIN, short)
    assert "ends on" in short.check()
    time.sleep(4.5)  # whole seconds are compared
    found = read(picture, [short.root_pem])
    assert found.state == "expired" and "no timestamp" in found.words
    with pytest.raises(SignatureError, match="--renew"):
        mark(png(scene(0)), ORIGIN, short)
    renewed = Certificate.renew("short", folder=tmp_path)
    assert renewed.root_pem == short.root_pem and renewed.check() == ""
    assert read(mark(png(scene(0)), ORIGIN, Certificate.load("short", tmp_path)), [short.root_pem]).state == "valid"
    [(name, ends)] = own_certificates(tmp_path)
    assert (name, ends) == ("short", renewed.ends)


def test_the_end_in_words(acme: Certificate):
    assert ending("acme", acme.ends, acme.ends - timedelta(days=61)) == ""
    assert "acme ends on" in ending("acme", acme.ends, acme.ends - timedelta(days=59))
    assert "acme ended on" in ending("acme", acme.ends, acme.ends)


def test_certificates_are_files_of_their_owner(tmp_path: Path):
    made = Certificate.create(tmp_path, "acme", "ACME")
    for part in ("root.key", "leaf.key"):
        assert (tmp_path / f"acme.{part}").stat().st_mode & 0o777 == 0o600
    with pytest.raises(SignatureError, match="already there"):
        Certificate.create(tmp_path, "acme", "ACME")
    assert list(own_roots(tmp_path)) == [made.root_pem]
    Certificate.create(tmp_path, "other", "Other")
    (tmp_path / "acme.leaf.crt").write_text((tmp_path / "other.leaf.crt").read_text())
    with pytest.raises(SignatureError, match="not the certificate of"):
        Certificate.load("acme", tmp_path)
    for organisation in ("", "a\nb", "x" * 65):
        with pytest.raises(SignatureError, match="cannot be an organisation"):
            Certificate.create(tmp_path, "third", organisation)
    (tmp_path / "other.leaf.crt").write_text("no certificate")
    with pytest.raises(SignatureError, match="no certificate"):
        Certificate.load("other", tmp_path)


def test_copies_are_close_and_others_are_not():
    """What perceptual hashes can do: copies within SAME, 40 other pictures beyond ALIKE."""
    image, hashed = scene(0, 256), phash(scene(0, 256))
    copies = [saved(image, "PNG"), saved(image, "JPEG", quality=75), saved(image.resize((128, 128)), "PNG")]
    for copy in copies:
        with Image.open(io.BytesIO(copy)) as again:
            assert distance(hashed, phash(again)) <= SAME
    assert min(distance(hashed, phash(scene(seed))) for seed in range(1, 41)) > ALIKE
    with pytest.raises(DataError):
        distance(hashed, "no hash")


@pytest.fixture
def company(tmp_path: Path, marked: bytes) -> Registry:
    registry = Registry.open(tmp_path / "company", actor="ada")
    with Image.open(io.BytesIO(marked)) as image:
        hashed = phash(image)
    registry.add(marked, "generated", name="teapot-chalk", facts={"phash": hashed}, keep=False)
    registry.add(png(scene(7)), "generated", facts={"phash": phash(scene(7))}, keep=False)
    return registry


def test_who_made(company: Registry, acme: Certificate, marked: bytes):
    found = who_made(marked, company, [acme.root_pem])
    assert found.manifest.state == "valid" and found.exact.title == "teapot-chalk@v1" and found.near == ()
    with Image.open(io.BytesIO(marked)) as image:
        image.load()
        stripped = [
            saved(image, "PNG"),
            saved(image, "JPEG", quality=70),
            saved(image.resize((64, 64)), "PNG"),
        ]
    for copy in stripped:
        found = who_made(copy, company, [acme.root_pem])
        assert found.manifest.state == "absent" and found.exact is None
        [(near, bits)] = found.near
        assert near.title == "teapot-chalk@v1" and bits <= SAME
    assert who_made(png(scene(9)), company).near == ()
    with pytest.raises(DataError, match="unreadable picture"):
        who_made(marked[:2000], company)
    company.close()


def test_who_made_as_a_command(company: Registry, marked: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "none"))
    picture = tmp_path / "p.png"
    picture.write_bytes(marked)
    place = ["--registry", str(company.folder)]
    shown = CliRunner().invoke(cli, ["who-made", str(picture), *place])
    assert "somebody unknown" in shown.output and "these very bytes are teapot-chalk@v1" in shown.output
    assert "anybody can write that" in shown.output
    with Image.open(io.BytesIO(marked)) as image:
        picture.write_bytes(saved(image, "PNG"))
    shown = CliRunner().invoke(cli, ["who-made", str(picture), *place])
    assert "looks like teapot-chalk@v1" in shown.output and "likely the same picture" in shown.output
    picture.write_bytes(png(scene(9)))
    assert main(["who-made", str(picture), *place]) == 1
    company.close()


def test_generate_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("QRLORA_KEYS", str(tmp_path / "keys"))
    monkeypatch.chdir(tmp_path)
    asked = ["generate", "--prompt", "a red mug", "--seeds", "2", "--steps", "2", "-o", "out", "--c2pa", "acme"]
    assert main(asked) == 2 and "acme.leaf.key" in capsys.readouterr().err
    assert main(["keys", "certificate", "acme", "--organisation", "ACME"]) == 0
    assert main(asked) == 0
    for seed, path in enumerate(sorted((tmp_path / "out").glob("*.png"))):
        found = read(path.read_bytes(), own_roots())
        assert (found.state, found.origin["seed"], found.ingredients[-1][0]) == ("valid", seed, "pico")
        with Image.open(path) as image:
            assert "c2pa" not in image.text["qrlora"]
