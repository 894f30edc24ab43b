"""Weights read from files without a pipeline, and `qrlora basis`, which computes their basis ahead of training."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from qrlora.apps.cli import main
from qrlora.errors import ModelError, TunerError
from qrlora.method.adapter import load_adapter
from qrlora.method.basis import factor
from qrlora.models import families, stored
from qrlora.models.stored import stored_weights
from tiny_pipelines import build_tiny_flux, build_tiny_sd3

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(tiny_sd3: Path, here: Path) -> Path:
    """A copy of a tiny model that a test may harm."""
    return shutil.copytree(tiny_sd3, here / "model")


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["basis", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def train(model: object, *options: str) -> None:
    Image.radial_gradient("L").convert("RGB").save("mug.png")
    common = ["--steps", "1", "--batch-size", "1", "-o", "mug.safetensors"]
    assert main(["train", "--subject", "mug.png", "--model", str(model), *common, *options]) == 0


def forbid(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"], ["--targets", "to_q,to_k"], ["--basis-rank", "5"]])
def test_training_after_it_computes_no_basis(
    options: list[str], tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        forbid(patch, families, "load_pipeline")
        report = said(capsys, tiny_sd3, "--rank", "2", *options)
    assert report["rank"] == (5 if "--basis-rank" in options else 4) and report["computed"] == len(report["layers"])
    forbid(monkeypatch, factor, "orthonormal_columns")
    train(tiny_sd3, "--rank", "2", *options)
    adapter = load_adapter(Path("mug.safetensors"))
    assert adapter.metadata.basis_fingerprint == report["fingerprint"] and set(adapter.deltas) == set(report["layers"])


def test_training_pico_after_it_computes_no_basis(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = said(capsys)
    assert report["rank"] == 32 and report["family"] == "sd3" and len(report["layers"]) > 60
    forbid(monkeypatch, factor, "orthonormal_columns")
    train("pico")
    assert load_adapter(Path("mug.safetensors")).metadata.basis_fingerprint == report["fingerprint"]


def test_every_layer_is_verified_and_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_sd3: Path
) -> None:
    monkeypatch.setattr("qrlora.apps.cli.shared.PATIENCE", 0.0)
    assert main(["basis", str(tiny_sd3), "--rank", "2"]) == 0
    out, err = capsys.readouterr()
    assert "basis of rank 4, 21 layers, 21 computed and 0 found" in out and "orthonormal to" in out
    assert "layer 21/21" in err
    report = said(capsys, tiny_sd3, "--rank", "2")
    assert report["computed"] == 0 and all(layer["cached"] for layer in report["layers"].values())
    for layer in report["layers"].values():
        assert 0 < layer["energy"] <= 1 and layer["off_orthonormal"] < 1e-5 and layer["within_reach"] < 1e-3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_goes_on_where_it_stopped(
    number: signal.Signals, tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns, calls = factor.orthonormal_columns, []

    def interrupted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        return columns(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(factor, "orthonormal_columns", interrupted)
        assert main(["basis", str(tiny_sd3), "--rank", "2"]) == 128 + number
    assert "5 of 21 layers are kept" in capsys.readouterr().err
    report = said(capsys, tiny_sd3, "--rank", "2")
    assert report["computed"] == 16 and len(report["layers"]) == 21


def test_sharded_and_half_precision_files_give_the_same_weights(tmp_path: Path) -> None:
    pipe = build_tiny_flux()
    pipe.transformer.half().save_pretrained(tmp_path / "flux/transformer", max_shard_size="30KB")
    (tmp_path / "flux/model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert len(list((tmp_path / "flux/transformer").glob("*.safetensors"))) > 2
    weights, family = stored_weights(tmp_path / "flux")
    assert family.name == "flux" and len(weights) == 15
    for name, weight in weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, pipe.transformer.get_submodule(name).weight.float())
        assert weights.shapes[name] == tuple(weight.shape)


def test_targets_match_as_peft_matches_them(tiny_sd3: Path) -> None:
    linear = {n for n, m in build_tiny_sd3().transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(stored_weights(tiny_sd3, "all-linear")[0]) == linear
    names = {name for name in linear if name.endswith(".to_q")}
    assert set(stored_weights(tiny_sd3, ["to_q"])[0]) == set(stored_weights(tiny_sd3, r".*\.to_q")[0]) == names
    assert set(stored_weights(tiny_sd3, ["pos_embed.proj"])[0]) == {"pos_embed.proj"}  # a convolution
    for targets in (["to_quux"], "to_q", "(", ["norm1"]):
        with pytest.raises(TunerError, match="targets"):
            stored_weights(tiny_sd3, targets)


def test_of_a_hub_model_only_the_denoiser_is_downloaded(tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(model: str, allow_patterns: list[str]) -> str:
        asked.update(model=model, patterns=allow_patterns)
        return str(tiny_sd3)

    monkeypatch.setattr(families, "hf_hub_download", lambda *_: str(tiny_sd3 / "model_index.json"))
    monkeypatch.setattr(stored, "snapshot_download", snapshot)
    assert set(stored_weights("owner/name")[0]) == set(stored_weights(tiny_sd3)[0])
    assert asked["model"] == "owner/name" and all(p.startswith("transformer/") for p in asked["patterns"])

    def unreachable(*_: object, **__: object) -> str:
        raise ConnectionError

    monkeypatch.setattr(stored, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match="check the connection"):
        stored_weights("owner/name")


def requantised(model: Path) -> None:
    config = json.loads((model / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (model / "transformer/config.json").write_text(json.dumps(config))


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def harm(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS)

    return harm


NAME = "transformer_blocks.1.attn.to_k"
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda model: (model / WEIGHTS).unlink(), "lacks weights in safetensors files"),
    "truncated": (lambda model: (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-9]), "cannot be read"),
    "no denoiser": (lambda model: shutil.rmtree(model / "transformer"), "is no denoiser"),
    "quantised": (requantised, "is quantised"),
    "a broken index": (lambda model: (model / f"{WEIGHTS}.index.json").write_text("{}"), "no index of weights"),
    "an index that leads elsewhere": (
        lambda model: (model / f"{WEIGHTS}.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        "../b.safetensors",
    ),
    "packed": (rewritten(lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].to(torch.uint8)})), "U8"),
    "scaled": (rewritten(lambda t: t.update({f"{NAME}.weight_scale": torch.ones(())})), f"{NAME}.weight_scale"),
    "zeros": (rewritten(lambda t: t[f"{NAME}.weight"].zero_()), f"'{NAME}' has no basis"),
    "NaN": (rewritten(lambda t: t[f"{NAME}.weight"].fill_(torch.nan)), "NaN or Inf"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_weights_that_cannot_be_used_are_said(harm: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, text = HARMS[harm]
    spoil(model)
    assert main(["basis", str(model), "--rank", "2"]) == 2
    error = capsys.readouterr().err
    assert text in error and "qrlora basis: " in error and "Traceback" not in error


def test_eight_bit_floats_without_scales_are_read_as_they_are(model: Path) -> None:
    rewritten(lambda t: t.update({f"{NAME}.weight": t[f"{NAME}.weight"].to(torch.float8_e4m3fn)}))(model)
    weight = stored_weights(model)[0][NAME]
    assert torch.equal(weight, load_file(model / WEIGHTS)[f"{NAME}.weight"].float())


def test_layers_of_fewer_columns_are_named(tiny_sd3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["basis", str(tiny_sd3), "--rank", "20", "--targets", "all-linear", "--json"]) == 0
    said = capsys.readouterr()
    ranks = {name: layer["rank"] for name, layer in json.loads(said.out)["layers"].items()}
    assert ranks["proj_out"] == 16 and ranks["time_text_embed.timestep_embedder.linear_1"] == 32
    assert "proj_out (16 of 40)" in said.err
    assert main(["basis", str(tiny_sd3), "--rank", "20", "--targets", "all-linear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--rank", "2", "--basis-rank", "2"], "columns that do not fit"),
        (["--columns", "third"], "unknown columns"),
        (["--targets", "to_quux"], "targets match no layer"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_computed(
    options: list[str], text: str, tiny_sd3: Path, private_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["basis", str(tiny_sd3), *options]) == 2
    assert text in capsys.readouterr().err and not private_cache.exists()
