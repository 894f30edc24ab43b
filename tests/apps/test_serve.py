"""The server: every picture is the one made alone, every bad request is told why, and nothing it meets stops it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import io
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image

from qrlora.apps.cli import main
from qrlora.apps.serving import openapi
from qrlora.apps.serving.app import CLIENT_GONE, create_app
from qrlora.apps.serving.connections import Server
from qrlora.apps.serving.dispatch import Dispatcher
from qrlora.apps.serving.engine import Engine
from qrlora.apps.serving.metrics import Metrics
from qrlora.apps.serving.names import composition_of
from qrlora.apps.serving.protocol import Event, Facts, Limits, Made, Refused, Settings, Step
from qrlora.apps.serving.request import ImageRequest, side_of
from qrlora.apps.serving.service import Kept, Service
from qrlora.errors import DataError, QrloraError, RequestError
from qrlora.method.adapter import Adapter, adapter_from_model, load_adapter, remove_adapters, save_adapter
from qrlora.method.composition import Composition, default_strength, project_out
from qrlora.models.exchange import load_any
from qrlora.models.families import load_pipeline
from qrlora.models.generation import generate
from qrlora.models.request import Request
from qrlora.models.training.attach import peft_config
from qrlora.models.training.recipe import Recipe

BASE = "tiny-sd3"
CLIENTS: list[openai.OpenAI] = []
SHORT = {"steps": 2, "guidance": 2.0}
FACTS = Facts(BASE, side=16, unit=4, largest_side=32, steps=2, guidance=2.0, adapters={"mug": {}, "chalk": {}})


def make_adapter(loaded: Any, role: str, seed: int = 0, **changes: object) -> Adapter:
    """A random adapter of this role, large enough to be seen."""
    pipe, family = loaded
    recipe = Recipe.of({"role": role, "images": "a.png", "rank": 2, **changes})
    pipe.transformer.add_adapter(peft_config(recipe, family), adapter_name=role)
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name and parameter.requires_grad:
            generator = torch.Generator().manual_seed(len(name) + 1000 * seed)
            torch.nn.init.normal_(parameter.data, std=0.3, generator=generator)
    made = adapter_from_model(pipe.transformer, role, family="sd3", role=role, trigger=f"<{role[0]}>")
    remove_adapters(pipe.transformer, [role])
    return made


@pytest.fixture(scope="module")
def loaded(tiny_sd3: Path) -> Any:
    return load_pipeline(tiny_sd3, device="cpu")


@pytest.fixture(scope="module")
def shelf(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a subject and a style on one basis, and of files that cannot be served beside them."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(make_adapter(loaded, "subject"), folder / "mug.safetensors")
    save_adapter(make_adapter(loaded, "style"), folder / "chalk.safetensors")
    save_adapter(make_adapter(loaded, "subject", method="lora"), folder / "a-lora.safetensors", "lora")
    save_adapter(make_adapter(loaded, "subject", rank=3), folder / "an-other-basis.safetensors")
    save_adapter(make_adapter(loaded, "subject"), folder / "a+b.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no tensors")
    return folder


@pytest.fixture(scope="module")
def engine(tiny_sd3: Path, shelf: Path) -> Iterator[Engine]:
    engine = Engine(str(tiny_sd3), shelf)
    yield engine
    engine.close()


@contextlib.contextmanager
def serving(engines: Any, **limits: Any) -> Iterator[tuple[str, Service]]:
    """A real HTTP server around the application, in a thread; yields its address."""
    service = Service(engines, Limits(**{"drain_seconds": 10, **limits}))
    server = Server(service, "127.0.0.1", 0)
    answered: set[tuple[str, str, int]] = set()
    server.config.app = _recording(server.config.app, answered)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 10
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join()
    facts = asyncio.run(engines.facts())
    document = openapi.document(create_app(service), ImageRequest.model_json_schema(), facts, service.limits)
    assert not answered - set(_documented(document, answered))


def _recording(app: Any, answered: set[tuple[str, str, int]]) -> Any:
    """The application, which notes method, path and status of all that it answers."""

    async def recording(scope: Any, receive: Any, send: Any) -> None:
        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                answered.add((scope["method"], scope["path"], message["status"]))
            await send(message)

        await app(scope, receive, noting)

    return recording


def _documented(document: dict[str, Any], answered: set[tuple[str, str, int]]) -> Iterator[tuple[str, str, int]]:
    """Those of the answers that the OpenAPI document lists, and those to paths and methods that it does
    not have, or that nobody read."""
    for method, path, status in answered:
        fits = {known: re.fullmatch(re.sub(r"{\w+}", ".+", known), path) for known in document["paths"]}
        operations = [document["paths"][known] for known, match in fits.items() if match]
        asked = [found[method.lower()] for found in operations if method.lower() in found]
        if not asked or status == CLIENT_GONE or any(str(status) in operation["responses"] for operation in asked):
            yield method, path, status


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[str]:
    with serving(engine) as (url, _):
        yield url


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    """A connection that nobody closes is a warning, in whatever test collects it."""
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def client(url: str, key: str = "none") -> openai.OpenAI:
    CLIENTS.append(openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0))
    return CLIENTS[-1]


def ask(url: str, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/images/generations", json={"prompt": "a mug", **SHORT, **body}, timeout=30)


def opened(text: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


def alone(loaded: Any, shelf: Path, prompt: str, seed: int, weights: dict[str, float], **options: Any) -> np.ndarray:
    """The picture that `qrlora generate` makes."""
    adapters = [(load_adapter(shelf / f"{name}.safetensors"), weight) for name, weight in weights.items()]
    adapters = project_out(adapters, default_strength([adapter for adapter, _ in adapters]))
    return np.array(generate(*loaded, [prompt], [seed], adapters=adapters, **{**SHORT, **options})[0]).astype(int)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal up to the rounding that other batch sizes bring."""
    return one.shape == other.shape and bool(abs(one - other).max() <= 1)


# names


