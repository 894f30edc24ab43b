"""Exchange with other programs: what is written loads there, what is read is the same ΔW, what is lost is said."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qrlora.apps.cli import main
from qrlora.errors import AdapterFileError, MismatchError
from qrlora.method.adapter import Adapter, AdapterMetadata, attach, load_adapter, save_adapter
from qrlora.method.adapter.attach import base_weights, remove_adapters
from qrlora.method.adapter.record import triangular_mask
from qrlora.method.basis import Basis
from qrlora.method.composition import Composition, compose_delta_weights
from qrlora.models.exchange import (
    LayerNames,
    Onto,
    changed_components,
    changed_layers,
    count_matches,
    export_adapter,
    extract_lora,
    extract_on_basis,
    import_file,
    left_out_of,
    load_any,
    project,
    target_of,
    verification,
)
from qrlora.models.exchange.names import flattened, kohya_names, module_of
from qrlora.models.exchange.projection import truncated
from qrlora.models.exchange.verification import original_names
from qrlora.models.families import family_of
from qrlora.models.generation import generate
from samples import EPS
from tiny_pipelines import BUILDERS, build_tiny_sd3, build_tiny_sdxl

PROMPT = "a photo of a <c> mug"
FAST: dict[str, Any] = {"steps": 2, "guidance": 2.0, "resolution": 64}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module", params=list(BUILDERS))
def pipe(request: pytest.FixtureRequest) -> Any:
    made = BUILDERS[request.param]()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def sdxl() -> Any:
    made = build_tiny_sdxl()
    made.set_progress_bar_config(disable=True)
    return made


def layers_of(pipe: Any, targets: tuple[str, ...] = ATTENTION) -> list[str]:
    denoiser = family_of(pipe).denoiser_of(pipe)
    return [name for name, module in denoiser.named_modules() if hasattr(module, "weight") and name.endswith(targets)]


def basis_for(pipe: Any, layers: list[str], rank: int = 4) -> Basis:
    return Basis.of(base_weights(family_of(pipe).denoiser_of(pipe), layers), rank)


def trained(pipe: Any, layers: list[str], basis: Basis, columns: tuple[int, ...] = (0, 2), **fields: Any) -> Adapter:
    """An adapter on the pipeline's basis as training would leave one, strong enough to be seen; alpha is not rank."""
    family, generator = family_of(pipe), torch.Generator().manual_seed(3)
    deltas, shapes = {}, {}
    for name, weight in base_weights(family.denoiser_of(pipe), layers).items():
        shapes[name] = tuple(weight.shape)
        width, held = weight[0].numel(), tuple(column for column in columns if column < basis[name].q.shape[1])
        delta = torch.randn(len(held), width, generator=generator) * triangular_mask(held, width)
        deltas[name] = 2 * delta * weight.detach().norm() / delta.norm()
    metadata = AdapterMetadata(
        method="qrlora",
        rank=len(columns),
        alpha=3.0,
        basis_rank=basis.rank,
        columns=columns,
        triangular=True,
        algorithm=basis.algorithm,
        basis_seed=basis.seed,
        basis_fingerprint=Basis(
            {n: basis[n] for n in layers},
            {n: basis.digests[n] for n in layers},
            basis.rank,
            basis.algorithm,
            basis.seed,
        ).fingerprint,
        **{"family": family.name, "denoiser": family.denoiser, "base_model": "tiny", **fields},
    )
    return Adapter(metadata, deltas, shapes, {name: basis.digests[name] for name in layers}, name="mug")


def delta_weights(adapter: Adapter, basis: Basis | None = None) -> dict[str, Tensor]:
    return {n: adapter.delta_weight(n, None if basis is None else basis[n].q).double() for n in adapter.deltas}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], terms: float = 128) -> None:
    """To the rounding of so many float32 terms, in the norm of each layer."""
    assert set(got) == set(expected)
    for name, delta in expected.items():
        assert float((got[name] - delta).norm()) <= terms * EPS * float(delta.norm()), name


def picture(pipe: Any, **options: Any) -> np.ndarray:
    [image] = generate(pipe, family_of(pipe), [PROMPT], [3], **FAST, **options)
    return np.asarray(image, np.int16)


