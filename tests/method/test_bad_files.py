"""Every malformed file is one AdapterFileError that names the file, says what is wrong, and never opens a pickle."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrlora._files import write_atomically
from qrlora._tensor_file import packed
from qrlora.errors import AdapterFileError
from qrlora.method.adapter import load_adapter, save_adapter
from samples import make_adapter, make_basis, make_lora


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good file of each spelling."""
    folder = tmp_path_factory.mktemp("good")
    basis = make_basis(folder)
    save_adapter(make_adapter(basis, recipe={"steps": 3}), folder / "compact.safetensors")
    save_adapter(make_adapter(basis, recipe={"steps": 3}), folder / "lora.safetensors", "lora", basis)
    save_adapter(make_adapter(basis, triangular=False), folder / "dense.safetensors")
    return folder


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    return safetensors.torch.load(data), header.get("__metadata__", {})


def refused(path: Path) -> str:
    """The message of the error that reading `path` raises."""
    with pytest.raises(AdapterFileError) as caught:
        load_adapter(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def rewritten(good: Path, tmp_path: Path, change, spelling: str = "compact") -> str:
    """Why a good file is refused after `change(tensors, metadata)`."""
    tensors, metadata = parts(good / f"{spelling}.safetensors")
    change(tensors, metadata)
    path = tmp_path / "changed.safetensors"
    write_atomically(path, packed(tensors, metadata))  # with a digest of what it now is
    return refused(path)


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# Not a safetensors file at all


def test_nothing_there_a_folder_and_an_empty_file(tmp_path):
    assert "nothing there" in refused(tmp_path / "absent.safetensors")
    assert "a folder" in refused(tmp_path)
    empty = tmp_path / "empty.safetensors"
    empty.write_bytes(b"")
    assert "0 bytes" in refused(empty)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a.pt", "a.ckpt"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_pickle_is_called_one_and_never_opened(tmp_path, monkeypatch, name, protocol):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(), protocol=protocol))
    assert "pickle" in refused(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_a_torch_zip_is_called_a_pickle(tmp_path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "zip.safetensors")
    assert zipfile.is_zipfile(tmp_path / "zip.safetensors")
    assert "pickle" in refused(tmp_path / "zip.safetensors")


@pytest.mark.parametrize("data", [b"\x01", b"<html><body>404</body></html>", b"\xff" * 64, b"\x00" * 64])
def test_other_bytes(tmp_path, data):
    path = tmp_path / "other.safetensors"
    path.write_bytes(data)
    refused(path)


def test_an_oversized_header_is_not_read(tmp_path):
    path = tmp_path / "big.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    assert "oversized header" in refused(path)


# A damaged safetensors file


@pytest.mark.parametrize("spelling", ["compact", "lora", "dense"])
def test_truncation_anywhere_is_refused(good, tmp_path, spelling):
    data = (good / f"{spelling}.safetensors").read_bytes()
    path = tmp_path / "short.safetensors"
    for length in [*range(1, 20), *range(20, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        assert "truncated" in refused(path)


def test_trailing_bytes_are_refused(good, tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes((good / "compact.safetensors").read_bytes() + b"\x00")
    assert "damaged" in refused(path)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_is_refused_or_means_the_same_kind_of_thing(good, tmp_path, data):
    """Any byte of the header changed: an AdapterFileError, or a file that is still well-formed; never another error."""
    content = bytearray((good / "compact.safetensors").read_bytes())
    length = struct.unpack("<Q", content[:8])[0]
    content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        load_adapter(path)
    except AdapterFileError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": 1, "a": 2}',
        {"__metadata__": []},
        {"__metadata__": {"qrlora.format": 1}},
        {"a": []},
        {"a": {"dtype": "F32", "shape": "no", "data_offsets": [0, 4]}},
        {"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}},
        {"transformer.a.lora_A.weight": {"dtype": "F32", "shape": [-1, 1]}},
        {},
    ],
)
def test_malformed_headers(tmp_path, header):
    refused(raw_file(tmp_path / "header.safetensors", header, b"\x00" * 4))


@pytest.mark.parametrize("offsets", [[0, 1 << 50], [4, 0], [0], None, [0, 8], "no"])
def test_offsets_that_lie(tmp_path, offsets):
    side = {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]}
    header = {"transformer.a.lora_A.weight": side, "transformer.a.lora_B.weight": {**side, "data_offsets": offsets}}
    assert "truncated or damaged" in refused(raw_file(tmp_path / "offsets.safetensors", header, b"\x00" * 8))


# Well-formed safetensors that is no adapter


def test_missing_and_unexpected_tensors_are_all_listed(good, tmp_path):
    def change(tensors, metadata):
        del tensors["conv.delta_r"], tensors["blocks.0.ff.delta_r"]
        tensors["one.delta_r"] = tensors["two"] = torch.zeros(1)
        tensors["two"] = torch.ones(1)

    message = rewritten(good, tmp_path, change)
    for key in ("'blocks.0.ff.delta_r', 'conv.delta_r'", "'one.delta_r', 'two'"):
        assert key in message


def test_missing_and_unknown_metadata_are_all_listed(good, tmp_path):
    def change(tensors, metadata):
        del metadata["qrlora.rank"], metadata["qrlora.licence"]
        metadata |= {"qrlora.colour": "red", "tag": "x"}

    message = rewritten(good, tmp_path, change)
    for key in ("'qrlora.licence', 'qrlora.rank'", "'qrlora.colour', 'tag'"):
        assert key in message


@pytest.mark.parametrize(
    "key, text, said",
    [
        ("format_version", "2", "another format version"),
        ("format_version", "two", "no JSON"),
        ("format", "zipped", "unknown qrlora.format"),
        ("format", "lora", "keys missing or unknown"),
        ("method", "dora", "unknown method"),
        ("method", "lora", "no compact spelling"),
        ("role", "hero", "unknown role"),
        ("rank", "3", "rank and columns disagree"),
        ("rank", "true", "wrong type"),
        ("rank", "4.0", "wrong type"),
        ("alpha", "NaN", "no JSON"),
        ("alpha", "1" + "0" * 400, "wrong type"),
        ("alpha", '"4"', "wrong type"),
        ("columns", "[3,2,1,0]", "not a set"),
        ("columns", "[0,1,2,99]", "not a set"),
        ("columns", "[-1,0,1,2]", "not a set"),
        ("triangular", "false", "another shape"),
        ("recipe", '{"steps":4}', "digest"),
        ("recipe", "[" * 50_000, "no JSON"),
        ("layers", "{}", "names no layers"),
        ("layers", '{"conv":[[12,4,3,3]]}', "malformed"),
        ("layers", '{"conv":[[12,0,3,3],""]}', "malformed"),
        ("layers", '{"conv":[[12,true],""]}', "malformed"),
    ],
)
def test_metadata_that_cannot_be(good, tmp_path, key, text, said):
    assert said in rewritten(good, tmp_path, lambda _, metadata: metadata.update({f"qrlora.{key}": text}))


def test_a_future_version_is_named_even_if_its_keys_are_new(good, tmp_path):
    def change(tensors, metadata):
        metadata |= {"qrlora.format_version": "7", "qrlora.novelty": "1"}

    assert "upgrade qrlora" in rewritten(good, tmp_path, change)


@pytest.mark.parametrize("spelling", ["compact", "lora", "dense"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_name(good, tmp_path, spelling, value):
    def change(tensors, metadata):
        key = next(key for key in tensors if "ff" in key)
        tensors[key] = tensors[key].index_fill(0, torch.tensor([1]), value)

    message = rewritten(good, tmp_path, change, spelling)
    assert "NaN or Inf" in message and "blocks.0.ff" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_wrong_dtypes_are_refused(good, tmp_path, dtype):
    def change(tensors, metadata):
        tensors["conv.delta_r"] = torch.zeros(tensors["conv.delta_r"].shape).to(dtype)

    assert "wrong dtype" in rewritten(good, tmp_path, change)


@pytest.mark.parametrize("spelling", ["compact", "lora", "dense"])
def test_tensors_of_another_rank_are_refused(good, tmp_path, spelling):
    def change(tensors, metadata):
        for key in list(tensors):
            tensors[key] = tensors[key][:3].clone()

    assert "rank 4" in rewritten(good, tmp_path, change, spelling)


def test_a_lora_spelling_whose_up_was_changed_is_refused(good, tmp_path):
    def change(tensors, metadata):
        for key in tensors:
            tensors[key] = tensors[key] * 2 if "lora_B" in key else tensors[key]

    assert "not the basis's Q" in rewritten(good, tmp_path, change, "lora")


def test_a_lora_spelling_must_have_folded_its_scaling(good, tmp_path):
    message = rewritten(good, tmp_path, lambda _, metadata: metadata.update({"qrlora.alpha": "8.0"}), "lora")
    assert "alpha is not rank" in message


# Plain LoRA of others


def foreign(path: Path, change=lambda tensors: None, metadata: dict[str, str] | None = None) -> Path:
    tensors = {f"transformer.a.{side}.weight": torch.ones(2, 2) for side in ("lora_A", "lora_B")}
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t.pop("transformer.a.lora_B.weight"), "transformer.a.lora_B.weight"),
        (
            lambda t: t.update({"transformer.a.alpha": torch.ones(1), "lora_unet_b.alpha": torch.ones(1)}),
            "lora_unet_b.alpha",
        ),
        (lambda t: t.update({"text_encoder.a.lora_A.weight": torch.ones(2, 2)}), "text_encoder.a"),
        (lambda t: t.update({"transformer.a.lora_B.weight": torch.ones(2, 3)}), "different rank"),
        (lambda t: t.update({"transformer.a.lora_B.weight": torch.ones(2)}), "no LoRA pair"),
        (lambda t: t.update({k.replace("transformer", "unet"): v.clone() for k, v in t.items()}), "two denoisers"),
        (lambda t: t.clear(), "neither"),
        (lambda t: t.update({k: torch.ones(0, 0) for k in t}), "rank below one"),
    ],
)
def test_malformed_plain_loras(tmp_path, change, said):
    assert said in refused(foreign(tmp_path / "foreign.safetensors", change))


@pytest.mark.parametrize(
    "config, said",
    [
        ('{"transformer.use_dora": true}', "use_dora"),
        ('{"transformer.rank_pattern": {"a": 3}}', "rank_pattern"),
        ('{"transformer.lora_alpha": "loud"}', "lora_alpha"),
        ("[]", "malformed"),
        ("{", "no JSON"),
    ],
)
def test_plain_loras_with_a_config_that_cannot_be_followed(tmp_path, config, said):
    assert said in refused(foreign(tmp_path / "foreign.safetensors", metadata={"lora_adapter_metadata": config}))


# Writing


def test_what_cannot_be_written_is_not(tmp_path):
    basis = make_basis(tmp_path / "cache")
    adapter = make_adapter(basis)
    for arguments, said in (
        ((tmp_path / "a.bin",), "safetensors"),
        ((tmp_path / "a.safetensors", "zipped"), "unknown spelling"),
        ((tmp_path / "a.safetensors", "kohya", basis), "without a name"),
    ):
        with pytest.raises(AdapterFileError, match=said):
            save_adapter(adapter, *arguments)
    with pytest.raises(AdapterFileError, match="no compact spelling"):
        save_adapter(make_lora(), tmp_path / "a.safetensors")
    adapter.deltas["conv"][0, 5] = float("nan")
    with pytest.raises(AdapterFileError, match="NaN"):
        save_adapter(adapter, tmp_path / "a.safetensors")
    assert not list(tmp_path.glob("*.*"))
