"""Every parser meets seeded damage: our own error that names what is wrong, in bounded time and words, or success.

The seeds of text and pictures lie in tests/corpus; safetensors files are made here, in the format of the day. A target
that falls names the mutant's number: `mutant(target, number)` makes it again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import mutations
from qrlora._reading import read_json
from qrlora.apps.cli.serve import _api_keys
from qrlora.apps.serving.app import create_app
from qrlora.apps.serving.protocol import Event, Facts, Limits, Made, Settings
from qrlora.apps.serving.service import Service
from qrlora.errors import AdapterFileError, BasisError, BrandError, DataError, ModelError, QrloraError, RecipeError
from qrlora.lab.baselines.deltas import Delta, load_learned, save_learned
from qrlora.method.adapter import load_adapter, save_adapter
from qrlora.method.basis import Basis
from qrlora.models.exchange import load_any
from qrlora.models.families import find_model
from qrlora.models.request import Request
from qrlora.models.training import checkpoint, dataset
from qrlora.models.training.recipe import Recipe
from qrlora.models.training.sources import find_pictures
from qrlora.quality.brand import BrandSheet
from qrlora.quality.images.read import load_picture
from qrlora.quality.study.votes import checked_key, count_votes, lines, report
from samples import make_adapter, make_basis, make_lora, make_weights

CORPUS = Path(__file__).parents[1] / "corpus"
FEW, MANY = 200, 10_000
LONGEST_MESSAGE = 20_000  # four parts of at most 4 000 characters, and the names of files
LONGEST_TIME = 5.0  # of one mutant, on a machine that does other things besides


@dataclasses.dataclass
class Target:
    """A parser: what damages its input, what its input is called, what reads it, and how it may fail."""

    change: mutations.Change
    name: str
    read: Callable[[Path], object]
    error: type[QrloraError] = QrloraError
    folder: str = ""
    make: Callable[[Path], Sequence[bytes]] | None = None
    beside: tuple[str, ...] = ()

    def seeds(self, work: Path) -> list[tuple[str, bytes]]:
        """(name of the input, its content), undamaged."""
        if self.make:
            return [(self.name, data) for data in self.make(work)]
        files = sorted((CORPUS / self.folder).iterdir())
        return [(self.name or file.name, file.read_bytes()) for file in files]


def adapters(work: Path) -> list[bytes]:
    """One of each spelling."""
    basis = make_basis(work / "basis")
    made = make_adapter(basis, recipe={"steps": 3})
    names = {layer: f"lora_unet_{layer.replace('.', '_')}" for layer in made.deltas}
    save_adapter(made, work / "compact.safetensors")
    save_adapter(made, work / "lora.safetensors", "lora", basis)
    save_adapter(made, work / "kohya.safetensors", "kohya", basis, names=names)
    save_adapter(make_adapter(basis, triangular=False), work / "dense.safetensors")
    save_adapter(make_lora(), work / "plain.safetensors", "lora")
    return [path.read_bytes() for path in sorted(work.glob("*.safetensors"))]


def loras(work: Path) -> list[bytes]:
    """Files of other programs; beside them what PEFT writes."""
    down, up, vector = torch.ones(2, 4), torch.ones(4, 2), torch.ones(())
    config = json.dumps({"transformer.lora_alpha": 4, "transformer.r": 2, "transformer.alpha_pattern": {"to_q": 2}})
    (work / "mutants").mkdir()
    (work / "mutants/adapter_config.json").write_text('{"lora_alpha": 4, "use_rslora": true}')
    plain = {f"transformer.transformer_blocks.0.attn.{layer}.lora_{side}.weight": t
             for layer in ("to_q", "to_k") for side, t in (("A", down), ("B", up))}  # fmt: skip
    kohya = {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight": down,
             "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_up.weight": up,
             "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha": vector}  # fmt: skip
    flux = {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(2, 3072),
            "lora_unet_double_blocks_0_img_attn_proj.lora_up.weight": torch.ones(3072, 2),
            "lora_unet_double_blocks_0_img_attn_proj.alpha": vector}  # fmt: skip
    peft = {f"base_model.model.{key.removeprefix('transformer.')}": tensor for key, tensor in plain.items()}
    q, r = torch.eye(4)[:, :2].contiguous(), torch.ones(2, 4).triu()
    published = {"a.lora.q.weight": q, "a.lora.base_r.weight": r, "a.lora.delta_r.weight": r.clone()}
    old = {
        "transformer_blocks.0.attn.processor.to_q_lora.down.weight": down,
        "transformer_blocks.0.attn.processor.to_q_lora.up.weight": up,
    }
    flux = {key: tensor.bfloat16() for key, tensor in flux.items()}
    files = [plain, kohya, peft, published, old, flux]
    notes: list[dict[str, str] | None] = [{"lora_adapter_metadata": config, "modelspec.title": "a"}, *[None] * 5]
    return [
        safetensors.torch.save({key: tensor.clone() for key, tensor in tensors.items()}, note)
        for tensors, note in zip(files, notes, strict=True)
    ]


def configurations(work: Path) -> list[bytes]:
    """adapter_config.json, beside the file it is of."""
    tensors = {f"base_model.model.transformer_blocks.0.attn.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    (work / "mutants").mkdir()
    safetensors.torch.save_file(tensors, work / "mutants/a.safetensors")
    return [b'{"lora_alpha": 4, "use_rslora": true, "use_dora": false, "alpha_pattern": {"to_q": 2, ".*to_k": 1.5}}']


def run_of(folder: Path) -> tuple[Recipe, dict[str, torch.nn.Parameter], torch.optim.Optimizer]:
    """A recipe, parameters with a gradient, and their optimiser."""
    recipe = Recipe.of({"role": "subject", "images": "a.png", "output": folder / "a.safetensors"})
    parameters = {name: torch.nn.Parameter(torch.ones(2, 3)) for name in ("a", "b")}
    for parameter in parameters.values():
        parameter.grad = torch.ones(2, 3)
    return recipe, parameters, torch.optim.AdamW(parameters.values())


def checkpoints(work: Path) -> list[bytes]:
    recipe, parameters, optimizer = run_of(work)
    optimizer.step()
    return [checkpoint.save(recipe, recipe.run_record(), 1, parameters, optimizer).read_bytes()]


def resumed(path: Path) -> None:
    recipe, parameters, optimizer = run_of(path.parent.parent)
    checkpoint.load(recipe, recipe.run_record(), parameters, optimizer)


WEIGHT = {"a": make_weights()["blocks.0.ff"]}


def bases(work: Path) -> list[bytes]:
    Basis.of(WEIGHT, 4, cache_dir=work / "made")
    [path] = (work / "made").rglob("*.safetensors")
    return [path.read_bytes()]


def from_cached_basis(path: Path) -> None:
    """The damaged file under the name that the cache gives it."""
    Basis.of(WEIGHT, 4, cache_dir=path.parent / "empty")
    [named] = (path.parent / "empty").rglob("*.safetensors")
    named.write_bytes(path.read_bytes())
    Basis.of(WEIGHT, 4, cache_dir=path.parent / "empty")


def latents(work: Path) -> list[bytes]:
    return [safetensors.torch.save({"latents": torch.ones(4, 2, 2)})]


def from_cached_latents(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRLORA_CACHE", str(path.parent))
        if not (path.parent / "encoded").exists():
            dataset._cached("key", lambda: {"latents": torch.ones(4, 2, 2)})
        [named] = (path.parent / "encoded").iterdir()
        named.write_bytes(path.read_bytes())
        dataset._cached("key", lambda: {"latents": torch.ones(4, 2, 2)})


def learned(work: Path) -> list[bytes]:
    save_learned(work / "learned.safetensors", {"a": Delta(torch.ones(4, 2), torch.ones(2, 3))})
    return [(work / "learned.safetensors").read_bytes()]


def counted(key: Path, votes: Path) -> None:
    """A vote count on all its ways out."""
    known = checked_key(read_json(key, "the key", DataError), str(key))
    found = count_votes([read_json(votes, "the votes", DataError)], known, names=[str(votes)])
    json.dumps([found.to_dict(), lines(found)], ensure_ascii=False).encode()
    report(found)


class Instant:
    """Engines that are done at once."""

    async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
        for index in range(len(pictures)):
            yield Made(index, b"png")

    async def facts(self) -> Facts:
        return Facts("pico", side=16, unit=4, largest_side=32, steps=2, guidance=2.0, adapters={"mug": {}, "chalk": {}})


async def answered(app: Any, path: str, method: str, body: bytes, key: bytes) -> tuple[int, bytes]:
    """Status and body of one request to the application, without a socket."""
    sent: list[Any] = []
    asked = iter([{"type": "http.request", "body": body, "more_body": False}])
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
             "raw_path": path.encode("utf-8", "replace"), "query_string": b"", "scheme": "http", "root_path": "",
             "headers": [(b"authorization", b"Bearer " + key)], "server": ("localhost", 80),
             "client": ("localhost", 1)}  # fmt: skip

    async def receive() -> Any:
        for message in asked:
            return message
        return await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    content = b"".join(message.get("body", b"") for message in sent)
    return next(message["status"] for message in sent if "status" in message), content


KEY = "sécond"


@functools.cache
def loop_and_app() -> tuple[asyncio.AbstractEventLoop, Any]:
    return asyncio.new_event_loop(), create_app(Service(Instant(), Limits(api_keys=(KEY,))))


@pytest.fixture(autouse=True, scope="module")
def closed_loop() -> Iterator[None]:
    yield
    loop_and_app()[0].close()


def asked(path: Path) -> None:
    """The text as model in a request, in its path, as the whole body and as key; each is answered, by no 5xx."""
    data = path.read_bytes()
    text = data.decode("utf-8", "replace")
    loop, app = loop_and_app()
    for where, method, body, key in (
        ("/v1/images/generations", "POST", json.dumps({"prompt": "a", "model": text}).encode(), KEY.encode()),
        ("/v1/images/generations", "POST", data, KEY.encode()),
        (f"/v1/models/{text}", "GET", b"", KEY.encode()),
        ("/v1/models", "GET", b"", data),
    ):
        status, answer = loop.run_until_complete(answered(app, where, method, body, key))
        assert status < 500 and len(answer) <= LONGEST_MESSAGE and (key != data or status == 401), (status, answer)
        json.loads(answer)


TARGETS = {
    "adapter": Target(mutations.tensors_changed, "a.safetensors", load_adapter, AdapterFileError, make=adapters),
    "lora": Target(mutations.tensors_changed, "a.safetensors", load_any, AdapterFileError, make=loras),
    "PEFT config": Target(
        mutations.json_changed, "adapter_config.json", lambda path: load_any(path.parent / "a.safetensors"),
        AdapterFileError, make=configurations,
    ),
    "recipe": Target(mutations.toml_changed, "a.toml", Recipe.load, RecipeError, "recipe"),
    "brand": Target(mutations.toml_changed, "a.toml", BrandSheet.load, BrandError, "brand", beside=("logo.png",)),
    "metadata": Target(
        mutations.lines_changed, "metadata.jsonl", lambda path: find_pictures([path.parent]), DataError, "metadata",
        beside=("a.png", "b.png", "b.grey.png"),
    ),
    "caption": Target(
        mutations.text_changed, "a.txt", lambda path: find_pictures([path.parent]), DataError, "caption",
        beside=("a.png",),
    ),
    "key": Target(
        mutations.json_changed, "key.json", lambda path: counted(path, CORPUS / "votes/ann.json"), DataError, "key"
    ),
    "votes": Target(
        mutations.json_changed, "ann.json", lambda path: counted(CORPUS / "key/key.json", path), DataError, "votes"
    ),
    "checkpoint": Target(
        mutations.tensors_changed, "a.checkpoints/step-000001.safetensors", resumed, RecipeError, make=checkpoints
    ),
    "basis cache": Target(mutations.tensors_changed, "damaged", from_cached_basis, BasisError, make=bases),
    "latents cache": Target(mutations.tensors_changed, "damaged", from_cached_latents, make=latents),
    "learned": Target(mutations.tensors_changed, "a.safetensors", load_learned, AdapterFileError, make=learned),
    "picture": Target(mutations.bytes_changed, "", load_picture, DataError, "picture"),
    "model index": Target(
        mutations.json_changed, "model_index.json", lambda path: find_model(str(path.parent)), ModelError, "index"
    ),
    "model field": Target(mutations.text_changed, "model.txt", asked, folder="model"),
    "API keys": Target(mutations.text_changed, "keys.txt", _api_keys, folder="api-keys"),
}  # fmt: skip


def mutant(target: str, number: int, seeds: Sequence[tuple[str, bytes]]) -> tuple[str, bytes]:
    """The damaged input of this number, and what it is called."""
    rng = random.Random(f"{target} {number}")
    name, data = rng.choice(seeds)
    return name, TARGETS[target].change(data, rng)


@contextlib.contextmanager
def felled(fell: dict[str, list[int]], number: int, error: type[QrloraError]) -> Iterator[None]:
    """Note a mutant that is answered by anything but our own error, soon and in few words."""
    started = time.perf_counter()
    try:
        yield
    except error as clean:
        said = str(clean)
        said.encode()
        if len(said) > LONGEST_MESSAGE:
            fell.setdefault(f"{len(said)} characters", []).append(number)
    except Exception as foreign:
        trace = foreign.__traceback__
        while trace and trace.tb_next:
            trace = trace.tb_next
        where = f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}" if trace else ""
        fell.setdefault(f"{type(foreign).__name__} at {where}: {str(foreign)[:200]}", []).append(number)
    if time.perf_counter() - started > LONGEST_TIME:
        fell.setdefault("too slow", []).append(number)


def fall(target: str, count: int, work: Path) -> dict[str, list[int]]:
    """What fell, of so many mutants: the kind of fault, and the mutants' numbers."""
    parser, fell = TARGETS[target], {}
    seeds = parser.seeds(work)
    place = work / "mutants"
    for name in (*parser.beside, *{name for name, _ in seeds}):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
    for name in parser.beside:
        (place / name).write_bytes((CORPUS / "picture/plain.png").read_bytes())
    for name, data in seeds:
        (place / name).write_bytes(data)
        parser.read(place / name)  # sound before it is damaged
        (place / name).unlink()
    for number in range(count):
        name, data = mutant(target, number, seeds)
        (place / name).write_bytes(data)
        with felled(fell, number, parser.error):
            parser.read(place / name)
        (place / name).unlink()
    return fell


@pytest.mark.parametrize("target", TARGETS)
def test_damage_is_told_and_nothing_else_happens(target: str, tmp_path: Path) -> None:
    assert fall(target, FEW, tmp_path) == {}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_much_damage_is_told_and_nothing_else_happens(target: str, tmp_path: Path) -> None:
    assert fall(target, MANY, tmp_path) == {}
