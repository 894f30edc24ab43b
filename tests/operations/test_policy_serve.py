"""The server's allow-list, end to end on pico: what is approved is served, and nothing else is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from company import PEOPLE
from qrlora.apps.serving.app import create_app
from qrlora.apps.serving.engine import Engine
from qrlora.apps.serving.protocol import Limits, Permission
from qrlora.apps.serving.service import Service
from qrlora.errors import PolicyError
from qrlora.method.adapter import adapter_from_model, remove_adapters, save_adapter
from qrlora.models.families import load_pipeline
from qrlora.models.training.attach import peft_config
from qrlora.models.training.recipe import Recipe
from qrlora.operations.policy.approval import approve, request, revoke
from qrlora.operations.policy.check import activate
from qrlora.operations.policy.combination import Combination, Part
from qrlora.operations.policy.rules import Policy
from qrlora.operations.provenance.keys import SigningKey, Trust
from qrlora.operations.registry import Registry
from qrlora.operations.registry.intake import add_adapter, add_base


def save_random(folder: Path, name: str, role: str, seed: int) -> Path:
    """A random adapter of this role on pico."""
    pipe, family = load_pipeline("pico", device="cpu")
    denoiser = family.denoiser_of(pipe)
    recipe = Recipe.of({"role": role, "images": "a.png", "rank": 2, "model": "pico"})
    denoiser.add_adapter(peft_config(recipe, family), adapter_name=role)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in denoiser.named_parameters():
        if "lora_" in parameter_name and parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=generator)
    made = adapter_from_model(denoiser, role, family=family.name, role=role, base_model="pico", licence="MIT")
    remove_adapters(denoiser, [role])
    save_adapter(made, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


class Shop:
    """A registry with pico and two adapters, a folder that serves them, and a reviewer's key."""

    def __init__(self, folder: Path):
        (folder / "shelf").mkdir()
        self.registry, self.shelf = Registry.open(folder / "registry", actor="ada"), folder / "shelf"
        self.loop = asyncio.new_event_loop()  # one for all requests: the queues' tasks live in it
        self.base = add_base(self.registry, "pico", licence="Apache-2.0")
        self.paths = {
            name: save_random(self.shelf, name, role, seed)
            for seed, (name, role) in enumerate((("teapot", "subject"), ("chalk", "style")))
        }
        self.adapters = {name: add_adapter(self.registry, path, name=name) for name, path in self.paths.items()}
        self.keys = {name: SigningKey.create(folder / "keys", name) for name in PEOPLE}
        trust = Trust()
        for name, roles in PEOPLE.items():
            trust.add(name, roles, self.keys[name].public_pem)
        trust.save(self.registry.folder / "trust.json")

    def approved(self, weights: dict[str, float], null_space: float, policy: Policy | None, *prompts: str) -> str:
        parts = tuple(Part(self.adapters[name], weight) for name, weight in weights.items())
        asked = request(self.registry, Combination(self.base, parts, null_space, prompts), policy)
        return approve(self.registry, asked.digest, self.keys["grace"], policy).digest


@pytest.fixture(scope="module")
def engine_and_shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Shop]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QRLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        shop = Shop(tmp_path_factory.mktemp("shop"))
        engine = Engine("pico", shop.shelf)
        yield engine, shop
        engine.close()
        shop.loop.close()


class Client:
    """Sends requests to the application itself."""

    def __init__(self, engine: Engine, shop: Shop, **permission: Any):
        allowed = {"registry": str(shop.registry.folder), "policy": None, "approval": True, "model": "pico"}
        self.service = Service(engine, Limits(permission=Permission(**{**allowed, **permission})))
        self.loop = shop.loop

    def ask(self, model: str, **fields: Any) -> tuple[int, str]:
        """Status and error message of a request for a picture of two steps."""
        body = {"model": model, "prompt": "a teapot", "steps": 2, "seed": 1, **fields}

        async def send() -> tuple[int, str]:
            transport = httpx2.ASGITransport(app=create_app(self.service))
            async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
                answer = await asyncio.wait_for(client.post("/v1/images/generations", json=body), 60)
                return answer.status_code, answer.json().get("error", {}).get("message", "")

        return self.loop.run_until_complete(send())