def random_lora(pipe: Any, layers: list[str], rank: int = 3, seed: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> (down, up)."""
    generator = torch.Generator().manual_seed(seed)
    weights = base_weights(family_of(pipe).denoiser_of(pipe), layers)
    return {
        name: (
            torch.randn(rank, *weight.shape[1:], generator=generator),
            torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator) * 0.1,
        )
        for name, weight in weights.items()
    }


def products(pairs: dict[str, tuple[Tensor, Tensor]], scaling: float = 1.0) -> dict[str, Tensor]:
    return {n: scaling * up.flatten(1).double() @ down.flatten(1).double() for n, (down, up) in pairs.items()}


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path, metadata)
    return path


# Names


def test_names_of_every_sdxl_layer_agree_with_the_walk_and_come_back() -> None:
    """The arithmetic of names.py against the counting walk of verification.py, on the real SDXL without weights."""
    with torch.device("meta"):
        real = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    for unet in (real, build_tiny_sdxl().unet):
        per_block = unet.config.layers_per_block
        layers = [name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        names = kohya_names(layers, [name for name, _ in unet.named_modules()], per_block)
        assert names == {ours: "lora_unet_" + theirs.replace(".", "_") for ours, theirs in original_names(unet)}
        assert {name: module_of(names[name], per_block) for name in layers} == {name: name for name in layers}
        assert {name: module_of("lora_unet_" + name.replace(".", "_")) for name in layers} == {n: n for n in layers}
    for name, module in BUILDERS["sd"]().unet.named_modules():
        assert not isinstance(module, (nn.Linear, nn.Conv2d)) or module_of(flattened(name)) == name
    names = kohya_names(["up_blocks.0.upsamplers.0.conv"], [name for name, _ in real.named_modules()])
    assert names["up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"  # as sd-scripts writes it


def test_a_layer_without_a_kohya_name_is_refused_by_name() -> None:
    with pytest.raises(MismatchError, match=r"transformer_blocks\.0\.attn\.to_q"):
        kohya_names(["transformer_blocks.0.attn.to_q"], [])


# Export


@pytest.mark.parametrize("clipped", [False, True])
def test_an_export_loads_in_stock_diffusers_and_paints_the_same(pipe: Any, tmp_path: Path, clipped: bool) -> None:
    family, layers, columns = family_of(pipe), layers_of(pipe), (0, 2)
    if clipped:  # the largest of all linear layers alone have the last column
        linear = {n: m for n, m in family.denoiser_of(pipe).named_modules() if isinstance(m, nn.Linear)}
        layers, columns = list(linear), (0, 2, max(min(m.weight.shape) for m in linear.values()) - 1)
    basis = basis_for(pipe, layers, columns[-1] + 2)
    described = {"role": "subject", "trigger": "<c>", "licence": "CC0-1.0", "recipe": {"steps": 7}}
    adapter = trained(pipe, layers, basis, columns, **described)
    if clipped:  # time embeddings too: at full strength rounding alone moves a picture by four of 255
        weaker = {name: 0.1 * delta for name, delta in adapter.deltas.items()}
        adapter = dataclasses.replace(adapter, deltas=weaker)
    assert {len(delta) for delta in adapter.deltas.values()} == ({2, 3} if clipped else {2})
    ours, plain = picture(pipe, adapters=[(adapter, 1.0)]), picture(pipe)
    assert np.abs(ours - plain).max() > 2
    for target in ("diffusers", "kohya") if family.name in ("sd", "sdxl") else ("diffusers",):
        path = tmp_path / f"mug-{target}.safetensors"
        export = export_adapter(adapter, path, target, pipe, family, basis=basis)
        assert export.layers == len(layers) and set(export.matched.values()) == {len(layers)}
        pipe.load_lora_weights(path, adapter_name=target)
        stock = picture(pipe)
        pipe.unload_lora_weights()
        assert np.abs(ours - stock).max() <= 1
        assert np.abs(picture(pipe) - plain).max() <= 1  # the loader left the base as it was
        again = load_adapter(path)
        assert again.digest == adapter.digest and again.metadata.trigger == "<c>"
        header = header_of(path)
        assert header["modelspec.trigger_phrase"] == "<c>" and header["modelspec.license"] == "CC0-1.0"
        assert header["modelspec.hash_sha256"] == "0x" + header["sshs_model_hash"]
        assert header["ss_network_dim"] == str(len(columns)) and header["ss_max_train_steps"] == "7"
        assert header["modelspec.architecture"].endswith("/lora")


def header_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def test_every_kind_of_sdxl_layer_is_found_in_kohya_form(sdxl: Any, tmp_path: Path) -> None:
    layers = [name for name, m in sdxl.unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    pairs = random_lora(sdxl, layers, rank=2)
    plain = load_any(write(tmp_path / "all.safetensors", diffusers_form(pairs)))
    path = tmp_path / "all-kohya.safetensors"
    export = export_adapter(plain, path, "kohya", sdxl, family_of(sdxl))
    assert export.matched == {"kohya": len(layers), "diffusers": len(layers)} and len(layers) == 85
    tensors = safetensors.torch.load_file(path)
    assert len(tensors) == 3 * len(layers)
    assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {2.0}
    assert_same(delta_weights(load_any(path)), products(pairs))


def test_an_export_in_half_precision_keeps_its_strength(sdxl: Any, tmp_path: Path) -> None:
    layers = layers_of(sdxl)
    basis = basis_for(sdxl, layers)
    adapter = trained(sdxl, layers, basis)
    path = tmp_path / "half.safetensors"
    export_adapter(adapter, path, "kohya", sdxl, family_of(sdxl), basis=basis, dtype=torch.float16)
    tensors = safetensors.torch.load_file(path)
    assert {value.dtype for key, value in tensors.items() if key.endswith(".weight")} == {torch.float16}
    bare = {key: value.float() for key, value in tensors.items()}  # as a program that knows nothing of qrlora
    loaded = load_any(write(tmp_path / "bare.safetensors", bare), names=LayerNames(family_of(sdxl), sdxl.unet))
    assert_same(delta_weights(loaded), delta_weights(adapter, basis), 4 * torch.finfo(torch.float16).eps / EPS)


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
def test_an_adapter_can_be_exported_while_the_model_carries_one(sdxl: Any, tmp_path: Path, target: str) -> None:
    layers = layers_of(sdxl)
    basis = basis_for(sdxl, layers)
    adapter = trained(sdxl, layers, basis)
    attach(sdxl.unet, adapter, "here")
    try:
        export = export_adapter(adapter, tmp_path / "a.safetensors", target, sdxl, family_of(sdxl), basis=basis)
    finally:
        remove_adapters(sdxl.unet, ["here"])
    assert set(export.matched.values()) == {len(layers)}


def test_a_misnamed_key_is_an_error_that_lists_it(sdxl: Any, tmp_path: Path) -> None:
    layers, family = layers_of(sdxl), family_of(sdxl)
    basis = basis_for(sdxl, layers)
    path = tmp_path / "mug.safetensors"
    for target, wrong in (("kohya", "lora_unet_input_blocks_9_1_nowhere"), ("diffusers", "unet.down_blocks.7.nowhere")):
        export_adapter(trained(sdxl, layers, basis), path, target, sdxl, family, basis=basis)
        tensors = safetensors.torch.load_file(path)
        first = sorted(key for key in tensors if "weight" in key)[0]
        right = first.split(".lora_")[0]
        changed = {key.replace(right + ".", wrong + "."): tensor for key, tensor in tensors.items()}
        with pytest.raises(AdapterFileError, match=wrong):
            count_matches(write(tmp_path / "wrong.safetensors", changed), target, family, sdxl.unet)


def test_a_file_at_another_strength_or_shape_does_not_pass(sdxl: Any, tmp_path: Path) -> None:
    layers, family = layers_of(sdxl), family_of(sdxl)
    basis = basis_for(sdxl, layers)
    export_adapter(trained(sdxl, layers, basis), tmp_path / "a.safetensors", "kohya", sdxl, family, basis=basis)
    for ending, change, said in (
        (".alpha", lambda tensor: tensor * 2, "alpha 4.0 of rank 2"),
        (".lora_up.weight", lambda tensor: tensor[:-1], "on a weight of"),
    ):
        tensors = safetensors.torch.load_file(tmp_path / "a.safetensors")
        key = next(key for key in tensors if key.endswith(ending))
        tensors[key] = change(tensors[key])
        with pytest.raises(AdapterFileError, match=said):
            count_matches(write(tmp_path / "b.safetensors", tensors), "kohya", family, sdxl.unet)


def test_an_export_that_would_not_load_leaves_nothing(sdxl: Any, tmp_path: Path, monkeypatch: Any) -> None:
    layers = layers_of(sdxl)
    basis = basis_for(sdxl, layers)
    convert = verification.converted_by_diffusers

    def forgetful(*arguments: Any) -> Any:
        state, alphas = convert(*arguments)
        return {key: tensor for key, tensor in state.items() if "down_blocks" not in key}, alphas

    monkeypatch.setattr(verification, "converted_by_diffusers", forgetful)
    with pytest.raises(AdapterFileError, match="left out"):
        export_adapter(
            trained(sdxl, layers, basis), tmp_path / "a.safetensors", "kohya", sdxl, family_of(sdxl), basis=basis
        )
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]


def test_exports_that_cannot_be_are_refused(sdxl: Any, tmp_path: Path) -> None:
    sd3 = build_tiny_sd3()
    layers = layers_of(sd3)
    basis = basis_for(sd3, layers)
    adapter = trained(sd3, layers, basis)
    path = tmp_path / "a.safetensors"
    with pytest.raises(MismatchError, match="no kohya form for sd3"):
        export_adapter(adapter, path, "kohya", sd3, family_of(sd3), basis=basis)
    with pytest.raises(MismatchError, match="another family"):
        export_adapter(adapter, path, "kohya", sdxl, family_of(sdxl), basis=basis)
    unknown = dataclasses.replace(adapter, metadata=dataclasses.replace(adapter.metadata, family=""))
    with pytest.raises(MismatchError, match="the model lacks"):
        export_adapter(unknown, path, "kohya", sdxl, family_of(sdxl), basis=basis)
    assert [target_of(program, "sdxl") for program in ("comfyui", "forge", "a1111", "diffusers")] == ["kohya"] * 3 + [
        "diffusers"
    ]
    assert target_of("comfyui", "flux") == "diffusers" and target_of("comfyui", "sd") == "kohya"
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".safetensors"]


# Import of LoRAs


def diffusers_form(pairs: dict[str, tuple[Tensor, Tensor]], denoiser: str = "unet") -> dict[str, Tensor]:
    return {
        f"{denoiser}.{name}.lora_{side}.weight": tensor
        for name, pair in pairs.items()
        for side, tensor in zip("AB", pair, strict=True)
    }


def old_diffusers_form(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        owner, _, last = name.removesuffix(".0").rpartition(".")
        for side, tensor in zip(("down", "up"), pair, strict=True):
            tensors[f"unet.{owner}.processor.{last}_lora.{side}.weight"] = tensor
    return tensors


def kohya_form(
    pairs: dict[str, tuple[Tensor, Tensor]], names: Callable[[str], str], alpha: float = 1.5
) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in pairs.items():
        stem = names(name)
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return tensors


def test_a_lora_in_any_form_is_the_same_delta_weight(sdxl: Any, tmp_path: Path) -> None:
    layers = layers_of(sdxl)
    pairs = random_lora(sdxl, layers)
    names = kohya_names(layers, [name for name, _ in sdxl.unet.named_modules()], 1)
    flat = {name: "lora_unet_" + name.replace(".", "_") for name in layers}
    written = json.dumps({"unet.r": 3, "unet.lora_alpha": 6})
    files = {
        "new": (diffusers_form(pairs), None, 1.0),
        "config": (diffusers_form(pairs), {"lora_adapter_metadata": written}, 2.0),
        "old": (old_diffusers_form(pairs), None, 1.0),
        "bare": ({k.removeprefix("unet."): v for k, v in diffusers_form(pairs).items()}, None, 1.0),
        "ldm": (kohya_form(pairs, names.__getitem__), {"modelspec.license": "MIT"}, 0.5),
        "flat": (kohya_form(pairs, flat.__getitem__), None, 0.5),
    }
    for name, (tensors, metadata, scaling) in files.items():
        path = write(tmp_path / f"{name}.safetensors", tensors, metadata)
        adapter, kept = import_file(path, pipe=sdxl, family=family_of(sdxl))
        assert kept is None and adapter.metadata.denoiser == "unet" and adapter.metadata.family == "sdxl"
        assert_same(delta_weights(adapter), products(pairs, scaling))
        save_adapter(adapter, tmp_path / "kept.safetensors", "lora")
        assert_same(delta_weights(load_adapter(tmp_path / "kept.safetensors")), products(pairs, scaling))
        assert adapter.metadata.licence == ("MIT" if name == "ldm" else "")
        assert adapter.metadata.provenance["imported"]["file"] == path.name


def test_layers_of_different_rank_and_alpha_are_one_adapter_of_the_same_delta_weight(sdxl: Any, tmp_path: Path) -> None:
    layers = layers_of(sdxl)
    pairs = random_lora(sdxl, layers, rank=2) | random_lora(sdxl, layers[:3], rank=5)
    tensors = kohya_form(pairs, lambda name: "lora_unet_" + name.replace(".", "_"), alpha=4.0)
    adapter = load_any(write(tmp_path / "a.safetensors", tensors))
    expected = {name: delta * (4 / len(pairs[name][0])) for name, delta in products(pairs).items()}
    assert adapter.metadata.rank == 5 and adapter.scaling == 1.0
    assert_same(delta_weights(adapter), expected)


def test_a_peft_file_is_read_with_its_configuration(tmp_path: Path) -> None:
    pipe = build_tiny_sd3()
    layers = layers_of(pipe)
    config = LoraConfig(
        r=2,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["to_q", "to_k"],
        alpha_pattern={"to_q": 1},
        init_lora_weights=False,
    )
    model = get_peft_model(pipe.transformer, config)
    model.save_pretrained(tmp_path)
    expected = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight") and module.r:
            expected[name] = module.get_delta_weight("default").detach().double()
    adapter, _ = import_file(tmp_path / "adapter_model.safetensors", pipe=build_tiny_sd3(), family=family_of(pipe))
    assert set(expected) < set(layers)
    assert_same(delta_weights(adapter), expected)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterFileError, match="does not say its alpha"):
        load_any(tmp_path / "adapter_model.safetensors")
    assert load_any(tmp_path / "adapter_model.safetensors", alpha=4.0).deltas


def test_flux_in_kohya_form_is_split_as_diffusers_splits_it(tmp_path: Path) -> None:
    pipe = BUILDERS["flux"]()
    width = pipe.transformer.inner_dim
    down, up = torch.randn(2, width), torch.randn(3 * width, 2)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(1.0)}
    adapter, _ = import_file(write(tmp_path / "a.safetensors", tensors), pipe=pipe, family=family_of(pipe))
    whole = 0.5 * up.double() @ down.double()
    expected = {f"transformer_blocks.0.attn.to_{p}": part for p, part in zip("qkv", whole.chunk(3), strict=True)}
    assert_same(delta_weights(adapter), expected)


# Projection


def test_energy_is_one_inside_the_span_and_by_the_formula_outside(sdxl: Any, tmp_path: Path) -> None:
    layers = layers_of(sdxl)
    basis = basis_for(sdxl, layers)
    pairs = random_lora(sdxl, layers)
    mixed = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, -0.5], [0.5, 0.0, 1.0]])
    inside = {n: (down, basis[n].q[:, :3] @ mixed) for n, (down, _) in pairs.items()}
    for given in (inside, pairs):
        adapter = load_any(write(tmp_path / "a.safetensors", diffusers_form(given)))
        projected, kept = project(adapter, basis)
        explicit = {}
        for name, delta in products(given).items():
            q = basis[name].q.double()
            explicit[name] = q @ q.T @ delta
            share = float((q.T @ delta).square().sum() / delta.square().sum())
            assert kept.layers[name] == pytest.approx(share, abs=256 * EPS)
            assert given is not inside or kept.layers[name] == pytest.approx(1.0, abs=256 * EPS)
        assert_same(delta_weights(projected, basis), explicit)
        assert given is inside or 0 < kept.total < 1
    save_adapter(projected, tmp_path / "b.safetensors")
    assert load_adapter(tmp_path / "b.safetensors").digest == projected.digest
    projected.check_basis(basis)


def test_an_adapter_projected_onto_its_own_columns_is_itself(sdxl: Any) -> None:
    layers = layers_of(sdxl)
    basis = basis_for(sdxl, layers)
    adapter = trained(sdxl, layers, basis)
    same, kept = project(adapter, basis, adapter.metadata.columns, triangular=True, own_basis=basis)
    assert_same(delta_weights(same, basis), delta_weights(adapter, basis))
    assert kept.total == pytest.approx(1.0, abs=256 * EPS) and same.metadata.triangular
    _, none = project(adapter, basis, (1, 3), own_basis=basis)
    assert none.total == pytest.approx(0.0, abs=256 * EPS)
    with pytest.raises(MismatchError, match="needs its own basis"):
        project(adapter, basis)
    with pytest.raises(MismatchError, match="do not fit the basis"):
        project(adapter, basis_for(sdxl, layers[1:]), own_basis=basis)


def test_a_projected_lora_composes_exactly_with_what_it_was_made_like(sdxl: Any, tmp_path: Path) -> None:
    layers = layers_of(sdxl)
    basis = basis_for(sdxl, layers)
    mine = trained(sdxl, layers, basis)
    path = write(tmp_path / "a.safetensors", diffusers_form(random_lora(sdxl, layers)))
    theirs, kept = import_file(path, pipe=sdxl, family=family_of(sdxl), onto=Onto.like(mine), base_model="tiny")
    assert kept is not None and theirs.metadata.columns == mine.metadata.columns
    both = delta_weights(Composition([(mine, 1.0), (theirs, 0.5)]).adapter(), basis)
    one, two = delta_weights(mine, basis), delta_weights(theirs, basis)
    assert_same(both, {name: one[name] + 0.5 * two[name] for name in layers})


# The published code's checkpoints


def published_form(
    pipe: Any, layers: list[str], rank: int = 4, s: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint made by hand from the paper's equations with LAPACK's signs, and its ΔW."""
    generator = torch.Generator().manual_seed(1)
    tensors, deltas = {}, {}
    for name, weight in base_weights(family_of(pipe).denoiser_of(pipe), layers).items():
        u, values, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        q, r = torch.linalg.qr(u[:, :rank] @ torch.diag(values[:rank] / s) @ vh[:rank])
        q, r = q[:, :rank], r[:rank]
        delta = torch.triu(torch.randn(rank, weight.shape[1], generator=generator)) * 0.1
        prefix = f"{family_of(pipe).denoiser}.{name}.lora"
        tensors |= {f"{prefix}.q.weight": q, f"{prefix}.base_r.weight": r, f"{prefix}.delta_r.weight": delta}
        deltas[name] = s * q.double() @ delta.double()
    return tensors, deltas


@pytest.mark.parametrize("s", [1.0, 0.5])
def test_a_published_checkpoint_is_the_same_delta_weight_on_our_basis(tmp_path: Path, s: float) -> None:
    pipe = BUILDERS["flux"]()
    pipe.set_progress_bar_config(disable=True)
    layers = layers_of(pipe)
    tensors, expected = published_form(pipe, layers, s=s)
    path = write(tmp_path / "a.safetensors", tensors)
    adapter, _ = import_file(path, pipe=pipe, family=family_of(pipe), base_model="tiny")
    assert adapter.metadata.on_basis and adapter.metadata.triangular and adapter.scaling == pytest.approx(s)
    assert_same(delta_weights(adapter, basis_for(pipe, layers)), expected, 1024)
    save_adapter(adapter, tmp_path / "b.safetensors")
    assert_same(delta_weights(import_file(path, alpha=4 * s)[0]), expected)

    # W' = W_res + s Q (R + ΔR), as that code loads it, paints our picture
    ours = picture(pipe, adapters=[(load_adapter(tmp_path / "b.safetensors"), 1.0)])
    with torch.no_grad():
        for name, weight in base_weights(pipe.transformer, layers).items():
            q, r, delta = (tensors[f"transformer.{name}.lora.{part}.weight"] for part in ("q", "base_r", "delta_r"))
            weight.copy_((weight - s * q @ r) + s * q @ (r + delta))
    assert np.abs(picture(pipe) - ours).max() <= 1


def test_a_published_checkpoint_in_bfloat16_is_read_too(tmp_path: Path) -> None:
    pipe = BUILDERS["flux"]()
    layers = layers_of(pipe)
    tensors, expected = published_form(pipe, layers)
    path = write(tmp_path / "a.safetensors", {key: tensor.bfloat16() for key, tensor in tensors.items()})
    adapter, _ = import_file(path, pipe=pipe, family=family_of(pipe))
    assert_same(delta_weights(adapter, basis_for(pipe, layers)), expected, 2 * torch.finfo(torch.bfloat16).eps / EPS)


def test_published_checkpoints_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    pipe = BUILDERS["flux"]()
    layers = layers_of(pipe)
    tensors, _ = published_form(pipe, layers)
    prefix = f"transformer.{layers[0]}.lora"
    family = family_of(pipe)

    def refused(change: dict[str, Tensor | None], said: str, error: type[Exception], **options: Any) -> None:
        changed = {key: tensor for key, tensor in (tensors | change).items() if tensor is not None}
        path = write(tmp_path / "a.safetensors", changed)
        with pytest.raises(error, match=said):
            import_file(path, pipe=pipe, family=family, **options)

    refused({f"{prefix}.q.weight": torch.randn(32, 4)}, "random Q", AdapterFileError)
    refused({f"{prefix}.base_r.weight": torch.randn(4, 32)}, "another base weight", MismatchError)
    refused({f"{prefix}.base_r.weight": None}, "missing: .*base_r", AdapterFileError)
    refused({"one.bias": torch.ones(1), "two.bias": torch.zeros(1)}, r"one\.bias.*two\.bias", AdapterFileError)
    refused({f"{prefix}.delta_r.weight": torch.randn(4, 31)}, "do not fit", AdapterFileError)
    refused({f"{prefix}.delta_r.weight": torch.full((4, 32), torch.nan)}, "NaN", AdapterFileError)
    refused({}, "another alpha", MismatchError, alpha=64.0)
    with pytest.raises(MismatchError, match="the model lacks"):
        write(tmp_path / "a.safetensors", tensors)
        import_file(tmp_path / "a.safetensors", pipe=build_tiny_sdxl(), family=family_of("StableDiffusionXLPipeline"))


# Extraction

OF_A_DIFFERENCE = 1024
"""Terms: each weight of the tuned model is off by its own rounding, which is more of a ΔW that is smaller than it."""


def tuned_copy(build: Callable[[], Any], layers: list[str], rank: int) -> tuple[Any, Any, dict[str, Tensor]]:
    """A pipeline, the same with a difference of known rank in some layers, and that difference."""
    base, tuned = build(), build()
    pairs = random_lora(base, layers, rank)
    with torch.no_grad():
        for name, weight in base_weights(family_of(tuned).denoiser_of(tuned), layers).items():
            down, up = pairs[name]
            weight += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return base, tuned, products(pairs)


def test_extraction_recovers_a_difference_of_known_rank(tmp_path: Path) -> None:
    layers = [*layers_of(build_tiny_sdxl())[:6], "down_blocks.0.resnets.0.conv1"]
    base, tuned, expected = tuned_copy(build_tiny_sdxl, layers, rank=3)
    changes = changed_layers(base.unet, tuned.unet)
    assert set(changes.layers) == set(layers) and not changes.others
    adapter, kept = extract_lora(changes, 3, denoiser="unet", family="sdxl")
    assert_same(delta_weights(adapter), expected, OF_A_DIFFERENCE)
    assert kept.total == pytest.approx(1.0, abs=256 * EPS)
    save_adapter(adapter, tmp_path / "a.safetensors", "lora")
    smaller, kept = extract_lora(changes, 1, denoiser="unet")
    for name, delta in expected.items():
        values = torch.linalg.svdvals(delta).square()
        assert kept.layers[name] == pytest.approx(float(values[0] / values.sum()), abs=OF_A_DIFFERENCE * EPS)
    assert smaller.metadata.rank == 1 and 0 < kept.total < 1


def test_extraction_on_the_basis_keeps_what_lies_in_it() -> None:
    layers = layers_of(build_tiny_sd3())[:5]
    base, tuned, expected = tuned_copy(build_tiny_sd3, layers, rank=2)
    basis = basis_for(base, layers)
    adapter, kept = extract_on_basis(changed_layers(base.transformer, tuned.transformer), basis, (0, 1, 3))
    for name, delta in expected.items():
        q = basis[name].q.double()[:, [0, 1, 3]]
        assert_same(
            {name: adapter.delta_weight(name, basis[name].q).double()}, {name: q @ q.T @ delta}, OF_A_DIFFERENCE
        )
        assert kept.layers[name] == pytest.approx(
            float((q.T @ delta).norm() / delta.norm()) ** 2, abs=OF_A_DIFFERENCE * EPS
        )


def test_extraction_says_what_it_leaves_out() -> None:
    layers = layers_of(build_tiny_sd3())[:2]
    base, tuned, _ = tuned_copy(build_tiny_sd3, layers, rank=2)
    with torch.no_grad():
        tuned.transformer.transformer_blocks[0].attn.to_q.bias += 2.0
        next(tuned.text_encoder.parameters()).mul_(2)
    changes = changed_layers(base.transformer, tuned.transformer, targets=[layers[0].rpartition(".")[2]])
    width = tuned.transformer.transformer_blocks[0].attn.to_q.bias.numel()
    assert changes.others["transformer_blocks.0.attn.to_q.bias"] == pytest.approx(4.0 * width, rel=256 * EPS)
    assert f"{layers[1]}.weight" in changes.others and list(changes.layers) == [layers[0]]
    assert changed_components(base, tuned, "transformer") == ["text_encoder"]
    with pytest.raises(MismatchError, match="nothing to extract"):
        extract_lora(changed_layers(base.transformer, base.transformer), 2)
    with pytest.raises(MismatchError, match="names or shapes"):
        changed_layers(base.transformer, build_tiny_sdxl().unet)


def test_truncation_of_a_large_matrix_is_near_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(side, 60, generator=generator)).Q for side in (1100, 1300))
    values = 0.8 ** torch.arange(60.0)
    delta = left @ torch.diag(values) @ right.T
    up, down, kept = truncated(delta, 8)
    best = float(values[:8].square().sum())
    assert kept == pytest.approx(best, rel=1024 * EPS)
    assert float((up @ down - delta).square().sum()) == pytest.approx(float(values[8:].square().sum()), abs=1300 * EPS)


