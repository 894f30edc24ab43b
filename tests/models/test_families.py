"""The family table: objective, encodings, and how base models are found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderTiny
from huggingface_hub import errors as hub_errors

from qrlora.errors import DataError, ModelError
from qrlora.method.adapter import adapter_from_model
from qrlora.models import families
from qrlora.models.families import FAMILIES, ModelFamily, family_of, load_pipeline
from qrlora.models.families.base import encode_images
from qrlora.models.training.attach import peft_config
from qrlora.models.training.batches import family_options
from qrlora.models.training.recipe import Recipe
from samples import assert_rounded
from tiny_pipelines import build_tiny_flux, build_tiny_flux2_klein

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded(tiny_sd3: Path):
    return load_pipeline(tiny_sd3, device="cpu")


def test_timesteps_are_logit_normal_on_the_shifted_grid(loaded) -> None:
    pipe, family = loaded
    scheduler = family.training_scheduler(pipe)
    timesteps = family.objective.timesteps(scheduler, 20_000, torch.Generator().manual_seed(0))
    assert torch.isin(timesteps, scheduler.timesteps).all()
    # Undo the shift (3 in the fixture) and the grid's descent: what is left is the sigmoid of a standard normal.
    sigma = timesteps / 1000
    normal = torch.logit((sigma / (3 - 2 * sigma)).clamp(1e-3, 1 - 1e-3))
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    noisier = family.objective.timesteps(scheduler, 20_000, torch.Generator().manual_seed(0), logit_mean=1.0)
    assert (noisier >= timesteps).all() and noisier.mean() > timesteps.mean() + 100


def test_training_scheduler_ignores_what_generating_left_behind(loaded) -> None:
    pipe, family = loaded
    pipe.scheduler.set_timesteps(2)
    assert len(family.training_scheduler(pipe).timesteps) == 1000


def test_prompts_condition_training_as_they_do_generation(loaded) -> None:
    """The same tensors that the pipeline hands its denoiser; one zero token for the missing T5."""
    pipe, family = loaded
    prompts = ["a photo of a <c> mug", "ünïcödé 🫖"]
    seen = {}
    hook = pipe.transformer.register_forward_pre_hook(lambda *call: seen.update(call[2]), with_kwargs=True)
    pipe(prompts, num_inference_steps=1, guidance_scale=1.0, **family.prompt_options(pipe, prompts))
    hook.remove()
    conditions = family.encode_prompts(pipe, prompts)
    assert conditions["encoder_hidden_states"].shape == (2, 77 + 1, 64)
    for name, value in conditions.items():
        assert torch.equal(value, seen[name])


def test_too_long_a_prompt_is_refused(loaded) -> None:
    pipe, family = loaded
    with pytest.raises(DataError, match="prompt too long"):
        family.encode_prompts(pipe, ["teapot " * 40])


def test_latents_undo_shift_and_scale(loaded) -> None:
    pipe, family = loaded
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean = pipe.vae.encode(images).latent_dist.mode()
    assert_rounded(family.encode_images(pipe, images), (mean - 0.06) * 1.5, terms=64)


def deterministic_autoencoders() -> list[AutoencoderTiny | AutoencoderDC]:
    """Autoencoders whose encoder gives latents rather than a distribution of them."""
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=2.0,
    )
    layout = {"block_types": "ResBlock", "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
    deep = AutoencoderDC(
        latent_channels=4,
        scaling_factor=2.0,
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in layout.items()},
    )
    return [tiny, deep]


@pytest.mark.parametrize("vae", deterministic_autoencoders(), ids=lambda vae: type(vae).__name__)
def test_deterministic_autoencoders_are_read_too(vae: AutoencoderTiny | AutoencoderDC) -> None:
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    latents = encode_images(SimpleNamespace(vae=vae), images)
    assert_rounded(latents, vae.encode(images, return_dict=False)[0] * 2.0, terms=64)


def test_every_target_of_a_family_is_in_its_denoiser(loaded) -> None:
    pipe, family = loaded
    names = [name for name, module in pipe.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in family.targets:
        assert any(name.endswith("." + target) for name in names), target
    assert family.resolution(pipe) == 16 and family.export_prefix == "transformer."


CHOICES = [
    (build_tiny_flux, "flux-subject.toml", {"proj_mlp", "proj_out"}),
    (build_tiny_flux2_klein, "flux2-klein-subject.toml", {"attn.to_out"}),
]


@pytest.mark.parametrize(("build", "file", "names"), CHOICES, ids=["flux", "flux2-klein"])
def test_a_recipe_can_add_what_the_published_set_leaves_out(build: Any, file: str, names: set[str]) -> None:
    """By the regular expression that the family's recipe has in a comment."""
    [line] = [x for x in (ROOT / "recipes" / file).read_text().splitlines() if x.startswith("# targets = '")]
    chosen: dict[str | None, set[str]] = {}
    for targets in (None, line.split("'")[1]):
        pipe = build()
        family = family_of(pipe)
        recipe = Recipe(role="subject", images="mug.png", rank=2, targets=targets)
        pipe.transformer.add_adapter(peft_config(recipe, family), adapter_name="mug")
        chosen[targets] = set(adapter_from_model(pipe.transformer, "mug", family=family.name).deltas)
    published, more = chosen.values()
    assert more - published == {f"single_transformer_blocks.0.{name}" for name in names}
    assert published < more


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_every_family_has_a_row_and_a_recipe_that_suits_it(family: ModelFamily) -> None:
    [row] = [line for line in (ROOT / "docs/families.md").read_text().splitlines() if f"| `{family.name}` |" in line]
    assert f"`{family.pipeline_class}`" in row
    recipe = Recipe.load(ROOT / "recipes" / row.split("`")[-2])
    family_options(recipe, family)
    peft_config(recipe, family)


