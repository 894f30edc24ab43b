"""Everybody's LoRA: the table of dialects by family in docs/exchange.md, cell by cell, and files of public tools."""

from __future__ import annotations

import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import diffusers.loaders.single_file_utils as checkpoints
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from dialects import DIALECTS, Lora, by_layer, by_original, layers_of, originals, peft_config, random_pairs
from qrlora.apps.cli import main
from qrlora.apps.serving.engine import Shelf
from qrlora.errors import AdapterFileError
from qrlora.method.adapter import Adapter, AdapterMetadata
from qrlora.models.exchange import LayerNames, export_adapter, import_file, left_out_of, load_any
from qrlora.models.exchange.forms import FAMILIES_OF, target_of
from qrlora.models.families import family_of
from samples import assert_rounded
from tiny_pipelines import BUILDERS, build_tiny_sd3

DOCS = Path(__file__).parents[2] / "docs" / "exchange.md"
CASES = Path(__file__).parents[1] / "cases" / "loras"
FAMILY_OF_CASE = {"z": "z-image", "k": "flux2-klein", "q": "qwen-image", "f": "flux", "x": "sdxl"}


def table(heading: str) -> dict[tuple[str, str], str]:
    """(row, column) -> cell of the first table after a heading of docs/exchange.md."""
    lines = DOCS.read_text().split(f"## {heading}\n", 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in itertools.takewhile(lambda line: line.startswith("|"), lines[first:])
    ]
    return {(row[0], name): cell for row in rows[2:] for name, cell in zip(rows[0][1:], row[1:], strict=True)}


CELLS = {key: cell for key, cell in table("Dialects").items() if cell != "–"}


@functools.cache
def tiny(family: str) -> Any:
    return BUILDERS[family]()


def written(lora: Lora, folder: Path) -> Path:
    path = folder / "theirs.safetensors"
    safetensors.torch.save_file({key: tensor.clone().contiguous() for key, tensor in lora.tensors.items()}, path)
    if lora.config:
        (folder / "adapter_config.json").write_text(peft_config(lora))
    return path