@pytest.mark.parametrize(
    ("model", "field", "weights"),
    [
        (None, None, {}),
        (BASE, None, {}),
        (f"{BASE}+mug", None, {"mug": 1.0}),
        (f"{BASE}+mug:0.9+chalk:-1.5", None, {"mug": 0.9, "chalk": -1.5}),
        (None, {"mug": 0.9, "chalk": 1}, {"mug": 0.9, "chalk": 1.0}),
        (BASE, {"mug": 0}, {"mug": 0.0}),
        (f"{BASE}+mug", {}, "two compositions"),
        (f"{BASE}+mug", {"chalk": 1}, "two compositions"),
        (f"{BASE}+hat", None, "adapters: chalk, mug"),
        ("dall-e-3", None, f"base model '{BASE}'"),
        (f"{BASE}x", None, "no such model"),
        (f"{BASE}+", None, "no such model"),
        (f"{BASE}+mug:", None, "got:      ''"),
        (f"{BASE}+mug:nan", None, "from -100 to 100"),
        (f"{BASE}+mug:100.5", None, "from -100 to 100"),
        (f"{BASE}+mug:-1e30", None, "from -100 to 100"),
        (f"{BASE}+mug:100+chalk:-100", None, {"mug": 100.0, "chalk": -100.0}),
        (f"{BASE}+mug:big", None, "got:      'big'"),
        (f"{BASE}+mug:1:2", None, "out of bounds"),
        (f"{BASE}+mug+mug:2", None, "named twice"),
        (None, {"hat": 1.0}, "got:      'hat'"),
        (None, {"mug": float("inf")}, "out of bounds"),
        (None, {"mug": 10**400}, "out of bounds"),
        (None, {"mug": "1"}, "out of bounds"),
        (None, {"mug": True}, "out of bounds"),
        (None, ["mug"], "not a JSON object"),
    ],
)
def test_a_request_names_its_composition_in_one_of_two_ways(model: Any, field: Any, weights: Any) -> None:
    if isinstance(weights, dict):
        assert composition_of(model, field, BASE, FACTS.adapters) == weights
        return
    with pytest.raises(RequestError) as refused:
        composition_of(model, field, BASE, FACTS.adapters)
    assert weights in str(refused.value)
    assert refused.value.status == (404 if "no such" in str(refused.value) else 400)


@pytest.mark.parametrize("size", ["17x17", "16x32", "64x64", "0x0", "-16x-16", "16", "16x", "x", "", "16x16x16", "²x²"])
def test_a_size_that_the_model_does_not_make(size: str) -> None:
    assert [side_of(size, FACTS, None) for size in (None, "auto", "16x16", "32x32")] == [16, 16, 16, 32]
    with pytest.raises(RequestError, match="multiple of 4, at most 32x32"):
        side_of(size, FACTS, None)
    with pytest.raises(RequestError, match="at most 16x16"):
        side_of("32x32", FACTS, 16)


# pictures


@pytest.mark.parametrize("weights", [{}, {"mug": 0.9}, {"mug": 0.9, "chalk": -0.5}])
def test_the_openai_client_gets_the_picture_made_alone(
    server: str, loaded: Any, shelf: Path, weights: dict[str, float]
) -> None:
    model = BASE + "".join(f"+{name}:{weight}" for name, weight in weights.items())
    expected = alone(loaded, shelf, "a mug", 3, weights)
    images = client(server).images
    named = images.generate(model=model, prompt="a mug", size="16x16", extra_body={"seed": 3, **SHORT})
    assert close(opened(named.data[0].b64_json), expected) and named.size == "16x16"
    extra = {"composition": weights, "seed": 2, **SHORT}
    linked = images.generate(model=BASE, prompt="a mug", n=2, response_format="url", extra_body=extra)
    assert [picture.seed for picture in linked.data] == [2, 3]
    fetched = httpx2.get(linked.data[1].url)
    assert fetched.headers["content-type"] == "image/png"
    assert close(np.array(Image.open(io.BytesIO(fetched.content))).astype(int), expected)


def test_a_request_may_leave_everything_to_the_model(server: str, loaded: Any, shelf: Path) -> None:
    made = client(server).images.generate(prompt="a mug").data[0]
    options: dict[str, Any] = {"steps": None, "guidance": None}
    assert close(opened(made.b64_json), alone(loaded, shelf, "a mug", made.seed, {}, **options))
    assert client(server).images.generate(prompt="a mug").data[0].seed != made.seed


def test_one_batch_holds_different_compositions_and_mixes_none_up(engine: Engine, loaded: Any, shelf: Path) -> None:
    wanted = [{"mug": 0.1 * i, "chalk": 1 - 0.2 * i} for i in range(1, 6)] + [{}, {"chalk": 1.0}]
    with serving(engine) as (url, service), ThreadPoolExecutor(len(wanted)) as pool:
        sent = [pool.submit(ask, url, composition=weights, seed=i) for i, weights in enumerate(wanted)]
        answers = [one.result().json() for one in sent]
        # A batch is counted when it is over, which is after its last picture was sent.
        until(lambda: value(service.metrics.text().decode(), "qrlora_batch_compositions_sum") == len(wanted))
        text = service.metrics.text().decode()
    for i, (weights, answer) in enumerate(zip(wanted, answers, strict=True)):
        assert close(opened(answer["data"][0]["b64_json"]), alone(loaded, shelf, "a mug", i, weights)), weights
    assert value(text, "qrlora_pictures_total") == len(wanted)
    assert value(text, "qrlora_batch_seconds_count") < len(wanted)


def test_served_generated_and_composed_pictures_are_the_same_at_any_strength(
    engine: Engine, loaded: Any, shelf: Path
) -> None:
    """A strength that the request names, else the server's, else the default of a subject with a style."""
    weights = {"mug": 30.0, "chalk": -20.0}
    parts = [(load_adapter(shelf / f"{name}.safetensors"), weight) for name, weight in weights.items()]

    def made(adapters: list) -> np.ndarray:
        return np.array(generate(*loaded, ["a mug"], [4], adapters=adapters, **SHORT)[0]).astype(int)

    def served(url: str, **more: Any) -> np.ndarray:
        return opened(ask(url, composition=weights, seed=4, **more).json()["data"][0]["b64_json"])

    composed = {c: made([(Composition(parts, c).adapter(), 1.0)]) for c in (0.0, 0.5, 1.0)}
    assert all(close(made(project_out(parts, c)), picture) for c, picture in composed.items())
    with serving(engine) as (url, _):
        assert all(close(served(url, null_space=c), picture) for c, picture in composed.items())
        assert close(served(url), composed[0.5]) and not close(served(url), composed[0.0])
    with serving(engine, null_space=1.0) as (url, _):
        assert close(served(url), composed[1.0]) and not close(served(url), composed[0.5])
        assert close(served(url, null_space=0), composed[0.0])


