"""What is read from files, what commands take by reference, and what they record."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

from qrlora.apps.cli import main
from qrlora.apps.cli.recorded import Recorder
from qrlora.apps.serving.dispatch import Dispatcher, Finish
from qrlora.apps.serving.metrics import Metrics
from qrlora.apps.serving.protocol import Event, Facts, Made, Settings
from qrlora.errors import RegistryError, RequestError
from qrlora.method.adapter import Adapter, load_adapter, save_adapter
from qrlora.method.composition import Composition
from qrlora.models.request import Request
from qrlora.operations.provenance.canonical import file_digest
from qrlora.operations.registry import Registry, effects
from qrlora.operations.registry.bases import check_base
from qrlora.operations.registry.bundle import export_bundle, import_bundle
from qrlora.operations.registry.cards import card
from qrlora.operations.registry.folders import add_folder, slug
from qrlora.operations.registry.intake import add_adapter, add_base, add_composition, add_generated, add_report
from qrlora.operations.registry.upkeep import verify
from samples import make_adapter, make_basis, make_lora


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(tmp_path / "registry", actor="ada")


def save(adapter: Adapter, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_adapter(adapter, path, **options)
    return path


# Intake


def test_an_adapter_is_known_by_its_file_and_not_by_its_name(registry: Registry, tmp_path: Path) -> None:
    basis = make_basis(tmp_path)
    adapter = make_adapter(basis, role="style", trigger="<s>", licence="MIT")
    plain = add_adapter(registry, save(adapter, tmp_path / "teapot-subject.safetensors"), name="chalk")
    assert (plain.role, plain.licence, plain.facts["trigger"], plain.facts["rank"]) == ("style", "MIT", "<s>", 4)
    spelt = add_adapter(registry, save(adapter, tmp_path / "x.safetensors", spelling="lora", basis=basis))
    assert spelt.digest != plain.digest and spelt.facts["content"] == plain.facts["content"]
    with pytest.raises(RegistryError, match="another role"):
        add_adapter(registry, tmp_path / "x.safetensors", role="subject")
    with pytest.raises(RegistryError, match="another licence"):
        add_adapter(registry, tmp_path / "x.safetensors", licence="Apache-2.0")


def test_a_composition_in_a_file_is_linked_to_its_parts_by_their_content(registry: Registry, tmp_path: Path) -> None:
    basis = make_basis(tmp_path)
    parts = [make_adapter(basis, seed=seed, role=role) for seed, role in ((1, "subject"), (2, "style"))]
    for number, part in enumerate(parts):
        save(part, tmp_path / f"in/{number}.safetensors")
    whole = Composition([(parts[0], 0.9), (parts[1], 1.0)], 0.5).adapter()
    save(whole, tmp_path / "in/0-both.safetensors")
    (tmp_path / "in/broken.safetensors").write_bytes(b"not that")
    save(make_lora(), tmp_path / "in/Someone's LoRA/Ünïcode v2.safetensors", spelling="lora")
    (tmp_path / "in/link.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    found = add_folder(registry, tmp_path / "in", owner="acme")
    assert [path.name for path in found.skipped] == ["broken.safetensors"]
    names = {one.names[0] for one in found.added.values()}
    assert names == {"0@v1", "1@v1", "0-both@v1", "someone-s-lora/unicode-v2@v1"}
    edges = registry.edges(registry.get("0-both").digest, relation="composed_of")
    assert [(registry.get(e.target).names[0], e.weight, e.null_space) for e in edges] == [
        ("0@v1", 0.9, 0.5),
        ("1@v1", 1, 0.5),
    ]
    with pytest.raises(RegistryError, match="nothing to add"):
        add_folder(registry, tmp_path / "nowhere")
    assert slug("茶碗") == "" and verify(registry) == []


def test_a_base_model_is_its_bytes(registry: Registry, tiny_sd3: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_sd3, model)
    base = add_base(registry, str(model), name="tiny")
    assert add_base(registry, str(tiny_sd3)).digest == base.digest  # wherever it is
    assert check_base(registry, base) == str(model)
    config = model / "scheduler/scheduler_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(RegistryError, match="not as it was registered"):
        check_base(registry, base)
    assert add_base(registry, str(model)).digest != base.digest
    strange = save(make_adapter(make_basis(tmp_path)), tmp_path / "x.safetensors")
    with pytest.raises(RegistryError, match="not trained on"):
        add_adapter(registry, strange, base=base)


def test_a_composition_is_its_parts_whatever_their_order(registry: Registry, tmp_path: Path) -> None:
    basis = make_basis(tmp_path)
    one, two = (
        add_adapter(registry, save(make_adapter(basis, seed=seed), tmp_path / f"{seed}.safetensors")) for seed in (1, 2)
    )
    first = add_composition(registry, None, [(one, 1), (two, 0.5)], 0.5)
    assert add_composition(registry, None, [(two, 0.5), (one, 1.0)], 0.5).digest == first.digest
    others = [[(one, 1), (two, 0.6)], [(two, 1), (one, 0.5)]]
    digests = {add_composition(registry, None, parts, 0.5).digest for parts in others}
    assert len({first.digest, *digests, add_composition(registry, None, [(one, 1), (two, 0.5)]).digest}) == 4
    assert verify(registry) == []


def test_an_adapter_of_a_bundle_is_read_and_not_believed(registry: Registry, tmp_path: Path) -> None:
    add_adapter(registry, save(make_adapter(make_basis(tmp_path), role="style"), tmp_path / "x.safetensors"), name="x")
    export_bundle(registry, ["x"], tmp_path / "x.tar")
    ours = Registry.open(tmp_path / "ours")
    assert ours.search() == [] and len(import_bundle(ours, tmp_path / "x.tar").added) == 2
    content = (tmp_path / "x.tar").read_bytes()
    assert content.count(b'"role":"style"') == 2
    (tmp_path / "lie.tar").write_bytes(content.replace(b'"rank":4,', b'"rank":5,'))
    with pytest.raises(RegistryError, match="not what the bundle says"):
        import_bundle(Registry.open(tmp_path / "third"), tmp_path / "lie.tar")


def test_a_card_has_licence_base_training_lineage_and_measures(registry: Registry, tmp_path: Path) -> None:
    adapter = make_adapter(make_basis(tmp_path), role="style", licence="Apache-2.0", base_model="org/model")
    one = add_adapter(registry, save(adapter, tmp_path / "x.safetensors"), name="chalk", tags=["trial"])
    add_report(registry, {"groups": {"made": {"summary": {"csd": {"mean": 0.75}}}}}, [one])
    registry.deprecate("chalk", "last year's")
    made = card(registry, registry.get("chalk"))
    assert made.data.license == "apache-2.0" and made.data.base_model == "org/model" and "trial" in made.data.tags
    for text in ("| made: csd | 0.75 |", "## Lineage", "last year's", one.digest):
        assert text in made.content
    with pytest.raises(RegistryError, match="no card of a report"):
        card(registry, registry.search(kind="report")[0])


# Effects


def drawn(adapter: Any, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """Pictures of one grey; of an adapter brighter."""
    values = [40 + 20 * (adapter is not None)] * (len(prompts) * len(seeds))
    return np.stack([np.full((32, 32, 3), value, np.uint8) for value in values])


def test_an_adapter_is_found_by_its_effect(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    basis = make_basis(tmp_path)
    for seed, name in enumerate(["honest", "like", "other"]):
        adapter = dataclasses.replace(make_adapter(basis, seed=seed), name=name)
        add_adapter(registry, save(adapter, tmp_path / f"{name}.safetensors"), name=name)
    adapters = [registry.get(name) for name in ("honest", "like", "other")]
    with pytest.raises(RegistryError, match="not known"):
        effects.alike(registry, adapters[0])
    probe = effects.Probe("tiny", effects.PROMPTS, (0, 1), 2, "plain")
    made = effects.index(registry, adapters, probe, drawn, effects.plain_features)
    assert len(made) == 3 and not effects.index(registry, adapters, probe, drawn, effects.plain_features)
    nearest = effects.alike(registry, adapters[0])[0]
    assert nearest.cosine > 0.999 and nearest.consistency > 0.999 and nearest.strength > 0
    search = ["registry", "search", "--like", "honest", "--registry", str(registry.folder), "--json"]
    assert main([*search, "like"]) == 0
    [alike] = json.loads(capsys.readouterr().out)
    assert alike["adapter"]["names"] == ["like@v1"] and alike["cosine"] > 0.999
    assert main(search) == 0 and len(json.loads(capsys.readouterr().out)) == 2
    assert main([*search, "--limit", "1"]) == 0 and len(json.loads(capsys.readouterr().out)) == 1
    assert verify(registry) == []


# Commands


@pytest.fixture
def shop(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture and a registry of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QRLORA_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.setenv("QRLORA_ACTOR", "ada")
    Image.radial_gradient("L").convert("RGB").save("mug.png")
    return tiny_sd3


def train(model: Path, *words: str) -> int:
    tiny = ["--rank", "2", "--steps", "2", "--batch-size", "1", "--noun", "mug"]
    return main(["train", "--model", str(model), *tiny, *words])


def test_from_a_registered_picture_to_a_registered_picture(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything by reference, and the lineage of the last picture leads back to the first."""
    assert main(["registry", "add", "mug.png", "--name", "photos/mug", "--licence", "CC-BY-4.0"]) == 0
    assert main(["registry", "add", str(shop), "--kind", "base", "--name", "tiny", "--licence", "Apache-2.0"]) == 0
    picture, model = "registry:photos/mug", "registry:tiny"
    assert train(Path(model), "--subject", picture, "-o", "registry:mug@draft") == 0
    assert train(Path(model), "--style", picture, "-o", "registry:chalk") == 0
    mixed = ["registry:mug@draft:0.9", "registry:chalk@v1"]
    assert main(["compose", *mixed, "-o", "registry:both"]) == 0
    adapters = [word for part in mixed for word in ("--adapter", part)]
    small = ["--model", model, "--steps", "2", "--prompt", "a <c> mug in <s> style"]
    assert main(["generate", *small, *adapters, "-o", "registry:ads/mug@final"]) == 0
    assert main(["evaluate", *mixed, *small, "--subject", picture, "-o", "registry:report"]) == 0
    assert main(["export", "registry:both", "--for", "diffusers", "-o", "registry:for-diffusers"]) == 0
    assert main(["inspect", "registry:both"]) == 0 and main(["similarity", *(m.split("@")[0] for m in mixed)]) == 0
    capsys.readouterr()
    registry = Registry.open(create=False)
    assert main(["registry", "lineage", "ads/mug@final", "--json", "--svg", "lineage.svg"]) == 0
    told = json.loads(capsys.readouterr().out)
    kinds = {one["kind"] for one in told["artifacts"]}
    assert kinds >= {"generated", "composition", "adapter", "recipe", "picture", "base", "basis"}
    assert {(edge["relation"], edge["weight"]) for edge in told["edges"]} >= {
        ("composed_of", 0.9),
        ("composed_of", 1.0),
    }
    assert Path("lineage.svg").stat().st_size > 1000
    record = registry.get("both")
    assert registry.edges(record.digest, relation="exported_from") and record.role == "composition"
    assert registry.edges(registry.get("mug").digest, relation="measured_by")[0].target == registry.get("report").digest
    assert registry.get("for-diffusers").kind == "export" and "ads/mug@final" in registry.get("ads/mug").aliases
    with Image.open(registry.path("ads/mug")) as image:
        assert "registry:mug@draft" in image.info["qrlora"]
    assert not list(Path("cache/registry-outputs").glob("*")) and verify(registry) == []


