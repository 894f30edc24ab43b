"""What was damaged, is too large, or is not finite is found by whoever uses it: files, caches, sums and pictures."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from qrlora._files import write_atomically
from qrlora._tensor_file import DIGEST, MOST_TENSORS, packed, read_header, read_tensors
from qrlora.apps.cli import main
from qrlora.apps.serving.engine import Engine
from qrlora.apps.serving.protocol import Made, Refused, Settings
from qrlora.errors import AdapterFileError, MismatchError, PictureError, QrloraError, RecipeError, TensorFileError
from qrlora.method.adapter import Adapter, adapter_from_model, attach, load_adapter, remove_adapters, save_adapter
from qrlora.method.basis import cached_layer_basis, weight_digest
from qrlora.method.composition import Composition, Live, compose_delta_weights
from qrlora.method.tuner import QRLoraConfig
from qrlora.models.exchange import load_any
from qrlora.models.exchange.tensors import read_tensor_file
from qrlora.models.families import load_pipeline
from qrlora.models.generation import Request, generate, generate_mixed
from qrlora.models.training import checkpoint
from qrlora.models.training.dataset import encode, load_examples
from qrlora.models.training.recipe import Recipe
from samples import SHAPES, changed, make_adapter, make_basis, make_lora

NAMES = {name: f"lora_unet_{name.replace('.', '_')}" for name in SHAPES}
NOTES = {"modelspec.title": "mug"}


def header_length(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    content = path.read_bytes()
    return safetensors.torch.load(content), json.loads(content[8 : header_length(content)])["__metadata__"]


def flips(path: Path, times: int, of: str, seed: int = 0) -> Iterator[None]:
    """Damage a file that many times, one random bit of its header or data at a time; it is whole again afterwards."""
    whole = path.read_bytes()
    start = header_length(whole)
    first, last = (0, start) if of == "header" else (start, len(whole))
    chance = random.Random(seed)
    for _ in range(times):
        place = chance.randrange(8 * first, 8 * last)
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        yield
    path.write_bytes(whole)


quick_and_slow = pytest.mark.parametrize("times", [6, pytest.param(200, marks=pytest.mark.slow)])


# Adapters


@pytest.fixture(params=["compact", "dense", "lora", "kohya", "plain"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path, basis = tmp_path / "mug.safetensors", make_basis(tmp_path / "cache")
    adapter = make_adapter(basis, triangular=request.param != "dense", recipe={"steps": 3})
    if request.param == "plain":
        save_adapter(make_lora(), path, "lora")
    elif request.param in ("lora", "kohya"):
        save_adapter(adapter, path, request.param, basis, names=NAMES, notes=NOTES)
    else:
        save_adapter(adapter, path)
    return path


@quick_and_slow
@pytest.mark.parametrize("of", ["data", "header"])
def test_a_flipped_bit_of_an_adapter_is_refused(saved: Path, of: str, times: int) -> None:
    before = load_adapter(saved)
    for _ in flips(saved, times, of):
        try:
            found = load_adapter(saved)
        except AdapterFileError as error:
            assert str(saved) in str(error)
        else:  # what is written for other programs is theirs: a flip there is none of ours
            assert of == "header" and b"modelspec" in saved.read_bytes()
            assert (found.metadata, found.digest) == (before.metadata, before.digest)


def test_what_other_programs_call_theirs_may_be_edited(tmp_path: Path) -> None:
    path = tmp_path / "mug.safetensors"
    basis = make_basis(tmp_path / "cache")
    save_adapter(make_adapter(basis), path, "lora", basis, notes=NOTES)
    tensors, metadata = parts(path)
    safetensors.torch.save_file(tensors, path, metadata | {"modelspec.title": "another"})
    load_adapter(path)
    tensors[next(iter(tensors))][0, 0] += 1
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(AdapterFileError, match="damaged"):
        load_adapter(path)


def test_an_older_file_loads_with_a_note(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = load_adapter(saved)
    assert "digest" not in caplog.text
    tensors, metadata = parts(saved)
    metadata.pop(DIGEST)
    safetensors.torch.save_file(tensors, saved, metadata)
    assert load_adapter(saved).digest == before.digest
    assert str(saved) in caplog.text and "without a digest" in caplog.text


def body_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha256(content[header_length(content) :]).hexdigest()


def hash_of(tensors: dict[str, torch.Tensor], order: list[str]) -> str:
    return hashlib.sha256(b"".join(tensors[key].numpy().tobytes() for key in order)).hexdigest()


@pytest.mark.parametrize(
    ("modelspec", "kohya", "read"),
    [
        ("body", None, True),
        ("by key", None, True),
        ("wrong", None, False),
        ("model's order", "body", True),
        ("model's order", None, False),
        (None, "body", True),
        (None, "wrong", True),
        ("wrong", "wrong", False),
    ],
)
def test_hashes_of_anybodys_file(tmp_path: Path, caplog, modelspec: str | None, kohya: str | None, read: bool) -> None:
    path = tmp_path / "any.safetensors"
    keys = [f"transformer.{layer}.lora_{side}.weight" for layer in "ba" for side in "BA"]
    tensors = {key: torch.randn(2, 2, generator=torch.Generator().manual_seed(i)) for i, key in enumerate(keys)}
    safetensors.torch.save_file(tensors, path)
    hashes = {
        "body": body_hash(path),
        "by key": hash_of(tensors, sorted(keys)),
        "model's order": hash_of(tensors, keys),
    }
    hashes["wrong"] = "0" * 64
    metadata = {"modelspec.hash_sha256": f"0x{hashes[modelspec]}"} if modelspec else {}
    metadata |= {"sshs_model_hash": hashes[kohya]} if kohya else {}
    safetensors.torch.save_file(tensors, path, metadata)
    for reader in (load_adapter, read_tensor_file):
        if read:
            reader(path)
        else:
            with pytest.raises(AdapterFileError, match=r"modelspec\.hash_sha256"):
                reader(path)
    assert ("sshs_model_hash" in caplog.text) == ((modelspec, kohya) == (None, "wrong"))


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ({"rank": 3}, "rank"),
        ({"rank": 4, "alpha": 9}, "alpha / rank"),
        ({"rank": 4, "columns": [0, 1, 2, 4]}, "columns"),
        ({"rank": 4, "columns": "style"}, "columns"),
        ({"triangular": False}, "triangular"),
        ({"method": "lora"}, "method"),
        ({"train_basis": True}, "method"),
    ],
)
def test_a_recipe_that_contradicts_its_adapter_is_refused(tmp_path: Path, recipe: dict, what: str) -> None:
    basis, path = make_basis(tmp_path / "cache"), tmp_path / "mug.safetensors"
    agreed = {"rank": 4, "alpha": 4, "columns": "first", "triangular": True, "method": "qrlora"}
    save_adapter(make_adapter(basis, recipe=agreed), path)
    load_adapter(path)
    save_adapter(make_adapter(basis, recipe=agreed | recipe), path)
    with pytest.raises(AdapterFileError, match=f"(?s)contradict.*'{what}'"):
        load_adapter(path)


# Checkpoints and caches


@quick_and_slow
@pytest.mark.parametrize("of", ["data", "header"])
def test_a_flipped_bit_of_a_checkpoint_is_refused_with_a_remedy(tmp_path: Path, of: str, times: int) -> None:
    recipe = Recipe.of({"role": "subject", "images": "a.png", "output": tmp_path / "mug.safetensors"})
    parameters = {"a": nn.Parameter(torch.randn(4, 8)), "b": nn.Parameter(torch.randn(8, 4))}
    optimizer = torch.optim.AdamW(parameters.values())
    sum(parameter.square().sum() for parameter in parameters.values()).backward()
    optimizer.step()
    path = checkpoint.save(recipe, {"seed": 0}, 7, parameters, optimizer)
    for _ in flips(path, times, of):
        with pytest.raises(RecipeError, match=f"(?s)damaged checkpoint {path}.*delete it"):
            checkpoint.load(recipe, {"seed": 0}, parameters, optimizer)
    assert checkpoint.load(recipe, {"seed": 0}, parameters, optimizer) == (7, 1.0)


@pytest.mark.parametrize("times", [2, pytest.param(50, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_flipped_bit_of_what_was_encoded_is_made_again_and_said(
    tmp_path: Path, tiny_sd3: Path, private_cache: Path, caplog, kind: str, times: int
) -> None:
    pipe, family = load_pipeline(tiny_sd3, device="cpu")
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "a.png")
    examples = load_examples([tmp_path / "a.png"], "a <c>", "<c>", 16)
    first = encode(examples, pipe, family)
    [path] = [p for p in private_cache.rglob("encoded/*") if ("latents" in parts(p)[0]) == (kind == "latents")]
    for number, _ in enumerate(flips(path, times, "data"), start=1):
        again = encode(examples, pipe, family)
        assert torch.equal(again.latents[0], first.latents[0])
        assert all(torch.equal(first.conditions[key], again.conditions[key]) for key in first.conditions)
        assert number > 1 or (path.name in caplog.text and "made again" in caplog.text)


@quick_and_slow
@pytest.mark.parametrize("of", ["data", "header"])
def test_a_flipped_bit_of_a_cached_basis_is_never_used(private_cache: Path, of: str, times: int) -> None:
    weight = torch.randn(12, 10)
    right = cached_layer_basis(weight, weight_digest(weight), 3)
    [path] = private_cache.iterdir()
    for _ in flips(path, times, of):
        assert torch.equal(cached_layer_basis(weight, weight_digest(weight), 3).q, right.q)


# Numbers


def overflowing(folder: Path) -> Path:
    """A file whose metadata is sound and whose alpha makes s · ΔR infinite."""
    path = folder / "loud.safetensors"
    save_adapter(make_adapter(make_basis(folder / "cache"), alpha=1e300), path)
    return path


def test_an_adapter_whose_alpha_overflows_is_refused_by_name(tmp_path: Path, capsys) -> None:
    path = overflowing(tmp_path)
    for reader in (load_adapter, load_any):
        with pytest.raises(AdapterFileError, match=f"(?s){path}.*not finite"):
            reader(path)
    assert main(["inspect", str(path)]) == 2 and "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("weight", [1e38, 3e38, -1e300, float("inf"), float("nan")])
def test_no_sum_is_made_at_a_weight_that_overflows(tmp_path: Path, weight: float) -> None:
    basis = make_basis(tmp_path)
    one, two = make_adapter(basis, alpha=4000.0), make_adapter(basis, seed=2, alpha=4000.0)
    for attempt in (
        lambda: Composition([(one, weight), (two, 1.0)]).adapter(),
        lambda: Composition([(one, 1.0), (two, weight)], 0.5).adapter(),
        lambda: compose_delta_weights([(one, weight), (two, 1.0)], [basis, basis], 4),
        lambda: compose_delta_weights([(make_lora(alpha=3000.0), weight)], [None], 4),
    ):
        with pytest.raises(MismatchError, match="finite"):
            attempt()


def test_a_sum_is_checked_after_the_arithmetic(tmp_path: Path) -> None:
    """Each part is within float32, their sum is not."""
    basis = make_basis(tmp_path)
    loud = make_adapter(basis, triangular=False)
    for delta in loud.deltas.values():
        delta.fill_(1e36)
    parts_ = [(loud, 15.0)] * 30
    with pytest.raises(MismatchError, match=r"sum of .* not finite"):
        Composition(parts_).adapter()


def on_pico(seed: int, size: float, name: str) -> tuple[object, object, Adapter]:
    """pico, and an adapter on it with ΔR of that size."""
    pipe, family = load_pipeline("pico")
    pipe.transformer.add_adapter(QRLoraConfig(r=2, target_modules=["to_q", "to_v"], triangular=False), name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in pipe.transformer.named_parameters():
        if f"lora_A.{name}" in key:
            parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    adapter = adapter_from_model(pipe.transformer, name, family=family.name, base_model="pico")
    remove_adapters(pipe.transformer, [name])
    return pipe, family, adapter


@pytest.fixture
def loud_and_soft(tmp_path: Path) -> tuple[Path, object, object, Adapter, Adapter]:
    """A folder with an adapter whose pictures are not finite, and a sound one; pico, and both."""
    pipe, family, loud = on_pico(1, 1e25, "loud")
    soft = on_pico(2, 0.01, "soft")[2]
    folder = tmp_path / "adapters"
    folder.mkdir()
    for name, adapter in (("loud", loud), ("soft", soft)):
        save_adapter(adapter, folder / f"{name}.safetensors")
    return folder, pipe, family, loud, soft


def test_one_request_never_changes_anothers_picture(loud_and_soft) -> None:
    _, pipe, family, loud, soft = loud_and_soft
    quiet = [Request("a mug", 0, {}), Request("a mug", 1, {"soft": 1.0}), Request("a mug", 2, {"soft": 0.5})]
    noisy = [Request("a mug", 0, {"loud": 1.0, "soft": 1.0}, 0.5), *quiet[1:]]
    with Live(pipe.transformer, {"loud": loud, "soft": soft}) as live:
        expected = generate_mixed(pipe, family, quiet, live, steps=2)
        with pytest.raises(PictureError, match=r"(?s)1 pictures.*'a mug' with seed 0") as error:
            generate_mixed(pipe, family, noisy, live, steps=2)
    assert error.value.images[0] is None
    for one, other in zip(expected[1:], error.value.images[1:], strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    with pytest.raises(PictureError, match="would have been black"):
        generate(pipe, family, ["a mug"], [0], adapters=[(loud, 1.0)], steps=2)


def test_live_refuses_what_overflows_and_goes_on(loud_and_soft) -> None:
    _, pipe, family, loud, soft = loud_and_soft
    with Live(pipe.transformer, {"soft": soft}) as live:
        [expected] = generate_mixed(pipe, family, [Request("a mug", 0, {"soft": 1.0})], live, steps=1)
        with pytest.raises(MismatchError, match="not finite"):
            live.add("infinite", changed(loud, alpha=1e300))
        live.add("loud", loud)
        for row in ({"loud": 1e20}, {"soft": 1e300}, {"loud": float("inf")}, {"soft": 1.0, "loud": 1e15}):
            with pytest.raises(MismatchError, match="finite"):
                live.compose([{"soft": 1.0}, row])
        [again] = generate_mixed(pipe, family, [Request("a mug", 0, {"soft": 1.0})], live, steps=1)
    assert np.array_equal(np.asarray(expected), np.asarray(again))


def test_an_adapter_beyond_half_precision_is_not_attached(loud_and_soft) -> None:
    _, pipe, _, loud, _ = loud_and_soft
    pipe.transformer.half()
    try:
        with pytest.raises((MismatchError, QrloraError)):
            attach(pipe.transformer, loud)
        assert not getattr(pipe.transformer, "peft_config", None)
    finally:
        pipe.transformer.float()


def test_a_server_leaves_out_what_is_not_finite_and_fails_that_picture_alone(loud_and_soft) -> None:
    folder, _, _, loud, _ = loud_and_soft
    save_adapter(changed(loud, alpha=1e300), folder / "infinite.safetensors")
    engine = Engine("pico", folder)
    try:
        assert set(engine.shelf.adapters) == {"loud", "soft"} and "not finite" in engine.shelf.left_out["infinite"]
        asked = [("secret", {"loud": 1.0}), ("a mug", {"soft": 1.0}), ("b", {"loud": 1e99})]
        pictures = [Request(prompt, seed, composition) for seed, (prompt, composition) in enumerate(asked)]

        async def answers() -> list[object]:
            return [event async for event in engine.run(Settings(2, 1.0, 64), pictures, progress=False)]

        events = asyncio.run(answers())
        made = [event.index for event in events if isinstance(event, Made)]
        refused = {event.index: str(event.error) for event in events if isinstance(event, Refused)}
        assert made == [1] and set(refused) == {0, 2}
        assert "black" in refused[0] and "not finite" in refused[2] and "secret" not in refused[2]
    finally:
        engine.close()


# Sizes


def sparse(path: Path, header: object, size: int) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)
    return path


def _one(size: int) -> dict[str, object]:
    return {"transformer.a.lora_A.weight": {"dtype": "F32", "shape": [size // 4, 1], "data_offsets": [0, size]}}


MANY = range(400_000)
LARGE: dict[str, Callable[[Path], Path]] = {
    "20 GB of zeros that its header describes": lambda p: sparse(p, _one(20 * 2**30), 20 * 2**30),
    "20 GB that it does not": lambda p: sparse(p, _one(4), 20 * 2**30),
    "4 GB that it does not": lambda p: sparse(p, _one(4), 4 * 2**30),
    "a header of 400 000 keys": lambda p: sparse(
        p,
        {f"k{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(400_000)},
        1_600_000,
    ),
    "a short header of as many keys as will go": lambda p: sparse(
        p, b"{" + b",".join(b'"%x":{}' % i for i in range(800_000)) + b"}", 0
    ),
    "deep JSON": lambda p: sparse(p, b'{"a":' * 1_000_000, 0),
    "deep lists": lambda p: sparse(p, b"[" * 9_000_000, 0),
    "values without end": lambda p: sparse(p, b"{" + b'"a":1,' * 1_600_000 + b'"b":1}', 0),
    "a header of 1 TB": lambda p: sparse(p, b"", 20 * 2**30),
}


@pytest.mark.parametrize("kind", list(LARGE))
def test_what_is_too_large_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = LARGE[kind](tmp_path / "large.safetensors")
    for reader in (load_adapter, load_any):
        tracemalloc.start()
        started = time.perf_counter()
        with pytest.raises(AdapterFileError) as error:
            reader(path)
        taken, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert taken < 1 and peak < 200e6 and len(str(error.value)) < 10_000


def test_messages_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "many.safetensors"
    count = MOST_TENSORS - 10
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    sparse(path, {f"k{i}": entry for i in range(count)}, 0)
    with pytest.raises(AdapterFileError, match=f"and {count - 20} more") as error:
        load_adapter(path)
    assert len(str(error.value)) < 2000
    long = QrloraError("x", expected=dict.fromkeys(range(400_000)), got="y" * 100_000)
    assert "and 399980 more" in str(long) and len(str(long)) < 10_000


def test_a_tensor_larger_than_its_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_atomically(path, packed({"a": torch.zeros(4)}))
    content = path.read_bytes().replace(b'"shape":[4]', b'"shape":[5]')
    path.write_bytes(content)
    with path.open("rb") as stream:
        header = read_header(stream)
        with pytest.raises(TensorFileError, match="no tensor"):
            read_tensors(stream, header)