def value(text: str, name: str) -> float:
    """Of a metric in Prometheus' text format, labels included."""
    return float(next(line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(f"{name} ")))


def test_streaming_tells_every_step_and_ends_with_the_picture(server: str, loaded: Any, shelf: Path) -> None:
    extra = {"seed": 5, "steps": 4, "guidance": 2.0}
    events = list(client(server).images.generate(model=f"{BASE}+mug", prompt="a mug", stream=True, extra_body=extra))
    steps = [(event.step, event.steps) for event in events if event.type == "image_generation.progress"]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [event.type for event in events[4:]] == ["image_generation.completed"]
    assert events[-1].usage.total_tokens == 0 and events[-1].size == "16x16"
    assert close(opened(events[-1].b64_json), alone(loaded, shelf, "a mug", 5, {"mug": 1.0}, steps=4))


def test_models_lists_the_base_and_each_adapter_and_says_what_is_left_out(server: str) -> None:
    listed = client(server).models.list()
    assert [model.id for model in listed.data] == [BASE, f"{BASE}+chalk", f"{BASE}+mug"]
    assert (listed.data[2].role, listed.data[2].trigger) == ("subject", "<s>")
    left_out = listed.left_out
    assert set(left_out) == {"a+b", "a-lora", "an-other-basis", "broken"}
    assert "rename the file" in left_out["a+b"]
    assert "qrlora import" in left_out["a-lora"] and "qrlora import" in left_out["an-other-basis"]
    assert "broken.safetensors" in left_out["broken"] and "/" not in left_out["broken"].split(":")[0]
    assert client(server).models.retrieve(f"{BASE}+mug:0.5").id == f"{BASE}+mug:0.5"
    with pytest.raises(openai.NotFoundError, match="adapters: chalk, mug"):
        client(server).models.retrieve(f"{BASE}+hat")


def test_files_that_come_change_and_go_are_served_as_they_are(tiny_sd3: Path, loaded: Any, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("one", "two")}
    with contextlib.closing(Engine(str(tiny_sd3), tmp_path)) as engine, serving(engine) as (url, _):

        def picture(name: str, status: int = 200) -> Any:
            answer = ask(url, model=f"{BASE}+{name}", seed=1)
            assert answer.status_code == status, answer.text
            return opened(answer.json()["data"][0]["b64_json"]) if status == 200 else answer.json()["error"]

        assert "adapters: none" in picture("one", 404)["message"]
        for name in files:
            save_adapter(make_adapter(loaded, "subject"), files[name])
            assert close(picture(name), alone(loaded, tmp_path, "a mug", 1, {name: 1.0}))
        save_adapter(make_adapter(loaded, "subject", seed=1), files["one"])
        assert close(picture("one"), alone(loaded, tmp_path, "a mug", 1, {"one": 1.0}))
        files["two"].write_bytes(b"damaged")
        assert "no longer served" in picture("two", 400)["message"]
        files["one"].unlink()
        assert [model.id for model in client(url).models.list().data] == [BASE]
        picture("one", 404)


def damaged(content: bytes, count: int) -> Iterator[bytes]:
    """An adapter file with bytes changed, cut, doubled, or with other values in its metadata."""
    random = np.random.default_rng(0)
    length = int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8 : 8 + length]), content[8 + length :]
    values = ["", "NaN", "null", "[]", "{}", "-1", "1e400", "9" * 5000, "\ud800", "[" * 3000, "\0", '{"a": NaN}']
    for number in range(count):
        if number % 2:
            changed = json.loads(json.dumps(header))
            key = random.choice(sorted(changed["__metadata__"]))
            changed["__metadata__"][key] = values[random.integers(len(values))]
            text = json.dumps(changed).encode()
            yield len(text).to_bytes(8, "little") + text + tensors
        else:
            place, span = random.integers(len(content)), random.integers(1, 64)
            yield content[:place] + random.bytes(int(span)) * (number % 3) + content[place + span :]