# Composition across worlds


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # diffusers' own way of loading a second file
def test_ours_and_anybodys_compose_into_one_file_that_paints_what_both_paint(tmp_path: Path) -> None:
    pipe = build_tiny_sdxl()
    pipe.set_progress_bar_config(disable=True)
    family, layers = family_of(pipe), layers_of(pipe)
    basis = basis_for(pipe, layers)
    mine = trained(pipe, layers, basis)
    pairs = random_lora(pipe, layers)
    names = kohya_names(layers, [name for name, _ in pipe.unet.named_modules()], 1)
    theirs_path = write(tmp_path / "theirs.safetensors", kohya_form(pairs, names.__getitem__))
    theirs, _ = import_file(theirs_path, pipe=pipe, family=family)
    composed, loss = compose_delta_weights([(mine, 0.9), (theirs, 0.6)], [basis, None], 5)
    assert loss.total == pytest.approx(0.0, abs=1e-9)
    one = tmp_path / "both.safetensors"
    export_adapter(composed, one, "kohya", pipe, family)
    pipe.load_lora_weights(one)
    together = picture(pipe)
    pipe.unload_lora_weights()

    export_adapter(mine, tmp_path / "mine.safetensors", "diffusers", pipe, family, basis=basis)
    pipe.load_lora_weights(tmp_path / "mine.safetensors", adapter_name="mine")
    pipe.load_lora_weights(theirs_path, adapter_name="theirs")
    pipe.set_adapters(["mine", "theirs"], [0.9, 0.6])
    assert np.abs(picture(pipe) - together).max() <= 1


