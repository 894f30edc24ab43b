"""The embedded base model and its world: what they promise to everything built on them."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from qrlora import pico
from qrlora.apps.cli import main
from qrlora.errors import TrainingError
from qrlora.lab import base
from qrlora.models.families import load_pipeline, load_structure
from qrlora.models.generation import generate_jobs
from qrlora.pico import world
from qrlora.pico.judge import Verdict
from qrlora.pico.pretraining import autoencoder, denoiser, export, pictures, text
from qrlora.pico.pretraining.plan import Plan
from qrlora.pico.pretraining.run import Run


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline("pico")


def test_world_is_as_large_as_it_says():
    assert len(world.SUBJECTS) >= 28 and len(world.STYLES) >= 16
    assert len(world.RESERVED_SUBJECTS) >= 6 and len(world.RESERVED_STYLES) >= 4
    assert set(world.SEEN_SUBJECTS) | set(world.RESERVED_SUBJECTS) == set(world.SUBJECTS)


def test_pretraining_never_shows_what_is_reserved_or_held_back():
    seen = {(s.subject, s.style) for s in map(world.sample_scene, range(2000))}
    assert not seen & set(world.HELD_BACK_PAIRS)
    assert not {s for s, _ in seen} & set(world.RESERVED_SUBJECTS)
    assert not {t for _, t in seen} & set(world.RESERVED_STYLES)
    assert len(world.HELD_BACK_PAIRS) >= 0.1 * len(world.SEEN_SUBJECTS) * len(world.SEEN_STYLES)


@pytest.mark.parametrize("style", world.STYLES)
def test_every_style_draws_every_subject_the_same_way_twice(style):
    for i, subject in enumerate(world.SUBJECTS):
        scene = world.sample_scene(i, subject=subject, style=style)
        picture, mask = world.render(scene)
        assert picture.shape == (world.SIZE, world.SIZE, 3) and picture.dtype == np.uint8
        assert 0.03 < mask.mean() < 0.7, "the subject is there, and does not fill the picture"
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        assert border.max() == 0, "the subject lies inside the picture"
    assert np.array_equal(world.render(scene)[0], picture)


def test_colour_and_seed_change_the_picture():
    a = world.render(world.sample_scene(1, subject="mug", style="flat", colour="red"))[0]
    assert not np.array_equal(a, world.render(world.sample_scene(1, subject="mug", style="flat", colour="blue"))[0])
    assert not np.array_equal(a, world.render(world.sample_scene(2, subject="mug", style="flat", colour="red"))[0])


def test_what_has_no_name_is_drawn_the_same_way_twice_and_is_nothing_of_the_world():
    scenes = [world.sample_novelty(seed) for seed in range(10)]
    kinds = [(not scene.subject, not scene.style) for scene in scenes]
    assert kinds[:5] == [(False, True), (False, True), (False, True), (True, False), (True, True)]
    for scene in scenes:
        picture, mask = world.render(scene)
        assert np.array_equal(world.render(scene)[0], picture)
        assert 0.01 < mask.mean() < 0.8 and max(mask[0].max(), mask[-1].max(), mask[:, 0].max(), mask[:, -1].max()) == 0
        assert scene.subject not in world.RESERVED_SUBJECTS and scene.style not in world.RESERVED_STYLES
    assert not np.array_equal(world.render(scenes[0])[0], world.render(replace(scenes[0], seed=1))[0])


def test_what_has_no_name_is_called_by_a_new_word_each_time():
    style, thing = world.sample_novelty(0), world.sample_novelty(3)
    said = {world.caption(style, 200 * i) for i in range(50)}
    assert len(said) > 25 and world.caption(style, 200) == world.caption(style, 200)
    assert all(
        re.fullmatch(rf"a photo of a {style.colour} {style.subject} in <[a-z0-9]{{1,3}}> style", s) for s in said
    )
    assert all("<" in world.caption(style, i) for i in range(6)), "no wording passes over what sets it apart"
    assert re.fullmatch(rf"a photo of a {thing.colour} <[a-z0-9]{{1,3}}>", world.caption(thing, 5))


def test_the_named_share_of_examples_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "CHUNK", 20)
    plan = Plan(pictures=60, novelties=20, novel_share=0.3, focus="ink", denoiser_batch=200, caption_dropout=0)
    for i, path in enumerate(pictures.chunks(tmp_path, plan, "latents")):
        np.save(path, np.full((20, 1, 1, 1), i, np.float16))
    (tmp_path / "latents.json").write_text('{"scaling_factor": 1.0}')
    batch = denoiser.batches(tmp_path, plan)
    latents, captions, _ = batch(0)
    novel = [value == 3 for value in latents.flatten().tolist()]
    assert np.mean(novel) == pytest.approx(0.3, abs=0.1)
    assert novel == ["<" in caption for caption in captions]
    assert batch(0)[1] == captions != batch(1)[1]


def test_nameless_subjects_styles_and_both_are_shown_as_often(tmp_path, monkeypatch):
    """Though of the renders three in five have a nameless style."""
    monkeypatch.setattr(pictures, "CHUNK", 20)
    plan = Plan(pictures=20, novelties=20, novel_share=0.6, denoiser_batch=2000, caption_dropout=0)
    scenes = pictures.scenes_of(plan)
    for i, path in enumerate(pictures.chunks(tmp_path, plan, "latents")):
        kinds = [2 * (not scene.subject) + (not scene.style) for scene in scenes[20 * i : 20 * i + 20]]
        np.save(path, np.array(kinds, np.float16).reshape(20, 1, 1, 1))
    (tmp_path / "latents.json").write_text('{"scaling_factor": 1.0}')
    shown = np.bincount(denoiser.batches(tmp_path, plan)(0)[0].flatten().int().numpy(), minlength=4) / 2000
    assert shown == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.05)


def test_stock_diffusers_loads_the_shipped_pipeline_in_one_dtype():
    stock = StableDiffusion3Pipeline.from_pretrained(pico.path(), text_encoder_3=None, tokenizer_3=None)
    assert stock.transformer.config.num_layers == 6
    parts = (stock.transformer, stock.vae, stock.text_encoder, stock.text_encoder_2)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    assert sum(f.stat().st_size for f in pico.path().rglob("*") if f.is_file()) <= 30e6


def test_loading_it_says_nothing_of_what_is_as_it_should_be():
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log, before = logging.getLogger("diffusers"), diffusers.utils.logging.get_verbosity()
    log.addHandler(handler)
    diffusers.utils.logging.set_verbosity_warning()
    try:
        load_pipeline("pico")
        load_structure("pico")
        assert said == []
        StableDiffusion3Pipeline.from_pretrained(pico.path(), text_encoder_3=None, tokenizer_3=None)
        assert any("Expected types for vae" in line for line in said)
        assert any("were passed to AutoencoderDC" in line for line in said)
    finally:
        diffusers.utils.logging.set_verbosity(before)
        log.removeHandler(handler)


@pytest.mark.parametrize("text", ["a photo of a <c> in <s> style", "日本のティーポット", "¿qué? 🫖", ""])
def test_any_string_can_be_tokenised(pipe, text):
    ids = pipe[0].tokenizer(text).input_ids
    assert ids[0] == 0 and ids[-1] == 1 and 1 not in ids[1:-1], "no token is unknown"


def test_prompt_decides_the_picture(pipe):
    """Style and subject show: a neon picture is dark, an ink picture is white, and two subjects differ."""
    jobs = [("a blue mug in neon style", 0), ("a blue mug in ink style", 0), ("a blue hat in ink style", 0)]
    neon, mug, hat = (np.asarray(p, dtype=float) for p in generate_jobs(*pipe, jobs, steps=10, guidance=4.0))
    assert neon.mean() < 80 < 180 < mug.mean()
    assert np.abs(mug - hat).mean() > 5


def test_shares_come_by_pair_subject_and_style_worst_first(tmp_path, monkeypatch, capsys):
    """On answers of a judge that are known: all in neon far from true renders, one of the mugs in another style."""
    subjects, styles = ["mug", "mug", "car", "car", "mug"], ["chalk", "chalk", "chalk", "neon", "neon"]
    scenes = [world.sample_scene(i, subject=s, style=t) for i, (s, t) in enumerate(zip(subjects, styles, strict=True))]
    right, style = np.array([True] * 5), np.array([True, False, True, True, True])
    near = {"pair": np.array([0.5, 0.5, 0.5, 2.0, 2.0]), "pair_palette": np.full(5, 0.5)}
    verdict = Verdict(right, style, np.ones(5), np.ones(5), {}, right, near)
    found = base.shares(verdict, scenes)
    assert {part: found[part] for part in ("n", "subject", "style", "both")} == {
        "n": 5, "subject": 1.0, "style": 0.8, "both": 0.4
    }  # fmt: skip
    assert {name: row["both"] for name, row in found["by"]["pair"].items()} == {
        "car in neon": 0.0, "mug in neon": 0.0, "mug in chalk": 0.5, "car in chalk": 1.0
    }  # fmt: skip
    assert list(found["by"]["pair"])[:3] == ["car in neon", "mug in neon", "mug in chalk"]
    assert list(found["by"]["subject"]) == ["mug", "car"] and list(found["by"]["style"]) == ["neon", "chalk"]
    assert found["by"]["subject"]["mug"] == {"n": 3, "subject": 1.0, "style": 0.6667, "both": 0.3333}

    monkeypatch.setattr(base, "score", lambda *_: found)
    monkeypatch.setattr(base, "bounds", lambda _: {"true renders": found})
    assert main(["lab", "base", "--by", "style", "--json", str(tmp_path / "scores.json")]) == 0
    said = capsys.readouterr().out
    assert json.loads(said.split("\n\n")[0])["scores"]["seen pairs"] == {k: v for k, v in found.items() if k != "by"}
    assert "seen pairs, by style\n   both   style subject       n\n  0.000   1.000   1.000       2  neon\n" in said
    assert json.loads((tmp_path / "scores.json").read_text())["scores"]["seen pairs"] == found


def test_the_tokenizer_of_a_run_is_fitted_once(tmp_path, monkeypatch):
    captions = [world.caption(world.sample_scene(i)) for i in range(40)]
    monkeypatch.setattr(text, "all_captions", lambda: captions)
    first = text.words(tmp_path, Plan())
    monkeypatch.setattr(text, "all_captions", lambda: captions[::-1] * 2)
    again = text.words(tmp_path, Plan())
    assert again.get_vocab() == first.get_vocab() and again("a red mug").input_ids == first("a red mug").input_ids
    started = text.words(tmp_path / "elsewhere", Plan(start=str(pico.path())))
    shipped = load_pipeline("pico")[0].tokenizer
    assert started.get_vocab() == shipped.get_vocab()
    assert [started(c).input_ids for c in captions] == [shipped(c).input_ids for c in captions]


def test_a_flat_guess_at_grain_costs_more_than_grain_elsewhere():
    """Where bright and dark points lie cannot be known from the latents; that there are some can."""
    generator = torch.Generator().manual_seed(0)
    grain, other = (0.2 * torch.randn(2, 3, 64, 64, generator=generator) for _ in range(2))
    flat = torch.zeros_like(grain)
    assert autoencoder.local_contrast(flat, 8).max() == pytest.approx(0.01)
    assert autoencoder.local_contrast(grain, 8).mean() == pytest.approx(0.2, rel=0.05)
    assert autoencoder.reconstruction_loss(other, grain) < autoencoder.reconstruction_loss(flat, grain)
    without = (flat - grain).abs().mean() < (other - grain).abs().mean()
    assert without, "L1 alone prefers the flat guess"


def test_a_decoder_trained_alone_leaves_the_rest_as_it_was(pipe, tmp_path):
    plan = Plan(start=str(pico.path()))
    autoencoder.autoencoder_stage(tmp_path, plan)
    state = torch.load(tmp_path / "autoencoder.pt", weights_only=True)["modules"]["vae"]
    state["decoder.conv_out.conv.bias"] += 0.5
    torch.save({"modules": {"vae": state}}, tmp_path / "decoder.pt")
    export.export_stage(tmp_path, plan, tmp_path / "pipeline")
    for part in ("text_encoder", "text_encoder_2"):
        config = json.loads((tmp_path / "pipeline" / part / "config.json").read_text())
        assert config["dtype"] == "float32", "as diffusers loads the rest"
    (original, _), (found, _) = pipe, load_pipeline(str(tmp_path / "pipeline"))
    for part in ("transformer", "text_encoder", "text_encoder_2"):
        for name, weight in getattr(original, part).state_dict().items():
            assert torch.equal(getattr(found, part).state_dict()[name], weight), name
    moved = found.vae.decoder.conv_out.conv.bias - original.vae.decoder.conv_out.conv.bias
    assert moved.detach().numpy() == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_pretraining_that_is_told_to_end_is_saved_and_goes_on_bit_for_bit(tmp_path, number):
    def run(work, steps=6):
        work.mkdir(exist_ok=True)
        layer = torch.nn.Linear(3, 1)
        torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
        made = Run(work, "line", {"line": layer}, [torch.optim.AdamW(layer.parameters(), 0.1)], steps, lambda _: 1)
        made.restore()
        return made, layer

    def loss_of(step):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return (layer(x) - x.sum(1, keepdim=True) ** 2).square().mean()

    def interrupting(step):
        if step == 2:
            os.kill(os.getpid(), number)
        return loss_of(step)

    whole, layer = run(tmp_path / "whole")
    whole.go(loss_of)
    weight = layer.weight.detach().clone()
    stopped, layer = run(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt, match="after step 3"):
        stopped.go(interrupting)
    resumed, layer = run(tmp_path / "stopped")
    assert resumed.step == 3
    resumed.go(loss_of)
    assert torch.equal(layer.weight, weight)
    with pytest.raises(TrainingError, match="more steps"):
        run(tmp_path / "stopped", steps=5)