def test_no_file_keeps_the_others_from_being_served(
    tiny_sd3: Path, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(make_adapter(loaded, "subject"), tmp_path / "mug.safetensors")
    content = (tmp_path / "mug.safetensors").read_bytes()
    for number, other in enumerate(damaged(content, 300)):
        (tmp_path / f"{number}.safetensors").write_bytes(other)
    (tmp_path / ".hidden.safetensors").write_bytes(content)
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.safetensors")  # reading it would wait for ever
    with contextlib.suppress(OSError):  # file systems that hold UTF-8 alone
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.safetensors")).write_bytes(content)
    with contextlib.closing(Engine(str(tiny_sd3), tmp_path)) as engine, serving(engine) as (url, _):
        listed = httpx2.get(f"{url}/v1/models", timeout=30).json()
        assert f"{BASE}+mug" in [model["id"] for model in listed["data"]]
        assert {"folder", "gone", "pipe"} < set(listed["left_out"])
        assert ".hidden" not in str(listed)
        assert len(listed["left_out"]) > 200 and max(map(len, listed["left_out"].values())) < 2100
        assert not [name for name in listed["left_out"] if name.startswith("\\") and "rename" not in str(listed)]
        assert close(opened(ask(url, model=f"{BASE}+mug", seed=1).json()["data"][0]["b64_json"]),
                     alone(loaded, tmp_path, "a mug", 1, {"mug": 1.0}))  # fmt: skip


def test_a_reader_that_fails_in_an_unknown_way_leaves_that_file_out(
    tiny_sd3: Path, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mug", "odd"):
        save_adapter(make_adapter(loaded, "subject"), tmp_path / f"{name}.safetensors")

    def fails(path: Path, **options: Any) -> Adapter:
        if path.stem == "odd":
            raise KeyError("a secret")
        return load_any(path, **options)

    monkeypatch.setattr("qrlora.apps.serving.engine.load_any", fails)
    with contextlib.closing(Engine(str(tiny_sd3), tmp_path)) as engine:
        facts = asyncio.run(engine.facts())
    assert set(facts.adapters) == {"mug"} and facts.left_out == {"odd": "its file cannot be read (KeyError)"}


def test_what_was_left_out_is_served_once_its_file_is_mended_or_the_others_basis_is_gone(
    tiny_sd3: Path, loaded: Any, tmp_path: Path
) -> None:
    files = {name: tmp_path / f"{name}.safetensors" for name in ("a", "b", "broken", "link")}
    save_adapter(make_adapter(loaded, "subject"), files["a"])
    save_adapter(make_adapter(loaded, "subject", rank=3), files["b"])
    files["broken"].write_bytes(b"damaged")
    files["link"].symlink_to(tmp_path / "nowhere")
    with contextlib.closing(Engine(str(tiny_sd3), tmp_path)) as engine, serving(engine) as (url, _):

        def left_out() -> set[str]:
            ask(url)  # a batch: engines take up between two of them what came
            return set(httpx2.get(f"{url}/v1/models").json()["left_out"])

        assert left_out() == {"b", "broken", "link"}
        files["link"].unlink()
        save_adapter(make_adapter(loaded, "subject", seed=1), files["broken"])
        assert left_out() == {"b"}
        files["a"].unlink()
        files["broken"].unlink()
        assert left_out() == set()
        assert close(opened(ask(url, model=f"{BASE}+b", seed=1).json()["data"][0]["b64_json"]),
                     alone(loaded, tmp_path, "a mug", 1, {"b": 1.0}))  # fmt: skip


# bad requests


@pytest.mark.parametrize(
    ("body", "status", "param", "message"),
    [
        ({"model": "dall-e-3"}, 404, "model", "adapters: chalk, mug"),
        ({"model": f"{BASE}+hat"}, 404, "model", "adapters: chalk, mug"),
        ({"model": f"{BASE}+mug:nan"}, 400, "model", "expected a number from -100 to 100"),
        ({"composition": {"hat": 1}}, 404, "composition", "got 'hat'"),
        ({"composition": {"mug": "x"}}, 400, "composition", "expected a number from -100 to 100"),
        ({"composition": {"mug": 1e30}}, 400, "composition", "got 1e+30"),
        ({"model": BASE + "+mug" * 9000}, 400, "model", "named twice"),
        ({"x" * 60_000: 1}, 400, "x" * 100, "got xxx"),
        ({"model": f"{BASE}+mug", "composition": {"mug": 1}}, 400, "composition", "leave `composition` out"),
        ({"null_space": 1.5}, 400, "null_space", "less than or equal to 1"),
        ({"give_way": 0.5}, 400, "give_way", "Remedy: `give_way` is called `null_space`"),
        ({"n": 0}, 400, "n", "greater than or equal to 1"),
        ({"n": 11}, 400, "n", "expected from 1 to 10; got 11"),
        ({"n": 10**30}, 400, "n", "expected"),
        ({"n": 1.5}, 400, "n", "integer"),
        ({"size": "17x17"}, 400, "size", "multiple of 4"),
        ({"size": "1000000x1000000"}, 400, "size", "at most 32x32"),
        ({"size": "16x32"}, 400, "size", "square"),
        ({"steps": 101}, 400, "steps", "expected from 1 to 100"),
        ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
        ({"guidance": 1e9}, 400, "guidance", "less than or equal to 100"),
        ({"prompt": "a" * 4001}, 400, "prompt", "at most 4000 characters"),
        ({"prompt": "mug " * 50}, 400, None, "at most 77 tokens"),
        ({"prompt": ""}, 400, "prompt", "at least 1 character"),
        ({"prompt": None}, 400, "prompt", "valid string"),
        ({"quality": "hd"}, 400, "quality", "'auto' or 'standard'"),
        ({"sieze": "16x16", "stepz": 1}, 400, "sieze", "got sieze, stepz"),
        ({"stream": True, "response_format": "url"}, 400, "response_format", "expected response_format b64_json"),
        ({"prompt": "a" * 70_000}, 413, None, "at most 65536 bytes"),
    ],
)
def test_a_bad_request_is_told_why_in_openais_form(
    server: str, body: dict[str, Any], status: int, param: str | None, message: str
) -> None:
    answer = ask(server, **body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert message in error["message"] and error["type"] == "invalid_request_error"
    assert set(error) == {"message", "type", "param", "code"}
    assert ask(server).status_code == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON"),
        (b"", "expected JSON"),
        (b"[]", "expected"),
        (b'"a mug"', "expected"),
        (b"\xff\xfe", "expected"),
        (b'{"prompt": "a", "guidance": NaN}', "finite number"),
        (b'{"prompt": "a", "composition": {"mug": NaN}}', "from -100 to 100"),
        (b'{"model": "x"}', "got nothing"),
        (b"[" * 10_000, "expected"),
        (b'{"prompt": "\\ud800"}', "expected"),
        (b'{"prompt": "a", "n": ' + b"9" * 4_000 + b"}", "`n`"),
        (b'{"prompt": "a", "n": ' + b"9" * 40_000 + b"}", "expected"),
        (b'{"prompt": "a", "composition": {"mug": ' + b"9" * 4_000 + b"}}", "from -100 to 100"),
        (b'{"prompt": "a", "composition": {"mug": ' + b"9" * 40_000 + b"}}", "expected"),
    ],
)
def test_a_body_that_is_no_request(server: str, content: bytes, message: str) -> None:
    answer = httpx2.post(f"{server}/v1/images/generations", content=content)
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert len(answer.content) < 2000
    assert ask(server).status_code == 200


def test_a_body_that_does_not_come_is_waited_for_no_longer() -> None:
    with serving(Slow(), body_seconds=0.2) as (url, service):
        connection = hang_up(url, stream=False, announced=1000)
        connection.settimeout(10)
        said = b"".join(iter(lambda: connection.recv(65536), b""))  # until the server closes the connection
        connection.close()
        assert said.startswith(b"HTTP/1.1 408") and b"expected all of it within 0.2 s" in said
        assert 'qrlora_requests_total{status="408"} 1.0' in service.metrics.text().decode()


def test_more_pictures_than_the_queue_ever_holds_are_no_matter_of_waiting() -> None:
    with serving(Slow(), queue_length=3) as (url, _):
        answer = ask(url, n=4)
        assert answer.status_code == 400 and "expected from 1 to 3" in answer.json()["error"]["message"]


def test_a_body_without_an_announced_length_is_cut_off_too(server: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b" " * 10_000

    with contextlib.suppress(httpx2.TransportError):  # the server may hang up while this still sends
        assert httpx2.post(f"{server}/v1/images/generations", content=endless()).status_code == 413
    assert ask(server).status_code == 200


def test_unknown_paths_and_pictures(server: str) -> None:
    for path, method, status in (
        ("/v1/nothing", "GET", 404),
        ("/v1/images/generations", "GET", 405),
        ("/v1/images/..%2fsecret.png", "GET", 404),
        ("/v1/images/unknown.png", "GET", 404),
    ):
        answer = httpx2.request(method, server + path)
        assert answer.status_code == status and answer.json()["error"]["message"], path
        assert answer.headers.get("allow") == ("POST" if status == 405 else None)


def test_only_bearers_of_a_key_are_served(engine: Engine) -> None:
    with serving(engine, api_keys=("first", "sécond")) as (url, _):
        for key in ("wrong", "firs", "first1", "FIRST"):
            with pytest.raises(openai.AuthenticationError) as refused:
                client(url, key).models.list()
            assert refused.value.response.headers["www-authenticate"] == "Bearer"
        assert ask(url).json()["error"]["code"] == "invalid_api_key"
        assert httpx2.get(f"{url}/v1/models", headers={"Authorization": "Basic first"}).status_code == 401
        assert client(url, "first").models.list().data
        linked = client(url, "first").images.generate(prompt="a mug", response_format="url", extra_body=SHORT)
        assert httpx2.get(linked.data[0].url).status_code == 200  # who knows the name may see it
        assert httpx2.get(f"{url}/health").status_code == 200


def test_a_bad_prompt_is_its_own_requests_fault_alone(engine: Engine, loaded: Any, shelf: Path) -> None:
    made: list[Event] = []

    async def run() -> None:
        pictures = [Request("a mug", 1, {}), Request("mug " * 100, 2, {}), Request("a mug", 3, {"gone": 1.0})]
        async for event in engine.run(Settings(2, 2.0, 16), pictures, False):
            made.append(event)

    asyncio.run(run())
    assert sorted((event.index, type(event)) for event in made if not isinstance(event, Step)) == [
        (0, Made), (1, Refused), (2, Refused)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="schemathesis needs Python 3.11")
@pytest.mark.parametrize("keys", [(), ("secret",)], ids=["open", "keys"])
def test_schemathesis_finds_nothing(tmp_path: Path, keys: tuple[str, ...]) -> None:
    """Requests made from the OpenAPI document, right and wrong ones, with all of its checks."""
    slow = Slow(png=b"a picture")
    slow.gate.set()
    bounds = ["--checks", "all", "--mode", "all", "--max-examples", "40", "--max-time", "30", "--seed", "1"]
    bearing = [part for key in keys for part in ("--header", f"Authorization: Bearer {key}")]
    with serving(slow, api_keys=keys) as (url, _):
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *bounds, *bearing]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "6 selected / 6 total" in found.stdout


def test_a_whole_number_may_be_written_with_a_point(server: str) -> None:
    answer = httpx2.post(f"{server}/v1/images/generations", content=b'{"prompt": "a", "n": 1.0, "steps": 2.0}')
    assert answer.status_code == 200
    refused = httpx2.post(f"{server}/v1/images/generations", content=b'{"prompt": "a", "partial_images": false}')
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "partial_images"


# load, clients that go, ends


class Slow:
    """Engines that wait for a gate in the middle of a batch, and count what they were asked for."""

    def __init__(self, fail: BaseException | None = None, png: bytes = b""):
        self.gate, self.fail, self.png = threading.Event(), fail, png
        self.batches: list[Sequence[Request]] = []
        self.cancelled = 0

    async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
        self.batches.append(pictures)
        try:
            if progress:
                yield Step(1, 2)
            while not self.gate.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.fail:
            raise self.fail
        for index, picture in enumerate(pictures):
            yield Made(index, self.png or picture.prompt.encode())

    async def facts(self) -> Facts:
        return FACTS


def until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to be"
        time.sleep(0.01)


def test_a_full_queue_says_when_to_come_back() -> None:
    slow = Slow()
    with serving(slow, batch_size=2, queue_length=3) as (url, service), ThreadPoolExecutor(8) as pool:
        first = pool.submit(ask, url, n=2)
        until(lambda: slow.batches)
        others = [pool.submit(ask, url, n=1, prompt=f"{i}") for i in range(3)]
        until(lambda: "qrlora_waiting_pictures 3.0" in service.metrics.text().decode())
        refused = ask(url)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError):
            client(url).images.generate(prompt="a mug")
        slow.gate.set()
        assert [one.result().status_code for one in [first, *others]] == [200] * 4
        assert ask(url).status_code == 200
    assert max(map(len, slow.batches)) == 2