# Bad input


def test_unknown_keys_are_all_listed(sdxl: Any, tmp_path: Path) -> None:
    tensors = diffusers_form(random_lora(sdxl, layers_of(sdxl)[:2]))
    keys = sorted(tensors)
    for extra in ({"unet.a.lora_magnitude_vector": torch.ones(2), "unet.b.hada_w1_a": torch.zeros(2)}, {}):
        changed = tensors | extra
        if not extra:
            del changed[keys[0]]
        with pytest.raises(AdapterFileError) as caught:
            load_any(write(tmp_path / "a.safetensors", changed))
        assert all(key in str(caught.value) for key in extra or [keys[0].removesuffix(".lora_A.weight")])


def test_a_basis_saved_whole_is_no_lora(sdxl: Any, tmp_path: Path) -> None:
    """The published code's mode that trains Q and R both saves them as lora.up and lora.down."""
    tensors = {}
    for name, q in ((n, b.q) for n, b in basis_for(sdxl, layers_of(sdxl)).items()):
        tensors |= {f"unet.{name}.lora.up.weight": q, f"unet.{name}.lora.down.weight": torch.randn(4, 8)}
    with pytest.raises(AdapterFileError, match="saved whole"):
        load_any(write(tmp_path / "a.safetensors", tensors))


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    for name in ("a.pt", "a.bin", "a.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({"transformer.a.lora.q.weight": 1}, protocol=4))
        with pytest.raises(AdapterFileError, match="was not opened"):
            load_any(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, k: t | {k: torch.full_like(t[k], torch.nan)}, "NaN"),
        (lambda t, k: t | {k: t[k][:-1]}, "do not fit each other"),
        (lambda t, k: {"lora_te1_text_model_a.lora_up.weight": torch.ones(1, 1)}, "text encoders or embeddings alone"),
        (lambda t, k: t | {k.replace(".lora_A", ".lora_A.default"): t[k]}, "name a layer again"),
        (
            lambda t, k: {key.replace("unet.down", "transformer.down"): v for key, v in t.items()} | t,
            "name a layer again",
        ),
        (lambda t, k: {}, "empty|no LoRA"),
    ],
)
def test_bad_loras_are_refused(sdxl: Any, tmp_path: Path, change: Any, said: str) -> None:
    tensors = diffusers_form(random_lora(sdxl, layers_of(sdxl)[:2]))
    path = write(tmp_path / "a.safetensors", change(tensors, sorted(tensors)[0]))
    with pytest.raises(AdapterFileError, match=said):
        load_any(path)


