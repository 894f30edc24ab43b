"""Networks that look at pictures, on tiny ones of the real classes: they load, they look, and say what is missing."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from qrlora.errors import ModelError
from qrlora.pico import world
from qrlora.quality.images.read import MeasuredPicture
from qrlora.quality.metrics.learned import FeatureNetworks, style_network
from qrlora.quality.metrics.table import METRICS, References, compute_metrics
from samples import EPS, NETWORK, assert_rounded
from tiny_pipelines import byte_tokenizer

SIDE, PATCH, WIDTH = 32, 8, 64


def scene(seed: int) -> MeasuredPicture:
    return MeasuredPicture(f"{seed}", world.render(world.sample_scene(seed))[0], None, "a red mug")


A, B = scene(1), scene(2)


def processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    size: dict[str, int] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    Dinov2Model(Dinov2Config(**size, image_size=SIDE, patch_size=PATCH)).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    size: dict[str, int] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 2}
    words = byte_tokenizer()
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = CLIPTextConfig(**size, vocab_size=len(words), **ends)
    sight = CLIPVisionConfig(**size, image_size=SIDE, patch_size=PATCH)
    CLIPModel(CLIPConfig(text_config=text, vision_config=sight, projection_dim=8)).save_pretrained(folder)
    processor().save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


# OpenAI's vision tower, as github.com/openai/CLIP describes it and CSD trained it, to check names and formulas against.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 1)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 4 * WIDTH), "c_proj": nn.Linear(4 * WIDTH, WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = self.ln_1(x)
        x = x + self.attn(normal, normal, normal, need_weights=False)[0]
        inner = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](inner * torch.sigmoid(1.702 * inner))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([Block(), Block()])})

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.conv1(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        x = self.ln_pre(x).permute(1, 0, 2)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x.permute(1, 0, 2)[:, 0])


@pytest.fixture(scope="module")
def csd() -> tuple[Tower, dict[str, torch.Tensor]]:
    """A tower, and the checkpoint as CSD's training writes it: in parallel, with two heads."""
    torch.manual_seed(0)
    tower = Tower().eval()
    tensors = {f"module.backbone.{name}": value.detach() for name, value in tower.state_dict().items()}
    heads = {f"module.last_layer_{kind}": torch.randn(WIDTH, 8) for kind in ("style", "content")}
    return tower, tensors | heads


@torch.inference_mode()
def test_the_style_tower_computes_what_openai_s_does(csd: tuple[Tower, dict[str, torch.Tensor]]) -> None:
    tower, checkpoint = csd
    network, head = style_network(checkpoint)
    pixels = torch.randn(2, 3, SIDE, SIDE)
    assert_rounded(network(pixel_values=pixels).pooler_output, tower(pixels), terms=NETWORK)
    assert torch.equal(head, checkpoint["module.last_layer_style"])