def test_a_batch_has_one_setting_and_the_first_come_is_first_served() -> None:
    slow = Slow()
    with serving(slow) as (url, service), ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(ask, url, prompt="0")]
        until(lambda: slow.batches)
        for i, steps in enumerate((3, 4, 3, 4), start=1):
            sent.append(pool.submit(ask, url, prompt=str(i), steps=steps))
            until(lambda i=i: f"qrlora_waiting_pictures {i}.0" in service.metrics.text().decode())
        slow.gate.set()
        assert [opened_text(one.result()) for one in sent] == list("01234")
    assert [[picture.prompt for picture in batch] for batch in slow.batches] == [["0"], ["1", "3"], ["2", "4"]]


def opened_text(answer: httpx2.Response) -> str:
    return base64.b64decode(answer.json()["data"][0]["b64_json"]).decode()


def test_free_engines_share_what_waits() -> None:
    slow = Slow()
    slow.gate.set()

    async def run() -> None:
        dispatcher = Dispatcher(slow, Metrics(), at_once=2, batch_size=8)
        job = dispatcher.submit(Settings(2, 2.0, 16), [Request(str(i), i, {}) for i in range(6)])
        assert [index async for index, _ in job.follow()] and len(slow.batches) == 2
        await dispatcher.drain(1)

    asyncio.run(run())
    assert sorted(map(len, slow.batches)) == [3, 3]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_is_forgotten_before_and_during_its_batch(stream: bool) -> None:
    slow = Slow()
    with serving(slow, batch_size=1) as (url, service):
        started, waiting = hang_up(url, stream), hang_up(url, stream)
        until(lambda: "qrlora_waiting_pictures 1.0" in service.metrics.text().decode() and len(slow.batches) == 1)
        waiting.close()
        until(lambda: "qrlora_waiting_pictures 0.0" in service.metrics.text().decode())
        assert slow.cancelled == 0
        started.close()
        until(lambda: slow.cancelled == 1)
        until(lambda: value(service.metrics.text().decode(), "qrlora_withdrawn_total") == 2)
        slow.gate.set()
        assert ask(url).status_code == 200 and len(slow.batches) == 2