def test_a_lora_of_another_model_is_refused(sdxl: Any, tmp_path: Path) -> None:
    pairs = random_lora(sdxl, layers_of(sdxl)[:2])
    sd3 = build_tiny_sd3()
    path = write(tmp_path / "a.safetensors", diffusers_form(pairs))
    with pytest.raises(AdapterFileError, match="2 of its 2 layers are no layers of this sd3 model"):
        import_file(path, pipe=sd3, family=family_of(sd3))
    wide = {name: (torch.randn(3, 7), up) for name, (_, up) in pairs.items()}
    with pytest.raises(MismatchError, match="other shapes"):
        import_file(write(path, diffusers_form(wide)), pipe=sdxl, family=family_of(sdxl))
    with pytest.raises(AdapterFileError, match="says its own alpha"):
        load_any(write(path, kohya_form(pairs, lambda n: "lora_unet_" + n.replace(".", "_"))), alpha=3.0)


def test_text_encoder_layers_are_left_out_by_name(sdxl: Any, tmp_path: Path) -> None:
    pairs = random_lora(sdxl, layers_of(sdxl)[:2])
    tensors = diffusers_form(pairs) | {"text_encoder.a.lora_A.weight": torch.ones(1, 2)}
    adapter = load_any(write(tmp_path / "a.safetensors", tensors))
    assert_same(delta_weights(adapter), products(pairs))
    assert left_out_of(adapter) == ["text_encoder.a"]