def test_only_what_is_approved_is_served(engine_and_shop: tuple[Engine, Shop]) -> None:
    engine, shop = engine_and_shop
    client = Client(engine, shop)
    good = "pico+teapot:0.9+chalk:0.8"
    status, said = client.ask(good)
    assert status == 403 and "approved by nobody" in said and "approval request" in said
    given = shop.approved({"teapot": 0.9, "chalk": 0.8}, 0.5, None)
    # Re-read without a restart; the default strength of a subject with a style is 0.5, in whatever order.
    assert [client.ask(one)[0] for one in (good, "pico+chalk:0.8+teapot:0.9")] == [200, 200]
    assert client.ask(good, null_space=0.5, prompt="anything at all")[0] == 200
    refused = {
        "pico+teapot:0.9+chalk:0.81": "is 0.81, approved was 0.8",
        "pico+teapot:0.9": "adapters are",
        "pico": "approved by nobody",
    }
    for model, why in refused.items():
        status, said = client.ask(model)
        assert status == 403 and why in said, (model, said)
    status, said = client.ask(good, null_space=0.4)
    assert status == 403 and "null-space strength is 0.4" in said
    refusals = [entry for entry in shop.registry.log() if entry.action == "refused"]
    assert len(refusals) >= 5
    revoke(shop.registry, given, shop.keys["grace"], "the handle is wrong")
    status, said = client.ask(good)
    assert status == 403 and "revoked by grace" in said


def test_prompts_that_the_approval_names(engine_and_shop: tuple[Engine, Shop]) -> None:
    engine, shop = engine_and_shop
    client = Client(engine, shop)
    shop.approved({"chalk": 0.5}, 0.0, None, "a teapot")
    assert client.ask("pico+chalk:0.5")[0] == 200
    status, said = client.ask("pico+chalk:0.5", prompt="a gun")
    assert status == 403 and "is none of the 1 approved" in said


def test_a_file_that_is_replaced_is_not_the_one_that_was_approved(engine_and_shop: tuple[Engine, Shop]) -> None:
    engine, shop = engine_and_shop
    client, path = Client(engine, shop), shop.paths["teapot"]
    shop.approved({"teapot": 1.0}, 0.0, None)
    assert client.ask("pico+teapot")[0] == 200
    before = path.read_bytes()
    try:
        save_random(shop.shelf, "teapot", "subject", seed=9)
        status, said = client.ask("pico+teapot")
        assert status == 403 and "approved by nobody" in said
    finally:
        path.write_bytes(before)
    assert client.ask("pico+teapot")[0] == 200


def test_what_cannot_be_found_out_is_not_served(engine_and_shop: tuple[Engine, Shop]) -> None:
    engine, shop = engine_and_shop
    client, trust = Client(engine, shop), shop.registry.folder / "trust.json"
    shop.approved({"chalk": 0.7}, 0.0, None)
    assert client.ask("pico+chalk:0.7")[0] == 200
    before = trust.read_bytes()
    try:
        trust.write_text("nobody")
        status, said = client.ask("pico+chalk:0.7")
        assert status == 503 and "cannot be found out" in said
        trust.unlink()
        assert client.ask("pico+chalk:0.7")[0] == 403
    finally:
        trust.write_bytes(before)
    assert client.ask("pico+chalk:0.7")[0] == 200


def test_a_policy_alone_is_kept_by_the_server(engine_and_shop: tuple[Engine, Shop], tmp_path: Path) -> None:
    engine, shop = engine_and_shop
    rules = tmp_path / "policy.toml"
    rules.write_text('name = "w"\nversion = 1\n[[weight]]\nat_most = 1.0\n[forbidden]\nwords = ["cheap"]\n')
    client = Client(engine, shop, registry=None, policy=rules, approval=False)
    assert client.ask("pico+chalk:1.0")[0] == 200
    status, said = client.ask("pico+chalk:1.5")
    assert status == 403 and "at weight 1.5" in said
    status, said = client.ask("pico+chalk:1.0", prompt="a cheap teapot")
    assert status == 403 and "has 'cheap'" in said
    for prompt, status in (("a cheap teapot", 403), ("a teapot", 200)):  # one prompt's word refuses no other prompt
        assert client.ask("pico+chalk:0.9", prompt=prompt)[0] == status
    rules.write_text('name = "w"\nversion = 1\n[[weight]]\nat_most = 0.5\n')
    assert client.ask("pico+chalk:1.0")[0] == 403
    rules.write_text("no policy")
    assert client.ask("pico+chalk:0.1")[0] == 503
    with pytest.raises(PolicyError):
        Client(engine, shop, registry=None, policy=rules, approval=False)


def test_a_policy_that_is_activated_while_it_serves(engine_and_shop: tuple[Engine, Shop]) -> None:
    engine, shop = engine_and_shop
    client = Client(engine, shop, approval=False)
    assert client.ask("pico+chalk:0.3")[0] == 200
    shop.registry.add(b"a picture", "generated", keep=False)
    assert client.ask("pico+chalk:0.3")[0] == 200
    activate(shop.registry, Policy.parse({"name": "p", "version": 1, "approval": {}}))
    assert client.ask("pico+chalk:0.3")[0] == 403


def test_the_check_is_timed(engine_and_shop: tuple[Engine, Shop]) -> None:
    engine, shop = engine_and_shop
    client = Client(engine, shop)
    client.ask("pico+chalk:0.3")
    text = client.service.metrics.text().decode()
    assert "qrlora_permission_seconds_count 1.0" in text