def test_a_batch_whose_pictures_were_all_sent_is_counted() -> None:
    """Its requests are over before the engine is: that is no reason to cancel it."""

    class Lingering(Slow):
        async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
            async for event in super().run(settings, pictures, progress):
                yield event
            await asyncio.sleep(0.3)

    lingering = Lingering()
    lingering.gate.set()
    with serving(lingering) as (url, service):
        assert ask(url).status_code == 200
        until(lambda: value(service.metrics.text().decode(), "qrlora_batch_compositions_sum") == 1)


def test_a_client_that_goes_before_its_stream_begins_is_forgotten_too() -> None:
    """Then nothing of the answer is ever begun, so nothing in it can say that it ended."""
    slow = Slow()
    service = Service(slow, Limits())
    body = json.dumps({"prompt": "a mug", "stream": True}).encode()
    told = iter([{"type": "http.request", "body": body}])
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "method": "POST",
        "path": "/v1/images/generations",
        "query_string": b"",
        "headers": [],
    }

    async def receive() -> Any:
        return next(told, {"type": "http.disconnect"})

    async def send(_: Any) -> None:
        pass

    async def run() -> None:
        await create_app(service)(scope, receive, send)
        await service.dispatcher.drain(0.1)

    asyncio.run(run())
    assert slow.batches == []
    assert value(service.metrics.text().decode(), "qrlora_withdrawn_total") == 1


def hang_up(url: str, stream: bool, announced: int | None = None) -> socket.socket:
    """A connection with a request on it, to be closed before the answer."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "a mug", "stream": stream, **SHORT}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Length: {announced or len(body)}\r\n\r\n"
    connection = socket.create_connection((host, int(port)))
    connection.sendall(head.encode() + body)
    return connection


def test_a_batch_that_nobody_waits_for_stops_between_two_steps(engine: Engine) -> None:
    """With one that is still waited for it goes on."""
    seen: list[int] = []
    hook = engine.pipe.transformer.register_forward_hook(lambda *_: seen.append(1))

    async def run() -> None:
        events = engine.run(Settings(100, 1.0, 16), [Request("a mug", 1, {})], True)
        assert isinstance(await anext(events), Step)
        await events.aclose()
        kept = [event async for event in engine.run(Settings(2, 1.0, 16), [Request("a mug", 1, {})], False)]
        assert len(kept) == 1

    try:
        asyncio.run(run())
    finally:
        hook.remove()
    assert len(seen) < 50


def test_withdrawing_one_of_a_batch_leaves_the_others_their_pictures() -> None:
    slow = Slow()

    async def run() -> None:
        dispatcher = Dispatcher(slow, Metrics())
        jobs = [dispatcher.submit(Settings(2, 2.0, 16), [Request(str(i), i, {})]) for i in range(2)]
        while not slow.batches:
            await asyncio.sleep(0.01)
        dispatcher.withdraw(jobs[0])
        slow.gate.set()
        assert [event async for event in jobs[1].follow()] == [(0, Made(0 if len(slow.batches[0]) == 1 else 1, b"1"))]
        await dispatcher.drain(1)

    asyncio.run(run())
    assert slow.cancelled == 0 and len(slow.batches[0]) == 2


def test_what_breaks_down_in_an_engine_is_said_and_the_next_batch_made(caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow(fail=RuntimeError("a secret of the engine"))
    slow.gate.set()
    with serving(slow) as (url, service):
        broken = ask(url)
        assert broken.status_code == 500 and "secret" not in broken.text
        assert broken.json()["error"]["type"] == "server_error"
        with pytest.raises(openai.APIError, match="broke down"):
            list(client(url).images.generate(prompt="a mug", stream=True))
        slow.fail = None
        assert ask(url).status_code == 200
        assert 'qrlora_requests_total{status="500"} 1.0' in service.metrics.text().decode()
    assert "a secret of the engine" in caplog.text


def test_shutting_down_ends_what_was_begun_and_begins_nothing() -> None:
    slow = Slow()
    with serving(slow, batch_size=1) as (url, service), ThreadPoolExecutor(4) as pool:
        begun = [pool.submit(ask, url), pool.submit(ask, url)]
        until(lambda: slow.batches and "qrlora_waiting_pictures 1.0" in service.metrics.text().decode())
        service.dispatcher.draining = True  # as Dispatcher.drain begins
        refused = ask(url)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "10"
        assert httpx2.get(f"{url}/health").status_code == 503
        slow.gate.set()
        assert [one.result().status_code for one in begun] == [200, 200]


def test_what_takes_too_long_to_end_is_told_so() -> None:
    slow = Slow()

    async def run() -> None:
        dispatcher = Dispatcher(slow, Metrics(), batch_size=1)
        jobs = [dispatcher.submit(Settings(2, 2.0, 16), [Request("a", 1, {})]) for _ in range(2)]
        await asyncio.sleep(0.05)
        await dispatcher.drain(0.1)
        for job in jobs:
            with pytest.raises(RequestError, match="shutting down"):
                [event async for event in job.follow()]

    asyncio.run(run())
    assert slow.cancelled == 1


def test_errors_keep_what_they_say_between_processes() -> None:
    """pickle makes an exception anew from its text alone, unless told."""
    import pickle

    error = pickle.loads(pickle.dumps(Refused(0, DataError("too long", expected=77, got=100, remedy="shorten it"))))
    assert (error.error.what, error.error.expected, error.error.remedy) == ("too long", 77, "shorten it")


def test_kept_pictures_are_bounded_and_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(most_bytes=10, seconds=60)
    names = [kept.put(bytes([i]) * 4) for i in range(3)]
    assert [kept.get(name) for name in names] == [None, b"\x01" * 4, b"\x02" * 4]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert [kept.get(name) for name in names] == [None] * 3
    assert len(set(names)) == 3 and min(map(len, names)) >= 32


def test_a_picture_that_expires_while_it_is_looked_up_is_an_answer_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, clock = Kept(most_bytes=10, seconds=60), itertools.count(time.monotonic(), 40)
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    name = kept.put(b"\x01")
    assert [kept.get(name), kept.get(name)] == [b"\x01", None]


# connections


HALF = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Half: "


def connect(url: str, *sent: bytes) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    for part in sent:
        connection.sendall(part)
    return connection


def seconds_until_closed(connection: socket.socket, dribble: bytes = b"") -> float:
    """How long the server keeps this connection, to which a byte is sent now and then."""
    started = time.monotonic()
    connection.settimeout(0.05)
    with connection, contextlib.suppress(ConnectionError):
        while time.monotonic() < started + 10:
            with contextlib.suppress(TimeoutError):
                if not connection.recv(65536):
                    break
            connection.sendall(dribble)
    return time.monotonic() - started


@pytest.mark.parametrize(
    ("sent", "dribble"),
    [
        (b"", b""),
        (HALF, b""),
        (HALF, b"x"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + HALF, b"x"),  # a second request on the same connection
        (b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n", b"x"),  # a body that is not read
    ],
)
def test_a_client_that_does_not_finish_its_header_is_cut_off(sent: bytes, dribble: bytes) -> None:
    with serving(Slow(), header_seconds=0.5) as (url, _):
        assert seconds_until_closed(connect(url, sent), dribble) < 9


def test_a_client_that_does_not_read_is_cut_off_and_a_slow_one_is_not() -> None:
    """A picture larger than what the kernel buffers for a connection."""
    slow = Slow(png=b"x" * 2**24)
    slow.gate.set()
    with serving(slow, header_seconds=1.5) as (url, service), contextlib.ExitStack() as opened:
        still, reader = (opened.enter_context(hang_up(url, stream=False)) for _ in range(2))
        until(lambda: value(service.metrics.text().decode(), "qrlora_pictures_total") == 2)
        read = 0
        while part := reader.recv(2**20):
            read += len(part)
            time.sleep(0.05)
        assert read > 2**24
        time.sleep(4)
        still.settimeout(10)
        with contextlib.suppress(ConnectionError):
            assert sum(map(len, iter(lambda: still.recv(2**20), b""))) < 2**24


def test_half_headers_make_room_for_requests_and_answers_are_never_cut_for_them() -> None:
    slow = Slow()
    with contextlib.ExitStack() as opened:
        url, service = opened.enter_context(serving(slow, connections=4, header_seconds=30))
        with ThreadPoolExecutor(4) as pool:
            first = pool.submit(ask, url)
            until(lambda: slow.batches)
            for _ in range(20):
                opened.enter_context(connect(url, HALF))
            assert httpx2.get(f"{url}/health").status_code == 200
            others = [pool.submit(ask, url, prompt=str(i)) for i in range(3)]
            until(lambda: "waiting_pictures 3.0" in service.metrics.text().decode() and len(slow.batches) == 1)
            full = httpx2.get(f"{url}/health")
            assert full.status_code == 503 and full.json()["error"]["code"] == "overloaded"
            assert full.headers["retry-after"] == "10" and full.headers["connection"] == "close"
            slow.gate.set()
            assert [one.result().status_code for one in [first, *others]] == [200] * 4


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
from test_serve import FACTS, Limits, Server, Service, Slow
slow = Slow()
slow.gate.set()
Server(Service(slow, Limits()), "127.0.0.1", int(sys.argv[1]), lambda: print("ready", flush=True)).run()
"""