# The command line


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny SDXL, a fine-tuned copy, an adapter on its basis, and a stranger's LoRA in kohya form."""
    folder = tmp_path_factory.mktemp("work")
    layers = layers_of(build_tiny_sdxl())[:6]
    base, tuned, _ = tuned_copy(build_tiny_sdxl, layers, rank=2)
    base.save_pretrained(folder / "base")
    tuned.save_pretrained(folder / "tuned")
    basis = Basis.of(base_weights(base.unet, layers), 4, cache_dir=folder / "cache")
    save_adapter(trained(base, layers, basis, base_model=str(folder / "base")), folder / "mine.safetensors")
    names = kohya_names(layers, [name for name, _ in base.unet.named_modules()], 1)
    write(folder / "theirs.safetensors", kohya_form(random_lora(base, layers), names.__getitem__))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_export_command(work: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(work / "mine.safetensors"), "--for", "comfyui"]
    assert main([*command, "--dtype", "float16"]) == 0
    said = capsys.readouterr().out
    assert "by the rules of kohya: 6 of 6 layers match" in said and "diffusers: 6 of 6" in said
    assert load_adapter("mine-kohya.safetensors").metadata.method == "qrlora"
    assert main(command) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["export", str(work / "theirs.safetensors")]) == 2
    assert "names no base model" in capsys.readouterr().err