def test_few_step_models_are_sampled_in_few_steps() -> None:
    flux, klein = FAMILIES["FluxPipeline"], FAMILIES["Flux2KleinPipeline"]
    assert [flux.sampling(build_tiny_flux(dev)) for dev in (True, False)] == [(28, 3.5), (4, 0.0)]
    assert [klein.sampling(build_tiny_flux2_klein(d)) for d in (False, True)] == [(50, 4.0), (4, 1.0)]
    assert flux.prompt_options(build_tiny_flux(guidance_embeds=False), ["a mug"]) == {"max_sequence_length": 256}


def test_unknown_pipeline_lists_the_families() -> None:
    with pytest.raises(ModelError) as error:
        family_of("WuerstchenCombinedPipeline")
    assert "sd3 (StableDiffusion3Pipeline)" in str(error.value) and "WuerstchenCombinedPipeline" in str(error.value)
    assert family_of("StableDiffusion3Pipeline") is FAMILIES["StableDiffusion3Pipeline"]


def test_short_names_resolve(tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "tiny", SimpleNamespace(path=lambda: tiny_sd3, SETTINGS={"steps": 3}), raising=False)
    monkeypatch.setitem(families.EMBEDDED, "tiny", "qrlora.models.families:tiny")
    family = load_pipeline("tiny", device="cpu")[1]
    assert (family.name, family.steps, family.guidance) == ("sd3", 3, families.SD3.guidance)


def test_folders_that_are_no_base_model(tmp_path: Path, tiny_sd3: Path) -> None:
    for said, index in [("not a base model", "{broken"), ("not a base model", "{}"), ("not a base model", "[]")]:
        (tmp_path / "model_index.json").write_text(index)
        with pytest.raises(ModelError, match=said):
            load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    with pytest.raises(ModelError, match="no model family"):
        load_pipeline(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(ModelError, match="not a base model"):
        load_pipeline(tmp_path)


@pytest.mark.parametrize("harm", ["missing", "truncated"])
def test_incomplete_model(tmp_path: Path, tiny_sd3: Path, harm: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd3, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.unlink() if harm == "missing" else weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be loaded") as error:
        load_pipeline(folder)
    assert error.value.remedy


def test_names_that_lead_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="hub id 'owner/name'"):
        load_pipeline("./no/such/folder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="--model pico"):
        load_pipeline("owner/never-downloaded")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (hub_errors.GatedRepoError, "accept its licence"),
        (hub_errors.RepositoryNotFoundError, "check the spelling"),
        (hub_errors.LocalEntryNotFoundError, "--model pico"),
        (ConnectionError, "check the connection"),
    ],
)
def test_hub_failures_come_with_what_to_do(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], said: str) -> None:
    def fail(*_: object) -> None:
        raise kind.__new__(kind)

    monkeypatch.setattr(families, "hf_hub_download", fail)
    with pytest.raises(ModelError, match=said):
        load_pipeline("owner/name")