def test_1500_half_headers_and_200_descriptors(tmp_path: Path) -> None:
    """Served while they are held, told apart from no client at all by what the server still writes: next to nothing."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 4096), before[1]))
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    try:
        with started([sys.executable, "-c", LIMITED, str(port)], "ready", tmp_path) as (process, _):
            with contextlib.ExitStack() as held:
                for number in range(1500):
                    with contextlib.suppress(ConnectionError):  # the oldest make room
                        held.enter_context(connect(url)).sendall(HALF)
                    if number % 300 == 0:
                        assert httpx2.get(f"{url}/health", timeout=5).status_code == 200
                answers = [ask(url).status_code for _ in range(20)]
                files = psutil.Process(process.pid).num_fds()
            process.send_signal(signal.SIGTERM)
            said = process.stdout.read()
            assert process.wait(timeout=30) in (0, -signal.SIGTERM)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert answers == [200] * 20 and files < 200 and len(said) < 2000, said


def test_a_process_that_may_open_too_few_files_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (40, 40))
    with pytest.raises(QrloraError, match="ulimit -n"):
        Server(Service(Slow(), Limits()), "127.0.0.1", 0)


def test_what_could_not_be_accepted_is_logged_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    """asyncio has a traceback for each; this is the loop's own way to report one."""

    async def run() -> None:
        for _ in range(50):
            error = OSError(errno.EMFILE, "Too many open files")
            context = {"message": "socket.accept() out of system resource", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)

    Server(Service(Slow(), Limits()), "127.0.0.1", 0)
    asyncio.run(run())
    assert caplog.text.count("\n") == 1 and "Too many open files" in caplog.text