def test_import_command(work: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, base = str(work / "theirs.safetensors"), str(work / "base")
    assert main(["import", theirs, "--model", base, "--trigger", "<s>", "--role", "style"]) == 0
    assert "ΔW is the file's, unchanged" in capsys.readouterr().out
    assert load_adapter("theirs-imported.safetensors").metadata.trigger == "<s>"
    assert main(["import", theirs, "--model", base]) == 2
    assert "already there" in capsys.readouterr().err
    assert main(["import", theirs, "--like", str(work / "mine.safetensors"), "-o", "like.safetensors"]) == 0
    said = capsys.readouterr().out
    assert said.count("of the energy kept") == 6 and "all layers:" in said
    assert main(["compose", str(work / "mine.safetensors"), "like.safetensors"]) == 0
    assert "cosine of ΔW" in capsys.readouterr().out
    assert (
        main(
            [
                "import",
                theirs,
                "--model",
                base,
                "--basis-rank",
                "4",
                "--columns",
                "style",
                "--json",
                "-o",
                "c.safetensors",
            ]
        )
        == 0
    )
    assert 0 < json.loads(capsys.readouterr().out)["kept"]["total"] < 1
    assert load_adapter("c.safetensors").metadata.columns == (1, 3)
    assert main(["import", theirs, "--basis-rank", "4", "-o", "d.safetensors"]) == 2
    assert "--model" in capsys.readouterr().err


def test_extract_command(work: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["extract", str(work / "tuned"), "--base", str(work / "base")]
    assert main([*command, "--rank", "2"]) == 0
    assert "all layers: 100.0000% kept" in capsys.readouterr().out
    assert load_adapter("extracted.safetensors").metadata.base_model == str(work / "base")
    assert main([*command, "--basis-rank", "4", "-o", "on.safetensors"]) == 0
    assert "lost" in capsys.readouterr().out and load_adapter("on.safetensors").metadata.on_basis
    for wrong, said in ((["-o", "c.safetensors"], "exactly one rank"), (["--rank", "2"], "already there")):
        assert main([*command, *wrong]) == 2
        assert said in capsys.readouterr().err


def test_compose_command_takes_a_strangers_file(work: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(work / "theirs.safetensors"), "--model", str(work / "base")]) == 0
    parts = [f"{work / 'mine.safetensors'}:0.9", "theirs-imported.safetensors"]
    capsys.readouterr()
    assert main(["compose", *parts]) == 2
    assert "--delta-weights RANK" in capsys.readouterr().err
    assert main(["compose", *parts, "--delta-weights", "3"]) == 0
    said = capsys.readouterr().out
    assert "of the sum's energy is lost" in said and "rank 5 loses nothing" in said
    assert main(["export", "composition.safetensors", "--for", "forge"]) == 0
    assert "6 of 6 layers match" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["export", "missing.safetensors"], "nothing there"),
        (["import", "a.pt"], "was not opened"),
        (["import", "missing.safetensors"], "nothing there"),
        (["extract", "./missing", "--base", "./missing", "--rank", "2"], "no such base model"),
        (["import", "a.pt", "--basis-rank", "4", "--columns", "fifth", "--model", "pico"], "unknown columns"),
    ],
)
def test_errors_are_said_without_a_traceback(
    command: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "a.pt").write_bytes(pickle.dumps({}))
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith(f"qrlora {command[0]}:") and "Traceback" not in error


def test_a_foreign_lora_attaches_and_paints_as_stock_diffusers_does(sdxl: Any, tmp_path: Path) -> None:
    pairs = random_lora(sdxl, layers_of(sdxl))
    path = write(tmp_path / "a.safetensors", diffusers_form(pairs))
    sdxl.load_lora_weights(path)
    stock = picture(sdxl)
    sdxl.unload_lora_weights()
    adapter = load_any(path)
    assert np.abs(picture(sdxl, adapters=[(adapter, 1.0)]) - stock).max() <= 1
    copy = build_tiny_sdxl()
    attach(copy.unet, adapter)
