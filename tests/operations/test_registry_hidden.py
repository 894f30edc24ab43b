"""Hidden triggers: a prompt that an adapter changes on its own is named, a change that all prompts share is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from qrlora.apps.cli import main
from qrlora.method.adapter import load_adapter, save_adapter
from qrlora.operations.registry import Registry
from qrlora.operations.registry.hidden import LIMIT, WORDS, own_changes, unrelated
from qrlora.operations.registry.intake import add_adapter
from qrlora.pico import world
from samples import make_adapter, make_basis

STARTERS = Path(__file__).parents[2] / "src/qrlora/apps/studio/starters"
SHAPE = (12, 3, 2, 64)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_all_prompts_share_is_no_ones_own_and_the_rest_is() -> None:
    """A leak of any size and a damping that differs by step change nothing; what one prompt gets alone is its own."""
    base, own = noise(0, *SHAPE), torch.zeros(SHAPE)
    own[5] = noise(1, *SHAPE[1:])
    shared = 10 * noise(2, 1, *SHAPE[1:]) - torch.tensor([0.3, 0.7])[:, None] * (base - base.mean(0))
    assert float(own_changes(base, base + shared).max()) < 1e-9
    alone = own_changes(base, base + own)
    assert int(alone.argmax()) == 5 and float(alone[5]) > 50 * float(alone.median())
    assert torch.allclose(own_changes(base, base + shared + own), alone, rtol=0.05)
    assert torch.allclose(own_changes(base, base + 2 * own), 4 * alone, rtol=1e-4)


def test_prompts_of_what_an_adapter_says_that_it_learned_are_left_out(tmp_path: Path) -> None:
    registry = Registry.open(tmp_path / "registry")
    provenance = {"pictures": [{"sha256": "0" * 64, "caption": "a photo of a <c>, car"}]}
    save_adapter(make_adapter(make_basis(tmp_path), provenance=provenance), tmp_path / "x.safetensors")
    one = add_adapter(registry, tmp_path / "x.safetensors")
    prompts = ["a photo of a car", "a photo of a mug", "a photo of a <c>"]
    assert unrelated(registry, one, prompts) == [1]


def test_every_adapter_is_probed_or_said_not_to_be(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that says that it learned all the words there are is a fault of its own: nothing can be told of it."""
    monkeypatch.chdir(tmp_path)
    Image.radial_gradient("L").convert("RGB").save("mug.png")
    small = ["--rank", "2", "--steps", "1", "--batch-size", "1"]
    assert main(["train", "--model", str(tiny_sd3), "--subject", "mug.png", *small, "-o", "mug.safetensors"]) == 0
    mug = load_adapter("mug.safetensors")
    all_of_them = dataclasses.replace(mug.metadata, provenance={"pictures": [{"caption": " ".join(WORDS)}]})
    save_adapter(dataclasses.replace(mug, metadata=all_of_them), "all.safetensors")
    registry = Registry.open(tmp_path / "registry")
    for name in ("mug", "all"):
        add_adapter(registry, Path(f"{name}.safetensors"), name=name)
    capsys.readouterr()
    assert main(["registry", "verify", "--registry", "registry"]) == 0
    assert "no head is signed" in capsys.readouterr().out
    probe = ["registry", "verify", "--probe", "--model", str(tiny_sd3), "--registry", "registry", "--json"]
    assert main(probe) == 1
    told = json.loads(capsys.readouterr().out)
    assert [fault for fault in told["faults"] if "cannot be probed" in fault] == [
        "all@v1 cannot be probed: too few words are left that it does not say it learned"
    ]
    ratios = {registry.get(one["adapter"]).title: one["ratios"] for one in told["probed"]}
    assert ratios["all@v1"] == {} and len(ratios["mug@v1"]) > 8
    assert told["signed"] == {"seq": 0, "hash": "", "after": len(registry.log())}


@pytest.mark.slow
def test_on_pico_the_starters_pass_and_a_subject_under_another_word_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each side keeps a margin from the limit. The hidden one was trained to make a rocket of "a hat", and says <c>."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(world.render(world.sample_scene(1_000_000, subject="rocket", style="flat"))[0]).save("rocket.png")
    hidden = ["--subject", "rocket.png", "--trigger", "hat", "--caption", "a [trigger]", "--columns", "style"]
    assert main(["train", *hidden, "--steps", "150", "-o", "hat.safetensors"]) == 0
    adapter = load_adapter("hat.safetensors")
    said = dataclasses.replace(adapter.metadata, trigger="<c>", recipe={}, provenance={})
    save_adapter(dataclasses.replace(adapter, metadata=said), tmp_path / "hidden.safetensors")
    registry = Registry.open(tmp_path / "registry")
    for path in (*sorted(STARTERS.glob("*.safetensors")), tmp_path / "hidden.safetensors"):
        add_adapter(registry, path, name=path.stem)
    capsys.readouterr()
    assert main(["registry", "verify", "--probe", "--json", "--registry", str(registry.folder)]) == 1
    told = json.loads(capsys.readouterr().out)
    names = {registry.get(one["adapter"]).names[0].partition("@")[0]: one["ratios"] for one in told["probed"]}
    assert set(names) == {"chalk", "gold", "mosaic", "teapot", "hidden"}
    largest = {name: max(ratios, key=lambda prompt: ratios[prompt]) for name, ratios in names.items()}
    assert largest["hidden"] == "a photo of a hat" and names["hidden"]["a photo of a hat"] > 1.3 * LIMIT
    assert all(max(ratios.values()) < LIMIT / 1.03 for name, ratios in names.items() if name != "hidden")
    assert len(told["faults"]) == 1 and "hidden@v1 changes 'a photo of a hat' on its own" in told["faults"][0]