# the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--adapters", "nowhere"], "nowhere is no folder"),
        (["--adapters", ".", "--api-key-file", "none"], "cannot read the API keys in none"),
        (["--adapters", ".", "--api-key-file", "empty"], "empty holds no key"),
        (["--adapters", ".", "--port", "99999"], "cannot listen"),
        (["--adapters", ".", "--host", "192.0.2.1"], "cannot listen"),
        (["--adapters", ".", "--address", "127.0.0.1:1"], "no Ray cluster at 127.0.0.1:1"),
        (["--adapters", ".", "--address", "127.0.0.1:99999"], "expected: HOST:PORT"),
        (["--adapters", ".", "--address", "nowhere"], "expected: HOST:PORT"),
    ],
)
def test_what_cannot_be_served_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: Any, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").write_text("\n\n")
    assert main(["serve", *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lacking", "place", "extra"),
    [("fastapi", [], "serve"), ("ray", ["--address", "local"], "cluster"), ("ray", ["--engines", "2"], "cluster")],
)
def test_without_the_extra_the_command_says_what_to_install(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lacking: str,
    place: list[str],
    extra: str,
) -> None:
    monkeypatch.setitem(sys.modules, lacking, None)
    monkeypatch.delitem(sys.modules, "qrlora.apps.serving.app")
    monkeypatch.setattr(os, "environ", {**os.environ})
    assert main(["serve", "--adapters", str(tmp_path), "--port", str(free_port()), *place]) == 2
    assert f"pip install 'qrlora[{extra}]'" in capsys.readouterr().err


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def environment(tmp_path: Path) -> dict[str, str]:
    here = Path(__file__).parent
    sources = os.pathsep.join(map(str, (here.parents[1] / "src", here, here.parent)))
    return {
        **os.environ,
        "PYTHONPATH": sources,
        "QRLORA_CACHE": str(tmp_path / "cache"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # beside other tests, Ray's 15 let Serve miss its own deadline
    }


def command(tiny_sd3: Path, shelf: Path, port: int, *place: str) -> list[str]:
    what = ["--adapters", str(shelf), "--model", str(tiny_sd3), "--port", str(port), "--threads", "1"]
    return [sys.executable, "-m", "qrlora", "serve", *what, *place]


@contextlib.contextmanager
def started(arguments: list[str], ready: str, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A program that has said a line that begins so, and what it said."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(arguments, env=environment(tmp_path), start_new_session=True, text=True, **pipes) as process:
        try:
            said: list[str] = []
            for line in process.stdout:
                said.append(line)
                if line.startswith(ready):
                    break
            assert said[-1].startswith(ready), "".join(said)
            yield process, said
        finally:
            process.kill()


@pytest.mark.parametrize("place", [[], ["--address", "local"]], ids=["here", "ray"])
def test_the_command_serves_and_ends_gracefully(
    tiny_sd3: Path, shelf: Path, loaded: Any, tmp_path: Path, place: list[str]
) -> None:
    """One process tree from start to end: served, asked, left by a client, told to end while it works."""
    port = free_port()
    (tmp_path / "keys").write_text("secret\n")
    more = ["--api-key-file", str(tmp_path / "keys"), "--max-steps", "5000", *place]
    with started(command(tiny_sd3, shelf, port, *more), "ready at", tmp_path) as (process, said):
        assert any("not served: broken" in line for line in said), "".join(said)
        use_and_end(process, f"http://127.0.0.1:{port}", loaded, shelf)


@pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning")
def test_a_cluster_too_busy_to_serve_is_named_and_not_the_disk(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from qrlora.apps.serving import cluster

    def late(**_: Any) -> None:
        raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(cluster.serve, "start", late)
    with pytest.raises(QrloraError, match="Ray Serve did not start") as raised:
        cluster.start("model", shelf, "float32", cluster.Place(), Limits())
    assert "not available after 60s" in str(raised.value) and "other work" in str(raised.value)


TWO_NODES = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
print("nodes", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def test_two_nodes_of_a_cluster_share_the_work_and_outlive_the_server(
    tiny_sd3: Path, shelf: Path, loaded: Any, tmp_path: Path
) -> None:
    """An engine on each; nothing of the server is left on them when it ends, its port least of all."""
    pytest.importorskip("ray")
    wanted, port = [{"mug": 0.2 * i, "chalk": 0.5} for i in range(6)], free_port()
    with started([sys.executable, "-c", TWO_NODES], "nodes", tmp_path) as (nodes, told):
        place = ["--address", told[-1].split()[1], "--engines", "2"]
        with started(command(tiny_sd3, shelf, port, *place), "ready at", tmp_path) as (server, _):
            engines = parts(nodes, "EngineReplica")
            assert len(engines) == 2 and len({engine.ppid() for engine in engines}) == 2
            with ThreadPoolExecutor(6) as pool:
                url = f"http://127.0.0.1:{port}"
                sent = [pool.submit(ask, url, composition=weights, seed=i) for i, weights in enumerate(wanted)]
                answers = [one.result().json()["data"][0]["b64_json"] for one in sent]
            for i in (1, 5):
                assert close(opened(answers[i]), alone(loaded, shelf, "a mug", i, wanted[i]))
            second = command(tiny_sd3, shelf, free_port(), *place)
            refused = subprocess.run(second, env=environment(tmp_path), capture_output=True, text=True)
            assert refused.returncode == 2 and f"one on 127.0.0.1, port {port}" in refused.stderr
            assert ask(url).status_code == 200
            server.send_signal(signal.SIGTERM)
            assert server.wait(timeout=120) == 0
        until(lambda: not parts(nodes, "ray::Serve") and not parts(nodes, "ray::Proxy"), 30)
        assert nodes.poll() is None and len(parts(nodes, "raylet/raylet")) == 2
        with socket.create_server(("127.0.0.1", port)):
            pass
        nodes.communicate("", timeout=60)


def parts(root: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """The processes under this one whose command has this in it."""
    found = []
    for process in psutil.Process(root.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [process] if name in " ".join(process.cmdline()) else []
    return found


def use_and_end(process: subprocess.Popen[str], url: str, loaded: Any, shelf: Path) -> None:
    images, extra = client(url, "secret").images, {"seed": 3, **SHORT}
    assert ask(url).status_code == 401
    made = images.generate(model=f"{BASE}+mug:0.9+chalk", prompt="a mug", extra_body=extra)
    assert close(opened(made.data[0].b64_json), alone(loaded, shelf, "a mug", 3, {"mug": 0.9, "chalk": 1.0}))
    linked = images.generate(prompt="a mug", response_format="url", extra_body=extra).data[0].url
    assert Image.open(io.BytesIO(httpx2.get(linked).content)).size == (16, 16)
    endless = {**extra, "steps": 5000}
    with images.generate(prompt="a mug", stream=True, extra_body=endless) as events:
        assert next(iter(events)).type == "image_generation.progress"
    until(lambda: value(httpx2.get(f"{url}/metrics").text, "qrlora_running_pictures") == 0)
    with ThreadPoolExecutor(1) as pool:
        last = pool.submit(images.generate, prompt="a mug", extra_body={**extra, "steps": 200})
        until(lambda: value(httpx2.get(f"{url}/metrics").text, "qrlora_running_pictures") == 1)
        assert httpx2.get(f"{url}/health", timeout=30).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert last.result().data[0].b64_json
    assert process.wait(timeout=120) == 0