def test_a_style_checkpoint_is_read_in_both_forms(csd: tuple[Tower, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    tensors = csd[1]
    torch.save({"model_state_dict": tensors, "args": argparse.Namespace(lr=0.1), "iter": 3}, tmp_path / "csd.pth")
    save_file(tensors, tmp_path / "csd.safetensors")
    found = [
        FeatureNetworks({"csd": str(tmp_path / name)}, "cpu").similarity("csd", A, B)
        for name in ("csd.pth", "csd.safetensors")
    ]
    assert found[0] == pytest.approx(found[1], abs=NETWORK * EPS) and -1 <= found[0] < 0.9999
    networks = FeatureNetworks({"csd": str(tmp_path / "csd.pth")}, "cpu")
    assert networks.similarity("csd", A, A) == pytest.approx(1, abs=64 * EPS)


def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model_state_dict": Evil()}, tmp_path / "csd.pth")
    with pytest.raises(ModelError, match="unreadable weights"):
        FeatureNetworks({"csd": str(tmp_path / "csd.pth")}, "cpu").similarity("csd", A, B)
    assert not (tmp_path / "ran").exists()


def test_a_style_checkpoint_that_is_none_is_named(csd: tuple[Tower, dict[str, torch.Tensor]]) -> None:
    tensors = dict(csd[1])
    with pytest.raises(ModelError, match="last_layer_style"):
        style_network({name: value for name, value in tensors.items() if "last_layer" not in name})
    with pytest.raises(ModelError, match="foreign"):
        style_network(tensors | {"module.backbone.foreign": torch.zeros(1)})
    tensors["module.backbone.ln_post.weight"] = torch.zeros(3)
    with pytest.raises(ModelError, match="post_layernorm"):
        style_network(tensors)


# DINOv2 and CLIP, as transformers saves them


def test_dino_compares_pictures(dino: Path) -> None:
    networks = FeatureNetworks({"dino": str(dino)}, "cpu")
    assert networks.similarity("dino", A, A) == pytest.approx(1, abs=64 * EPS)
    assert networks.similarity("dino", A, B) < 0.9999


def test_dino_reads_the_first_token_of_prepared_pixels(dino: Path) -> None:
    model = Dinov2Model.from_pretrained(dino).eval()
    with torch.inference_mode():
        pixels = processor()(images=A.image, return_tensors="pt")["pixel_values"]
        expected = model(pixel_values=pixels).last_hidden_state[0, 0]
    found = FeatureNetworks({"dino": str(dino)}, "cpu").features("dino", A)
    assert_rounded(found, expected / expected.norm(), terms=NETWORK)


def test_clip_compares_pictures_and_words(clip: Path) -> None:
    networks = FeatureNetworks({"clip": str(clip)}, "cpu")
    assert networks.similarity("clip", A, A) == pytest.approx(1, abs=64 * EPS)
    assert networks.similarity("clip", A, B) < 0.9999
    model = CLIPModel.from_pretrained(clip).eval()
    with torch.inference_mode():
        pixels = processor()(images=A.image, return_tensors="pt")["pixel_values"]
        both = model(pixel_values=pixels, **byte_tokenizer()(["a red mug"], return_tensors="pt"))
        expected = float(both.image_embeds[0] @ both.text_embeds[0])
    assert networks.text_similarity(A, "a red mug") == pytest.approx(expected, abs=NETWORK * EPS)
    too_long = networks.text_similarity(A, "a red mug " * 50)  # truncated
    assert too_long != networks.text_similarity(A, "a blue car")


def test_measures_look_through_them(dino: Path, clip: Path) -> None:
    names = [name for name, row in METRICS.items() if row.network in ("dino", "clip")]
    networks = FeatureNetworks({"dino": str(dino), "clip": str(clip)}, "cpu")
    row = compute_metrics([A], References(subject=[A], style=[A]), [METRICS[name] for name in names], networks)[0]
    assert row.pop("clip_t") != 1
    assert row == pytest.approx({"dino": 1, "clip_i": 1, "clip_style": 1}, abs=64 * EPS)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("dino", "hf download facebook/dinov2-base"),
        ("clip", "hf download openai/clip-vit-base-patch32"),
        ("csd", "--weights csd=FILE"),
    ],
)
def test_weights_that_are_not_there_are_named_before_anything_is_measured(
    name: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    one = next(row for row in METRICS.values() if row.network == name)
    given = References(subject=[A], style=[A])
    with pytest.raises(ModelError) as refused:
        compute_metrics([A], given, [one], progress=lambda *_: pytest.fail("measured"))
    assert remedy in str(refused.value) and "choose metrics" in str(refused.value)


def test_a_folder_without_a_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="DINOv2 is not on this machine"):
        FeatureNetworks({"dino": str(tmp_path)}, "cpu").similarity("dino", A, B)


# LPIPS: its packages are optional, so only what lies around them is tested here


def test_lpips_without_its_packages_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(ModelError, match=r"pip install 'qrlora\[lpips\]'"):
        FeatureNetworks(device="cpu").distance(A, B)


def test_lpips_is_asked_for_pictures_of_one_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    class Network(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            asked.append((options, torch.hub.get_dir()))

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return (first - second).abs().mean()

    weights = types.SimpleNamespace(IMAGENET1K_V1=types.SimpleNamespace(url="https://a.place/alexnet.pth"))
    lpip = types.SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Network)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", lpip)
    monkeypatch.setitem(sys.modules, "torchvision.models", types.SimpleNamespace(AlexNet_Weights=weights))
    networks, before = FeatureNetworks({"lpips": str(tmp_path)}, "cpu"), torch.hub.get_dir()
    with pytest.raises(ModelError, match=r"alexnet\.pth"):
        networks.distance(A, B)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet.pth").touch()
    large = MeasuredPicture("", np.asarray(A.image.resize((256, 256))))
    assert networks.distance(A, A) == 0 and 0 < networks.distance(large, B) < 1
    assert asked == [({"net_type": "alex", "normalize": True}, str(tmp_path))] and torch.hub.get_dir() == before