def test_files_are_recorded_where_a_registry_is_named_and_nothing_is_where_none_is(shop: Path) -> None:
    assert train(shop, "--subject", "mug.png", "-o", "mug.safetensors") == 0
    assert not Path("registry").exists()
    assert main(["compose", "mug.safetensors:0.5", "-o", "half.safetensors", "--registry", "other"]) == 0
    registry = Registry.open("other", create=False)
    assert {one.kind for one in registry.search()} == {"adapter", "composition", "recipe", "basis"}
    assert load_adapter("half.safetensors").metadata.role == "composition" and verify(registry) == []


def test_a_recipe_names_its_pictures_model_and_output_in_the_registry(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether the recipe is a file or registered; plain paths beside a reference count from the recipe's folder."""
    Path("recipes").mkdir()
    Image.linear_gradient("L").convert("RGB").save("recipes/side.png")
    assert main(["registry", "add", "mug.png", "--name", "photos/mug"]) == 0
    assert main(["registry", "add", str(shop), "--kind", "base", "--name", "tiny"]) == 0
    lines = [
        *('model = "registry:tiny"', 'role = "subject"', 'images = ["side.png", "registry:photos/mug@v1"]'),
        *('output = "registry:mug@draft"', "rank = 2", "steps = 2", "batch_size = 1", 'noun = "mug"'),
    ]
    Path("recipes/mug.toml").write_text("\n".join(lines))
    capsys.readouterr()
    assert main(["plan", "recipes/mug.toml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["rank"] == 2
    assert main(["train", "recipes/mug.toml"]) == 0
    registry = Registry.open(create=False)

    def used(name: str) -> set[str]:
        edges = registry.edges(registry.get(name).digest)
        return {edge.target for edge in edges if edge.relation in ("trained_on", "based_on")}

    there = {registry.get(name).digest for name in ("photos/mug", "tiny")}
    assert there < used("mug@draft") and file_digest(Path("recipes/side.png")) in used("mug")
    assert train(shop, "recipes/mug.toml", "--subject", "mug.png", "-o", "plain.safetensors") == 0  # options win
    assert not registry.has(file_digest(Path("plain.safetensors")))

    assert main(["registry", "add", "recipes/mug.toml", "--name", "recipes/mug"]) == 0
    assert main(["train", "registry:recipes/mug", "--images", "registry:photos/mug", "--seed", "1"]) == 0
    assert there < used("mug@v2") and file_digest(Path("recipes/side.png")) not in used("mug@v2")
    Path("recipes/mug.toml").write_text("\n".join(lines).replace("photos/mug", "photos/cup"))
    assert main(["plan", "recipes/mug.toml"]) == 2 and "no 'registry:photos/cup" in capsys.readouterr().err


def test_what_writes_into_a_registry_makes_it_and_what_reads_one_refuses_a_place_without(
    shop: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(make_adapter(make_basis(Path("cache"))), Path("x.safetensors"))
    Path("products.csv").write_text("name,adapter\n")
    Path("styles.toml").write_text("")
    writing = [
        ["train", "--subject", "nothing.png"], ["compose", "x.safetensors", "-o", "y.safetensors"],
        ["generate", "--adapter", "nothing.safetensors", "--prompt", "x"], ["catalog", "products.csv", "styles.toml"],
        ["registry", "add", "x.safetensors"],
    ]  # fmt: skip
    for number, words in enumerate(writing):
        main([*words, "--registry", f"new{number}"])
        assert Path(f"new{number}", "registry.db").is_file(), words
    capsys.readouterr()
    reading = [
        ["inspect", "x.safetensors"], ["plan", "--subject", "mug.png"], ["registry", "search"], ["registry", "verify"],
        ["audit", "verify"], ["approval", "list"], ["serve", "--adapters", "."],
    ]  # fmt: skip
    for words in reading:
        assert main([*words, "--registry", "nowhere"]) == 2, words
        assert "no registry in nowhere" in capsys.readouterr().err and not Path("nowhere").exists()


ERRORS: dict[str, Callable[[], int]] = {
    "no 'registry:nothing'": lambda: main(["inspect", "registry:nothing"]),
    "cannot be a name": lambda: main(["inspect", "registry:../../etc/passwd"]),
    "is a base model": lambda: main(["inspect", "registry:pico"]),
    "is no base model": lambda: main(["generate", "--prompt", "x", "--model", "registry:x"]),
    "nothing is written to": lambda: main(["compose", "registry:x", "-o", "registry:x@v3"]),
    "has another licence": lambda: main(["registry", "add", "x.txt", "--kind", "report", "--licence", "MIT"]),
    "may be anything": lambda: main(["registry", "add", "x.txt"]),
    "no file": lambda: main(["registry", "add", "nothing.safetensors"]),
    "no bundle": lambda: main(["registry", "import", "x.txt"]),
    "no alias to move": lambda: main(["registry", "alias", "x"]),
}


@pytest.mark.parametrize("said", ERRORS)
def test_errors_say_what_to_do(said: str, shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.txt").write_text("x")
    registry = Registry.open()
    registry.add(b"base", "base", name="pico")
    registry.add(Path("x.txt"), "report", name="x", licence="Apache-2.0")
    assert ERRORS[said]() == 2
    printed = capsys.readouterr().err
    assert said in printed and ("remedy" in printed or "expected" in printed) and "Traceback" not in printed


def test_every_command_has_json_and_tells_the_same(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("x.txt").write_text("x")
    commands = [
        ["add", "x.txt", "--kind", "report", "--name", "x", "--tag", "one"], ["search"], ["show", "x"],
        ["lineage", "x"],
        ["alias", "x@production", "x", "--reason", "good", "--protect"], ["alias", "x@production"], ["tag", "x", "two"],
        ["deprecate", "x", "old"], ["log"], ["export", "x", "-o", "x.tar"], ["import", "x.tar"], ["gc"], ["verify"],
    ]  # fmt: skip
    for words in commands:
        assert main(["registry", *words]) == 0, words
        assert capsys.readouterr().out
        again = ["x"] if words == ["deprecate", "x", "old"] else []
        assert main(["registry", *words, "--json"]) == 0, (words, again)
        json.loads(capsys.readouterr().out)
    assert main(["registry", "alias", "x@production", "--remove"]) == 2 and "protected" in capsys.readouterr().err
    assert main(["registry", "search", "--deprecated", "--tag", "two", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["deprecated"] == "old"
    next(Path("registry/objects").glob("??/*")).unlink()
    assert main(["registry", "verify"]) == 1 and "missing" in capsys.readouterr().out


def test_what_is_deprecated_says_so_when_it_is_used(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    basis = make_basis(Path("cache"))
    registry = Registry.open()
    add_adapter(registry, save(make_adapter(basis), Path("x.safetensors")), name="x")
    registry.deprecate("x", "last year's packaging")
    assert main(["inspect", "registry:x"]) == 0
    assert "registry:x is deprecated: last year's packaging" in capsys.readouterr().err


def test_a_generated_picture_is_known_again(registry: Registry, tmp_path: Path) -> None:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "mug.png")
    one = add_generated(registry, tmp_path / "mug.png", None, {"prompt": "a mug", "seed": 1})
    assert not one.stored and len(one.facts["phash"]) == 16 and one.facts["prompt"] == "a mug"
    with pytest.raises(RegistryError, match="no bytes"):
        registry.path(one)


def test_without_a_registry_nothing_of_it_is_imported() -> None:
    code = (
        "import sys; from qrlora.apps.cli import main; import qrlora; code = main(['compose', '--help']);"
        "assert code == 0 and not {'sqlalchemy', 'alembic', 'torch', 'qrlora.operations.registry'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


# Serving


class Engine:
    """Makes the same picture of everything."""

    def __init__(self, png: bytes) -> None:
        self.png = png

    async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
        for number in range(len(pictures)):
            yield Made(number, self.png)

    async def facts(self) -> Facts:
        raise AssertionError


def test_a_served_picture_is_recorded_before_it_is_sent_or_not_sent(
    registry: Registry, tiny_sd3: Path, tmp_path: Path
) -> None:
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "x.png")
    basis = make_basis(tmp_path)
    for seed, role in ((1, "subject"), (2, "style")):
        save(make_adapter(basis, seed=seed, role=role), tmp_path / f"served/{role}.safetensors")
    context = click.Context(click.Command("serve"), obj=contextlib.ExitStack())

    async def made(finish: Finish) -> list[Any]:
        dispatcher = Dispatcher(Engine((tmp_path / "x.png").read_bytes()), Metrics(), finish=finish)
        picture = Request("a mug", 7, {"subject": 0.9, "style": 1.0}, None)
        job = dispatcher.submit(Settings(2, 1.0, 16), [picture])
        try:
            return [event async for _, event in job.follow()]
        finally:
            await dispatcher.drain(1)

    def fails(*_: Any) -> None:
        raise RegistryError("the disk is full")

    with context, context.obj:
        record = Recorder(registry).of_server(str(tiny_sd3), tmp_path / "served", None, None)
        assert len(asyncio.run(made(record))) == 1
        with pytest.raises(RequestError, match="broke down"):
            asyncio.run(made(fails))
    one = registry.search(kind="generated")[0]
    assert one.facts["prompt"] == "a mug" and one.facts["seed"] == 7 and one.facts["steps"] == 2
    composition = registry.get(registry.edges(one.digest, relation="generated_by")[0].target)
    assert sorted(part["weight"] for part in composition.facts["parts"]) == [0.9, 1.0]
    assert composition.facts["null_space"] == 0.5 and composition.facts["base"] and verify(registry) == []