def assert_delta_weights(adapter: Adapter, truth: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(adapter.deltas) == set(truth)
    for layer, delta in truth.items():
        expected = delta.flatten(1).double()
        error = (adapter.delta_weight(layer).double() - expected).norm()
        assert float(error) <= tolerance * float(expected.norm()), layer


def test_the_table_has_every_dialect_and_family() -> None:
    assert {row for row, _ in CELLS} == set(DIALECTS)
    assert {family for _, family in table("Dialects")} == set(BUILDERS)
    assert {cell for cell in CELLS.values()} == {"read", "refused", "left out"}


@pytest.mark.parametrize(("dialect", "family"), list(CELLS), ids=" of ".join)
def test_a_cell_of_the_table_is_true(dialect: str, family: str, tmp_path: Path) -> None:
    pipe = tiny(family)
    lora = DIALECTS[dialect](pipe)
    path = written(lora, tmp_path)
    if CELLS[dialect, family] == "refused":
        with pytest.raises(AdapterFileError, match=f"no plain LoRA: {dialect}") as caught:
            load_any(path)
        assert "qrlora extract" in str(caught.value) and str(path) in str(caught.value)
        return
    adapter, _ = import_file(path, pipe=pipe, family=family_of(pipe))
    assert_delta_weights(adapter, lora.truth)
    left = ["bundle_emb.x.clip_l", "lora_te1_text_model_a", "text_encoder.a"]
    assert left_out_of(adapter) == (left if CELLS[dialect, family] == "left out" else [])
    if (dialect, family) in GUESSED:
        assert_delta_weights(load_any(path), lora.truth)


# Full-size SDXL's blocks have another number of layers than the tiny one's: without the model its file is refused.
GUESSED = {key for key in CELLS if key[1] != "sdxl" or key[0] not in ("kohya sd-scripts", "ai-toolkit")}


@pytest.mark.parametrize(
    "case", sorted(path.stem for path in CASES.glob("?_*.safetensors") if ".truth" not in path.name)
)
@pytest.mark.parametrize("with_model", [True, False])
def test_a_file_of_a_public_tool_is_read_with_the_right_delta_weight(case: str, with_model: bool) -> None:
    pipe = tiny(FAMILY_OF_CASE[case[0]])
    path = CASES / f"{case}.safetensors"
    truth = safetensors.torch.load_file(CASES / f"{case}.truth.safetensors")
    if case == "x_kohya_te" and not with_model:
        with pytest.raises(AdapterFileError, match="of no known model family"):
            load_any(path)
        return
    adapter = import_file(path, pipe=pipe, family=family_of(pipe))[0] if with_model else load_any(path)
    assert_delta_weights(adapter, truth, 2e-3)
    assert bool(left_out_of(adapter)) == (case in ("x_kohya_te", "f_aitk_emb"))


class _Lenient(dict[str, Tensor]):
    """A checkpoint that has every bias and norm: zeros."""

    def pop(self, key: str, *default: Any) -> Any:
        return super().pop(key, *(default or (torch.zeros(96),)))


@pytest.mark.parametrize("family", ["flux", "flux2_klein", "sd3", "z_image"])
def test_the_original_names_are_those_of_diffusers_own_checkpoint_conversion(family: str) -> None:
    """What a fused weight is divided into, and which halves change places, by code that is not ours."""
    pipe = build_tiny_sd3(medium=True) if family == "sd3" else tiny(family.replace("_", "-"))
    shapes = layers_of(pipe)
    checkpoint = _Lenient()
    # FLUX.1's converter divides this one at 3072, whatever the model's size; a file of a public tool tests it
    names = {name: layers for name, layers, _ in originals(pipe) if not (family == "flux" and "linear1" in name)}
    for name, layers in names.items():
        height = sum(shapes[layer][0] for layer in layers)
        checkpoint[f"{name}.weight"] = torch.randn(height, *shapes[layers[0]][1:])
    if family == "flux":
        checkpoint["single_blocks.0.linear1.weight"] = torch.zeros(3 * 3072 + 12288, 1)
        checkpoint["single_blocks.0.linear1.bias"] = torch.zeros(3 * 3072 + 12288)
    deltas = {name: checkpoint[f"{name}.weight"].clone() for name in names}
    convert = getattr(checkpoints, f"convert_{family.removesuffix('_klein')}_transformer_checkpoint_to_diffusers")
    if family == "sd3":
        checkpoint["context_embedder.weight"] = torch.zeros(shapes["context_embedder"])
    expected = convert(checkpoint)
    table = LayerNames(family_of(pipe), family_of(pipe).denoiser_of(pipe))
    for name, delta in deltas.items():
        pieces = table.find(name, len(delta), delta[0].numel())
        assert {piece.layer for piece in pieces} == set(names[name])
        for piece in pieces:
            rows = delta[piece.start : piece.stop]
            rows = rows.roll(len(rows) // 2, 0) if piece.swapped else rows
            if name != "context_embedder":
                torch.testing.assert_close(rows, expected[f"{piece.layer}.weight"], rtol=0, atol=0)


def test_names_that_only_diffusers_knows_are_found_by_its_conversion(tmp_path: Path) -> None:
    """Some FLUX.2 files call a transformer block so; our table has no such row."""
    pipe = tiny("flux2-klein")
    lora = by_layer(lambda name: f"diffusion_model.{name.replace('transformer_blocks', 'sformer_blocks')}")(pipe)
    kept = {key: tensor for key, tensor in lora.tensors.items() if ".sformer_blocks" in key}
    lora = Lora(kept, {name: delta for name, delta in lora.truth.items() if name.startswith("transformer_blocks")})
    path = written(lora, tmp_path)
    assert_delta_weights(import_file(path, pipe=pipe, family=family_of(pipe))[0], lora.truth)


def test_a_converter_that_fails_is_an_error_of_ours_that_names_file_and_keys(tmp_path: Path) -> None:
    tensors = {"lora_unet_double_blocks_x_img.lora_down.weight": torch.ones(1, 4)}
    tensors |= {"lora_unet_double_blocks_x_img.lora_up.weight": torch.ones(4, 1)}
    path = written(Lora(tensors, {}), tmp_path)
    for family in BUILDERS:
        with pytest.raises(AdapterFileError, match="double_blocks_x_img") as caught:
            import_file(path, pipe=tiny(family), family=family_of(tiny(family)))
        assert str(path) in str(caught.value)


def test_without_a_model_names_and_shapes_decide_the_family(tmp_path: Path) -> None:
    """FLUX.1 and FLUX.2 share names; a layer of 7 hidden sizes is FLUX.1's, one of 9 is FLUX.2's, no other is any's."""
    stem = "lora_unet_single_blocks_3_linear1"
    for height, layers in ((7, 4), (9, 1)):
        tensors = {f"{stem}.lora_down.weight": torch.ones(2, 8), f"{stem}.lora_up.weight": torch.ones(8 * height, 2)}
        assert len(load_any(written(Lora(tensors, {}), tmp_path)).deltas) == layers
    tensors[f"{stem}.lora_up.weight"] = torch.ones(8 * 8, 2)
    with pytest.raises(AdapterFileError, match=r"no known model family(.|\n)*single_blocks_3_linear1': '\(64, 8\)'"):
        load_any(written(Lora(tensors, {}), tmp_path))
    strange = {
        "blocks.0.attn.to_q.lora_A.weight": torch.ones(2, 8),
        "blocks.0.attn.to_q.lora_B.weight": torch.ones(8, 2),
    }
    with pytest.raises(AdapterFileError, match=r"no known model family(.|\n)*blocks\.0\.attn\.to_q"):
        load_any(written(Lora(strange, {}), tmp_path))
    both = {"time_in.in_layer.lora_A.weight": torch.ones(2, 8), "time_in.in_layer.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(AdapterFileError, match="different families"):
        load_any(written(Lora(both, {}), tmp_path))


def test_a_lora_of_a_1x1_convolution_fits_the_linear_layer_that_it_is(tmp_path: Path) -> None:
    pipe = tiny("sdxl")
    lora = DIALECTS["diffusers"](pipe)
    lora.tensors = {key: t[..., None, None] if t.ndim == 2 else t for key, t in lora.tensors.items()}
    adapter, _ = import_file(written(lora, tmp_path), pipe=pipe, family=family_of(pipe))
    assert_delta_weights(adapter, lora.truth)
    assert {name: adapter.shapes[name] for name in lora.truth} == layers_of(pipe)


# Export


def lora_of(pipe: Any, layers: dict[str, tuple[int, ...]]) -> Adapter:
    pairs = random_pairs(layers)
    rank = max(len(down) for down, _ in pairs.values())
    fill = {n: (torch.zeros(rank - len(down), down[0].numel()), rank - len(down)) for n, (down, _) in pairs.items()}
    deltas = {name: torch.cat([down.flatten(1), fill[name][0]]) for name, (down, _) in pairs.items()}
    ups = {n: torch.nn.functional.pad(up.flatten(1), (0, fill[n][1])) for n, (_, up) in pairs.items()}
    metadata = AdapterMetadata("lora", rank, 2.0 * rank, denoiser=family_of(pipe).denoiser)
    return Adapter(metadata, deltas, layers, ups=ups, name="mine")


EXPORTS = [(form, family) for form, families in FAMILIES_OF.items() for family in families]


@pytest.mark.parametrize(("form", "family"), EXPORTS, ids=" of ".join)
def test_an_export_comes_back_through_diffusers_and_through_our_reader(form: str, family: str, tmp_path: Path) -> None:
    pipe = tiny(family)
    layers = layers_of(pipe, convolutions=family in ("sd", "sdxl"))
    if family == "flux":  # diffusers divides `linear1` at the full model's sizes; `guidance_in` and others it misnames
        layers = {name: shape for name, shape in layers.items() if name.startswith("transformer_blocks.")}
    elif (
        family == "flux2-klein"
    ):  # what diffusers reads of this form: the blocks; not all of the rest, in the right order
        layers = {name: shape for name, shape in layers.items() if "_blocks." in name}
    elif family == "qwen-image":
        layers = {name: shape for name, shape in layers.items() if "_blocks." in name}
    adapter, path = lora_of(pipe, layers), tmp_path / "theirs.safetensors"
    export = export_adapter(adapter, path, form, pipe, family_of(pipe))
    assert set(export.matched.values()) == {len(layers)}
    truth = {layer: adapter.delta_weight(layer).double() for layer in layers}
    assert_delta_weights(load_any(path, names=LayerNames(family_of(pipe), family_of(pipe).denoiser_of(pipe))), truth)
    pipe.load_lora_weights(path, adapter_name="theirs")
    for name, module in family_of(pipe).denoiser_of(pipe).named_modules():
        if name in truth:
            theirs = module.get_delta_weight("theirs").flatten(1)
            up, down = (adapter.ups or {})[name], adapter.deltas[name]
            size = adapter.scaling * float(up.abs().max() * down.abs().max())  # of a product; each is a sum of them
            assert_rounded(theirs, truth[name], terms=2 * (len(down) + 2), size=size)
    pipe.unload_lora_weights()
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"


def test_a_part_of_a_fused_layer_is_exported_with_zeros_for_the_others(tmp_path: Path) -> None:
    pipe = tiny("flux2-klein")
    layers = {name: shape for name, shape in layers_of(pipe).items() if name.endswith(("attn.to_q", "attn.to_v"))}
    adapter, path = lora_of(pipe, layers), tmp_path / "theirs.safetensors"
    export_adapter(adapter, path, "original", pipe, family_of(pipe))
    again = load_any(path)
    assert not again.delta_weight("transformer_blocks.0.attn.to_k").any()
    for layer in layers:
        torch.testing.assert_close(again.delta_weight(layer), adapter.delta_weight(layer))


def test_an_export_that_diffusers_reads_otherwise_is_refused(tmp_path: Path) -> None:
    """FLUX.2's last norm, whose halves diffusers' LoRA conversion leaves in the original's order."""
    pipe = tiny("flux2-klein")
    layers = {name: shape for name, shape in layers_of(pipe).items() if name == "norm_out.linear"}
    with pytest.raises(AdapterFileError, match=r"norm_out\.linear(.|\n)*--for diffusers"):
        export_adapter(lora_of(pipe, layers), tmp_path / "a.safetensors", "original", pipe, family_of(pipe))
    assert not list(tmp_path.iterdir())


def test_every_program_gets_the_form_that_the_table_says() -> None:
    for (program, family), form in table("Which form for which program").items():
        for name in program.replace("`", "").split(", "):
            assert target_of(name, family) == form, (program, family)


# The command line


def test_import_and_compose_read_the_same_and_say_what_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = tiny("sdxl")
    pipe.save_pretrained("sdxl")
    case = str(CASES / "x_kohya_te.safetensors")
    assert main(["import", case, "--model", "sdxl"]) == 0
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in capsys.readouterr().err
    assert main(["compose", case, "--delta-weights", "8", "--model", "sdxl", "-o", "sum.safetensors"]) == 0
    assert "not the denoiser's" in capsys.readouterr().err
    truth = safetensors.torch.load_file(CASES / "x_kohya_te.truth.safetensors")
    for name in ("x_kohya_te-imported.safetensors", "sum.safetensors"):
        assert_delta_weights(load_any(name), truth, 2e-3)
    assert main(["import", case, "-o", "guessed.safetensors"]) == 2
    assert "qrlora import FILE --model MODEL" in capsys.readouterr().err


def test_the_server_reads_the_same_and_logs_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = tiny("flux")
    for name in ("f_onetrainer", "f_aitk_emb", "q_musubi"):
        shutil.copy(CASES / f"{name}.safetensors", tmp_path)
    shelf = Shelf(tmp_path, LayerNames(family_of(pipe), pipe.transformer))
    shelf.scan()
    truth = safetensors.torch.load_file(CASES / "f_onetrainer.truth.safetensors")
    assert_delta_weights(shelf.adapters["f_onetrainer"], truth, 2e-3)
    assert set(shelf.adapters) == {"f_onetrainer", "f_aitk_emb"} and "of this flux model" in shelf.left_out["q_musubi"]
    assert "bundle_emb.ohwx.clip_l" in caplog.text


def test_a_fal_file_needs_no_configuration_and_a_peft_file_does(tmp_path: Path) -> None:
    lora = DIALECTS["PEFT"](tiny("flux"))
    lora.config = {}
    with pytest.raises(AdapterFileError, match="does not say its alpha"):
        load_any(written(lora, tmp_path))
    fal = by_original("base_model.model.{}".format)(tiny("flux"))
    assert_delta_weights(load_any(written(fal, tmp_path)), fal.truth)
